#include "decode.h"

#include <algorithm>
#include <iterator>

#include "check.h"
#include "cpu/decoder_pass.h"

namespace tipl {
namespace {

constexpr char kObject[] = "the decoder";

}  // namespace

Decoder::Decoder(const DecoderConfig &config, const std::vector<const float *> &tensors, const DecoderOptions &options,
                 Poll &poll)
    : config_(config),
      options_(options),
      pass_(std::make_unique<DecoderPass>(config, tensors, options, poll)),
      position_(options.batch_size),
      prefix_end_(options.batch_size),
      last_(options.batch_size * config.n_components),
      prediction_(options.batch_size * config.n_components) {}

Decoder::~Decoder() = default;

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
  pass_->clear();
  for (int b = 0; b < batch_size(); ++b) {
    const int length = static_cast<int>(lengths == nullptr ? t : lengths[b]);
    prefix_end_[b] = length - 1;
    for (int slot = 0; slot < length; ++slot) {
      const float *now = x + (b * t + slot) * k;
      add(b, slot, now, slot == 0 ? nullptr : now - k);
      const bool last = b == batch_size() - 1 && slot == length - 1;
      if (last || std::ssize(pass_->rows()) == pass_->max_rows()) {
        try {
          run(poll);
        } catch (const Interrupted &) {
          std::fill(position_.begin(), position_.end(), 0);
          throw;
        }
        pass_->clear();
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
  pass_->clear();
  for (int b = 0; b < batch_size(); ++b) {
    add(b, position_[b], x + ptrdiff_t{b} * k, last_.data() + ptrdiff_t{b} * k);
  }
  run(poll);
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
    pass_->clear();
    for (int b = 0; b < batch_size(); ++b) {
      if (i >= n[b]) continue;
      const float *x = prediction_.data() + ptrdiff_t{b} * k;
      std::copy_n(x, k, y + (b * most + i) * k);
      add(b, position_[b], x, last_.data() + ptrdiff_t{b} * k);
    }
    run(poll);
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

// Throws unless the sequence has a prefix, and room for `tokens` more.
void Decoder::check_room(const char *where, int sequence, int64_t tokens) const {
  const int64_t held = position_[sequence];
  check_state(held > 0, where, ": the decoder is empty; call prefill first");
  check(tokens <= max_len() - held, where, ": the cache is full: sequence ", sequence, " holds ", held,
        " of max_len = ", max_len(), " tokens, ", tokens, " more do not fit");
}

// Adds a row to the next pass.
void Decoder::add(int sequence, int64_t slot, const float *x, const float *previous) {
  pass_->add({sequence, static_cast<int>(slot)}, x, previous, prefix_end_[sequence]);
}

// Runs the pass. Afterwards each row is in the cache and counted by the position of its sequence, and prediction_ is
// what follows it. Interrupted, it has changed only slots that no position covers yet.
void Decoder::run(Poll &poll) {
  pass_->run(poll);
  const int k = config_.n_components;
  for (ptrdiff_t m = 0; m < std::ssize(pass_->rows()); ++m) {
    const auto [sequence, slot] = pass_->rows()[m];
    const float *x = pass_->coordinates(m), *head = pass_->output(m);
    for (int i = 0; i < k; ++i) {
      last_[ptrdiff_t{sequence} * k + i] = x[i];
      prediction_[ptrdiff_t{sequence} * k + i] = x[i] + config_.out_scale * head[i];
    }
    position_[sequence] = slot + 1;
  }
}

}  // namespace tipl
