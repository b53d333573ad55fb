// PPO's update (arXiv:1707.06347, with the details of Stable-Baselines3) of many independent trials with small
// policies.
//
// Shapes  N trials; T steps of each trial in one iteration, B = minibatch_size, E = update_epochs; O = obs_dim,
//         A = act_dim, W = numbers in an action. The parameters of a trial are one row: log_std (L) | actor | critic.
//         L and W are A, but of discrete actions 0 and 1. Both networks are the weight (out, in) and the bias (out) of
//         each layer in order, as in torch.nn.Linear.
// Method  One thread takes one trial through the whole update: cpu/trial_update.h.
// Cost    6 flops for each parameter and step, in each of E epochs. With the sizes of HalfCheetah, two networks of
//         widths 64, a minibatch of 64 took 26 us on a Zen 5 core: 163 GFLOP/s, everything included.
// Bits    The results of a trial depend only on its own row and steps: same bits for any number of trials and threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "call.h"
#include "policy.h"

namespace tipl {

class ThreadPool;
class TrialUpdate;

enum class Optimizer { kAdam, kSgd };

struct PpoSettings {
  ptrdiff_t minibatch_size, update_epochs;
  float clip_coef;
  float clip_coef_vf;  // how far a value may move and still learn; infinity: any distance
  float vf_coef, ent_coef, max_grad_norm;
  Optimizer optimizer;
  float adam_eps;
  bool normalize_advantage;
  double target_kl;    // an update ends where approx_kl exceeds 1.5 times this; infinity: never
  bool learn_log_std;  // of no effect where there is none
};

// The rows of the trials, `stride` floats apart, and Adam's first and second moments in the same layout.
struct TrialParams {
  float *param, *first, *second;
  int64_t *steps;  // (N), steps that the optimizer has taken
  ptrdiff_t trials, stride;
};

// What the trials did in one iteration, in arrays (N, T) unless stated otherwise.
struct Steps {
  const float *observations;  // (N, T, O)
  const float *actions;       // (N, T, W)
  const float *log_probs, *advantages, *returns, *values;
  const int32_t *order;  // (N, E, T), a permutation of the steps for each epoch
  ptrdiff_t num_steps;   // T, a multiple of B
};

struct UpdateStats {
  double policy_loss, value_loss, clipfrac;  // means over all minibatches
  double approx_kl;                          // mean over the minibatches of the last epoch
  double entropy;                            // mean over all minibatches; 0 for Gaussians, where log_std alone gives it
};

// One call at a time: a second one gets std::runtime_error. Calls ask a Poll, and throw Interrupted.
class PpoUpdate {
 public:
  // Actor and critic have the same hidden sizes and share no layer. Throws std::invalid_argument for sizes or settings
  // that are out of range.
  PpoUpdate(PolicySizes sizes, const PpoSettings &settings, int num_threads);
  ~PpoUpdate();

  ptrdiff_t num_params() const noexcept { return critic_.end; }  // of one row; nothing touches what may follow them
  const PolicySizes &sizes() const noexcept { return sizes_; }
  const PpoSettings &settings() const noexcept { return settings_; }

  // out (N, R) <- values of obs (N, R, O).
  void values(const float *params, ptrdiff_t stride, ptrdiff_t trials, const float *obs, ptrdiff_t rows, float *out,
              Poll &poll);

  // Takes every trial through the epochs of one iteration, and writes stats (N). After an interruption each trial has
  // taken some of its steps. Throws std::invalid_argument for steps that do not fit.
  void update(const TrialParams &params, const Steps &steps, double learning_rate, UpdateStats *stats, Poll &poll);

 private:
  const PolicySizes sizes_;
  const PpoSettings settings_;
  const Network actor_, critic_;
  const std::unique_ptr<ThreadPool> pool_;
  InUse in_use_;
  std::vector<TrialUpdate> updates_;  // one for each thread
};

}  // namespace tipl
