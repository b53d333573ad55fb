// How policies act: the outputs of many small networks, each with its own weights.
//
// Shapes  N policies, R observations for each; O = obs_dim, A = act_dim. The parameters of a policy are one row:
//         log_std (L, A of them or none), then the actor; more may follow.
// Bits    An action depends only on the weights of its policy, its observation and the instruction set: not on other
//         policies or observations, on where anything lies in memory, or on threads. Every sum has one order.
#pragma once

#include <cstddef>
#include <vector>

#include "activation.h"
#include "call.h"

namespace tipl {

// What the A outputs of an actor are.
enum class Distribution {
  kGaussian,     // the means of A numbers, whose standard deviations are exp(log_std)
  kCategorical,  // the logits of A discrete actions
};

struct PolicySizes {
  ptrdiff_t obs_dim, act_dim;
  std::vector<ptrdiff_t> hidden;
  Activation activation;
  Distribution distribution = Distribution::kGaussian;

  ptrdiff_t num_log_stds() const noexcept { return distribution == Distribution::kGaussian ? act_dim : 0; }  // L
  // Numbers in one action, W: A, or the index of a discrete action.
  ptrdiff_t action_width() const noexcept { return distribution == Distribution::kGaussian ? act_dim : 1; }
};

// Where the layers of an MLP lie in a row of parameters: for each layer in order the weight (out, in) and the bias
// (out), as in torch.nn.Linear.
struct Network {
  struct Layer {
    ptrdiff_t in, out;
    ptrdiff_t weight, bias;  // offsets
  };
  std::vector<Layer> layers;
  ptrdiff_t end;  // offset behind its parameters
};

// The network with these hidden sizes and `out` outputs, whose parameters begin at offset `begin`.
Network network(const PolicySizes &sizes, ptrdiff_t begin, ptrdiff_t out);

// Throw std::invalid_argument where a size is less than 1 or absurdly large.
void check_size(const char *where, const char *name, ptrdiff_t size);
void check_sizes(const char *where, const PolicySizes &sizes);

// out (N, R, A) <- the actors' outputs for obs (N, R, O), mean actions or logits, on the calling thread. Rows of params
// lie `stride` floats apart.
void mean_actions(const PolicySizes &sizes, const float *params, ptrdiff_t stride, ptrdiff_t policies, const float *obs,
                  ptrdiff_t rows, float *out, Poll &poll);

}  // namespace tipl
