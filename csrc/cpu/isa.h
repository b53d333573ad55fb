// The instruction set of the kernels: the best that the CPU supports, or the one that TIPL_ISA names. Chosen once, at
// import.
#pragma once

#include <optional>
#include <string>
#include <vector>

namespace tipl {

struct DecodeKernels;
struct SketchKernels;
struct PolicyKernels;
struct GradientKernels;
struct RefinerKernels;

// Returns `name` if it is among `supported` (worst first), or the last of these if there is no name.
// Throws std::runtime_error where the name is unknown, or not supported.
std::string choose_isa(const std::optional<std::string> &name, const std::vector<std::string> &supported);

// Chooses the kernels for TIPL_ISA=name (nullptr: unset) on this CPU. Throws as choose_isa does.
void select_isa(const char *name);

// The name of the instruction set chosen, and its kernels; those of the baseline before select_isa.
const char *chosen_isa() noexcept;
const DecodeKernels &decode_kernels() noexcept;
const SketchKernels &sketch_kernels() noexcept;
const PolicyKernels &policy_kernels() noexcept;
const GradientKernels &gradient_kernels() noexcept;
const RefinerKernels &refiner_kernels() noexcept;

}  // namespace tipl
