// Linear layers: a matrix-vector product for one row, register tiles for more. Part of kernels.cpp, under its rules.
#pragma once

#include "cpu/packed_linear.h"
#include "cpu/simd/byte_dot.h"
#include "cpu/simd/math.h"
#include "cpu/simd/vec.h"

namespace {

using tipl::Epilogue;
using tipl::PackedLinear;
using tipl::Precision;

// A tile takes ROWS x PANELS registers for sums, PANELS for weights and one for an input.
constexpr int kTileRows = 6;
constexpr int kByteTileRows = 3;                    // with kByteDot every output has two sums
constexpr int kGroupPanels = kLanes == 16 ? 4 : 2;  // a tile takes a whole group
constexpr int kOneRowPanels = 8;  // for one row alone: whole groups, enough independent sums to hide the latency of fma
constexpr int kRowsAtOnce = 36;   // rows whose sums stay in the L1 cache while weights stream through it
constexpr int kGroupWords = kGroupPanels * kLanes;  // words that lie side by side
constexpr int kLineWords = 16;                      // words of a cache line
constexpr int kFetchedWords = 2 * kLineWords;       // words that a tile prefetches while it uses kGroupWords
// Whether inputs of weights of this precision are rounded to steps.
constexpr bool in_steps(Precision precision) { return kByteDot && precision == Precision::kInt8; }

// The weights of a run of inputs for some panels: those of one group, or of whole groups that lie group_words apart.
struct Run {
  const uint32_t *weight;
  const uint32_t *ahead;  // the weights that follow, to be prefetched meanwhile
  ptrdiff_t stride;       // from one word of an output to its next
  ptrdiff_t group_words;
  bool first;  // whether these are the first inputs
};

// sum (ROWS, PANELS) += x (ROWS, count) times the weights of PANELS panels. Each output is summed over the inputs in
// the same order whatever ROWS and PANELS are. With kByteDot, the sums of int8 weights are in steps of the rows.
// Prefetches the first kFetchedWords of each `stride` words from run.ahead on.
template <Precision PRECISION, int ROWS, int PANELS>
inline void multiply(const Run &run, const float *x, ptrdiff_t x_stride, ptrdiff_t count,
                     [[maybe_unused]] Rounded rounded, Vec (&sum)[ROWS][PANELS]) {
  constexpr int kPerWord = tipl::values_per_word(PRECISION);
  const uint32_t *const weight = run.weight, *const ahead = run.ahead;
  const ptrdiff_t stride = run.stride, group_words = run.group_words;
  const auto panel = [&](int p) { return p / kGroupPanels * group_words + p % kGroupPanels * kLanes; };
  const auto fetch = [&](ptrdiff_t word) {
    if constexpr (ROWS > 1) {  // one row is bound by memory: prefetching more only slows it where L3 is small
#pragma GCC unroll 2
      for (int i = 0; i < kFetchedWords && i < kGroupWords; i += kLineWords) {
        __builtin_prefetch(ahead + word * stride + i);
      }
    }
  };
#if defined(TIPL_BFLOAT16_DOT)
  if constexpr (PRECISION == Precision::kBfloat16) {
    alignas(64) uint32_t inputs[ROWS][kSummedAtOnce / kPerWord];
    const ptrdiff_t words = tipl::words_of(count, PRECISION);
    for (int row = 0; row < ROWS; ++row) {
      for (ptrdiff_t i = 0; i < words; i += kLanes) {
        load_as_bfloat16(x + row * x_stride + i * kPerWord).store(inputs[row] + i);
      }
    }
    for (ptrdiff_t i = 0; i < words; ++i) {
      fetch(i);
      Packed w[PANELS];
#pragma GCC unroll 8
      for (int p = 0; p < PANELS; ++p) w[p] = Packed::load(weight + panel(p) + i * stride);
#pragma GCC unroll 8
      for (int row = 0; row < ROWS; ++row) {
        const Packed input = Packed::all(inputs[row][i]);
#pragma GCC unroll 8
        for (int p = 0; p < PANELS; ++p) sum[row][p] = dot_bfloat16(input, w[p], sum[row][p]);
      }
    }
    return;
  }
#endif
#if defined(TIPL_INT8_DOT)
  if constexpr (PRECISION == Precision::kInt8) {
    ByteRow own[ROWS];
    const ByteRow *inputs[ROWS];
    for (int row = 0; row < ROWS; ++row) {
      inputs[row] = rounded.parts != nullptr ? rounded.parts : own + row;
      if (rounded.parts == nullptr) own[row].round(x + row * x_stride, count, rounded.steps[row]);
    }
    Ints high[ROWS][PANELS]{}, low[ROWS][PANELS]{};
    for (ptrdiff_t i = 0; i < tipl::words_of(count, PRECISION); ++i) {
      fetch(i);
#pragma GCC unroll 8
      for (int p = 0; p < PANELS; ++p) {
        const Packed w = Packed::load(weight + panel(p) + i * stride);
#pragma GCC unroll 8
        for (int row = 0; row < ROWS; ++row) {
          high[row][p] = dot_int8(w, Packed::all(inputs[row]->high[i]), high[row][p]);
          low[row][p] = dot_int8(w, Packed::all(inputs[row]->low[i]), low[row][p]);
        }
      }
    }
    for (int row = 0; row < ROWS; ++row) {
      for (int p = 0; p < PANELS; ++p) sum[row][p] = sum[row][p] + inputs[row]->in_steps(high[row][p], low[row][p]);
    }
    return;
  }
#endif
  for (ptrdiff_t i = 0; i < count; i += kPerWord) {
    const uint32_t *const words = weight + i / kPerWord * stride;
    fetch(i / kPerWord);
#pragma GCC unroll 4
    for (int j = 0; j < kPerWord; ++j) {
      Vec w[PANELS];
#pragma GCC unroll 8
      for (int p = 0; p < PANELS; ++p) {
        const Packed word = Packed::load(words + panel(p));
        if constexpr (PRECISION == Precision::kFloat32) w[p] = word.float32();
        if constexpr (PRECISION == Precision::kBfloat16) w[p] = word.bfloat16(j);
        if constexpr (PRECISION == Precision::kInt8) w[p] = word.int8(j);
      }
#pragma GCC unroll 8
      for (int row = 0; row < ROWS; ++row) {
        const Vec input = Vec::all(x[row * x_stride + i + j]);
#pragma GCC unroll 8
        for (int p = 0; p < PANELS; ++p) sum[row][p] = fma(input, w[p], sum[row][p]);
      }
    }
  }
}

// total (0 < rows <= ROWS, PANELS registers) += the products of one run of inputs; of the first run: total <- the
// products.
template <Precision PRECISION, int ROWS, int PANELS>
inline void add_products(int rows, const Run &run, const float *x, ptrdiff_t x_stride, ptrdiff_t count, Rounded rounded,
                         float *total) {
  if constexpr (ROWS > 1) {
    if (rows < ROWS) {
      return add_products<PRECISION, ROWS - 1, PANELS>(rows, run, x, x_stride, count, rounded, total);
    }
  }
  Vec sum[ROWS][PANELS];
  for (int row = 0; row < ROWS; ++row) {
    for (int p = 0; p < PANELS; ++p) sum[row][p] = Vec::zero();
  }
  multiply<PRECISION, ROWS, PANELS>(run, x, x_stride, count, rounded, sum);
  for (int row = 0; row < ROWS; ++row) {
    for (int p = 0; p < PANELS; ++p, total += kLanes) {
      (run.first ? sum[row][p] : Vec::load(total) + sum[row][p]).store(total);
    }
  }
}

// Takes at most kRowsAtOnce rows through PANELS panels, in tiles of at most ROWS rows whose sizes are as equal as
// possible.
template <Precision PRECISION, int ROWS, int PANELS>
inline void linear_rows(const PackedLinear &layer, ptrdiff_t panel, const float *x, ptrdiff_t x_stride, ptrdiff_t rows,
                        Rounded rounded, Epilogue epilogue, float *y, ptrdiff_t y_stride) {
  if (rows < 1) return;
  const ptrdiff_t words = tipl::words_of(layer.in, PRECISION), tiles = (rows + ROWS - 1) / ROWS;
  const auto [offset, stride] =
      tipl::packed_output(panel * kLanes, (layer.out + kLanes - 1) / kLanes * kLanes, words, kGroupWords);
  const uint32_t *weight = layer.weight + offset;
  float steps[ROWS == 1 ? 1 : kRowsAtOnce];
  if (rounded.steps == nullptr) {
    for (ptrdiff_t row = 0; in_steps(PRECISION) && row < rows; ++row)
      steps[row] = step_of(x + row * x_stride, layer.in);
    rounded.steps = steps;
  }
  alignas(64) float totals[ROWS == 1 ? 1 : kRowsAtOnce][PANELS * kLanes];
  ptrdiff_t begin = 0;
  do {
    const ptrdiff_t count = layer.in - begin < kSummedAtOnce ? layer.in - begin : kSummedAtOnce;
    // The weights that follow: those of the next inputs, or of the next group. Each tile prefetches a part of them.
    const uint32_t *const next = weight + tipl::words_of(count, PRECISION) * stride;
    const ptrdiff_t part_number = begin / kSummedAtOnce;
    const ByteRow *const parts =
        rounded.parts != nullptr && part_number < kHeldParts ? rounded.parts + part_number : nullptr;
    for (ptrdiff_t tile = 0; tile < tiles; ++tile) {
      const ptrdiff_t row = rows * tile / tiles, behind = rows * (tile + 1) / tiles, part = tile * kFetchedWords;
      const Run run{weight, part < stride ? next + part : weight, stride, words * kGroupWords, begin == 0};
      add_products<PRECISION, ROWS, PANELS>(static_cast<int>(behind - row), run, x + row * x_stride + begin, x_stride,
                                            count, {rounded.steps + row, parts}, totals[row]);
    }
    weight = next;
    begin += kSummedAtOnce;
  } while (begin < layer.in);
  for (ptrdiff_t row = 0; row < rows; ++row) {
    for (int p = 0; p < PANELS; ++p) {
      const ptrdiff_t output = (panel + p) * kLanes;
      float *out = y + row * y_stride + output;
      const Vec total = Vec::load(totals[row] + p * kLanes), bias = Vec::load(layer.bias + output);
      Vec value = total + bias;
      if constexpr (PRECISION == Precision::kInt8) {
        const Vec scale = Vec::load(layer.scale + output);
        value = fma(total, in_steps(PRECISION) ? scale * Vec::all(rounded.steps[row]) : scale, bias);
      }
      if (epilogue == Epilogue::kGelu) value = gelu(value);
      if (epilogue == Epilogue::kAdd) value = Vec::load(out) + value;
      value.store(out);
    }
  }
}

// Takes the first of the panels [first, last), at most PANELS, of one group or of whole groups; returns the panel that
// follows. Reads the weights from memory once for every kRowsAtOnce rows.
template <Precision PRECISION, int ROWS, int PANELS>
inline ptrdiff_t linear_panels(const PackedLinear &layer, ptrdiff_t first, ptrdiff_t last, const float *x,
                               ptrdiff_t x_stride, ptrdiff_t rows, Rounded rounded, Epilogue epilogue, float *y,
                               ptrdiff_t y_stride) {
  if constexpr (PANELS > 1) {
    if (first % (PANELS < kGroupPanels ? PANELS : kGroupPanels) != 0 || first + PANELS > last) {
      return linear_panels<PRECISION, ROWS, PANELS / 2>(layer, first, last, x, x_stride, rows, rounded, epilogue, y,
                                                        y_stride);
    }
  }
  const ptrdiff_t runs = (rows + kRowsAtOnce - 1) / kRowsAtOnce;
  for (ptrdiff_t run = 0; run < runs; ++run) {
    const ptrdiff_t row = rows * run / runs, behind = rows * (run + 1) / runs;
    linear_rows<PRECISION, ROWS, PANELS>(layer, first, x + row * x_stride, x_stride, behind - row, rounded, epilogue,
                                         y + row * y_stride, y_stride);
  }
  return first + PANELS;
}

template <Precision PRECISION>
inline void linear_of(const PackedLinear &layer, ptrdiff_t first, ptrdiff_t last, const float *x, ptrdiff_t x_stride,
                      ptrdiff_t rows, Epilogue epilogue, float *y, ptrdiff_t y_stride) {
  constexpr int kRows = in_steps(PRECISION) ? kByteTileRows : kTileRows;
  if (rows != 1) {
    while (first < last) {
      first = linear_panels<PRECISION, kRows, kGroupPanels>(layer, first, last, x, x_stride, rows, {}, epilogue, y,
                                                            y_stride);
    }
    return;
  }
  Rounded rounded;
  ByteRow parts[in_steps(PRECISION) ? kHeldParts : 1];
  const float step = in_steps(PRECISION) ? step_of(x, layer.in) : 0.0f;
  if (in_steps(PRECISION)) {
    for (ptrdiff_t begin = 0, i = 0; begin < layer.in && i < kHeldParts; begin += kSummedAtOnce, ++i) {
      parts[i].round(x + begin, layer.in - begin < kSummedAtOnce ? layer.in - begin : kSummedAtOnce, step);
    }
    rounded = {&step, parts};
  }
  while (first < last) {
    first = linear_panels<PRECISION, 1, kOneRowPanels>(layer, first, last, x, x_stride, rows, rounded, epilogue, y,
                                                       y_stride);
  }
}

void linear(const PackedLinear &layer, ptrdiff_t first, ptrdiff_t last, const float *x, ptrdiff_t x_stride,
            ptrdiff_t rows, Epilogue epilogue, float *y, ptrdiff_t y_stride) noexcept {
  switch (layer.precision) {
    case Precision::kFloat32:
      return linear_of<Precision::kFloat32>(layer, first, last, x, x_stride, rows, epilogue, y, y_stride);
    case Precision::kBfloat16:
      return linear_of<Precision::kBfloat16>(layer, first, last, x, x_stride, rows, epilogue, y, y_stride);
    case Precision::kInt8:
      return linear_of<Precision::kInt8>(layer, first, last, x, x_stride, rows, epilogue, y, y_stride);
  }
}

}  // namespace
