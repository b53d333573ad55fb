#include "parallel.h"

#include <pthread.h>
#if defined(__linux__)
#include <sched.h>
#endif

#include <algorithm>
#include <atomic>
#include <exception>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "check.h"

namespace tipl {
namespace {

constexpr int kMaxThreads = 1024;
constexpr int kSpins = 4096;  // pauses before a waiting thread sleeps: tens of microseconds

void pause() noexcept {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Returns a value of `word` that is not `old`: spins first, then sleeps until notified.
int wait_for_change(const std::atomic<int> &word, int old, int spins) noexcept {
  for (int spin = 0; spin < spins; ++spin) {
    const int now = word.load(std::memory_order_acquire);
    if (now != old) return now;
    pause();
  }
  for (;;) {
    const int now = word.load();
    if (now != old) return now;
    word.wait(old);
  }
}

// How many forks lie between the process that loaded the library and this one.
std::atomic<int> fork_depth{0};

int current_fork_depth() {
  static const int registered = pthread_atfork(nullptr, nullptr, [] { fork_depth.fetch_add(1); });
  static_cast<void>(registered);
  return fork_depth.load();
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
  explicit Team(int size) : size(size), spins(size <= available_cpus() ? kSpins : 0), errors(size) {
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
    for (int seen = 0;;) {
      seen = wait_for_change(job, seen, spins);
      if (call == nullptr) return;
      attempt(rank);
      if (running.fetch_sub(1) == 1) running.notify_one();
    }
  }

  void attempt(int rank) noexcept {
    try {
      call(context, rank);
    } catch (...) {
      errors[rank] = std::current_exception();
    }
  }

  const int size, spins;
  const int depth = current_fork_depth();
  Call call = nullptr;  // the job; written before `job` changes, read after
  void *context = nullptr;
  std::vector<std::exception_ptr> errors;  // (size,), by rank
  // Each on a cache line of its own: all are written while others spin on them.
  alignas(64) std::atomic<int> job{0};       // counts jobs; a change is the signal to start
  alignas(64) std::atomic<int> running{0};   // workers that have not finished the job
  alignas(64) std::atomic<int> arrived{0};   // ranks inside the current barrier
  alignas(64) std::atomic<int> barriers{0};  // counts barriers; a change is the signal to go on
  std::vector<std::thread> threads;          // ranks 1 ... size - 1
};

ThreadPool::ThreadPool(ptrdiff_t num_threads) : size_(static_cast<int>(num_threads)) {
  check(1 <= num_threads && num_threads <= kMaxThreads, "num_threads must lie in [1, ", kMaxThreads, "], got ",
        num_threads);
}

ThreadPool::~ThreadPool() {
  if (team_ == nullptr || team_->depth != current_fork_depth()) return;
  team_->stop();
  delete team_;
}

void ThreadPool::run(Call call, void *context) {
  if (size_ == 1) return call(context, 0);
  if (team_ == nullptr || team_->depth != current_fork_depth()) team_ = new Team(size_);
  Team &team = *team_;
  team.call = call;
  team.context = context;
  team.running.store(size_ - 1);
  team.job.fetch_add(1);
  team.job.notify_all();
  team.attempt(0);
  for (int left = team.running.load(); left != 0;) left = wait_for_change(team.running, left, team.spins);
  std::exception_ptr first;
  for (std::exception_ptr &error : team.errors) {
    if (error && !first) first = error;
    error = nullptr;
  }
  if (first) std::rethrow_exception(first);
}

void ThreadPool::barrier() noexcept {
  if (size_ == 1) return;
  Team &team = *team_;
  const int passed = team.barriers.load();
  if (team.arrived.fetch_add(1) + 1 == team.size) {
    team.arrived.store(0);
    team.barriers.fetch_add(1);
    team.barriers.notify_all();
  } else {
    wait_for_change(team.barriers, passed, team.spins);
  }
}

}  // namespace tipl
