#include "cpu/projection.h"

#include <algorithm>
#include <bit>
#include <iterator>

#include "cpu/isa.h"
#include "cpu/sketch_kernels.h"

namespace tipl {
namespace {

constexpr ptrdiff_t kDirectionColumns = 512;  // columns of the given directions that stay in the L2 cache
constexpr ptrdiff_t kDirectedRows = 64;       // rows for which the given directions are read once
constexpr double kMinSquare = 1.0e-30;        // mean square of a row below which its squares vanish in float32

}  // namespace

// ---- random signs

Projection::Projection(const SketchConfig &config, ThreadPool &pool, Poll &poll)
    : kernels_(sketch_kernels()),
      num_features_(config.num_features),
      range_size_(config.range_size),
      mapped_(config.range_size + config.test_size),
      y_stride_(round_up(config.outputs(), 16)) {
  static_assert(kSignColumns == kSketchColumns);
  signs_.resize(sign_chunks(config));
  for_each_item(pool, poll, std::ssize(signs_),
                [&](int, ptrdiff_t chunk) { signs_[chunk] = draw_signs(config, chunk); });
}

// ---- given directions

Projection::Projection(const SketchConfig &config, const float *directions, ThreadPool &pool, Poll &poll)
    : kernels_(sketch_kernels()),
      num_features_(config.num_features),
      range_size_(config.range_size),
      mapped_(config.range_size + config.test_size),
      y_stride_(round_up(config.outputs(), 16)) {
  const ptrdiff_t p = num_features_, l = range_size_, padded = round_up(l, kernels_.lanes);
  directions_ = AlignedWords({padded, p});
  bias_ = AlignedFloats({padded});
  for_each_item(pool, poll, (p + kDirectionColumns - 1) / kDirectionColumns, [&](int, ptrdiff_t chunk) {
    const ptrdiff_t begin = chunk * kDirectionColumns, columns = std::min(kDirectionColumns, p - begin);
    uint32_t *const packed = directions_.data() + begin * padded;
    for (ptrdiff_t j = 0; j < l; ++j) {
      const auto [first, stride] = packed_output(j, padded, columns, kernels_.group);
      for (ptrdiff_t c = 0; c < columns; ++c) {
        packed[first + c * stride] = std::bit_cast<uint32_t>(directions[j * p + begin + c]);
      }
    }
  });
}

std::vector<float> Projection::directions(ThreadPool &pool, Poll &poll) const {
  if (!directed()) return {};
  const ptrdiff_t p = num_features_, l = range_size_, padded = round_up(l, kernels_.lanes);
  std::vector<float> rows(l * p);
  for_each_item(pool, poll, (p + kDirectionColumns - 1) / kDirectionColumns, [&](int, ptrdiff_t chunk) {
    const ptrdiff_t begin = chunk * kDirectionColumns, columns = std::min(kDirectionColumns, p - begin);
    const uint32_t *const packed = directions_.data() + begin * padded;
    for (ptrdiff_t j = 0; j < l; ++j) {
      const auto [first, stride] = packed_output(j, padded, columns, kernels_.group);
      for (ptrdiff_t c = 0; c < columns; ++c)
        rows[j * p + begin + c] = std::bit_cast<float>(packed[first + c * stride]);
    }
  });
  return rows;
}

// ---- rows to their outputs

ptrdiff_t Projection::group_rows() const noexcept { return directed() ? kDirectedRows : kernels_.lanes; }

void Projection::apply(RowView x, const float *origin, float *y, double *squares, ThreadPool &pool, Poll &poll) const {
  for_each_item(pool, poll, groups(x.count),
                [&](int rank, ptrdiff_t group) { apply_to_group(x, group, origin, y, squares, rank, poll); });
}

void Projection::apply_to_group(RowView x, ptrdiff_t group, const float *origin, float *y, double *squares, int rank,
                                Poll &poll) const {
  const ptrdiff_t first = group * group_rows();
  const RowView rows{x.row(first), std::min(group_rows(), x.count - first), x.stride};
  std::fill_n(squares + first, rows.count, 0.0);  // also where an interrupted group is begun anew
  if (directed()) {
    multiply_group(rows, origin, y + first * y_stride_, squares + first, rank, poll);
  } else {
    sketch_group(rows, origin, y + first * y_stride_, squares + first, rank, poll);
  }
}

// Through random signs, for as many rows as a register has lanes.
void Projection::sketch_group(RowView x, const float *origin, float *y, double *squares, int rank, Poll &poll) const {
  constexpr ptrdiff_t kChunksBetweenPolls = 64;
  const ptrdiff_t p = num_features_, N = kernels_.lanes;
  AlignedFloats sums({mapped_, N});
  for (ptrdiff_t begin = 0; begin < p; begin += kSketchColumns) {
    const float *row[16];
    for (ptrdiff_t i = 0; i < x.count; ++i) row[i] = x.row(i) + begin;
    const ptrdiff_t chunk = begin / kSketchColumns;
    if (chunk % kChunksBetweenPolls == kChunksBetweenPolls - 1) poll(rank);
    kernels_.sketch(row, x.count, origin == nullptr ? nullptr : origin + begin, std::min(kSketchColumns, p - begin),
                    signs_[chunk].starts.data(), signs_[chunk].codes.data(), mapped_, sums.data(), squares);
  }
  for (ptrdiff_t i = 0; i < x.count; ++i) {
    for (ptrdiff_t j = 0; j < mapped_; ++j) y[i * y_stride_ + j] = sums.data()[j * N + i];
    // The kernel squares in float32, which makes 0 of what is too small.
    if (squares[i] < kMinSquare * static_cast<double>(p)) squares[i] = kernels_.sum_squares(x.row(i), origin, p);
  }
}

// Through given directions, kDirectionColumns columns at a time.
void Projection::multiply_group(RowView x, const float *origin, float *y, double *squares, int rank, Poll &poll) const {
  const ptrdiff_t p = num_features_, l = range_size_, N = kernels_.lanes, panels = (l + N - 1) / N;
  AlignedFloats d({x.count, kDirectionColumns});
  for (ptrdiff_t begin = 0; begin < p; begin += kDirectionColumns) {
    poll(rank);
    const ptrdiff_t columns = std::min(kDirectionColumns, p - begin);
    const float *const zero_point = origin == nullptr ? nullptr : origin + begin;
    for (ptrdiff_t i = 0; i < x.count; ++i) {
      const float *const row = x.row(i) + begin;
      if (begin + columns < p) {
        for (ptrdiff_t c = 0; c < kDirectionColumns; c += 16) __builtin_prefetch(row + kDirectionColumns + c, 0, 2);
      }
      kernels_.subtract(row, zero_point, columns, d.data() + i * kDirectionColumns);
      squares[i] += kernels_.sum_squares(row, zero_point, columns);
    }
    const PackedLinear layer{
        Precision::kFloat32, directions_.data() + begin * panels * N, nullptr, bias_.data(), static_cast<int>(columns),
        static_cast<int>(l)};
    kernels_.linear(layer, 0, panels, d.data(), kDirectionColumns, x.count,
                    begin == 0 ? Epilogue::kStore : Epilogue::kAdd, y, y_stride_);
  }
}

}  // namespace tipl
