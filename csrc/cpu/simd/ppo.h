// The kernels of policies and of PPO's update. Part of kernels.cpp, under its rules.
#pragma once

#include "cpu/policy_kernels.h"
#include "cpu/simd/math.h"
#include "cpu/simd/vec.h"

namespace {

constexpr int kMultiplyPanels = kLanes == 16 ? 4 : 2;  // registers side by side in a tile of multiply
constexpr int kMultiplyRows = 6;                       // rows of such a tile

// tanh(x) to 5 units in the last place: x P(x^2) / Q(x^2), fitted for the least relative error on [0, 8]; at 8 tanh is
// 1 - 2e-7.
inline Vec tanh(Vec x) {
  constexpr float kHighest = 7.99881172f;
  const Vec bounded = min(Vec::all(kHighest), max(Vec::all(-kHighest), x));
  const Vec z = bounded * bounded;
  Vec p = Vec::all(-1.156848925e-13f);
  p = fma(p, z, Vec::all(6.366906118e-11f));
  p = fma(p, z, Vec::all(-2.231714585e-08f));
  p = fma(p, z, Vec::all(1.164300052e-05f));
  p = fma(p, z, Vec::all(3.149415465e-03f));
  p = fma(p, z, Vec::all(1.312439459e-01f));
  p = fma(p, z, Vec::all(1.0f));
  Vec q = Vec::all(2.613049526e-04f);
  q = fma(q, z, Vec::all(2.467520053e-02f));
  q = fma(q, z, Vec::all(4.645772610e-01f));
  q = fma(q, z, Vec::all(1.0f));
  return bounded * p / q;
}

// ---- products of small matrices

// multiply for ROWS rows and PANELS registers of columns, of which the last register holds `last` columns.
template <int ROWS, int PANELS>
inline void multiply_tile(const tipl::Factor &a, ptrdiff_t k, const float *b, ptrdiff_t b_stride, const float *bias,
                          float *c, ptrdiff_t c_stride, ptrdiff_t last) {
  Vec sum[ROWS][PANELS];
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
    for (int p = 0; p < PANELS; ++p) sum[r][p] = bias == nullptr ? Vec::zero() : Vec::all(bias[r]);
  }
  const float *left = a.data;
  for (ptrdiff_t i = 0; i < k; ++i, left += a.k_stride, b += b_stride) {
    Vec right[PANELS];
#pragma GCC unroll 4
    for (int p = 0; p < PANELS; ++p) right[p] = Vec::load(b + p * kLanes);
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; ++r) {
      const Vec value = Vec::all(left[r * a.row_stride]);
#pragma GCC unroll 4
      for (int p = 0; p < PANELS; ++p) sum[r][p] = fma(value, right[p], sum[r][p]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
    for (int p = 0; p < PANELS - 1; ++p) sum[r][p].store(c + r * c_stride + p * kLanes);
    float *const edge = c + r * c_stride + (PANELS - 1) * kLanes;
    if (last == kLanes) {
      sum[r][PANELS - 1].store(edge);
    } else {
      store_first(edge, last, sum[r][PANELS - 1]);
    }
  }
}

template <int PANELS>
inline void multiply_panels(tipl::Factor a, ptrdiff_t rows, ptrdiff_t k, const float *b, ptrdiff_t b_stride,
                            const float *bias, float *c, ptrdiff_t c_stride, ptrdiff_t last) {
  const auto tile = [&]<int ROWS>() {
    multiply_tile<ROWS, PANELS>(a, k, b, b_stride, bias, c, c_stride, last);
    a.data += ROWS * a.row_stride;
    c += ROWS * c_stride;
    if (bias != nullptr) bias += ROWS;
    rows -= ROWS;
  };
  while (rows >= kMultiplyRows) tile.template operator()<kMultiplyRows>();
  if (rows >= 4) tile.template operator()<4>();
  if (rows >= 2) tile.template operator()<2>();
  if (rows >= 1) tile.template operator()<1>();
}

void multiply(tipl::Factor a, ptrdiff_t rows, ptrdiff_t k, const float *b, ptrdiff_t b_stride, const float *bias,
              ptrdiff_t columns, float *c, ptrdiff_t c_stride) noexcept {
  for (; columns > 0;
       columns -= kMultiplyPanels * kLanes, b += kMultiplyPanels * kLanes, c += kMultiplyPanels * kLanes) {
    const ptrdiff_t panels = (columns + kLanes - 1) / kLanes;
    const ptrdiff_t last = panels > kMultiplyPanels ? kLanes : columns - (panels - 1) * kLanes;
    if (panels >= kMultiplyPanels) {
      multiply_panels<kMultiplyPanels>(a, rows, k, b, b_stride, bias, c, c_stride, last);
    } else if (panels == 3) {
      multiply_panels<3>(a, rows, k, b, b_stride, bias, c, c_stride, last);
    } else if (panels == 2) {
      multiply_panels<2>(a, rows, k, b, b_stride, bias, c, c_stride, last);
    } else {
      multiply_panels<1>(a, rows, k, b, b_stride, bias, c, c_stride, last);
    }
  }
}

// y[o] = bias[o] + W[o] . x for one input. Computes the sums of as many rows as a register has lanes, one register for
// each row, then transposes and adds them.
void multiply_vector(const float *w, ptrdiff_t rows, ptrdiff_t k, const float *x, const float *bias,
                     float *y) noexcept {
  const ptrdiff_t whole = k / kLanes * kLanes, rest = k - whole;
  for (ptrdiff_t first = 0; first < rows; first += kLanes) {
    const ptrdiff_t count = rows - first < kLanes ? rows - first : kLanes;
    Vec sums[kLanes];
    for (ptrdiff_t r = 0; r < kLanes; ++r) {
      Vec sum = Vec::zero();
      if (r < count) {
        const float *const row = w + (first + r) * k;
        for (ptrdiff_t i = 0; i < whole; i += kLanes) sum = fma(Vec::load(row + i), Vec::load(x + i), sum);
        if (rest > 0) sum = fma(load_first(row + whole, rest), load_first(x + whole, rest), sum);
      }
      sums[r] = sum;
    }
    transpose(sums);
    for (int width = kLanes / 2; width > 0; width /= 2) {
      for (int r = 0; r < width; ++r) sums[r] = sums[r] + sums[r + width];
    }
    store_first(y + first, count, sums[0] + load_first(bias + first, count));
  }
}

// y (columns, y_stride) <- x^T, of x (rows, x_stride). Reads and writes whole registers.
void transpose_matrix(const float *x, ptrdiff_t x_stride, ptrdiff_t rows, ptrdiff_t columns, float *y,
                      ptrdiff_t y_stride) noexcept {
  for (ptrdiff_t r = 0; r < rows; r += kLanes) {
    for (ptrdiff_t c = 0; c < columns; c += kLanes) {
      Vec tile[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) tile[i] = Vec::load(x + (r + i) * x_stride + c);
      transpose(tile);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) tile[i].store(y + (c + i) * y_stride + r);
    }
  }
}

void sum_rows(const float *x, ptrdiff_t stride, ptrdiff_t rows, ptrdiff_t columns, float *sums) noexcept {
  for (ptrdiff_t r = 0; r < rows; ++r, x += stride) {
    Vec sum = Vec::zero();
    for (ptrdiff_t c = 0; c < columns; c += kLanes) sum = sum + Vec::load(x + c);
    sums[r] = first_lane(sum_lanes(sum));
  }
}

// ---- activations

template <class Function>
inline void for_each_register(float *x, ptrdiff_t n, const Function &function) {
  for (ptrdiff_t i = 0; i < n; i += kLanes) function(Vec::load(x + i), i).store(x + i);
}

void activate(tipl::Activation activation, float *x, ptrdiff_t n) noexcept {
  if (activation == tipl::Activation::kTanh) {
    for_each_register(x, n, [](Vec value, ptrdiff_t) { return tanh(value); });
  } else if (activation == tipl::Activation::kRelu) {
    for_each_register(x, n, [](Vec value, ptrdiff_t) { return max(Vec::zero(), value); });  // NaN stays NaN
  } else {
    for_each_register(
        x, n, [](Vec value, ptrdiff_t) -> Vec { return {value.v > 0.0f ? value.v : (exp(value) - Vec::all(1.0f)).v}; });
  }
}

void activate_backward(tipl::Activation activation, const float *y, float *dx, ptrdiff_t n) noexcept {
  if (activation == tipl::Activation::kTanh) {
    for_each_register(dx, n, [y](Vec grad, ptrdiff_t i) {
      const Vec value = Vec::load(y + i);
      return grad * fma(Vec::zero() - value, value, Vec::all(1.0f));
    });
  } else if (activation == tipl::Activation::kRelu) {
    for_each_register(dx, n,
                      [y](Vec grad, ptrdiff_t i) -> Vec { return {Vec::load(y + i).v > 0.0f ? grad.v : Floats{}}; });
  } else {
    for_each_register(dx, n, [y](Vec grad, ptrdiff_t i) -> Vec {
      const Vec value = Vec::load(y + i);
      return {value.v > 0.0f ? grad.v : (grad * (value + Vec::all(1.0f))).v};
    });
  }
}

// ---- losses

// PPO's clipped objective of the `count` steps from step i on, whose actions now have these log-probabilities. Adds to
// `loss`, and returns the gradient of the minibatch's mean loss by the log-probabilities, 0 beyond `count`.
inline Vec clipped_objective(const tipl::PolicyBatch &batch, ptrdiff_t i, ptrdiff_t count, Vec log_prob,
                             tipl::PolicyLoss &loss) {
  const float scale = -1.0f / static_cast<float>(batch.size);
  const Vec log_ratio = log_prob - Vec::load(batch.log_prob + i);
  const Vec ratio = exp(log_ratio), advantage = Vec::load(batch.advantage + i);
  const Vec bounded = min(max(ratio, Vec::all(1.0f - batch.clip)), Vec::all(1.0f + batch.clip));
  const Vec free = ratio * advantage, clipped = bounded * advantage;
  float objective[kLanes], change[kLanes], log_change[kLanes];
  Vec{free.v < clipped.v ? free.v : clipped.v}.store(objective);
  (ratio - Vec::all(1.0f)).store(change);
  log_ratio.store(log_change);
  for (ptrdiff_t lane = 0; lane < count; ++lane) {
    loss.objective += static_cast<double>(objective[lane]);
    loss.kl += static_cast<double>(change[lane]) - static_cast<double>(log_change[lane]);
    loss.clipped += (change[lane] < 0.0f ? -change[lane] : change[lane]) > batch.clip ? 1.0 : 0.0;
  }
  // A ratio is its own derivative by the log-probability; where the clipped side is the smaller, the loss is constant.
  return select_first(count, Vec{free.v <= clipped.v ? free.v : Floats{}} * Vec::all(scale), Vec::zero());
}

tipl::PolicyLoss gaussian_loss(const tipl::PolicyBatch &batch, const float *mean, const float *log_std,
                               const float *inverse_std, float *mean_grad, float *log_std_grad) noexcept {
  const ptrdiff_t A = batch.act_dim, B = batch.size, stride = batch.stride;
  float offset = 0.0f;  // the part of a log-probability that does not depend on the action
  for (ptrdiff_t a = 0; a < A; ++a) {
    offset += log_std[a] + 0.918938533f;  // ln(2 pi) / 2
    log_std_grad[a] = 0.0f;
  }
  tipl::PolicyLoss loss = {0.0, 0.0, 0.0, 0.0};
  for (ptrdiff_t i = 0; i < B; i += kLanes) {
    const ptrdiff_t count = B - i < kLanes ? B - i : kLanes;
    Vec squares = Vec::zero();
    for (ptrdiff_t a = 0; a < A; ++a) {  // the noise, which takes the place of the mean's gradient for now
      const Vec difference = Vec::load(batch.action + a * stride + i) - Vec::load(mean + a * stride + i);
      const Vec noise = difference * Vec::all(inverse_std[a]);
      noise.store(mean_grad + a * stride + i);
      squares = fma(noise, noise, squares);
    }
    const Vec log_prob = fma(squares, Vec::all(-0.5f), Vec::zero() - Vec::all(offset));
    const Vec grad = clipped_objective(batch, i, count, log_prob, loss);
    for (ptrdiff_t a = 0; a < A; ++a) {
      const Vec noise = Vec::load(mean_grad + a * stride + i);
      // Beyond the batch grad is 0, and so must its products be, whatever lies there.
      const Vec by_std = select_first(count, fma(noise, noise, Vec::all(-1.0f)) * grad, Vec::zero());
      log_std_grad[a] += first_lane(sum_lanes(by_std));
      select_first(count, noise * grad * Vec::all(inverse_std[a]), Vec::zero()).store(mean_grad + a * stride + i);
    }
  }
  return loss;
}

// Where x are the logits less the greatest of them, p = exp(x) / sum exp(x) are the probabilities and m = sum p x, the
// taken action c has the log-probability x_c - log sum exp(x), and the entropy is log sum exp(x) - m. Their derivatives
// by x_a are (1 if a = c, else 0) - p_a, and -p_a (x_a - m).
tipl::PolicyLoss categorical_loss(const tipl::PolicyBatch &batch, float ent_coef, const float *logits,
                                  float *logits_grad) noexcept {
  const ptrdiff_t A = batch.act_dim, B = batch.size, stride = batch.stride;
  const float bonus = ent_coef / static_cast<float>(B);
  tipl::PolicyLoss loss = {0.0, 0.0, 0.0, 0.0};
  for (ptrdiff_t i = 0; i < B; i += kLanes) {
    const ptrdiff_t count = B - i < kLanes ? B - i : kLanes;
    const Vec action = Vec::load(batch.action + i);
    const auto taken = [action](ptrdiff_t a, Vec yes, Vec no) -> Vec {
      return {action.v == Vec::all(static_cast<float>(a)).v ? yes.v : no.v};
    };
    Vec most = Vec::load(logits + i);
    for (ptrdiff_t a = 1; a < A; ++a) most = max(Vec::load(logits + a * stride + i), most);
    Vec sum = Vec::zero(), weighted = Vec::zero(), chosen = Vec::zero();
    for (ptrdiff_t a = 0; a < A; ++a) {
      const Vec x = Vec::load(logits + a * stride + i) - most, power = exp(x);
      power.store(logits_grad + a * stride + i);  // which takes the place of the gradient for now
      sum = sum + power;
      weighted = fma(power, x, weighted);
      chosen = taken(a, x, chosen);
    }
    const Vec log_sum = log(sum), mean = weighted / sum;
    const Vec grad = clipped_objective(batch, i, count, chosen - log_sum, loss);
    for (ptrdiff_t a = 0; a < A; ++a) {
      const Vec x = Vec::load(logits + a * stride + i) - most, p = Vec::load(logits_grad + a * stride + i) / sum;
      const Vec by_log_prob = grad * (taken(a, Vec::all(1.0f), Vec::zero()) - p);
      const Vec by_logit = fma(Vec::all(bonus) * p, x - mean, by_log_prob);
      select_first(count, by_logit, Vec::zero()).store(logits_grad + a * stride + i);
    }
    float entropy[kLanes];
    (log_sum - mean).store(entropy);
    for (ptrdiff_t lane = 0; lane < count; ++lane) loss.entropy += static_cast<double>(entropy[lane]);
  }
  return loss;
}

// ---- the optimizer

double squared_norm(const float *x, ptrdiff_t n) noexcept { return sum_squares(x, nullptr, n); }

void adam(const tipl::AdamStep &step, float *param, const float *grad, float *first, float *second,
          ptrdiff_t n) noexcept {
  constexpr float kNewFirst = 1.0 - tipl::kBeta1, kOldSecond = tipl::kBeta2, kNewSecond = 1.0 - tipl::kBeta2;
  const auto update = [&](const auto &load, const auto &store, ptrdiff_t i) {
    const Vec g = load(grad + i) * Vec::all(step.grad_scale);
    const Vec m = fma(g - load(first + i), Vec::all(kNewFirst), load(first + i));
    const Vec v = fma(g * g, Vec::all(kNewSecond), load(second + i) * Vec::all(kOldSecond));
    const Vec spread = fma(square_root(v), Vec::all(step.second_scale), Vec::all(step.eps));
    store(first + i, m);
    store(second + i, v);
    store(param + i, load(param + i) - m * Vec::all(step.step_size) / spread);
  };
  const ptrdiff_t whole = n / kLanes * kLanes, rest = n - whole;
  for (ptrdiff_t i = 0; i < whole; i += kLanes) {
    update([](const float *at) { return Vec::load(at); }, [](float *at, Vec value) { value.store(at); }, i);
  }
  if (rest > 0) {
    update([rest](const float *at) { return load_first(at, rest); },
           [rest](float *at, Vec value) { store_first(at, rest, value); }, whole);
  }
}

}  // namespace
