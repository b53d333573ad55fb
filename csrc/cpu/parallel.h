// A persistent team of threads, owned by the object that computes with it (a Decoder, a RowSketch, a PpoUpdate).
//
// How a sum is split never depends on the number of threads: results have the same bits for any number of them. A team
// of one runs on the calling thread, without others. Between jobs the threads spin for some tens of microseconds, so
// that the next job finds them awake, then they sleep. Threads start with the first job; in a forked child, which has
// none of its parent's threads, they start again.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <type_traits>

#include "call.h"

namespace tipl {

// The number of cores that this process may use (its affinity mask), at least 1.
int available_cpus() noexcept;

// The share of n items that belongs to `rank` of `size` ranks: contiguous, in the order of ranks, and of equal sizes to
// within one item.
struct Range {
  ptrdiff_t begin, end;
};
constexpr Range share(ptrdiff_t n, int rank, int size) noexcept { return {n * rank / size, n * (rank + 1) / size}; }

class ThreadPool {
 public:
  explicit ThreadPool(ptrdiff_t num_threads);  // throws std::invalid_argument unless 1 <= num_threads <= 1024
  ~ThreadPool();
  ThreadPool(const ThreadPool &) = delete;
  ThreadPool &operator=(const ThreadPool &) = delete;

  int size() const noexcept { return size_; }

  // Calls body(rank) once for each rank in [0, size()), rank 0 on the calling thread; returns when all are done.
  // Exceptions are caught on their threads, and that of the lowest rank is rethrown here. One run at a time, and never
  // from inside a body.
  template <class Body>
  void run(Body &&body) {
    start(body, nullptr);
  }

  // The same, but the calling thread asks `poll` while it waits for the others. If the call should stop this throws
  // nothing: the bodies ask too.
  template <class Body>
  void run(Poll &poll, Body &&body) {
    start(body, &poll);
  }

  // Inside a body: waits until every rank has called this. Only for bodies that are noexcept and all call it equally
  // often.
  void barrier(int rank) noexcept;

 private:
  struct Team;
  using Call = void (*)(void *context, int rank);
  template <class Body>
  void start(Body &body, Poll *poll) {
    start([](void *context, int rank) { (*static_cast<Body *>(context))(rank); },
          const_cast<void *>(static_cast<const void *>(&body)), poll);
  }
  void start(Call call, void *context, Poll *poll);

  int size_;
  Team *team_ = nullptr;  // in a forked child it is leaked: its threads do not exist there
};

// Calls body(rank, item) once for each of n items, each on the next free thread: for items that write to different
// places. Asks `poll` between items. Returns how many of the first items are done: fewer than n if the call should
// stop.
template <class Body>
ptrdiff_t for_each_item_until(ThreadPool &pool, Poll &poll, ptrdiff_t n, const Body &body) {
  std::atomic<ptrdiff_t> next{0};
  pool.run(poll, [&](int rank) {
    while (!poll.stopped(rank)) {
      const ptrdiff_t item = next.fetch_add(1);
      if (item >= n) return;
      body(rank, item);
    }
  });
  return std::min(next.load(), n);
}

// The same for all n items. Throws Interrupted if the call should stop.
template <class Body>
void for_each_item(ThreadPool &pool, Poll &poll, ptrdiff_t n, const Body &body) {
  if (for_each_item_until(pool, poll, n, body) < n) throw Interrupted();
}

// Calls body(begin, end) for runs of n items, each of which costs about `cost` nanoseconds. Runs are short enough to
// stop between them.
template <class Body>
void for_each_run(ThreadPool &pool, Poll &poll, ptrdiff_t n, double cost, const Body &body) {
  constexpr double kRun = 1e6, kLongest = 1 << 20;
  const auto run = static_cast<ptrdiff_t>(std::clamp(kRun / cost, 1.0, kLongest));
  const ptrdiff_t even = std::max<ptrdiff_t>(1, std::min(run, (n + pool.size() - 1) / pool.size()));
  for_each_item(pool, poll, (n + even - 1) / even,
                [&](int, ptrdiff_t item) { body(item * even, std::min(n, (item + 1) * even)); });
}

}  // namespace tipl
