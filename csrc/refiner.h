// The refiner: one small network, the same for every weight of a policy, which corrects a forecast of it. Its formulas
// and inputs stand in tipl/forecasting/refiner.py.
//
// Shapes  R runs, m weights of each, J horizons; S signed and U unsigned features, kKinds kinds of weight, kPlace
//         numbers that tell a horizon's place; H = hidden; P parameters, one after the other: the weights of the signed
//         layer (H, S + 1), of the unsigned layer (H, U + kKinds + kPlace), its bias (H), the middle layer (H, H) and
//         (H), the head (H), the linear part (S + 1, kKinds + kPlace) and (S + 1).
// Method  Weights go in blocks whose activations stay in the cache (cpu/refiner_block.h). What does not depend on the
//         horizon is computed once for all of them; the loss and its gradient are one pass over each run.
// Cost    4 H^2 flops for each weight and horizon, and three times that for the gradient.
// Bits    A weight's answers depend on itself alone, and gradients add run by run: same bits for any number of threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "call.h"

namespace tipl {

class ThreadPool;

struct RefinerConfig {
  static constexpr ptrdiff_t kPlace = 3;

  ptrdiff_t hidden, num_signed, num_unsigned, num_kinds;
  float bound;        // the network's signed inputs are clipped to it; the linear part's are not
  float linear_gain;  // factor of the linear part

  ptrdiff_t features() const noexcept { return num_signed + num_unsigned; }
};

// The weights of runs that one call reads: features (R, m, S + U), kinds (R, m) in [0, kKinds).
struct RefinerInputs {
  ptrdiff_t runs, weights, horizons;
  const float *features;
  const int64_t *kinds;
  const float *forecasts;  // (R, J, m), the last signed input
  const float *places;     // (R, J, kPlace)
};

// One call at a time: a second one gets std::runtime_error. Calls ask a Poll, and throw Interrupted.
class Refiner {
 public:
  // Throws std::invalid_argument for sizes that are out of range.
  Refiner(const RefinerConfig &config, ptrdiff_t num_threads);
  ~Refiner();

  const RefinerConfig &config() const noexcept { return config_; }
  ptrdiff_t num_params() const noexcept { return num_params_; }

  // out (R, J, m) <- the answers.
  void answer(const float *param, const RefinerInputs &inputs, float *out, Poll &poll);

  // With one horizon: errors (R) <- |gain answer + offset| over the weights of each run, given gain and offset (R, m);
  // grad (P) <- the gradient of their mean.
  void loss(const float *param, const RefinerInputs &inputs, const float *gain, const float *offset, float *errors,
            float *grad, Poll &poll);

 private:
  void check_inputs(const char *where, const RefinerInputs &inputs) const;

  const RefinerConfig config_;
  const ptrdiff_t num_params_;
  const std::unique_ptr<ThreadPool> pool_;
  InUse in_use_;
};

}  // namespace tipl
