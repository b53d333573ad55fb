// The kernels of sketches, and of products and combinations of rows. Part of kernels.cpp, under its rules.
#pragma once

#include "cpu/simd/math.h"
#include "cpu/simd/vec.h"
#include "cpu/sketch_kernels.h"

namespace {

using tipl::Rows;

constexpr int kProductTile = kLanes == 16 ? 4 : 3;  // rows on each side of a register tile of products
constexpr int kBlockSide =
    (tipl::kProductBlock + kProductTile - 1) / kProductTile;  // register tiles on each side of a block
constexpr ptrdiff_t kColumnsAtOnce = 512;           // columns for which the rows of two blocks stay in the L2 cache
constexpr int kCombineTile = kLanes == 16 ? 8 : 4;  // outputs in a register tile of combinations
static_assert(tipl::kCombinePadding % kCombineTile == 0);

// ---- sketch

// sketch, with FULL where rows = lanes and kOrigin where there is an origin.
template <bool FULL, bool kOrigin>
inline void sketch_columns(const float *const *x, ptrdiff_t rows, const float *origin, ptrdiff_t columns,
                           const uint32_t *starts, const uint16_t *codes, ptrdiff_t outputs, float *y,
                           double *squares) {
  alignas(64) float signed_columns[2 * tipl::kSketchColumns * kLanes];  // each column of d, as it is and negated
  constexpr int kHalves = kLanes / kDoubleLanes;
  Doubles squared[kHalves];
  for (Doubles &sum : squared) sum = Doubles::zero();
  const auto transposed = [&](ptrdiff_t first, const auto &load) {
    const Vec zero_point = kOrigin ? load(origin + first) : Vec::zero();
    Vec tile[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      tile[i] = FULL || i < rows ? load(x[i] + first) : Vec::zero();
      if (kOrigin) tile[i] = tile[i] - zero_point;
    }
    transpose(tile);
    Vec of_tile = Vec::zero();
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      tile[i].store(signed_columns + 2 * (first + i) * kLanes);
      (Vec::zero() - tile[i]).store(signed_columns + (2 * (first + i) + 1) * kLanes);
      of_tile = fma(tile[i], tile[i], of_tile);
    }
    alignas(64) float lanes[kLanes];
    of_tile.store(lanes);
    for (int h = 0; h < kHalves; ++h) squared[h] = squared[h] + Doubles::load(lanes + h * kDoubleLanes);
  };
  const ptrdiff_t whole = columns / kLanes * kLanes;
  for (ptrdiff_t first = 0; first < whole; first += kLanes) {
    transposed(first, [](const float *at) { return Vec::load(at); });
  }
  if (whole < columns) {
    transposed(whole, [rest = columns - whole](const float *at) { return load_first(at, rest); });
  }
  double lanes[kLanes];
  for (int h = 0; h < kHalves; ++h) squared[h].store(lanes + h * kDoubleLanes);
  for (ptrdiff_t i = 0; i < rows; ++i) squares[i] += lanes[i];
  const auto column = [&](uint16_t code) { return Vec::load(signed_columns + code * kLanes); };
  for (ptrdiff_t output = 0; output < outputs; ++output) {
    const uint16_t *code = codes + starts[output], *const end = codes + starts[output + 1];
    Vec sum = Vec::load(y + output * kLanes), other = Vec::zero();  // two chains of sums
    for (; code + 4 <= end; code += 4) {
      sum = sum + column(code[0]);
      other = other + column(code[1]);
      sum = sum + column(code[2]);
      other = other + column(code[3]);
    }
    for (; code < end; ++code) sum = sum + column(*code);
    (sum + other).store(y + output * kLanes);
  }
}

void sketch(const float *const *x, ptrdiff_t rows, const float *origin, ptrdiff_t columns, const uint32_t *starts,
            const uint16_t *codes, ptrdiff_t outputs, float *y, double *squares) noexcept {
  if (rows < kLanes && origin != nullptr) {
    sketch_columns<false, true>(x, rows, origin, columns, starts, codes, outputs, y, squares);
  } else if (rows < kLanes) {
    sketch_columns<false, false>(x, rows, origin, columns, starts, codes, outputs, y, squares);
  } else if (origin != nullptr) {
    sketch_columns<true, true>(x, rows, origin, columns, starts, codes, outputs, y, squares);
  } else {
    sketch_columns<true, false>(x, rows, origin, columns, starts, codes, outputs, y, squares);
  }
}

// z (kUpdateOutputs, PANELS registers) += y^T d. Prefetches a line of each row of `ahead`, unless it is null.
template <int PANELS>
inline void update_tile(const float *y, const float *d, ptrdiff_t rows, ptrdiff_t outputs, const float *ahead,
                        ptrdiff_t ahead_stride, double *z, ptrdiff_t z_stride) {
  Vec sum[tipl::kUpdateOutputs][PANELS];
  for (auto &row : sum) {
    for (Vec &value : row) value = Vec::zero();
  }
  for (ptrdiff_t r = 0; r < rows; ++r, y += tipl::kUpdateOutputs, d += tipl::kUpdateColumns) {
    if (ahead != nullptr) __builtin_prefetch(ahead + r * ahead_stride, 0, 2);
    Vec right[PANELS];
#pragma GCC unroll 4
    for (int p = 0; p < PANELS; ++p) right[p] = Vec::load(d + p * kLanes);
#pragma GCC unroll 6
    for (int o = 0; o < tipl::kUpdateOutputs; ++o) {
      const Vec left = Vec::all(y[o]);
#pragma GCC unroll 4
      for (int p = 0; p < PANELS; ++p) sum[o][p] = fma(left, right[p], sum[o][p]);
    }
  }
  for (ptrdiff_t o = 0; o < outputs; ++o) {
    for (int p = 0; p < PANELS; ++p) {
      float values[kLanes];
      sum[o][p].store(values);
      double *const to = z + o * z_stride + p * kLanes;
      for (int at = 0; at < kLanes; at += kDoubleLanes)
        (Doubles::load(to + at) + Doubles::load(values + at)).store(to + at);
    }
  }
}

void update(const float *y, const float *d, ptrdiff_t rows, ptrdiff_t outputs, const float *ahead,
            ptrdiff_t ahead_stride, double *z, ptrdiff_t z_stride) noexcept {
  constexpr int kPanels = kLanes == 16 ? 4 : 2;
  constexpr ptrdiff_t kWidth = kPanels * kLanes, kLine = 16, kLines = tipl::kUpdateColumns / kLine;
  static_assert(tipl::kUpdateColumns % kWidth == 0);
  for (ptrdiff_t c = 0; c < tipl::kUpdateColumns; c += kWidth) {
    const float *tile = y;
    for (ptrdiff_t o = 0; o < outputs; o += tipl::kUpdateOutputs, tile += rows * tipl::kUpdateOutputs) {
      const ptrdiff_t here = outputs - o < tipl::kUpdateOutputs ? outputs - o : tipl::kUpdateOutputs;
      const ptrdiff_t line = o / tipl::kUpdateOutputs;  // each tile prefetches another line
      const float *const fetched = c == 0 && line < kLines ? ahead + line * kLine : nullptr;
      update_tile<kPanels>(tile, d + c, rows, here, fetched, ahead_stride, z + o * z_stride + c, z_stride);
    }
  }
}

template <bool kOrigin>
inline void subtract_from(const float *x, const float *origin, ptrdiff_t n, float *d) {
  ptrdiff_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    (kOrigin ? Vec::load(x + i) - Vec::load(origin + i) : Vec::load(x + i)).store(d + i);
  }
  for (; i < n; ++i) d[i] = kOrigin ? x[i] - origin[i] : x[i];
}

void subtract(const float *x, const float *origin, ptrdiff_t n, float *d) noexcept {
  if (origin == nullptr) {
    subtract_from<false>(x, origin, n, d);
  } else {
    subtract_from<true>(x, origin, n, d);
  }
}

// ---- products and combinations in float64

// acc[i][j] += sum over columns of (left[i] - origin) * (right[j] - origin), for each lane. A tile at the edge of a
// block repeats its last row.
template <bool kOrigin>
inline void product_tile(const float *const *left, const float *const *right, const float *origin, ptrdiff_t begin,
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
  for (; c + kDoubleLanes <= end; c += kDoubleLanes) step([c](const float *row) { return Doubles::load(row + c); });
  if (c < end) step([c, end](const float *row) { return load_first_doubles(row + c, end - c); });
}

template <bool kOrigin>
inline void product_block(Rows left, Rows right, const float *origin, ptrdiff_t columns, bool lower, double *out,
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

void products(Rows left, Rows right, const float *origin, ptrdiff_t columns, bool lower, double *out,
              ptrdiff_t out_stride) noexcept {
  if (origin == nullptr) {
    product_block<false>(left, right, origin, columns, lower, out, out_stride);
  } else {
    product_block<true>(left, right, origin, columns, lower, out, out_stride);
  }
}

template <class T>
void combine(const T *const *row, ptrdiff_t rows, ptrdiff_t begin, ptrdiff_t columns, const double *weights,
             ptrdiff_t outputs, float *y, ptrdiff_t y_stride) noexcept {
  const ptrdiff_t weight_stride = (outputs + tipl::kCombinePadding - 1) / tipl::kCombinePadding * tipl::kCombinePadding;
  for (ptrdiff_t first = 0; first < outputs; first += kCombineTile) {
    const ptrdiff_t last = first + kCombineTile < outputs ? first + kCombineTile : outputs;
    float *const tile = y + first * y_stride;
    ptrdiff_t c = 0;
    const auto step = [&]<int REGISTERS>(const auto &load) {
      Doubles acc[kCombineTile][REGISTERS];
      for (auto &sums : acc) {
        for (Doubles &value : sums) value = Doubles::zero();
      }
      for (ptrdiff_t r = 0; r < rows; ++r) {
        const double *weight = weights + r * weight_stride + first;
        Doubles x[REGISTERS];
        for (int i = 0; i < REGISTERS; ++i) x[i] = load(row[r] + begin + c + i * kDoubleLanes);
#pragma GCC unroll 8
        for (int o = 0; o < kCombineTile; ++o) {
          const Doubles w = Doubles::all(weight[o]);
          for (int i = 0; i < REGISTERS; ++i) acc[o][i] = fma(w, x[i], acc[o][i]);
        }
      }
      for (ptrdiff_t o = 0; o < last - first; ++o) {
        for (int i = 0; i < REGISTERS; ++i) {
          float values[kDoubleLanes];
          acc[o][i].store(values);
          const ptrdiff_t at = c + i * kDoubleLanes;
          for (ptrdiff_t lane = 0; lane < kDoubleLanes && at + lane < columns; ++lane) {
            tile[o * y_stride + at + lane] = values[lane];
          }
        }
      }
    };
    for (; c + 2 * kDoubleLanes <= columns; c += 2 * kDoubleLanes) {
      step.template operator()<2>([](const T *at) { return Doubles::load(at); });
    }
    for (; c < columns; c += kDoubleLanes) {
      const ptrdiff_t count = columns - c < kDoubleLanes ? columns - c : kDoubleLanes;
      step.template operator()<1>([count](const T *at) { return load_first_doubles(at, count); });
    }
  }
}

}  // namespace
