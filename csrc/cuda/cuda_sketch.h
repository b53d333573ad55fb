// CUDA's part of a sketch. C and G stay in the device's memory until they are read. d Omega of each row goes to the
// host, with the squares of its block, which are checked before the block is added.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "call.h"
#include "cuda/device.h"
#include "cuda/row_work.h"
#include "cuda/sketch.h"
#include "rows.h"
#include "sketch_math.h"
#include "svd.h"

namespace tipl::cuda {

// The map, which all sketches that are copies of one another share.
struct SketchMap {
  SketchMap(const SketchConfig &config, const float *directions, Poll &poll);

  Buffer<uint32_t> starts;  // of random signs, as in SignTables
  Buffer<uint16_t> codes;
  Buffer<int64_t> first_code;
  Buffer<float> directions;  // or (p, pitch): the given directions, transposed, zero beyond l
  ptrdiff_t pitch = 0;
};

class CudaSketchMath final : public SketchMath {
 public:
  // directions (l, p), or null for a sparse Omega. The device must be the current one. Throws std::invalid_argument as
  // check_sketch does.
  CudaSketchMath(const SketchConfig &config, const float *directions, int device, Poll &poll);

  const Stream &stream() const noexcept { return work_.stream(); }
  int device() const noexcept { return device_; }

  std::unique_ptr<SketchMath> another() const override;
  bool directed() const noexcept override { return map_->pitch > 0; }
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
  class Block;
  struct Sums;

  CudaSketchMath(const SketchConfig &config, std::shared_ptr<const SketchMap> map, int device);
  const Sums &readable(const SketchSums &sums) const;
  void map_rows(DeviceRows x, const float *origin);
  // What map_rows has made: (rows, count) of y from its first column on, and the squares.
  void read_mapped(ptrdiff_t rows, ptrdiff_t count, float *y, double *squares);

  const SketchConfig config_;
  const int device_;
  RowWork work_;
  const std::shared_ptr<const SketchMap> map_;
  const ptrdiff_t y_pitch_;
  Buffer<float> y_shares_, y_;  // of the block that is at work
  Buffer<double> squares_shares_, squares_;
};

}  // namespace tipl::cuda
