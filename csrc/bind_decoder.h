// What the bindings of the decoders of all devices share.
#pragma once

#include <string>
#include <vector>

#include "bind.h"
#include "decoder_config.h"
#include "precision.h"

namespace tipl {

inline Precision precision_of(const char *name, const std::string &value, bool has_int8) {
  if (value == "float32") return Precision::kFloat32;
  if (value == "bfloat16") return Precision::kBfloat16;
  check(has_int8 && value == "int8", "Decoder: ", name, " must be float32",
        has_int8 ? ", bfloat16 or int8" : " or bfloat16", ", got ", value);
  return Precision::kInt8;
}

// The tensors of a state_dict of NumPy arrays, in the order of tensor_specs.
struct DecoderTensors {
  DecoderTensors(const DecoderConfig &config, const py::dict &weights) {
    const std::vector<TensorSpec> specs = tensor_specs(config);
    for (const TensorSpec &spec : specs) {
      check(weights.contains(spec.name), "Decoder: weights lack '", spec.name, "'");
      const char *name = spec.name.c_str();
      const auto array =
          spec.shape.size() == 2
              ? checked_array<float>("Decoder", name, weights[name], {{"out", spec.shape[0]}, {"in", spec.shape[1]}})
              : checked_array<float>("Decoder", name, weights[name], {{"out", spec.shape[0]}});
      data.push_back(array.data());
      held_.push_back(array);
    }
    check(weights.size() == specs.size(), "Decoder: weights must be ", specs.size(), " tensors, got ", weights.size());
  }

  std::vector<const float *> data;

 private:
  std::vector<py::array_t<float>> held_;  // keeps them alive: another thread may change the dict
};

}  // namespace tipl
