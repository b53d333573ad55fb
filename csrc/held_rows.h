// The rows that a sketch has taken but not yet added to its sums, in the host's memory.
//
// Pending rows are copies of the last rows, which do not fill a block yet. Before them there may be a block that is on
// its way into the sums: its steps are spread over the rows that fill the next block, so that no row waits for a whole
// block to be added.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "call.h"
#include "cpu/aligned.h"
#include "rows.h"
#include "sketch_math.h"

namespace tipl {

class HeldRows {
 public:
  explicit HeldRows(ptrdiff_t num_features) : num_features_(num_features) {}

  RowView pending() const noexcept { return {pending_.data(), num_pending(), num_features_}; }
  std::vector<float> copy_pending(Poll &poll) const;  // (rows, p)
  ptrdiff_t num_pending() const noexcept { return static_cast<ptrdiff_t>(pending_squares_.size()); }
  const std::vector<double> &pending_squares() const noexcept { return pending_squares_; }  // of each row
  bool has_block() const noexcept { return block_ != nullptr; }
  ptrdiff_t count() const noexcept { return num_pending() + (has_block() ? block_->rows().count : 0); }
  double squares() const noexcept;  // of all these rows

  // Keeps copies of rows, which fit beside the pending ones, with the sum of squares of each.
  void keep(RowView x, const double *squares, SketchMath &math);

  // Takes in a block that consists of the pending rows: nothing is pending then. There must be no other block.
  void hold_pending(std::unique_ptr<SketchBlock> block);

  // Takes in a block of rows that lie elsewhere, and copies them. reserve() must have made room for them.
  void hold(std::unique_ptr<SketchBlock> block, SketchMath &math);
  void reserve();

  // Takes the steps of the block that are due now, given how many rows are pending.
  void advance(bool threaded, Poll &poll);

  // Takes all steps of the block that are left. Without a block it does nothing.
  void release(Poll &poll);

 private:
  ptrdiff_t num_features_;
  AlignedFloats pending_;                // (b, p), allocated with the first row
  std::vector<double> pending_squares_;  // of each pending row
  AlignedFloats block_rows_;             // (b, p), the rows of the block
  std::unique_ptr<SketchBlock> block_;   // null if there is none
  double block_squares_ = 0.0;
};

}  // namespace tipl
