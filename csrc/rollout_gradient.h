// Rollouts of the forecaster as training needs them: forward with dropout, and back to the gradient by all parameters.
//
// Shapes  B sequences, T tokens of the longest, k = n_components, d = d_model; P parameters, one after the other in the
//         order of tensor_specs.
// Method  Sequences go in groups of kSequences, one group to a thread, with their activations by columns: every
//         product of matrices is then PPO's small kernel (cpu/sequence_group.h). Each prediction is the next token, and
//         the gradient goes back through all of them. The gradients of weights are one product for each matrix, over
//         all tokens at once.
// Cost    6 flops for each parameter and token, and memory for about 29 d n_layer floats for each token, linear in T.
// Bits    The sums over a batch are those of its groups, in order: same bits for any number of threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "call.h"
#include "decoder_config.h"

namespace tipl {

class SequenceGroup;
class ThreadPool;

// What a rollout starts from. With horizon 0 the predictions are those that follow each of the tokens given; with a
// larger one the last of the tokens given is followed by `horizon` predictions, each made from the ones before it.
struct RolloutBatch {
  ptrdiff_t size, tokens, horizon;  // B; tokens given for each sequence
  const float *x;                   // (B, tokens, k)
  const int64_t *prefix_ends;       // (B)
  float dropout;                    // the share of a block's outputs that is dropped, in [0, 1)
  uint64_t seed;                    // of what is dropped

  ptrdiff_t predictions() const noexcept { return horizon == 0 ? tokens : horizon; }
  ptrdiff_t tokens_read() const noexcept { return horizon == 0 ? tokens : tokens + horizon - 1; }
};

// One call at a time: a second one gets std::runtime_error. Calls ask a Poll, and throw Interrupted.
class RolloutGradient {
 public:
  // For batches of at most batch_size sequences of at most num_tokens tokens. Throws std::invalid_argument for sizes
  // that are out of range, std::bad_alloc where the machine lacks the memory.
  RolloutGradient(const DecoderConfig &config, ptrdiff_t batch_size, ptrdiff_t num_tokens, ptrdiff_t num_threads);
  ~RolloutGradient();

  ptrdiff_t num_params() const noexcept { return num_params_; }
  const DecoderConfig &config() const noexcept { return config_; }

  // out (B, predictions, k) <- the predictions with parameters param (P).
  void forward(const float *param, const RolloutBatch &batch, float *out, Poll &poll);

  // grad (P) <- the gradient by the parameters, given dout (size, predictions, k), the one by what the last forward()
  // returned, which had the same parameters. Throws std::runtime_error where there was none.
  void backward(const float *param, const float *dout, ptrdiff_t size, ptrdiff_t predictions, float *grad, Poll &poll);

 private:
  const DecoderConfig config_;
  ptrdiff_t num_params_;
  const ptrdiff_t batch_size_, num_tokens_;
  const std::unique_ptr<ThreadPool> pool_;
  InUse in_use_;
  std::vector<SequenceGroup> groups_;
  ptrdiff_t last_size_ = 0, last_predictions_ = 0;  // of what the last forward() returned; 0 where there was none
};

}  // namespace tipl
