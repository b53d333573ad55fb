// Streaming truncated SVD of a matrix A whose rows come in blocks and are never all kept; and the Gram matrix of rows.
//
// Shapes  n rows seen, p columns, k = n_components, l = k + n_oversamples, b rows of a block, m = l + 1 + b.
// Method  l rows M (l, p) stand for all rows before the current block X (b, p). When X is full, the eigenvectors U of
// the
//         Gram matrix [M; X] [M; X]^T (m, m) give the next M: the l leading rows of U^T [M; X]. This is the sequential
//         Karhunen-Loeve update (Levy and Lindenbaum 2000, doi:10.1109/83.855432; Brand 2006,
//         doi:10.1016/j.laa.2005.07.021) with the SVD taken from the exact Gram matrix. With `center`, X loses its own
//         mean and one more row carries the step between the means (Ross et al. 2008, doi:10.1007/s11263-007-0075-7).
// Error   M^T M never exceeds A^T A, and what a step drops is known: with V the k directions,
//             |A - A V^T V|_F^2  <=  everything dropped so far + the squared singular values beyond the k-th,
//         which is residual_bound. Rows that fit into l + b are not truncated at all.
// Merging stacks the rows that stand for either side: the same step again.
// Numbers float32 rows, float64 sums and eigenvectors: forming the Gram matrix squares the singular values, and they
// are
//         resolved down to 1e-7 or so of the largest. Below that they count as zero.
// Cost    p m (m + 2 l) / b float64 flops a row (12 p l where b = l), and 9 m^3 a block for the eigenvectors.
// Memory  4 p m bytes, and a copy of the block while directions are read or sketches are merged with `center`.
// Blocks depend on the number of rows alone and no sum is split between threads: results have the same bits for any
// chunking of the rows and any thread count. Reading changes nothing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <mutex>
#include <vector>

#include "aligned.h"
#include "kernels.h"
#include "parallel.h"

namespace tipl {

// out (n, n) <- D D^T with D = x - origin, x (n, p), origin (p) or null: differences, products and sums in float64.
// n^2 p float64 flops. Throws std::invalid_argument for NaN or Inf.
void gram(const float *x, ptrdiff_t n, ptrdiff_t p, const float *origin, double *out, int num_threads);

// out (n, k) <- x y^T, x (n, p) and y (k, p), summed in float64. Throws std::invalid_argument for NaN or Inf in x.
void cross_products(const float *x, ptrdiff_t n, const float *y, ptrdiff_t k, ptrdiff_t p, double *out,
                    int num_threads);

// What a StreamingSvd is built with, but for its threads. Two can be merged where all of it is equal.
struct SvdConfig {
  ptrdiff_t num_features, n_components, n_oversamples;  // p, k, l - k
  bool center;    // about the mean of all rows, as in principal component analysis
  uint64_t seed;  // of the random directions that complete the components where A has fewer than k
};

// Calls from several threads wait for one another.
class StreamingSvd {
 public:
  // Asked between blocks. True stops the work.
  using Interrupted = std::function<bool()>;

  // Throws std::invalid_argument for wrong sizes.
  StreamingSvd(const SvdConfig &config, int num_threads);

  // Takes the rows x (n, p), n >= 1. Throws std::invalid_argument, and has taken none, where one is NaN or Inf or where
  // the squares' sum leaves float32's range squared. False: interrupted; num_rows() tells how many rows were taken.
  bool partial_fit(const float *x, ptrdiff_t n, const Interrupted &interrupted);

  // Takes all that `other` has seen. Throws std::invalid_argument where other is this, is built differently, or where
  // the two together are too large, as partial_fit does.
  void merge(const StreamingSvd &other);

  struct Factors {
    AlignedFloats components;  // (k, stride): orthonormal rows of p values, each one's largest entry positive
    ptrdiff_t stride;
    std::vector<double> singular_values;  // (k), descending; 0 where A has fewer directions
    std::vector<double> mean;             // (p), zero unless `center`
    double residual_bound;                // >= |A - A V^T V|_F
  };
  // Of all rows taken so far. Throws std::runtime_error where there are none.
  Factors factors() const;

  const SvdConfig &config() const noexcept { return config_; }
  int64_t num_rows() const;
  int num_threads() const noexcept { return pool_.size(); }

 private:
  struct Spectrum;  // of a stack of rows

  void check_size(const char *where, double squares) const;
  std::vector<const float *> stacked(float *centred, double *mean) const;
  Spectrum spectrum(const std::vector<const float *> &rows) const;
  void compress(const std::vector<const float *> &rows);
  void combine(const std::vector<const float *> &rows, const std::vector<double> &weights, ptrdiff_t outputs,
               float *target) const;
  void complete(float *components, ptrdiff_t rank) const;
  void orthonormalise(float *components) const;
  void fix_signs(float *components) const;

  const SvdConfig config_;
  const ptrdiff_t max_kept_, max_block_;  // l, b
  const ptrdiff_t stride_;                // floats between rows: p rounded up, zero beyond p
  const Kernels &kernels_;
  mutable ThreadPool pool_;
  mutable std::mutex mutex_;

  AlignedFloats kept_;        // (l, stride), M
  AlignedFloats block_;       // (b + 1, stride), X; the last row is the step between means while X is taken up
  std::vector<double> mean_;  // (p), of the rows before the block; zero unless `center`
  ptrdiff_t num_kept_ = 0, num_block_ = 0;
  int64_t num_before_ = 0;  // rows before the block
  double dropped_ = 0.0;    // squared singular values left out of M so far
  double squares_ = 0.0;    // sum of squares of all rows as they came
};

}  // namespace tipl
