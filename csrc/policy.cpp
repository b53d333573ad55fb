#include "policy.h"

#include <algorithm>
#include <iterator>

#include "check.h"
#include "cpu/aligned.h"
#include "cpu/isa.h"
#include "cpu/policy_kernels.h"

namespace tipl {

Network network(const PolicySizes &sizes, ptrdiff_t begin, ptrdiff_t out) {
  Network net;
  ptrdiff_t in = sizes.obs_dim;
  const auto add = [&](ptrdiff_t width) {
    net.layers.push_back({in, width, begin, begin + in * width});
    begin += (in + 1) * width;
    in = width;
  };
  for (const ptrdiff_t width : sizes.hidden) add(width);
  add(out);
  net.end = begin;
  return net;
}

void check_size(const char *where, const char *name, ptrdiff_t size) {
  constexpr ptrdiff_t kMost = 1 << 24;
  check(size >= 1, where, ": ", name, " must be >= 1, got ", size);
  check(size <= kMost, where, ": ", name, " must be <= ", kMost, ", got ", size);
}

void check_sizes(const char *where, const PolicySizes &sizes) {
  constexpr ptrdiff_t kMostLayers = 1 << 10;
  check_size(where, "obs_dim", sizes.obs_dim);
  check_size(where, "act_dim", sizes.act_dim);
  check(std::ssize(sizes.hidden) <= kMostLayers, where, ": hidden_sizes must be at most ", kMostLayers, ", got ",
        sizes.hidden.size());
  for (const ptrdiff_t width : sizes.hidden) check_size(where, "hidden_sizes", width);
}

void mean_actions(const PolicySizes &sizes, const float *params, ptrdiff_t stride, ptrdiff_t policies, const float *obs,
                  ptrdiff_t rows, float *out, Poll &poll) {
  constexpr ptrdiff_t kRowsBetweenPolls = 64;
  const PolicyKernels &kernels = policy_kernels();
  const Network actor = network(sizes, sizes.num_log_stds(), sizes.act_dim);
  ptrdiff_t widest = 0;
  for (const ptrdiff_t width : sizes.hidden) widest = std::max(widest, round_up(width, kernels.lanes));
  AlignedFloats hidden({2, widest});  // of one observation: activations of a layer and of the next
  for (ptrdiff_t row = 0; row < policies * rows; ++row) {
    if (row % kRowsBetweenPolls == kRowsBetweenPolls - 1) poll(0);
    const float *const param = params + row / rows * stride, *x = obs + row * sizes.obs_dim;
    for (size_t i = 0; i < actor.layers.size(); ++i) {
      const Network::Layer &layer = actor.layers[i];
      const bool last = i + 1 == actor.layers.size();
      float *const y = last ? out + row * sizes.act_dim : hidden.data() + i % 2 * widest;
      kernels.multiply_vector(param + layer.weight, layer.out, layer.in, x, param + layer.bias, y);
      if (!last) kernels.activate(sizes.activation, y, layer.out);
      x = y;
    }
  }
}

}  // namespace tipl
