#include "held_rows.h"

#include <algorithm>
#include <utility>

#include "row_checks.h"

namespace tipl {

double HeldRows::squares() const noexcept { return block_squares_ + total(pending_squares_); }

std::vector<float> HeldRows::copy_pending(Poll &poll) const {
  std::vector<float> rows;
  rows.reserve(num_pending() * num_features_);
  for (ptrdiff_t i = 0; i < num_pending(); ++i) {
    poll(0);
    rows.insert(rows.end(), pending().row(i), pending().row(i) + num_features_);
  }
  return rows;
}

void HeldRows::keep(RowView x, const double *squares, SketchMath &math) {
  if (pending_.data() == nullptr) pending_ = AlignedFloats({kBlockRows, num_features_});
  math.copy_rows(x, pending_.data() + num_pending() * num_features_);
  pending_squares_.insert(pending_squares_.end(), squares, squares + x.count);
}

void HeldRows::hold_pending(std::unique_ptr<SketchBlock> block) {
  std::swap(block_rows_, pending_);  // the rows stay where they are, and with them what the block refers to
  block_squares_ = total(pending_squares_);
  block_ = std::move(block);
  pending_squares_.clear();
}

void HeldRows::hold(std::unique_ptr<SketchBlock> block, SketchMath &math) {
  const RowView x = block->rows();
  math.copy_rows(x, block_rows_.data());
  block->move_rows({block_rows_.data(), x.count, num_features_});
  block_squares_ = total(block->squares());
  block_ = std::move(block);
}

void HeldRows::reserve() {
  if (block_rows_.data() == nullptr) block_rows_ = AlignedFloats({kBlockRows, num_features_});
}

void HeldRows::advance(bool threaded, Poll &poll) {
  if (!has_block()) return;
  const ptrdiff_t due = block_->steps_due(num_pending());
  block_->advance(due, threaded, poll);
  if (due == block_->steps()) release(poll);
}

void HeldRows::release(Poll &poll) {
  if (!has_block()) return;
  block_->advance(block_->steps(), true, poll);
  block_.reset();
  block_squares_ = 0.0;
}

}  // namespace tipl
