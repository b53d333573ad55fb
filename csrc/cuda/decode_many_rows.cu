#include "cuda/decode_kernels.cuh"

template tipl::cuda::DecodeKernel tipl::cuda::decode_kernel<tipl::cuda::kTileRows>(Precision, Precision);
