#include "svd.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>

#include "check.h"
#include "held_rows.h"
#include "row_checks.h"

namespace tipl {
namespace {

constexpr char kObject[] = "the sketch";
constexpr ptrdiff_t kMostFeatures = ptrdiff_t{1} << 40, kMostTests = 1024;
constexpr ptrdiff_t kCandidates = 16;     // rows among which the central one is found
constexpr double kStepProducts = 1.0e10;  // multiplications of the rows that groups of columns take in one step

}  // namespace

const SketchConfig &check_sketch(const SketchConfig &config, const float *directions) {
  const ptrdiff_t p = config.num_features, l = config.range_size, q = config.test_size;
  check(p >= 1, "RowSketch: X must have at least one column, got ", p);
  check(p <= kMostFeatures, "RowSketch: X must have at most ", kMostFeatures, " columns, got ", p);
  check(1 <= l && l <= p, "RowSketch: range_size must lie in [1, p] = [1, ", p, "], got ", l);
  check(0 <= q && q <= kMostTests, "RowSketch: test_size must lie in [0, ", kMostTests, "], got ", q);
  const auto outputs = static_cast<double>(config.outputs()), columns = static_cast<double>(p);
  check_memory(outputs * (columns + outputs) + 2.0 * columns, sizeof(double));  // C, G and Omega
  check(directions == nullptr || q == 0, "RowSketch: beside given directions test_size must be 0, got ", q);
  return config;
}

RowSketch::RowSketch(const SketchConfig &config, const float *origin, const float *directions,
                     std::unique_ptr<SketchMath> math, Poll &poll)
    : config_(config),
      origin_(origin == nullptr ? std::vector<float>() : std::vector<float>(origin, origin + config.num_features)),
      math_(std::move(math)),
      sums_(math_->no_rows()),
      held_(std::make_unique<HeldRows>(config_.num_features)) {
  const ptrdiff_t p = config_.num_features;
  check(origin == nullptr || !config.choose_origin, "RowSketch: origin must be None where one is to be chosen");
  if (origin != nullptr) squares_of("RowSketch", "origin", {origin, 1, p}, 0, nullptr, poll);
  if (directions != nullptr) {
    squares_of("RowSketch", "directions", {directions, config_.range_size, p}, 0, nullptr, poll);
  }
}

RowSketch::RowSketch(const RowSketch &other, std::shared_ptr<SketchSums> sums)
    : config_(other.config_),
      origin_(other.origin_),
      math_(other.math_->another()),
      sums_(std::move(sums)),
      held_(std::make_unique<HeldRows>(config_.num_features)) {}

RowSketch::~RowSketch() = default;

// ---- the origin

// A row (p) in the midst of x: of some rows spread over x, the one with the smallest sum of distances to the others, so
// that a few outliers do not count. Relative to such a row float32 keeps what tells the rows apart.
std::vector<float> RowSketch::central_row(RowView x, Poll &poll) const {
  const ptrdiff_t count = std::min(kCandidates, x.count);
  const RowView rows{x.data, count, x.stride * (x.count / count), x.on_device};
  const std::vector<double> products = math_->products(rows, poll);
  ptrdiff_t best = 0;
  double least = std::numeric_limits<double>::infinity();
  for (ptrdiff_t i = 0; i < count; ++i) {
    double distances = 0.0;
    for (ptrdiff_t j = 0; j < count; ++j) {
      const double squared = products[i * count + i] + products[j * count + j] - 2.0 * products[i * count + j];
      distances += std::sqrt(std::max(squared, 0.0));
    }
    if (distances < least) {
      best = i;
      least = distances;
    }
  }
  std::vector<float> row(config_.num_features);
  math_->copy_rows(rows.part(best, 1), row.data());
  return row;
}

// The origin of a sketch whose rows are all pending.
std::vector<float> RowSketch::origin_of_pending(Poll &poll) const {
  if (!config_.choose_origin || held_->num_pending() == 0) return origin_;
  return central_row(held_->pending(), poll);
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

// Throws std::invalid_argument for the first value of row i of x that is not finite, if there is one.
void RowSketch::check_row_of(const char *where, const char *name, RowView x, ptrdiff_t i, int64_t first) const {
  std::vector<float> row(config_.num_features);
  math_->copy_rows(x.part(i, 1), row.data());
  check_row(where, name, row.data(), first + i, config_.num_features);
}

// Returns the sum of squares of each row less origin. Throws std::invalid_argument where a value is NaN or Inf; the
// message calls the rows `name`, and numbers them from `first` on.
std::vector<double> RowSketch::squares_of(const char *where, const char *name, RowView x, int64_t first,
                                          const float *origin, Poll &poll) const {
  std::vector<double> squares = math_->squares(x, origin, poll);
  for (ptrdiff_t i = 0; i < x.count; ++i) {
    if (!std::isfinite(squares[i])) check_row_of(where, name, x, i, first);
  }
  return squares;
}

// Throws std::invalid_argument where a value is NaN or Inf or a row is far too large, judging by the squares of each
// row.
void RowSketch::check_squares(const char *where, RowView x, int64_t first, const std::vector<double> &squares) const {
  for (ptrdiff_t i = 0; i < x.count; ++i) {
    if (squares[i] < kMaxSquares) continue;
    check_row_of(where, "X", x, i, first);
    check(false, where, ": X is too large for float32 sums: the squares of row ", first + i, " sum to ", squares[i],
          ", which must stay below ", kMaxSquares);
  }
}

// Returns the sum of squares of each row. Throws std::invalid_argument where a row cannot be taken.
std::vector<double> RowSketch::checked(RowView x, int64_t first, Poll &poll) const {
  std::vector<double> squares = squares_of("partial_fit", "X", x, first, origin_or_null(), poll);
  check_squares("partial_fit", x, first, squares);
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
  sums_ = math_->copy(*sums_, poll);
}

std::unique_ptr<SketchBlock> RowSketch::begin_block(RowView x, Poll &poll) {
  own_sums(poll);
  if (config_.choose_origin && sums_->rows == 0) origin_ = central_row(x, poll);
  return math_->begin_block(x, origin_or_null(), *sums_);
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
    const RowView rest = x.part(taken, std::min(x.count - taken, kBlockRows - held_->num_pending()));
    // The first block is kept as it is until another row comes: until then all results are exact.
    const bool alone = nothing_summed() && taken + rest.count == x.count;
    if (rest.count == kBlockRows && !alone) {
      take_block(rest, first_row + taken, poll);
    } else {
      if (!known) squares = checked(rest, first_row + taken, poll);
      held_->keep(rest, squares.data() + (known ? taken : 0), *math_);
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
  check_squares("partial_fit", x, first_row, block->squares());
  check_sum("partial_fit", total(block->squares()));
  try {
    block->advance(block->steps(), true, poll);
  } catch (const Interrupted &) {  // the sums hold a part of it: keep the rows, for the steps that are left
    held_->hold(std::move(block), *math_);
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
  const auto columns_of = [&](size_t i, ptrdiff_t begin, ptrdiff_t count) { return x.part(begin, count, starts[i]); };
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

// Adds the other's sums to ours, about our origin: a row d of theirs becomes d + shift, and its y becomes y + step with
// step = [shift Omega, shift Omega', 0].
void RowSketch::add_sums(const RowSketch &other, Poll &poll) {
  if (config_.choose_origin && sums_->rows == 0) origin_ = other.origin_;
  const ptrdiff_t p = config_.num_features, outputs = config_.outputs(), last = outputs - 1;
  std::vector<float> shift(p), step(outputs);  // from our origin to theirs
  for (ptrdiff_t c = 0; c < p; ++c) {
    shift[c] = (other.origin_.empty() ? 0.0f : other.origin_[c]) - (origin_.empty() ? 0.0f : origin_[c]);
  }
  double squared = 0.0;
  math_->apply({shift.data(), 1, p}, nullptr, step.data(), &squared, poll);
  const SketchSums &ours = *sums_, &theirs = *other.sums_;
  const std::vector<double> g = math_->read_gram(theirs);
  const auto rows = static_cast<double>(theirs.rows);
  const auto sum_of_y = [&](ptrdiff_t j) { return g[j * outputs + last]; };
  std::vector<double> gram = math_->read_gram(ours), sum_of_d(p);
  for (ptrdiff_t j = 0; j < outputs; ++j) {
    const double own_step = step[j];
    for (ptrdiff_t i = 0; i < outputs; ++i) {
      const double other_step = step[i];
      gram[j * outputs + i] +=
          g[j * outputs + i] + own_step * sum_of_y(i) + other_step * sum_of_y(j) + own_step * other_step * rows;
    }
  }
  const std::shared_ptr<SketchSums> both = math_->merged(ours, theirs, shift.data(), step.data(), gram, poll);
  math_->read_co_range(theirs, last, 1, sum_of_d.data(), poll);
  const double across = std::inner_product(shift.begin(), shift.end(), sum_of_d.begin(), 0.0);
  both->squares = ours.squares + (theirs.squares + 2.0 * across + rows * squared);
  both->rows = ours.rows + theirs.rows;
  both->range_rows = ours.range_rows;
  for (const auto &block : theirs.range_rows) {
    poll(0);
    auto moved = std::make_shared<std::vector<float>>(*block);
    for (size_t i = 0; i < moved->size(); ++i) (*moved)[i] += step[i % config_.range_size];
    both->range_rows.push_back(std::move(moved));
  }
  sums_ = both;
}

// Takes the other's pending rows.
void RowSketch::add_pending(const RowSketch &other, Poll &poll) {
  const RowView rows = other.held_->pending();
  const std::vector<double> squares = squares_of("merge", "other", rows, 0, origin_or_null(), poll);
  for (ptrdiff_t i = 0; i < rows.count; ++i) {
    if (held_->num_pending() == kBlockRows) take_pending(poll);
    held_->keep(rows.part(i, 1), &squares[i], *math_);
  }
}

// A sketch with all rows but those of a block on its way. It shares the sums until either sketch changes them.
std::unique_ptr<RowSketch> RowSketch::copy() const {
  std::unique_ptr<RowSketch> copy(new RowSketch(*this, sums_));
  if (held_->num_pending() > 0) copy->held_->keep(held_->pending(), held_->pending_squares().data(), *math_);
  return copy;
}

std::unique_ptr<RowSketch> RowSketch::snapshot(bool settled, Poll &poll) {
  const InUse::Hold hold(in_use_, "snapshot", kObject);
  held_->release(poll);
  std::unique_ptr<RowSketch> snapshot = copy();
  if (held_->num_pending() > 0 && settled) snapshot->take_pending(poll);
  return snapshot;
}

void RowSketch::restore(const SavedSums &saved, RowView pending, Poll &poll) {
  const InUse::Hold hold(in_use_, "restore", kObject);
  check(pending.count <= kBlockRows, "restore: there must be at most ", kBlockRows, " pending rows, got ",
        pending.count);
  const std::vector<double> squares = squares_of("restore", "pending", pending, 0, origin_or_null(), poll);
  check_squares("restore", pending, 0, squares);
  check(saved.squares >= 0.0, "restore: squares must be >= 0, got ", saved.squares);
  check(saved.squares + total(squares) < kMaxSquares, "restore: all rows together are too large for float32 sums");
  std::shared_ptr<SketchSums> sums = math_->restored(saved.co_range, saved.gram, poll);
  sums->squares = saved.squares;
  sums->rows = saved.rows;
  const float *const y = saved.range_rows;
  sums->range_rows.push_back(std::make_shared<const std::vector<float>>(y, y + saved.rows * config_.range_size));
  auto held = std::make_unique<HeldRows>(config_.num_features);
  if (pending.count > 0) held->keep(pending, squares.data(), *math_);
  held_ = std::move(held);
  sums_ = std::move(sums);
}

// ---- reading

// Whether all rows are pending.
bool RowSketch::nothing_summed() const noexcept { return sums_->rows == 0 && !held_->has_block(); }

bool RowSketch::exact() const {
  const InUse::Hold hold(in_use_, "exact", kObject);
  return nothing_summed();
}

bool RowSketch::directed() const noexcept { return math_->directed(); }

int64_t RowSketch::num_rows() const {
  const InUse::Hold hold(in_use_, "num_rows", kObject);
  return sums_->rows + held_->count();
}

void RowSketch::apply(RowView x, float *out, Poll &poll) const {
  const InUse::Hold hold(in_use_, "apply", kObject);
  for_each_piece(x, [&](RowView piece, ptrdiff_t begin) {
    std::vector<double> squares(piece.count);
    math_->apply(piece, nullptr, out + begin * (config_.outputs() - 1), squares.data(), poll);
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
    for (ptrdiff_t c = 0; c < p; ++c) rows[i * p + c] = pending.row(i)[c] - (origin.empty() ? 0.0f : origin[c]);
  }
  return rows;
}

double RowSketch::squares(Poll &poll) {
  const InUse::Hold hold(in_use_, "squares", kObject);
  held_->release(poll);
  return sums_->squares;
}

std::vector<double> RowSketch::gram(Poll &poll) {
  const InUse::Hold hold(in_use_, "gram", kObject);
  held_->release(poll);
  return math_->read_gram(*sums_);
}

void RowSketch::read_co_range(ptrdiff_t first, ptrdiff_t count, double *out, Poll &poll) {
  const InUse::Hold hold(in_use_, "co_range", kObject);
  held_->release(poll);
  math_->read_co_range(*sums_, first, count, out, poll);
}

std::vector<float> RowSketch::pending(Poll &poll) const {
  const InUse::Hold hold(in_use_, "pending", kObject);
  return held_->copy_pending(poll);
}

std::vector<float> RowSketch::directions(Poll &poll) const {
  const InUse::Hold hold(in_use_, "directions", kObject);
  return math_->directions(poll);
}

void RowSketch::combine_co_range(const double *weights, ptrdiff_t r, float *out, Poll &poll) {
  const InUse::Hold hold(in_use_, "combine", kObject);
  held_->release(poll);
  math_->combine(*sums_, weights, r, out, poll);
}

std::vector<float> RowSketch::range_rows(Poll &poll) {
  const InUse::Hold hold(in_use_, "range_rows", kObject);
  held_->release(poll);
  const ptrdiff_t l = config_.range_size, mapped = config_.outputs() - 1;
  const RowView pending = held_->pending();
  std::vector<float> rows;
  rows.reserve((sums_->rows + pending.count) * l);
  for (const auto &block : sums_->range_rows) {
    poll(0);
    rows.insert(rows.end(), block->begin(), block->end());
  }
  if (pending.count > 0) {
    std::vector<float> y(pending.count * mapped);
    std::vector<double> squares(pending.count);
    math_->apply(pending, origin_or_null(), y.data(), squares.data(), poll);
    for (ptrdiff_t i = 0; i < pending.count; ++i) {
      rows.insert(rows.end(), y.begin() + i * mapped, y.begin() + i * mapped + l);
    }
  }
  return rows;
}

}  // namespace tipl
