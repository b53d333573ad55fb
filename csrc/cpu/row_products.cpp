#include "cpu/row_products.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <type_traits>
#include <utility>

#include "cpu/aligned.h"
#include "cpu/isa.h"
#include "cpu/sketch_kernels.h"
#include "row_checks.h"

namespace tipl {
namespace {

constexpr ptrdiff_t kWideRow = 1 << 20;      // columns from which on fewer rows are multiplied at once:
constexpr ptrdiff_t kWideBlock = 4;          //   so many on each side
constexpr ptrdiff_t kColumnTile = 128;       // columns that a thread combines at once,
constexpr ptrdiff_t kCombineOutputs = 64;    //   for so many outputs
constexpr double kSharedProducts = 1 << 23;  // fewer multiplications take less time than threads take to start

std::vector<const float *> pointers(RowView x) {
  std::vector<const float *> rows(x.count);
  for (ptrdiff_t i = 0; i < x.count; ++i) rows[i] = x.row(i);
  return rows;
}

int threads_for(double products, int num_threads) { return products < kSharedProducts ? 1 : num_threads; }

}  // namespace

std::vector<double> row_squares(ThreadPool &pool, Poll &poll, RowView x, const float *origin, ptrdiff_t p) {
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
  return squares;
}

void check_finite(ThreadPool &pool, Poll &poll, const char *where, const char *name, RowView x, int64_t first,
                  ptrdiff_t p) {
  for_each_piece(x, [&](RowView piece, ptrdiff_t begin) {
    const std::vector<double> squares = row_squares(pool, poll, piece, nullptr, p);
    for (ptrdiff_t i = 0; i < piece.count; ++i) {
      if (!std::isfinite(squares[i])) check_row(where, name, piece.row(i), first + begin + i, p);
    }
  });
}

void products_of(ThreadPool &pool, Poll &poll, RowView x, RowView y, const float *origin, ptrdiff_t p, bool same,
                 double *out) {
  const std::vector<const float *> left = pointers(x), right = pointers(y);
  const ptrdiff_t side = p < kWideRow ? kProductBlock : kWideBlock;  // a product of two rows is the same in any block
  const auto blocks = [side](ptrdiff_t rows) { return (rows + side - 1) / side; };
  const auto block_of = [side](const std::vector<const float *> &rows, ptrdiff_t index) {
    return Rows{rows.data() + index * side, std::min(side, std::ssize(rows) - index * side)};
  };
  std::vector<std::pair<ptrdiff_t, ptrdiff_t>> tasks;  // pairs of blocks of rows
  for (ptrdiff_t i = 0; i < blocks(x.count); ++i) {
    for (ptrdiff_t j = 0; j < (same ? i + 1 : blocks(y.count)); ++j) tasks.emplace_back(i, j);
  }
  const SketchKernels &kernels = sketch_kernels();
  for_each_item(pool, poll, std::ssize(tasks), [&](int, ptrdiff_t task) {
    const auto [i, j] = tasks[task];
    kernels.products(block_of(left, i), block_of(right, j), origin, p, same && i == j, out + (i * y.count + j) * side,
                     y.count);
  });
  if (!same) return;
  for (ptrdiff_t i = 0; i < x.count; ++i) {
    poll(0);
    for (ptrdiff_t j = 0; j < i; ++j) out[j * x.count + i] = out[i * x.count + j];
  }
}

template <class T>
void combine_rows(ThreadPool &pool, Poll &poll, const std::vector<const T *> &rows, ptrdiff_t p, const double *weights,
                  ptrdiff_t r, float *out) {
  const ptrdiff_t pieces = (r + kCombineOutputs - 1) / kCombineOutputs, n = std::ssize(rows);
  const auto outputs_of = [r](ptrdiff_t piece) { return std::min(kCombineOutputs, r - piece * kCombineOutputs); };
  std::vector<std::vector<double>> padded(pieces);  // the weights of kCombineOutputs outputs each
  for (ptrdiff_t piece = 0; piece < pieces; ++piece) {
    const ptrdiff_t outputs = outputs_of(piece), stride = round_up(outputs, kCombinePadding);
    padded[piece].resize(n * stride);
    for (ptrdiff_t i = 0; i < n; ++i) {
      std::copy_n(weights + i * r + piece * kCombineOutputs, outputs, padded[piece].data() + i * stride);
    }
  }
  const SketchKernels &kernels = sketch_kernels();
  const auto kernel = [&] {
    if constexpr (std::is_same_v<T, float>)
      return kernels.combine_floats;
    else
      return kernels.combine_doubles;
  }();
  for_each_item(pool, poll, (p + kColumnTile - 1) / kColumnTile * pieces, [&](int, ptrdiff_t item) {
    const ptrdiff_t begin = item / pieces * kColumnTile, columns = std::min(kColumnTile, p - begin);
    const ptrdiff_t piece = item % pieces;
    kernel(rows.data(), n, begin, columns, padded[piece].data(), outputs_of(piece),
           out + piece * kCombineOutputs * p + begin, p);
  });
}

template void combine_rows(ThreadPool &, Poll &, const std::vector<const float *> &, ptrdiff_t, const double *,
                           ptrdiff_t, float *);
template void combine_rows(ThreadPool &, Poll &, const std::vector<const double *> &, ptrdiff_t, const double *,
                           ptrdiff_t, float *);

void check_finite_rows(const char *where, RowView x, int64_t first_row, ptrdiff_t p, int num_threads, Poll &poll) {
  ThreadPool pool(num_threads);
  check_finite(pool, poll, where, "X", x, first_row, p);
}

void products(const char *where, RowView x, int64_t first_row, RowView y, const float *origin, ptrdiff_t p, bool same,
              double *out, int num_threads, Poll &poll) {
  ThreadPool pool(threads_for(static_cast<double>(x.count) * y.count * p, num_threads));
  check_finite(pool, poll, where, "X", x, first_row, p);
  if (origin != nullptr) check_finite(pool, poll, where, "origin", {origin, 1, p}, 0, p);
  products_of(pool, poll, x, y, origin, p, same, out);
}

void combine(RowView x, ptrdiff_t p, const double *weights, ptrdiff_t r, float *out, int num_threads, Poll &poll) {
  ThreadPool pool(threads_for(static_cast<double>(x.count) * r * p, num_threads));
  combine_rows(pool, poll, pointers(x), p, weights, r, out);
}

}  // namespace tipl
