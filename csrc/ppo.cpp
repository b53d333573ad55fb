#include "ppo.h"

#include <algorithm>
#include <cmath>

#include "check.h"
#include "cpu/isa.h"

namespace tipl {
namespace {

constexpr char kObject[] = "the update";

const PolicySizes &checked(const PolicySizes &sizes) {
  check_sizes("PpoUpdate", sizes);
  return sizes;
}

const PpoSettings &checked(const PpoSettings &settings) {
  check_size("PpoUpdate", "minibatch_size", settings.minibatch_size);
  check_size("PpoUpdate", "update_epochs", settings.update_epochs);
  return settings;
}

}  // namespace

struct PpoUpdate::Workspace {
  Workspace(const PolicySizes &sizes, ptrdiff_t num_params, ptrdiff_t stride, ptrdiff_t lanes) {
    const auto padded = [lanes](ptrdiff_t n) { return round_up(n, lanes); };
    ptrdiff_t widest = std::max(padded(sizes.obs_dim), padded(sizes.act_dim));
    std::vector<ptrdiff_t> widths{sizes.obs_dim};
    widths.insert(widths.end(), sizes.hidden.begin(), sizes.hidden.end());
    for (const ptrdiff_t width : widths) {
      widest = std::max(widest, padded(width));
      rows.push_back(AlignedFloats({stride, padded(width)}));
      columns.push_back(AlignedFloats({padded(width), stride}));
    }
    out = AlignedFloats({padded(sizes.act_dim), stride});
    for (AlignedFloats &grad : out_grads) grad = AlignedFloats({widest, stride});
    actions = AlignedFloats({sizes.act_dim, stride});
    log_probs = AlignedFloats({stride});
    advantages = AlignedFloats({stride});
    inverse_std = AlignedFloats({sizes.act_dim});
    grads = AlignedFloats({num_params});
  }

  // The inputs of each layer, of actor and critic in turn: by rows (stride, width padded), by columns (width padded,
  // stride).
  std::vector<AlignedFloats> rows, columns;
  AlignedFloats out;           // (A, stride), of the last layer
  AlignedFloats out_grads[2];  // (width, stride), of a layer's outputs and of its inputs
  AlignedFloats actions, log_probs, advantages, inverse_std;
  AlignedFloats grads;  // (num_params)
};

PpoUpdate::PpoUpdate(PolicySizes sizes, const PpoSettings &settings, int num_threads)
    : sizes_(checked(sizes)),
      settings_(checked(settings)),
      kernels_(policy_kernels()),
      actor_(network(sizes_, sizes_.act_dim, sizes_.act_dim)),
      critic_(network(sizes_, actor_.end, 1)),
      stride_(round_up(settings.minibatch_size, kernels_.lanes)),
      pool_(num_threads) {
  for (int rank = 0; rank < pool_.size(); ++rank) {
    work_.emplace_back(sizes_, critic_.end, stride_, kernels_.lanes);
  }
}

PpoUpdate::~PpoUpdate() = default;

// ---- forward and backward, of one minibatch

// The inputs of the first layers: rows of obs (., O), those in `rows` or the first `count`. Zero beyond them.
void PpoUpdate::take_observations(Workspace &work, const float *obs, const int32_t *rows, ptrdiff_t count) const {
  const ptrdiff_t O = sizes_.obs_dim, width = round_up(O, kernels_.lanes);
  float *const to = work.rows[0].data();
  for (ptrdiff_t i = 0; i < count; ++i) std::copy_n(obs + (rows == nullptr ? i : rows[i]) * O, O, to + i * width);
  std::fill(to + count * width, to + stride_ * width, 0.0f);
  kernels_.transpose_matrix(to, width, stride_, O, work.columns[0].data(), stride_);
}

// The last layer's outputs (out, stride).
const float *PpoUpdate::forward(const Network &net, const float *params, Workspace &work) const {
  for (size_t i = 0; i < net.layers.size(); ++i) {
    const Network::Layer &layer = net.layers[i];
    const bool last = i + 1 == net.layers.size();
    float *const y = last ? work.out.data() : work.columns[i + 1].data();
    kernels_.multiply({params + layer.weight, layer.in, 1}, layer.out, layer.in, work.columns[i].data(), stride_,
                      params + layer.bias, stride_, y, stride_);
    if (!last) kernels_.activate(sizes_.activation, y, layer.out * stride_);
  }
  return work.out.data();
}

// Writes the gradient by the network's parameters into work.grads, given that by its outputs in out_grads[0]; after
// forward() of the same network.
void PpoUpdate::backward(const Network &net, const float *params, Workspace &work) const {
  float *dy = work.out_grads[0].data(), *dx = work.out_grads[1].data();
  for (size_t i = net.layers.size(); i-- > 0;) {
    const Network::Layer &layer = net.layers[i];
    const ptrdiff_t width = round_up(layer.in, kernels_.lanes);
    if (i > 0) {
      kernels_.transpose_matrix(work.columns[i].data(), stride_, layer.in, stride_, work.rows[i].data(), width);
    }
    kernels_.multiply({dy, stride_, 1}, layer.out, stride_, work.rows[i].data(), width, nullptr, layer.in,
                      work.grads.data() + layer.weight, layer.in);
    kernels_.sum_rows(dy, stride_, layer.out, stride_, work.grads.data() + layer.bias);
    if (i == 0) return;
    kernels_.multiply({params + layer.weight, 1, layer.in}, layer.in, layer.out, dy, stride_, nullptr, stride_, dx,
                      stride_);
    kernels_.activate_backward(sizes_.activation, work.columns[i].data(), dx, layer.in * stride_);
    std::swap(dy, dx);
  }
}

void PpoUpdate::values(const float *params, ptrdiff_t stride, ptrdiff_t trials, const float *obs, ptrdiff_t rows,
                       float *out, Poll &poll) {
  const InUse::Hold hold(in_use_, "values", kObject);
  const ptrdiff_t B = settings_.minibatch_size;
  for_each_item(pool_, poll, trials, [&](int rank, ptrdiff_t trial) {
    Workspace &work = work_[rank];
    for (ptrdiff_t first = 0; first < rows; first += B) {
      poll(rank);
      const ptrdiff_t count = std::min(B, rows - first);
      take_observations(work, obs + (trial * rows + first) * sizes_.obs_dim, nullptr, count);
      std::copy_n(forward(critic_, params + trial * stride, work), count, out + trial * rows + first);
    }
  });
}

// ---- the update

// The gradient of the value loss by the values, into out_grads[0]; returns the sum of squared errors.
double PpoUpdate::take_values(const Steps &steps, ptrdiff_t first, const int32_t *rows, const float *value,
                              Workspace &work) const {
  const ptrdiff_t B = settings_.minibatch_size;
  const float clip = settings_.clip_coef_vf, scale = 2.0f * settings_.vf_coef / static_cast<float>(B);
  float *const grad = work.out_grads[0].data();
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
  return squares;
}

void PpoUpdate::update_trial(const TrialParams &params, const Steps &steps, ptrdiff_t trial, double learning_rate,
                             Workspace &work, UpdateStats &stats, int rank, Poll &poll) const {
  const ptrdiff_t A = sizes_.act_dim, B = settings_.minibatch_size, T = steps.num_steps, P = num_params();
  const ptrdiff_t row = trial * params.stride, first = trial * T;
  const ptrdiff_t learned = settings_.learn_log_std ? 0 : A;  // where the parameters that are learned begin
  float *const param = params.param + row;
  double objective = 0.0, squares = 0.0, clipped = 0.0, kl = 0.0;
  ptrdiff_t batches = 0, last_batches = 0;
  bool stopped = false;
  for (ptrdiff_t epoch = 0; epoch < settings_.update_epochs && !stopped; ++epoch) {
    kl = 0.0;
    last_batches = 0;
    for (ptrdiff_t begin = 0; begin < T && !stopped; begin += B) {
      poll(rank);
      const int32_t *const rows = steps.order + (trial * settings_.update_epochs + epoch) * T + begin;
      take_observations(work, steps.observations + first * sizes_.obs_dim, rows, B);
      double mean = 0.0, variance = 0.0;
      for (ptrdiff_t i = 0; i < B; ++i) {
        const ptrdiff_t at = first + rows[i];
        for (ptrdiff_t a = 0; a < A; ++a) work.actions.data()[a * stride_ + i] = steps.actions[at * A + a];
        work.log_probs.data()[i] = steps.log_probs[at];
        work.advantages.data()[i] = steps.advantages[at];
        mean += static_cast<double>(steps.advantages[at]) / static_cast<double>(B);
      }
      if (settings_.normalize_advantage && B > 1) {
        float *const advantage = work.advantages.data();
        for (ptrdiff_t i = 0; i < B; ++i) variance += (advantage[i] - mean) * (advantage[i] - mean);
        const double inverse = 1.0 / (std::sqrt(variance / static_cast<double>(B - 1)) + 1e-8);
        for (ptrdiff_t i = 0; i < B; ++i) advantage[i] = static_cast<float>((advantage[i] - mean) * inverse);
      }
      for (ptrdiff_t a = 0; a < A; ++a) work.inverse_std.data()[a] = std::exp(-param[a]);
      const PolicyBatch batch{A,
                              B,
                              stride_,
                              work.actions.data(),
                              work.log_probs.data(),
                              work.advantages.data(),
                              param,
                              work.inverse_std.data(),
                              settings_.clip_coef};
      const PolicyLoss loss =
          kernels_.policy_loss(batch, forward(actor_, param, work), work.out_grads[0].data(), work.grads.data());
      objective += loss.objective;
      clipped += loss.clipped;
      kl += loss.kl;
      for (ptrdiff_t a = 0; a < A; ++a) work.grads.data()[a] -= settings_.ent_coef;
      backward(actor_, param, work);
      squares += take_values(steps, first, rows, forward(critic_, param, work), work);
      backward(critic_, param, work);
      ++batches;
      ++last_batches;
      stopped = loss.kl / static_cast<double>(B) > 1.5 * settings_.target_kl;
      if (stopped) break;
      const float *const grad = work.grads.data();
      const double norm = std::sqrt(kernels_.squared_norm(grad + learned, P - learned));
      const double limit = settings_.max_grad_norm / (norm + 1e-6);
      const double scale = limit > 1.0 ? 1.0 : limit;  // NaN stays NaN
      const double t = static_cast<double>(++params.steps[trial]);
      if (settings_.optimizer == Optimizer::kSgd) {
        const auto factor = static_cast<float>(learning_rate * scale);
        for (ptrdiff_t i = learned; i < P; ++i) param[i] -= factor * grad[i];
      } else {
        const AdamStep step{static_cast<float>(scale), static_cast<float>(learning_rate / (1.0 - std::pow(kBeta1, t))),
                            static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(kBeta2, t))), settings_.adam_eps};
        kernels_.adam(step, param + learned, grad + learned, params.first + row + learned,
                      params.second + row + learned, P - learned);
      }
    }
  }
  const double seen = static_cast<double>(batches * B);
  stats = {-objective / seen, squares / seen, clipped / seen, kl / static_cast<double>(last_batches * B)};
}

void PpoUpdate::update(const TrialParams &params, const Steps &steps, double learning_rate, UpdateStats *stats,
                       Poll &poll) {
  const InUse::Hold hold(in_use_, "update", kObject);
  const ptrdiff_t T = steps.num_steps, B = settings_.minibatch_size;
  check(T >= B && T % B == 0, "update: there must be a multiple of minibatch_size = ", B, " steps, got ", T);
  check(params.stride >= num_params(), "update: a trial must have at least ", num_params(), " parameters, got ",
        params.stride);
  const ptrdiff_t orders = params.trials * settings_.update_epochs * T;
  const auto outside = [T](int32_t step) { return step < 0 || step >= T; };
  const int32_t *const bad = std::find_if(steps.order, steps.order + orders, outside);
  check(bad == steps.order + orders, "update: order must hold steps in [0, ", T, "), got ",
        bad == steps.order + orders ? 0 : *bad);
  for_each_item(pool_, poll, params.trials, [&](int rank, ptrdiff_t trial) {
    update_trial(params, steps, trial, learning_rate, work_[rank], stats[trial], rank, poll);
  });
}

}  // namespace tipl
