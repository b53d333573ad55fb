// The SIMD kernels of the decoder. The rules of cpu/isa_kernels.h hold.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "cpu/packed_linear.h"

namespace tipl {

// The past of one head in one sequence: blocks of kCacheBlock slots, one after the other in memory, each its keys and
// then its values. With c = values_per_word(precision), which is not kInt8:
struct HeadCache {
  Precision precision;
  int head_dim;      // D
  int value_stride;  // D rounded up to N
  uint32_t *keys;    // of block 0: (kCacheBlock / N, D / c rounded up, N) words, transposed inside groups of N slots
  uint32_t *values;  // of block 0: (kCacheBlock / c, value_stride) words, c slots side by side
  ptrdiff_t block_words;  // from one block to the next
};
constexpr ptrdiff_t kCacheBlock = 64;  // a multiple of every N

struct DecodeKernels {
  int lanes;      // floats in a register, N
  int group;      // outputs in a group of PackedLinear, G * N
  int int8_zero;  // how much more than they are int8 weights are stored as, modulo 256

  LinearKernel linear;

  // y (rows, d) <- (x - mean) / sqrt(variance + 1e-5) * weight + bias, with the mean and the variance of each row.
  void (*layer_norm)(const float *x, ptrdiff_t x_stride, ptrdiff_t rows, ptrdiff_t d, const float *weight,
                     const float *bias, float *y, ptrdiff_t y_stride) noexcept;

  // Stores key (D) and value (D) in `slot`. May overwrite the slots after it.
  void (*append)(const HeadCache &cache, ptrdiff_t slot, const float *key, const float *value) noexcept;

  // out (D) <- softmax(query (D) . keys / sqrt(D)) values over the first `slots` >= 1, with online softmax
  // (arXiv:1805.02867). Reads the cache once; meanwhile prefetches the first block of `next`, the cache that the next
  // call reads. `scratch` has room for value_stride floats.
  void (*attend)(const HeadCache &cache, const HeadCache &next, const float *query, ptrdiff_t slots, float *scratch,
                 float *out) noexcept;
};

}  // namespace tipl
