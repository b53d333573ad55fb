// Compiled once for each instruction set, with TIPL_ISA_NAME = baseline, avx2, avx512 or avx512bf16 (CMakeLists.txt).
//
// An inline function that this shared with the rest of the module could be the copy that the linker keeps for all of
// it, and crash an older CPU. So everything but the table is in an anonymous namespace, and the files in this folder
// include only each other, the tables of kernels with what those include, and C headers.
#include "cpu/isa_kernels.h"
#include "cpu/simd/attention.h"
#include "cpu/simd/gradient.h"
#include "cpu/simd/linear.h"
#include "cpu/simd/math.h"
#include "cpu/simd/ppo.h"
#include "cpu/simd/refiner.h"
#include "cpu/simd/sketch.h"

#define TIPL_JOIN_(a, b) a##b
#define TIPL_JOIN(a, b) TIPL_JOIN_(a, b)
#define TIPL_TEXT_(a) #a
#define TIPL_TEXT(a) TIPL_TEXT_(a)

namespace tipl {

extern const IsaKernels TIPL_JOIN(kernels_, TIPL_ISA_NAME) = {
    .isa = TIPL_TEXT(TIPL_ISA_NAME),
    .decode =
        {
            .lanes = kLanes,
            .group = kGroupWords,
            .int8_zero = kInt8Zero,
            .linear = linear,
            .layer_norm = layer_norm,
            .append = append,
            .attend = attend,
        },
    .sketch =
        {
            .lanes = kLanes,
            .group = kGroupWords,
            .sketch = sketch,
            .linear = linear,
            .subtract = subtract,
            .update = update,
            .products = products,
            .combine_floats = combine<float>,
            .combine_doubles = combine<double>,
            .sum_squares = sum_squares,
        },
    .policy =
        {
            .lanes = kLanes,
            .multiply_vector = multiply_vector,
            .multiply = multiply,
            .transpose_matrix = transpose_matrix,
            .sum_rows = sum_rows,
            .activate = activate,
            .activate_backward = activate_backward,
            .gaussian_loss = gaussian_loss,
            .categorical_loss = categorical_loss,
            .squared_norm = squared_norm,
            .adam = adam,
        },
    .gradient =
        {
            .normalize = normalize,
            .normalize_backward = normalize_backward,
            .gelu = gelu_columns,
            .gelu_backward = gelu_columns_backward,
            .add_masked = add_masked,
            .multiply_masked = multiply_masked,
            .attend_columns = attend_columns,
            .attend_columns_backward = attend_columns_backward,
            .dot_rows = dot_rows,
        },
    .refiner =
        {
            .gelu_of_input = gelu_of_input,
            .odd_head = odd_head,
            .odd_head_backward = odd_head_backward,
            .input_backward = input_backward,
        },
};

}  // namespace tipl
