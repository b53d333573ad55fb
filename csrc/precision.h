// How the numbers of a model or of a cache are stored. (An enum alone: the SIMD kernels include this too.)
#pragma once

namespace tipl {

enum class Precision { kFloat32, kBfloat16, kInt8 };

}  // namespace tipl
