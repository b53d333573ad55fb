#include "cpu/weights.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <utility>

#include "bfloat16.h"
#include "cpu/decode_kernels.h"
#include "cpu/isa.h"

namespace tipl {
namespace {

AlignedFloats copied(const float *source, ptrdiff_t size) {
  AlignedFloats copy({size});
  std::copy_n(source, size, copy.data());
  return copy;
}

std::vector<Weights::Linear> in_parts(Weights::Tensors &tensors, int in, int out, Precision precision, int parts,
                                      Poll &poll) {
  std::vector<Weights::Linear> list;
  const Weights::Tensors begin = tensors;
  for (int part = 0; part < parts; ++part) {
    tensors = begin;
    list.emplace_back(tensors, in, out, precision, Weights::Linear::Layout{.part = part, .parts = parts}, poll);
  }
  return list;
}

}  // namespace

bool halved(const DecoderConfig &config) noexcept {
  constexpr int kHalves = 2 * kInputPadding;
  return config.products() >= kSharedProducts && config.n_head % 2 == 0 && config.d_model % kHalves == 0 &&
         config.d_ff % kHalves == 0;
}

Weights::Linear::Linear(Tensors &tensors, int all_inputs, int out, Precision precision, Layout layout, Poll &poll) {
  const float *from_weight = *tensors++, *from_bias = *tensors++;
  const int begin = all_inputs * layout.part / layout.parts, end = all_inputs * (layout.part + 1) / layout.parts;
  const int in = end - begin, D = layout.heads > 0 ? out / (3 * layout.heads) : 0;
  const DecodeKernels &kernels = decode_kernels();
  const int lanes = kernels.lanes, per_word = values_per_word(precision), bits = 32 / per_word;
  const ptrdiff_t padded = round_up(out, lanes), words = words_of(in, precision);
  weight = AlignedWords({padded, words});
  bias = AlignedFloats({padded});
  if (precision == Precision::kInt8) scale = AlignedFloats({padded});
  for (ptrdiff_t row = 0; row < out; ++row) {
    poll(0);
    const ptrdiff_t from_row =
        layout.heads > 0 ? (row / D % 3 * layout.heads + row / (3 * D)) * D + row % D : row;  // (3, H, D) <- (H, 3, D)
    const float *from_all = from_weight + from_row * all_inputs, *from = from_all + begin;
    const auto [first, stride] = packed_output(row, padded, words, kernels.group);
    uint32_t *column = weight.data() + first;
    float step = 0.0f;  // scale of the int8 weights of this row
    if (precision == Precision::kInt8) {
      for (ptrdiff_t i = 0; i < all_inputs; ++i) step = std::max(step, std::fabs(from_all[i]) / 127.0f);
      scale.data()[row] = step;
    }
    for (ptrdiff_t i = 0; i < in; ++i) {
      uint32_t value = std::bit_cast<uint32_t>(from[i]);
      if (precision == Precision::kBfloat16) value = to_bfloat16(from[i]);
      if (precision == Precision::kInt8) {
        const long steps = step > 0 ? std::clamp(std::lrint(from[i] / step), -127L, 127L) : 0;
        value = static_cast<uint8_t>(steps + kernels.int8_zero);
      }
      column[i / per_word * stride] |= value << (i % per_word * bits);
    }
    if (layout.part == 0) bias.data()[row] = from_bias[from_row];
  }
  packed = {precision, weight.data(), scale.data(), bias.data(), in, out};
}

Weights::LayerNorm::LayerNorm(Tensors &tensors, int d) {
  weight = copied(*tensors++, d);
  bias = copied(*tensors++, d);
}

Weights::Block::Block(Tensors &tensors, const DecoderConfig &config, Precision precision, Poll &poll)
    : norm1(tensors, config.d_model),
      qkv(tensors, config.d_model, 3 * config.d_model, precision, {.heads = config.n_head}, poll),
      proj(in_parts(tensors, config.d_model, config.d_model, precision, halved(config) ? 2 : 1, poll)),
      norm2(tensors, config.d_model),
      fc1(tensors, config.d_model, config.d_ff, precision, poll),
      fc2(in_parts(tensors, config.d_ff, config.d_model, precision, halved(config) ? 2 : 1, poll)) {}

Weights::Weights(const std::vector<const float *> &tensors, const DecoderConfig &config, Precision precision,
                 Poll &poll)
    : Weights(tensors.data(), config, precision, poll) {}

Weights::Weights(Tensors tensors, const DecoderConfig &config, Precision precision, Poll &poll)
    : embed(tensors, config.token_width(), config.d_model, Precision::kFloat32, poll),
      pos(copied(*tensors++, ptrdiff_t{config.max_len} * config.d_model)),
      blocks([&] {
        std::vector<Block> list;
        for (int i = 0; i < config.n_layer; ++i) list.emplace_back(tensors, config, precision, poll);
        return list;
      }()),
      norm(tensors, config.d_model),
      head(tensors, config.d_model, config.n_components, Precision::kFloat32, poll) {}

}  // namespace tipl
