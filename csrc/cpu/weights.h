// The forecaster's sizes, its tensors by name, and the same tensors packed for the kernels in use.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "call.h"
#include "cpu/aligned.h"
#include "cpu/packed_linear.h"

namespace tipl {

// Throws std::invalid_argument where one of x's values, of the given shape, is NaN or Inf.
void check_finite(const char *where, const std::string &name, const float *x, const std::vector<ptrdiff_t> &shape);

constexpr double kSharedProducts = 1 << 19;  // a pass of fewer multiplications costs less than the barriers would

struct DecoderConfig {
  int n_components, n_layer, n_head, d_model, d_ff, max_len;
  float diff_scale, out_scale;

  int head_dim() const noexcept { return d_model / n_head; }
  int token_width() const noexcept { return 2 * n_components + 1; }
  // Multiplications of one row, without attention's.
  double products() const noexcept {
    return static_cast<double>(d_model) *
           (token_width() + n_components + static_cast<double>(n_layer) * (4.0 * d_model + 2.0 * d_ff));
  }
  // Whether two threads can each take half of a block: half of the heads, and half of the MLP's units. Only where one
  // row is work enough for two, and each half of x ends at its padding.
  bool halved() const noexcept {
    constexpr int kHalves = 2 * kInputPadding;
    return products() >= kSharedProducts && n_head % 2 == 0 && d_model % kHalves == 0 && d_ff % kHalves == 0;
  }
};

// One tensor of the model: its name in the state_dict, and its shape.
struct TensorSpec {
  std::string name;
  std::vector<ptrdiff_t> shape;
};

// The tensors of a model of these sizes, in the order in which Weights takes them.
// Throws std::invalid_argument where the sizes make no model.
std::vector<TensorSpec> tensor_specs(const DecoderConfig &config);

// Every constructor takes its tensors from the front of a list in tensor_specs' order, and moves the list on.
struct Weights {
  using Tensors = const float *const *;

  struct Linear {
    // weight (out, in), bias (out). With heads, rows (q | k | v, heads, D) are packed as (heads, q | k | v, D). The
    // inputs may be split into parts, whose results add up: the bias is the first one's, and int8's scales are common.
    struct Layout {
      int heads = 0, part = 0, parts = 1;
    };
    Linear(Tensors &tensors, int in, int out, Precision precision, Poll &poll)
        : Linear(tensors, in, out, precision, {}, poll) {}
    Linear(Tensors &tensors, int in, int out, Precision precision, Layout layout, Poll &poll);
    AlignedWords weight;  // as PackedLinear wants them
    AlignedFloats scale, bias;
    PackedLinear packed;
  };
  struct LayerNorm {
    LayerNorm(Tensors &tensors, int d);
    AlignedFloats weight, bias;  // (d) each
  };
  struct Block {
    Block(Tensors &tensors, const DecoderConfig &config, Precision precision, Poll &poll);
    LayerNorm norm1;
    Linear qkv;                // (H, q | k | v, D; d)
    std::vector<Linear> proj;  // (d, d), its inputs in two halves where config.halved()
    LayerNorm norm2;
    Linear fc1;               // (d_ff, d)
    std::vector<Linear> fc2;  // (d, d_ff), in halves as proj
  };

  // The blocks' matrices are stored in `precision`, nearly all there is to read; the rest stays float32.
  // Throws std::invalid_argument for wrong sizes and for NaN or Inf in a tensor.
  Weights(const std::vector<const float *> &tensors, const DecoderConfig &config, Precision precision, Poll &poll);

  Linear embed;               // (d, 2k + 1)
  AlignedFloats pos;          // (max_len, d)
  std::vector<Block> blocks;  // L
  LayerNorm norm;
  Linear head;  // (k, d)

 private:
  Weights(Tensors tensors, const DecoderConfig &config, Precision precision, Poll &poll);
};

}  // namespace tipl
