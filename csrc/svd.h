// Temporal SVD of a matrix A whose rows come in blocks and are never all kept: a sketch of the rows seen.
// tipl/subspace/sketch_svd.py solves the small problems that are left.
//
// Shapes  n rows seen, p columns, l range and q test directions, b = 256 rows of a block.
// Method  Each row d = x - origin gives y = [d Omega, d Omega', 1] with Omega (p, l) and Omega' (p, q). The sketch
//         keeps C = sum y^T d (l + q + 1, p) and G = sum y^T y. With Q an orthonormal basis of the range of Y = A
//         Omega, Q^T A = R^-T Y^T A follows from C and G: this is the range finder of Halko, Martinsson and Tropp 2011
//         (doi:10.1137/090771806, algorithm 4.1) and its projection in one pass, without Q and without a second look at
//         A. In exact arithmetic it is the Nystrom approximation of A^T A (Tropp and Webber 2023, arXiv:2306.12418).
//         The last number of y makes C and G contain the sums of d and of y, for the mean. The test directions, which
//         no basis has seen, give an estimate of what Q misses. Everything is a sum over rows: the order of the rows,
//         and of merging sketches, changes only the rounding, and no row needs an index.
// Omega   Sparse: 4 signs for each column of A, one in each of as many strata of the outputs (OSNAP, Nelson and
//         Nguyen 2013, arXiv:1211.1002); two signs for each column in Omega'; the identity where l = p. Or given:
//         orthonormal directions that an earlier pass has found, which makes each pass a step of subspace iteration.
// Numbers Rows are float32. C is summed in float32 over 128 rows, then in float64. C holds squares of singular values:
//         those below about 3e-4 of the largest are lost in rounding (tipl/subspace/sketch_svd.py cuts them off), and a
//         later pass resolves them.
// Cost    2 p (l + q + 1) + (4 + 2) p flops for each row, or 4 p (l + q + 1) with given directions. For each
//         block A is read twice, first from where it lies and then from cache or memory, and C once, in and out
//         (16 p (l + q + 1) bytes).
// Memory  8 p (l + q + 1) bytes, and 4 l bytes for each row. Where rows come in fewer than b at a time also two blocks
//         of rows (8 b p bytes): one that fills, and the one before it, whose work is spread over the rows that fill
//         the next.
// Bits    Blocks begin at every b-th row, however the rows arrive, and no sum is split between threads: the same bits
//         for any chunking of the rows and any number of threads.
// Stops   Every call asks its Poll, and throws Interrupted between steps. The sketch is then as before, except for rows
//         that partial_fit has taken.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "call.h"
#include "rows.h"

namespace tipl {

class HeldRows;
class SketchBlock;
class SketchMath;
struct SketchSums;

struct SketchConfig {
  ptrdiff_t num_features, range_size, test_size;  // p, l, q
  uint64_t seed;                                  // for Omega and Omega'
  bool choose_origin = false;                     // take a central row of the first block; none may be given

  ptrdiff_t outputs() const noexcept { return range_size + test_size + 1; }  // numbers in y: l + q + 1
};

// Returns the config. Throws std::invalid_argument for wrong sizes, and std::bad_alloc where the machine lacks the
// memory.
const SketchConfig &check_sketch(const SketchConfig &config, const float *directions);

// What a sketch has seen but for its pending rows: C (l + q + 1, p), G (l + q + 1, l + q + 1), the squares and the
// number of the rows, and d Omega (rows, l).
struct SavedSums {
  const double *co_range, *gram;
  double squares;
  const float *range_rows;
  int64_t rows;
};

// One call at a time: a second one gets std::runtime_error.
class RowSketch {
 public:
  // origin (p), or null for zero; the directions (l, p) or null, and the config, that `math` was made with. Throws
  // std::invalid_argument for NaN or Inf, and std::bad_alloc where the machine lacks the memory.
  RowSketch(const SketchConfig &config, const float *origin, const float *directions, std::unique_ptr<SketchMath> math,
            Poll &poll);
  ~RowSketch();

  // Takes the rows of x, which messages number from first_row on. Throws std::invalid_argument where a value is NaN or
  // Inf or far too large. With `all_or_none`, which reads x twice, no row is taken then; otherwise whole blocks before
  // it are. After an interruption num_rows() tells how many rows were taken.
  void partial_fit(RowView x, int64_t first_row, bool all_or_none, Poll &poll);

  // Throws as partial_fit would after rows whose squares sum to `before`. Returns `before` plus the squares of x.
  double check_rows(RowView x, int64_t first_row, double before, Poll &poll) const;

  // Each sketch takes its columns, from starts[i] on, of all rows, or no sketch takes any. After an interruption all
  // have taken equally many rows. Without all_or_none the rows must have passed check_rows.
  static void partial_fit_together(const std::vector<RowSketch *> &sketches, const std::vector<ptrdiff_t> &starts,
                                   RowView x, int64_t first_row, bool all_or_none, Poll &poll);

  // Takes everything that `other` has seen, as rows that come after ours; `other` keeps it. Throws
  // std::invalid_argument where other is this sketch, or differs in more than its origin and threads. Needs the memory
  // of a third sketch.
  void merge(RowSketch &other, Poll &poll);

  // out (x.count, l + q) <- y of each row of x, as if the origin were zero.
  void apply(RowView x, float *out, Poll &poll) const;

  // Adds the pending rows to the sums, unless all rows are pending. The next row begins a new block.
  void settle(Poll &poll);

  // A sketch of the rows so far, which later rows do not change. `settled`: with its pending rows added to the sums.
  std::unique_ptr<RowSketch> snapshot(bool settled, Poll &poll);

  // The rows less exact_origin() (rows, p) where all rows are pending; empty otherwise.
  std::vector<float> exact_rows(Poll &poll) const;
  std::vector<float> exact_origin(Poll &poll) const;  // empty for zero

  // out (r, p) <- weights^T C with weights (l + q + 1, r), over the rows that are not pending.
  void combine_co_range(const double *weights, ptrdiff_t r, float *out, Poll &poll);

  // d Omega (num_rows, l) of all rows in order, including the pending ones.
  std::vector<float> range_rows(Poll &poll);

  // The sums over all rows that are not pending, a held block's among them, which is added first.
  double squares(Poll &poll);
  std::vector<double> gram(Poll &poll);  // G
  // out (count, p) <- so many rows of C, from `first` on.
  void read_co_range(ptrdiff_t first, ptrdiff_t count, double *out, Poll &poll);
  std::vector<float> pending(Poll &poll) const;
  std::vector<float> directions(Poll &poll) const;  // (l, p) as given, or empty
  std::vector<float> origin() const;                // empty for zero, and until one is chosen

  // Replaces everything that was seen by what was saved.
  void restore(const SavedSums &saved, RowView pending, Poll &poll);

  const SketchConfig &config() const noexcept { return config_; }
  const SketchMath &math() const noexcept { return *math_; }
  bool exact() const;              // whether all rows are pending
  bool directed() const noexcept;  // whether directions were given
  int64_t num_rows() const;

 private:
  RowSketch(const RowSketch &other, std::shared_ptr<SketchSums> sums);

  const float *origin_or_null() const noexcept { return origin_.empty() ? nullptr : origin_.data(); }
  std::vector<float> central_row(RowView x, Poll &poll) const;
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
  void check_row_of(const char *where, const char *name, RowView x, ptrdiff_t i, int64_t first) const;
  std::vector<double> squares_of(const char *where, const char *name, RowView x, int64_t first, const float *origin,
                                 Poll &poll) const;
  void check_squares(const char *where, RowView x, int64_t first, const std::vector<double> &squares) const;
  std::vector<double> checked(RowView x, int64_t first, Poll &poll) const;
  double check_all(RowView x, int64_t first, double before, Poll &poll) const;
  void check_mergeable(const RowSketch &other) const;
  void add_sums(const RowSketch &other, Poll &poll);
  void add_pending(const RowSketch &other, Poll &poll);

  const SketchConfig config_;
  std::vector<float> origin_;
  const std::unique_ptr<SketchMath> math_;
  mutable InUse in_use_;
  std::shared_ptr<SketchSums> sums_;  // shared with snapshots until it changes
  std::unique_ptr<HeldRows> held_;
};

}  // namespace tipl
