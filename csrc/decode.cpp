#include "decode.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "check.h"

namespace tipl {
namespace {

constexpr char kObject[] = "the decoder";

}  // namespace

Decoder::Decoder(const DecoderConfig &config, const DecoderOptions &options, std::unique_ptr<ForwardPass> pass)
    : config_(config), options_(options), pass_(std::move(pass)), sequences_(options.batch_size) {}

void Decoder::prefill(const float *x, ptrdiff_t t, const int64_t *lengths, float *y, Poll &poll) {
  const InUse::Hold hold(in_use_, "prefill", kObject);
  const int k = config_.n_components;
  check(1 <= t && t <= max_len(), "prefill: t must lie in [1, ", max_len(), "], as max_len is, got ", t);
  std::vector<int64_t> tokens(batch_size(), t);
  for (int b = 0; b < batch_size(); ++b) {
    check_state(sequences_.position[b] == 0, "prefill: the decoder must be empty, but sequence ", b, " holds ",
                sequences_.position[b], " tokens; call reset() first");
    if (lengths != nullptr) tokens[b] = lengths[b];
    check(1 <= tokens[b] && tokens[b] <= t, "prefill: lengths must lie in [1, ", t, "], got ", tokens[b],
          " for sequence ", b);
  }
  if (const auto bad = pass_->find_not_finite(x, t, tokens, poll)) {
    const ptrdiff_t row = bad->at / k;
    check(false, "prefill: x[", row / t, "] must be finite, got ", bad->value, " at (", row % t, ", ", bad->at % k,
          ")");
  }
  for (int b = 0; b < batch_size(); ++b) sequences_.prefix_end[b] = tokens[b] - 1;
  try {
    pass_->observe(x, t, tokens, sequences_, poll);
  } catch (...) {
    std::fill(sequences_.position.begin(), sequences_.position.end(), 0);
    throw;
  }
  pass_->read(y);
}

void Decoder::step(const float *x, float *y, Poll &poll) {
  const InUse::Hold hold(in_use_, "step", kObject);
  const int k = config_.n_components;
  for (int b = 0; b < batch_size(); ++b) check_room("step", b, 1);
  const std::vector<int64_t> tokens(batch_size(), 1);
  if (const auto bad = pass_->find_not_finite(x, 1, tokens, poll)) {
    check(false, "step: x must be finite, got ", bad->value, " at (", bad->at / k, ", ", bad->at % k, ")");
  }
  pass_->observe(x, 1, tokens, sequences_, poll);
  pass_->read(y);
}

void Decoder::generate(const std::vector<int64_t> &n, float *y, Poll &poll) {
  const InUse::Hold hold(in_use_, "generate", kObject);
  for (int b = 0; b < batch_size(); ++b) {
    check(n[b] >= 0, "generate: n must be >= 0, got ", n[b], " for sequence ", b);
    check_room("generate", b, n[b]);
  }
  pass_->predict(n, y, sequences_, poll);
}

void Decoder::reset() {
  const InUse::Hold hold(in_use_, "reset", kObject);
  std::fill(sequences_.position.begin(), sequences_.position.end(), 0);
}

std::vector<int64_t> Decoder::position() const {
  const InUse::Hold hold(in_use_, "position", kObject);
  return sequences_.position;
}

// Throws unless the sequence has a prefix, and room for `tokens` more.
void Decoder::check_room(const char *where, int sequence, int64_t tokens) const {
  const int64_t held = sequences_.position[sequence];
  check_state(held > 0, where, ": the decoder is empty; call prefill first");
  check(tokens <= max_len() - held, where, ": the cache is full: sequence ", sequence, " holds ", held,
        " of max_len = ", max_len(), " tokens, ", tokens, " more do not fit");
}

}  // namespace tipl
