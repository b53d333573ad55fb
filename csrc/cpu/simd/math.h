// Elementary functions, layer norm and sums of squares. Part of kernels.cpp, under its rules.
#pragma once

#include <stddef.h>

#include "cpu/simd/vec.h"

namespace {

// exp(x) to about one unit in the last place, 0 below the smallest normal number, NaN for NaN (after Cephes' expf).
inline Vec exp(Vec x) {
  constexpr float kLowest = -87.33654f, kHighest = 88.0f;
  const Vec bounded = min(Vec::all(kHighest), max(Vec::all(kLowest), x));
  // n = x / ln 2, rounded: in the low bits of a float whose last place is worth one.
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

// log(x), lane by lane as the C library computes it.
inline Vec log(Vec x) {
  for (int lane = 0; lane < kLanes; ++lane) x.v[lane] = __builtin_logf(x.v[lane]);
  return x;
}

// gelu(x) in its tanh form, 0.5 x (1 + tanh u) = x / (1 + exp(-2u)), u = sqrt(2 / pi) (x + 0.044715 x^3).
inline Vec gelu(Vec x) {
  constexpr float kMinusTwoRootTwoOverPi = -1.59576912f;
  const Vec inner = fma(x * x * x, Vec::all(0.044715f), x);
  return x / (Vec::all(1.0f) + exp(Vec::all(kMinusTwoRootTwoOverPi) * inner));
}

void layer_norm(const float *x, ptrdiff_t x_stride, ptrdiff_t rows, ptrdiff_t d, const float *weight, const float *bias,
                float *y, ptrdiff_t y_stride) noexcept {
  const ptrdiff_t whole = d / kLanes * kLanes, rest = d - whole;
  for (; rows > 0; --rows, x += x_stride, y += y_stride) {
    Vec total = load_first(x + whole, rest);
    for (ptrdiff_t i = 0; i < whole; i += kLanes) total = total + Vec::load(x + i);
    const Vec mean = Vec::all(first_lane(sum_lanes(total)) / static_cast<float>(d));
    const Vec last = select_first(rest, load_first(x + whole, rest) - mean, Vec::zero());
    Vec squares = last * last;
    for (ptrdiff_t i = 0; i < whole; i += kLanes) {
      const Vec centred = Vec::load(x + i) - mean;
      squares = fma(centred, centred, squares);
    }
    const float variance = first_lane(sum_lanes(squares)) / static_cast<float>(d);
    const Vec inverse = Vec::all(1.0f / __builtin_sqrtf(variance + 1e-5f));
    for (ptrdiff_t i = 0; i < whole; i += kLanes) {
      fma((Vec::load(x + i) - mean) * inverse, Vec::load(weight + i), Vec::load(bias + i)).store(y + i);
    }
    store_first(y + whole, rest, fma(last * inverse, load_first(weight + whole, rest), load_first(bias + whole, rest)));
  }
}

double sum_squares(const float *x, const float *origin, ptrdiff_t n) noexcept {
  constexpr int kSums = 4;
  Doubles acc[kSums];
  for (Doubles &a : acc) a = Doubles::zero();
  const auto add = [&](Doubles &a, Doubles value) { a = fma(value, value, a); };
  ptrdiff_t i = 0;
  for (; i + kSums * kDoubleLanes <= n; i += kSums * kDoubleLanes) {
    for (int s = 0; s < kSums; ++s) {
      const ptrdiff_t at = i + s * kDoubleLanes;
      const Doubles value = Doubles::load(x + at);
      add(acc[s], origin == nullptr ? value : value - Doubles::load(origin + at));
    }
  }
  for (; i < n; i += kDoubleLanes) {
    const ptrdiff_t count = n - i < kDoubleLanes ? n - i : kDoubleLanes;
    const Doubles value = load_first_doubles(x + i, count);
    add(acc[0], origin == nullptr ? value : value - load_first_doubles(origin + i, count));
  }
  return sum((acc[0] + acc[1]) + (acc[2] + acc[3]));
}

}  // namespace
