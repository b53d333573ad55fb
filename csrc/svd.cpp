#include "svd.h"

#include <algorithm>
#include <atomic>
#include <utility>

#include "check.h"
#include "cpu/held_rows.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/projection.h"
#include "cpu/row_checks.h"
#include "cpu/row_products.h"
#include "cpu/sketch_kernels.h"
#include "cpu/sketch_sums.h"

namespace tipl {
namespace {

constexpr char kObject[] = "the sketch";
constexpr ptrdiff_t kMostFeatures = ptrdiff_t{1} << 40, kMostTests = 1024;
constexpr double kStepProducts = 1.0e10;  // multiplications of the rows that groups of columns take in one step

const SketchConfig &checked_config(const SketchConfig &config) {
  const ptrdiff_t p = config.num_features, l = config.range_size, q = config.test_size;
  check(p >= 1, "RowSketch: X must have at least one column, got ", p);
  check(p <= kMostFeatures, "RowSketch: X must have at most ", kMostFeatures, " columns, got ", p);
  check(1 <= l && l <= p, "RowSketch: range_size must lie in [1, p] = [1, ", p, "], got ", l);
  check(0 <= q && q <= kMostTests, "RowSketch: test_size must lie in [0, ", kMostTests, "], got ", q);
  const auto outputs = static_cast<double>(config.outputs()), columns = static_cast<double>(p);
  check_memory(outputs * (columns + outputs) + 2.0 * columns, sizeof(double));  // C, G and Omega
  return config;
}

}  // namespace

RowSketch::RowSketch(const SketchConfig &config, const float *origin, const float *directions, int num_threads,
                     Poll &poll)
    : config_(checked_config(config)),
      origin_(origin == nullptr ? std::vector<float>() : std::vector<float>(origin, origin + config.num_features)),
      pool_(std::make_unique<ThreadPool>(num_threads)),
      sums_(std::make_shared<SketchSums>(config_)),
      held_(std::make_unique<HeldRows>(config_.num_features)) {
  const ptrdiff_t p = config_.num_features;
  check(origin == nullptr || !config.choose_origin, "RowSketch: origin must be None where one is to be chosen");
  if (origin != nullptr) check_finite(*pool_, poll, "RowSketch", "origin", {origin, 1, p}, 0, p);
  if (directions == nullptr) {
    projection_ = std::make_shared<Projection>(config_, *pool_, poll);
  } else {
    check(config_.test_size == 0, "RowSketch: beside given directions test_size must be 0, got ", config_.test_size);
    check_finite(*pool_, poll, "RowSketch", "directions", {directions, config_.range_size, p}, 0, p);
    projection_ = std::make_shared<Projection>(config_, directions, *pool_, poll);
  }
}

RowSketch::RowSketch(const RowSketch &other, std::shared_ptr<SketchSums> sums)
    : config_(other.config_),
      origin_(other.origin_),
      pool_(std::make_unique<ThreadPool>(other.pool_->size())),
      projection_(other.projection_),
      sums_(std::move(sums)),
      held_(std::make_unique<HeldRows>(config_.num_features)) {}

RowSketch::~RowSketch() = default;

// ---- the origin

// The origin of a sketch whose rows are all pending.
std::vector<float> RowSketch::origin_of_pending(Poll &poll) const {
  if (!config_.choose_origin || held_->num_pending() == 0) return origin_;
  return central_row(*pool_, poll, held_->pending(), config_.num_features);
}

std::vector<float> RowSketch::exact_origin(Poll &poll) const {
  const InUse::Hold hold(in_use_, "exact_origin", kObject);
  return origin_of_pending(poll);
}

std::vector<float> RowSketch::origin() const {
  const InUse::Hold hold(in_use_, "origin", kObject);
  return config_.choose_origin && nothing_summed() ? std::vector<float>() : origin_;
}

// ---- taking rows

// Throws std::invalid_argument unless the squares of all rows taken so far, plus `more`, suit float32 sums.
void RowSketch::check_sum(const char *where, double more) const {
  const double squares = sums_->squares + held_->squares() + more;
  check(squares < kMaxSquares, where, ": all rows together are too large for float32 sums: their squares sum to ",
        squares, ", which must stay below ", kMaxSquares);
}

// Returns the sum of squares of each row. Throws std::invalid_argument where a row cannot be taken.
std::vector<double> RowSketch::checked(RowView x, int64_t first, Poll &poll) const {
  std::vector<double> squares =
      checked_squares(*pool_, poll, "partial_fit", "X", x, first, origin_or_null(), config_.num_features);
  check_squares("partial_fit", x, first, config_.num_features, squares);
  check_sum("partial_fit", total(squares));
  return squares;
}

// Returns `before` plus the squares of all rows. Throws std::invalid_argument where a row could not be taken after rows
// whose squares sum to `before`.
double RowSketch::check_all(RowView x, int64_t first, double before, Poll &poll) const {
  for_each_piece(x, [&](RowView piece, ptrdiff_t begin) {
    before += total(checked(piece, first + begin, poll));
    check_sum("partial_fit", before);
  });
  return before;
}

double RowSketch::check_rows(RowView x, int64_t first_row, double before, Poll &poll) const {
  const InUse::Hold hold(in_use_, "check_rows", kObject);
  check(x.count >= 1, "partial_fit: X must have at least one row, got 0");
  return check_all(x, first_row, before, poll);
}

// Makes sure that no snapshot shares the sums, which are about to change.
void RowSketch::own_sums(Poll &poll) {
  if (sums_.use_count() == 1) {
    // Dropping a copy is an atomic step after which all is seen that others did before they dropped theirs. A fence
    // would do as well, but TSan does not know fences.
    std::shared_ptr(sums_).reset();
    return;
  }
  sums_ = sums_->copy(config_, *pool_, poll);
}

std::unique_ptr<SketchBlock> RowSketch::begin_block(RowView x, Poll &poll) {
  own_sums(poll);
  if (config_.choose_origin && sums_->rows == 0) origin_ = central_row(*pool_, poll, x, config_.num_features);
  return std::make_unique<SketchBlock>(x, origin_or_null(), config_, *projection_, *sums_, *pool_);
}

// Makes the pending rows the block that is added to the sums while further rows come.
void RowSketch::hold_pending(Poll &poll) {
  held_->release(poll);
  held_->hold_pending(begin_block(held_->pending(), poll));
}

// Adds the pending rows to the sums.
void RowSketch::take_pending(Poll &poll) {
  hold_pending(poll);
  held_->release(poll);
}

void RowSketch::partial_fit(RowView x, int64_t first_row, bool all_or_none, Poll &poll) {
  const InUse::Hold hold(in_use_, "partial_fit", kObject);
  take(x, first_row, all_or_none, poll);
}

void RowSketch::take(RowView x, int64_t first_row, bool all_or_none, Poll &poll) {
  check(x.count >= 1, "partial_fit: X must have at least one row, got 0");
  std::vector<double> squares;  // of all rows where they are few, otherwise of the rows that are kept next
  const bool known = all_or_none && x.count <= kBlockRows;
  if (known) {
    squares = checked(x, first_row, poll);
  } else if (all_or_none) {
    check_all(x, first_row, 0.0, poll);
  }
  for (ptrdiff_t taken = 0; taken < x.count;) {
    if (held_->num_pending() == kBlockRows) hold_pending(poll);
    if (taken > 0) poll(0);
    const RowView rest{x.row(taken), std::min(x.count - taken, kBlockRows - held_->num_pending()), x.stride};
    // The first block is kept as it is until another row comes: until then all results are exact.
    const bool alone = nothing_summed() && taken + rest.count == x.count;
    if (rest.count == kBlockRows && !alone) {
      take_block(rest, first_row + taken, poll);
    } else {
      if (!known) squares = checked(rest, first_row + taken, poll);
      held_->keep(rest, squares.data() + (known ? taken : 0));
      held_->advance(x.count > 1, poll);  // for single rows, as a run in progress gives them, waking threads costs more
    }
    taken += rest.count;
  }
}

// Adds a whole block to the sums without copying its rows.
void RowSketch::take_block(RowView x, int64_t first_row, Poll &poll) {
  held_->release(poll);
  held_->reserve();  // memory that is committed only if it is written to
  std::unique_ptr<SketchBlock> block = begin_block(x, poll);
  block->advance(block->map_steps(), true, poll);
  check_squares("partial_fit", x, first_row, config_.num_features, block->squares());
  check_sum("partial_fit", total(block->squares()));
  try {
    block->advance(block->steps(), true, poll);
  } catch (const Interrupted &) {  // the sums hold a part of it: keep the rows, for the steps that are left
    held_->hold(std::move(block));
    throw;
  }
}

void RowSketch::partial_fit_together(const std::vector<RowSketch *> &sketches, const std::vector<ptrdiff_t> &starts,
                                     RowView x, int64_t first_row, bool all_or_none, Poll &poll) {
  std::vector<std::unique_ptr<InUse::Hold>> holds;
  double products = 0.0;  // of one row
  for (const RowSketch *sketch : sketches) {
    holds.push_back(std::make_unique<InUse::Hold>(sketch->in_use_, "partial_fit", kObject));
    products += static_cast<double>(sketch->config_.outputs()) * static_cast<double>(sketch->config_.num_features);
  }
  check(x.count >= 1, "partial_fit: X must have at least one row, got 0");
  const auto columns_of = [&](size_t i, ptrdiff_t begin, ptrdiff_t count) {
    return RowView{x.row(begin) + starts[i], count, x.stride};
  };
  for (size_t i = 0; all_or_none && i < sketches.size(); ++i) {
    sketches[i]->check_all(columns_of(i, 0, x.count), first_row, 0.0, poll);
  }
  const Poll::Stop never = [] { return false; };
  Poll to_the_end(never);
  const auto step = std::clamp<ptrdiff_t>(static_cast<ptrdiff_t>(kStepProducts / products), 1, kBlockRows);
  for (ptrdiff_t taken = 0; taken < x.count; taken += step) {
    poll(0);
    for (size_t i = 0; i < sketches.size(); ++i) {
      sketches[i]->take(columns_of(i, taken, std::min(step, x.count - taken)), first_row + taken, false, to_the_end);
    }
  }
}

void RowSketch::settle(Poll &poll) {
  const InUse::Hold hold(in_use_, "settle", kObject);
  held_->release(poll);
  if (held_->num_pending() > 0 && sums_->rows > 0) take_pending(poll);
}

// ---- two sketches

void RowSketch::check_mergeable(const RowSketch &other) const {
  const auto check_same = [](const char *name, auto ours, auto theirs) {
    check(ours == theirs, "merge: other must have ", name, " = ", ours, ", got ", theirs);
  };
  check_same("n_features_in_", config_.num_features, other.config_.num_features);
  check_same("range_size", config_.range_size, other.config_.range_size);
  check_same("test_size", config_.test_size, other.config_.test_size);
  check_same("seed", config_.seed, other.config_.seed);
  check(!directed() && !other.directed(), "merge: sketches in given directions do not merge");
  check_sum("merge", other.sums_->squares + other.held_->squares());
}

void RowSketch::merge(RowSketch &other, Poll &poll) {
  check(this != &other, "merge: other must be another estimator, with rows of its own");
  const InUse::Hold hold(in_use_, "merge", kObject), hold_other(other.in_use_, "merge", "the other sketch");
  check_mergeable(other);
  held_->release(poll);
  other.held_->release(poll);
  const std::unique_ptr<RowSketch> merged = copy();  // replaces this sketch once it is complete
  if (other.sums_->rows > 0) {
    if (held_->num_pending() > 0) merged->take_pending(poll);  // first, because our rows come before theirs
    merged->add_sums(other, poll);
  }
  merged->add_pending(other, poll);
  std::swap(origin_, merged->origin_);
  std::swap(sums_, merged->sums_);
  std::swap(held_, merged->held_);
}

// Adds the other's sums to ours, about our origin.
void RowSketch::add_sums(const RowSketch &other, Poll &poll) {
  if (config_.choose_origin && sums_->rows == 0) origin_ = other.origin_;
  std::vector<float> shift(config_.num_features);  // from our origin to theirs
  for (size_t c = 0; c < shift.size(); ++c) {
    shift[c] = (other.origin_.empty() ? 0.0f : other.origin_[c]) - (origin_.empty() ? 0.0f : origin_[c]);
  }
  sums_ = SketchSums::merged(*sums_, *other.sums_, shift, config_, *projection_, *pool_, poll);
}

// Takes the other's pending rows.
void RowSketch::add_pending(const RowSketch &other, Poll &poll) {
  const ptrdiff_t p = config_.num_features;
  const RowView rows = other.held_->pending();
  const std::vector<double> squares =  // about our origin
      checked_squares(*pool_, poll, "merge", "other", rows, 0, origin_or_null(), p);
  for (ptrdiff_t i = 0; i < rows.count; ++i) {
    if (held_->num_pending() == kBlockRows) take_pending(poll);
    held_->keep({rows.row(i), 1, p}, &squares[i]);
  }
}

// A sketch with all rows but those of a block on its way. It shares the sums until either sketch changes them.
std::unique_ptr<RowSketch> RowSketch::copy() const {
  std::unique_ptr<RowSketch> copy(new RowSketch(*this, sums_));
  if (held_->num_pending() > 0) copy->held_->keep(held_->pending(), held_->pending_squares().data());
  return copy;
}

std::unique_ptr<RowSketch> RowSketch::snapshot(bool settled, Poll &poll) {
  const InUse::Hold hold(in_use_, "snapshot", kObject);
  held_->release(poll);
  std::unique_ptr<RowSketch> snapshot = copy();
  if (held_->num_pending() > 0 && settled) snapshot->take_pending(poll);
  return snapshot;
}

void RowSketch::restore(SketchSums sums, RowView pending, Poll &poll) {
  const InUse::Hold hold(in_use_, "restore", kObject);
  const ptrdiff_t p = config_.num_features;
  check(pending.count <= kBlockRows, "restore: there must be at most ", kBlockRows, " pending rows, got ",
        pending.count);
  const std::vector<double> squares =
      checked_squares(*pool_, poll, "restore", "pending", pending, 0, origin_or_null(), p);
  check_squares("restore", pending, 0, p, squares);
  check(sums.squares >= 0.0, "restore: squares must be >= 0, got ", sums.squares);
  check(sums.squares + total(squares) < kMaxSquares, "restore: all rows together are too large for float32 sums");
  auto restored = std::make_shared<SketchSums>(std::move(sums));
  auto held = std::make_unique<HeldRows>(p);
  if (pending.count > 0) held->keep(pending, squares.data());
  held_ = std::move(held);
  sums_ = std::move(restored);
}

// ---- reading

// Whether all rows are pending.
bool RowSketch::nothing_summed() const noexcept { return sums_->rows == 0 && !held_->has_block(); }

bool RowSketch::exact() const {
  const InUse::Hold hold(in_use_, "exact", kObject);
  return nothing_summed();
}

bool RowSketch::directed() const noexcept { return projection_->directed(); }

int64_t RowSketch::num_rows() const {
  const InUse::Hold hold(in_use_, "num_rows", kObject);
  return sums_->rows + held_->count();
}

void RowSketch::apply(RowView x, float *out, Poll &poll) const {
  const InUse::Hold hold(in_use_, "apply", kObject);
  const ptrdiff_t mapped = config_.outputs() - 1, stride = projection_->y_stride();
  for_each_piece(x, [&](RowView piece, ptrdiff_t begin) {
    AlignedFloats y({piece.count, stride});
    std::vector<double> squares(piece.count);
    projection_->apply(piece, nullptr, y.data(), squares.data(), *pool_, poll);
    for (ptrdiff_t i = 0; i < piece.count; ++i) {
      std::copy_n(y.data() + i * stride, mapped, out + (begin + i) * mapped);
    }
  });
}

std::vector<float> RowSketch::exact_rows(Poll &poll) const {
  const InUse::Hold hold(in_use_, "exact_rows", kObject);
  if (!nothing_summed()) return {};
  const ptrdiff_t p = config_.num_features;
  const std::vector<float> origin = origin_of_pending(poll);
  const RowView pending = held_->pending();
  std::vector<float> rows(pending.count * p);
  for (ptrdiff_t i = 0; i < pending.count; ++i) {
    poll(0);
    sketch_kernels().subtract(pending.row(i), origin.empty() ? nullptr : origin.data(), p, &rows[i * p]);
  }
  return rows;
}

std::shared_ptr<const SketchSums> RowSketch::sums(Poll &poll) {
  const InUse::Hold hold(in_use_, "sums", kObject);
  held_->release(poll);
  return sums_;
}

std::vector<float> RowSketch::pending(Poll &poll) const {
  const InUse::Hold hold(in_use_, "pending", kObject);
  return held_->copy_pending(poll);
}

std::vector<float> RowSketch::directions(Poll &poll) const {
  const InUse::Hold hold(in_use_, "directions", kObject);
  return projection_->directions(*pool_, poll);
}

void RowSketch::combine_co_range(const double *weights, ptrdiff_t r, float *out, Poll &poll) {
  const InUse::Hold hold(in_use_, "combine", kObject);
  held_->release(poll);
  std::vector<const double *> rows(config_.outputs());
  for (size_t j = 0; j < rows.size(); ++j) rows[j] = sums_->co_range.data() + j * config_.num_features;
  combine_rows(*pool_, poll, rows, config_.num_features, weights, r, out);
}

std::vector<float> RowSketch::range_rows(Poll &poll) {
  const InUse::Hold hold(in_use_, "range_rows", kObject);
  held_->release(poll);
  const ptrdiff_t l = config_.range_size, stride = projection_->y_stride();
  const RowView pending = held_->pending();
  std::vector<float> rows;
  rows.reserve((sums_->rows + pending.count) * l);
  for (const auto &block : sums_->range_rows) {
    poll(0);
    rows.insert(rows.end(), block->begin(), block->end());
  }
  if (pending.count > 0) {
    AlignedFloats y({pending.count, stride});
    std::vector<double> squares(pending.count);
    projection_->apply(pending, origin_or_null(), y.data(), squares.data(), *pool_, poll);
    for (ptrdiff_t i = 0; i < pending.count; ++i) {
      rows.insert(rows.end(), y.data() + i * stride, y.data() + i * stride + l);
    }
  }
  return rows;
}

}  // namespace tipl
