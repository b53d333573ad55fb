// All eigenvalues and eigenvectors of a small symmetric matrix, in float64.
//
// Householder tridiagonalisation, then the implicit QR iteration with Wilkinson's shift: Golub and Van Loan, Matrix
// Computations, 4th edition, algorithms 8.3.1 to 8.3.3. Backward stable: every eigenvalue is off by a few n * eps *
// |A|. Cost  about 9 n^3 flops, on the calling thread: 1 ms at n = 100, tens of ms at n = 300.
#pragma once

#include <cstddef>
#include <vector>

namespace tipl {

struct SymmetricEigen {
  // Of a (n, n), row-major, of which only the lower triangle is read. Values must be finite, below about 1e150.
  SymmetricEigen(const double *a, ptrdiff_t n);

  const double *vector(ptrdiff_t j) const noexcept { return vectors.data() + j * size; }

  ptrdiff_t size;
  std::vector<double> values;   // (n), descending
  std::vector<double> vectors;  // (n, n): row j is the unit eigenvector of values[j]
};

}  // namespace tipl
