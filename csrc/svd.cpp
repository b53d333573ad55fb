#include "svd.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <limits>
#include <numeric>
#include <type_traits>
#include <utility>

#include "check.h"
#include "cpu/isa.h"
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
constexpr ptrdiff_t kCombineOutputs = 64;     // and the outputs of theirs
constexpr ptrdiff_t kCheckedRows = 1 << 16;   // rows whose squares are kept at once, while they are only looked at
constexpr ptrdiff_t kCandidates = 16;         // rows that an origin is chosen from
constexpr ptrdiff_t kWideRow = 1 << 20;       // columns from which on products take fewer rows at once,
constexpr ptrdiff_t kWideBlock = 4;           //   so many a side
constexpr ptrdiff_t kMostFeatures = ptrdiff_t{1} << 40, kMostTests = 1024;
constexpr double kStepProducts = 1.0e10;  // multiplications of the rows that groups of columns take in one step
constexpr double kMaxSquares = 1.0e30;    // products of sums of so large rows stay within float32
constexpr double kMinSquare = 1.0e-30;    // mean square of a row's values below which float32 cannot square them

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
std::vector<double> checked_squares(ThreadPool &pool, Poll &poll, const char *where, const char *name, RowView x,
                                    int64_t first, const float *origin, ptrdiff_t p) {
  std::vector<double> squares(x.count);
  const SketchKernels &kernels = sketch_kernels();
  const auto sum = [&](ptrdiff_t begin, ptrdiff_t end) {
    for (ptrdiff_t i = begin; i < end; ++i) squares[i] = kernels.sum_squares(x.row(i), origin, p);
  };
  if (x.count == 1) {  // as rows of a run in the making come: not worth waking threads
    sum(0, 1);
  } else {
    for_each_run(pool, poll, x.count, static_cast<double>(p) / 4, sum);
  }
  for (ptrdiff_t i = 0; i < x.count; ++i) {
    if (!std::isfinite(squares[i])) check_row(where, name, x.row(i), first + i, p);
  }
  return squares;
}

// body(piece, begin) for pieces of x of at most kCheckedRows rows, which begin at row `begin` of it.
template <class Body>
void for_each_piece(RowView x, const Body &body) {
  for (ptrdiff_t begin = 0; begin < x.count; begin += kCheckedRows) {
    body(RowView{x.row(begin), std::min(kCheckedRows, x.count - begin), x.stride}, begin);
  }
}

void check_finite(ThreadPool &pool, Poll &poll, const char *where, const char *name, RowView x, int64_t first,
                  ptrdiff_t p) {
  for_each_piece(x, [&](RowView piece, ptrdiff_t begin) {
    checked_squares(pool, poll, where, name, piece, first + begin, nullptr, p);
  });
}

double total(const std::vector<double> &values) { return std::accumulate(values.begin(), values.end(), 0.0); }

std::vector<const float *> pointers(RowView x) {
  std::vector<const float *> rows(x.count);
  for (ptrdiff_t i = 0; i < x.count; ++i) rows[i] = x.row(i);
  return rows;
}

// out (x.count, y.count) <- (x - origin)(y - origin)^T.
void products_of(ThreadPool &pool, Poll &poll, RowView x, RowView y, const float *origin, ptrdiff_t p, bool same,
                 double *out) {
  const std::vector<const float *> left = pointers(x), right = pointers(y);
  const ptrdiff_t side = p < kWideRow ? kProductBlock : kWideBlock;  // a product of two rows is the same in any block
  const auto blocks = [side](ptrdiff_t rows) { return (rows + side - 1) / side; };
  const auto block_of = [side](const std::vector<const float *> &rows, ptrdiff_t index) {
    return Rows{rows.data() + index * side, std::min(side, std::ssize(rows) - index * side)};
  };
  std::vector<std::pair<ptrdiff_t, ptrdiff_t>> tasks;  // pairs of blocks of rows
  for (ptrdiff_t i = 0; i < blocks(x.count); ++i) {
    for (ptrdiff_t j = 0; j < (same ? i + 1 : blocks(y.count)); ++j) tasks.emplace_back(i, j);
  }
  const SketchKernels &kernels = sketch_kernels();
  for_each_item(pool, poll, std::ssize(tasks), [&](int, ptrdiff_t task) {
    const auto [i, j] = tasks[task];
    kernels.products(block_of(left, i), block_of(right, j), origin, p, same && i == j, out + (i * y.count + j) * side,
                     y.count);
  });
  if (!same) return;
  for (ptrdiff_t i = 0; i < x.count; ++i) {
    poll(0);
    for (ptrdiff_t j = 0; j < i; ++j) out[j * x.count + i] = out[i * x.count + j];
  }
}

// out (r, p) <- weights^T rows with weights (rows, r).
template <class T>
void combine_rows(ThreadPool &pool, Poll &poll, const std::vector<const T *> &rows, ptrdiff_t p, const double *weights,
                  ptrdiff_t r, float *out) {
  const ptrdiff_t pieces = (r + kCombineOutputs - 1) / kCombineOutputs, n = std::ssize(rows);
  const auto outputs_of = [r](ptrdiff_t piece) { return std::min(kCombineOutputs, r - piece * kCombineOutputs); };
  std::vector<std::vector<double>> padded(pieces);  // the weights of kCombineOutputs outputs each
  for (ptrdiff_t piece = 0; piece < pieces; ++piece) {
    const ptrdiff_t outputs = outputs_of(piece), stride = round_up(outputs, kCombinePadding);
    padded[piece].resize(n * stride);
    for (ptrdiff_t i = 0; i < n; ++i) {
      std::copy_n(weights + i * r + piece * kCombineOutputs, outputs, padded[piece].data() + i * stride);
    }
  }
  const SketchKernels &kernels = sketch_kernels();
  const auto kernel = [&] {
    if constexpr (std::is_same_v<T, float>)
      return kernels.combine_floats;
    else
      return kernels.combine_doubles;
  }();
  for_each_item(pool, poll, (p + kColumnTile - 1) / kColumnTile * pieces, [&](int, ptrdiff_t item) {
    const ptrdiff_t begin = item / pieces * kColumnTile, columns = std::min(kColumnTile, p - begin);
    const ptrdiff_t piece = item % pieces;
    kernel(rows.data(), n, begin, columns, padded[piece].data(), outputs_of(piece),
           out + piece * kCombineOutputs * p + begin, p);
  });
}

const SketchConfig &checked_config(const SketchConfig &config) {
  const ptrdiff_t p = config.num_features, l = config.range_size, q = config.test_size;
  check(p >= 1, "RowSketch: X must have at least one column, got ", p);
  check(p <= kMostFeatures, "RowSketch: X must have at most ", kMostFeatures, " columns, got ", p);
  check(1 <= l && l <= p, "RowSketch: range_size must lie in [1, p] = [1, ", p, "], got ", l);
  check(0 <= q && q <= kMostTests, "RowSketch: test_size must lie in [0, ", kMostTests, "], got ", q);
  const auto outputs = static_cast<double>(l + q + 1), columns = static_cast<double>(p);
  check_memory(outputs * (columns + outputs) + 2.0 * columns, sizeof(double));  // C, G and Omega
  return config;
}

}  // namespace

void check_finite_rows(const char *where, RowView x, int64_t first_row, ptrdiff_t p, int num_threads, Poll &poll) {
  ThreadPool pool(num_threads);
  check_finite(pool, poll, where, "X", x, first_row, p);
}

void products(const char *where, RowView x, int64_t first_row, RowView y, const float *origin, ptrdiff_t p, bool same,
              double *out, int num_threads, Poll &poll) {
  ThreadPool pool(num_threads);
  check_finite(pool, poll, where, "X", x, first_row, p);
  if (origin != nullptr) check_finite(pool, poll, where, "origin", {origin, 1, p}, 0, p);
  products_of(pool, poll, x, y, origin, p, same, out);
}

void combine(RowView x, ptrdiff_t p, const double *weights, ptrdiff_t r, float *out, int num_threads, Poll &poll) {
  ThreadPool pool(num_threads);
  combine_rows(pool, poll, pointers(x), p, weights, r, out);
}

// ---- Omega

// What takes a row d (p) to its first l + q outputs.
struct RowSketch::Omega {
  // As SketchKernels::sketch takes them, for each kSketchColumns columns: (chunks, l + q + 1) and all chunks' codes.
  // Empty where directions are given.
  std::vector<uint32_t> starts;
  std::vector<std::vector<uint16_t>> codes;
  AlignedWords directions;  // for each kDirectionColumns columns, as PackedLinear wants them, zero beyond l
  AlignedFloats bias;       // (l rounded up to N), zero

  static std::shared_ptr<const Omega> of_signs(ThreadPool &pool, Poll &poll, const SketchConfig &config);
  static std::shared_ptr<const Omega> of_directions(ThreadPool &pool, Poll &poll, const SketchConfig &config,
                                                    const float *directions);
};

std::shared_ptr<const RowSketch::Omega> RowSketch::Omega::of_signs(ThreadPool &pool, Poll &poll,
                                                                   const SketchConfig &config) {
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
  for_each_item(pool, poll, chunks, [&](int, ptrdiff_t chunk) {
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
  });
  return omega;
}

std::shared_ptr<const RowSketch::Omega> RowSketch::Omega::of_directions(ThreadPool &pool, Poll &poll,
                                                                        const SketchConfig &config,
                                                                        const float *directions) {
  const ptrdiff_t p = config.num_features, l = config.range_size, padded = round_up(l, sketch_kernels().lanes);
  auto omega = std::make_shared<Omega>();
  omega->directions = AlignedWords({padded, p});
  omega->bias = AlignedFloats({padded});
  for_each_item(pool, poll, (p + kDirectionColumns - 1) / kDirectionColumns, [&](int, ptrdiff_t chunk) {
    const ptrdiff_t begin = chunk * kDirectionColumns, columns = std::min(kDirectionColumns, p - begin);
    uint32_t *const packed = omega->directions.data() + begin * padded;
    for (ptrdiff_t j = 0; j < l; ++j) {
      const auto [first, stride] = packed_output(j, padded, columns, sketch_kernels().group);
      for (ptrdiff_t c = 0; c < columns; ++c) {
        packed[first + c * stride] = std::bit_cast<uint32_t>(directions[j * p + begin + c]);
      }
    }
  });
  return omega;
}

RowSketch::RowSketch(const SketchConfig &config, const float *origin, const float *directions, int num_threads,
                     Poll &poll)
    : config_(checked_config(config)),
      outputs_(config.range_size + config.test_size + 1),
      y_stride_(round_up(outputs_, 16)),
      kernels_(sketch_kernels()),
      origin_(origin == nullptr ? std::vector<float>() : std::vector<float>(origin, origin + config.num_features)),
      pool_(num_threads),
      sums_(empty_sums()) {
  const ptrdiff_t p = config_.num_features;
  check(origin == nullptr || !config.choose_origin, "RowSketch: origin must be None where one is to be chosen");
  if (origin != nullptr) check_finite(pool_, poll, "RowSketch", "origin", {origin, 1, p}, 0, p);
  if (directions == nullptr) {
    omega_ = Omega::of_signs(pool_, poll, config_);
  } else {
    check(config_.test_size == 0, "RowSketch: beside given directions test_size must be 0, got ", config_.test_size);
    check_finite(pool_, poll, "RowSketch", "directions", {directions, config_.range_size, p}, 0, p);
    omega_ = Omega::of_directions(pool_, poll, config_, directions);
  }
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

std::shared_ptr<RowSketch::Sums> RowSketch::empty_sums() const {
  auto sums = std::make_shared<Sums>();
  sums->co_range = AlignedArray<double>({outputs_, config_.num_features});
  sums->gram = AlignedArray<double>({outputs_, outputs_});
  return sums;
}

// ---- the origin

// A row in the midst of x: of kCandidates spread over it, the one whose distances to the others sum to the least, so
// that a few that lie far away do not count. Rows about it keep in float32 what tells them apart.
std::vector<float> RowSketch::central_row(RowView x, Poll &poll) const {
  const ptrdiff_t p = config_.num_features, count = std::min(kCandidates, x.count);
  const RowView rows{x.data, count, x.stride * (x.count / count)};
  std::vector<double> products(count * count);
  products_of(pool_, poll, rows, rows, rows.data, p, true, products.data());
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
  return std::vector<float>(rows.row(best), rows.row(best) + p);
}

// The origin of rows that are all pending.
std::vector<float> RowSketch::origin_of_pending(Poll &poll) const {
  if (!config_.choose_origin || num_pending() == 0) return origin_;
  return central_row(pending_view(), poll);
}

std::vector<float> RowSketch::exact_origin(Poll &poll) const {
  const InUse::Hold hold(in_use_, "exact_origin", "the sketch");
  return origin_of_pending(poll);
}

std::vector<float> RowSketch::origin() const {
  const InUse::Hold hold(in_use_, "origin", "the sketch");
  return config_.choose_origin && none_beyond_pending() ? std::vector<float>() : origin_;
}

// ---- rows to y

// y (rows, y_stride) <- (x - origin) [Omega, Omega'], and the sum of squares of each x - origin.
void RowSketch::apply_to(RowView x, const float *origin, float *y, double *squares, Poll &poll) const {
  for_each_item(pool_, poll, groups(x.count),
                [&](int rank, ptrdiff_t group) { apply_to_group(x, group, origin, y, squares, rank, poll); });
}

// Rows that are applied together.
ptrdiff_t RowSketch::group_rows() const noexcept { return directed() ? kDirectedRows : kernels_.lanes; }

ptrdiff_t RowSketch::groups(ptrdiff_t rows) const noexcept { return (rows + group_rows() - 1) / group_rows(); }

void RowSketch::apply_to_group(RowView x, ptrdiff_t group, const float *origin, float *y, double *squares, int rank,
                               Poll &poll) const {
  const ptrdiff_t first = group * group_rows();
  const RowView rows{x.row(first), std::min(group_rows(), x.count - first), x.stride};
  std::fill_n(squares + first, rows.count, 0.0);  // an interrupted group is begun anew
  if (directed()) {
    multiply_group(rows, origin, y + first * y_stride_, squares + first, rank, poll);
  } else {
    sketch_group(rows, origin, y + first * y_stride_, squares + first, rank, poll);
  }
}

// Through signs, as many rows at a time as a register has lanes.
void RowSketch::sketch_group(RowView x, const float *origin, float *y, double *squares, int rank, Poll &poll) const {
  constexpr ptrdiff_t kChunksBetweenPolls = 64;
  const ptrdiff_t p = config_.num_features, N = kernels_.lanes, mapped = outputs_ - 1;
  AlignedFloats sums({mapped, N});
  for (ptrdiff_t begin = 0; begin < p; begin += kSketchColumns) {
    const float *row[16];
    for (ptrdiff_t i = 0; i < x.count; ++i) row[i] = x.row(i) + begin;
    const ptrdiff_t chunk = begin / kSketchColumns;
    if (chunk % kChunksBetweenPolls == kChunksBetweenPolls - 1) poll(rank);
    kernels_.sketch(row, x.count, origin == nullptr ? nullptr : origin + begin, std::min(kSketchColumns, p - begin),
                    &omega_->starts[chunk * (mapped + 1)], omega_->codes[chunk].data(), mapped, sums.data(), squares);
  }
  for (ptrdiff_t i = 0; i < x.count; ++i) {
    for (ptrdiff_t j = 0; j < mapped; ++j) y[i * y_stride_ + j] = sums.data()[j * N + i];
    // The kernel squares in float32, which makes 0 of what is too small.
    if (squares[i] < kMinSquare * static_cast<double>(p)) squares[i] = kernels_.sum_squares(x.row(i), origin, p);
  }
}

// Through given directions, in slices of their columns.
void RowSketch::multiply_group(RowView x, const float *origin, float *y, double *squares, int rank, Poll &poll) const {
  const ptrdiff_t p = config_.num_features, l = config_.range_size, N = kernels_.lanes, panels = (l + N - 1) / N;
  AlignedFloats d({x.count, kDirectionColumns});
  for (ptrdiff_t begin = 0; begin < p; begin += kDirectionColumns) {
    poll(rank);
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

void RowSketch::apply(RowView x, float *out, Poll &poll) const {
  const InUse::Hold hold(in_use_, "apply", "the sketch");
  const ptrdiff_t mapped = outputs_ - 1;
  for_each_piece(x, [&](RowView piece, ptrdiff_t begin) {
    AlignedFloats y({piece.count, y_stride_});
    std::vector<double> squares(piece.count);
    apply_to(piece, nullptr, y.data(), squares.data(), poll);
    for (ptrdiff_t i = 0; i < piece.count; ++i) {
      std::copy_n(y.data() + i * y_stride_, mapped, out + (begin + i) * mapped);
    }
  });
}

std::vector<float> RowSketch::directions(Poll &poll) const {
  const InUse::Hold hold(in_use_, "directions", "the sketch");
  if (!directed()) return {};
  const ptrdiff_t p = config_.num_features, l = config_.range_size, padded = round_up(l, kernels_.lanes);
  std::vector<float> rows(l * p);
  for_each_item(pool_, poll, (p + kDirectionColumns - 1) / kDirectionColumns, [&](int, ptrdiff_t chunk) {
    const ptrdiff_t begin = chunk * kDirectionColumns, columns = std::min(kDirectionColumns, p - begin);
    const uint32_t *const packed = omega_->directions.data() + begin * padded;
    for (ptrdiff_t j = 0; j < l; ++j) {
      const auto [first, stride] = packed_output(j, padded, columns, kernels_.group);
      for (ptrdiff_t c = 0; c < columns; ++c)
        rows[j * p + begin + c] = std::bit_cast<float>(packed[first + c * stride]);
    }
  });
  return rows;
}

// ---- a block of rows to the sums, in steps

// At most kBlockRows rows that are on their way into the sums.
struct RowSketch::Block {
  RowView x;
  AlignedFloats y;                     // (rows, y_stride): [d Omega, d Omega', 1] of each row
  std::vector<double> squares;         // of each d
  AlignedFloats packed;                // y as SketchKernels::update takes it, kUpdateRows rows at a time
  std::vector<AlignedFloats> scratch;  // of each thread
  ptrdiff_t steps_done = 0;
};

RowSketch::~RowSketch() = default;

RowSketch::Block RowSketch::begin_block(RowView x, Poll &poll) {
  own_sums(poll);
  if (config_.choose_origin && sums_->rows == 0) origin_ = central_row(x, poll);
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

// Takes the block's steps up to `until`, on all threads or on the calling one alone. Where that is interrupted, those
// that are not done are left to another call.
void RowSketch::advance(Block &block, ptrdiff_t until, bool threaded, Poll &poll) {
  ptrdiff_t stage_end = 0;
  const auto stage = [&](ptrdiff_t size, const auto &step) {  // step(rank, item) for those of its items that are due
    const ptrdiff_t stage_begin = stage_end, begin = std::max(block.steps_done, stage_begin) - stage_begin;
    const ptrdiff_t due = std::min(until - stage_begin, size) - begin;
    stage_end += size;
    ptrdiff_t done = 0;
    if (threaded && due > 1) {
      done = for_each_item_until(pool_, poll, due, [&](int rank, ptrdiff_t item) { step(rank, begin + item); });
    } else {
      for (; done < due && !poll.stopped(0); ++done) step(0, begin + done);
    }
    block.steps_done += done;
    if (done < due) throw Interrupted();
  };
  const ptrdiff_t num_groups = groups(block.x.count);
  stage(num_groups, [&](int rank, ptrdiff_t group) {
    if (sums_->rows == 0) {  // writing to memory for the first time takes as long as computing
      const ptrdiff_t size = outputs_ * config_.num_features;
      double *const co_range = sums_->co_range.data();
      std::fill(co_range + group * size / num_groups, co_range + (group + 1) * size / num_groups, 0.0);
    }
    apply_to_group(block.x, group, origin_or_null(), block.y.data(), block.squares.data(), rank, poll);
  });
  stage(1, [&](int, ptrdiff_t) {
    for (ptrdiff_t i = 0; i < block.x.count; ++i) block.y.data()[i * y_stride_ + outputs_ - 1] = 1.0f;
    pack(block);
  });
  stage(column_runs(), [&](int rank, ptrdiff_t run) { add_co_range(block, run, rank); });
  stage(1, [&](int, ptrdiff_t) { add_rest(block, poll); });
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
void RowSketch::add_rest(const Block &block, Poll &poll) {
  const ptrdiff_t rows = block.x.count, l = config_.range_size;
  AlignedFloats transposed({outputs_, rows});
  for (ptrdiff_t i = 0; i < rows; ++i) {
    for (ptrdiff_t j = 0; j < outputs_; ++j) transposed.data()[j * rows + i] = block.y.data()[i * y_stride_ + j];
  }
  const RowView view{transposed.data(), outputs_, rows};
  AlignedArray<double> added({outputs_, outputs_});
  products_of(pool_, poll, view, view, nullptr, rows, true, added.data());
  auto range = std::make_shared<std::vector<float>>(rows * l);
  for (ptrdiff_t i = 0; i < rows; ++i) std::copy_n(block.y.data() + i * y_stride_, l, range->data() + i * l);
  sums_->range_rows.push_back(std::move(range));
  for (ptrdiff_t i = 0; i < outputs_ * outputs_; ++i) sums_->gram.data()[i] += added.data()[i];
  sums_->squares += total(block.squares);
  sums_->rows += rows;
}

// Sees to it that no snapshot shares the sums, which are about to change.
void RowSketch::own_sums(Poll &poll) {
  if (sums_.use_count() == 1) {
    std::atomic_thread_fence(std::memory_order_acquire);  // what others have read is read
    return;
  }
  auto copy = empty_sums();
  const ptrdiff_t size = outputs_ * config_.num_features;
  for_each_run(pool_, poll, size, 1.0, [&](ptrdiff_t begin, ptrdiff_t end) {
    std::copy(sums_->co_range.data() + begin, sums_->co_range.data() + end, copy->co_range.data() + begin);
  });
  std::copy_n(sums_->gram.data(), outputs_ * outputs_, copy->gram.data());
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

// The squares of each row. Throws std::invalid_argument where one cannot be taken.
std::vector<double> RowSketch::checked(RowView x, int64_t first, Poll &poll) const {
  std::vector<double> squares =
      checked_squares(pool_, poll, "partial_fit", "X", x, first, origin_or_null(), config_.num_features);
  check_squares("partial_fit", x, first, config_.num_features, squares);
  check_sum("partial_fit", total(squares));
  return squares;
}

// `before` and the squares of all rows. Throws std::invalid_argument where one cannot be taken after so much.
double RowSketch::check_all(RowView x, int64_t first, double before, Poll &poll) const {
  for_each_piece(x, [&](RowView piece, ptrdiff_t begin) {
    before += total(checked(piece, first + begin, poll));
    check_sum("partial_fit", before);
  });
  return before;
}

double RowSketch::check_rows(RowView x, int64_t first_row, double before, Poll &poll) const {
  const InUse::Hold hold(in_use_, "check_rows", "the sketch");
  check(x.count >= 1, "partial_fit: X must have at least one row, got 0");
  return check_all(x, first_row, before, poll);
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
void RowSketch::hold_pending(Poll &poll) {
  release_held(poll);
  auto block = std::make_unique<Block>(begin_block(pending_view(), poll));
  std::swap(held_, pending_);
  held_squares_ = total(pending_squares_);
  held_block_ = std::move(block);
  pending_squares_.clear();
}

// Takes all steps that are left of the block that is held, if one is.
void RowSketch::release_held(Poll &poll) {
  if (held_block_ == nullptr) return;
  advance(*held_block_, steps(*held_block_), true, poll);
  held_block_.reset();
  held_squares_ = 0.0;
}

void RowSketch::take_pending(Poll &poll) {
  hold_pending(poll);
  release_held(poll);
}

void RowSketch::partial_fit(RowView x, int64_t first_row, bool all_or_none, Poll &poll) {
  const InUse::Hold hold(in_use_, "partial_fit", "the sketch");
  take(x, first_row, all_or_none, poll);
}

void RowSketch::take(RowView x, int64_t first_row, bool all_or_none, Poll &poll) {
  check(x.count >= 1, "partial_fit: X must have at least one row, got 0");
  std::vector<double> squares;  // of all rows where they are few, else of those that are kept next
  const bool known = all_or_none && x.count <= kBlockRows;
  if (known) {
    squares = checked(x, first_row, poll);
  } else if (all_or_none) {
    check_all(x, first_row, 0.0, poll);
  }
  for (ptrdiff_t taken = 0; taken < x.count;) {
    if (num_pending() == kBlockRows) hold_pending(poll);
    if (taken > 0) poll(0);
    const RowView rest{x.row(taken), std::min(x.count - taken, kBlockRows - num_pending()), x.stride};
    // A first block stays as it is until another row comes: so far all is exact.
    const bool alone = none_beyond_pending() && taken + rest.count == x.count;
    if (rest.count == kBlockRows && !alone) {
      take_block(rest, first_row + taken, poll);
    } else {
      if (!known) squares = checked(rest, first_row + taken, poll);
      keep(rest, squares.data() + (known ? taken : 0));
      if (held_block_ != nullptr) {
        const ptrdiff_t due = steps_due(*held_block_, num_pending());
        advance(*held_block_, due, x.count > 1, poll);  // as rows of a run in the making come: not worth waking threads
        if (due == steps(*held_block_)) release_held(poll);
      }
    }
    taken += rest.count;
  }
}

// Takes a whole block from where it lies.
void RowSketch::take_block(RowView x, int64_t first_row, Poll &poll) {
  release_held(poll);
  if (held_.data() == nullptr) held_ = AlignedFloats({kBlockRows, config_.num_features});  // memory only if written to
  Block block = begin_block(x, poll);
  advance(block, groups(x.count), true, poll);
  check_squares("partial_fit", x, first_row, config_.num_features, block.squares);
  check_sum("partial_fit", total(block.squares));
  try {
    advance(block, steps(block), true, poll);
  } catch (const Interrupted &) {  // the sums have a part of it: what is left waits in rows of our own
    for (ptrdiff_t i = 0; i < x.count; ++i) {
      std::copy_n(x.row(i), config_.num_features, held_.data() + i * config_.num_features);
    }
    held_squares_ = total(block.squares);
    block.x = {held_.data(), x.count, config_.num_features};
    held_block_ = std::make_unique<Block>(std::move(block));
    throw;
  }
}

void RowSketch::partial_fit_together(const std::vector<RowSketch *> &sketches, const std::vector<ptrdiff_t> &starts,
                                     RowView x, int64_t first_row, bool all_or_none, Poll &poll) {
  std::vector<std::unique_ptr<InUse::Hold>> holds;
  double products = 0.0;  // of one row
  for (const RowSketch *sketch : sketches) {
    holds.push_back(std::make_unique<InUse::Hold>(sketch->in_use_, "partial_fit", "the sketch"));
    products += static_cast<double>(sketch->outputs_) * static_cast<double>(sketch->config_.num_features);
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
  const InUse::Hold hold(in_use_, "settle", "the sketch");
  release_held(poll);
  if (num_pending() > 0 && sums_->rows > 0) take_pending(poll);
}

bool RowSketch::none_beyond_pending() const noexcept { return sums_->rows == 0 && held_block_ == nullptr; }

bool RowSketch::exact() const {
  const InUse::Hold hold(in_use_, "exact", "the sketch");
  return none_beyond_pending();
}

bool RowSketch::directed() const noexcept { return omega_->starts.empty(); }

int64_t RowSketch::num_rows() const {
  const InUse::Hold hold(in_use_, "num_rows", "the sketch");
  return sums_->rows + (held_block_ == nullptr ? 0 : held_block_->x.count) + num_pending();
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
  check_sum("merge", other.sums_->squares + other.unsettled_squares());
}

void RowSketch::merge(RowSketch &other, Poll &poll) {
  check(this != &other, "merge: other must be another estimator, with rows of its own");
  const InUse::Hold hold(in_use_, "merge", "the sketch"), hold_other(other.in_use_, "merge", "the other sketch");
  check_mergeable(other);
  release_held(poll);
  other.release_held(poll);
  const std::unique_ptr<RowSketch> merged = copy();  // takes our place once it is whole
  if (other.sums_->rows > 0) {
    if (num_pending() > 0) merged->take_pending(poll);  // before theirs, as the rows' order is
    merged->add_sums(other, poll);
  }
  merged->add_pending(other, poll);
  std::swap(origin_, merged->origin_);
  std::swap(sums_, merged->sums_);
  std::swap(pending_, merged->pending_);
  std::swap(pending_squares_, merged->pending_squares_);
}

// Adds the other's sums to ours, about our origin: d + shift, and y + step with step = [shift Omega, shift Omega', 0].
void RowSketch::add_sums(const RowSketch &other, Poll &poll) {
  constexpr ptrdiff_t kColumns = 1 << 16;  // of a row of C that a thread takes at once
  if (config_.choose_origin && sums_->rows == 0) origin_ = other.origin_;
  const ptrdiff_t p = config_.num_features, last = outputs_ - 1;
  std::vector<float> shift(p);
  for (ptrdiff_t c = 0; c < p; ++c) {
    shift[c] = (other.origin_.empty() ? 0.0f : other.origin_[c]) - (origin_.empty() ? 0.0f : origin_[c]);
  }
  AlignedFloats step({1, y_stride_});
  double squared = 0.0;
  sketch_group({shift.data(), 1, p}, nullptr, step.data(), &squared, 0, poll);
  step.data()[last] = 0.0f;
  const Sums &ours = *sums_, &theirs = *other.sums_;
  const double *const g = theirs.gram.data(), *const sum_of_d = theirs.co_range.data() + last * p;
  const double rows = g[last * outputs_ + last];
  const auto sum_of_y = [&](ptrdiff_t j) { return g[j * outputs_ + last]; };
  const std::shared_ptr<Sums> both = empty_sums();
  const ptrdiff_t tiles = (p + kColumns - 1) / kColumns;
  for_each_item(pool_, poll, outputs_ * tiles, [&](int, ptrdiff_t item) {
    const ptrdiff_t j = item / tiles, begin = item % tiles * kColumns, end = std::min(p, begin + kColumns);
    const double own_step = step.data()[j];
    const double *const from = theirs.co_range.data() + j * p, *const onto = ours.co_range.data() + j * p;
    double *const to = both->co_range.data() + j * p;
    for (ptrdiff_t c = begin; c < end; ++c) {
      to[c] = onto[c] + (from[c] + sum_of_y(j) * shift[c] + own_step * (sum_of_d[c] + rows * shift[c]));
    }
    for (ptrdiff_t i = 0; begin == 0 && i < outputs_; ++i) {
      const double other_step = step.data()[i];
      both->gram.data()[j * outputs_ + i] =
          ours.gram.data()[j * outputs_ + i] +
          (g[j * outputs_ + i] + own_step * sum_of_y(i) + other_step * sum_of_y(j) + own_step * other_step * rows);
    }
  });
  const double across = std::inner_product(shift.begin(), shift.end(), sum_of_d, 0.0);
  both->squares = ours.squares + (theirs.squares + 2.0 * across + rows * squared);
  both->rows = ours.rows + theirs.rows;
  both->range_rows = ours.range_rows;
  for (const auto &block : theirs.range_rows) {
    poll(0);
    auto moved = std::make_shared<std::vector<float>>(*block);
    for (size_t i = 0; i < moved->size(); ++i) (*moved)[i] += step.data()[i % config_.range_size];
    both->range_rows.push_back(std::move(moved));
  }
  sums_ = both;
}

// Takes the other's pending rows.
void RowSketch::add_pending(const RowSketch &other, Poll &poll) {
  const ptrdiff_t p = config_.num_features;
  const std::vector<double> squares =  // about our origin
      checked_squares(pool_, poll, "merge", "other", other.pending_view(), 0, origin_or_null(), p);
  for (ptrdiff_t i = 0; i < other.num_pending(); ++i) {
    if (num_pending() == kBlockRows) take_pending(poll);
    keep({other.pending_view().row(i), 1, p}, &squares[i]);
  }
}

// What was seen so far, but for rows that are held. It shares the sums until either changes them.
std::unique_ptr<RowSketch> RowSketch::copy() const {
  std::unique_ptr<RowSketch> copy(new RowSketch(*this, sums_));
  if (num_pending() > 0) copy->keep(pending_view(), pending_squares_.data());
  return copy;
}

std::unique_ptr<RowSketch> RowSketch::snapshot(bool settled, Poll &poll) {
  const InUse::Hold hold(in_use_, "snapshot", "the sketch");
  release_held(poll);
  std::unique_ptr<RowSketch> snapshot = copy();
  if (num_pending() > 0 && settled) snapshot->take_pending(poll);
  return snapshot;
}

// ---- reading

std::vector<float> RowSketch::exact_rows(Poll &poll) const {
  const InUse::Hold hold(in_use_, "exact_rows", "the sketch");
  if (!none_beyond_pending()) return {};
  const ptrdiff_t p = config_.num_features;
  const std::vector<float> origin = origin_of_pending(poll);
  std::vector<float> rows(num_pending() * p);
  for (ptrdiff_t i = 0; i < num_pending(); ++i) {
    poll(0);
    kernels_.subtract(pending_view().row(i), origin.empty() ? nullptr : origin.data(), p, &rows[i * p]);
  }
  return rows;
}

std::shared_ptr<const RowSketch::Sums> RowSketch::sums() const {
  const InUse::Hold hold(in_use_, "sums", "the sketch");
  return sums_;
}

std::vector<float> RowSketch::pending(Poll &poll) const {
  const InUse::Hold hold(in_use_, "pending", "the sketch");
  const ptrdiff_t p = config_.num_features;
  std::vector<float> rows;
  rows.reserve(num_pending() * p);
  for (ptrdiff_t i = 0; i < num_pending(); ++i) {
    poll(0);
    rows.insert(rows.end(), pending_view().row(i), pending_view().row(i) + p);
  }
  return rows;
}

void RowSketch::combine_co_range(const double *weights, ptrdiff_t r, float *out, Poll &poll) const {
  const InUse::Hold hold(in_use_, "combine", "the sketch");
  std::vector<const double *> rows(outputs_);
  for (ptrdiff_t j = 0; j < outputs_; ++j) rows[j] = sums_->co_range.data() + j * config_.num_features;
  combine_rows(pool_, poll, rows, config_.num_features, weights, r, out);
}

std::vector<float> RowSketch::range_rows(Poll &poll) {
  const InUse::Hold hold(in_use_, "range_rows", "the sketch");
  release_held(poll);
  const ptrdiff_t l = config_.range_size;
  std::vector<float> rows;
  rows.reserve((sums_->rows + num_pending()) * l);
  for (const auto &block : sums_->range_rows) {
    poll(0);
    rows.insert(rows.end(), block->begin(), block->end());
  }
  if (num_pending() > 0) {
    AlignedFloats y({num_pending(), y_stride_});
    std::vector<double> squares(num_pending());
    apply_to(pending_view(), origin_or_null(), y.data(), squares.data(), poll);
    for (ptrdiff_t i = 0; i < num_pending(); ++i) {
      rows.insert(rows.end(), y.data() + i * y_stride_, y.data() + i * y_stride_ + l);
    }
  }
  return rows;
}

void RowSketch::restore(Sums sums, RowView pending, Poll &poll) {
  const InUse::Hold hold(in_use_, "restore", "the sketch");
  const ptrdiff_t p = config_.num_features;
  check(pending.count <= kBlockRows, "restore: there must be at most ", kBlockRows, " pending rows, got ",
        pending.count);
  const std::vector<double> squares =
      checked_squares(pool_, poll, "restore", "pending", pending, 0, origin_or_null(), p);
  check_squares("restore", pending, 0, p, squares);
  check(sums.squares >= 0.0, "restore: squares must be >= 0, got ", sums.squares);
  check(sums.squares + total(squares) < kMaxSquares, "restore: all rows together are too large for float32 sums");
  auto restored = std::make_shared<Sums>(std::move(sums));
  AlignedFloats rows({kBlockRows, p});
  for (ptrdiff_t i = 0; i < pending.count; ++i) std::copy_n(pending.row(i), p, rows.data() + i * p);
  held_block_.reset();
  held_squares_ = 0.0;
  sums_ = std::move(restored);
  pending_ = std::move(rows);
  pending_squares_ = squares;
}

}  // namespace tipl
