// A persistent team of threads, owned by the object that computes with it (a Decoder, a StreamingSvd).
//
// Work is split over a fixed partition that depends on the sizes alone, and no sum is ever split between threads by the
// thread count: results are equal to the bit for any number of threads. A team of one runs on the caller, without
// threads. Between jobs the threads spin for some tens of microseconds, so that the next job finds them awake, then
// sleep. Threads start at the first job, and again in a forked child, which has none of its parent's.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <type_traits>

#include "call.h"

namespace tipl {

// Cores that this process may use (its affinity mask), at least 1.
int available_cpus() noexcept;

// What `rank` of `size` owns of n items: [begin, end), contiguous, in rank order, sizes equal to within one.
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

  // body(rank) once for each rank in [0, size()), rank 0 on the caller's thread; returns when all are done. Exceptions
  // are caught on their threads; that of the lowest rank is rethrown here. One run at a time, never from inside a body.
  template <class Body>
  void run(Body &&body) {
    start(body, nullptr);
  }

  // The same, where the caller asks `poll` while it waits for the others. Nothing is thrown where that says to stop:
  // the bodies ask too.
  template <class Body>
  void run(Poll &poll, Body &&body) {
    start(body, &poll);
  }

  // Inside a body: waits until every rank has come here. Only for bodies that are noexcept and all call it equally
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
  Team *team_ = nullptr;  // leaked, not destroyed, in a forked child: its threads do not exist there
};

// body(rank, item) once for each item of n, whichever thread comes first: for items that write apart from one another.
// Asks `poll` between them. Returns how many are done, the first so many: fewer than n where it said to stop.
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

// The same, of all n. Throws Interrupted where it was told to stop.
template <class Body>
void for_each_item(ThreadPool &pool, Poll &poll, ptrdiff_t n, const Body &body) {
  if (for_each_item_until(pool, poll, n, body) < n) throw Interrupted();
}

// body(begin, end) for runs of n things that cost about `cost` nanoseconds each, short enough to stop between them.
template <class Body>
void for_each_run(ThreadPool &pool, Poll &poll, ptrdiff_t n, double cost, const Body &body) {
  constexpr double kRun = 1e6, kLongest = 1 << 20;
  const auto run = static_cast<ptrdiff_t>(std::clamp(kRun / cost, 1.0, kLongest));
  const ptrdiff_t even = std::max<ptrdiff_t>(1, std::min(run, (n + pool.size() - 1) / pool.size()));
  for_each_item(pool, poll, (n + even - 1) / even,
                [&](int, ptrdiff_t item) { body(item * even, std::min(n, (item + 1) * even)); });
}

}  // namespace tipl
