#include "policy.h"

#include <algorithm>

#include "aligned.h"
#include "check.h"
#include "isa.h"

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

void check_sizes(const char *where, const PolicySizes &sizes) {
  check(sizes.obs_dim >= 1, where, ": obs_dim must be >= 1, got ", sizes.obs_dim);
  check(sizes.act_dim >= 1, where, ": act_dim must be >= 1, got ", sizes.act_dim);
  for (const ptrdiff_t width : sizes.hidden) check(width >= 1, where, ": hidden_sizes must be >= 1, got ", width);
}

void mean_actions(const PolicySizes &sizes, const float *params, ptrdiff_t stride, ptrdiff_t policies, const float *obs,
                  ptrdiff_t rows, float *out) {
  const Kernels &kernel = kernels();
  const Network actor = network(sizes, sizes.act_dim, sizes.act_dim);  // behind log_std
  ptrdiff_t widest = 0;
  for (const ptrdiff_t width : sizes.hidden) widest = std::max(widest, round_up(width, kernel.lanes));
  AlignedFloats hidden({2, widest});  // activations of one observation: of a layer and of the next
  for (ptrdiff_t row = 0; row < policies * rows; ++row) {
    const float *const param = params + row / rows * stride, *x = obs + row * sizes.obs_dim;
    for (size_t i = 0; i < actor.layers.size(); ++i) {
      const Network::Layer &layer = actor.layers[i];
      const bool last = i + 1 == actor.layers.size();
      float *const y = last ? out + row * sizes.act_dim : hidden.data() + i % 2 * widest;
      kernel.multiply_vector(param + layer.weight, layer.out, layer.in, x, param + layer.bias, y);
      if (!last) kernel.activate(sizes.activation, y, layer.out);
      x = y;
    }
  }
}

}  // namespace tipl
