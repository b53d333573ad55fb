#include "decode.h"

#include <algorithm>

#include "check.h"
#include "cpu/isa.h"

namespace tipl {
namespace {

constexpr ptrdiff_t kPrefillRows = 96;     // rows of a prefill's pass: enough for the weights' cost to vanish
constexpr ptrdiff_t kOwnRows = 4;          // up to so many, normalising every row oneself is cheaper than a barrier
constexpr double kPolledProducts = 1.0e9;  // multiplications of a thread between two looks at whether to stop
constexpr ptrdiff_t kPolledHeads = 16;     // and so many heads of a sequence, in attention
constexpr char kObject[] = "the decoder";

int row_stride(int n) { return static_cast<int>(round_up(n, kInputPadding)); }

int checked_size(const char *name, ptrdiff_t size, int highest) {
  check(1 <= size && size <= highest, "Decoder: ", name, " must lie in [1, ", highest, "], got ", size);
  return static_cast<int>(size);
}

}  // namespace

KvCache::KvCache(const DecoderConfig &config, Precision precision, int batch_size, int max_len, int lanes)
    : precision(precision),
      B(batch_size),
      H(config.n_head),
      T(max_len),
      head_dim(config.head_dim()),
      value_stride(static_cast<int>(round_up(head_dim, lanes))),
      block_keys(kCacheBlock * words_of(head_dim, precision)),
      block_words(block_keys + words_of(kCacheBlock, precision) * value_stride),
      head_words(round_up(T, kCacheBlock) / kCacheBlock * block_words),
      words({config.n_layer, B, H, head_words}) {}

Decoder::Decoder(const DecoderConfig &config, const std::vector<const float *> &tensors, const DecoderOptions &options,
                 Poll &poll)
    : config_(config),
      kernels_(decode_kernels()),
      weights_(tensors, config, options.weights, poll),
      cache_(config, options.cache, checked_size("batch_size", options.batch_size, 1 << 24),
             checked_size("max_len", options.max_len, config.max_len), kernels_.lanes),
      pool_(options.num_threads),
      position_(options.batch_size),
      prefix_end_(options.batch_size),
      last_({options.batch_size, config.n_components}),
      prediction_({options.batch_size, config.n_components}),
      max_rows_(std::max<ptrdiff_t>(options.batch_size, kPrefillRows)),
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
  work_.reserve(max_rows_ + 1);
  for (int rank = 0; rank < pool_.size(); ++rank) {
    const auto rows = [&] { return AlignedFloats({kOwnRows, d_stride_}); };
    own_.push_back({rows(), AlignedFloats({cache_.value_stride}), rows(), rows(), rows()});
  }
}

void Decoder::prefill(const float *x, ptrdiff_t t, const int64_t *lengths, float *y, Poll &poll) {
  const InUse::Hold hold(in_use_, "prefill", kObject);
  const int k = config_.n_components;
  check(1 <= t && t <= max_len(), "prefill: t must lie in [1, ", max_len(), "], as max_len is, got ", t);
  for (int b = 0; b < batch_size(); ++b) {
    poll(0);
    check_state(position_[b] == 0, "prefill: the decoder must be empty, but sequence ", b, " holds ", position_[b],
                " tokens; call reset() first");
    const int64_t length = lengths == nullptr ? t : lengths[b];
    check(1 <= length && length <= t, "prefill: lengths must lie in [1, ", t, "], got ", length, " for sequence ", b);
    check_finite("prefill", text("x[", b, "]"), x + b * t * k, {length, k});
  }
  begin_rows();
  for (int b = 0; b < batch_size(); ++b) {
    const int length = static_cast<int>(lengths == nullptr ? t : lengths[b]);
    prefix_end_[b] = length - 1;
    for (int slot = 0; slot < length; ++slot) {
      const float *now = x + (b * t + slot) * k;
      add_row({b, slot}, now, slot == 0 ? nullptr : now - k);
      const bool last = b == batch_size() - 1 && slot == length - 1;
      if (last || std::ssize(rows_) == max_rows_) {
        try {
          run_rows(poll);
        } catch (const Interrupted &) {
          std::fill(position_.begin(), position_.end(), 0);
          throw;
        }
        begin_rows();
      }
    }
  }
  std::copy_n(prediction_.data(), ptrdiff_t{batch_size()} * k, y);
}

void Decoder::step(const float *x, float *y, Poll &poll) {
  const InUse::Hold hold(in_use_, "step", kObject);
  const int k = config_.n_components;
  for (int b = 0; b < batch_size(); ++b) check_room("step", b, 1);
  check_finite("step", "x", x, {batch_size(), k});
  begin_rows();
  for (int b = 0; b < batch_size(); ++b) {
    add_row({b, static_cast<int>(position_[b])}, x + ptrdiff_t{b} * k, last_.data() + ptrdiff_t{b} * k);
  }
  run_rows(poll);
  std::copy_n(prediction_.data(), ptrdiff_t{batch_size()} * k, y);
}

void Decoder::generate(const std::vector<int64_t> &n, float *y, Poll &poll) {
  const InUse::Hold hold(in_use_, "generate", kObject);
  const int k = config_.n_components;
  for (int b = 0; b < batch_size(); ++b) {
    check(n[b] >= 0, "generate: n must be >= 0, got ", n[b], " for sequence ", b);
    check_room("generate", b, n[b]);
  }
  const int64_t most = *std::max_element(n.begin(), n.end());
  for (int64_t i = 0; i < most; ++i) {
    begin_rows();
    for (int b = 0; b < batch_size(); ++b) {
      if (i >= n[b]) continue;
      const float *x = prediction_.data() + ptrdiff_t{b} * k;
      std::copy_n(x, k, y + (b * most + i) * k);
      add_row({b, static_cast<int>(position_[b])}, x, last_.data() + ptrdiff_t{b} * k);
    }
    run_rows(poll);
  }
}

void Decoder::reset() {
  const InUse::Hold hold(in_use_, "reset", kObject);
  std::fill(position_.begin(), position_.end(), 0);
}

std::vector<int64_t> Decoder::position() const {
  const InUse::Hold hold(in_use_, "position", kObject);
  return position_;
}

// Throws unless the sequence has a prefix and room for so many tokens more.
void Decoder::check_room(const char *where, int sequence, int64_t tokens) const {
  const int64_t held = position_[sequence];
  check_state(held > 0, where, ": the decoder is empty; call prefill first");
  check(tokens <= max_len() - held, where, ": the cache is full: sequence ", sequence, " holds ", held,
        " of max_len = ", max_len(), " tokens, ", tokens, " more do not fit");
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

// Runs the pass; then each row is in the cache, its sequence's position lies behind it, and prediction_ follows it.
// Interrupted, it has changed nothing but slots that no position covers.
void Decoder::run_rows(Poll &poll) {
  groups_.push_back(static_cast<int>(rows_.size()));
  work_.assign(1, 0);
  double products = 0;
  for (size_t group = 0; group + 1 < groups_.size(); ++group) {
    ptrdiff_t slots = 0;
    for (int m = groups_[group]; m < groups_[group + 1]; ++m) slots += rows_[m].slot + 1;
    work_.push_back(work_.back() + slots);
    products += config_.products() * (groups_[group + 1] - groups_[group]) +
                2.0 * config_.n_layer * config_.d_model * static_cast<double>(slots);
  }
  team_size_ = products < kSharedProducts ? 1 : pool_.size();
  const bool halves = team_size_ == 2 && config_.halved() && std::ssize(rows_) <= kOwnRows;
  stopped_ = false;
  if (team_size_ > 1) {
    pool_.run([&](int rank) noexcept { halves ? pass_in_halves(rank, poll) : pass(rank, poll); });
  } else {
    pass(0, poll);
  }
  if (stopped_) throw Interrupted();
  const int k = config_.n_components;
  for (ptrdiff_t m = 0; m < std::ssize(rows_); ++m) {
    const auto [sequence, slot] = rows_[m];
    const float *x = token_.data() + m * token_stride_, *head = head_.data() + m * k_stride_;
    for (int i = 0; i < k; ++i) {
      last_.data()[ptrdiff_t{sequence} * k + i] = x[i];
      prediction_.data()[ptrdiff_t{sequence} * k + i] = x[i] + config_.out_scale * head[i];
    }
    position_[sequence] = slot + 1;
  }
}

void Decoder::barrier(int rank) noexcept {
  if (team_size_ > 1) pool_.barrier(rank);
}

// Where the poll has said to stop, ranks skip what is left of their work, each from where it hears of it, and all leave
// at the next layer, to which rank 0 brings the word.
void Decoder::pass(int rank, Poll &poll) noexcept {
  linear(rank, poll, weights_.embed, token_.data(), token_stride_, Epilogue::kAdd, z_.data(), d_stride_);
  barrier(rank);
  for (int layer = 0; layer < config_.n_layer; ++layer) {
    const Weights::Block &block = weights_.blocks[layer];
    if (rank == 0) stopped_ = poll.stopped(0);
    linear(rank, poll, block.qkv, normalised(rank, block.norm1), d_stride_, Epilogue::kStore, qkv_.data(), qkv_stride_);
    barrier(rank);
    if (stopped_) return;
    attend(rank, poll, layer, first_head(rank), first_head(rank + 1));
    barrier(rank);
    linear_parts(rank, poll, block.proj, attended_.data(), d_stride_);
    barrier(rank);
    linear(rank, poll, block.fc1, normalised(rank, block.norm2), d_stride_, Epilogue::kGelu, hidden_.data(),
           ff_stride_);
    barrier(rank);
    linear_parts(rank, poll, block.fc2, hidden_.data(), ff_stride_);
    barrier(rank);
  }
  linear(rank, poll, weights_.head, normalised(rank, weights_.norm), d_stride_, Epilogue::kStore, head_.data(),
         k_stride_);
}

// The same for two ranks and few rows, with two barriers a block instead of five (after Megatron-LM, arXiv:1909.08053):
// each rank takes half of the heads from qkv through proj, and half of the MLP's units from fc1 through fc2. Both keep
// all of z, embedding included, and add to it what the two halves come to.
void Decoder::pass_in_halves(int rank, Poll &poll) noexcept {
  const ptrdiff_t M = std::ssize(rows_), H = config_.n_head;
  Own &own = own_[rank];
  const auto linear_all = [&](const Weights::Linear &layer, const float *x, ptrdiff_t x_stride, Epilogue epilogue,
                              AlignedFloats &y) {
    kernels_.linear(layer.packed, 0, panels_of(layer), x, x_stride, M, epilogue, y.data(), d_stride_);
  };
  const auto add_halves = [&](AlignedFloats Own::*half) {  // in the order of linear_parts
    const float *first = (own_[0].*half).data(), *second = (own_[1].*half).data();
    float *z = own.z.data();
    for (ptrdiff_t i = 0; i < M * d_stride_; ++i) z[i] = z[i] + first[i] + second[i];
  };
  const auto normed = [&](const Weights::LayerNorm &norm) {
    normalise(norm, own.z.data(), M, own.normed.data());
    return own.normed.data();
  };

  std::copy_n(z_.data(), M * d_stride_, own.z.data());
  linear_all(weights_.embed, token_.data(), token_stride_, Epilogue::kAdd, own.z);
  for (int layer = 0; layer < config_.n_layer; ++layer) {
    const Weights::Block &block = weights_.blocks[layer];
    if (rank == 0) stopped_ = poll.stopped(0);
    linear(rank, poll, block.qkv, normed(block.norm1), d_stride_, Epilogue::kStore, qkv_.data(), qkv_stride_);
    for (ptrdiff_t group = 0; group + 1 < std::ssize(groups_); ++group) {
      attend(rank, poll, layer, group * H + rank * H / 2, group * H + (rank + 1) * H / 2);
    }
    linear_all(block.proj[rank], attended_.data() + rank * config_.d_model / 2, d_stride_, Epilogue::kStore,
               own.projected);
    barrier(rank);
    if (stopped_) return;
    add_halves(&Own::projected);
    linear(rank, poll, block.fc1, normed(block.norm2), d_stride_, Epilogue::kGelu, hidden_.data(), ff_stride_);
    linear_all(block.fc2[rank], hidden_.data() + rank * config_.d_ff / 2, ff_stride_, Epilogue::kStore, own.down);
    barrier(rank);
    add_halves(&Own::down);
  }
  linear(rank, poll, weights_.head, normed(weights_.norm), d_stride_, Epilogue::kStore, head_.data(), k_stride_);
}

ptrdiff_t Decoder::panels_of(const Weights::Linear &layer) const noexcept {
  return round_up(layer.packed.out, kernels_.lanes) / kernels_.lanes;
}

// This rank's panels of y (M, out) <- x (M, in) through the layer.
void Decoder::linear(int rank, Poll &poll, const Weights::Linear &layer, const float *x, ptrdiff_t x_stride,
                     Epilogue epilogue, float *y, ptrdiff_t y_stride) noexcept {
  const Range mine = share(panels_of(layer), rank, team_size_);
  const ptrdiff_t M = std::ssize(rows_);
  const double products = static_cast<double>(mine.end - mine.begin) * kernels_.lanes * layer.packed.in;  // of a row
  const auto most = std::max<ptrdiff_t>(kPrefillRows, static_cast<ptrdiff_t>(kPolledProducts / (products + 1.0)));
  for (ptrdiff_t m = 0; m < M; m += most) {
    if (m > 0 && poll.stopped(rank)) return;
    kernels_.linear(layer.packed, mine.begin, mine.end, x + m * x_stride, x_stride, std::min(most, M - m), epilogue,
                    y + m * y_stride, y_stride);
  }
}

// This rank's panels of z (M, d) += x (M, in) through a layer in parts, one part's sum after the other.
void Decoder::linear_parts(int rank, Poll &poll, const std::vector<Weights::Linear> &parts, const float *x,
                           ptrdiff_t x_stride) noexcept {
  for (const Weights::Linear &part : parts) {
    linear(rank, poll, part, x, x_stride, Epilogue::kAdd, z_.data(), d_stride_);
    x += part.packed.in;
  }
}

void Decoder::normalise(const Weights::LayerNorm &norm, const float *z, ptrdiff_t rows, float *y) noexcept {
  kernels_.layer_norm(z, d_stride_, rows, config_.d_model, norm.weight.data(), norm.bias.data(), y, d_stride_);
}

// z (M, d) normalised, complete for this rank: few rows by each rank for itself, many by all together.
const float *Decoder::normalised(int rank, const Weights::LayerNorm &norm) noexcept {
  const ptrdiff_t M = std::ssize(rows_);
  const bool alone = M <= kOwnRows;
  const Range mine = alone ? Range{0, M} : share(M, rank, team_size_);
  float *y = alone ? own_[rank].normed.data() : normed_.data();
  const ptrdiff_t begin = mine.begin * d_stride_;
  normalise(norm, z_.data() + begin, mine.end - mine.begin, y + begin);
  if (!alone) barrier(rank);
  return y;
}

// (Group, head) pairs [begin, end): the rows' keys and values into the cache, then attended_ (M, d).
void Decoder::attend(int rank, Poll &poll, int layer, ptrdiff_t begin, ptrdiff_t end) noexcept {
  const int H = config_.n_head, D = config_.head_dim();
  const auto cache_of = [&](ptrdiff_t item) {
    return cache_.of(layer, rows_[groups_[item / H]].sequence, static_cast<int>(item % H));
  };
  for (ptrdiff_t item = begin; item < end; ++item) {
    if ((item - begin) % kPolledHeads == kPolledHeads - 1 && poll.stopped(rank)) return;
    const ptrdiff_t first = groups_[item / H], last = groups_[item / H + 1], head = item % H;
    const HeadCache cache = cache_of(item), next = item + 1 < end ? cache_of(item + 1) : cache;
    for (ptrdiff_t m = first; m < last; ++m) {
      const float *query = qkv_.data() + m * qkv_stride_ + head * 3 * D;
      kernels_.append(cache, rows_[m].slot, query + D, query + 2 * D);
    }
    for (ptrdiff_t m = first; m < last; ++m) {
      const float *query = qkv_.data() + m * qkv_stride_ + head * 3 * D;
      float *out = attended_.data() + m * d_stride_ + head * D;
      kernels_.attend(cache, next, query, rows_[m].slot + 1, own_[rank].sum.data(), out);
    }
  }
}

// The first of the (group, head) pairs, in order, that are `rank`'s: all have about the same number of slots to read.
ptrdiff_t Decoder::first_head(int rank) const noexcept {
  const ptrdiff_t H = config_.n_head, before = work_.back() * H * rank / team_size_;
  const auto group = std::upper_bound(work_.begin(), work_.end() - 1, before / H) - 1;
  const ptrdiff_t slots = group[1] - group[0];
  return (group - work_.begin()) * H + std::min(H, (before - group[0] * H + slots - 1) / slots);
}

}  // namespace tipl
