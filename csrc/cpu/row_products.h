// The products and combinations of rows.h on the threads of a pool, without checks.
#pragma once

#include <cstddef>
#include <vector>

#include "call.h"
#include "cpu/parallel.h"
#include "rows.h"

namespace tipl {

// out (x.count, y.count) <- (x - origin)(y - origin)^T; `same`: x and y are the same rows.
void products_of(ThreadPool &pool, Poll &poll, RowView x, RowView y, const float *origin, ptrdiff_t p, bool same,
                 double *out);

// out (r, p) <- weights^T rows with weights (rows, r). T is float or double.
template <class T>
void combine_rows(ThreadPool &pool, Poll &poll, const std::vector<const T *> &rows, ptrdiff_t p, const double *weights,
                  ptrdiff_t r, float *out);

// A row (p) in the midst of x: of some rows spread over x, the one with the smallest sum of distances to the others, so
// that a few outliers do not count. Relative to such a row float32 keeps what tells the rows apart.
std::vector<float> central_row(ThreadPool &pool, Poll &poll, RowView x, ptrdiff_t p);

}  // namespace tipl
