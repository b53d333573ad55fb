// The SIMD kernels of small policies: how they act, and PPO's update. The rules of cpu/isa_kernels.h hold; "padded"
// means rounded up to a multiple of N.
#pragma once

#include <stddef.h>

#include "activation.h"

namespace tipl {

// A matrix, or the transpose of one, that multiply reads element by element.
struct Factor {
  const float *data;
  ptrdiff_t row_stride, k_stride;
};

// The steps of a minibatch as PPO's policy loss reads them, by columns: arrays (stride), but of continuous actions
// (act_dim, stride), readable and finite from `size` up to a multiple of N.
struct PolicyBatch {
  ptrdiff_t act_dim, size, stride;
  const float *action;  // of discrete actions the index
  const float *log_prob, *advantage;
  float clip;
};
// Sums over a minibatch, where r is the ratio of probabilities and a the advantage of a step.
struct PolicyLoss {
  double objective;  // min(r a, clip(r) a)
  double kl;         // (r - 1) - log r
  double clipped;    // 1 where r lies beyond the clip range
  double entropy;    // of discrete actions alone
};

// Adam (arXiv:1412.6980) as torch.optim.Adam computes it.
static constexpr double kBeta1 = 0.9, kBeta2 = 0.999;
struct AdamStep {
  float grad_scale;    // factor on the gradients
  float step_size;     // learning rate / (1 - beta1^t)
  float second_scale;  // 1 / sqrt(1 - beta2^t)
  float eps;
};

struct PolicyKernels {
  int lanes;  // floats in a register, N

  // y (rows) <- w x + bias, with w (rows, k).
  void (*multiply_vector)(const float *w, ptrdiff_t rows, ptrdiff_t k, const float *x, const float *bias,
                          float *y) noexcept;

  // c (rows, columns) <- a b + bias, with a (rows, k), b (k, columns padded), and bias (rows) or null, for zero.
  void (*multiply)(Factor a, ptrdiff_t rows, ptrdiff_t k, const float *b, ptrdiff_t b_stride, const float *bias,
                   ptrdiff_t columns, float *c, ptrdiff_t c_stride) noexcept;

  // y (columns padded, rows padded) <- x^T, of x (rows padded, columns padded).
  void (*transpose_matrix)(const float *x, ptrdiff_t x_stride, ptrdiff_t rows, ptrdiff_t columns, float *y,
                           ptrdiff_t y_stride) noexcept;

  // sums (rows) <- the sum of each row of x (rows, columns padded), padding included.
  void (*sum_rows)(const float *x, ptrdiff_t stride, ptrdiff_t rows, ptrdiff_t columns, float *sums) noexcept;

  // x (n padded) <- activation(x).
  void (*activate)(Activation activation, float *x, ptrdiff_t n) noexcept;
  // dx (n padded) *= the derivative of the activation where its value is y.
  void (*activate_backward)(Activation activation, const float *y, float *dx, ptrdiff_t n) noexcept;

  // Returns PPO's clipped loss of a minibatch for the mean actions `mean` (act_dim, stride) and log_std (act_dim), and
  // writes its gradients by them (0 in the padding).
  PolicyLoss (*gaussian_loss)(const PolicyBatch &batch, const float *mean, const float *log_std,
                              const float *inverse_std, float *mean_grad, float *log_std_grad) noexcept;
  // The same for the logits (act_dim, stride) of discrete actions. The gradient by them is that of the loss less
  // ent_coef times the mean entropy.
  PolicyLoss (*categorical_loss)(const PolicyBatch &batch, float ent_coef, const float *logits,
                                 float *logits_grad) noexcept;

  // The sum of squares of x (n), in float64.
  double (*squared_norm)(const float *x, ptrdiff_t n) noexcept;

  // One step of Adam on n parameters, with their gradients and their first and second moments.
  void (*adam)(const AdamStep &step, float *param, const float *grad, float *first, float *second,
               ptrdiff_t n) noexcept;
};

}  // namespace tipl
