#include "cpu/decoder_pass.h"

#include <algorithm>
#include <bit>
#include <chrono>
#include <cmath>
#include <iterator>

#include "cpu/isa.h"

namespace tipl {
namespace {

constexpr ptrdiff_t kPrefillRows = 96;     // rows of one pass of a prefill: enough to make the cost of weights vanish
constexpr ptrdiff_t kOwnRows = 4;          // up to so many rows, each rank normalises all: cheaper than a barrier
constexpr double kPolledProducts = 1.0e9;  // multiplications of a thread between two polls,
constexpr ptrdiff_t kPolledHeads = 16;     //   and heads of sequences between two polls in attention

int row_stride(int n) { return static_cast<int>(round_up(n, kInputPadding)); }

const DecoderConfig &checked(const DecoderConfig &config, const std::vector<const float *> &tensors,
                             const DecoderOptions &options, Poll &poll) {
  check_decoder(config, tensors, options, poll);
  return config;
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

DecoderPass::DecoderPass(const DecoderConfig &config, const std::vector<const float *> &tensors,
                         const DecoderOptions &options, Poll &poll)
    : config_(checked(config, tensors, options, poll)),
      kernels_(decode_kernels()),
      weights_(tensors, config, options.weights, poll),
      cache_(config, options.cache, static_cast<int>(options.batch_size), static_cast<int>(options.max_len),
             kernels_.lanes),
      pool_(options.num_threads),
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
      head_({max_rows_, k_stride_}),
      last_(options.batch_size * config.n_components),
      prediction_(options.batch_size * config.n_components) {
  rows_.reserve(max_rows_);
  groups_.reserve(max_rows_ + 1);
  work_.reserve(max_rows_ + 1);
  for (int rank = 0; rank < pool_.size(); ++rank) {
    const auto rows = [&] { return AlignedFloats({kOwnRows, d_stride_}); };
    own_.push_back({rows(), AlignedFloats({cache_.value_stride}), rows(), rows(), rows()});
  }
}

// ---- the sequences

std::optional<ForwardPass::NotFinite> DecoderPass::find_not_finite(const float *x, ptrdiff_t t,
                                                                   const std::vector<int64_t> &tokens, Poll &poll) {
  const ptrdiff_t k = config_.n_components;
  for (ptrdiff_t b = 0; b < std::ssize(tokens); ++b) {
    poll(0);
    const float *begin = x + b * t * k, *end = begin + tokens[b] * k;
    const float *bad = std::find_if_not(begin, end, [](float value) { return std::isfinite(value); });
    if (bad != end) return NotFinite{bad - x, *bad};
  }
  return std::nullopt;
}

void DecoderPass::observe(const float *x, ptrdiff_t t, const std::vector<int64_t> &tokens, Sequences &sequences,
                          Poll &poll) {
  const ptrdiff_t k = config_.n_components, B = std::ssize(tokens);
  clear();
  for (ptrdiff_t b = 0; b < B; ++b) {
    const int64_t held = sequences.position[b];
    for (ptrdiff_t i = 0; i < tokens[b]; ++i) {
      const float *now = x + (b * t + i) * k;
      const float *previous = i > 0 ? now - k : held > 0 ? last_.data() + b * k : nullptr;
      add({static_cast<int>(b), static_cast<int>(held + i)}, now, previous, sequences.prefix_end[b]);
      const bool is_last = b == B - 1 && i == tokens[b] - 1;
      if (is_last || std::ssize(rows_) == max_rows_) {
        run(sequences, poll);
        clear();
      }
    }
  }
}

void DecoderPass::predict(const std::vector<int64_t> &n, float *y, Sequences &sequences, Poll &poll) {
  const ptrdiff_t k = config_.n_components, B = std::ssize(n);
  const int64_t most = *std::max_element(n.begin(), n.end());
  for (int64_t i = 0; i < most; ++i) {
    clear();
    for (ptrdiff_t b = 0; b < B; ++b) {
      if (i >= n[b]) continue;
      const float *x = prediction_.data() + b * k;
      std::copy_n(x, k, y + (b * most + i) * k);
      add({static_cast<int>(b), static_cast<int>(sequences.position[b])}, x, last_.data() + b * k,
          sequences.prefix_end[b]);
    }
    run(sequences, poll);
  }
}

void DecoderPass::read(float *y) { std::copy(prediction_.begin(), prediction_.end(), y); }

// ---- the rows

void DecoderPass::clear() noexcept {
  rows_.clear();
  groups_.clear();
}

// Writes the token of row M, u = [x | diff_scale * (x - previous) | (slot - h) / max_len], and starts z with pos[slot].
void DecoderPass::add(Row row, const float *x, const float *previous, int64_t prefix_end) noexcept {
  const ptrdiff_t m = std::ssize(rows_);
  const int k = config_.n_components, d = config_.d_model;
  float *u = token_.data() + m * token_stride_;
  for (int i = 0; i < k; ++i) {
    u[i] = x[i];
    u[k + i] = previous == nullptr ? 0.0f : config_.diff_scale * (x[i] - previous[i]);
  }
  u[2 * k] = static_cast<float>(row.slot - prefix_end) / static_cast<float>(config_.max_len);
  std::copy_n(weights_.pos.data() + ptrdiff_t{row.slot} * d, d, z_.data() + m * d_stride_);
  if (rows_.empty() || rows_.back().sequence != row.sequence) groups_.push_back(static_cast<int>(m));
  rows_.push_back(row);
}

// ---- the pass

void DecoderPass::run(Sequences &sequences, Poll &poll) {
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
  const bool is_shared = products >= kSharedProducts && pool_.size() > 1;
  TeamChoice &choice = team_choices_[std::bit_width(rows_.size())];
  team_size_ = is_shared && !choice.alone() ? pool_.size() : 1;
  const bool halves = team_size_ == 2 && halved(config_) && std::ssize(rows_) <= kOwnRows;
  stopped_ = false;
  using Clock = std::chrono::steady_clock;
  const Clock::time_point begin = is_shared ? Clock::now() : Clock::time_point();  // a small pass takes 3 us
  if (team_size_ > 1) {
    pool_.run([&](int rank) noexcept { halves ? run_in_halves(rank, poll) : run_on_all(rank, poll); });
  } else {
    run_on_all(0, poll);
  }
  if (poll.was_stopped()) throw Interrupted();  // in the last layer too, where some rank may have skipped its work
  if (is_shared) choice.took(products, std::chrono::duration<double>(Clock::now() - begin).count());
  const ptrdiff_t k = config_.n_components;
  for (ptrdiff_t m = 0; m < std::ssize(rows_); ++m) {
    const auto [sequence, slot] = rows_[m];
    const float *x = token_.data() + m * token_stride_, *head = head_.data() + m * k_stride_;
    for (ptrdiff_t i = 0; i < k; ++i) {
      last_[sequence * k + i] = x[i];
      prediction_[sequence * k + i] = x[i] + config_.out_scale * head[i];
    }
    sequences.position[sequence] = slot + 1;
  }
}

void DecoderPass::barrier(int rank) noexcept {
  if (team_size_ > 1) pool_.barrier(rank);
}

// If the call should stop, each rank skips the rest of its work once it knows. All leave together at the next layer,
// where rank 0 has passed on the answer through stopped_, or after the last one.
void DecoderPass::run_on_all(int rank, Poll &poll) noexcept {
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

// The same for two ranks and few rows, with two barriers for each block instead of five (after Megatron-LM,
// arXiv:1909.08053): each rank takes half of the heads from qkv through proj, and half of the units of the MLP from fc1
// through fc2. Each rank keeps all of z, embedding included, and adds the results of both halves to it.
void DecoderPass::run_in_halves(int rank, Poll &poll) noexcept {
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

ptrdiff_t DecoderPass::panels_of(const Weights::Linear &layer) const noexcept {
  return round_up(layer.packed.out, kernels_.lanes) / kernels_.lanes;
}

// The panels of this rank in y (M, out) <- the layer of x (M, in).
void DecoderPass::linear(int rank, Poll &poll, const Weights::Linear &layer, const float *x, ptrdiff_t x_stride,
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

// The panels of this rank in z (M, d) += the layer of x (M, in), whose parts are added one after the other.
void DecoderPass::linear_parts(int rank, Poll &poll, const std::vector<Weights::Linear> &parts, const float *x,
                               ptrdiff_t x_stride) noexcept {
  for (const Weights::Linear &part : parts) {
    linear(rank, poll, part, x, x_stride, Epilogue::kAdd, z_.data(), d_stride_);
    x += part.packed.in;
  }
}

void DecoderPass::normalise(const Weights::LayerNorm &norm, const float *z, ptrdiff_t rows, float *y) noexcept {
  kernels_.layer_norm(z, d_stride_, rows, config_.d_model, norm.weight.data(), norm.bias.data(), y, d_stride_);
}

// Returns z (M, d) normalised. Each rank computes few rows for itself; many rows are shared by all ranks.
const float *DecoderPass::normalised(int rank, const Weights::LayerNorm &norm) noexcept {
  const ptrdiff_t M = std::ssize(rows_);
  const bool alone = M <= kOwnRows;
  const Range mine = alone ? Range{0, M} : share(M, rank, team_size_);
  float *y = alone ? own_[rank].normed.data() : normed_.data();
  const ptrdiff_t begin = mine.begin * d_stride_;
  normalise(norm, z_.data() + begin, mine.end - mine.begin, y + begin);
  if (!alone) barrier(rank);
  return y;
}

// For the (group, head) pairs [begin, end): stores the keys and values of the rows in the cache, then computes
// attended_ (M, d). A group is the rows of one sequence.
void DecoderPass::attend(int rank, Poll &poll, int layer, ptrdiff_t begin, ptrdiff_t end) noexcept {
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

// The first of the (group, head) pairs, in order, that belong to `rank`: all ranks read about equally many slots.
ptrdiff_t DecoderPass::first_head(int rank) const noexcept {
  const ptrdiff_t H = config_.n_head, before = work_.back() * H * rank / team_size_;
  const auto group = std::upper_bound(work_.begin(), work_.end() - 1, before / H) - 1;
  const ptrdiff_t slots = group[1] - group[0];
  return (group - work_.begin()) * H + std::min(H, (before - group[0] * H + slots - 1) / slots);
}

}  // namespace tipl
