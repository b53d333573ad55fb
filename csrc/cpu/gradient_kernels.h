// The SIMD kernels that train the forecaster, beside those of cpu/policy_kernels.h. The rules of cpu/isa_kernels.h
// hold.
//
// Activations are stored by columns: row r of a matrix (rows, stride) holds number r of every token of a group of
// kSequences sequences, those of one token side by side. `columns` is how many columns of a matrix to take, a multiple
// of kSequences.
#pragma once

#include <stddef.h>

namespace tipl {

constexpr ptrdiff_t kSequences = 16;  // in a group: a multiple of every N

// One head at one token of a group, which sees `tokens` tokens, itself the last: D = head_dim rows of a matrix.
struct HeadColumns {
  ptrdiff_t head_dim, stride, tokens;
  const float *query;          // (D, stride) from the token's first column on
  const float *keys, *values;  // (D, stride) from the first token's first column on
  float *log_sum;              // (kSequences), of the exponentials of the scores
  float *weights;              // (tokens, kSequences), scratch: the weights of the values
};

struct GradientKernels {
  // normal <- (z - mean) / sqrt(variance + 1e-5) of each column, inverse (columns) <- 1 / sqrt(variance + 1e-5),
  // y <- normal * weight + bias.
  void (*normalize)(const float *z, ptrdiff_t stride, ptrdiff_t rows, ptrdiff_t columns, const float *weight,
                    const float *bias, float *normal, float *inverse, float *y) noexcept;
  // dz += the gradient by z, given dy, the one by y.
  void (*normalize_backward)(const float *dy, const float *normal, const float *inverse, const float *weight,
                             ptrdiff_t stride, ptrdiff_t rows, ptrdiff_t columns, float *dz) noexcept;

  // y <- gelu(x), in its tanh form; dy *= gelu'(x).
  void (*gelu)(const float *x, ptrdiff_t stride, ptrdiff_t rows, ptrdiff_t columns, float *y) noexcept;
  void (*gelu_backward)(const float *x, ptrdiff_t stride, ptrdiff_t rows, ptrdiff_t columns, float *dy) noexcept;

  // z += x * mask; y <- x * mask.
  void (*add_masked)(const float *x, const float *mask, ptrdiff_t stride, ptrdiff_t rows, ptrdiff_t columns,
                     float *z) noexcept;
  void (*multiply_masked)(const float *x, const float *mask, ptrdiff_t stride, ptrdiff_t rows, ptrdiff_t columns,
                          float *y) noexcept;

  // out (D, stride) <- softmax(query . keys / sqrt(D)) values; writes head.log_sum.
  void (*attend_columns)(const HeadColumns &head, float *out) noexcept;
  // Given dout (D, stride), the gradient by out: writes the one by the query, and adds those by the keys and values.
  // `scratch` has room for (tokens, kSequences).
  void (*attend_columns_backward)(const HeadColumns &head, const float *dout, float *dquery, float *dkeys,
                                  float *dvalues, float *scratch) noexcept;

  // sums (rows) <- the sum over columns of x * y.
  void (*dot_rows)(const float *x, const float *y, ptrdiff_t stride, ptrdiff_t rows, ptrdiff_t columns,
                   float *sums) noexcept;
};

}  // namespace tipl
