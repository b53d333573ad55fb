#include "cpu/cpu_sketch.h"

#include <algorithm>
#include <utility>

#include "cpu/isa.h"
#include "cpu/row_products.h"
#include "cpu/sketch_kernels.h"
#include "row_checks.h"

namespace tipl {
namespace {

constexpr ptrdiff_t kUpdatePanels = 4;  // of kUpdateColumns each: the columns of C that a thread takes at once
constexpr ptrdiff_t kSpreadRows = 128;  // rows of the next block over which adding a block to C is spread

const CpuSketchSums &ours(const SketchSums &sums) noexcept { return static_cast<const CpuSketchSums &>(sums); }

}  // namespace

// ---- sums

CpuSketchSums::CpuSketchSums(const SketchConfig &config)
    : co_range({config.outputs(), config.num_features}), gram({config.outputs(), config.outputs()}) {}

std::shared_ptr<SketchSums> CpuSketchMath::no_rows() { return std::make_shared<CpuSketchSums>(config_); }

std::shared_ptr<SketchSums> CpuSketchMath::copy(const SketchSums &sums, Poll &poll) {
  const CpuSketchSums &from = ours(sums);
  auto copy = std::make_shared<CpuSketchSums>(config_);
  const ptrdiff_t size = config_.outputs() * config_.num_features;
  for_each_run(*pool_, poll, size, 1.0, [&](ptrdiff_t begin, ptrdiff_t end) {
    std::copy(from.co_range.data() + begin, from.co_range.data() + end, copy->co_range.data() + begin);
  });
  std::copy_n(from.gram.data(), config_.outputs() * config_.outputs(), copy->gram.data());
  copy->squares = from.squares;
  copy->rows = from.rows;
  copy->range_rows = from.range_rows;
  return copy;
}

std::shared_ptr<SketchSums> CpuSketchMath::restored(const double *co_range, const double *gram, Poll &poll) {
  const ptrdiff_t p = config_.num_features, outputs = config_.outputs();
  auto sums = std::make_shared<CpuSketchSums>(config_);
  for (ptrdiff_t j = 0; j < outputs; ++j) {
    poll(0);
    std::copy_n(co_range + j * p, p, sums->co_range.data() + j * p);
  }
  std::copy_n(gram, outputs * outputs, sums->gram.data());
  return sums;
}

std::shared_ptr<SketchSums> CpuSketchMath::merged(const SketchSums &our_sums, const SketchSums &their_sums,
                                                  const float *shift, const float *step,
                                                  const std::vector<double> &gram, Poll &poll) {
  constexpr ptrdiff_t kColumns = 1 << 16;  // of a row of C, that a thread takes at once
  const CpuSketchSums &our = ours(our_sums), &their = ours(their_sums);
  const ptrdiff_t p = config_.num_features, outputs = config_.outputs(), last = outputs - 1;
  const double *const g = their.gram.data(), *const sum_of_d = their.co_range.data() + last * p;
  const double rows = g[last * outputs + last];
  auto both = std::make_shared<CpuSketchSums>(config_);
  const ptrdiff_t tiles = (p + kColumns - 1) / kColumns;
  for_each_item(*pool_, poll, outputs * tiles, [&](int, ptrdiff_t item) {
    const ptrdiff_t j = item / tiles, begin = item % tiles * kColumns, end = std::min(p, begin + kColumns);
    const double sum_of_y = g[j * outputs + last], own_step = step[j];
    const double *const from = their.co_range.data() + j * p, *const onto = our.co_range.data() + j * p;
    double *const to = both->co_range.data() + j * p;
    for (ptrdiff_t c = begin; c < end; ++c) {
      to[c] = onto[c] + (from[c] + sum_of_y * shift[c] + own_step * (sum_of_d[c] + rows * shift[c]));
    }
  });
  std::copy(gram.begin(), gram.end(), both->gram.data());
  return both;
}

void CpuSketchMath::read_co_range(const SketchSums &sums, ptrdiff_t first, ptrdiff_t count, double *out, Poll &poll) {
  constexpr ptrdiff_t kRun = 1 << 20;
  const ptrdiff_t size = count * config_.num_features;
  const double *const from = ours(sums).co_range.data() + first * config_.num_features;
  for (ptrdiff_t begin = 0; begin < size; begin += kRun) {
    poll(0);
    std::copy_n(from + begin, std::min(kRun, size - begin), out + begin);
  }
}

std::vector<double> CpuSketchMath::read_gram(const SketchSums &sums) {
  const double *const gram = ours(sums).gram.data();
  return std::vector<double>(gram, gram + config_.outputs() * config_.outputs());
}

void CpuSketchMath::combine(const SketchSums &sums, const double *weights, ptrdiff_t r, float *out, Poll &poll) {
  std::vector<const double *> rows(config_.outputs());
  for (size_t j = 0; j < rows.size(); ++j) rows[j] = ours(sums).co_range.data() + j * config_.num_features;
  combine_rows(*pool_, poll, rows, config_.num_features, weights, r, out);
}

// ---- rows

CpuSketchMath::CpuSketchMath(const SketchConfig &config, const float *directions, int num_threads, Poll &poll)
    : config_(check_sketch(config, directions)),
      pool_(std::make_unique<ThreadPool>(num_threads)),
      projection_(directions == nullptr ? std::make_shared<Projection>(config_, *pool_, poll)
                                        : std::make_shared<Projection>(config_, directions, *pool_, poll)) {}

CpuSketchMath::CpuSketchMath(const SketchConfig &config, std::shared_ptr<const Projection> projection, int num_threads)
    : config_(config), pool_(std::make_unique<ThreadPool>(num_threads)), projection_(std::move(projection)) {}

std::unique_ptr<SketchMath> CpuSketchMath::another() const {
  return std::unique_ptr<SketchMath>(new CpuSketchMath(config_, projection_, pool_->size()));
}

std::vector<float> CpuSketchMath::directions(Poll &poll) { return projection_->directions(*pool_, poll); }

std::vector<double> CpuSketchMath::squares(RowView x, const float *origin, Poll &poll) {
  return row_squares(*pool_, poll, x, origin, config_.num_features);
}

void CpuSketchMath::apply(RowView x, const float *origin, float *y, double *squares, Poll &poll) {
  const ptrdiff_t mapped = config_.outputs() - 1, stride = projection_->y_stride();
  AlignedFloats padded({x.count, stride});
  projection_->apply(x, origin, padded.data(), squares, *pool_, poll);
  for (ptrdiff_t i = 0; i < x.count; ++i) std::copy_n(padded.data() + i * stride, mapped, y + i * mapped);
}

std::vector<double> CpuSketchMath::products(RowView x, Poll &poll) {
  std::vector<double> out(x.count * x.count);
  products_of(*pool_, poll, x, x, x.data, config_.num_features, true, out.data());
  return out;
}

void CpuSketchMath::copy_rows(RowView x, float *to) {
  for (ptrdiff_t i = 0; i < x.count; ++i) std::copy_n(x.row(i), config_.num_features, to + i * config_.num_features);
}

std::unique_ptr<SketchBlock> CpuSketchMath::begin_block(RowView x, const float *origin, SketchSums &sums) {
  return std::make_unique<CpuSketchBlock>(x, origin, config_, *projection_, static_cast<CpuSketchSums &>(sums), *pool_);
}

// ---- a block of rows

CpuSketchBlock::CpuSketchBlock(RowView x, const float *origin, const SketchConfig &config, const Projection &projection,
                               CpuSketchSums &sums, ThreadPool &pool)
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

ptrdiff_t CpuSketchBlock::steps_due(ptrdiff_t rows) const noexcept {
  const ptrdiff_t before = map_steps() + 1, spread = std::min(rows - before, kSpreadRows);
  if (spread <= 0) return rows;
  return rows - before > kSpreadRows ? steps() : before + column_runs() * spread / kSpreadRows;
}

void CpuSketchBlock::advance(ptrdiff_t until, bool threaded, Poll &poll) {
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

void CpuSketchBlock::pack() {
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
ptrdiff_t CpuSketchBlock::column_runs() const noexcept {
  constexpr ptrdiff_t kWidth = kUpdatePanels * kUpdateColumns;
  return (num_features_ + kWidth - 1) / kWidth;
}

// C += y^T d in a run of columns.
void CpuSketchBlock::add_co_range(ptrdiff_t run, int rank) {
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
void CpuSketchBlock::add_rest(Poll &poll) {
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
