// A linear layer as the SIMD kernels read it: numbers packed into 32-bit words, outputs in panels of one register.
//
// Included by sources that are compiled for one instruction set each. Functions here are static, so that no copy of one
// can serve the rest of the module.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "precision.h"

namespace tipl {

// Values in one 32-bit word: one float, two bfloat16 or four int8, the first in the lowest bits.
static constexpr int values_per_word(Precision precision) {
  return precision == Precision::kFloat32 ? 1 : precision == Precision::kBfloat16 ? 2 : 4;
}
// Words that hold n values.
static constexpr ptrdiff_t words_of(ptrdiff_t n, Precision precision) {
  return (n + values_per_word(precision) - 1) / values_per_word(precision);
}

// A linear layer y = W x + b. Its outputs form panels of N = lanes, so that the sums of a panel fill one register. The
// panels form groups of G: for each input, the words of all panels of a group lie side by side, so that the weights of
// a group are read as one stream. The last group holds the panels that are left over.
struct PackedLinear {
  Precision precision;
  const uint32_t *weight;  // (groups, words_of(in), G, N) words, zero beyond `out` and `in`
  const float *scale;      // (panels * N), for int8 weights the scale of each output; null for the other precisions
  const float *bias;       // (panels * N)
  int in, out;
};

// Where the words of one output lie: the offset of the first, and the distance from each to the next.
struct PackedOutput {
  ptrdiff_t first, stride;
};
// padded_out is `out` rounded up to N; group is G * N.
static constexpr PackedOutput packed_output(ptrdiff_t output, ptrdiff_t padded_out, ptrdiff_t words, ptrdiff_t group) {
  const ptrdiff_t within = output % group, begin = output - within, left = padded_out - begin;
  return {begin * words + within, left < group ? left : group};
}

constexpr ptrdiff_t kInputPadding = 32;  // rows of x are readable, and zero, up to a multiple of this

// What is done with W x + b: y = ., y = gelu_tanh(.) or y += .
enum class Epilogue { kStore, kGelu, kAdd };

// Panels [first, last) of y (rows, out) <- epilogue(x (rows, in) W^T + b), where rows of x and of y lie a stride apart.
// Writes whole panels: the rows of y have room for `out` rounded up to N. x and y do not overlap. With bfloat16 weights
// x is rounded to bfloat16 where the instruction set multiplies bfloat16.
using LinearKernel = void (*)(const PackedLinear &layer, ptrdiff_t first, ptrdiff_t last, const float *x,
                              ptrdiff_t x_stride, ptrdiff_t rows, Epilogue epilogue, float *y,
                              ptrdiff_t y_stride) noexcept;

}  // namespace tipl
