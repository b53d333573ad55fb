// The kernels of the streaming SVD: float32 rows, float64 arithmetic. A part of kernels.cpp, under its rules.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace {

using tipl::Rows;

constexpr int kProductTile = kLanes == 16 ? 4 : 3;  // rows a side of a register tile of products
constexpr int kBlockSide = (tipl::kProductBlock + kProductTile - 1) / kProductTile;  // register tiles a side of a block
constexpr ptrdiff_t kColumnsAtOnce = 512;           // columns of two blocks' rows that stay in the L2 cache
constexpr int kCombineTile = kLanes == 16 ? 8 : 4;  // outputs of a register tile of combinations
static_assert(tipl::kCombinePadding % kCombineTile == 0 && tipl::kColumnPadding % (2 * kDoubleLanes) == 0);

// acc[i][j] += sum over columns of (left[i] - origin) * (right[j] - origin), lane by lane. A tile at the edge of a
// block repeats its last row.
template <bool kOrigin>
inline void product_tile(const float *const *left, const float *const *right, const double *origin, ptrdiff_t begin,
                         ptrdiff_t end, Doubles (&acc)[kProductTile][kProductTile]) {
  const auto step = [&](const auto &load) {
    const Doubles zero_point = kOrigin ? load(origin) : Doubles::zero();
    Doubles b[kProductTile];
#pragma GCC unroll 4
    for (int j = 0; j < kProductTile; ++j) b[j] = kOrigin ? load(right[j]) - zero_point : load(right[j]);
#pragma GCC unroll 4
    for (int i = 0; i < kProductTile; ++i) {
      const Doubles a = kOrigin ? load(left[i]) - zero_point : load(left[i]);
#pragma GCC unroll 4
      for (int j = 0; j < kProductTile; ++j) acc[i][j] = fma(a, b[j], acc[i][j]);
    }
  };
  ptrdiff_t c = begin;
  for (; c + kDoubleLanes <= end; c += kDoubleLanes) step([c](const auto *row) { return Doubles::load(row + c); });
  if (c < end) step([c, end](const auto *row) { return load_first_doubles(row + c, end - c); });
}

template <bool kOrigin>
inline void product_block(Rows left, Rows right, const double *origin, ptrdiff_t columns, bool lower, double *out,
                          ptrdiff_t out_stride) {
  Doubles acc[kBlockSide][kBlockSide][kProductTile][kProductTile];
  const int tiles_down = static_cast<int>((left.count + kProductTile - 1) / kProductTile);
  const int tiles_across = static_cast<int>((right.count + kProductTile - 1) / kProductTile);
  const auto gather = [](Rows rows, int tile, const float *(&picked)[kProductTile]) {
    for (int i = 0; i < kProductTile; ++i) {
      const ptrdiff_t row = tile * kProductTile + i;
      picked[i] = rows.row[row < rows.count ? row : rows.count - 1];
    }
  };
  const auto skipped = [lower](int down, int across) { return lower && across > down; };
  for (int down = 0; down < tiles_down; ++down) {
    for (int across = 0; across < tiles_across; ++across) {
      for (auto &row : acc[down][across]) {
        for (Doubles &value : row) value = Doubles::zero();
      }
    }
  }
  for (ptrdiff_t begin = 0; begin < columns; begin += kColumnsAtOnce) {
    const ptrdiff_t end = begin + kColumnsAtOnce < columns ? begin + kColumnsAtOnce : columns;
    for (int down = 0; down < tiles_down; ++down) {
      const float *a[kProductTile];
      gather(left, down, a);
      for (int across = 0; across < tiles_across; ++across) {
        if (skipped(down, across)) continue;
        const float *b[kProductTile];
        gather(right, across, b);
        product_tile<kOrigin>(a, b, origin, begin, end, acc[down][across]);
      }
    }
  }
  for (ptrdiff_t i = 0; i < left.count; ++i) {
    for (ptrdiff_t j = 0; j < right.count; ++j) {
      if (lower && j > i) continue;
      out[i * out_stride + j] = sum(acc[i / kProductTile][j / kProductTile][i % kProductTile][j % kProductTile]);
    }
  }
}

void products(Rows left, Rows right, const double *origin, ptrdiff_t columns, bool lower, double *out,
              ptrdiff_t out_stride) noexcept {
  if (origin == nullptr) {
    product_block<false>(left, right, origin, columns, lower, out, out_stride);
  } else {
    product_block<true>(left, right, origin, columns, lower, out, out_stride);
  }
}

void combine(Rows rows, ptrdiff_t begin, ptrdiff_t columns, const double *weights, ptrdiff_t outputs, float *y,
             ptrdiff_t y_stride) noexcept {
  const ptrdiff_t weight_stride = (outputs + tipl::kCombinePadding - 1) / tipl::kCombinePadding * tipl::kCombinePadding;
  for (ptrdiff_t first = 0; first < outputs; first += kCombineTile) {
    const ptrdiff_t last = first + kCombineTile < outputs ? first + kCombineTile : outputs;
    float *const tile = y + first * y_stride;
    for (ptrdiff_t c = 0; c < columns; c += 2 * kDoubleLanes) {
      Doubles acc[kCombineTile][2];
      for (auto &pair : acc) pair[0] = pair[1] = Doubles::zero();
      for (ptrdiff_t r = 0; r < rows.count; ++r) {
        const float *row = rows.row[r] + begin + c;
        const double *weight = weights + r * weight_stride + first;
        const Doubles x[2] = {Doubles::load(row), Doubles::load(row + kDoubleLanes)};
#pragma GCC unroll 8
        for (int o = 0; o < kCombineTile; ++o) {
          const Doubles w = Doubles::all(weight[o]);
          acc[o][0] = fma(w, x[0], acc[o][0]);
          acc[o][1] = fma(w, x[1], acc[o][1]);
        }
      }
      for (ptrdiff_t o = 0; o < last - first; ++o) {
        acc[o][0].store(tile + o * y_stride + c);
        acc[o][1].store(tile + o * y_stride + c + kDoubleLanes);
      }
    }
  }
}

double sum_squares(const float *x, ptrdiff_t n) noexcept {
  constexpr int kSums = 4;
  Doubles acc[kSums];
  for (Doubles &a : acc) a = Doubles::zero();
  ptrdiff_t i = 0;
  for (; i + kSums * kDoubleLanes <= n; i += kSums * kDoubleLanes) {
    for (int s = 0; s < kSums; ++s) {
      const Doubles value = Doubles::load(x + i + s * kDoubleLanes);
      acc[s] = fma(value, value, acc[s]);
    }
  }
  for (; i < n; i += kDoubleLanes) {
    const Doubles value = i + kDoubleLanes <= n ? Doubles::load(x + i) : load_first_doubles(x + i, n - i);
    acc[0] = fma(value, value, acc[0]);
  }
  return sum((acc[0] + acc[1]) + (acc[2] + acc[3]));
}

}  // namespace
