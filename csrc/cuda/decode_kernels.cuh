// The kernels of decode_kernel.cuh for one R.
#pragma once

#include "cuda/decode.h"
#include "cuda/decode_kernel.cuh"

namespace tipl::cuda {

template <int R>
DecodeKernel decode_kernel(Precision weights, Precision cache) {
  const bool floats = cache == Precision::kFloat32;
  if (weights == Precision::kFloat32) return floats ? decode<R, float, float> : decode<R, float, Bfloat16>;
  return floats ? decode<R, Bfloat16, float> : decode<R, Bfloat16, Bfloat16>;
}

}  // namespace tipl::cuda
