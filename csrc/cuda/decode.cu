#include <algorithm>

#include "cuda/decode.h"
#include "cuda/device.h"

namespace tipl::cuda {
namespace {

__global__ void find_not_finite(const float *x, int64_t B, int64_t t, int64_t k, const int64_t *tokens,
                                unsigned long long *first) {
  const int64_t count = B * t * k, stride = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += stride) {
    const int64_t row = i / k;
    if (row % t < tokens[row / t] && !isfinite(x[i])) atomicMin(first, static_cast<unsigned long long>(i));
  }
}

}  // namespace

void launch_decode(const DecodeArguments &arguments, Precision weights, Precision cache, int blocks,
                   size_t shared_bytes, cudaStream_t stream) {
  const DecodeKernel kernel =
      arguments.plan.rows == 1 ? decode_kernel<1>(weights, cache) : decode_kernel<kTileRows>(weights, cache);
  const void *function = reinterpret_cast<const void *>(kernel);
  succeed(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)),
          "cudaFuncSetAttribute(", shared_bytes, " bytes of shared memory)");
  void *parameters[] = {const_cast<DecodeArguments *>(&arguments)};
  succeed(cudaLaunchCooperativeKernel(function, dim3(blocks), dim3(kThreads), parameters, shared_bytes, stream),
          "cudaLaunchCooperativeKernel(decode)");
}

void launch_find_not_finite(const float *x, int64_t B, int64_t t, int64_t k, const int64_t *tokens,
                            unsigned long long *first, cudaStream_t stream) {
  constexpr int64_t kBlock = 256, kMostBlocks = 1024;
  const int64_t blocks = std::min((B * t * k + kBlock - 1) / kBlock, kMostBlocks);
  find_not_finite<<<static_cast<unsigned>(blocks), kBlock, 0, stream>>>(x, B, t, k, tokens, first);
  succeed(cudaGetLastError(), "find_not_finite");
}

}  // namespace tipl::cuda
