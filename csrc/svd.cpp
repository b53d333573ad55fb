#include "svd.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <numeric>
#include <type_traits>
#include <utility>

#include "check.h"
#include "isa.h"
#include "rng.h"

namespace tipl {
namespace {

constexpr ptrdiff_t kBlockRows = 256;         // b; C is read and written once a block
constexpr ptrdiff_t kNonzeros = 4;            // of a column of A in Omega: from 4 on more did not lower any error
constexpr ptrdiff_t kTestNonzeros = 2;        // and in Omega'
constexpr ptrdiff_t kUpdatePanels = 4;        // of kUpdateColumns each: what a thread takes of C at once
constexpr ptrdiff_t kDirectionColumns = 512;  // columns of the directions that stay in the L2 cache
constexpr ptrdiff_t kDirectedRows = 64;       // rows that the directions are read once for
constexpr ptrdiff_t kColumnTile = 128;        // columns that a thread takes at once where rows are combined
constexpr ptrdiff_t kSpreadRows = 128;        // of the next block, that the update of C by one is spread over
constexpr double kMaxSquares = 1.0e30;        // products of sums of so large rows stay within float32

// Throws std::invalid_argument for the first value of row i that is not finite, if any.
void check_row(const char *where, const char *name, const float *row, int64_t i, ptrdiff_t p) {
  const ptrdiff_t j = std::find_if_not(row, row + p, [](float value) { return std::isfinite(value); }) - row;
  check(j == p, where, ": ", name, " must be finite, got ", j < p ? row[j] : 0.0f, " at row ", i, ", column ", j);
}

// Throws std::invalid_argument where a value is NaN or Inf, or a row far too large, as the squares of its row tell.
// x's first row is row `first` to the caller.
void check_squares(const char *where, RowView x, int64_t first, ptrdiff_t p, const std::vector<double> &squares) {
  for (ptrdiff_t i = 0; i < x.count; ++i) {
    if (squares[i] < kMaxSquares) continue;
    check_row(where, "X", x.row(i), first + i, p);
    check(false, where, ": X is too large for float32 sums: the squares of row ", first + i, " sum to ", squares[i],
          ", which must stay below ", kMaxSquares);
  }
}

// Throws std::invalid_argument where a value is NaN or Inf; returns the sum of squares of each row less origin.
std::vector<double> checked_squares(ThreadPool &pool, const char *where, const char *name, RowView x, int64_t first,
                                    const float *origin, ptrdiff_t p) {
  std::vector<double> squares(x.count);
  const Kernels &kernels = tipl::kernels();
  const auto sum = [&](ptrdiff_t begin, ptrdiff_t end) {
    for (ptrdiff_t i = begin; i < end; ++i) squares[i] = kernels.sum_squares(x.row(i), origin, p);
  };
  if (x.count == 1) {  // as rows of a run in the making come: not worth waking threads
    sum(0, 1);
  } else {
    parallel_for(pool, x.count, sum);
  }
  for (ptrdiff_t i = 0; i < x.count; ++i) {
    if (!std::isfinite(squares[i])) check_row(where, name, x.row(i), first + i, p);
  }
  return squares;
}

double total(const std::vector<double> &values) { return std::accumulate(values.begin(), values.end(), 0.0); }

std::vector<const float *> pointers(RowView x) {
  std::vector<const float *> rows(x.count);
  for (ptrdiff_t i = 0; i < x.count; ++i) rows[i] = x.row(i);
  return rows;
}

// Block `index` of the rows, as Kernels::products takes them.
Rows block_of(const std::vector<const float *> &rows, ptrdiff_t index) {
  const ptrdiff_t begin = index * kProductBlock;
  return {rows.data() + begin, std::min<ptrdiff_t>(kProductBlock, std::ssize(rows) - begin)};
}

// out (x.count, y.count) <- (x - origin)(y - origin)^T.
void products_of(ThreadPool &pool, RowView x, RowView y, const float *origin, ptrdiff_t p, bool same, double *out) {
  const std::vector<const float *> left = pointers(x), right = pointers(y);
  const auto blocks = [](ptrdiff_t rows) { return (rows + kProductBlock - 1) / kProductBlock; };
  std::vector<std::pair<ptrdiff_t, ptrdiff_t>> tasks;  // pairs of blocks of rows
  for (ptrdiff_t i = 0; i < blocks(x.count); ++i) {
    for (ptrdiff_t j = 0; j < (same ? i + 1 : blocks(y.count)); ++j) tasks.emplace_back(i, j);
  }
  const Kernels &kernels = tipl::kernels();
  for_each_item(pool, std::ssize(tasks), [&](int, ptrdiff_t task) {
    const auto [i, j] = tasks[task];
    kernels.products(block_of(left, i), block_of(right, j), origin, p, same && i == j,
                     out + (i * y.count + j) * kProductBlock, y.count);
  });
  if (!same) return;
  for (ptrdiff_t i = 0; i < x.count; ++i) {
    for (ptrdiff_t j = 0; j < i; ++j) out[j * x.count + i] = out[i * x.count + j];
  }
}

// out (r, p) <- weights^T rows with weights (rows, r).
template <class T>
void combine_rows(ThreadPool &pool, const std::vector<const T *> &rows, ptrdiff_t p, const double *weights, ptrdiff_t r,
                  float *out) {
  const ptrdiff_t stride = round_up(r, kCombinePadding);
  std::vector<double> padded(rows.size() * stride);
  for (ptrdiff_t i = 0; i < std::ssize(rows); ++i) std::copy_n(weights + i * r, r, padded.data() + i * stride);
  const Kernels &kernels = tipl::kernels();
  for_each_item(pool, (p + kColumnTile - 1) / kColumnTile, [&](int, ptrdiff_t tile) {
    const ptrdiff_t begin = tile * kColumnTile, columns = std::min(kColumnTile, p - begin);
    const auto kernel = [&] {
      if constexpr (std::is_same_v<T, float>)
        return kernels.combine_floats;
      else
        return kernels.combine_doubles;
    }();
    kernel(rows.data(), std::ssize(rows), begin, columns, padded.data(), r, out + begin, p);
  });
}

const SketchConfig &checked_config(const SketchConfig &config) {
  const ptrdiff_t p = config.num_features, l = config.range_size, q = config.test_size;
  check(p >= 1, "RowSketch: X must have at least one column, got ", p);
  check(1 <= l && l <= p, "RowSketch: range_size must lie in [1, p] = [1, ", p, "], got ", l);
  check(q >= 0, "RowSketch: test_size must be >= 0, got ", q);
  return config;
}

}  // namespace

void check_finite_rows(const char *where, RowView x, int64_t first_row, ptrdiff_t p, int num_threads) {
  ThreadPool pool(num_threads);
  checked_squares(pool, where, "X", x, first_row, nullptr, p);
}

void products(const char *where, RowView x, int64_t first_row, RowView y, const float *origin, ptrdiff_t p, bool same,
              double *out, int num_threads) {
  ThreadPool pool(num_threads);
  checked_squares(pool, where, "X", x, first_row, nullptr, p);
  if (origin != nullptr) checked_squares(pool, where, "origin", {origin, 1, p}, 0, nullptr, p);
  products_of(pool, x, y, origin, p, same, out);
}

void combine(RowView x, ptrdiff_t p, const double *weights, ptrdiff_t r, float *out, int num_threads) {
  ThreadPool pool(num_threads);
  combine_rows(pool, pointers(x), p, weights, r, out);
}

// ---- Omega

// What takes a row d (p) to its first l + q outputs.
struct RowSketch::Omega {
  // As Kernels::sketch takes them, for each kSketchColumns columns: (chunks, l + q + 1) and all chunks' codes. Empty
  // where directions are given.
  std::vector<uint32_t> starts;
  std::vector<std::vector<uint16_t>> codes;
  AlignedWords directions;  // for each kDirectionColumns columns, as PackedLinear wants them, zero beyond l
  AlignedFloats bias;       // (l rounded up to N), zero

  static std::shared_ptr<const Omega> of_signs(ThreadPool &pool, const SketchConfig &config);
  static std::shared_ptr<const Omega> of_directions(ThreadPool &pool, const SketchConfig &config,
                                                    const float *directions);
};

std::shared_ptr<const RowSketch::Omega> RowSketch::Omega::of_signs(ThreadPool &pool, const SketchConfig &config) {
  const ptrdiff_t p = config.num_features, l = config.range_size, q = config.test_size, outputs = l + q;
  const ptrdiff_t chunks = (p + kSketchColumns - 1) / kSketchColumns;
  auto omega = std::make_shared<Omega>();
  omega->starts.resize(chunks * (outputs + 1));
  omega->codes.resize(chunks);
  // One entry of every column in `size` outputs, each output with as many as any other but for one: the columns in
  // random order are dealt out to the outputs. Calls add(column, output, negative).
  const auto deal = [&](ptrdiff_t chunk, ptrdiff_t columns, ptrdiff_t stratum, ptrdiff_t size, const auto &add) {
    const auto low = [](uint64_t x) { return static_cast<uint32_t>(x); };
    std::vector<ptrdiff_t> order(columns);
    std::iota(order.begin(), order.end(), 0);
    for (ptrdiff_t i = columns; i-- > 0;) {
      const auto random = philox4x32({low(i), low(chunk), low(static_cast<uint64_t>(chunk) >> 32), low(stratum)},
                                     {low(config.seed), low(config.seed >> 32)});
      std::swap(order[i], order[(uint64_t{random[0]} * static_cast<uint64_t>(i + 1)) >> 32]);  // Fisher and Yates
      // Of more outputs than columns, one of as many as there are to each column.
      const ptrdiff_t output = (i * size + (columns < size ? random[2] % size : 0)) / columns;
      add(order[i], output, random[1] & 1);
    }
  };
  parallel_for(pool, chunks, [&](ptrdiff_t begin, ptrdiff_t end) {
    for (ptrdiff_t chunk = begin; chunk < end; ++chunk) {
      const ptrdiff_t first = chunk * kSketchColumns, columns = std::min(kSketchColumns, p - first);
      std::vector<std::vector<uint16_t>> by_output(outputs);
      // `strata` entries a column in the outputs [from, from + width), one in each part of them.
      const auto fill = [&](ptrdiff_t from, ptrdiff_t width, ptrdiff_t strata, ptrdiff_t tag) {
        for (ptrdiff_t i = 0; i < strata; ++i) {
          const ptrdiff_t part = width * i / strata, size = width * (i + 1) / strata - part;
          deal(chunk, columns, tag + i, size, [&](ptrdiff_t column, ptrdiff_t output, uint32_t negative) {
            by_output[from + part + output].push_back(static_cast<uint16_t>(2 * column + negative));
          });
        }
      };
      if (l == p) {
        for (ptrdiff_t c = 0; c < columns; ++c) by_output[first + c].push_back(static_cast<uint16_t>(2 * c));
      } else {
        fill(0, l, std::min(kNonzeros, l), 0);
      }
      fill(l, q, std::min(kTestNonzeros, q), kNonzeros);
      std::vector<uint16_t> &codes = omega->codes[chunk];
      uint32_t *const starts = &omega->starts[chunk * (outputs + 1)];
      for (ptrdiff_t output = 0; output < outputs; ++output) {
        codes.insert(codes.end(), by_output[output].begin(), by_output[output].end());
        starts[output + 1] = static_cast<uint32_t>(codes.size());
      }
    }
  });
  return omega;
}

std::shared_ptr<const RowSketch::Omega> RowSketch::Omega::of_directions(ThreadPool &pool, const SketchConfig &config,
                                                                        const float *directions) {
  const ptrdiff_t p = config.num_features, l = config.range_size, padded = round_up(l, kernels().lanes);
  auto omega = std::make_shared<Omega>();
  omega->directions = AlignedWords({padded, p});
  omega->bias = AlignedFloats({padded});
  for_each_item(pool, (p + kDirectionColumns - 1) / kDirectionColumns, [&](int, ptrdiff_t chunk) {
    const ptrdiff_t begin = chunk * kDirectionColumns, columns = std::min(kDirectionColumns, p - begin);
    uint32_t *const packed = omega->directions.data() + begin * padded;
    for (ptrdiff_t j = 0; j < l; ++j) {
      const auto [first, stride] = packed_output(j, padded, columns, kernels().group);
      for (ptrdiff_t c = 0; c < columns; ++c) {
        packed[first + c * stride] = std::bit_cast<uint32_t>(directions[j * p + begin + c]);
      }
    }
  });
  return omega;
}

RowSketch::RowSketch(const SketchConfig &config, const float *origin, const float *directions, int num_threads)
    : config_(checked_config(config)),
      outputs_(config.range_size + config.test_size + 1),
      y_stride_(round_up(outputs_, 16)),
      kernels_(kernels()),
      origin_(origin == nullptr ? std::vector<float>() : std::vector<float>(origin, origin + config.num_features)),
      pool_(num_threads),
      sums_(std::make_shared<Sums>()) {
  const ptrdiff_t p = config_.num_features;
  if (origin != nullptr) checked_squares(pool_, "RowSketch", "origin", {origin, 1, p}, 0, nullptr, p);
  if (directions == nullptr) {
    omega_ = Omega::of_signs(pool_, config_);
  } else {
    check(config_.test_size == 0, "RowSketch: beside given directions test_size must be 0, got ", config_.test_size);
    checked_squares(pool_, "RowSketch", "directions", {directions, config_.range_size, p}, 0, nullptr, p);
    omega_ = Omega::of_directions(pool_, config_, directions);
  }
  sums_->co_range = AlignedArray<double>({outputs_, p});
  sums_->gram.resize(outputs_ * outputs_);
}

RowSketch::RowSketch(const RowSketch &other, std::shared_ptr<Sums> sums)
    : config_(other.config_),
      outputs_(other.outputs_),
      y_stride_(other.y_stride_),
      kernels_(other.kernels_),
      origin_(other.origin_),
      pool_(other.pool_.size()),
      omega_(other.omega_),
      sums_(std::move(sums)) {}

// ---- rows to y

// y (rows, y_stride) <- (x - origin) [Omega, Omega'], and the sum of squares of each x - origin.
void RowSketch::apply_to(RowView x, const float *origin, float *y, double *squares) const {
  for_each_item(pool_, groups(x.count), [&](int, ptrdiff_t group) { apply_to_group(x, group, origin, y, squares); });
}

// Rows that are applied together.
ptrdiff_t RowSketch::group_rows() const noexcept { return directed() ? kDirectedRows : kernels_.lanes; }

ptrdiff_t RowSketch::groups(ptrdiff_t rows) const noexcept { return (rows + group_rows() - 1) / group_rows(); }

void RowSketch::apply_to_group(RowView x, ptrdiff_t group, const float *origin, float *y, double *squares) const {
  const ptrdiff_t first = group * group_rows();
  const RowView rows{x.row(first), std::min(group_rows(), x.count - first), x.stride};
  if (directed()) {
    multiply_group(rows, origin, y + first * y_stride_, squares + first);
  } else {
    sketch_group(rows, origin, y + first * y_stride_, squares + first);
  }
}

// Through signs, as many rows at a time as a register has lanes.
void RowSketch::sketch_group(RowView x, const float *origin, float *y, double *squares) const {
  const ptrdiff_t p = config_.num_features, N = kernels_.lanes, mapped = outputs_ - 1;
  AlignedFloats sums({mapped, N});
  for (ptrdiff_t begin = 0; begin < p; begin += kSketchColumns) {
    const float *row[16];
    for (ptrdiff_t i = 0; i < x.count; ++i) row[i] = x.row(i) + begin;
    const ptrdiff_t chunk = begin / kSketchColumns;
    kernels_.sketch(row, x.count, origin == nullptr ? nullptr : origin + begin, std::min(kSketchColumns, p - begin),
                    &omega_->starts[chunk * (mapped + 1)], omega_->codes[chunk].data(), mapped, sums.data(), squares);
  }
  for (ptrdiff_t i = 0; i < x.count; ++i) {
    for (ptrdiff_t j = 0; j < mapped; ++j) y[i * y_stride_ + j] = sums.data()[j * N + i];
  }
}

// Through given directions, in slices of their columns.
void RowSketch::multiply_group(RowView x, const float *origin, float *y, double *squares) const {
  const ptrdiff_t p = config_.num_features, l = config_.range_size, N = kernels_.lanes, panels = (l + N - 1) / N;
  AlignedFloats d({x.count, kDirectionColumns});
  for (ptrdiff_t begin = 0; begin < p; begin += kDirectionColumns) {
    const ptrdiff_t columns = std::min(kDirectionColumns, p - begin);
    const float *const zero_point = origin == nullptr ? nullptr : origin + begin;
    for (ptrdiff_t i = 0; i < x.count; ++i) {
      const float *const row = x.row(i) + begin;
      if (begin + columns < p) {
        for (ptrdiff_t c = 0; c < kDirectionColumns; c += 16) __builtin_prefetch(row + kDirectionColumns + c, 0, 2);
      }
      kernels_.subtract(row, zero_point, columns, d.data() + i * kDirectionColumns);
      squares[i] += kernels_.sum_squares(row, zero_point, columns);
    }
    const PackedLinear layer{Precision::kFloat32,
                             omega_->directions.data() + begin * panels * N,
                             nullptr,
                             omega_->bias.data(),
                             static_cast<int>(columns),
                             static_cast<int>(l)};
    kernels_.linear(layer, 0, panels, d.data(), kDirectionColumns, x.count,
                    begin == 0 ? Epilogue::kStore : Epilogue::kAdd, y, y_stride_);
  }
}

std::vector<float> RowSketch::apply(RowView x) const {
  const std::lock_guard lock(mutex_);
  const ptrdiff_t mapped = outputs_ - 1;
  AlignedFloats y({x.count, y_stride_});
  std::vector<double> squares(x.count);
  apply_to(x, nullptr, y.data(), squares.data());
  std::vector<float> out(x.count * mapped);
  for (ptrdiff_t i = 0; i < x.count; ++i) std::copy_n(y.data() + i * y_stride_, mapped, &out[i * mapped]);
  return out;
}

// ---- a block of rows to the sums, in steps

// At most kBlockRows rows that are on their way into the sums.
struct RowSketch::Block {
  RowView x;
  AlignedFloats y;                     // (rows, y_stride): [d Omega, d Omega', 1] of each row
  std::vector<double> squares;         // of each d
  AlignedFloats packed;                // y as Kernels::update takes it, kUpdateRows rows at a time
  std::vector<AlignedFloats> scratch;  // of each thread
  ptrdiff_t steps_done = 0;
};

RowSketch::~RowSketch() = default;

RowSketch::Block RowSketch::begin_block(RowView x) {
  own_sums();
  Block block{x, AlignedFloats({x.count, y_stride_}), std::vector<double>(x.count), {}, {}};
  block.packed = AlignedFloats({x.count, round_up(outputs_, kUpdateOutputs)});
  for (int rank = 0; rank < pool_.size(); ++rank) {
    block.scratch.push_back(AlignedFloats({kUpdatePanels, kUpdateRows, kUpdateColumns}));
  }
  return block;
}

// Steps of a block: y of a group of rows each, one that packs them, C of some columns each, and the rest of the sums.
ptrdiff_t RowSketch::steps(const Block &block) const noexcept { return groups(block.x.count) + 1 + column_runs() + 1; }

// Of a block's steps those that are done once so many rows of the next have come.
ptrdiff_t RowSketch::steps_due(const Block &block, ptrdiff_t rows) const noexcept {
  const ptrdiff_t before = groups(block.x.count) + 1, spread = std::min(rows - before, kSpreadRows);
  if (spread <= 0) return rows;
  return rows - before > kSpreadRows ? steps(block) : before + column_runs() * spread / kSpreadRows;
}

// Takes the block's steps up to `until`, on all threads or on the calling one alone.
void RowSketch::advance(Block &block, ptrdiff_t until, bool threaded) {
  ptrdiff_t stage_begin = 0;
  const auto stage = [&](ptrdiff_t size, const auto &step) {  // step(rank, item) for those of its items that are due
    const ptrdiff_t begin = std::max(block.steps_done, stage_begin) - stage_begin;
    const ptrdiff_t end = std::min(until - stage_begin, size);
    if (threaded && end - begin > 1) {
      for_each_item(pool_, end - begin, [&](int rank, ptrdiff_t item) { step(rank, begin + item); });
    } else {
      for (ptrdiff_t item = begin; item < end; ++item) step(0, item);
    }
    stage_begin += size;
  };
  const ptrdiff_t num_groups = groups(block.x.count);
  stage(num_groups, [&](int, ptrdiff_t group) {
    if (sums_->rows == 0) {  // writing to memory for the first time takes as long as computing
      const ptrdiff_t size = outputs_ * config_.num_features;
      double *const co_range = sums_->co_range.data();
      std::fill(co_range + group * size / num_groups, co_range + (group + 1) * size / num_groups, 0.0);
    }
    apply_to_group(block.x, group, origin_or_null(), block.y.data(), block.squares.data());
  });
  stage(1, [&](int, ptrdiff_t) {
    for (ptrdiff_t i = 0; i < block.x.count; ++i) block.y.data()[i * y_stride_ + outputs_ - 1] = 1.0f;
    pack(block);
  });
  stage(column_runs(), [&](int rank, ptrdiff_t run) { add_co_range(block, run, rank); });
  if (block.steps_done <= stage_begin && stage_begin < until) add_rest(block);
  block.steps_done = until;
}

void RowSketch::pack(Block &block) const {
  const ptrdiff_t rows = block.x.count, stride = round_up(outputs_, kUpdateOutputs);
  for (ptrdiff_t first = 0; first < rows; first += kUpdateRows) {
    const ptrdiff_t count = std::min(kUpdateRows, rows - first);
    float *const run = block.packed.data() + first * stride;
    for (ptrdiff_t i = 0; i < count; ++i) {
      for (ptrdiff_t j = 0; j < outputs_; ++j) {
        run[(j / kUpdateOutputs * count + i) * kUpdateOutputs + j % kUpdateOutputs] =
            block.y.data()[(first + i) * y_stride_ + j];
      }
    }
  }
}

// Runs of kUpdatePanels * kUpdateColumns columns.
ptrdiff_t RowSketch::column_runs() const noexcept {
  constexpr ptrdiff_t kWidth = kUpdatePanels * kUpdateColumns;
  return (config_.num_features + kWidth - 1) / kWidth;
}

// C += y^T d in a run of columns.
void RowSketch::add_co_range(Block &block, ptrdiff_t run, int rank) {
  constexpr ptrdiff_t kWidth = kUpdatePanels * kUpdateColumns;
  const RowView x = block.x;
  const ptrdiff_t p = config_.num_features, rows = x.count, stride = round_up(outputs_, kUpdateOutputs);
  const ptrdiff_t begin = run * kWidth, end = std::min(begin + kWidth, p);
  const float *const origin = origin_or_null();
  double *const co_range = sums_->co_range.data();
  // What this thread is likely to read next, a panel each.
  const ptrdiff_t next = begin + pool_.size() * kWidth < p ? pool_.size() * kWidth : 0;
  const auto panel_of = [&](ptrdiff_t c) {
    return block.scratch[rank].data() + (c - begin) / kUpdateColumns * kUpdateRows * kUpdateColumns;
  };
  for (ptrdiff_t first = 0; first < rows; first += kUpdateRows) {
    const ptrdiff_t count = std::min(kUpdateRows, rows - first);
    for (ptrdiff_t i = 0; i < count; ++i) {
      for (ptrdiff_t c = begin; c < end; c += kUpdateColumns) {
        kernels_.subtract(x.row(first + i) + c, origin == nullptr ? nullptr : origin + c,
                          std::min(kUpdateColumns, end - c), panel_of(c) + i * kUpdateColumns);
      }
    }
    const float *const y = block.packed.data() + first * stride;
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
void RowSketch::add_rest(const Block &block) {
  const ptrdiff_t rows = block.x.count, l = config_.range_size;
  AlignedFloats transposed({outputs_, rows});
  for (ptrdiff_t i = 0; i < rows; ++i) {
    for (ptrdiff_t j = 0; j < outputs_; ++j) transposed.data()[j * rows + i] = block.y.data()[i * y_stride_ + j];
  }
  const RowView view{transposed.data(), outputs_, rows};
  std::vector<double> added(outputs_ * outputs_);
  products_of(pool_, view, view, nullptr, rows, true, added.data());
  for (size_t i = 0; i < added.size(); ++i) sums_->gram[i] += added[i];
  auto range = std::make_shared<std::vector<float>>(rows * l);
  for (ptrdiff_t i = 0; i < rows; ++i) std::copy_n(block.y.data() + i * y_stride_, l, range->data() + i * l);
  sums_->range_rows.push_back(std::move(range));
  sums_->squares += total(block.squares);
  sums_->rows += rows;
}

// Sees to it that no snapshot shares the sums, which are about to change.
void RowSketch::own_sums() {
  if (sums_.use_count() == 1) return;
  auto copy = std::make_shared<Sums>();
  const ptrdiff_t size = outputs_ * config_.num_features;
  copy->co_range = AlignedArray<double>({size});
  parallel_for(pool_, size, [&](ptrdiff_t begin, ptrdiff_t end) {
    std::copy(sums_->co_range.data() + begin, sums_->co_range.data() + end, copy->co_range.data() + begin);
  });
  copy->gram = sums_->gram;
  copy->squares = sums_->squares;
  copy->rows = sums_->rows;
  copy->range_rows = sums_->range_rows;
  sums_ = std::move(copy);
}

// ---- rows in

// Throws std::invalid_argument unless the squares of all rows, with so much more, stay within float32 sums.
void RowSketch::check_sum(const char *where, double more) const {
  const double squares = sums_->squares + unsettled_squares() + more;
  check(squares < kMaxSquares, where, ": all rows together are too large for float32 sums: their squares sum to ",
        squares, ", which must stay below ", kMaxSquares);
}

// Throws std::invalid_argument where one of the rows cannot be taken, as their squares tell.
void RowSketch::check_rows(RowView x, int64_t first, const std::vector<double> &squares) const {
  check_squares("partial_fit", x, first, config_.num_features, squares);
  check_sum("partial_fit", total(squares));
}

// The squares of each row. Throws std::invalid_argument where one cannot be taken.
std::vector<double> RowSketch::checked(RowView x, int64_t first) const {
  std::vector<double> squares =
      checked_squares(pool_, "partial_fit", "X", x, first, origin_or_null(), config_.num_features);
  check_rows(x, first, squares);
  return squares;
}

// Keeps rows that may be taken, whose squares these are.
void RowSketch::keep(RowView x, const double *squares) {
  const ptrdiff_t p = config_.num_features;
  if (pending_.data() == nullptr) pending_ = AlignedFloats({kBlockRows, p});
  for (ptrdiff_t i = 0; i < x.count; ++i) std::copy_n(x.row(i), p, pending_.data() + (num_pending() + i) * p);
  pending_squares_.insert(pending_squares_.end(), squares, squares + x.count);
}

double RowSketch::unsettled_squares() const noexcept { return held_squares_ + total(pending_squares_); }

// Makes the pending rows the block whose steps are taken while the next rows come.
void RowSketch::hold_pending() {
  release_held();
  std::swap(held_, pending_);
  held_squares_ = total(pending_squares_);
  held_block_ = std::make_unique<Block>(begin_block({held_.data(), num_pending(), config_.num_features}));
  pending_squares_.clear();
}

// Takes all steps that are left of the block that is held, if one is.
void RowSketch::release_held() {
  if (held_block_ == nullptr) return;
  advance(*held_block_, steps(*held_block_), true);
  held_block_.reset();
  held_squares_ = 0.0;
}

void RowSketch::take_pending() {
  hold_pending();
  release_held();
}

bool RowSketch::partial_fit(RowView x, int64_t first_row, bool all_or_none, const Interrupted &interrupted) {
  const std::lock_guard lock(mutex_);
  check(x.count >= 1, "partial_fit: X must have at least one row, got 0");
  std::vector<double> squares;  // of all rows if all_or_none, else of the rest that is taken
  if (all_or_none) squares = checked(x, first_row);
  for (ptrdiff_t taken = 0; taken < x.count;) {
    if (num_pending() == kBlockRows) hold_pending();
    if (taken > 0 && interrupted()) return false;
    const RowView rest{x.row(taken), std::min(x.count - taken, kBlockRows - num_pending()), x.stride};
    // A first block stays as it is until another row comes: so far all is exact.
    const bool alone = none_beyond_pending() && taken + rest.count == x.count;
    if (rest.count == kBlockRows && !alone) {
      release_held();
      Block block = begin_block(rest);
      advance(block, groups(rest.count), true);
      check_rows(rest, first_row + taken, block.squares);
      advance(block, steps(block), true);
    } else {
      if (!all_or_none) squares = checked(rest, first_row + taken);
      keep(rest, squares.data() + (all_or_none ? taken : 0));
      if (held_block_ != nullptr) {
        const ptrdiff_t due = steps_due(*held_block_, num_pending());
        advance(*held_block_, due, x.count > 1);  // as rows of a run in the making come: not worth waking threads
        if (due == steps(*held_block_)) release_held();
      }
    }
    taken += rest.count;
  }
  return true;
}

void RowSketch::settle() {
  const std::lock_guard lock(mutex_);
  release_held();
  if (num_pending() > 0 && sums_->rows > 0) take_pending();
}

bool RowSketch::none_beyond_pending() const noexcept { return sums_->rows == 0 && held_block_ == nullptr; }

bool RowSketch::exact() const {
  const std::lock_guard lock(mutex_);
  return none_beyond_pending();
}

bool RowSketch::directed() const noexcept { return omega_->starts.empty(); }

int64_t RowSketch::num_rows() const {
  const std::lock_guard lock(mutex_);
  return sums_->rows + (held_block_ == nullptr ? 0 : held_block_->x.count) + num_pending();
}

// ---- two sketches

void RowSketch::merge(RowSketch &other) {
  check(this != &other, "merge: other must be another estimator, with rows of its own");
  const std::scoped_lock lock(mutex_, other.mutex_);
  const auto check_same = [](const char *name, auto ours, auto theirs) {
    check(ours == theirs, "merge: other must have ", name, " = ", ours, ", got ", theirs);
  };
  const ptrdiff_t p = config_.num_features, last = outputs_ - 1;
  check_same("n_features_in_", p, other.config_.num_features);
  check_same("range_size", config_.range_size, other.config_.range_size);
  check_same("test_size", config_.test_size, other.config_.test_size);
  check_same("seed", config_.seed, other.config_.seed);
  check(!directed() && !other.directed(), "merge: sketches in given directions do not merge");
  check_sum("merge", other.sums_->squares + other.unsettled_squares());
  release_held();
  other.release_held();
  if (other.sums_->rows > 0) {
    if (num_pending() > 0) take_pending();  // before theirs, as the rows' order is
    // Their rows about our origin: d + shift, and y + step with step = [shift Omega, shift Omega', 0].
    std::vector<float> shift(p);
    for (ptrdiff_t c = 0; c < p; ++c) {
      shift[c] = (other.origin_.empty() ? 0.0f : other.origin_[c]) - (origin_.empty() ? 0.0f : origin_[c]);
    }
    AlignedFloats step({1, y_stride_});
    double squared = 0.0;
    sketch_group({shift.data(), 1, p}, nullptr, step.data(), &squared);
    step.data()[last] = 0.0f;
    const Sums &theirs = *other.sums_;
    own_sums();
    Sums &ours = *sums_;
    const double *const g = theirs.gram.data(), *const sum_of_d = theirs.co_range.data() + last * p;
    const double rows = g[last * outputs_ + last];
    const auto sum_of_y = [&](ptrdiff_t j) { return g[j * outputs_ + last]; };
    parallel_for(pool_, outputs_, [&](ptrdiff_t begin, ptrdiff_t end) {
      for (ptrdiff_t j = begin; j < end; ++j) {
        const double own_step = step.data()[j];
        const double *const from = theirs.co_range.data() + j * p;
        double *const to = ours.co_range.data() + j * p;
        for (ptrdiff_t c = 0; c < p; ++c) {
          to[c] += from[c] + sum_of_y(j) * shift[c] + own_step * (sum_of_d[c] + rows * shift[c]);
        }
        for (ptrdiff_t i = 0; i < outputs_; ++i) {
          const double other_step = step.data()[i];
          ours.gram[j * outputs_ + i] +=
              g[j * outputs_ + i] + own_step * sum_of_y(i) + other_step * sum_of_y(j) + own_step * other_step * rows;
        }
      }
    });
    const double across = std::inner_product(shift.begin(), shift.end(), sum_of_d, 0.0);
    ours.squares += theirs.squares + 2.0 * across + rows * squared;
    ours.rows += theirs.rows;
    for (const auto &block : theirs.range_rows) {
      auto moved = std::make_shared<std::vector<float>>(*block);
      for (size_t i = 0; i < moved->size(); ++i) (*moved)[i] += step.data()[i % config_.range_size];
      ours.range_rows.push_back(std::move(moved));
    }
  }
  const std::vector<double> squares =  // about our origin
      checked_squares(pool_, "merge", "other", other.pending(), 0, origin_or_null(), p);
  for (ptrdiff_t i = 0; i < other.num_pending(); ++i) {
    if (num_pending() == kBlockRows) take_pending();
    keep({other.pending().row(i), 1, p}, &squares[i]);
  }
}

std::unique_ptr<RowSketch> RowSketch::snapshot(bool settled) {
  const std::lock_guard lock(mutex_);
  release_held();
  std::unique_ptr<RowSketch> copy(new RowSketch(*this, sums_));
  if (num_pending() > 0) copy->keep(pending(), pending_squares_.data());
  if (num_pending() > 0 && settled) copy->take_pending();
  return copy;
}

std::vector<float> RowSketch::exact_rows() const {
  const std::lock_guard lock(mutex_);
  if (!none_beyond_pending()) return {};
  const ptrdiff_t p = config_.num_features;
  std::vector<float> rows(num_pending() * p);
  for (ptrdiff_t i = 0; i < num_pending(); ++i) {
    kernels_.subtract(pending().row(i), origin_or_null(), p, &rows[i * p]);
  }
  return rows;
}

// ---- reading

void RowSketch::combine_co_range(const double *weights, ptrdiff_t r, float *out) const {
  const std::lock_guard lock(mutex_);
  std::vector<const double *> rows(outputs_);
  for (ptrdiff_t j = 0; j < outputs_; ++j) rows[j] = sums_->co_range.data() + j * config_.num_features;
  combine_rows(pool_, rows, config_.num_features, weights, r, out);
}

std::vector<float> RowSketch::range_rows() {
  const std::lock_guard lock(mutex_);
  release_held();
  const ptrdiff_t l = config_.range_size;
  std::vector<float> rows;
  rows.reserve((sums_->rows + num_pending()) * l);
  for (const auto &block : sums_->range_rows) rows.insert(rows.end(), block->begin(), block->end());
  if (num_pending() > 0) {
    AlignedFloats y({num_pending(), y_stride_});
    std::vector<double> squares(num_pending());
    apply_to(pending(), origin_or_null(), y.data(), squares.data());
    for (ptrdiff_t i = 0; i < num_pending(); ++i) {
      rows.insert(rows.end(), y.data() + i * y_stride_, y.data() + i * y_stride_ + l);
    }
  }
  return rows;
}

void RowSketch::restore(Sums sums, RowView pending) {
  const std::lock_guard lock(mutex_);
  release_held();
  check(pending.count <= kBlockRows, "restore: there must be at most ", kBlockRows, " pending rows, got ",
        pending.count);
  sums_ = std::make_shared<Sums>(std::move(sums));
  pending_squares_.clear();
  keep(pending, checked(pending, 0).data());
}

}  // namespace tipl
