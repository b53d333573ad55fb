// The forecaster's tensors, packed for the parts of a DecodePlan.
#pragma once

#include <vector>

#include "call.h"
#include "cuda/decode_plan.h"
#include "decoder_config.h"
#include "precision.h"

namespace tipl::cuda {

struct PackedParts {
  // `tensors` have passed check_decoder. The matrices of the blocks are stored in `precision`, float32 or bfloat16.
  PackedParts(const std::vector<const float *> &tensors, const DecoderConfig &config, const DecodePlan &plan,
              Precision precision, Poll &poll);

  std::vector<unsigned char> heads;  // (L, H) HeadWeights
  std::vector<unsigned char> units;  // (L, U) UnitWeights
  std::vector<unsigned char> ends;   // EndWeights
  std::vector<float> pos;            // (max_len, dp)
};

}  // namespace tipl::cuda
