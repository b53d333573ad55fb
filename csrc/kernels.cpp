// Compiled once per instruction set, with TIPL_ISA_NAME = baseline, avx2 or avx512 (CMakeLists.txt).
// Includes only what style allows here: vec.h, kernels.h and C headers; all but the table is in an anonymous namespace.
#include "kernels.h"

#include "kernels_svd.h"
#include "vec.h"

namespace {

// ---- decode

using tipl::Attention;
using tipl::Epilogue;
using tipl::PackedLinear;

// exp(x) to about one unit in the last place, 0 below the smallest normal number, NaN for NaN (after Cephes' expf).
inline Vec exp(Vec x) {
  constexpr float kLowest = -87.33654f, kHighest = 88.0f;
  const Vec bounded = min(Vec::all(kHighest), max(Vec::all(kLowest), x));
  // n = x / ln 2 rounded, read from the low bits of a float whose last place is worth one.
  const Vec shifted = fma(bounded, Vec::all(1.44269504f), Vec::all(12582912.0f));
  const Vec n = shifted - Vec::all(12582912.0f);
  const Vec r = fma(n, Vec::all(2.12194440e-4f), fma(n, Vec::all(-0.693359375f), bounded));  // |r| <= ln(2) / 2
  Vec p = Vec::all(1.9875691500e-4f);
  p = fma(p, r, Vec::all(1.3981999507e-3f));
  p = fma(p, r, Vec::all(8.3334519073e-3f));
  p = fma(p, r, Vec::all(4.1665795894e-2f));
  p = fma(p, r, Vec::all(1.6666665459e-1f));
  p = fma(p, r, Vec::all(5.0000001201e-1f));
  const Vec power = fma(p, r * r, r) + Vec::all(1.0f);
  return zero_where_below(x, kLowest, power * power_of_two(shifted));
}

// gelu(x) in its tanh form, 0.5 x (1 + tanh u) = x / (1 + exp(-2u)), u = sqrt(2 / pi) (x + 0.044715 x^3).
inline Vec gelu(Vec x) {
  constexpr float kMinusTwoRootTwoOverPi = -1.59576912f;
  const Vec inner = fma(x * x * x, Vec::all(0.044715f), x);
  return x / (Vec::all(1.0f) + exp(Vec::all(kMinusTwoRootTwoOverPi) * inner));
}

// Registers of a tile of a linear layer: ROWS x PANELS sums, PANELS weights, one input.
constexpr int kTileRows = 6;
constexpr int kTilePanels = kLanes == 16 ? 4 : 2;
constexpr int kOneRowPanels = 8;          // a row alone: enough independent sums to hide the latency of fma
constexpr ptrdiff_t kSummedAtOnce = 128;  // inputs; a longer sum is a sum of sums, which keeps its rounding error small

// ROWS rows of x through PANELS panels of the layer. Each output is summed over the inputs in the same order whatever
// ROWS and PANELS are.
template <int ROWS, int PANELS>
inline void linear_tile(const PackedLinear &layer, ptrdiff_t panel, const float *x, ptrdiff_t x_stride,
                        Epilogue epilogue, float *y, ptrdiff_t y_stride) {
  const ptrdiff_t in = layer.in, panel_size = in * kLanes;
  const float *weight = layer.weight + panel * panel_size;
  Vec total[ROWS][PANELS];
  for (int row = 0; row < ROWS; ++row) {
    for (int p = 0; p < PANELS; ++p) total[row][p] = Vec::load(layer.bias + (panel + p) * kLanes);
  }
  for (ptrdiff_t begin = 0; begin < in; begin += kSummedAtOnce) {
    const ptrdiff_t end = begin + kSummedAtOnce < in ? begin + kSummedAtOnce : in;
    Vec partial[ROWS][PANELS];
    for (int row = 0; row < ROWS; ++row) {
      for (int p = 0; p < PANELS; ++p) partial[row][p] = Vec::zero();
    }
    for (ptrdiff_t i = begin; i < end; ++i) {
      Vec w[PANELS];
#pragma GCC unroll 8
      for (int p = 0; p < PANELS; ++p) w[p] = Vec::load(weight + p * panel_size + i * kLanes);
#pragma GCC unroll 8
      for (int row = 0; row < ROWS; ++row) {
        const Vec input = Vec::all(x[row * x_stride + i]);
#pragma GCC unroll 8
        for (int p = 0; p < PANELS; ++p) partial[row][p] = fma(input, w[p], partial[row][p]);
      }
    }
    for (int row = 0; row < ROWS; ++row) {
      for (int p = 0; p < PANELS; ++p) total[row][p] = total[row][p] + partial[row][p];
    }
  }
  for (int row = 0; row < ROWS; ++row) {
    for (int p = 0; p < PANELS; ++p) {
      float *out = y + row * y_stride + (panel + p) * kLanes;
      Vec value = total[row][p];
      if (epilogue == Epilogue::kGelu) value = gelu(value);
      if (epilogue == Epilogue::kAdd) value = Vec::load(out) + value;
      value.store(out);
    }
  }
}

// All rows through PANELS panels, in tiles of ROWS rows; what is left in smaller tiles.
template <int ROWS, int PANELS>
inline void linear_rows(const PackedLinear &layer, ptrdiff_t panel, const float *x, ptrdiff_t x_stride, ptrdiff_t rows,
                        Epilogue epilogue, float *y, ptrdiff_t y_stride) {
  for (; rows >= ROWS; rows -= ROWS, x += ROWS * x_stride, y += ROWS * y_stride) {
    linear_tile<ROWS, PANELS>(layer, panel, x, x_stride, epilogue, y, y_stride);
  }
  if constexpr (ROWS > 1) linear_rows<ROWS / 2, PANELS>(layer, panel, x, x_stride, rows, epilogue, y, y_stride);
}

// Panels [first, last), PANELS at a time; what is left in smaller groups. The weights are read from memory once.
template <int ROWS, int PANELS>
inline void linear_panels(const PackedLinear &layer, ptrdiff_t first, ptrdiff_t last, const float *x,
                          ptrdiff_t x_stride, ptrdiff_t rows, Epilogue epilogue, float *y, ptrdiff_t y_stride) {
  for (; first + PANELS <= last; first += PANELS) {
    linear_rows<ROWS, PANELS>(layer, first, x, x_stride, rows, epilogue, y, y_stride);
  }
  if constexpr (PANELS > 1) {
    linear_panels<ROWS, PANELS / 2>(layer, first, last, x, x_stride, rows, epilogue, y, y_stride);
  }
}

void linear(const PackedLinear &layer, ptrdiff_t first, ptrdiff_t last, const float *x, ptrdiff_t x_stride,
            ptrdiff_t rows, Epilogue epilogue, float *y, ptrdiff_t y_stride) noexcept {
  if (rows == 1) {
    linear_panels<1, kOneRowPanels>(layer, first, last, x, x_stride, rows, epilogue, y, y_stride);
  } else {
    linear_panels<kTileRows, kTilePanels>(layer, first, last, x, x_stride, rows, epilogue, y, y_stride);
  }
}

void layer_norm(const float *x, ptrdiff_t x_stride, ptrdiff_t rows, ptrdiff_t d, const float *weight, const float *bias,
                float *y, ptrdiff_t y_stride) noexcept {
  const ptrdiff_t whole = d / kLanes * kLanes, rest = d - whole;
  for (; rows > 0; --rows, x += x_stride, y += y_stride) {
    Vec total = load_first(x + whole, rest);
    for (ptrdiff_t i = 0; i < whole; i += kLanes) total = total + Vec::load(x + i);
    const Vec mean = Vec::all(sum(total) / static_cast<float>(d));
    const Vec last = select_first(rest, load_first(x + whole, rest) - mean, Vec::zero());
    Vec squares = last * last;
    for (ptrdiff_t i = 0; i < whole; i += kLanes) {
      const Vec centred = Vec::load(x + i) - mean;
      squares = fma(centred, centred, squares);
    }
    const float variance = sum(squares) / static_cast<float>(d);
    const Vec inverse = Vec::all(1.0f / __builtin_sqrtf(variance + 1e-5f));
    for (ptrdiff_t i = 0; i < whole; i += kLanes) {
      fma((Vec::load(x + i) - mean) * inverse, Vec::load(weight + i), Vec::load(bias + i)).store(y + i);
    }
    store_first(y + whole, rest, fma(last * inverse, load_first(weight + whole, rest), load_first(bias + whole, rest)));
  }
}

constexpr ptrdiff_t kSlotsAtOnce = 64;  // scores of one block of the online softmax; a multiple of every kLanes
constexpr int kKeyGroups = 4;           // groups of N slots whose scores are summed side by side

// scores (<= 64, rounded up to N) <- scale * query . keys over `count` slots, -inf beyond; returns their maximum.
inline Vec score_slots(const Attention &a, const float *keys, ptrdiff_t count, float *scores) {
  const ptrdiff_t group_size = static_cast<ptrdiff_t>(a.head_dim) * kLanes;
  const Vec lowest = Vec::all(-__builtin_inff());
  Vec highest = lowest;
  const auto finish = [&](Vec score, ptrdiff_t slot) {
    score = score * Vec::all(a.scale);
    if (slot + kLanes > count) score = select_first(count - slot, score, lowest);
    score.store(scores + slot);
    highest = max(highest, score);
  };
  ptrdiff_t slot = 0;
  for (; slot + (kKeyGroups - 1) * kLanes < count; slot += kKeyGroups * kLanes, keys += kKeyGroups * group_size) {
    Vec score[kKeyGroups] = {};
    for (ptrdiff_t i = 0; i < group_size; i += kLanes) {
      const Vec q = Vec::all(a.query[i / kLanes]);
#pragma GCC unroll 4
      for (int g = 0; g < kKeyGroups; ++g) score[g] = fma(q, Vec::load(keys + g * group_size + i), score[g]);
    }
#pragma GCC unroll 4
    for (int g = 0; g < kKeyGroups; ++g) finish(score[g], slot + g * kLanes);
  }
  for (; slot < count; slot += kLanes, keys += group_size) {
    Vec score = Vec::zero();
    for (int i = 0; i < a.head_dim; ++i) score = fma(Vec::all(a.query[i]), Vec::load(keys + i * kLanes), score);
    finish(score, slot);
  }
  return highest;
}

// acc (COLUMNS registers) <- acc * decay + sum over slots of weight * value. PHASES sums run side by side.
template <int COLUMNS, int PHASES>
inline void add_values(const float *values, ptrdiff_t stride, const float *weights, ptrdiff_t count, Vec decay,
                       float *acc) {
  Vec partial[PHASES][COLUMNS];
  for (int phase = 0; phase < PHASES; ++phase) {
    for (int c = 0; c < COLUMNS; ++c) partial[phase][c] = Vec::zero();
  }
  ptrdiff_t slot = 0;
  for (; slot + PHASES <= count; slot += PHASES, values += PHASES * stride) {
#pragma GCC unroll 8
    for (int phase = 0; phase < PHASES; ++phase) {
      const Vec weight = Vec::all(weights[slot + phase]);
#pragma GCC unroll 8
      for (int c = 0; c < COLUMNS; ++c) {
        partial[phase][c] = fma(weight, Vec::load(values + phase * stride + c * kLanes), partial[phase][c]);
      }
    }
  }
  for (; slot < count; ++slot, values += stride) {
    const Vec weight = Vec::all(weights[slot]);
    for (int c = 0; c < COLUMNS; ++c) partial[0][c] = fma(weight, Vec::load(values + c * kLanes), partial[0][c]);
  }
  for (int c = 0; c < COLUMNS; ++c) {
    Vec total = partial[0][c];
    for (int phase = 1; phase < PHASES; ++phase) total = total + partial[phase][c];
    fma(Vec::load(acc + c * kLanes), decay, total).store(acc + c * kLanes);
  }
}

void attend(const Attention &a, float *acc, float *out) noexcept {
  alignas(64) float weights[kSlotsAtOnce];
  Vec total = Vec::zero();                    // of the weights, lane by lane
  Vec highest = Vec::all(-__builtin_inff());  // score so far, in every lane
  for (int i = 0; i < a.value_stride; i += kLanes) Vec::zero().store(acc + i);
  for (ptrdiff_t begin = 0; begin < a.slots; begin += kSlotsAtOnce) {
    const ptrdiff_t count = a.slots - begin < kSlotsAtOnce ? a.slots - begin : kSlotsAtOnce;
    const Vec block_highest = score_slots(a, a.keys + begin * a.head_dim, count, weights);
    const Vec now_highest = max(highest, Vec::all(max_lane(block_highest)));
    const Vec decay = exp(highest - now_highest);  // 0 in the first block
    highest = now_highest;
    total = total * decay;
    for (ptrdiff_t slot = 0; slot < count; slot += kLanes) {
      const Vec weight = exp(Vec::load(weights + slot) - highest);
      weight.store(weights + slot);
      total = total + weight;
    }
    const float *values = a.values + begin * a.value_stride;
    int column = 0;
    for (; column + 4 * kLanes <= a.value_stride; column += 4 * kLanes) {
      add_values<4, 2>(values + column, a.value_stride, weights, count, decay, acc + column);
    }
    for (; column + 2 * kLanes <= a.value_stride; column += 2 * kLanes) {
      add_values<2, 4>(values + column, a.value_stride, weights, count, decay, acc + column);
    }
    for (; column < a.value_stride; column += kLanes) {
      add_values<1, 8>(values + column, a.value_stride, weights, count, decay, acc + column);
    }
  }
  const Vec inverse = Vec::all(1.0f / sum(total));
  const int whole = a.head_dim / kLanes * kLanes, rest = a.head_dim - whole;
  for (int i = 0; i < whole; i += kLanes) (Vec::load(acc + i) * inverse).store(out + i);
  if (rest > 0) store_first(out + whole, rest, Vec::load(acc + whole) * inverse);
}

}  // namespace

#define TIPL_JOIN_(a, b) a##b
#define TIPL_JOIN(a, b) TIPL_JOIN_(a, b)
#define TIPL_TEXT_(a) #a
#define TIPL_TEXT(a) TIPL_TEXT_(a)

namespace tipl {

extern const Kernels TIPL_JOIN(kernels_, TIPL_ISA_NAME) = {
    .isa = TIPL_TEXT(TIPL_ISA_NAME),
    .lanes = kLanes,
    .linear = linear,
    .layer_norm = layer_norm,
    .attend = attend,
    .products = products,
    .combine = combine,
    .sum_squares = sum_squares,
};

}  // namespace tipl
