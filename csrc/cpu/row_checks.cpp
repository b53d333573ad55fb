#include "cpu/row_checks.h"

#include <cmath>
#include <numeric>

#include "check.h"
#include "cpu/isa.h"
#include "cpu/sketch_kernels.h"

namespace tipl {
namespace {

// Throws std::invalid_argument for the first value of a row that is not finite, if there is one.
void check_row(const char *where, const char *name, const float *row, int64_t i, ptrdiff_t p) {
  const ptrdiff_t j = std::find_if_not(row, row + p, [](float value) { return std::isfinite(value); }) - row;
  check(j == p, where, ": ", name, " must be finite, got ", j < p ? row[j] : 0.0f, " at row ", i, ", column ", j);
}

}  // namespace

void check_finite(ThreadPool &pool, Poll &poll, const char *where, const char *name, RowView x, int64_t first,
                  ptrdiff_t p) {
  for_each_piece(x, [&](RowView piece, ptrdiff_t begin) {
    checked_squares(pool, poll, where, name, piece, first + begin, nullptr, p);
  });
}

std::vector<double> checked_squares(ThreadPool &pool, Poll &poll, const char *where, const char *name, RowView x,
                                    int64_t first, const float *origin, ptrdiff_t p) {
  std::vector<double> squares(x.count);
  const SketchKernels &kernels = sketch_kernels();
  const auto sum = [&](ptrdiff_t begin, ptrdiff_t end) {
    for (ptrdiff_t i = begin; i < end; ++i) squares[i] = kernels.sum_squares(x.row(i), origin, p);
  };
  if (x.count == 1) {  // as rows of a run in the making come: not worth waking threads
    sum(0, 1);
  } else {
    for_each_run(pool, poll, x.count, static_cast<double>(p) / 4, sum);
  }
  for (ptrdiff_t i = 0; i < x.count; ++i) {
    if (!std::isfinite(squares[i])) check_row(where, name, x.row(i), first + i, p);
  }
  return squares;
}

void check_squares(const char *where, RowView x, int64_t first, ptrdiff_t p, const std::vector<double> &squares) {
  for (ptrdiff_t i = 0; i < x.count; ++i) {
    if (squares[i] < kMaxSquares) continue;
    check_row(where, "X", x.row(i), first + i, p);
    check(false, where, ": X is too large for float32 sums: the squares of row ", first + i, " sum to ", squares[i],
          ", which must stay below ", kMaxSquares);
  }
}

double total(const std::vector<double> &values) { return std::accumulate(values.begin(), values.end(), 0.0); }

void check_finite_rows(const char *where, RowView x, int64_t first_row, ptrdiff_t p, int num_threads, Poll &poll) {
  ThreadPool pool(num_threads);
  check_finite(pool, poll, where, "X", x, first_row, p);
}

}  // namespace tipl
