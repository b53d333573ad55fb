#include "symmetric_eigen.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "check.h"

namespace tipl {
namespace {

constexpr double kEps = std::numeric_limits<double>::epsilon();
constexpr ptrdiff_t kMaxSweeps = 60;  // QR steps an eigenvalue; two are usual

// T = Q^T A Q with T tridiagonal: its diagonal d (n), its other diagonal e (n - 1). Q^T ends up in a (n, n).
// Every step is a sum of rows, not a dot product: the compiler can vectorise it without reordering a sum.
void tridiagonalise(double *a, ptrdiff_t n, double *d, double *e) {
  std::vector<double> reflectors(n * n);  // row k: the unit v of H_k = I - 2 v v^T, zero up to column k
  std::vector<double> w(n);
  for (ptrdiff_t k = 0; k + 1 < n; ++k) {
    double *v = reflectors.data() + k * n;
    const double *row = a + k * n;  // equal to column k
    d[k] = row[k];
    double squares = 0.0;
    for (ptrdiff_t j = k + 1; j < n; ++j) squares += row[j] * row[j];
    const double norm = std::sqrt(squares);
    e[k] = row[k + 1] > 0.0 ? -norm : norm;  // the sign that does not cancel in v
    const double head = row[k + 1] - e[k];
    const double length = std::sqrt(squares - row[k + 1] * row[k + 1] + head * head);
    if (length == 0.0) continue;  // nothing to reflect: v = 0, H = I
    v[k + 1] = head / length;
    for (ptrdiff_t j = k + 2; j < n; ++j) v[j] = row[j] / length;

    // A <- H A H = A - v w^T - w v^T over rows and columns k+1 ..., where w = 2 (A v - (v^T A v) v).
    std::fill(w.begin(), w.end(), 0.0);
    for (ptrdiff_t i = k + 1; i < n; ++i) {
      for (ptrdiff_t j = k + 1; j < n; ++j) w[j] += v[i] * a[i * n + j];
    }
    const double curvature = std::inner_product(v + k + 1, v + n, w.data() + k + 1, 0.0);
    for (ptrdiff_t j = k + 1; j < n; ++j) w[j] = 2.0 * (w[j] - curvature * v[j]);
    for (ptrdiff_t i = k + 1; i < n; ++i) {
      for (ptrdiff_t j = k + 1; j < n; ++j) a[i * n + j] -= v[i] * w[j] + w[i] * v[j];
    }
  }
  d[n - 1] = a[n * n - 1];

  // Q^T = ... H_1 H_0, multiplied from the right by the last reflector first: the untouched rows stay short.
  std::fill(a, a + n * n, 0.0);
  for (ptrdiff_t i = 0; i < n; ++i) a[i * n + i] = 1.0;
  for (ptrdiff_t k = n - 2; k >= 0; --k) {
    const double *v = reflectors.data() + k * n;
    for (ptrdiff_t i = k + 1; i < n; ++i) {
      double *row = a + i * n;
      const double twice = 2.0 * std::inner_product(v + k + 1, v + n, row + k + 1, 0.0);
      for (ptrdiff_t j = k + 1; j < n; ++j) row[j] -= twice * v[j];
    }
  }
}

// Diagonalises the tridiagonal d (n), e (n - 1), rotating the rows of z (n, n) along: d becomes the eigenvalues, row j
// of z the eigenvector of d[j].
void iterate(double *d, double *e, double *z, ptrdiff_t n) {
  const auto negligible = [&](ptrdiff_t i) { return std::abs(e[i]) <= kEps * (std::abs(d[i]) + std::abs(d[i + 1])); };
  ptrdiff_t steps = 0;
  for (ptrdiff_t last = n - 1; last > 0;) {
    if (negligible(last - 1)) {
      --last;
      continue;
    }
    ptrdiff_t first = last - 1;  // of the unreduced block that ends at `last`
    while (first > 0 && !negligible(first - 1)) --first;
    check_state(++steps <= kMaxSweeps * n, "SymmetricEigen: no convergence for a matrix of size ", n);

    const double half = (d[last - 1] - d[last]) / 2.0, below = e[last - 1];
    const double shift = d[last] - below * below / (half + std::copysign(std::hypot(half, below), half));
    double x = d[first] - shift, bulge = e[first];
    for (ptrdiff_t k = first; k < last; ++k) {  // chases the bulge down the diagonal
      const double length = std::hypot(x, bulge);
      const double c = length == 0.0 ? 1.0 : x / length, s = length == 0.0 ? 0.0 : bulge / length;
      if (k > first) e[k - 1] = length;
      const double upper = d[k], side = e[k], lower = d[k + 1];
      d[k] = c * c * upper + 2.0 * c * s * side + s * s * lower;
      d[k + 1] = s * s * upper - 2.0 * c * s * side + c * c * lower;
      e[k] = c * s * (lower - upper) + (c * c - s * s) * side;
      if (k + 1 < last) {
        x = e[k];
        bulge = s * e[k + 1];
        e[k + 1] *= c;
      }
      double *row = z + k * n, *next = row + n;
      for (ptrdiff_t j = 0; j < n; ++j) {
        const double old = row[j];
        row[j] = c * old + s * next[j];
        next[j] = c * next[j] - s * old;
      }
    }
  }
}

}  // namespace

SymmetricEigen::SymmetricEigen(const double *a, ptrdiff_t n) : size(n), values(n), vectors(n * n) {
  if (n == 0) return;
  std::vector<double> rotated(n * n), d(n), e(n);
  for (ptrdiff_t i = 0; i < n; ++i) {
    for (ptrdiff_t j = 0; j <= i; ++j) rotated[i * n + j] = rotated[j * n + i] = a[i * n + j];
  }
  tridiagonalise(rotated.data(), n, d.data(), e.data());
  iterate(d.data(), e.data(), rotated.data(), n);
  std::vector<ptrdiff_t> order(n);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](ptrdiff_t i, ptrdiff_t j) { return d[i] > d[j]; });
  for (ptrdiff_t j = 0; j < n; ++j) {
    values[j] = d[order[j]];
    std::copy_n(rotated.data() + order[j] * n, n, vectors.data() + j * n);
  }
}

}  // namespace tipl
