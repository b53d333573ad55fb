// Every SIMD kernel for one instruction set: cpu/simd/kernels.cpp is compiled once for each, and fills one of these.
//
// Kernels are noexcept and unchecked, compute on the calling thread, and add in a fixed order: their results depend
// neither on how many rows they get nor on how the work is split. Matrices are row-major float32.
#pragma once

#include "cpu/decode_kernels.h"
#include "cpu/gradient_kernels.h"
#include "cpu/policy_kernels.h"
#include "cpu/refiner_kernels.h"
#include "cpu/sketch_kernels.h"

namespace tipl {

struct IsaKernels {
  const char *isa;  // "baseline", "avx2", "avx512" or "avx512bf16"
  DecodeKernels decode;
  SketchKernels sketch;
  PolicyKernels policy;
  GradientKernels gradient;
  RefinerKernels refiner;
};

extern const IsaKernels kernels_baseline;
#if defined(TIPL_X86)
extern const IsaKernels kernels_avx2;
extern const IsaKernels kernels_avx512;
extern const IsaKernels kernels_avx512bf16;
#endif

}  // namespace tipl
