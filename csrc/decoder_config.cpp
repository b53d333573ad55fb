#include "decoder_config.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "check.h"

namespace tipl {
namespace {

// Throws where a value of a tensor of this shape is NaN or Inf.
void check_finite(const std::string &name, const float *x, const std::vector<ptrdiff_t> &shape) {
  ptrdiff_t size = 1;
  for (const ptrdiff_t extent : shape) size *= extent;
  const float *bad = std::find_if_not(x, x + size, [](float value) { return std::isfinite(value); });
  if (bad == x + size) return;
  std::string index;
  ptrdiff_t rest = bad - x;
  for (auto extent = shape.rbegin(); extent != shape.rend(); ++extent) {
    index = std::to_string(rest % *extent) + (index.empty() ? "" : ", ") + index;
    rest /= *extent;
  }
  check(false, "Decoder: ", name, " must be finite, got ", *bad, " at (", index, ")");
}

}  // namespace

std::vector<TensorSpec> tensor_specs(const DecoderConfig &config) {
  const ptrdiff_t d = config.d_model, d_ff = config.d_ff, k = config.n_components;
  constexpr int kHighest = 1 << 24, kMostLayers = 1 << 12;
  check(1 <= config.n_layer && config.n_layer <= kMostLayers, "Decoder: n_layer must lie in [1, ", kMostLayers,
        "], got ", config.n_layer);
  for (const auto &[name, size] : {std::pair{"n_components", config.n_components},
                                   {"n_head", config.n_head},
                                   {"d_model", config.d_model},
                                   {"d_ff", config.d_ff},
                                   {"max_len", config.max_len}}) {
    check(1 <= size && size <= kHighest, "Decoder: ", name, " must lie in [1, ", kHighest, "], got ", size);
  }
  check(config.d_model % config.n_head == 0, "Decoder: d_model must be a multiple of n_head = ", config.n_head,
        ", got ", config.d_model);
  check(std::isfinite(config.diff_scale) && std::isfinite(config.out_scale),
        "Decoder: diff_scale and out_scale must be finite, got ", config.diff_scale, " and ", config.out_scale);
  std::vector<TensorSpec> specs;
  const auto linear = [&](const std::string &name, ptrdiff_t in, ptrdiff_t out) {
    specs.push_back({name + ".weight", {out, in}});
    specs.push_back({name + ".bias", {out}});
  };
  const auto layer_norm = [&](const std::string &name) {
    specs.push_back({name + ".weight", {d}});
    specs.push_back({name + ".bias", {d}});
  };
  linear("embed", config.token_width(), d);
  specs.push_back({"pos.weight", {config.max_len, d}});
  for (int i = 0; i < config.n_layer; ++i) {
    const std::string block = text("blocks.", i, ".");
    layer_norm(block + "norm1");
    linear(block + "qkv", d, 3 * d);
    linear(block + "proj", d, d);
    layer_norm(block + "norm2");
    linear(block + "fc1", d, d_ff);
    linear(block + "fc2", d_ff, d);
  }
  layer_norm("norm");
  linear("head", d, k);
  return specs;
}

void check_decoder(const DecoderConfig &config, const std::vector<const float *> &tensors,
                   const DecoderOptions &options, Poll &poll) {
  const std::vector<TensorSpec> specs = tensor_specs(config);
  check(tensors.size() == specs.size(), "Decoder: weights must be ", specs.size(), " tensors, got ", tensors.size());
  for (size_t i = 0; i < specs.size(); ++i) {
    poll(0);
    check_finite(specs[i].name, tensors[i], specs[i].shape);
  }
  constexpr ptrdiff_t kMostSequences = 1 << 24;
  check(1 <= options.batch_size && options.batch_size <= kMostSequences, "Decoder: batch_size must lie in [1, ",
        kMostSequences, "], got ", options.batch_size);
  check(1 <= options.max_len && options.max_len <= config.max_len, "Decoder: max_len must lie in [1, ", config.max_len,
        "], got ", options.max_len);
}

}  // namespace tipl
