#include "svd.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <numeric>
#include <string>

#include "check.h"
#include "isa.h"
#include "rng.h"
#include "symmetric_eigen.h"

namespace tipl {
namespace {

constexpr double kFloatEps = std::numeric_limits<float>::epsilon();
constexpr double kDoubleEps = std::numeric_limits<double>::epsilon();
constexpr ptrdiff_t kMinBlock = 64;     // rows of a block at least
constexpr ptrdiff_t kColumnTile = 128;  // columns that a thread takes at once where every row is combined
constexpr double kMaxSquares = 1.0e76;  // below float32's largest value squared: nothing computed from it overflows

// body(rank, item) once for each item of n, whichever thread comes first: for items that write apart from one another.
template <class Body>
void for_each_item(ThreadPool &pool, ptrdiff_t n, const Body &body) {
  std::atomic<ptrdiff_t> next{0};
  pool.run([&](int rank) {
    for (ptrdiff_t item; (item = next.fetch_add(1)) < n;) body(rank, item);
  });
}

// body(begin, end, rank) over tiles of columns.
template <class Body>
void for_each_column_tile(ThreadPool &pool, ptrdiff_t columns, const Body &body) {
  for_each_item(pool, (columns + kColumnTile - 1) / kColumnTile, [&](int rank, ptrdiff_t tile) {
    body(tile * kColumnTile, std::min((tile + 1) * kColumnTile, columns), rank);
  });
}

// The sum of squares of each row of x (n, p). Throws std::invalid_argument where a value is NaN or Inf.
std::vector<double> finite_squares(ThreadPool &pool, const char *where, const char *name, const float *x, ptrdiff_t n,
                                   ptrdiff_t p) {
  std::vector<double> squares(n);
  const Kernels &kernels = tipl::kernels();
  parallel_for(pool, n, [&](ptrdiff_t begin, ptrdiff_t end) {
    for (ptrdiff_t i = begin; i < end; ++i) squares[i] = kernels.sum_squares(x + i * p, p);
  });
  const auto bad = std::find_if_not(squares.begin(), squares.end(), [](double s) { return std::isfinite(s); });
  if (bad == squares.end()) return squares;
  const ptrdiff_t i = bad - squares.begin();
  const float *row = x + i * p;
  const ptrdiff_t j = std::find_if_not(row, row + p, [](float value) { return std::isfinite(value); }) - row;
  check(false, where, ": ", name, " must be finite, got ", row[j], " at row ", i, ", column ", j);
  return {};
}

std::vector<const float *> rows_of(const float *x, ptrdiff_t n, ptrdiff_t stride) {
  std::vector<const float *> rows(n);
  for (ptrdiff_t i = 0; i < n; ++i) rows[i] = x + i * stride;
  return rows;
}

// Block `index` of the rows, as Kernels::products takes them.
Rows block_of(const std::vector<const float *> &rows, ptrdiff_t index) {
  const ptrdiff_t begin = index * kProductBlock;
  return {rows.data() + begin, std::min<ptrdiff_t>(kProductBlock, std::ssize(rows) - begin)};
}

ptrdiff_t num_blocks(ptrdiff_t rows) { return (rows + kProductBlock - 1) / kProductBlock; }

// out (m, m) <- the products of all pairs of rows less origin, in both triangles.
void gram_of(ThreadPool &pool, const std::vector<const float *> &rows, ptrdiff_t columns, const double *origin,
             double *out) {
  const ptrdiff_t m = std::ssize(rows);
  std::vector<std::pair<ptrdiff_t, ptrdiff_t>> tasks;  // pairs of blocks of rows
  for (ptrdiff_t i = 0; i < num_blocks(m); ++i) {
    for (ptrdiff_t j = 0; j <= i; ++j) tasks.emplace_back(i, j);
  }
  const Kernels &kernels = tipl::kernels();
  for_each_item(pool, std::ssize(tasks), [&](int, ptrdiff_t task) {
    const auto [i, j] = tasks[task];
    kernels.products(block_of(rows, i), block_of(rows, j), origin, columns, i == j, out + (i * m + j) * kProductBlock,
                     m);
  });
  for (ptrdiff_t i = 0; i < m; ++i) {
    for (ptrdiff_t j = 0; j < i; ++j) out[j * m + i] = out[i * m + j];
  }
}

// to <- factor * (a - b), p values.
void difference(const double *a, const double *b, double factor, ptrdiff_t p, float *to) {
  for (ptrdiff_t c = 0; c < p; ++c) to[c] = static_cast<float>(factor * (a[c] - b[c]));
}

// What a difference of means weighs as a row of its own, beside n and m rows about their own means (Ross et al. 2008).
double step_weight(int64_t n, int64_t m) {
  return std::sqrt(static_cast<double>(n) * static_cast<double>(m) / static_cast<double>(n + m));
}

const SvdConfig &checked(const SvdConfig &config) {
  check(config.num_features >= 1, "StreamingSVD: X must have at least one column, got ", config.num_features);
  check(1 <= config.n_components && config.n_components <= config.num_features,
        "StreamingSVD: n_components must lie in [1, p] = [1, ", config.num_features, "], got ", config.n_components);
  check(config.n_oversamples >= 0, "StreamingSVD: n_oversamples must be >= 0, got ", config.n_oversamples);
  return config;
}

}  // namespace

void gram(const float *x, ptrdiff_t n, ptrdiff_t p, const float *origin, double *out, int num_threads) {
  ThreadPool pool(num_threads);
  finite_squares(pool, "gram", "X", x, n, p);
  std::vector<double> exact_origin;
  if (origin != nullptr) {
    finite_squares(pool, "gram", "origin", origin, 1, p);
    exact_origin.assign(origin, origin + p);
  }
  gram_of(pool, rows_of(x, n, p), p, origin == nullptr ? nullptr : exact_origin.data(), out);
}

void cross_products(const float *x, ptrdiff_t n, const float *y, ptrdiff_t k, ptrdiff_t p, double *out,
                    int num_threads) {
  ThreadPool pool(num_threads);
  finite_squares(pool, "transform", "X", x, n, p);
  const std::vector<const float *> left = rows_of(x, n, p), right = rows_of(y, k, p);
  const Kernels &kernels = tipl::kernels();
  for_each_item(pool, num_blocks(n) * num_blocks(k), [&](int, ptrdiff_t task) {
    const ptrdiff_t i = task / num_blocks(k), j = task % num_blocks(k);
    kernels.products(block_of(left, i), block_of(right, j), nullptr, p, false, out + (i * k + j) * kProductBlock, k);
  });
}

// ---- rows in

// Eigenvectors of the Gram matrix of m rows: the left singular vectors of their stack.
struct StreamingSvd::Spectrum {
  SymmetricEigen eigen;
  ptrdiff_t rank;  // leading eigenvalues that the Gram matrix resolves

  double square(ptrdiff_t j) const { return std::max(0.0, eigen.values[j]); }  // of the j-th singular value
  double squares_from(ptrdiff_t first) const {
    double total = 0.0;
    for (ptrdiff_t j = eigen.size - 1; j >= first; --j) total += square(j);  // the small ones first
    return total;
  }
  // (m, outputs rounded up) for Kernels::combine: the leading eigenvectors, each divided by its singular value if
  // asked.
  std::vector<double> weights(ptrdiff_t outputs, bool unit) const {
    const ptrdiff_t stride = round_up(outputs, kCombinePadding);
    std::vector<double> result(eigen.size * stride);
    for (ptrdiff_t j = 0; j < outputs; ++j) {
      const double factor = unit ? 1.0 / std::sqrt(square(j)) : 1.0;
      for (ptrdiff_t i = 0; i < eigen.size; ++i) result[i * stride + j] = factor * eigen.vector(j)[i];
    }
    return result;
  }
};

StreamingSvd::StreamingSvd(const SvdConfig &config, int num_threads)
    : config_(checked(config)),
      max_kept_(config.n_components + config.n_oversamples),
      max_block_(std::max(kMinBlock, round_up(max_kept_, kProductBlock))),
      stride_(round_up(config.num_features, kColumnPadding)),
      kernels_(kernels()),
      pool_(num_threads),
      kept_({max_kept_, stride_}),
      block_({max_block_ + 1, stride_}),
      mean_(config.num_features) {}

int64_t StreamingSvd::num_rows() const {
  const std::lock_guard lock(mutex_);
  return num_before_ + num_block_;
}

void StreamingSvd::check_size(const char *where, double squares) const {
  check(squares < kMaxSquares, where, ": X is too large for float32 directions: the squares of all rows seen sum to ",
        squares, ", which must stay below ", kMaxSquares);
}

bool StreamingSvd::partial_fit(const float *x, ptrdiff_t n, const Interrupted &interrupted) {
  const std::lock_guard lock(mutex_);
  const ptrdiff_t p = config_.num_features;
  check(n >= 1, "partial_fit: X must have at least one row, got 0");
  const std::vector<double> squares = finite_squares(pool_, "partial_fit", "X", x, n, p);
  check_size("partial_fit", std::accumulate(squares.begin(), squares.end(), squares_));
  for (ptrdiff_t taken = 0; taken < n;) {
    if (num_block_ == max_block_) {
      if (interrupted()) return false;
      compress(stacked(block_.data(), mean_.data()));
    }
    const ptrdiff_t rows = std::min(n - taken, max_block_ - num_block_);
    parallel_for(pool_, rows, [&](ptrdiff_t begin, ptrdiff_t end) {
      for (ptrdiff_t i = begin; i < end; ++i) {
        std::copy_n(x + (taken + i) * p, p, block_.data() + (num_block_ + i) * stride_);
      }
    });
    for (ptrdiff_t i = 0; i < rows; ++i) squares_ += squares[taken + i];
    num_block_ += rows;
    taken += rows;
  }
  return true;
}

void StreamingSvd::merge(const StreamingSvd &other) {
  check(this != &other, "merge: other must be another estimator, with rows of its own");
  const std::scoped_lock lock(mutex_, other.mutex_);
  const auto check_same = [](const char *name, auto ours, auto theirs) {
    check(ours == theirs, "merge: other must have ", name, " = ", ours, ", got ", theirs);
  };
  check_same("n_features_in_", config_.num_features, other.config_.num_features);
  check_same("n_components", config_.n_components, other.config_.n_components);
  check_same("n_oversamples", config_.n_oversamples, other.config_.n_oversamples);
  check_same("center", config_.center, other.config_.center);
  check_same("seed", config_.seed, other.config_.seed);
  if (other.num_before_ + other.num_block_ == 0) return;
  check_size("merge", squares_ + other.squares_);

  const ptrdiff_t p = config_.num_features;
  AlignedFloats other_centred({config_.center ? other.max_block_ + 1 : 0, stride_}), step({1, stride_});
  std::vector<double> other_mean = other.mean_;
  std::vector<const float *> rows = stacked(block_.data(), mean_.data());
  const int64_t ours = num_before_ + num_block_, theirs = other.num_before_ + other.num_block_;
  const std::vector<const float *> other_rows = other.stacked(other_centred.data(), other_mean.data());
  rows.insert(rows.end(), other_rows.begin(), other_rows.end());
  if (config_.center && ours > 0) {
    difference(mean_.data(), other_mean.data(), step_weight(ours, theirs), p, step.data());
    rows.push_back(step.data());
  }
  const double share = static_cast<double>(theirs) / static_cast<double>(ours + theirs);
  for (ptrdiff_t c = 0; c < p; ++c) mean_[c] += share * (other_mean[c] - mean_[c]);
  compress(rows);
  num_before_ += theirs;
  dropped_ += other.dropped_;
  squares_ += other.squares_;
}

// The rows whose Gram matrix is that of all rows seen (about their mean if `center`), less what was dropped: M, and the
// block. With `center` the block's rows about their own mean are written to `centred` (b + 1, stride), which may be
// block_ itself, then the step between the means; `mean` (p) becomes that of all rows.
std::vector<const float *> StreamingSvd::stacked(float *centred, double *mean) const {
  std::vector<const float *> rows = rows_of(kept_.data(), num_kept_, stride_);
  if (config_.center && num_block_ > 0) {
    float *const step = centred + max_block_ * stride_;
    const auto rows_in_block = static_cast<double>(num_block_);
    const double weight = step_weight(num_before_, num_block_);
    const double share = rows_in_block / (static_cast<double>(num_before_) + rows_in_block);
    for_each_column_tile(pool_, config_.num_features, [&](ptrdiff_t begin, ptrdiff_t end, int) {
      double block_mean[kColumnTile] = {};
      for (ptrdiff_t i = 0; i < num_block_; ++i) {
        const float *row = block_.data() + i * stride_;
        for (ptrdiff_t c = begin; c < end; ++c) block_mean[c - begin] += row[c];
      }
      for (ptrdiff_t c = begin; c < end; ++c) block_mean[c - begin] /= rows_in_block;
      for (ptrdiff_t i = 0; i < num_block_; ++i) {
        const float *row = block_.data() + i * stride_;
        float *to = centred + i * stride_;
        for (ptrdiff_t c = begin; c < end; ++c) to[c] = static_cast<float>(row[c] - block_mean[c - begin]);
      }
      difference(mean + begin, block_mean, weight, end - begin, step + begin);
      for (ptrdiff_t c = begin; c < end; ++c) mean[c] += share * (block_mean[c - begin] - mean[c]);
    });
    if (num_before_ > 0) rows.push_back(step);
  }
  const float *const block = config_.center ? centred : block_.data();
  for (ptrdiff_t i = 0; i < num_block_; ++i) rows.push_back(block + i * stride_);
  return rows;
}

StreamingSvd::Spectrum StreamingSvd::spectrum(const std::vector<const float *> &rows) const {
  const ptrdiff_t m = std::ssize(rows);
  std::vector<double> products(m * m);
  gram_of(pool_, rows, config_.num_features, nullptr, products.data());
  Spectrum spectrum{SymmetricEigen(products.data(), m), 0};
  // Rounding moves eigenvalues by a few m * eps of the largest.
  const double resolved = m == 0 ? 0.0 : 4.0 * static_cast<double>(m) * kDoubleEps * spectrum.square(0);
  while (spectrum.rank < m && spectrum.square(spectrum.rank) > resolved) ++spectrum.rank;
  return spectrum;
}

// M <- the leading rows of U^T times `rows`, which hold all that was seen. The block is empty then.
void StreamingSvd::compress(const std::vector<const float *> &rows) {
  const Spectrum spectrum = this->spectrum(rows);
  const ptrdiff_t kept = std::min(max_kept_, spectrum.rank);
  combine(rows, spectrum.weights(kept, false), kept, kept_.data());
  dropped_ += spectrum.squares_from(kept);
  num_kept_ = kept;
  num_before_ += num_block_;
  num_block_ = 0;
}

// target (outputs, stride) <- weights^T rows. `target` may hold some of `rows`.
void StreamingSvd::combine(const std::vector<const float *> &rows, const std::vector<double> &weights,
                           ptrdiff_t outputs, float *target) const {
  const ptrdiff_t tile_size = outputs * kColumnTile;
  AlignedFloats tiles({pool_.size(), tile_size});
  for_each_column_tile(pool_, stride_, [&](ptrdiff_t begin, ptrdiff_t end, int rank) {
    float *const tile = tiles.data() + rank * tile_size;
    kernels_.combine({rows.data(), std::ssize(rows)}, begin, end - begin, weights.data(), outputs, tile, kColumnTile);
    for (ptrdiff_t o = 0; o < outputs; ++o) {
      std::copy_n(tile + o * kColumnTile, end - begin, target + o * stride_ + begin);
    }
  });
}

// ---- directions out

StreamingSvd::Factors StreamingSvd::factors() const {
  const std::lock_guard lock(mutex_);
  check_state(num_before_ + num_block_ > 0, "StreamingSVD: no rows were seen");
  const ptrdiff_t k = config_.n_components;
  Factors factors{AlignedFloats({k, stride_}), stride_, std::vector<double>(k), mean_, 0.0};
  const AlignedFloats centred({config_.center && num_block_ > 0 ? max_block_ + 1 : 0, stride_});
  const std::vector<const float *> rows = stacked(const_cast<float *>(centred.data()), factors.mean.data());
  const Spectrum spectrum = this->spectrum(rows);
  const ptrdiff_t rank = std::min(k, spectrum.rank);
  for (ptrdiff_t j = 0; j < rank; ++j) factors.singular_values[j] = std::sqrt(spectrum.square(j));
  combine(rows, spectrum.weights(rank, true), rank, factors.components.data());
  complete(factors.components.data(), rank);
  orthonormalise(factors.components.data());
  fix_signs(factors.components.data());
  // The directions' own rounding to float32 leaves up to eps of everything outside them.
  factors.residual_bound =
      std::sqrt(dropped_ + spectrum.squares_from(rank)) + kFloatEps * std::sqrt(dropped_ + spectrum.squares_from(0));
  return factors;
}

// Components beyond `rank`: random, because the rows have no more directions.
void StreamingSvd::complete(float *components, ptrdiff_t rank) const {
  const ptrdiff_t p = config_.num_features;
  const float scale = 1.0f / std::sqrt(static_cast<float>(p));
  for_each_item(pool_, config_.n_components - rank, [&](int, ptrdiff_t item) {
    float *const row = components + (rank + item) * stride_;
    for (ptrdiff_t c = 0; c < p; c += 4) {
      const auto normals = normal4(config_.seed, rank + item, c / 4);
      for (ptrdiff_t i = 0; i < 4 && c + i < p; ++i) row[c + i] = scale * normals[i];
    }
  });
}

// Component j loses what lies along components 0 ... j - 1, which directions of very different singular values share by
// rounding: V <- L^-1 V with V V^T = L L^T. Twice, because the first time squares V's condition
// (CholeskyQR2, Yamamoto et al. 2015, https://etna.ricam.oeaw.ac.at/vol.44.2015/pp306-326.dir/pp306-326.pdf).
void StreamingSvd::orthonormalise(float *components) const {
  const ptrdiff_t k = config_.n_components, weight_stride = round_up(k, kCombinePadding);
  const std::vector<const float *> rows = rows_of(components, k, stride_);
  for (int pass = 0; pass < 2; ++pass) {
    std::vector<double> l(k * k), inverse(k * weight_stride);  // inverse: L^-T, the weights of combine
    gram_of(pool_, rows, config_.num_features, nullptr, l.data());
    for (ptrdiff_t i = 0; i < k; ++i) {  // L, row by row, over the lower triangle
      for (ptrdiff_t j = 0; j <= i; ++j) {
        double rest = l[i * k + j];
        for (ptrdiff_t t = 0; t < j; ++t) rest -= l[i * k + t] * l[j * k + t];
        l[i * k + j] = i == j ? std::sqrt(std::max(rest, kDoubleEps)) : rest / l[j * k + j];
      }
    }
    for (ptrdiff_t j = 0; j < k; ++j) {  // column j of L^-1
      for (ptrdiff_t i = j; i < k; ++i) {
        double rest = i == j ? 1.0 : 0.0;
        for (ptrdiff_t t = j; t < i; ++t) rest -= l[i * k + t] * inverse[j * weight_stride + t];
        inverse[j * weight_stride + i] = rest / l[i * k + i];
      }
    }
    combine(rows, inverse, k, components);
  }
}

void StreamingSvd::fix_signs(float *components) const {
  parallel_for(pool_, config_.n_components, [&](ptrdiff_t begin, ptrdiff_t end) {
    for (ptrdiff_t j = begin; j < end; ++j) {
      float *const row = components + j * stride_;
      const auto smaller = [](float a, float b) { return std::abs(a) < std::abs(b); };
      if (*std::max_element(row, row + config_.num_features, smaller) >= 0.0f) continue;
      for (ptrdiff_t c = 0; c < config_.num_features; ++c) row[c] = -row[c];
    }
  });
}

}  // namespace tipl
