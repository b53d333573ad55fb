// The kernels of the refiner. Part of kernels.cpp, under its rules.
#pragma once

#include "cpu/refiner_kernels.h"
#include "cpu/simd/math.h"
#include "cpu/simd/vec.h"

namespace {

// P(z < x) of a standard normal z, and its density at x.
struct Normal {
  Vec below, density;
};

// The error function by formula 7.1.26 of Abramowitz and Stegun, to 1.5e-7: erfc(y) = t Q(t) exp(-y^2) for y >= 0, with
// t = 1 / (1 + p y) and a polynomial Q.
inline Normal normal(Vec x) {
  constexpr float kRootHalf = 0.707106781f, kP = 0.3275911f, kDensity = 0.398942280f;  // 1 / sqrt(2 pi)
  const Vec y = max(x, Vec::zero() - x) * Vec::all(kRootHalf);
  const Vec gauss = exp(Vec::zero() - y * y);
  const Vec t = Vec::all(1.0f) / fma(y, Vec::all(kP), Vec::all(1.0f));
  Vec q = Vec::all(0.5f * 1.061405429f);
  q = fma(q, t, Vec::all(0.5f * -1.453152027f));
  q = fma(q, t, Vec::all(0.5f * 1.421413741f));
  q = fma(q, t, Vec::all(0.5f * -0.284496736f));
  q = fma(q, t, Vec::all(0.5f * 0.254829592f));
  const Vec beyond = q * t * gauss;
  return {{x.v < 0.0f ? beyond.v : (Vec::all(1.0f) - beyond).v}, gauss * Vec::all(kDensity)};
}

// gelu(x), by x R(x^2) in place of P(z < x) - 1 / 2: a rational R, fitted for the least error on [-5.2, 5.2], beyond
// which P is 0 or 1 to 1e-7. Faster, but without the density that the derivative needs.
inline Vec normal_gelu(Vec x) {
  const Vec bounded = min(Vec::all(5.2f), max(Vec::all(-5.2f), x));
  const Vec z = bounded * bounded;
  Vec p = Vec::all(1.285802340e-10f);
  p = fma(p, z, Vec::all(-2.280611106e-08f));
  p = fma(p, z, Vec::all(2.855404882e-06f));
  p = fma(p, z, Vec::all(1.291839438e-04f));
  p = fma(p, z, Vec::all(4.243563782e-03f));
  p = fma(p, z, Vec::all(3.181510069e-02f));
  p = fma(p, z, Vec::all(3.989422704e-01f));
  Vec q = Vec::all(4.915505831e-05f);
  q = fma(q, z, Vec::all(1.589602160e-03f));
  q = fma(q, z, Vec::all(2.670733523e-02f));
  q = fma(q, z, Vec::all(2.464148816e-01f));
  q = fma(q, z, Vec::all(1.0f));
  return x * fma(bounded, p / q, Vec::all(0.5f));
}

// gelu(x), with its derivative.
inline Vec normal_gelu(Vec x, Vec &slope) {
  const Normal at = normal(x);
  slope = fma(x, at.density, at.below);
  return x * at.below;
}

template <bool WITH_SLOPE>
inline void gelu_of_input(const tipl::OddInput &in, float *y, float *slope) {
  for (ptrdiff_t r = 0; r < in.rows; ++r) {
    const ptrdiff_t row = r * in.stride;
    for (ptrdiff_t c = 0; c < in.columns; c += kLanes) {
      const Vec even = Vec::load(in.even + row + c) + Vec::all(in.shift[r]);
      const Vec odd = fma(Vec::all(in.gain[r]), Vec::load(in.x + c), Vec::load(in.odd + row + c));
      float *const left = y + row + c, *const right = left + in.columns;
      if constexpr (WITH_SLOPE) {
        Vec by_left, by_right;
        normal_gelu(even + odd, by_left).store(left);
        normal_gelu(even - odd, by_right).store(right);
        by_left.store(slope + row + c);
        by_right.store(slope + row + c + in.columns);
      } else {
        normal_gelu(even + odd).store(left);
        normal_gelu(even - odd).store(right);
      }
    }
  }
}

void gelu_of_input(const tipl::OddInput &in, float *y, float *slope) noexcept {
  if (slope == nullptr) {
    gelu_of_input<false>(in, y, slope);
  } else {
    gelu_of_input<true>(in, y, slope);
  }
}

void odd_head(float *x, ptrdiff_t rows, ptrdiff_t columns, ptrdiff_t stride, const float *weight, float *difference,
              float *sum) noexcept {
  for (ptrdiff_t c = 0; c < columns; c += kLanes) {
    Vec total = Vec::zero();
    for (ptrdiff_t r = 0; r < rows; ++r) {
      float *const left = x + r * stride + c, *const right = left + columns;
      Vec between;
      if (difference == nullptr) {
        between = normal_gelu(Vec::load(left)) - normal_gelu(Vec::load(right));
      } else {
        Vec by_left, by_right;
        between = normal_gelu(Vec::load(left), by_left) - normal_gelu(Vec::load(right), by_right);
        by_left.store(left);
        by_right.store(right);
        between.store(difference + r * stride + c);
      }
      total = fma(Vec::all(weight[r]), between, total);
    }
    total.store(sum + c);
  }
}

void odd_head_backward(float *slope, ptrdiff_t rows, ptrdiff_t columns, ptrdiff_t stride, const float *weight,
                       const float *dsum) noexcept {
  for (ptrdiff_t r = 0; r < rows; ++r) {
    for (ptrdiff_t c = 0; c < columns; c += kLanes) {
      float *const left = slope + r * stride + c, *const right = left + columns;
      const Vec grad = Vec::all(weight[r]) * Vec::load(dsum + c);
      (grad * Vec::load(left)).store(left);
      (Vec::zero() - grad * Vec::load(right)).store(right);
    }
  }
}

void input_backward(const float *dy, const float *slope, ptrdiff_t rows, ptrdiff_t columns, ptrdiff_t stride,
                    float *deven, float *dodd) noexcept {
  for (ptrdiff_t r = 0; r < rows; ++r) {
    for (ptrdiff_t c = 0; c < columns; c += kLanes) {
      const ptrdiff_t at = r * stride + c;
      const Vec left = Vec::load(dy + at) * Vec::load(slope + at);
      const Vec right = Vec::load(dy + at + columns) * Vec::load(slope + at + columns);
      (left + right).store(deven + at);
      (left - right).store(dodd + at);
    }
  }
}

}  // namespace
