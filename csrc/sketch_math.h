// Where a sketch computes: its map of rows to outputs, its sums, and how rows are added to them. The CPU's is
// cpu/cpu_sketch.h, CUDA's cuda/cuda_sketch.h. Letters as in svd.h.
//
// The sketch has checked every argument. All pointers are to the host's memory, but rows may lie on the device that
// computes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "call.h"
#include "rows.h"

namespace tipl {

constexpr ptrdiff_t kBlockRows = 256;  // b: C is read and written once for so many rows

// What a sketch keeps of its rows. C and G are in memory of the device: each SketchMath adds its own.
struct SketchSums {
  virtual ~SketchSums() = default;

  double squares = 0.0;  // of all rows d: their squared Frobenius norm
  int64_t rows = 0;
  std::vector<std::shared_ptr<const std::vector<float>>> range_rows;  // for each block, d Omega (rows, l)
};

// At most kBlockRows rows that are added to sums, step by step; the first steps map the rows to y, and leave the sums
// alone. Whoever has the block keeps everything that it refers to alive and in place.
class SketchBlock {
 public:
  virtual ~SketchBlock() = default;

  virtual RowView rows() const noexcept = 0;
  virtual void move_rows(RowView x) noexcept = 0;                   // the same rows, now elsewhere
  virtual const std::vector<double> &squares() const noexcept = 0;  // of each d, after the map steps
  virtual ptrdiff_t steps() const noexcept = 0;                     // of which the first
  virtual ptrdiff_t map_steps() const noexcept = 0;                 //   only map rows
  virtual ptrdiff_t steps_due(ptrdiff_t rows) const noexcept = 0;   // once so many rows of the next block have come

  // Takes the steps up to `until` that are not done yet, on all threads or on the calling thread alone. Interrupted, it
  // leaves the rest to another call.
  virtual void advance(ptrdiff_t until, bool threaded, Poll &poll) = 0;
};

class SketchMath {
 public:
  virtual ~SketchMath() = default;

  // One with the same map for another sketch, which may be used at the same time.
  virtual std::unique_ptr<SketchMath> another() const = 0;

  virtual bool directed() const noexcept = 0;             // whether directions were given
  virtual std::vector<float> directions(Poll &poll) = 0;  // (l, p) as they were given, or empty

  // ---- rows; a null origin means zero

  // The sum of squares of each row less origin: NaN or Inf exactly where a value of the row is.
  virtual std::vector<double> squares(RowView x, const float *origin, Poll &poll) = 0;

  // y (x.count, l + q) <- (x - origin) [Omega, Omega'], and squares (x.count) as above, but summed in float32.
  virtual void apply(RowView x, const float *origin, float *y, double *squares, Poll &poll) = 0;

  // (x - x[0]) (x - x[0])^T (x.count, x.count), in float64.
  virtual std::vector<double> products(RowView x, Poll &poll) = 0;

  // to (x.count, p) <- x.
  virtual void copy_rows(RowView x, float *to) = 0;

  // ---- sums, all of them made here

  virtual std::shared_ptr<SketchSums> no_rows() = 0;
  virtual std::shared_ptr<SketchSums> copy(const SketchSums &sums, Poll &poll) = 0;

  // With C (l + q + 1, p) and G (l + q + 1, l + q + 1), and nothing else.
  virtual std::shared_ptr<SketchSums> restored(const double *co_range, const double *gram, Poll &poll) = 0;

  // With this G, and with C of `ours` and `theirs`, whose rows d become d + shift (p), and y becomes y + step; nothing
  // else.
  virtual std::shared_ptr<SketchSums> merged(const SketchSums &ours, const SketchSums &theirs, const float *shift,
                                             const float *step, const std::vector<double> &gram, Poll &poll) = 0;

  virtual std::unique_ptr<SketchBlock> begin_block(RowView x, const float *origin, SketchSums &sums) = 0;

  // out (count, p) <- so many rows of C, from `first` on.
  virtual void read_co_range(const SketchSums &sums, ptrdiff_t first, ptrdiff_t count, double *out, Poll &poll) = 0;
  virtual std::vector<double> read_gram(const SketchSums &sums) = 0;

  // out (r, p) <- weights^T C with weights (l + q + 1, r).
  virtual void combine(const SketchSums &sums, const double *weights, ptrdiff_t r, float *out, Poll &poll) = 0;
};

}  // namespace tipl
