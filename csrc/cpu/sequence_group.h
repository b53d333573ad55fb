// The forecaster on up to kSequences sequences, forward and back, as one thread does it. Letters as in
// rollout_gradient.h.
//
// All that the way back needs is kept by columns (cpu/gradient_kernels.h), a matrix for each activation. Tokens are
// walked in runs: the given ones all at once, then one prediction at a time; the way back walks them in reverse. In a
// rollout only the last given token predicts anything: of those before it, the last block needs only keys and values.
#pragma once

#include <cstddef>
#include <vector>

#include "call.h"
#include "cpu/aligned.h"
#include "cpu/gradient_kernels.h"
#include "cpu/policy_kernels.h"
#include "decoder_config.h"
#include "rollout_gradient.h"

namespace tipl {

// Where the parameters of each layer begin.
struct Parameters {
  struct Linear {
    ptrdiff_t weight, bias, in, out;
  };
  struct Norm {
    ptrdiff_t weight, bias;
  };
  struct Block {
    Norm norm1;
    Linear qkv, proj;
    Norm norm2;
    Linear fc1, fc2;
  };
  Linear embed;
  ptrdiff_t positions;
  std::vector<Block> blocks;
  Norm norm;
  Linear head;
  ptrdiff_t end;
};

// Throws std::invalid_argument where the sizes make no model.
Parameters parameters_of(const DecoderConfig &config);

class SequenceGroup {
 public:
  SequenceGroup(const DecoderConfig &config, ptrdiff_t num_tokens);

  // Writes the predictions of the sequences from `first` on into out (B, predictions, k).
  void forward(const float *param, const RolloutBatch &batch, ptrdiff_t first, float *out, int rank, Poll &poll);

  // Computes grads(), given dout (B, predictions, k) of all sequences.
  void backward(const float *param, const float *dout, int rank, Poll &poll);

  // The gradient by the parameters (P), summed over the group's sequences.
  const float *grads() const noexcept { return grads_.data(); }

 private:
  struct Tokens {  // from `begin` to `end`
    ptrdiff_t begin, end;
    ptrdiff_t columns() const noexcept { return (end - begin) * kSequences; }
    Tokens from(ptrdiff_t token) const noexcept { return {begin < token ? token : begin, end}; }
  };
  struct Normal {
    AlignedFloats normal, inverse, y, dy;  // dy: the gradient by y
  };
  struct Block {
    Normal norm1;
    AlignedFloats qkv, dqkv;
    AlignedFloats log_sums;  // (H, stride)
    AlignedFloats attended, mask1, dproj;
    Normal norm2;
    AlignedFloats fc1, dfc1, hidden;  // hidden: what fc2 reads
    AlignedFloats mask2, dfc2;
  };

  AlignedFloats matrix(ptrdiff_t rows) const { return AlignedFloats({round_up(rows, kSequences), stride_}); }
  Normal normal(ptrdiff_t rows) const;

  void take_tokens();
  void take_masks();
  void write_token(ptrdiff_t token, const float *x, const float *before);
  void advance(const float *param, Tokens tokens, int rank, Poll &poll);
  void retreat(const float *param, Tokens tokens, int rank, Poll &poll);
  HeadColumns head_columns(Block &block, ptrdiff_t head, ptrdiff_t token);
  void attend(Block &block, Tokens tokens);
  void attend_backward(Block &block, const float *dattended, Tokens tokens);
  void to_token_before(const float *param, ptrdiff_t token);
  void sum_gradients();

  void normalize(const Parameters::Norm &at, const float *param, const float *z, Normal &norm, Tokens tokens) const;
  void normalize_backward(const Parameters::Norm &at, const float *param, const Normal &norm, Tokens tokens);
  void multiply(const Parameters::Linear &at, const float *param, const float *x, float *y, Tokens tokens) const;
  void multiply_backward(const Parameters::Linear &at, const float *param, const float *dy, float *dx,
                         Tokens tokens) const;
  void sum_gradient(const Parameters::Linear &at, const float *dy, const float *x, Tokens tokens);
  void sum_gradient(const Parameters::Norm &at, const Normal &norm, Tokens tokens);

  const DecoderConfig config_;
  const Parameters parameters_;
  const ptrdiff_t stride_;  // of all matrices: columns for all tokens, and some more, so that rows share no cache set
  const PolicyKernels &products_;
  const GradientKernels &kernels_;

  RolloutBatch batch_{};                 // the last; its arrays are gone
  ptrdiff_t first_predicting_ = 0;       // the token that the first prediction follows
  ptrdiff_t first_ = 0, sequences_ = 0;  // of the batch
  AlignedFloats tokens_;                 // (2k + 1, stride), what embed reads
  AlignedFloats z_, dz_;                 // (d, stride), what passes through all blocks
  std::vector<Block> blocks_;
  Normal norm_;
  AlignedFloats predictions_, dpredictions_;  // (k, stride)
  AlignedFloats dhead_;                       // (k, stride)
  AlignedFloats output_;                      // (widest, stride), of one layer at a time
  AlignedFloats weights_, dweights_;          // (num_tokens, kSequences), of one head at a time
  AlignedFloats by_rows_;                     // (stride, widest), of one matrix at a time
  AlignedFloats grads_;                       // (P)
};

}  // namespace tipl
