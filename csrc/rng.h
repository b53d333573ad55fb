// Counter-based random numbers: Philox4x32-10 (Salmon et al. 2011, doi:10.1145/2063384.2063405).
//
// Pure functions of (seed, stream, index), without a state: the same values on any thread and in any order.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <numbers>

namespace tipl {

// Four uniform 32-bit words for one counter under one key, as in Random123's philox4x32.
constexpr std::array<uint32_t, 4> philox4x32(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) noexcept {
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53} * counter[0];
    const uint64_t product1 = uint64_t{0xCD9E8D57} * counter[2];
    counter = {static_cast<uint32_t>(product1 >> 32) ^ counter[1] ^ key[0], static_cast<uint32_t>(product1),
               static_cast<uint32_t>(product0 >> 32) ^ counter[3] ^ key[1], static_cast<uint32_t>(product0)};
    key = {key[0] + 0x9E3779B9, key[1] + 0xBB67AE85};
  }
  return counter;
}

// Block `index` of a stream of standard normal numbers: numbers 4 * index to 4 * index + 3 (Box-Muller, on two pairs of
// words).
inline std::array<float, 4> normal4(uint64_t seed, uint64_t stream, uint64_t index) noexcept {
  const auto low = [](uint64_t x) { return static_cast<uint32_t>(x); };
  const auto high = [](uint64_t x) { return static_cast<uint32_t>(x >> 32); };
  const auto words = philox4x32({low(index), high(index), low(stream), high(stream)}, {low(seed), high(seed)});
  std::array<float, 4> values;
  for (int pair = 0; pair < 2; ++pair) {
    const double u = (words[2 * pair] + 0.5) * 0x1p-32;  // in (0, 1): its logarithm is finite
    const double v = words[2 * pair + 1] * 0x1p-32;
    const double radius = std::sqrt(-2.0 * std::log(u)), angle = 2.0 * std::numbers::pi * v;
    values[2 * pair] = static_cast<float>(radius * std::cos(angle));
    values[2 * pair + 1] = static_cast<float>(radius * std::sin(angle));
  }
  return values;
}

}  // namespace tipl
