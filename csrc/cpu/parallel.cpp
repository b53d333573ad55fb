#include "cpu/parallel.h"

#if defined(__linux__)
#include <sched.h>
#endif

#include <algorithm>
#include <atomic>
#include <chrono>
#include <exception>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "check.h"

namespace tipl {
namespace {

constexpr int kMaxThreads = 1024;
constexpr int kSpins = 4096;  // pauses before a waiting thread goes to sleep: tens of microseconds

void pause() noexcept {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Waits until a value of `word` is `enough`, and returns it. Spins first, then sleeps until notified.
template <class Enough>
unsigned wait_until(const std::atomic<unsigned> &word, int spins, const Enough &enough) noexcept {
  for (int spin = 0; spin < spins; ++spin) {
    const unsigned now = word.load(std::memory_order_acquire);
    if (enough(now)) return now;
    pause();
  }
  for (;;) {
    const unsigned now = word.load();
    if (enough(now)) return now;
    word.wait(now);
  }
}

}  // namespace

int available_cpus() noexcept {
#if defined(__linux__)
  cpu_set_t cpus;
  if (sched_getaffinity(0, sizeof cpus, &cpus) == 0) return std::max(1, CPU_COUNT(&cpus));
#endif
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

struct ThreadPool::Team {
  explicit Team(int size) : size(size), spins(size <= available_cpus() ? kSpins : 0), errors(size), arrivals(size) {
    try {
      for (int rank = 1; rank < size; ++rank) threads.emplace_back([this, rank] { work(rank); });
    } catch (...) {  // the system has no more threads: stop those that started
      stop();
      throw;
    }
  }

  void stop() {
    call = nullptr;
    job.fetch_add(1);
    job.notify_all();
    for (std::thread &thread : threads) thread.join();
  }

  void work(int rank) noexcept {
    for (unsigned seen = 0;;) {
      seen = wait_until(job, spins, [seen](unsigned now) { return now != seen; });
      if (call == nullptr) return;
      attempt(rank);
      if (running.fetch_sub(1) == 1) running.notify_one();
    }
  }

  // Waits until the workers have finished, and asks `poll` meanwhile. Spins first, then takes naps, each a sixteenth of
  // the time waited so far.
  void wait_asking(Poll &poll) {
    using std::chrono::steady_clock;
    constexpr steady_clock::duration kShortest = std::chrono::microseconds(10), kLongest = std::chrono::milliseconds(5);
    for (int spin = 0; spin < spins; ++spin) {
      if (running.load(std::memory_order_acquire) == 0) return;
      pause();
    }
    for (const auto begin = steady_clock::now(); running.load() != 0 && !left_by_fork(); poll.stopped(0)) {
      std::this_thread::sleep_for(std::clamp((steady_clock::now() - begin) / 16, kShortest, kLongest));
    }
  }

  // Whether this is a forked child, in which none of the threads exist.
  bool left_by_fork() const noexcept { return depth != fork_depth(); }

  void attempt(int rank) noexcept {
    try {
      call(context, rank);
    } catch (...) {
      errors[rank] = std::current_exception();
    }
  }

  const int size, spins;
  const uint32_t depth = fork_depth();
  Call call = nullptr;  // the job; written before `job` changes, read after
  void *context = nullptr;
  std::vector<std::exception_ptr> errors;  // (size,), by rank
  // Each on a cache line of its own, since some threads write them while others spin on them. Counters may wrap.
  struct alignas(64) Counter {
    std::atomic<unsigned> count{0};
  };
  std::vector<Counter> arrivals;                 // (size,), how many barriers each rank has reached
  alignas(64) std::atomic<unsigned> job{0};      // counts jobs; a change is the signal to start
  alignas(64) std::atomic<unsigned> running{0};  // workers that have not finished the job
  std::vector<std::thread> threads;              // ranks 1 ... size - 1
};

ThreadPool::ThreadPool(ptrdiff_t num_threads) : size_(static_cast<int>(num_threads)) {
  check(1 <= num_threads && num_threads <= kMaxThreads, "num_threads must lie in [1, ", kMaxThreads, "], got ",
        num_threads);
}

ThreadPool::~ThreadPool() {
  if (team_ == nullptr || team_->left_by_fork()) return;
  team_->stop();
  delete team_;
}

void ThreadPool::start(Call call, void *context, Poll *poll) {
  if (size_ == 1) return call(context, 0);
  if (team_ == nullptr || team_->left_by_fork()) team_ = new Team(size_);
  Team &team = *team_;
  team.call = call;
  team.context = context;
  team.running.store(static_cast<unsigned>(size_ - 1));
  team.job.fetch_add(1);
  team.job.notify_all();
  team.attempt(0);
  if (poll != nullptr) {
    team.wait_asking(*poll);
  } else if (!team.left_by_fork()) {
    wait_until(team.running, team.spins, [](unsigned left) { return left == 0; });
  }
  if (team.left_by_fork()) throw Interrupted();  // a signal handler forked: the work of the other ranks is missing here
  std::exception_ptr first;
  for (std::exception_ptr &error : team.errors) {
    if (error && !first) first = error;
    error = nullptr;
  }
  if (first) std::rethrow_exception(first);
}

void ThreadPool::barrier(int rank) noexcept {
  if (size_ == 1) return;
  Team &team = *team_;
  if (team.left_by_fork()) return;
  // Each rank writes one line and reads those of the others. A shared counter would travel between the cores twice.
  const unsigned mine = team.arrivals[rank].count.load(std::memory_order_relaxed) + 1;
  team.arrivals[rank].count.store(mine);
  team.arrivals[rank].count.notify_all();
  for (const Team::Counter &other : team.arrivals) {
    wait_until(other.count, team.spins, [mine](unsigned count) { return static_cast<int>(count - mine) >= 0; });
  }
}

}  // namespace tipl
