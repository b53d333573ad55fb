// The forecaster (tipl/forecasting/transformer.py) over a KV cache: prefill, step, generate. Not a general Transformer
// runtime.
//
// Shapes  L layers, B sequences, H heads, D head_dim, T slots, d = H * D, k coordinates, M rows; row-major float32.
// Rows    One pass takes M tokens, each a (sequence, slot): a step has one row for each sequence, a prefill has many.
//         Prefixes may differ in length, and a sequence without a row costs nothing.
// Bits    The result of a row has the same bits for any number of threads and whatever other rows are in the pass: a
//         prefill equals the same tokens one by one.
// Cost    2 * M * L * (4 d^2 + 2 d d_ff + 2 d slot) flops. Reading the weights is the limit at small M, reading the
//         cache at large M and slot.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "call.h"
#include "decoder_config.h"
#include "forward_pass.h"

namespace tipl {

// B trajectories and their caches. One call at a time: a second one gets std::runtime_error. Calls that compute ask a
// Poll, and throw Interrupted; position() tells how far they came.
class Decoder {
 public:
  // The pass was made for the same config and options.
  Decoder(const DecoderConfig &config, const DecoderOptions &options, std::unique_ptr<ForwardPass> pass);

  // x and y are memory of the pass's device, all other arrays of the host.
  //
  // y (B, k) <- the next coordinates after the observed prefixes x (B, t, k). That of sequence b has lengths[b] tokens,
  // or all t where lengths is null, and its end is h = lengths[b] - 1. The decoder must be empty, and is empty again
  // after an interruption.
  void prefill(const float *x, ptrdiff_t t, const int64_t *lengths, float *y, Poll &poll);

  // Appends x (B, k); y (B, k) <- the next coordinates. Appends nothing if interrupted.
  void step(const float *x, float *y, Poll &poll);

  // Appends n[b] >= 0 predictions to sequence b, beginning with the one that the last call returned, and writes them to
  // the first rows of y[b] in y (B, the largest n, k). A sequence that has all its predictions costs nothing more.
  // After an interruption another call continues from the steps done.
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

  const DecoderConfig config_;
  const DecoderOptions options_;
  mutable InUse in_use_;
  const std::unique_ptr<ForwardPass> pass_;
  Sequences sequences_;
};

}  // namespace tipl
