// The SIMD kernels of sketches, and of products and combinations of rows. The rules of cpu/isa_kernels.h hold; every
// `origin` may be null, which means zero.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "cpu/packed_linear.h"

namespace tipl {

// Rows of equal length, wherever each of them lies.
struct Rows {
  const float *const *row;
  ptrdiff_t count;
};
constexpr ptrdiff_t kProductBlock = 32;    // most rows on each side of one call of products
constexpr ptrdiff_t kCombinePadding = 8;   // the weights of each row start at a multiple of this
constexpr ptrdiff_t kSketchColumns = 256;  // most columns of one call of sketch: they stay in the L1 cache
constexpr int kUpdateOutputs = 6;          // outputs that lie side by side in update's y
constexpr ptrdiff_t kUpdateColumns = 64;   // columns of update's d
constexpr ptrdiff_t kUpdateRows = 128;     // most rows of one call of update: so many products are summed in float32

struct SketchKernels {
  int lanes;  // floats in a register, N
  int group;  // outputs in a group of PackedLinear, G * N

  // ---- float32

  // y (outputs, lanes) += Omega^T (x - origin)^T for rows <= lanes rows of x; squares (rows) += the sum of squares of
  // each row of x - origin. Omega is (columns <= kSketchColumns, outputs); the entries of output j are codes[starts[j]]
  // ... codes[starts[j + 1] - 1], each 2 * column for +1 or 2 * column + 1 for -1. Lanes without a row get finite
  // values.
  void (*sketch)(const float *const *x, ptrdiff_t rows, const float *origin, ptrdiff_t columns, const uint32_t *starts,
                 const uint16_t *codes, ptrdiff_t outputs, float *y, double *squares) noexcept;

  LinearKernel linear;

  // d (n) <- x - origin.
  void (*subtract)(const float *x, const float *origin, ptrdiff_t n, float *d) noexcept;

  // z (outputs, kUpdateColumns) += y^T d, with d (rows <= kUpdateRows, kUpdateColumns) and y (outputs / kUpdateOutputs
  // rounded up, rows, kUpdateOutputs), which is zero beyond `outputs`. Sums over the rows in float32, then adds to z in
  // float64. Meanwhile prefetches `ahead` (rows, kUpdateColumns), which is read later.
  void (*update)(const float *y, const float *d, ptrdiff_t rows, ptrdiff_t outputs, const float *ahead,
                 ptrdiff_t ahead_stride, double *z, ptrdiff_t z_stride) noexcept;

  // ---- float64 arithmetic

  // out (left.count, right.count) <- (left - origin)(right - origin)^T over `columns` columns, for at most
  // kProductBlock rows on each side. `lower`: left and right are the same rows, and only elements i >= j are written.
  void (*products)(Rows left, Rows right, const float *origin, ptrdiff_t columns, bool lower, double *out,
                   ptrdiff_t out_stride) noexcept;

  // y (outputs, columns) <- weights^T rows[:, begin : begin + columns], with weights (rows, outputs rounded up to
  // kCombinePadding), which are zero beyond `outputs`. y overlaps no row.
  void (*combine_floats)(const float *const *row, ptrdiff_t rows, ptrdiff_t begin, ptrdiff_t columns,
                         const double *weights, ptrdiff_t outputs, float *y, ptrdiff_t y_stride) noexcept;
  void (*combine_doubles)(const double *const *row, ptrdiff_t rows, ptrdiff_t begin, ptrdiff_t columns,
                          const double *weights, ptrdiff_t outputs, float *y, ptrdiff_t y_stride) noexcept;

  // The sum of squares of x - origin (n): NaN or Inf exactly where a value of x is.
  double (*sum_squares)(const float *x, const float *origin, ptrdiff_t n) noexcept;
};

}  // namespace tipl
