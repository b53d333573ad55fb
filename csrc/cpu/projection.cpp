#include "cpu/projection.h"

#include <algorithm>
#include <bit>
#include <numeric>
#include <utility>

#include "cpu/isa.h"
#include "cpu/sketch_kernels.h"
#include "rng.h"

namespace tipl {
namespace {

constexpr ptrdiff_t kNonzeros = 4;            // in each row of Omega: more lowered no error
constexpr ptrdiff_t kTestNonzeros = 2;        // in each row of Omega'
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
  const ptrdiff_t chunks = (num_features_ + kSketchColumns - 1) / kSketchColumns;
  starts_.resize(chunks * (mapped_ + 1));
  codes_.resize(chunks);
  for_each_item(pool, poll, chunks, [&](int, ptrdiff_t chunk) { draw_signs(config, chunk); });
}

// Draws the signs of kSketchColumns columns.
void Projection::draw_signs(const SketchConfig &config, ptrdiff_t chunk) {
  const ptrdiff_t p = num_features_, l = range_size_, q = config.test_size;
  const ptrdiff_t first = chunk * kSketchColumns, columns = std::min(kSketchColumns, p - first);
  // Gives every column an entry in one of `size` outputs, and every output as many as any other, or one more: deals the
  // columns, in random order, to the outputs. Calls add(column, output, negative).
  const auto deal = [&](ptrdiff_t stratum, ptrdiff_t size, const auto &add) {
    const auto low = [](uint64_t x) { return static_cast<uint32_t>(x); };
    std::vector<ptrdiff_t> order(columns);
    std::iota(order.begin(), order.end(), 0);
    for (ptrdiff_t i = columns; i-- > 0;) {
      const auto random = philox4x32({low(i), low(chunk), low(static_cast<uint64_t>(chunk) >> 32), low(stratum)},
                                     {low(config.seed), low(config.seed >> 32)});
      std::swap(order[i], order[(uint64_t{random[0]} * static_cast<uint64_t>(i + 1)) >> 32]);  // Fisher and Yates
      // With more outputs than columns: one of the outputs that fall to this column.
      const ptrdiff_t output = (i * size + (columns < size ? random[2] % size : 0)) / columns;
      add(order[i], output, random[1] & 1);
    }
  };
  std::vector<std::vector<uint16_t>> by_output(mapped_);
  // Gives every column `strata` entries in the outputs [from, from + width): one in each of as many equal parts.
  const auto fill = [&](ptrdiff_t from, ptrdiff_t width, ptrdiff_t strata, ptrdiff_t tag) {
    for (ptrdiff_t i = 0; i < strata; ++i) {
      const ptrdiff_t part = width * i / strata, size = width * (i + 1) / strata - part;
      deal(tag + i, size, [&](ptrdiff_t column, ptrdiff_t output, uint32_t negative) {
        by_output[from + part + output].push_back(static_cast<uint16_t>(2 * column + negative));
      });
    }
  };
  if (l == p) {
    for (ptrdiff_t c = 0; c < columns; ++c) by_output[first + c].push_back(static_cast<uint16_t>(2 * c));
  } else {
    fill(0, l, std::min(kNonzeros, l), 0);
  }
  fill(l, q, std::min(kTestNonzeros, q), kNonzeros);
  std::vector<uint16_t> &codes = codes_[chunk];
  uint32_t *const starts = &starts_[chunk * (mapped_ + 1)];
  for (ptrdiff_t output = 0; output < mapped_; ++output) {
    codes.insert(codes.end(), by_output[output].begin(), by_output[output].end());
    starts[output + 1] = static_cast<uint32_t>(codes.size());
  }
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
                    &starts_[chunk * (mapped_ + 1)], codes_[chunk].data(), mapped_, sums.data(), squares);
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
