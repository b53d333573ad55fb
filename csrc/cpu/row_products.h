// The checks, products and combinations of rows.h on the threads of a pool.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "call.h"
#include "cpu/parallel.h"
#include "rows.h"

namespace tipl {

// The sum of squares of each row less origin: NaN or Inf exactly where a value of the row is.
std::vector<double> row_squares(ThreadPool &pool, Poll &poll, RowView x, const float *origin, ptrdiff_t p);

// Throws std::invalid_argument where a value is NaN or Inf; the message calls the rows `name` and counts them from
// `first` on.
void check_finite(ThreadPool &pool, Poll &poll, const char *where, const char *name, RowView x, int64_t first,
                  ptrdiff_t p);

// out (x.count, y.count) <- (x - origin)(y - origin)^T; `same`: x and y are the same rows.
void products_of(ThreadPool &pool, Poll &poll, RowView x, RowView y, const float *origin, ptrdiff_t p, bool same,
                 double *out);

// out (r, p) <- weights^T rows with weights (rows, r). T is float or double.
template <class T>
void combine_rows(ThreadPool &pool, Poll &poll, const std::vector<const T *> &rows, ptrdiff_t p, const double *weights,
                  ptrdiff_t r, float *out);

}  // namespace tipl
