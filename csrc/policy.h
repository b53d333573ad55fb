// How policies act: the mean actions of many small networks, each with weights of its own.
//
// Shapes  N policies, R observations of each; O = obs_dim, A = act_dim. A policy's parameters are one row: log_std (A),
//         then the actor; more may follow.
// Bits    An action depends on its policy's weights, its observation and the instruction set alone: not on what is
//         beside it, on where anything lies in memory, or on threads. Every sum has one order.
#pragma once

#include <cstddef>
#include <vector>

#include "activation.h"
#include "call.h"

namespace tipl {

struct PolicySizes {
  ptrdiff_t obs_dim, act_dim;
  std::vector<ptrdiff_t> hidden;
  Activation activation;
};

// Where the layers of an MLP lie in a row of parameters: of each in order the weight (out, in) and the bias (out), as
// torch.nn.Linear has them.
struct Network {
  struct Layer {
    ptrdiff_t in, out;
    ptrdiff_t weight, bias;  // where they begin
  };
  std::vector<Layer> layers;
  ptrdiff_t end;  // of its parameters
};

// A network of these hidden sizes and `out` outputs, whose parameters begin at `begin`.
Network network(const PolicySizes &sizes, ptrdiff_t begin, ptrdiff_t out);

// Throw std::invalid_argument where a size is less than 1, or more than anybody means.
void check_size(const char *where, const char *name, ptrdiff_t size);
void check_sizes(const char *where, const PolicySizes &sizes);

// out (N, R, A) <- mean actions for obs (N, R, O), with rows of params `stride` floats apart; on the calling thread.
void mean_actions(const PolicySizes &sizes, const float *params, ptrdiff_t stride, ptrdiff_t policies, const float *obs,
                  ptrdiff_t rows, float *out, Poll &poll);

}  // namespace tipl
