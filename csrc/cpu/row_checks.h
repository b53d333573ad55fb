// Checks of rows before a sketch or a product takes them.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "call.h"
#include "cpu/parallel.h"
#include "rows.h"

namespace tipl {

constexpr double kMaxSquares = 1.0e30;       // below this sum of squares, products of sums stay within float32
constexpr ptrdiff_t kCheckedRows = 1 << 16;  // most rows that are checked in one go: their squares are kept meanwhile

// body(piece, begin) for each piece of x of at most kCheckedRows rows, where `begin` is the index of its first row.
template <class Body>
void for_each_piece(RowView x, const Body &body) {
  for (ptrdiff_t begin = 0; begin < x.count; begin += kCheckedRows) {
    body(RowView{x.row(begin), std::min(kCheckedRows, x.count - begin), x.stride}, begin);
  }
}

// In the following, the messages call the rows `name` (or X), and number them from `first` on.

// Throws std::invalid_argument where a value is NaN or Inf.
void check_finite(ThreadPool &pool, Poll &poll, const char *where, const char *name, RowView x, int64_t first,
                  ptrdiff_t p);

// The same, and returns the sum of squares of each row less origin.
std::vector<double> checked_squares(ThreadPool &pool, Poll &poll, const char *where, const char *name, RowView x,
                                    int64_t first, const float *origin, ptrdiff_t p);

// Throws std::invalid_argument where a value is NaN or Inf or a row is far too large, judging by the squares of each
// row.
void check_squares(const char *where, RowView x, int64_t first, ptrdiff_t p, const std::vector<double> &squares);

double total(const std::vector<double> &values);

}  // namespace tipl
