// Rows of floats that are in memory: checks, products and combinations of them, on the CPU.
#pragma once

#include <cstddef>
#include <cstdint>

#include "call.h"

namespace tipl {

// Rows of p floats, `stride` floats apart, in the host's memory or on a device.
struct RowView {
  const float *data;
  ptrdiff_t count, stride;
  bool on_device = false;

  const float *row(ptrdiff_t i) const noexcept { return data + i * stride; }
  // `size` rows from `begin` on, without their first columns.
  RowView part(ptrdiff_t begin, ptrdiff_t size, ptrdiff_t first_column = 0) const noexcept {
    return {row(begin) + first_column, size, stride, on_device};
  }
};

// Throws std::invalid_argument where a value of X (count, p) is NaN or Inf; the message counts rows from first_row on.
void check_finite_rows(const char *where, RowView x, int64_t first_row, ptrdiff_t p, int num_threads, Poll &poll);

// out (x.count, y.count) <- (x - origin)(y - origin)^T over p columns, in float64. `same`: x and y are the same rows.
// Throws std::invalid_argument for NaN or Inf in x, which the message calls X with rows counted from first_row on, or
// in the origin.
void products(const char *where, RowView x, int64_t first_row, RowView y, const float *origin, ptrdiff_t p, bool same,
              double *out, int num_threads, Poll &poll);

// out (r, p) <- weights^T x with weights (x.count, r), summed in float64.
void combine(RowView x, ptrdiff_t p, const double *weights, ptrdiff_t r, float *out, int num_threads, Poll &poll);

}  // namespace tipl
