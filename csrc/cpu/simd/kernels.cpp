// Compiled once per instruction set, with TIPL_ISA_NAME = baseline, avx2, avx512 or avx512bf16 (CMakeLists.txt).
// Includes only what style allows here: vec.h, kernels*.h and C headers; all but the table is in an anonymous
// namespace.
#include "cpu/kernels.h"

#include "cpu/simd/attention.h"
#include "cpu/simd/linear.h"
#include "cpu/simd/math.h"
#include "cpu/simd/ppo.h"
#include "cpu/simd/sketch.h"

#define TIPL_JOIN_(a, b) a##b
#define TIPL_JOIN(a, b) TIPL_JOIN_(a, b)
#define TIPL_TEXT_(a) #a
#define TIPL_TEXT(a) TIPL_TEXT_(a)

namespace tipl {

extern const Kernels TIPL_JOIN(kernels_, TIPL_ISA_NAME) = {
    .isa = TIPL_TEXT(TIPL_ISA_NAME),
    .lanes = kLanes,
    .group = kGroupWords,
    .linear = linear,
    .layer_norm = layer_norm,
    .append = append,
    .attend = attend,
    .sketch = sketch,
    .update = update,
    .subtract = subtract,
    .products = products,
    .combine_floats = combine<float>,
    .combine_doubles = combine<double>,
    .sum_squares = sum_squares,
    .multiply = multiply,
    .multiply_vector = multiply_vector,
    .transpose_matrix = transpose_matrix,
    .sum_rows = sum_rows,
    .activate = activate,
    .activate_backward = activate_backward,
    .policy_loss = policy_loss,
    .adam = adam,
};

}  // namespace tipl
