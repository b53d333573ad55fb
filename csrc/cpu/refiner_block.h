// The refiner on some weights of one run, forward and back, as one thread does it. Letters as in refiner.h; activations
// by columns, as in cpu/refiner_kernels.h.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/aligned.h"
#include "cpu/policy_kernels.h"
#include "cpu/refiner_kernels.h"
#include "refiner.h"

namespace tipl {

// Where the parameters of each layer begin.
struct RefinerParameters {
  explicit RefinerParameters(const RefinerConfig &config);
  ptrdiff_t odd, even, even_bias, middle, middle_bias, head, linear, linear_bias, end;
};

class RefinerBlock {
 public:
  // For at most `width` weights at a time; without `for_gradient` a block cannot go back.
  RefinerBlock(const RefinerConfig &config, ptrdiff_t width, bool for_gradient);

  // Takes the features (count, S + U) and kinds (count) of some weights.
  void take(const float *param, const float *features, const int64_t *kinds, ptrdiff_t count);

  // out (count) <- the answers for one horizon, given the weights' forecasts (count) and the horizon's place.
  void answer(const float *param, const float *forecast, const float *place, float *out);

  // grad (P) <- the gradient by the parameters, given the one by the last answers.
  void backward(const float *param, const float *danswer, float *grad);

 private:
  // Rows that a transpose reads beyond the last one are there.
  AlignedFloats matrix(ptrdiff_t rows) const { return AlignedFloats({rows + kPad, stride_}); }
  // y (rows, columns) <- w x + bias.
  void multiply(Factor w, ptrdiff_t rows, ptrdiff_t k, const float *x, const float *bias, ptrdiff_t columns,
                float *y) const;
  // grad (rows, x_rows) <- dy x^T, given dy (rows, columns) and x (x_rows, columns).
  void sum_gradient(const float *dy, ptrdiff_t rows, ptrdiff_t columns, const float *x, ptrdiff_t x_rows, float *grad,
                    ptrdiff_t grad_stride);

  static constexpr ptrdiff_t kPad = 16;  // a multiple of every N

  const RefinerConfig config_;
  const RefinerParameters parameters_;
  const ptrdiff_t inputs_, places_;  // S + 1 signed inputs; columns of the linear part's weights
  const ptrdiff_t stride_;
  const PolicyKernels &products_;
  const RefinerKernels &kernels_;
  ptrdiff_t count_ = 0, columns_ = 0;  // taken; padded

  AlignedFloats signed_, clipped_;           // (S + 1, stride), the last row for one horizon
  AlignedFloats unsigned_;                   // (U + kKinds, stride)
  AlignedFloats odd_, even_;                 // (H, stride), without what depends on the horizon
  AlignedFloats slopes_of_linear_;           // (S + 1, stride), likewise
  AlignedFloats hidden_, middle_;            // (H, stride): both signs side by side
  AlignedFloats sum_;                        // (stride), the answers, then the gradient by them
  AlignedFloats hidden_slope_, difference_;  // (H, stride), for the way back
  AlignedFloats dhidden_, deven_, dodd_, dlinear_;
  AlignedFloats by_rows_;  // (stride, widest), of one matrix at a time
  AlignedFloats shift_, gain_;
  float place_[RefinerConfig::kPlace] = {};
};

}  // namespace tipl
