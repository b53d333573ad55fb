// Temporal SVD of a matrix A whose rows come in blocks and are never all kept: a sketch of the rows seen, and products
// of rows that are in memory. tipl/subspace/streaming_svd.py solves the small problems that are left.
//
// Shapes  n rows seen, p columns, l range and q test directions, b = 256 rows of a block.
// Method  Each row d = x - origin gives y = [d Omega, d Omega', 1] with Omega (p, l) and Omega' (p, q), and the sketch
//         keeps C = sum y^T d (l + q + 1, p) and G = sum y^T y. With Q an orthonormal basis of the range of
//         Y = A Omega, Q^T A = R^-T Y^T A follows from C and G: the range finder of Halko, Martinsson and Tropp 2011
//         (doi:10.1137/090771806, algorithm 4.1) and its projection in one pass, without Q and without a second look at
//         A. In exact arithmetic it is the Nystrom approximation of A^T A (Tropp and Webber 2023, arXiv:2306.12418).
//         The last column of y gives the sums of d and of y, for the mean; the test directions, which no basis has
//         seen, give an estimate of what Q misses. All of it is a sum over rows: neither the order of the rows nor how
//         sketches are merged matters but for rounding, and no row needs a number of its own.
// Omega   sparse: kNonzeros signs a column of A, one in each of as many strata of the outputs (OSNAP, Nelson and Nguyen
//         2013, arXiv:1211.1002); dense signs in Omega'; the identity where l = p. Or given, orthonormal directions of
//         an earlier pass: subspace iteration, a pass a step.
// Numbers float32 rows; C is summed in float32 over 128 rows, then in float64. C holds squares of singular values:
//         those below some 3e-4 of the largest drown in rounding (tipl/subspace/streaming_svd.py cuts them off), a
//         later pass resolves them.
// Cost    2 p (l + q + 1) + (kNonzeros + q) p flops a row (4 p (l + q + 1) where the directions are given), and A is
//         read twice a block, from where it lies and then from cache or memory; C (16 p (l + q + 1) bytes a block).
// Memory  8 p (l + q + 1) bytes and 4 l a row; where rows come in fewer than b at a time also two blocks of rows (8 b
//         p): one that fills, and the one before, whose work is spread over the rows that fill the next.
// Blocks begin at every b-th row whatever came at once, and no sum is split between threads: the same bits for any
// chunking of the rows and any thread count.
// Stops  Every call asks its Poll, and throws Interrupted between steps: the sketch is then as before, but for rows
// that
//        partial_fit has taken.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "call.h"
#include "rows.h"

namespace tipl {

class HeldRows;
class Projection;
class SketchBlock;
struct SketchSums;
class ThreadPool;

struct SketchConfig {
  ptrdiff_t num_features, range_size, test_size;  // p, l, q
  uint64_t seed;                                  // of Omega and Omega'
  bool choose_origin = false;                     // one of the first block's rows, in their midst; none may be given

  ptrdiff_t outputs() const noexcept { return range_size + test_size + 1; }  // numbers in y: l + q + 1
};

// One call at a time: another is refused with std::runtime_error.
class RowSketch {
 public:
  // origin (p) or null; directions (l, p) or null for a sparse Omega. Throws std::invalid_argument for wrong sizes and
  // for NaN or Inf, and std::bad_alloc where the machine lacks the memory.
  RowSketch(const SketchConfig &config, const float *origin, const float *directions, int num_threads, Poll &poll);
  ~RowSketch();

  // Takes the rows, of which messages call the first `first_row`. Throws std::invalid_argument where one is NaN or Inf
  // or far too large: it has taken none then if `all_or_none`, which reads x twice, and else those of whole blocks
  // before. Where it was interrupted num_rows() tells how many rows were taken.
  void partial_fit(RowView x, int64_t first_row, bool all_or_none, Poll &poll);

  // Throws as partial_fit would, had it already taken rows whose squares sum to `before`; returns the sum with those of
  // x.
  double check_rows(RowView x, int64_t first_row, double before, Poll &poll) const;

  // Each sketch takes its columns, from starts[i] on, of all rows, or none does; where it was interrupted all have
  // taken equally many. Without all_or_none the rows must have passed check_rows.
  static void partial_fit_together(const std::vector<RowSketch *> &sketches, const std::vector<ptrdiff_t> &starts,
                                   RowView x, int64_t first_row, bool all_or_none, Poll &poll);

  // Takes all that `other` has seen, which still has it; its rows come behind ours. Throws std::invalid_argument where
  // other is this or is built differently but for its origin and threads. Needs the memory of a third sketch.
  void merge(RowSketch &other, Poll &poll);

  // out (x.count, l + q) <- y of each row of x, as if the origin were zero.
  void apply(RowView x, float *out, Poll &poll) const;

  // Adds the rows that are pending to the sums, unless all are: the next block begins with the next row.
  void settle(Poll &poll);

  // What was seen so far, and not changed by what comes; `settled`: with the pending rows taken up.
  std::unique_ptr<RowSketch> snapshot(bool settled, Poll &poll);

  // All rows less exact_origin() (rows, p) where they are no more than pending; empty otherwise.
  std::vector<float> exact_rows(Poll &poll) const;
  std::vector<float> exact_origin(Poll &poll) const;  // empty for zero

  // out (r, p) <- weights^T C with weights (l + q + 1, r), of the rows that are not pending.
  void combine_co_range(const double *weights, ptrdiff_t r, float *out, Poll &poll) const;

  // d Omega (num_rows, l) of all rows in order, pending ones too.
  std::vector<float> range_rows(Poll &poll);

  // All that was seen, of the rows that were added to the sums already. Nothing changes what is returned.
  std::shared_ptr<const SketchSums> sums() const;
  std::vector<float> pending(Poll &poll) const;
  std::vector<float> directions(Poll &poll) const;  // (l, p) as they were given, or empty
  std::vector<float> origin() const;                // empty for zero, and while it is not chosen

  // Replaces all that was seen, for a sketch that was saved. The sizes in `sums` are the caller's to check.
  void restore(SketchSums sums, RowView pending, Poll &poll);

  const SketchConfig &config() const noexcept { return config_; }
  bool exact() const;              // whether no row is more than pending
  bool directed() const noexcept;  // whether directions were given
  int64_t num_rows() const;

 private:
  RowSketch(const RowSketch &other, std::shared_ptr<SketchSums> sums);

  const float *origin_or_null() const noexcept { return origin_.empty() ? nullptr : origin_.data(); }
  std::vector<float> origin_of_pending(Poll &poll) const;
  std::unique_ptr<RowSketch> copy() const;
  void own_sums(Poll &poll);
  std::unique_ptr<SketchBlock> begin_block(RowView x, Poll &poll);
  void take(RowView x, int64_t first_row, bool all_or_none, Poll &poll);
  void take_block(RowView x, int64_t first_row, Poll &poll);
  void take_pending(Poll &poll);
  void hold_pending(Poll &poll);
  bool nothing_summed() const noexcept;
  void check_sum(const char *where, double more) const;
  std::vector<double> checked(RowView x, int64_t first, Poll &poll) const;
  double check_all(RowView x, int64_t first, double before, Poll &poll) const;
  void check_mergeable(const RowSketch &other) const;
  void add_sums(const RowSketch &other, Poll &poll);
  void add_pending(const RowSketch &other, Poll &poll);

  const SketchConfig config_;
  std::vector<float> origin_;
  const std::unique_ptr<ThreadPool> pool_;
  mutable InUse in_use_;
  std::shared_ptr<const Projection> projection_;
  std::shared_ptr<SketchSums> sums_;  // shared with snapshots until it changes
  std::unique_ptr<HeldRows> held_;
};

}  // namespace tipl
