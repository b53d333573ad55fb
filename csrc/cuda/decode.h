// Launches of the kernels of a decoder.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "cuda/decode_plan.h"
#include "precision.h"

namespace tipl::cuda {

// A decode kernel of these precisions for tiles of R rows. Each R is compiled by itself, in decode_*.cu.
using DecodeKernel = void (*)(DecodeArguments);
template <int R>
DecodeKernel decode_kernel(Precision weights, Precision cache);
extern template DecodeKernel decode_kernel<1>(Precision, Precision);
extern template DecodeKernel decode_kernel<kTileRows>(Precision, Precision);

// Runs the persistent kernel in `blocks` blocks that all run at once, each with `shared_bytes` of shared memory.
void launch_decode(const DecodeArguments &arguments, Precision weights, Precision cache, int blocks,
                   size_t shared_bytes, cudaStream_t stream);

// *first <- the least of itself and the place of the first value that is NaN or Inf among the first tokens[b] rows of
// each x[b], x (B, t, k).
void launch_find_not_finite(const float *x, int64_t B, int64_t t, int64_t k, const int64_t *tokens,
                            unsigned long long *first, cudaStream_t stream);

}  // namespace tipl::cuda
