// Checks of rows before a sketch or a product takes them.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "rows.h"

namespace tipl {

constexpr double kMaxSquares = 1.0e30;       // below this sum of squares, products of sums stay within float32
constexpr ptrdiff_t kCheckedRows = 1 << 16;  // most rows that are checked in one go: their squares are kept meanwhile

// body(piece, begin) for each piece of x of at most kCheckedRows rows, where `begin` is the index of its first row.
template <class Body>
void for_each_piece(RowView x, const Body &body) {
  for (ptrdiff_t begin = 0; begin < x.count; begin += kCheckedRows) {
    body(x.part(begin, std::min(kCheckedRows, x.count - begin)), begin);
  }
}

// Throws std::invalid_argument for the first value of a row (p) in the host's memory that is not finite, if there is
// one: "partial_fit: X must be finite, got nan at row 3, column 5".
void check_row(const char *where, const char *name, const float *row, int64_t i, ptrdiff_t p);

double total(const std::vector<double> &values);

}  // namespace tipl
