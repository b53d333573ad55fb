// The forecaster's sizes, and its tensors by name.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "call.h"
#include "precision.h"

namespace tipl {

struct DecoderConfig {
  int n_components, n_layer, n_head, d_model, d_ff, max_len;
  float diff_scale, out_scale;

  int head_dim() const noexcept { return d_model / n_head; }
  int token_width() const noexcept { return 2 * n_components + 1; }
  // Multiplications for one row, without those of attention.
  double products() const noexcept {
    return static_cast<double>(d_model) *
           (token_width() + n_components + static_cast<double>(n_layer) * (4.0 * d_model + 2.0 * d_ff));
  }
};

// How a model is run: the precisions of its weights and its cache, the number of sequences and of their tokens, and the
// number of threads of the CPU.
struct DecoderOptions {
  Precision weights, cache;  // the cache is not kInt8
  ptrdiff_t batch_size, max_len, num_threads;
};

// One tensor of the model: its name in the state_dict, and its shape.
struct TensorSpec {
  std::string name;
  std::vector<ptrdiff_t> shape;
};

// The tensors of a model of these sizes, in the order in which the decoder takes them.
// Throws std::invalid_argument where the sizes make no model.
std::vector<TensorSpec> tensor_specs(const DecoderConfig &config);

// What the constructor of a pass checks first: `tensors` are in the order of tensor_specs(config).
// Throws std::invalid_argument for sizes that make no decoder, and for NaN or Inf in a tensor.
void check_decoder(const DecoderConfig &config, const std::vector<const float *> &tensors,
                   const DecoderOptions &options, Poll &poll);

}  // namespace tipl
