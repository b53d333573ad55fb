// How fast can this machine's cores read memory together? Built by roofs.py, called through ctypes.
//
// Each thread owns a contiguous share of the footprint, on huge pages that it touched first, and sums it over and over,
// as a decoder reads its weights step after step. No barrier between passes: a roof, not a copy of what is judged by
// it.

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdlib>
#include <thread>
#include <vector>

namespace {

using Vec = float __attribute__((vector_size(64)));  // GCC splits it where the machine's registers are narrower
constexpr std::size_t kUnroll = 8;                   // independent sums, enough to hide the latency of an addition
constexpr std::size_t kHugePage = std::size_t{1} << 21;

float sum(const Vec *p, std::size_t n) {
  Vec sums[kUnroll] = {};
  for (std::size_t i = 0; i < n; i += kUnroll)
    for (std::size_t j = 0; j < kUnroll; ++j) sums[j] += p[i + j];
  for (std::size_t j = 1; j < kUnroll; ++j) sums[0] += sums[j];
  return sums[0][0];
}

// Threads meet here; `round` counts how often.
struct Barrier {
  const int size;
  std::atomic<int> arrived{0};
  void wait(int round) {
    arrived.fetch_add(1);
    while (arrived.load() < size * round) {
    }
  }
};

}  // namespace

// GB/s of `num_threads` threads that read `bytes` in all, `passes` times: the best of `repeats`; 0 where memory is
// short.
extern "C" double read_gbps(std::size_t bytes, int num_threads, int passes, int repeats) {
  constexpr std::size_t block = kUnroll * sizeof(Vec);
  const std::size_t share = std::max(bytes / num_threads / block, std::size_t{1}) * block;
  const std::size_t spacing = (share + kHugePage - 1) / kHugePage * kHugePage;
  char *memory = static_cast<char *>(std::aligned_alloc(kHugePage, spacing * num_threads));
  if (!memory) return 0;
  madvise(memory, spacing * num_threads, MADV_HUGEPAGE);

  Barrier barrier{num_threads};
  double best_s = 1e30;
  auto work = [&](int rank) {
    char *mine = memory + spacing * rank;
    std::fill(reinterpret_cast<float *>(mine), reinterpret_cast<float *>(mine + share), 1.0f);
    const Vec *p = reinterpret_cast<const Vec *>(mine);
    volatile float sink = sum(p, share / sizeof(Vec));
    for (int repeat = 0, round = 0; repeat < repeats; ++repeat) {
      barrier.wait(++round);
      const auto start = std::chrono::steady_clock::now();
      for (int pass = 0; pass < passes; ++pass) {
        sink = sum(p, share / sizeof(Vec));
        asm volatile("" ::: "memory");  // the next pass reads again
      }
      barrier.wait(++round);
      const double s = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
      if (rank == 0) best_s = std::min(best_s, s);
    }
    (void)sink;
  };
  std::vector<std::thread> threads;
  for (int rank = 1; rank < num_threads; ++rank) threads.emplace_back(work, rank);
  work(0);
  for (std::thread &thread : threads) thread.join();
  std::free(memory);
  return static_cast<double>(share) * num_threads * passes / best_s / 1e9;
}
