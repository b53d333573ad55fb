#include "cpu/trial_update.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "cpu/isa.h"

namespace tipl {

TrialUpdate::TrialUpdate(const PolicySizes &sizes, const PpoSettings &settings, const Network &actor,
                         const Network &critic)
    : sizes_(sizes),
      settings_(settings),
      actor_(actor),
      critic_(critic),
      kernels_(policy_kernels()),
      stride_(round_up(settings.minibatch_size, kernels_.lanes)) {
  const auto padded = [&](ptrdiff_t n) { return round_up(n, kernels_.lanes); };
  ptrdiff_t widest = std::max(padded(sizes.obs_dim), padded(sizes.act_dim));
  std::vector<ptrdiff_t> widths{sizes.obs_dim};
  widths.insert(widths.end(), sizes.hidden.begin(), sizes.hidden.end());
  for (const ptrdiff_t width : widths) {
    widest = std::max(widest, padded(width));
    rows_.push_back(AlignedFloats({stride_, padded(width)}));
    columns_.push_back(AlignedFloats({padded(width), stride_}));
  }
  out_ = AlignedFloats({padded(sizes.act_dim), stride_});
  for (AlignedFloats &grad : out_grads_) grad = AlignedFloats({widest, stride_});
  actions_ = AlignedFloats({sizes.action_width(), stride_});
  log_probs_ = AlignedFloats({stride_});
  advantages_ = AlignedFloats({stride_});
  inverse_std_ = AlignedFloats({sizes.act_dim});
  grads_ = AlignedFloats({critic.end});
}

// ---- one minibatch through a network

// Sets the inputs of the first layers: the rows of obs (., O) that `rows` names, or the first `count`; zero beyond
// them.
void TrialUpdate::take_observations(const float *obs, const int32_t *rows, ptrdiff_t count) {
  const ptrdiff_t O = sizes_.obs_dim, width = round_up(O, kernels_.lanes);
  float *const to = rows_[0].data();
  for (ptrdiff_t i = 0; i < count; ++i) std::copy_n(obs + (rows == nullptr ? i : rows[i]) * O, O, to + i * width);
  std::fill(to + count * width, to + stride_ * width, 0.0f);
  kernels_.transpose_matrix(to, width, stride_, O, columns_[0].data(), stride_);
}

// Returns the outputs (out, stride) of the last layer.
const float *TrialUpdate::forward(const Network &net, const float *param) {
  for (size_t i = 0; i < net.layers.size(); ++i) {
    const Network::Layer &layer = net.layers[i];
    const bool last = i + 1 == net.layers.size();
    float *const y = last ? out_.data() : columns_[i + 1].data();
    kernels_.multiply({param + layer.weight, layer.in, 1}, layer.out, layer.in, columns_[i].data(), stride_,
                      param + layer.bias, stride_, y, stride_);
    if (!last) kernels_.activate(sizes_.activation, y, layer.out * stride_);
  }
  return out_.data();
}

// Writes the gradient by the network's parameters into grads_, given the one by its outputs in out_grads_[0]; after
// forward() of the same network.
void TrialUpdate::backward(const Network &net, const float *param) {
  float *dy = out_grads_[0].data(), *dx = out_grads_[1].data();
  for (size_t i = net.layers.size(); i-- > 0;) {
    const Network::Layer &layer = net.layers[i];
    const ptrdiff_t width = round_up(layer.in, kernels_.lanes);
    if (i > 0) kernels_.transpose_matrix(columns_[i].data(), stride_, layer.in, stride_, rows_[i].data(), width);
    kernels_.multiply({dy, stride_, 1}, layer.out, stride_, rows_[i].data(), width, nullptr, layer.in,
                      grads_.data() + layer.weight, layer.in);
    kernels_.sum_rows(dy, stride_, layer.out, stride_, grads_.data() + layer.bias);
    if (i == 0) return;
    kernels_.multiply({param + layer.weight, 1, layer.in}, layer.in, layer.out, dy, stride_, nullptr, stride_, dx,
                      stride_);
    kernels_.activate_backward(sizes_.activation, columns_[i].data(), dx, layer.in * stride_);
    std::swap(dy, dx);
  }
}

void TrialUpdate::values(const float *param, const float *obs, ptrdiff_t rows, float *out, int rank, Poll &poll) {
  const ptrdiff_t B = settings_.minibatch_size;
  for (ptrdiff_t first = 0; first < rows; first += B) {
    poll(rank);
    const ptrdiff_t count = std::min(B, rows - first);
    take_observations(obs + first * sizes_.obs_dim, nullptr, count);
    std::copy_n(forward(critic_, param), count, out + first);
  }
}

// ---- the update

// Gathers the steps `rows` (B) of a trial, whose first step is step `first` of all trials.
void TrialUpdate::take_minibatch(const Steps &steps, ptrdiff_t first, const int32_t *rows) {
  const ptrdiff_t W = sizes_.action_width(), B = settings_.minibatch_size;
  take_observations(steps.observations + first * sizes_.obs_dim, rows, B);
  float *const advantage = advantages_.data();
  double mean = 0.0, variance = 0.0;
  for (ptrdiff_t i = 0; i < B; ++i) {
    const ptrdiff_t at = first + rows[i];
    for (ptrdiff_t w = 0; w < W; ++w) actions_.data()[w * stride_ + i] = steps.actions[at * W + w];
    log_probs_.data()[i] = steps.log_probs[at];
    advantage[i] = steps.advantages[at];
    mean += static_cast<double>(steps.advantages[at]) / static_cast<double>(B);
  }
  if (!settings_.normalize_advantage || B == 1) return;
  for (ptrdiff_t i = 0; i < B; ++i) variance += (advantage[i] - mean) * (advantage[i] - mean);
  const double inverse = 1.0 / (std::sqrt(variance / static_cast<double>(B - 1)) + 1e-8);
  for (ptrdiff_t i = 0; i < B; ++i) advantage[i] = static_cast<float>((advantage[i] - mean) * inverse);
}

// Writes the gradient of the minibatch's policy loss by log_std and by the actor into grads_, the entropy's included.
PolicyLoss TrialUpdate::policy_gradient(const float *param) {
  const PolicyBatch batch{.act_dim = sizes_.act_dim,
                          .size = settings_.minibatch_size,
                          .stride = stride_,
                          .action = actions_.data(),
                          .log_prob = log_probs_.data(),
                          .advantage = advantages_.data(),
                          .clip = settings_.clip_coef};
  const float *const outputs = forward(actor_, param);
  const bool is_gaussian = sizes_.distribution == Distribution::kGaussian;
  const PolicyLoss loss = is_gaussian
                              ? gaussian_gradient(batch, outputs, param)
                              : kernels_.categorical_loss(batch, settings_.ent_coef, outputs, out_grads_[0].data());
  backward(actor_, param);
  return loss;
}

// For Gaussians: writes the gradient by log_std into grads_, and that by the means into out_grads_[0].
PolicyLoss TrialUpdate::gaussian_gradient(const PolicyBatch &batch, const float *mean, const float *log_std) {
  float *const log_std_grad = grads_.data(), *const inverse_std = inverse_std_.data();
  for (ptrdiff_t a = 0; a < sizes_.act_dim; ++a) inverse_std[a] = std::exp(-log_std[a]);
  const PolicyLoss loss = kernels_.gaussian_loss(batch, mean, log_std, inverse_std, out_grads_[0].data(), log_std_grad);
  for (ptrdiff_t a = 0; a < sizes_.act_dim; ++a) log_std_grad[a] -= settings_.ent_coef;  // it is a sum of log_std
  return loss;
}

// Writes the gradient of the minibatch's value loss by the critic into grads_; returns the sum of squared errors.
double TrialUpdate::value_gradient(const Steps &steps, ptrdiff_t first, const int32_t *rows, const float *param) {
  const ptrdiff_t B = settings_.minibatch_size;
  const float clip = settings_.clip_coef_vf, scale = 2.0f * settings_.vf_coef / static_cast<float>(B);
  const float *const value = forward(critic_, param);
  float *const grad = out_grads_[0].data();
  double squares = 0.0;
  for (ptrdiff_t i = 0; i < B; ++i) {
    const ptrdiff_t at = first + rows[i];
    const float old = steps.values[at], moved = value[i] - old;
    const bool beyond = moved < -clip || moved > clip;
    const float error = (beyond ? old + std::clamp(moved, -clip, clip) : value[i]) - steps.returns[at];
    grad[i] = beyond ? 0.0f : scale * error;
    squares += static_cast<double>(error) * error;
  }
  std::fill(grad + B, grad + stride_, 0.0f);
  backward(critic_, param);
  return squares;
}

// Lets the optimizer take one step along grads_, whose norm it limits.
void TrialUpdate::take_step(const TrialParams &params, ptrdiff_t trial, double learning_rate) {
  const ptrdiff_t begin = settings_.learn_log_std ? 0 : sizes_.num_log_stds();
  const ptrdiff_t count = critic_.end - begin;  // of the parameters that are learned
  const ptrdiff_t row = trial * params.stride + begin;
  const float *const grad = grads_.data() + begin;
  const double norm = std::sqrt(kernels_.squared_norm(grad, count));
  const double limit = settings_.max_grad_norm / (norm + 1e-6);
  const double scale = limit > 1.0 ? 1.0 : limit;  // NaN stays NaN
  const double t = static_cast<double>(++params.steps[trial]);
  if (settings_.optimizer == Optimizer::kSgd) {
    const auto factor = static_cast<float>(learning_rate * scale);
    for (ptrdiff_t i = 0; i < count; ++i) params.param[row + i] -= factor * grad[i];
    return;
  }
  const AdamStep step{.grad_scale = static_cast<float>(scale),
                      .step_size = static_cast<float>(learning_rate / (1.0 - std::pow(kBeta1, t))),
                      .second_scale = static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(kBeta2, t))),
                      .eps = settings_.adam_eps};
  kernels_.adam(step, params.param + row, grad, params.first + row, params.second + row, count);
}

UpdateStats TrialUpdate::update(const TrialParams &params, const Steps &steps, ptrdiff_t trial, double learning_rate,
                                int rank, Poll &poll) {
  const ptrdiff_t B = settings_.minibatch_size, T = steps.num_steps, first = trial * T;
  const float *const param = params.param + trial * params.stride;
  double objective = 0.0, squares = 0.0, clipped = 0.0, entropy = 0.0, kl = 0.0;
  ptrdiff_t batches = 0, last_batches = 0;  // minibatches of all epochs, and of the last
  bool stopped = false;
  for (ptrdiff_t epoch = 0; epoch < settings_.update_epochs && !stopped; ++epoch) {
    kl = 0.0;
    last_batches = 0;
    for (ptrdiff_t begin = 0; begin < T; begin += B) {
      poll(rank);
      const int32_t *const rows = steps.order + (trial * settings_.update_epochs + epoch) * T + begin;
      take_minibatch(steps, first, rows);
      const PolicyLoss loss = policy_gradient(param);
      objective += loss.objective;
      clipped += loss.clipped;
      entropy += loss.entropy;
      kl += loss.kl;
      squares += value_gradient(steps, first, rows, param);
      ++batches;
      ++last_batches;
      stopped = loss.kl / static_cast<double>(B) > 1.5 * settings_.target_kl;
      if (stopped) break;
      take_step(params, trial, learning_rate);
    }
  }
  const double seen = static_cast<double>(batches * B);
  return {.policy_loss = -objective / seen,
          .value_loss = squares / seen,
          .clipfrac = clipped / seen,
          .approx_kl = kl / static_cast<double>(last_batches * B),
          .entropy = entropy / seen};
}

}  // namespace tipl
