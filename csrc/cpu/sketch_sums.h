// The sums that a sketch keeps of its rows, and blocks of rows on their way into them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "call.h"
#include "cpu/aligned.h"
#include "cpu/parallel.h"
#include "cpu/projection.h"
#include "rows.h"
#include "svd.h"

namespace tipl {

struct SketchKernels;

constexpr ptrdiff_t kBlockRows = 256;  // b: C is read and written once for so many rows

struct SketchSums {
  explicit SketchSums(const SketchConfig &config);  // of no rows: all zero
  // What the rows of both have, those of `theirs` about the origin of `ours`: their origin less ours is `shift` (p).
  static std::shared_ptr<SketchSums> merged(const SketchSums &ours, const SketchSums &theirs,
                                            const std::vector<float> &shift, const SketchConfig &config,
                                            const Projection &projection, ThreadPool &pool, Poll &poll);
  std::shared_ptr<SketchSums> copy(const SketchConfig &config, ThreadPool &pool, Poll &poll) const;

  AlignedArray<double> co_range;  // C (l + q + 1, p)
  AlignedArray<double> gram;      // G (l + q + 1, l + q + 1)
  double squares = 0.0;           // of all rows d: their squared Frobenius norm
  int64_t rows = 0;
  std::vector<std::shared_ptr<const std::vector<float>>> range_rows;  // for each block, d Omega (rows, l)
};

// At most kBlockRows rows that are added to the sums, step by step: first those that map groups of rows to y, then one
// that packs y, those that add to some columns of C each, and one that adds to all else. Whoever has the block keeps
// everything that it refers to alive and in place.
class SketchBlock {
 public:
  SketchBlock(RowView x, const float *origin, const SketchConfig &config, const Projection &projection,
              SketchSums &sums, ThreadPool &pool);

  RowView rows() const noexcept { return x_; }
  void move_rows(RowView x) noexcept { x_ = x; }                            // the same rows, now elsewhere
  const std::vector<double> &squares() const noexcept { return squares_; }  // of each d, after the map steps
  ptrdiff_t steps() const noexcept { return map_steps() + 1 + column_runs() + 1; }
  ptrdiff_t map_steps() const noexcept { return projection_.groups(x_.count); }  // which leave the sums alone

  // How many steps should be done once `rows` rows of the next block have come.
  ptrdiff_t steps_due(ptrdiff_t rows) const noexcept;

  // Takes the steps up to `until` that are not done yet, on all threads or on the calling thread alone. Interrupted, it
  // leaves the rest to another call.
  void advance(ptrdiff_t until, bool threaded, Poll &poll);

 private:
  void pack();
  ptrdiff_t column_runs() const noexcept;
  void add_co_range(ptrdiff_t run, int rank);
  void add_rest(Poll &poll);

  RowView x_;
  const float *const origin_;
  const ptrdiff_t num_features_, range_size_, outputs_;
  const Projection &projection_;
  SketchSums &sums_;
  ThreadPool &pool_;
  const SketchKernels &kernels_;
  AlignedFloats y_;                     // (rows, y_stride): [d Omega, d Omega', 1] of each row
  std::vector<double> squares_;         // of each d
  AlignedFloats packed_;                // y as SketchKernels::update takes it, kUpdateRows rows at a time
  std::vector<AlignedFloats> scratch_;  // of each thread
  ptrdiff_t steps_done_ = 0;
};

}  // namespace tipl
