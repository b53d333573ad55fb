#include "row_checks.h"

#include <cmath>
#include <numeric>

#include "check.h"

namespace tipl {

void check_row(const char *where, const char *name, const float *row, int64_t i, ptrdiff_t p) {
  const ptrdiff_t j = std::find_if_not(row, row + p, [](float value) { return std::isfinite(value); }) - row;
  check(j == p, where, ": ", name, " must be finite, got ", j < p ? row[j] : 0.0f, " at row ", i, ", column ", j);
}

double total(const std::vector<double> &values) { return std::accumulate(values.begin(), values.end(), 0.0); }

}  // namespace tipl
