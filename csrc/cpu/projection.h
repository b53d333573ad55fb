// The linear map of a sketch: from a row d (p) to d [Omega, Omega'], its l range outputs and its q test outputs.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "call.h"
#include "cpu/aligned.h"
#include "cpu/parallel.h"
#include "rows.h"
#include "sketch_signs.h"
#include "svd.h"

namespace tipl {

struct SketchKernels;

class Projection {
 public:
  // Random signs: a sparse Omega, or the identity where l = p, and Omega'.
  Projection(const SketchConfig &config, ThreadPool &pool, Poll &poll);
  // Omega^T = directions (l, p), without test outputs.
  Projection(const SketchConfig &config, const float *directions, ThreadPool &pool, Poll &poll);

  bool directed() const noexcept { return signs_.empty(); }           // whether directions were given
  std::vector<float> directions(ThreadPool &pool, Poll &poll) const;  // (l, p) as they were given, or empty
  ptrdiff_t y_stride() const noexcept { return y_stride_; }           // room for l + q + 1 numbers
  ptrdiff_t group_rows() const noexcept;                              // how many rows are mapped together
  ptrdiff_t groups(ptrdiff_t rows) const noexcept { return (rows + group_rows() - 1) / group_rows(); }

  // y (x.count, y_stride) <- (x - origin) [Omega, Omega'], and squares (x.count) <- the sum of squares of each x -
  // origin. A null origin means zero. All groups of rows on the threads of the pool, or one group on the calling
  // thread.
  void apply(RowView x, const float *origin, float *y, double *squares, ThreadPool &pool, Poll &poll) const;
  void apply_to_group(RowView x, ptrdiff_t group, const float *origin, float *y, double *squares, int rank,
                      Poll &poll) const;

 private:
  void sketch_group(RowView x, const float *origin, float *y, double *squares, int rank, Poll &poll) const;
  void multiply_group(RowView x, const float *origin, float *y, double *squares, int rank, Poll &poll) const;

  const SketchKernels &kernels_;
  const ptrdiff_t num_features_, range_size_, mapped_, y_stride_;  // p, l, l + q

  std::vector<Signs> signs_;  // of each kSketchColumns columns, as SketchKernels::sketch takes them

  // Of given directions, for each kDirectionColumns columns as PackedLinear takes them, zero beyond l.
  AlignedWords directions_;
  AlignedFloats bias_;  // (l rounded up to N), zero
};

}  // namespace tipl
