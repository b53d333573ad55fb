// Inputs of int8 weights, where the instruction set multiplies bytes. Part of kernels.cpp, under its rules.
//
// A row of inputs is rounded to whole steps, 256 high + low, with two signed bytes for each input. These are 16 bits,
// so that int8 costs only the rounding of the weights. The instruction takes one unsigned factor: weights are stored
// with kInt8Zero added. Sums of bytes are exact, whatever their order.
#pragma once

#include "cpu/packed_linear.h"
#include "cpu/simd/vec.h"

namespace {

// Inputs of a partial sum. A longer sum is a sum of partial sums: this keeps the rounding error small, and the weights
// of so many inputs stay in the L1 cache until all rows have used them.
constexpr ptrdiff_t kSummedAtOnce = 128;

#if defined(TIPL_INT8_DOT)
constexpr bool kByteDot = true;
constexpr int kInt8Zero = 128;
#else
constexpr bool kByteDot = false;
constexpr int kInt8Zero = 0;
#endif

// The size of a step for a row x (in): that of the largest input over kMostSteps. NaN where an input is not finite.
constexpr float kMostSteps = 127 * 256;
inline float step_of(const float *x, ptrdiff_t in) {
  Vec most = Vec::zero(), zero = Vec::zero();
  for (ptrdiff_t i = 0; i < in; i += kLanes) {  // zeros follow
    const Vec value = Vec::load(x + i);
    most = max(most, max(value, Vec::zero() - value));
    zero = fma(value, Vec::zero(), zero);
  }
  return first_lane(max_lanes(most)) / kMostSteps + first_lane(sum_lanes(zero));
}

// At most kSummedAtOnce inputs of a row, rounded.
struct ByteRow {
#if defined(TIPL_INT8_DOT)
  uint32_t high[kSummedAtOnce / 4], low[kSummedAtOnce / 4];
  Vec high_zero, low_zero;  // what kInt8Zero adds to the sum of an output

  void round(const float *x, ptrdiff_t count, float step) {
    const Vec inverse = Vec::all(step < 1e-30f ? 0.0f : 1.0f / step);
    Ints sum_high{}, sum_low{};
    for (ptrdiff_t i = 0; i < count; i += kLanes) {
      const Ints input = nearest_integer(Vec::load(x + i) * inverse);
      const Ints above = (input + 128) >> 8, below = input - (above << 8);
      store_bytes(high + i / 4, above);
      store_bytes(low + i / 4, below);
      sum_high += above;
      sum_low += below;
    }
    high_zero = Vec::all(kInt8Zero) * sum_lanes(as_floats(sum_high));
    low_zero = Vec::all(kInt8Zero) * sum_lanes(as_floats(sum_low));
  }

  // The sum in steps, from those of the two bytes; all of these are whole numbers below 2^24, but the last.
  Vec in_steps(Ints high_sum, Ints low_sum) const {
    return fma(Vec::all(256.0f), as_floats(high_sum) - high_zero, as_floats(low_sum) - low_zero);
  }
#else
  void round(const float *, ptrdiff_t, float) {}
#endif
};

// Rows of inputs: the step of each and, of one row alone, its inputs, kSummedAtOnce a part. Null: not known yet.
struct Rounded {
  const float *steps = nullptr;
  const ByteRow *parts = nullptr;
};
constexpr ptrdiff_t kHeldParts = 32;  // parts of a row that are rounded once for all outputs; later ones for each tile

}  // namespace
