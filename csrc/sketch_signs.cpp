#include "sketch_signs.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "rng.h"
#include "svd.h"

namespace tipl {
namespace {

constexpr ptrdiff_t kNonzeros = 4;      // in each row of Omega: more lowered no error
constexpr ptrdiff_t kTestNonzeros = 2;  // in each row of Omega'

}  // namespace

ptrdiff_t sign_chunks(const SketchConfig &config) noexcept {
  return (config.num_features + kSignColumns - 1) / kSignColumns;
}

Signs draw_signs(const SketchConfig &config, ptrdiff_t chunk) {
  const ptrdiff_t p = config.num_features, l = config.range_size, q = config.test_size, mapped = l + q;
  const ptrdiff_t first = chunk * kSignColumns, columns = std::min(kSignColumns, p - first);
  // Gives every column an entry in one of `size` outputs, and every output as many as any other, or one more: deals the
  // columns, in random order, to the outputs. Calls add(column, output, negative).
  const auto deal = [&](ptrdiff_t stratum, ptrdiff_t size, const auto &add) {
    const auto low = [](uint64_t x) { return static_cast<uint32_t>(x); };
    std::vector<ptrdiff_t> order(columns);
    std::iota(order.begin(), order.end(), 0);
    for (ptrdiff_t i = columns; i-- > 0;) {
      const auto random = philox4x32({low(i), low(chunk), low(static_cast<uint64_t>(chunk) >> 32), low(stratum)},
                                     {low(config.seed), low(config.seed >> 32)});
      std::swap(order[i], order[(uint64_t{random[0]} * static_cast<uint64_t>(i + 1)) >> 32]);  // Fisher and Yates
      // With more outputs than columns: one of the outputs that fall to this column.
      const ptrdiff_t output = (i * size + (columns < size ? random[2] % size : 0)) / columns;
      add(order[i], output, random[1] & 1);
    }
  };
  std::vector<std::vector<uint16_t>> by_output(mapped);
  // Gives every column `strata` entries in the outputs [from, from + width): one in each of as many equal parts.
  const auto fill = [&](ptrdiff_t from, ptrdiff_t width, ptrdiff_t strata, ptrdiff_t tag) {
    for (ptrdiff_t i = 0; i < strata; ++i) {
      const ptrdiff_t part = width * i / strata, size = width * (i + 1) / strata - part;
      deal(tag + i, size, [&](ptrdiff_t column, ptrdiff_t output, uint32_t negative) {
        by_output[from + part + output].push_back(static_cast<uint16_t>(2 * column + negative));
      });
    }
  };
  if (l == p) {
    for (ptrdiff_t c = 0; c < columns; ++c) by_output[first + c].push_back(static_cast<uint16_t>(2 * c));
  } else {
    fill(0, l, std::min(kNonzeros, l), 0);
  }
  fill(l, q, std::min(kTestNonzeros, q), kNonzeros);
  Signs signs{std::vector<uint32_t>(mapped + 1), {}};
  for (ptrdiff_t output = 0; output < mapped; ++output) {
    signs.codes.insert(signs.codes.end(), by_output[output].begin(), by_output[output].end());
    signs.starts[output + 1] = static_cast<uint32_t>(signs.codes.size());
  }
  return signs;
}

}  // namespace tipl
