// The SIMD kernels of the refiner, beside `multiply` of cpu/policy_kernels.h. The rules of cpu/isa_kernels.h hold.
//
// Activations are stored by columns, one column for each policy weight: matrices (rows, stride). `columns` is how many
// to take, a multiple of every N. The refiner is odd: a matrix of its hidden layers (rows, 2 columns) has the
// activations for its signed inputs in its left half, and those for the negated inputs in its right half.
#pragma once

#include <stddef.h>

namespace tipl {

// The input of the first hidden layer: even (rows, columns) + shift (rows), plus and minus odd (rows, columns) + gain
// (rows) x (columns).
struct OddInput {
  ptrdiff_t rows, columns, stride;
  const float *even, *shift, *odd, *gain, *x;
};

struct RefinerKernels {
  // y (rows, 2 columns) <- gelu of the input, and slope, unless null, its derivative. gelu(x) = x P(z < x), exact to
  // 2e-7 |x|.
  void (*gelu_of_input)(const OddInput &input, float *y, float *slope) noexcept;

  // sum (columns) <- the sum over rows of weight * (gelu(x left) - gelu(x right)), given x (rows, 2 columns). Unless
  // `difference` (rows, columns) is null writes what is in brackets there, and the derivatives of gelu in place of x.
  void (*odd_head)(float *x, ptrdiff_t rows, ptrdiff_t columns, ptrdiff_t stride, const float *weight,
                   float *difference, float *sum) noexcept;

  // Given dsum (columns), the gradient by `sum`, and `slope`, what odd_head left in place of x: slope becomes the
  // gradient by x.
  void (*odd_head_backward)(float *slope, ptrdiff_t rows, ptrdiff_t columns, ptrdiff_t stride, const float *weight,
                            const float *dsum) noexcept;

  // Given dy (rows, 2 columns) and slope, the gradient by and the derivatives of gelu_of_input: the gradients by
  // even and odd.
  void (*input_backward)(const float *dy, const float *slope, ptrdiff_t rows, ptrdiff_t columns, ptrdiff_t stride,
                         float *deven, float *dodd) noexcept;
};

}  // namespace tipl
