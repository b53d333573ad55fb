// The kernels that train the forecaster. Part of kernels.cpp, under its rules.
#pragma once

#include "cpu/gradient_kernels.h"
#include "cpu/simd/math.h"
#include "cpu/simd/vec.h"

namespace {

using tipl::HeadColumns;
using tipl::kSequences;

constexpr int kGroupVecs = kSequences / kLanes;  // registers that hold one number of a group
static_assert(kSequences % kLanes == 0);

void normalize(const float *z, ptrdiff_t stride, ptrdiff_t rows, ptrdiff_t columns, const float *weight,
               const float *bias, float *normal, float *inverse, float *y) noexcept {
  const Vec share = Vec::all(1.0f / static_cast<float>(rows));
  for (ptrdiff_t c = 0; c < columns; c += kSequences) {
    Vec mean[kGroupVecs], squares[kGroupVecs];
    for (int i = 0; i < kGroupVecs; ++i) mean[i] = squares[i] = Vec::zero();
    for (ptrdiff_t r = 0; r < rows; ++r) {
      for (int i = 0; i < kGroupVecs; ++i) mean[i] = mean[i] + Vec::load(z + r * stride + c + i * kLanes);
    }
    for (int i = 0; i < kGroupVecs; ++i) mean[i] = mean[i] * share;
    for (ptrdiff_t r = 0; r < rows; ++r) {
      for (int i = 0; i < kGroupVecs; ++i) {
        const Vec centred = Vec::load(z + r * stride + c + i * kLanes) - mean[i];
        squares[i] = fma(centred, centred, squares[i]);
      }
    }
    for (int i = 0; i < kGroupVecs; ++i) {
      squares[i] = Vec::all(1.0f) / square_root(fma(squares[i], share, Vec::all(1e-5f)));
      squares[i].store(inverse + c + i * kLanes);
    }
    for (ptrdiff_t r = 0; r < rows; ++r) {
      for (int i = 0; i < kGroupVecs; ++i) {
        const ptrdiff_t at = r * stride + c + i * kLanes;
        const Vec value = (Vec::load(z + at) - mean[i]) * squares[i];
        value.store(normal + at);
        fma(value, Vec::all(weight[r]), Vec::all(bias[r])).store(y + at);
      }
    }
  }
}

// With g = dy * weight: dz += inverse * (g - mean(g) - normal * mean(g * normal)).
void normalize_backward(const float *dy, const float *normal, const float *inverse, const float *weight,
                        ptrdiff_t stride, ptrdiff_t rows, ptrdiff_t columns, float *dz) noexcept {
  const Vec share = Vec::all(1.0f / static_cast<float>(rows));
  for (ptrdiff_t c = 0; c < columns; c += kSequences) {
    Vec mean[kGroupVecs], along[kGroupVecs];
    for (int i = 0; i < kGroupVecs; ++i) mean[i] = along[i] = Vec::zero();
    for (ptrdiff_t r = 0; r < rows; ++r) {
      for (int i = 0; i < kGroupVecs; ++i) {
        const ptrdiff_t at = r * stride + c + i * kLanes;
        const Vec g = Vec::load(dy + at) * Vec::all(weight[r]);
        mean[i] = mean[i] + g;
        along[i] = fma(g, Vec::load(normal + at), along[i]);
      }
    }
    for (int i = 0; i < kGroupVecs; ++i) {
      mean[i] = mean[i] * share;
      along[i] = along[i] * share;
    }
    for (ptrdiff_t r = 0; r < rows; ++r) {
      for (int i = 0; i < kGroupVecs; ++i) {
        const ptrdiff_t at = r * stride + c + i * kLanes;
        const Vec g = fma(Vec::load(dy + at), Vec::all(weight[r]), Vec::zero() - mean[i]);
        const Vec rest = fma(Vec::zero() - Vec::load(normal + at), along[i], g);
        fma(rest, Vec::load(inverse + c + i * kLanes), Vec::load(dz + at)).store(dz + at);
      }
    }
  }
}

// to[i] <- function(i) for every register of a matrix.
template <class Function>
inline void for_each_column(ptrdiff_t stride, ptrdiff_t rows, ptrdiff_t columns, float *to, const Function &function) {
  for (ptrdiff_t r = 0; r < rows; ++r) {
    for (ptrdiff_t c = 0; c < columns; c += kLanes) function(r * stride + c).store(to + r * stride + c);
  }
}

void gelu_columns(const float *x, ptrdiff_t stride, ptrdiff_t rows, ptrdiff_t columns, float *y) noexcept {
  for_each_column(stride, rows, columns, y, [x](ptrdiff_t i) { return gelu(Vec::load(x + i)); });
}

// gelu(x) = x s with s = 1 / (1 + exp(-2u)): gelu'(x) = s + x s (1 - s) 2u'.
inline Vec gelu_slope(Vec x) {
  constexpr float kTwoRootTwoOverPi = 1.59576912f, kCubic = 0.044715f;
  const Vec square = x * x;
  const Vec inner = fma(square * x, Vec::all(kCubic), x);
  const Vec s = Vec::all(1.0f) / (Vec::all(1.0f) + exp(Vec::all(-kTwoRootTwoOverPi) * inner));
  const Vec slope = fma(square, Vec::all(3.0f * kCubic * kTwoRootTwoOverPi), Vec::all(kTwoRootTwoOverPi));
  return fma(x * s * (Vec::all(1.0f) - s), slope, s);
}

void gelu_columns_backward(const float *x, ptrdiff_t stride, ptrdiff_t rows, ptrdiff_t columns, float *dy) noexcept {
  for_each_column(stride, rows, columns, dy,
                  [x, dy](ptrdiff_t i) { return Vec::load(dy + i) * gelu_slope(Vec::load(x + i)); });
}

void add_masked(const float *x, const float *mask, ptrdiff_t stride, ptrdiff_t rows, ptrdiff_t columns,
                float *z) noexcept {
  for_each_column(stride, rows, columns, z,
                  [=](ptrdiff_t i) { return fma(Vec::load(x + i), Vec::load(mask + i), Vec::load(z + i)); });
}

void multiply_masked(const float *x, const float *mask, ptrdiff_t stride, ptrdiff_t rows, ptrdiff_t columns,
                     float *y) noexcept {
  for_each_column(stride, rows, columns, y, [=](ptrdiff_t i) { return Vec::load(x + i) * Vec::load(mask + i); });
}

void dot_rows(const float *x, const float *y, ptrdiff_t stride, ptrdiff_t rows, ptrdiff_t columns,
              float *sums) noexcept {
  for (ptrdiff_t r = 0; r < rows; ++r, x += stride, y += stride) {
    Vec sum = Vec::zero();
    for (ptrdiff_t c = 0; c < columns; c += kLanes) sum = fma(Vec::load(x + c), Vec::load(y + c), sum);
    sums[r] = first_lane(sum_lanes(sum));
  }
}

// ---- attention

// result (kGroupVecs) <- the products of a (D, stride) and b (D, stride), one for each sequence.
inline void dot_columns(const float *a, const float *b, ptrdiff_t head_dim, ptrdiff_t stride,
                        Vec (&result)[kGroupVecs]) {
  for (int i = 0; i < kGroupVecs; ++i) result[i] = Vec::zero();
  for (ptrdiff_t d = 0; d < head_dim; ++d, a += stride, b += stride) {
    for (int i = 0; i < kGroupVecs; ++i) {
      result[i] = fma(Vec::load(a + i * kLanes), Vec::load(b + i * kLanes), result[i]);
    }
  }
}

inline float score_scale(const HeadColumns &head) { return 1.0f / __builtin_sqrtf(static_cast<float>(head.head_dim)); }

// The natural logarithm of x >= 1, from exp by two steps of Newton's method after a first guess from x's exponent.
inline Vec log_of_at_least_one(Vec x) {
  const Floats bits = __builtin_convertvector(reinterpret_cast<Ints>(x.v), Floats);
  Vec y = fma(Vec{bits}, Vec::all(8.26295829e-8f), Vec::all(-88.0296919f));  // ln(2) / 2^23, off by less than 0.06
#pragma GCC unroll 3
  for (int i = 0; i < 3; ++i) {
    const Vec e = exp(y);
    y = y + Vec::all(2.0f) * (x - e) / (x + e);  // Halley's
  }
  return y;
}

void attend_columns(const HeadColumns &head, float *out) noexcept {
  const Vec scale = Vec::all(score_scale(head));
  Vec highest[kGroupVecs], total[kGroupVecs];
  for (int i = 0; i < kGroupVecs; ++i) {
    highest[i] = Vec::all(-__builtin_inff());
    total[i] = Vec::zero();
  }
  for (ptrdiff_t j = 0; j < head.tokens; ++j) {
    Vec score[kGroupVecs];
    dot_columns(head.query, head.keys + j * kSequences, head.head_dim, head.stride, score);
    for (int i = 0; i < kGroupVecs; ++i) {
      score[i] = score[i] * scale;
      highest[i] = max(highest[i], score[i]);
      score[i].store(head.weights + j * kSequences + i * kLanes);
    }
  }
  for (ptrdiff_t j = 0; j < head.tokens; ++j) {
    for (int i = 0; i < kGroupVecs; ++i) {
      float *const at = head.weights + j * kSequences + i * kLanes;
      const Vec weight = exp(Vec::load(at) - highest[i]);
      total[i] = total[i] + weight;
      weight.store(at);
    }
  }
  for (int i = 0; i < kGroupVecs; ++i) {
    (highest[i] + log_of_at_least_one(total[i])).store(head.log_sum + i * kLanes);
    total[i] = Vec::all(1.0f) / total[i];
  }
  for (ptrdiff_t d = 0; d < head.head_dim; ++d) {
    Vec sum[kGroupVecs];
    for (int i = 0; i < kGroupVecs; ++i) sum[i] = Vec::zero();
    const float *const values = head.values + d * head.stride;
    for (ptrdiff_t j = 0; j < head.tokens * kSequences; j += kSequences) {
      for (int i = 0; i < kGroupVecs; ++i) {
        sum[i] = fma(Vec::load(head.weights + j + i * kLanes), Vec::load(values + j + i * kLanes), sum[i]);
      }
    }
    for (int i = 0; i < kGroupVecs; ++i) (sum[i] * total[i]).store(out + d * head.stride + i * kLanes);
  }
}

void attend_columns_backward(const HeadColumns &head, const float *dout, float *dquery, float *dkeys, float *dvalues,
                             float *scratch) noexcept {
  const Vec scale = Vec::all(score_scale(head));
  Vec mean[kGroupVecs];  // of the gradients by the weights
  for (int i = 0; i < kGroupVecs; ++i) mean[i] = Vec::zero();
  for (ptrdiff_t j = 0; j < head.tokens; ++j) {
    Vec score[kGroupVecs], dweight[kGroupVecs];
    dot_columns(head.query, head.keys + j * kSequences, head.head_dim, head.stride, score);
    dot_columns(dout, head.values + j * kSequences, head.head_dim, head.stride, dweight);
    for (int i = 0; i < kGroupVecs; ++i) {
      const ptrdiff_t at = j * kSequences + i * kLanes;
      const Vec weight = exp(fma(score[i], scale, Vec::zero() - Vec::load(head.log_sum + i * kLanes)));
      weight.store(head.weights + at);
      dweight[i].store(scratch + at);
      mean[i] = fma(weight, dweight[i], mean[i]);
    }
  }
  for (ptrdiff_t j = 0; j < head.tokens; ++j) {  // gradients by the scores
    for (int i = 0; i < kGroupVecs; ++i) {
      float *const at = scratch + j * kSequences + i * kLanes;
      (Vec::load(head.weights + j * kSequences + i * kLanes) * (Vec::load(at) - mean[i]) * scale).store(at);
    }
  }
  for (ptrdiff_t d = 0; d < head.head_dim; ++d) {
    Vec query[kGroupVecs], grad[kGroupVecs], sum[kGroupVecs];
    for (int i = 0; i < kGroupVecs; ++i) {
      query[i] = Vec::load(head.query + d * head.stride + i * kLanes);
      grad[i] = Vec::load(dout + d * head.stride + i * kLanes);
      sum[i] = Vec::zero();
    }
    const float *const keys = head.keys + d * head.stride;
    float *const dkey = dkeys + d * head.stride, *const dvalue = dvalues + d * head.stride;
    for (ptrdiff_t j = 0; j < head.tokens * kSequences; j += kSequences) {
      for (int i = 0; i < kGroupVecs; ++i) {
        const ptrdiff_t at = j + i * kLanes;
        const Vec dscore = Vec::load(scratch + at);
        sum[i] = fma(dscore, Vec::load(keys + at), sum[i]);
        fma(dscore, query[i], Vec::load(dkey + at)).store(dkey + at);
        fma(Vec::load(head.weights + at), grad[i], Vec::load(dvalue + at)).store(dvalue + at);
      }
    }
    for (int i = 0; i < kGroupVecs; ++i) sum[i].store(dquery + d * head.stride + i * kLanes);
  }
}

}  // namespace
