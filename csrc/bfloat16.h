// Rounding of weights to bfloat16.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

namespace tipl {

// The bits of the nearest bfloat16 of a finite value, ties to even; the largest finite one instead of infinity.
inline uint32_t to_bfloat16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value), sign = bits & 0x80000000u, magnitude = bits ^ sign;
  return std::min((magnitude + 0x7fffu + ((magnitude >> 16) & 1u)) >> 16, 0x7f7fu) | sign >> 16;
}

}  // namespace tipl
