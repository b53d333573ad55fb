// The forecaster's tensors, packed for the kernels in use.
#pragma once

#include <cstddef>
#include <vector>

#include "call.h"
#include "cpu/aligned.h"
#include "cpu/packed_linear.h"
#include "decoder_config.h"

namespace tipl {

constexpr double kSharedProducts = 1 << 19;  // a pass of fewer multiplications costs less than the barriers would

// Whether two threads can each take half of a block: half of the heads, and half of the units of the MLP. Only where
// one row is enough work for two, and each half of x ends at its padding.
bool halved(const DecoderConfig &config) noexcept;

// Every constructor takes its tensors from the front of a list in the order of tensor_specs, and advances the list.
struct Weights {
  using Tensors = const float *const *;

  struct Linear {
    // weight (out, in), bias (out). With heads, rows (q | k | v, heads, D) are packed as (heads, q | k | v, D). The
    // inputs may be split into parts, whose results are added: only the first part has the bias, and the parts share
    // the scales of int8 weights.
    struct Layout {
      int heads = 0, part = 0, parts = 1;
    };
    Linear(Tensors &tensors, int in, int out, Precision precision, Poll &poll)
        : Linear(tensors, in, out, precision, {}, poll) {}
    Linear(Tensors &tensors, int in, int out, Precision precision, Layout layout, Poll &poll);
    AlignedWords weight;  // in the layout of PackedLinear
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
    std::vector<Linear> proj;  // (d, d), with its inputs in two halves where halved(config)
    LayerNorm norm2;
    Linear fc1;               // (d_ff, d)
    std::vector<Linear> fc2;  // (d, d_ff), in halves like proj
  };

  // Stores the matrices of the blocks, nearly all there is to read, in `precision`; the rest stays float32. The tensors
  // have passed check_decoder.
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
