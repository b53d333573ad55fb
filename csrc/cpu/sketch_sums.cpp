#include "cpu/sketch_sums.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "cpu/isa.h"
#include "cpu/row_checks.h"
#include "cpu/row_products.h"
#include "cpu/sketch_kernels.h"

namespace tipl {
namespace {

constexpr ptrdiff_t kUpdatePanels = 4;  // of kUpdateColumns each: the columns of C that a thread takes at once
constexpr ptrdiff_t kSpreadRows = 128;  // rows of the next block over which adding a block to C is spread

}  // namespace

// ---- sums

SketchSums::SketchSums(const SketchConfig &config)
    : co_range({config.outputs(), config.num_features}), gram({config.outputs(), config.outputs()}) {}

std::shared_ptr<SketchSums> SketchSums::copy(const SketchConfig &config, ThreadPool &pool, Poll &poll) const {
  auto copy = std::make_shared<SketchSums>(config);
  const ptrdiff_t size = config.outputs() * config.num_features;
  for_each_run(pool, poll, size, 1.0, [&](ptrdiff_t begin, ptrdiff_t end) {
    std::copy(co_range.data() + begin, co_range.data() + end, copy->co_range.data() + begin);
  });
  std::copy_n(gram.data(), config.outputs() * config.outputs(), copy->gram.data());
  copy->squares = squares;
  copy->rows = rows;
  copy->range_rows = range_rows;
  return copy;
}

// A row d of theirs becomes d + shift, and its y becomes y + step with step = [shift Omega, shift Omega', 0].
std::shared_ptr<SketchSums> SketchSums::merged(const SketchSums &ours, const SketchSums &theirs,
                                               const std::vector<float> &shift, const SketchConfig &config,
                                               const Projection &projection, ThreadPool &pool, Poll &poll) {
  constexpr ptrdiff_t kColumns = 1 << 16;  // of a row of C, that a thread takes at once
  const ptrdiff_t p = config.num_features, outputs = config.outputs(), last = outputs - 1;
  AlignedFloats step({1, projection.y_stride()});
  double squared = 0.0;
  projection.apply_to_group({shift.data(), 1, p}, 0, nullptr, step.data(), &squared, 0, poll);
  step.data()[last] = 0.0f;
  const double *const g = theirs.gram.data(), *const sum_of_d = theirs.co_range.data() + last * p;
  const double rows = g[last * outputs + last];
  const auto sum_of_y = [&](ptrdiff_t j) { return g[j * outputs + last]; };
  auto both = std::make_shared<SketchSums>(config);
  const ptrdiff_t tiles = (p + kColumns - 1) / kColumns;
  for_each_item(pool, poll, outputs * tiles, [&](int, ptrdiff_t item) {
    const ptrdiff_t j = item / tiles, begin = item % tiles * kColumns, end = std::min(p, begin + kColumns);
    const double own_step = step.data()[j];
    const double *const from = theirs.co_range.data() + j * p, *const onto = ours.co_range.data() + j * p;
    double *const to = both->co_range.data() + j * p;
    for (ptrdiff_t c = begin; c < end; ++c) {
      to[c] = onto[c] + (from[c] + sum_of_y(j) * shift[c] + own_step * (sum_of_d[c] + rows * shift[c]));
    }
    for (ptrdiff_t i = 0; begin == 0 && i < outputs; ++i) {
      const double other_step = step.data()[i];
      both->gram.data()[j * outputs + i] =
          ours.gram.data()[j * outputs + i] +
          (g[j * outputs + i] + own_step * sum_of_y(i) + other_step * sum_of_y(j) + own_step * other_step * rows);
    }
  });
  const double across = std::inner_product(shift.begin(), shift.end(), sum_of_d, 0.0);
  both->squares = ours.squares + (theirs.squares + 2.0 * across + rows * squared);
  both->rows = ours.rows + theirs.rows;
  both->range_rows = ours.range_rows;
  for (const auto &block : theirs.range_rows) {
    poll(0);
    auto moved = std::make_shared<std::vector<float>>(*block);
    for (size_t i = 0; i < moved->size(); ++i) (*moved)[i] += step.data()[i % config.range_size];
    both->range_rows.push_back(std::move(moved));
  }
  return both;
}

// ---- a block of rows

SketchBlock::SketchBlock(RowView x, const float *origin, const SketchConfig &config, const Projection &projection,
                         SketchSums &sums, ThreadPool &pool)
    : x_(x),
      origin_(origin),
      num_features_(config.num_features),
      range_size_(config.range_size),
      outputs_(config.outputs()),
      projection_(projection),
      sums_(sums),
      pool_(pool),
      kernels_(sketch_kernels()),
      y_({x.count, projection.y_stride()}),
      squares_(x.count),
      packed_({x.count, round_up(outputs_, kUpdateOutputs)}) {
  for (int rank = 0; rank < pool_.size(); ++rank) {
    scratch_.push_back(AlignedFloats({kUpdatePanels, kUpdateRows, kUpdateColumns}));
  }
}

ptrdiff_t SketchBlock::steps_due(ptrdiff_t rows) const noexcept {
  const ptrdiff_t before = map_steps() + 1, spread = std::min(rows - before, kSpreadRows);
  if (spread <= 0) return rows;
  return rows - before > kSpreadRows ? steps() : before + column_runs() * spread / kSpreadRows;
}

void SketchBlock::advance(ptrdiff_t until, bool threaded, Poll &poll) {
  ptrdiff_t stage_end = 0;
  const auto stage = [&](ptrdiff_t size, const auto &step) {  // step(rank, item) for those of its items that are due
    const ptrdiff_t stage_begin = stage_end, begin = std::max(steps_done_, stage_begin) - stage_begin;
    const ptrdiff_t due = std::min(until - stage_begin, size) - begin;
    stage_end += size;
    ptrdiff_t done = 0;
    if (threaded && due > 1) {
      done = for_each_item_until(pool_, poll, due, [&](int rank, ptrdiff_t item) { step(rank, begin + item); });
    } else {
      for (; done < due && !poll.stopped(0); ++done) step(0, begin + done);
    }
    steps_done_ += done;
    if (done < due) throw Interrupted();
  };
  const ptrdiff_t num_groups = map_steps();
  stage(num_groups, [&](int rank, ptrdiff_t group) {
    if (sums_.rows == 0) {  // writing to memory for the first time takes as long as computing
      const ptrdiff_t size = outputs_ * num_features_;
      double *const co_range = sums_.co_range.data();
      std::fill(co_range + group * size / num_groups, co_range + (group + 1) * size / num_groups, 0.0);
    }
    projection_.apply_to_group(x_, group, origin_, y_.data(), squares_.data(), rank, poll);
  });
  stage(1, [&](int, ptrdiff_t) {
    for (ptrdiff_t i = 0; i < x_.count; ++i) y_.data()[i * projection_.y_stride() + outputs_ - 1] = 1.0f;
    pack();
  });
  stage(column_runs(), [&](int rank, ptrdiff_t run) { add_co_range(run, rank); });
  stage(1, [&](int, ptrdiff_t) { add_rest(poll); });
}

void SketchBlock::pack() {
  const ptrdiff_t rows = x_.count, stride = round_up(outputs_, kUpdateOutputs);
  for (ptrdiff_t first = 0; first < rows; first += kUpdateRows) {
    const ptrdiff_t count = std::min(kUpdateRows, rows - first);
    float *const run = packed_.data() + first * stride;
    for (ptrdiff_t i = 0; i < count; ++i) {
      for (ptrdiff_t j = 0; j < outputs_; ++j) {
        run[(j / kUpdateOutputs * count + i) * kUpdateOutputs + j % kUpdateOutputs] =
            y_.data()[(first + i) * projection_.y_stride() + j];
      }
    }
  }
}

// Runs of kUpdatePanels * kUpdateColumns columns.
ptrdiff_t SketchBlock::column_runs() const noexcept {
  constexpr ptrdiff_t kWidth = kUpdatePanels * kUpdateColumns;
  return (num_features_ + kWidth - 1) / kWidth;
}

// C += y^T d in a run of columns.
void SketchBlock::add_co_range(ptrdiff_t run, int rank) {
  constexpr ptrdiff_t kWidth = kUpdatePanels * kUpdateColumns;
  const RowView x = x_;
  const ptrdiff_t p = num_features_, rows = x.count, stride = round_up(outputs_, kUpdateOutputs);
  const ptrdiff_t begin = run * kWidth, end = std::min(begin + kWidth, p);
  const float *const origin = origin_;
  double *const co_range = sums_.co_range.data();
  // What this thread is likely to read next, a panel each.
  const ptrdiff_t next = begin + pool_.size() * kWidth < p ? pool_.size() * kWidth : 0;
  const auto panel_of = [&](ptrdiff_t c) {
    return scratch_[rank].data() + (c - begin) / kUpdateColumns * kUpdateRows * kUpdateColumns;
  };
  for (ptrdiff_t first = 0; first < rows; first += kUpdateRows) {
    const ptrdiff_t count = std::min(kUpdateRows, rows - first);
    for (ptrdiff_t i = 0; i < count; ++i) {
      for (ptrdiff_t c = begin; c < end; c += kUpdateColumns) {
        kernels_.subtract(x.row(first + i) + c, origin == nullptr ? nullptr : origin + c,
                          std::min(kUpdateColumns, end - c), panel_of(c) + i * kUpdateColumns);
      }
    }
    const float *const y = packed_.data() + first * stride;
    const ptrdiff_t ahead = first + kUpdateRows < rows ? first + kUpdateRows : 0;
    for (ptrdiff_t c = begin; c < end; c += kUpdateColumns) {
      const bool whole = c + kUpdateColumns <= end;
      AlignedArray<double> edge({whole ? 0 : outputs_, kUpdateColumns});  // beyond the last columns there is no C
      kernels_.update(y, panel_of(c), count, outputs_, x.row(ahead) + c + (ahead == 0 ? next : 0), x.stride,
                      whole ? co_range + c : edge.data(), whole ? p : kUpdateColumns);
      for (ptrdiff_t j = 0; j < (whole ? 0 : outputs_); ++j) {
        for (ptrdiff_t i = 0; i < end - c; ++i) co_range[j * p + c + i] += edge.data()[j * kUpdateColumns + i];
      }
    }
  }
}

// G += y^T y, and what else is kept of the rows.
void SketchBlock::add_rest(Poll &poll) {
  const ptrdiff_t rows = x_.count, l = range_size_;
  AlignedFloats transposed({outputs_, rows});
  for (ptrdiff_t i = 0; i < rows; ++i) {
    for (ptrdiff_t j = 0; j < outputs_; ++j)
      transposed.data()[j * rows + i] = y_.data()[i * projection_.y_stride() + j];
  }
  const RowView view{transposed.data(), outputs_, rows};
  AlignedArray<double> added({outputs_, outputs_});
  products_of(pool_, poll, view, view, nullptr, rows, true, added.data());
  auto range = std::make_shared<std::vector<float>>(rows * l);
  for (ptrdiff_t i = 0; i < rows; ++i) std::copy_n(y_.data() + i * projection_.y_stride(), l, range->data() + i * l);
  sums_.range_rows.push_back(std::move(range));
  for (ptrdiff_t i = 0; i < outputs_ * outputs_; ++i) sums_.gram.data()[i] += added.data()[i];
  sums_.squares += total(squares_);
  sums_.rows += rows;
}

}  // namespace tipl
