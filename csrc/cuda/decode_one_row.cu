#include "cuda/decode_kernels.cuh"

template tipl::cuda::DecodeKernel tipl::cuda::decode_kernel<1>(Precision, Precision);
