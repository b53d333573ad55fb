#include "cpu/isa.h"

#include <algorithm>

#include "check.h"
#include "cpu/isa_kernels.h"

namespace tipl {
namespace {

const IsaKernels *chosen = &kernels_baseline;

// The kernels that this build contains and this CPU can run, worst first.
std::vector<const IsaKernels *> supported_kernels() {
  std::vector<const IsaKernels *> supported = {&kernels_baseline};
#if defined(TIPL_X86)
  __builtin_cpu_init();
  const bool fma = __builtin_cpu_supports("fma");
  if (fma && __builtin_cpu_supports("avx2")) supported.push_back(&kernels_avx2);
  if (fma && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    supported.push_back(&kernels_avx512);
    if (__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni")) {
      supported.push_back(&kernels_avx512bf16);
    }
  }
#endif
  return supported;
}

}  // namespace

std::string choose_isa(const std::optional<std::string> &name, const std::vector<std::string> &supported) {
  check(!supported.empty(), "choose_isa: supported must not be empty");
  if (!name) return supported.back();
  if (std::find(supported.begin(), supported.end(), *name) != supported.end()) return *name;
  std::string list;
  for (const std::string &isa : supported) list += (list.empty() ? "" : ", ") + isa;
  check_state(*name == "baseline" || *name == "avx2" || *name == "avx512" || *name == "avx512bf16",
              "TIPL_ISA must be one of baseline, avx2, avx512, avx512bf16, got '", *name, "'");
  throw std::runtime_error(text("TIPL_ISA: this CPU lacks ", *name, "; it supports ", list));
}

void select_isa(const char *name) {
  const std::vector<const IsaKernels *> candidates = supported_kernels();
  std::vector<std::string> names;
  for (const IsaKernels *candidate : candidates) names.push_back(candidate->isa);
  const std::string isa = choose_isa(name == nullptr ? std::nullopt : std::optional<std::string>(name), names);
  chosen = candidates[std::find(names.begin(), names.end(), isa) - names.begin()];
}

const char *chosen_isa() noexcept { return chosen->isa; }
const DecodeKernels &decode_kernels() noexcept { return chosen->decode; }
const SketchKernels &sketch_kernels() noexcept { return chosen->sketch; }
const PolicyKernels &policy_kernels() noexcept { return chosen->policy; }
const GradientKernels &gradient_kernels() noexcept { return chosen->gradient; }
const RefinerKernels &refiner_kernels() noexcept { return chosen->refiner; }

}  // namespace tipl
