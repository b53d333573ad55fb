#include "cuda/packed_parts.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "bfloat16.h"

namespace tipl::cuda {
namespace {

// A matrix (rows, columns) or a vector (1, columns) of the model.
struct Tensor {
  const float *data;
  ptrdiff_t columns;
  const float *row(ptrdiff_t i) const { return data + i * columns; }
};

// Writes numbers to a place among packed bytes.
class Writer {
 public:
  Writer(unsigned char *to, Precision precision) : to_(to), precision_(precision) {}

  void put(ptrdiff_t at, float value) {
    if (precision_ == Precision::kFloat32) return put_bits(at, std::bit_cast<uint32_t>(value));
    put_bits(at, static_cast<uint16_t>(to_bfloat16(value)));
  }
  void put(ptrdiff_t at, const float *values, ptrdiff_t count) {
    for (ptrdiff_t i = 0; i < count; ++i) put(at + i, values[i]);
  }

 private:
  template <class Bits>
  void put_bits(ptrdiff_t at, Bits bits) {
    std::memcpy(to_ + at * sizeof(Bits), &bits, sizeof(Bits));
  }
  unsigned char *to_;
  const Precision precision_;
};

Writer floats(unsigned char *to) { return {to, Precision::kFloat32}; }

}  // namespace

PackedParts::PackedParts(const std::vector<const float *> &tensors, const DecoderConfig &config, const DecodePlan &plan,
                         Precision precision, Poll &poll) {
  const ptrdiff_t d = plan.d, dp = plan.dp(), D = plan.D, k = plan.k, token = plan.token();
  const HeadWeights head(plan);
  const UnitWeights unit(plan);
  const EndWeights end(plan);
  heads.resize(plan.L * plan.H * head.bytes);
  units.resize(plan.L * plan.U * unit.bytes);
  ends.resize(end.bytes);
  pos.resize(config.max_len * dp);

  auto next = tensors.begin();
  const auto take = [&](ptrdiff_t columns) { return Tensor{*next++, columns}; };
  const Tensor embed = take(token), embed_bias = take(d), positions = take(d);
  floats(ends.data() + end.embed_bias).put(0, embed_bias.data, d);
  for (ptrdiff_t o = 0; o < d; ++o) {
    for (ptrdiff_t i = 0; i < token; ++i) floats(ends.data() + end.embed).put(i * dp + o, embed.row(o)[i]);
  }
  for (ptrdiff_t t = 0; t < config.max_len; ++t) std::copy_n(positions.row(t), d, pos.data() + t * dp);

  for (ptrdiff_t layer = 0; layer < plan.L; ++layer) {
    const Tensor norm1 = take(d), norm1_bias = take(d), qkv = take(d), qkv_bias = take(1), proj = take(d);
    const Tensor proj_bias = take(d), norm2 = take(d), norm2_bias = take(d), fc1 = take(d), fc1_bias = take(1);
    const Tensor fc2 = take(plan.d_ff), fc2_bias = take(d);
    for (ptrdiff_t h = 0; h < plan.H; ++h) {
      poll(0);
      unsigned char *to = heads.data() + (layer * plan.H + h) * head.bytes;
      floats(to + head.norm_weight).put(0, norm1.data, d);
      floats(to + head.norm_bias).put(0, norm1_bias.data, d);
      if (h == 0) floats(to + head.proj_bias).put(0, proj_bias.data, d);
      for (ptrdiff_t out = 0; out < 3 * D; ++out) {
        const ptrdiff_t from = out / D * d + h * D + out % D;  // (3, H, D)
        floats(to + head.qkv_bias).put(out, qkv_bias.row(from), 1);
        Writer(to + head.qkv, precision).put(out * dp, qkv.row(from), d);
      }
      for (ptrdiff_t o = 0; o < d; ++o) {
        for (ptrdiff_t i = 0; i < D; ++i) Writer(to + head.proj, precision).put(i * dp + o, proj.row(o)[h * D + i]);
      }
    }
    for (ptrdiff_t u = 0; u < plan.U; ++u) {
      poll(0);
      unsigned char *to = units.data() + (layer * plan.U + u) * unit.bytes;
      floats(to + unit.norm_weight).put(0, norm2.data, d);
      floats(to + unit.norm_bias).put(0, norm2_bias.data, d);
      if (u == 0) floats(to + unit.fc2_bias).put(0, fc2_bias.data, d);
      const ptrdiff_t first = u * plan.F, count = std::min<ptrdiff_t>(plan.F, plan.d_ff - first);
      for (ptrdiff_t i = 0; i < count; ++i) {
        floats(to + unit.fc1_bias).put(i, fc1_bias.row(first + i), 1);
        Writer(to + unit.fc1, precision).put(i * dp, fc1.row(first + i), d);
        for (ptrdiff_t o = 0; o < d; ++o) Writer(to + unit.fc2, precision).put(i * dp + o, fc2.row(o)[first + i]);
      }
    }
  }
  const Tensor norm = take(d), norm_bias = take(d), out = take(d), out_bias = take(1);
  floats(ends.data() + end.norm_weight).put(0, norm.data, d);
  floats(ends.data() + end.norm_bias).put(0, norm_bias.data, d);
  floats(ends.data() + end.head_bias).put(0, out_bias.data, k);
  for (ptrdiff_t i = 0; i < k; ++i) floats(ends.data() + end.head).put(i * dp, out.row(i), d);
}

}  // namespace tipl::cuda
