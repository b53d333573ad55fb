#include "decode.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <utility>

#include "check.h"
#include "isa.h"

namespace tipl {
namespace {

constexpr int kRowAlignment = 16;       // floats: a row's stride, so that whole registers of any width can be stored
constexpr ptrdiff_t kPrefillRows = 96;  // rows of a prefill's pass: enough for the weights' cost to vanish
constexpr ptrdiff_t kOwnRows = 4;       // up to so many, normalising every row oneself is cheaper than a barrier
constexpr double kSharedProducts = 1 << 19;  // a pass of fewer multiplications costs less than the barriers would
constexpr auto kPollInterval = std::chrono::milliseconds(20);

ptrdiff_t round_up(ptrdiff_t n, ptrdiff_t multiple) { return (n + multiple - 1) / multiple * multiple; }
int row_stride(int n) { return static_cast<int>(round_up(n, kRowAlignment)); }

AlignedFloats copied(const float *source, ptrdiff_t size) {
  AlignedFloats copy({size});
  std::copy_n(source, size, copy.data());
  return copy;
}

// Throws std::invalid_argument where one of x's values, of the given shape, is NaN or Inf.
void check_finite(const char *where, const std::string &name, const float *x, const std::vector<ptrdiff_t> &shape) {
  ptrdiff_t size = 1;
  for (const ptrdiff_t extent : shape) size *= extent;
  const float *bad = std::find_if_not(x, x + size, [](float value) { return std::isfinite(value); });
  if (bad == x + size) return;
  std::string index;
  ptrdiff_t rest = bad - x;
  for (auto extent = shape.rbegin(); extent != shape.rend(); ++extent) {
    index = std::to_string(rest % *extent) + (index.empty() ? "" : ", ") + index;
    rest /= *extent;
  }
  check(false, where, ": ", name, " must be finite, got ", *bad, " at (", index, ")");
}

const std::vector<const float *> &checked(const DecoderConfig &config, const std::vector<const float *> &tensors) {
  const std::vector<TensorSpec> specs = tensor_specs(config);
  check(tensors.size() == specs.size(), "Decoder: weights must be ", specs.size(), " tensors, got ", tensors.size());
  for (size_t i = 0; i < specs.size(); ++i) check_finite("Decoder", specs[i].name, tensors[i], specs[i].shape);
  return tensors;
}

int checked_size(const char *name, ptrdiff_t size, int highest) {
  check(1 <= size && size <= highest, "Decoder: ", name, " must lie in [1, ", highest, "], got ", size);
  return static_cast<int>(size);
}

// Asks `interrupted` when the last time lies far enough back.
class Poll {
 public:
  explicit Poll(const Decoder::Interrupted &interrupted) : interrupted_(interrupted) {}
  bool operator()() {
    const auto now = std::chrono::steady_clock::now();
    if (now - last_ < kPollInterval) return false;
    last_ = now;
    return interrupted_();
  }

 private:
  const Decoder::Interrupted &interrupted_;
  std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
};

}  // namespace

// ---- weights

std::vector<TensorSpec> tensor_specs(const DecoderConfig &config) {
  const ptrdiff_t d = config.d_model, d_ff = config.d_ff, k = config.n_components;
  for (const auto &[name, size] : {std::pair{"n_components", config.n_components},
                                   {"n_layer", config.n_layer},
                                   {"n_head", config.n_head},
                                   {"d_model", config.d_model},
                                   {"d_ff", config.d_ff},
                                   {"max_len", config.max_len}}) {
    checked_size(name, size, 1 << 24);
  }
  check(config.d_model % config.n_head == 0, "Decoder: d_model must be a multiple of n_head = ", config.n_head,
        ", got ", config.d_model);
  check(std::isfinite(config.diff_scale) && std::isfinite(config.out_scale),
        "Decoder: diff_scale and out_scale must be finite, got ", config.diff_scale, " and ", config.out_scale);
  std::vector<TensorSpec> specs;
  const auto linear = [&](const std::string &name, ptrdiff_t in, ptrdiff_t out) {
    specs.push_back({name + ".weight", {out, in}});
    specs.push_back({name + ".bias", {out}});
  };
  const auto layer_norm = [&](const std::string &name) {
    specs.push_back({name + ".weight", {d}});
    specs.push_back({name + ".bias", {d}});
  };
  linear("embed", config.token_width(), d);
  specs.push_back({"pos.weight", {config.max_len, d}});
  for (int i = 0; i < config.n_layer; ++i) {
    const std::string block = text("blocks.", i, ".");
    layer_norm(block + "norm1");
    linear(block + "qkv", d, 3 * d);
    linear(block + "proj", d, d);
    layer_norm(block + "norm2");
    linear(block + "fc1", d, d_ff);
    linear(block + "fc2", d_ff, d);
  }
  layer_norm("norm");
  linear("head", d, k);
  return specs;
}

Weights::Linear::Linear(Tensors &tensors, int in, int out) {
  const float *from_weight = *tensors++, *from_bias = *tensors++;
  const int lanes = kernels().lanes;
  const ptrdiff_t padded = round_up(out, lanes);
  weight = AlignedFloats({padded, in});
  bias = AlignedFloats({padded});
  for (ptrdiff_t row = 0; row < out; ++row) {
    float *panel = weight.data() + row / lanes * in * lanes;
    for (ptrdiff_t i = 0; i < in; ++i) panel[i * lanes + row % lanes] = from_weight[row * in + i];
    bias.data()[row] = from_bias[row];
  }
  packed = {weight.data(), bias.data(), in, out};
}

Weights::LayerNorm::LayerNorm(Tensors &tensors, int d) {
  weight = copied(*tensors++, d);
  bias = copied(*tensors++, d);
}

Weights::Block::Block(Tensors &tensors, const DecoderConfig &config)
    : norm1(tensors, config.d_model),
      qkv(tensors, config.d_model, 3 * config.d_model),
      proj(tensors, config.d_model, config.d_model),
      norm2(tensors, config.d_model),
      fc1(tensors, config.d_model, config.d_ff),
      fc2(tensors, config.d_ff, config.d_model) {}

Weights::Weights(Tensors tensors, const DecoderConfig &config)
    : embed(tensors, config.token_width(), config.d_model),
      pos(copied(*tensors++, ptrdiff_t{config.max_len} * config.d_model)),
      blocks([&] {
        std::vector<Block> list;
        for (int i = 0; i < config.n_layer; ++i) list.emplace_back(tensors, config);
        return list;
      }()),
      norm(tensors, config.d_model),
      head(tensors, config.d_model, config.n_components) {}

KvCache::KvCache(const DecoderConfig &config, int batch_size, int max_len, int lanes)
    : B(batch_size),
      H(config.n_head),
      T(max_len),
      value_stride(static_cast<int>(round_up(config.head_dim(), lanes))),
      keys_size(round_up(max_len, lanes) * config.head_dim()),
      values_size(ptrdiff_t{max_len} * value_stride),
      keys({config.n_layer, B, H, keys_size}),
      values({config.n_layer, B, H, values_size}) {}

// ---- the decoder's door

// Holds the decoder for one call, or refuses: a second thread, or a signal handler that runs inside generate.
class Decoder::InUse {
 public:
  InUse(const Decoder &decoder, const char *where) : flag_(decoder.in_use_) {
    check_state(!flag_.test_and_set(), where, ": the decoder is in use by another call");
  }
  ~InUse() { flag_.clear(); }
  InUse(const InUse &) = delete;
  InUse &operator=(const InUse &) = delete;

 private:
  std::atomic_flag &flag_;
};

Decoder::Decoder(const DecoderConfig &config, const std::vector<const float *> &tensors, ptrdiff_t batch_size,
                 ptrdiff_t max_len, ptrdiff_t num_threads)
    : config_(config),
      kernels_(kernels()),
      weights_(checked(config, tensors).data(), config),
      products_(static_cast<double>(config.d_model) *
                (config.token_width() + config.n_components +
                 static_cast<double>(config.n_layer) * (4.0 * config.d_model + 2.0 * config.d_ff))),
      cache_(config, checked_size("batch_size", batch_size, 1 << 24), checked_size("max_len", max_len, config.max_len),
             kernels_.lanes),
      pool_(num_threads),
      position_(batch_size),
      prefix_end_(batch_size),
      last_(batch_size * config.n_components),
      prediction_(last_.size()),
      max_rows_(std::max<ptrdiff_t>(batch_size, kPrefillRows)),
      token_stride_(row_stride(config.token_width())),
      d_stride_(row_stride(config.d_model)),
      qkv_stride_(row_stride(3 * config.d_model)),
      ff_stride_(row_stride(config.d_ff)),
      k_stride_(row_stride(config.n_components)),
      token_({max_rows_, token_stride_}),
      z_({max_rows_, d_stride_}),
      normed_({max_rows_, d_stride_}),
      qkv_({max_rows_, qkv_stride_}),
      attended_({max_rows_, d_stride_}),
      hidden_({max_rows_, ff_stride_}),
      head_({max_rows_, k_stride_}) {
  rows_.reserve(max_rows_);
  groups_.reserve(max_rows_ + 1);
  for (int rank = 0; rank < pool_.size(); ++rank) {
    own_.push_back(AlignedFloats({kOwnRows * d_stride_ + cache_.value_stride}));
  }
}

bool Decoder::prefill(const float *x, ptrdiff_t t, const int64_t *lengths, float *y, const Interrupted &interrupted) {
  const InUse in_use(*this, "prefill");
  const int k = config_.n_components;
  check(1 <= t && t <= max_len(), "prefill: t must lie in [1, ", max_len(), "], as max_len is, got ", t);
  for (int b = 0; b < batch_size(); ++b) {
    check_state(position_[b] == 0, "prefill: the decoder must be empty, but sequence ", b, " holds ", position_[b],
                " tokens; call reset() first");
    const int64_t length = lengths == nullptr ? t : lengths[b];
    check(1 <= length && length <= t, "prefill: lengths must lie in [1, ", t, "], got ", length, " for sequence ", b);
    check_finite("prefill", text("x[", b, "]"), x + b * t * k, {length, k});
  }
  Poll poll(interrupted);
  begin_rows();
  for (int b = 0; b < batch_size(); ++b) {
    const int length = static_cast<int>(lengths == nullptr ? t : lengths[b]);
    prefix_end_[b] = length - 1;
    for (int slot = 0; slot < length; ++slot) {
      const float *now = x + (b * t + slot) * k;
      add_row({b, slot}, now, slot == 0 ? nullptr : now - k);
      const bool last = b == batch_size() - 1 && slot == length - 1;
      if (last || std::ssize(rows_) == max_rows_) {
        run_rows();
        if (!last && poll()) {
          std::fill(position_.begin(), position_.end(), 0);
          return false;
        }
        begin_rows();
      }
    }
  }
  std::copy(prediction_.begin(), prediction_.end(), y);
  return true;
}

void Decoder::step(const float *x, float *y) {
  const InUse in_use(*this, "step");
  check_room("step", 1);
  check_finite("step", "x", x, {batch_size(), config_.n_components});
  step_rows(x);
  std::copy(prediction_.begin(), prediction_.end(), y);
}

bool Decoder::generate(ptrdiff_t n, float *y, const Interrupted &interrupted) {
  const InUse in_use(*this, "generate");
  check(n >= 1, "generate: n must be >= 1, got ", n);
  check_room("generate", n);
  const int k = config_.n_components;
  Poll poll(interrupted);
  for (ptrdiff_t i = 0; i < n; ++i) {
    if (poll()) return false;
    for (int b = 0; b < batch_size(); ++b) std::copy_n(&prediction_[b * k], k, y + (b * n + i) * k);
    step_rows(prediction_.data());
  }
  return true;
}

void Decoder::reset() {
  const InUse in_use(*this, "reset");
  std::fill(position_.begin(), position_.end(), 0);
}

std::vector<int64_t> Decoder::position() const {
  const InUse in_use(*this, "position");
  return position_;
}

// Throws unless every sequence has a prefix and room for so many tokens more.
void Decoder::check_room(const char *where, ptrdiff_t tokens) const {
  for (int b = 0; b < batch_size(); ++b) {
    check_state(position_[b] > 0, where, ": the decoder is empty; call prefill first");
    check(tokens <= max_len() - position_[b], where, ": the cache is full: sequence ", b, " holds ", position_[b],
          " of max_len = ", max_len(), " tokens, ", tokens, " more do not fit");
  }
}

// ---- one pass over rows

void Decoder::begin_rows() noexcept {
  rows_.clear();
  groups_.clear();
}

// Writes the token of row M, u = [x | diff_scale * (x - previous) | (slot - h) / max_len], and starts z with pos[slot].
void Decoder::add_row(Row row, const float *x, const float *previous) noexcept {
  const ptrdiff_t m = std::ssize(rows_);
  const int k = config_.n_components, d = config_.d_model;
  float *u = token_.data() + m * token_stride_;
  for (int i = 0; i < k; ++i) {
    u[i] = x[i];
    u[k + i] = previous == nullptr ? 0.0f : config_.diff_scale * (x[i] - previous[i]);
  }
  u[2 * k] = static_cast<float>(row.slot - prefix_end_[row.sequence]) / static_cast<float>(config_.max_len);
  std::copy_n(weights_.pos.data() + ptrdiff_t{row.slot} * d, d, z_.data() + m * d_stride_);
  if (rows_.empty() || rows_.back().sequence != row.sequence) groups_.push_back(static_cast<int>(m));
  rows_.push_back(row);
}

// Appends x (B, k) to every sequence.
void Decoder::step_rows(const float *x) {
  const int k = config_.n_components;
  begin_rows();
  for (int b = 0; b < batch_size(); ++b) {
    add_row({b, static_cast<int>(position_[b])}, x + ptrdiff_t{b} * k, &last_[ptrdiff_t{b} * k]);
  }
  run_rows();
}

// Runs the pass; then each row is in the cache, its sequence's position lies behind it, and prediction_ follows it.
void Decoder::run_rows() {
  groups_.push_back(static_cast<int>(rows_.size()));
  double products = 0;
  for (const Row &row : rows_) products += products_ + 2.0 * config_.n_layer * config_.d_model * (row.slot + 1);
  team_size_ = products < kSharedProducts ? 1 : pool_.size();
  if (team_size_ > 1) {
    pool_.run([this](int rank) noexcept { pass(rank); });
  } else {
    pass(0);
  }
  const int k = config_.n_components;
  for (ptrdiff_t m = 0; m < std::ssize(rows_); ++m) {
    const auto [sequence, slot] = rows_[m];
    const float *x = token_.data() + m * token_stride_, *head = head_.data() + m * k_stride_;
    for (int i = 0; i < k; ++i) {
      last_[ptrdiff_t{sequence} * k + i] = x[i];
      prediction_[ptrdiff_t{sequence} * k + i] = x[i] + config_.out_scale * head[i];
    }
    position_[sequence] = slot + 1;
  }
}

void Decoder::barrier() noexcept {
  if (team_size_ > 1) pool_.barrier();
}

void Decoder::pass(int rank) noexcept {
  linear(rank, weights_.embed, token_.data(), token_stride_, Epilogue::kAdd, z_.data(), d_stride_);
  barrier();
  for (int layer = 0; layer < config_.n_layer; ++layer) {
    const Weights::Block &block = weights_.blocks[layer];
    linear(rank, block.qkv, normalised(rank, block.norm1), d_stride_, Epilogue::kStore, qkv_.data(), qkv_stride_);
    barrier();
    attend(rank, layer);
    barrier();
    linear(rank, block.proj, attended_.data(), d_stride_, Epilogue::kAdd, z_.data(), d_stride_);
    barrier();
    linear(rank, block.fc1, normalised(rank, block.norm2), d_stride_, Epilogue::kGelu, hidden_.data(), ff_stride_);
    barrier();
    linear(rank, block.fc2, hidden_.data(), ff_stride_, Epilogue::kAdd, z_.data(), d_stride_);
    barrier();
  }
  linear(rank, weights_.head, normalised(rank, weights_.norm), d_stride_, Epilogue::kStore, head_.data(), k_stride_);
}

// This rank's panels of y (M, out) <- x (M, in) through the layer.
void Decoder::linear(int rank, const Weights::Linear &layer, const float *x, ptrdiff_t x_stride, Epilogue epilogue,
                     float *y, ptrdiff_t y_stride) noexcept {
  const ptrdiff_t panels = round_up(layer.packed.out, kernels_.lanes) / kernels_.lanes;
  const Range mine = share(panels, rank, team_size_);
  kernels_.linear(layer.packed, mine.begin, mine.end, x, x_stride, std::ssize(rows_), epilogue, y, y_stride);
}

// z (M, d) normalised, complete for this rank: few rows by each rank for itself, many by all together.
const float *Decoder::normalised(int rank, const Weights::LayerNorm &norm) noexcept {
  const ptrdiff_t M = std::ssize(rows_);
  const bool alone = M <= kOwnRows;
  const Range mine = alone ? Range{0, M} : share(M, rank, team_size_);
  float *y = alone ? own_[rank].data() : normed_.data();
  kernels_.layer_norm(z_.data() + mine.begin * d_stride_, d_stride_, mine.end - mine.begin, config_.d_model,
                      norm.weight.data(), norm.bias.data(), y + mine.begin * d_stride_, d_stride_);
  if (!alone) barrier();
  return y;
}

// This rank's (sequence, head) pairs: the rows' keys and values into the cache, then attended_ (M, d).
void Decoder::attend(int rank, int layer) noexcept {
  const int H = config_.n_head, D = config_.head_dim(), d = config_.d_model, N = kernels_.lanes;
  const Range mine = share((std::ssize(groups_) - 1) * H, rank, team_size_);
  float *scratch = own_[rank].data() + kOwnRows * d_stride_;
  for (ptrdiff_t item = mine.begin; item < mine.end; ++item) {
    const int first = groups_[item / H], last = groups_[item / H + 1], head = static_cast<int>(item % H);
    float *keys = cache_.keys_of(layer, rows_[first].sequence, head);
    float *values = cache_.values_of(layer, rows_[first].sequence, head);
    for (int m = first; m < last; ++m) {
      const ptrdiff_t slot = rows_[m].slot;
      const float *key = qkv_.data() + ptrdiff_t{m} * qkv_stride_ + d + head * D, *value = key + d;
      float *to = keys + slot / N * D * N + slot % N;
      for (int i = 0; i < D; ++i) to[i * N] = key[i];
      std::copy_n(value, D, values + slot * cache_.value_stride);
    }
    for (int m = first; m < last; ++m) {
      const Attention attention{.query = qkv_.data() + ptrdiff_t{m} * qkv_stride_ + head * D,
                                .keys = keys,
                                .values = values,
                                .slots = rows_[m].slot + 1,
                                .head_dim = D,
                                .value_stride = cache_.value_stride,
                                .scale = 1.0f / std::sqrt(static_cast<float>(D))};
      kernels_.attend(attention, scratch, attended_.data() + ptrdiff_t{m} * d_stride_ + head * D);
    }
  }
}

}  // namespace tipl
