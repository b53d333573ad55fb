// The CPU's part of a sketch: SketchMath on the threads of a pool.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "call.h"
#include "cpu/aligned.h"
#include "cpu/parallel.h"
#include "cpu/projection.h"
#include "rows.h"
#include "sketch_math.h"
#include "svd.h"

namespace tipl {

struct SketchKernels;

struct CpuSketchSums final : SketchSums {
  explicit CpuSketchSums(const SketchConfig &config);  // of no rows: all zero

  AlignedArray<double> co_range;  // C (l + q + 1, p)
  AlignedArray<double> gram;      // G (l + q + 1, l + q + 1)
};

// Its steps: first those that map groups of rows to y, then one that packs y, those that add to some columns of C each,
// and one that adds to all else.
class CpuSketchBlock final : public SketchBlock {
 public:
  CpuSketchBlock(RowView x, const float *origin, const SketchConfig &config, const Projection &projection,
                 CpuSketchSums &sums, ThreadPool &pool);

  RowView rows() const noexcept override { return x_; }
  void move_rows(RowView x) noexcept override { x_ = x; }
  const std::vector<double> &squares() const noexcept override { return squares_; }
  ptrdiff_t steps() const noexcept override { return map_steps() + 1 + column_runs() + 1; }
  ptrdiff_t map_steps() const noexcept override { return projection_.groups(x_.count); }
  ptrdiff_t steps_due(ptrdiff_t rows) const noexcept override;
  void advance(ptrdiff_t until, bool threaded, Poll &poll) override;

 private:
  void pack();
  ptrdiff_t column_runs() const noexcept;
  void add_co_range(ptrdiff_t run, int rank);
  void add_rest(Poll &poll);

  RowView x_;
  const float *const origin_;
  const ptrdiff_t num_features_, range_size_, outputs_;
  const Projection &projection_;
  CpuSketchSums &sums_;
  ThreadPool &pool_;
  const SketchKernels &kernels_;
  AlignedFloats y_;                     // (rows, y_stride): [d Omega, d Omega', 1] of each row
  std::vector<double> squares_;         // of each d
  AlignedFloats packed_;                // y as SketchKernels::update takes it, kUpdateRows rows at a time
  std::vector<AlignedFloats> scratch_;  // of each thread
  ptrdiff_t steps_done_ = 0;
};

class CpuSketchMath final : public SketchMath {
 public:
  // directions (l, p), or null for a sparse Omega. Throws std::invalid_argument as check_sketch does.
  CpuSketchMath(const SketchConfig &config, const float *directions, int num_threads, Poll &poll);

  std::unique_ptr<SketchMath> another() const override;
  bool directed() const noexcept override { return projection_->directed(); }
  std::vector<float> directions(Poll &poll) override;
  std::vector<double> squares(RowView x, const float *origin, Poll &poll) override;
  void apply(RowView x, const float *origin, float *y, double *squares, Poll &poll) override;
  std::vector<double> products(RowView x, Poll &poll) override;
  void copy_rows(RowView x, float *to) override;
  std::shared_ptr<SketchSums> no_rows() override;
  std::shared_ptr<SketchSums> copy(const SketchSums &sums, Poll &poll) override;
  std::shared_ptr<SketchSums> restored(const double *co_range, const double *gram, Poll &poll) override;
  std::shared_ptr<SketchSums> merged(const SketchSums &ours, const SketchSums &theirs, const float *shift,
                                     const float *step, const std::vector<double> &gram, Poll &poll) override;
  std::unique_ptr<SketchBlock> begin_block(RowView x, const float *origin, SketchSums &sums) override;
  void read_co_range(const SketchSums &sums, ptrdiff_t first, ptrdiff_t count, double *out, Poll &poll) override;
  std::vector<double> read_gram(const SketchSums &sums) override;
  void combine(const SketchSums &sums, const double *weights, ptrdiff_t r, float *out, Poll &poll) override;

 private:
  CpuSketchMath(const SketchConfig &config, std::shared_ptr<const Projection> projection, int num_threads);

  const SketchConfig config_;
  const std::unique_ptr<ThreadPool> pool_;
  const std::shared_ptr<const Projection> projection_;
};

}  // namespace tipl
