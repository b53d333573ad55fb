// One thread's work in PPO's update: one trial after the other. Letters as in ppo.h.
//
// The parameters and moments of a trial and the activations of a minibatch stay in the L2 cache. Activations are stored
// by columns, (width, B), so that one register holds a number of as many steps as it has lanes, whatever the widths of
// the layers: W x and W^T dy are then the same kernel. dW = dy x^T needs x by rows, and gets it transposed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "call.h"
#include "cpu/aligned.h"
#include "cpu/policy_kernels.h"
#include "policy.h"
#include "ppo.h"

namespace tipl {

class TrialUpdate {
 public:
  TrialUpdate(const PolicySizes &sizes, const PpoSettings &settings, const Network &actor, const Network &critic);

  // out (rows) <- the critic's values of obs (rows, O) under one row of parameters.
  void values(const float *param, const float *obs, ptrdiff_t rows, float *out, int rank, Poll &poll);

  // Takes a trial through the epochs of one iteration. Throws Interrupted, after some of its steps.
  UpdateStats update(const TrialParams &params, const Steps &steps, ptrdiff_t trial, double learning_rate, int rank,
                     Poll &poll);

 private:
  void take_observations(const float *obs, const int32_t *rows, ptrdiff_t count);
  void take_minibatch(const Steps &steps, ptrdiff_t first, const int32_t *rows);
  const float *forward(const Network &net, const float *param);
  void backward(const Network &net, const float *param);
  PolicyLoss policy_gradient(const float *param);
  PolicyLoss gaussian_gradient(const PolicyBatch &batch, const float *mean, const float *log_std);
  double value_gradient(const Steps &steps, ptrdiff_t first, const int32_t *rows, const float *param);
  void take_step(const TrialParams &params, ptrdiff_t trial, double learning_rate);

  const PolicySizes sizes_;
  const PpoSettings settings_;
  const Network actor_, critic_;
  const PolicyKernels &kernels_;
  const ptrdiff_t stride_;  // B padded to whole registers

  // The inputs of each layer, of the actor and the critic in turn: by rows (stride, width padded) and by columns (width
  // padded, stride).
  std::vector<AlignedFloats> rows_, columns_;
  AlignedFloats out_;                     // (A, stride), outputs of the last layer
  AlignedFloats out_grads_[2];            // (width, stride), gradients by the outputs of a layer and by its inputs
  AlignedFloats actions_;                 // (W, stride)
  AlignedFloats log_probs_, advantages_;  // (stride)
  AlignedFloats inverse_std_;             // (A)
  AlignedFloats grads_;                   // (num_params)
};

}  // namespace tipl
