// Where a decoder computes: the forecaster's weights, the caches of B sequences, and what each of them predicts next.
// The CPU's is cpu/decoder_pass.h, CUDA's cuda/decoder_pass.h. Letters as in decode.h.
//
// The decoder has checked every argument. x and y point to memory of the pass's device.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "call.h"

namespace tipl {

// The tokens of each sequence, which the decoder and its pass share.
struct Sequences {
  explicit Sequences(ptrdiff_t batch_size) : position(batch_size), prefix_end(batch_size) {}

  std::vector<int64_t> position;    // (B), tokens in the cache
  std::vector<int64_t> prefix_end;  // (B), h
};

class ForwardPass {
 public:
  // A value that is NaN or Inf, and its place in an array.
  struct NotFinite {
    ptrdiff_t at;
    float value;
  };

  virtual ~ForwardPass() = default;

  // The first value that is NaN or Inf among the first tokens[b] rows of each x[b], x (B, t, k).
  virtual std::optional<NotFinite> find_not_finite(const float *x, ptrdiff_t t, const std::vector<int64_t> &tokens,
                                                   Poll &poll) = 0;

  // Appends the first tokens[b] rows of x[b] to each sequence, x (B, t, k), and adds to its position what has entered.
  // Throws Interrupted, and then the predictions are of no use.
  virtual void observe(const float *x, ptrdiff_t t, const std::vector<int64_t> &tokens, Sequences &sequences,
                       Poll &poll) = 0;

  // Appends n[b] of its own predictions to each sequence, and writes them to the first rows of y[b], y (B, the largest
  // n, k). Throws Interrupted between two steps, and another call continues from there.
  virtual void predict(const std::vector<int64_t> &n, float *y, Sequences &sequences, Poll &poll) = 0;

  // y (B, k) <- what follows each sequence.
  virtual void read(float *y) = 0;
};

}  // namespace tipl
