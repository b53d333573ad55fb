#include "ppo.h"

#include <algorithm>
#include <cmath>

#include "check.h"
#include "cpu/parallel.h"
#include "cpu/trial_update.h"

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

// Throws std::invalid_argument unless each of `count` discrete actions is the index of one of `n`.
void check_indices(const float *actions, ptrdiff_t count, ptrdiff_t n) {
  const auto is_index = [n](float action) {  // false for NaN
    return action >= 0.0f && action < static_cast<float>(n) && action == std::floor(action);
  };
  const float *const end = actions + count, *const bad = std::find_if_not(actions, end, is_index);
  check(bad == end, "update: actions must be whole numbers in [0, ", n, "), got ", bad == end ? 0.0f : *bad);
}

}  // namespace

PpoUpdate::PpoUpdate(PolicySizes sizes, const PpoSettings &settings, int num_threads)
    : sizes_(checked(sizes)),
      settings_(checked(settings)),
      actor_(network(sizes_, sizes_.num_log_stds(), sizes_.act_dim)),
      critic_(network(sizes_, actor_.end, 1)),
      pool_(std::make_unique<ThreadPool>(num_threads)) {
  updates_.reserve(pool_->size());
  for (int rank = 0; rank < pool_->size(); ++rank) updates_.emplace_back(sizes_, settings_, actor_, critic_);
}

PpoUpdate::~PpoUpdate() = default;

void PpoUpdate::values(const float *params, ptrdiff_t stride, ptrdiff_t trials, const float *obs, ptrdiff_t rows,
                       float *out, Poll &poll) {
  const InUse::Hold hold(in_use_, "values", kObject);
  for_each_item(*pool_, poll, trials, [&](int rank, ptrdiff_t trial) {
    updates_[rank].values(params + trial * stride, obs + trial * rows * sizes_.obs_dim, rows, out + trial * rows, rank,
                          poll);
  });
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
  if (sizes_.distribution == Distribution::kCategorical) {
    check_indices(steps.actions, params.trials * T, sizes_.act_dim);
  }
  for_each_item(*pool_, poll, params.trials, [&](int rank, ptrdiff_t trial) {
    stats[trial] = updates_[rank].update(params, steps, trial, learning_rate, rank, poll);
  });
}

}  // namespace tipl
