// The activation functions of policies. (An enum alone: the SIMD kernels include this too.)
#pragma once

namespace tipl {

enum class Activation { kTanh, kRelu, kElu };

}  // namespace tipl
