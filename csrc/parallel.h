// A persistent team of threads, owned by the object that computes with it (a Decoder, a StreamingSvd).
//
// Work is split over a fixed partition that depends on the sizes alone, and no sum is ever split between threads by the
// thread count: results are equal to the bit for any number of threads. A team of one runs on the caller, without
// threads. Between jobs the threads spin for some tens of microseconds, so that the next job finds them awake, then
// sleep. Threads start at the first job, and again in a forked child, which has none of its parent's.
#pragma once

#include <atomic>
#include <cstddef>
#include <type_traits>

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
    using Callable = std::remove_reference_t<Body>;
    run([](void *context, int rank) { (*static_cast<Callable *>(context))(rank); },
        const_cast<void *>(static_cast<const void *>(&body)));
  }

  // Inside a body: waits until every rank has come here. Only for bodies that are noexcept and all call it equally
  // often.
  void barrier(int rank) noexcept;

 private:
  struct Team;
  using Call = void (*)(void *context, int rank);
  void run(Call call, void *context);

  int size_;
  Team *team_ = nullptr;  // leaked, not destroyed, in a forked child: its threads do not exist there
};

// body(begin, end) for each rank's share of n items.
template <class Body>
void parallel_for(ThreadPool &pool, ptrdiff_t n, Body &&body) {
  pool.run([&](int rank) {
    const Range items = share(n, rank, pool.size());
    if (items.begin < items.end) body(items.begin, items.end);
  });
}

// body(rank, item) once for each item of n, whichever thread comes first: for items that write apart from one another.
template <class Body>
void for_each_item(ThreadPool &pool, ptrdiff_t n, const Body &body) {
  std::atomic<ptrdiff_t> next{0};
  pool.run([&](int rank) {
    for (ptrdiff_t item; (item = next.fetch_add(1)) < n;) body(rank, item);
  });
}

}  // namespace tipl
