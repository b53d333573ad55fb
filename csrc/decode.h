// The forecaster (tipl/forecasting/transformer.py) over a KV cache: prefill, step, generate. Not a general Transformer
// runtime.
//
// Shapes  L layers, B sequences, H heads, D head_dim, T slots, d = H * D, k coordinates, M rows; row-major float32.
// Rows    One pass takes M tokens, each a (sequence, slot): a step is one row a sequence, a prefill many. Prefixes may
//         be ragged, and a sequence without a row costs nothing.
// Cache   (L, B, H, T / 64, keys and values of 64 slots) in float32 or bfloat16: attention reads a head's past as one
//         stream and once, with online softmax (arXiv:1805.02867). Keys are transposed inside groups of N slots, so
//         that N scores fill one register.
// Threads split a layer's outputs, and (sequence, head) in attention, with five barriers a block. Two of them that have
//         few rows split a block in halves instead, with two barriers: see pass_in_halves.
// Bits    A row's result has the same bits for any thread count and whatever rows are beside it: a prefill equals the
//         same tokens one by one. No sum is split but those of proj and fc2, which are sums of two halves for every
//         thread count where config.halved().
// Cost    2 * M * L * (4 d^2 + 2 d d_ff + 2 d slot) flops; bound by reading the weights at small M, and the cache at
//         large M and slot.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "call.h"
#include "decoder_config.h"
#include "precision.h"

namespace tipl {

class DecoderPass;

// How a model is run: what its weights and its cache are stored in, how many sequences of how many tokens, on how many
// threads.
struct DecoderOptions {
  Precision weights, cache;  // the cache is not kInt8
  ptrdiff_t batch_size, max_len, num_threads;
};

// B trajectories and their caches. One call at a time: another is refused with std::runtime_error. Calls that compute
// ask a Poll, and throw Interrupted; position() tells how far they came.
class Decoder {
 public:
  // `tensors` as tensor_specs(config) lists them; max_len is T, the tokens that a sequence can hold.
  // Throws std::invalid_argument for wrong sizes and for NaN or Inf in a tensor.
  Decoder(const DecoderConfig &config, const std::vector<const float *> &tensors, const DecoderOptions &options,
          Poll &poll);
  ~Decoder();

  // y (B, k) <- the next coordinates, from the observed prefixes x (B, t, k), of which sequence b has lengths[b] tokens
  // (all t where lengths is null) and h = lengths[b] - 1. The decoder must be empty, and is empty again where this was
  // interrupted.
  void prefill(const float *x, ptrdiff_t t, const int64_t *lengths, float *y, Poll &poll);

  // Appends x (B, k); y (B, k) <- the next coordinates. Interrupted, it has appended nothing.
  void step(const float *x, float *y, Poll &poll);

  // Appends n[b] >= 0 predictions to sequence b, the last one returned first, and writes them to the first rows of
  // y[b] in y (B, the largest n, k). A sequence that has all its own costs nothing more. Interrupted after some steps,
  // it goes on from there.
  void generate(const std::vector<int64_t> &n, float *y, Poll &poll);

  // Empties every sequence.
  void reset();

  std::vector<int64_t> position() const;  // (B), tokens held
  const DecoderConfig &config() const noexcept { return config_; }
  int batch_size() const noexcept { return static_cast<int>(options_.batch_size); }
  int max_len() const noexcept { return static_cast<int>(options_.max_len); }
  int num_threads() const noexcept { return static_cast<int>(options_.num_threads); }

 private:
  void check_room(const char *where, int sequence, int64_t tokens) const;
  void add(int sequence, int64_t slot, const float *x, const float *previous);
  void run(Poll &poll);

  const DecoderConfig config_;
  const DecoderOptions options_;
  mutable InUse in_use_;
  const std::unique_ptr<DecoderPass> pass_;
  std::vector<int64_t> position_;    // (B), tokens in the cache
  std::vector<int64_t> prefix_end_;  // (B), h
  std::vector<float> last_;          // (B, k), coordinates of the last token
  std::vector<float> prediction_;    // (B, k), of the coordinates that follow it
};

}  // namespace tipl
