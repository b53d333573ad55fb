// The random signs of a sketch's map: a sparse Omega, or the identity where l = p, and Omega'. Letters as in svd.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace tipl {

struct SketchConfig;

constexpr ptrdiff_t kSignColumns = 256;  // whose signs are drawn together

// The signs of at most kSignColumns columns. The entries of output j are codes[starts[j]] ... codes[starts[j + 1] - 1],
// each 2 * column for +1 or 2 * column + 1 for -1.
struct Signs {
  std::vector<uint32_t> starts;  // (l + q + 1)
  std::vector<uint16_t> codes;
};

// How many times kSignColumns columns there are.
ptrdiff_t sign_chunks(const SketchConfig &config) noexcept;

// The signs of the columns from chunk * kSignColumns on: the same on every device.
Signs draw_signs(const SketchConfig &config, ptrdiff_t chunk);

}  // namespace tipl
