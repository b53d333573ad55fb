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
#include <vector>

#include "call.h"
#include "cpu/aligned.h"
#include "cpu/decode_kernels.h"
#include "cpu/parallel.h"
#include "cpu/weights.h"

namespace tipl {

struct KvCache {
  KvCache(const DecoderConfig &config, Precision precision, int batch_size, int max_len, int lanes);

  // Head h of sequence b in layer l.
  HeadCache of(int l, int b, int h) noexcept {
    uint32_t *head = words.data() + ((ptrdiff_t{l} * B + b) * H + h) * head_words;
    return {precision, head_dim, value_stride, head, head + block_keys, block_words};
  }

  const Precision precision;
  const int B, H, T, head_dim;
  const int value_stride;                               // head_dim rounded up to N
  const ptrdiff_t block_keys, block_words, head_words;  // words of one block's keys, of one block, of one head
  AlignedWords words;                                   // (L, B, H, head_words)
};

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
  int batch_size() const noexcept { return cache_.B; }
  int max_len() const noexcept { return cache_.T; }
  int num_threads() const noexcept { return pool_.size(); }

 private:
  struct Row {
    int sequence, slot;
  };
  struct Own {                      // of one rank
    AlignedFloats normed;           // (kOwnRows, d)
    AlignedFloats sum;              // (D), of one head's values
    AlignedFloats z;                // (kOwnRows, d), for pass_in_halves, as what follows
    AlignedFloats projected, down;  // (kOwnRows, d), what proj and fc2 make of this rank's half
  };

  void check_room(const char *where, int sequence, int64_t tokens) const;
  void begin_rows() noexcept;
  void add_row(Row row, const float *x, const float *previous) noexcept;
  void run_rows(Poll &poll);
  void pass(int rank, Poll &poll) noexcept;
  void pass_in_halves(int rank, Poll &poll) noexcept;
  void barrier(int rank) noexcept;
  ptrdiff_t panels_of(const Weights::Linear &layer) const noexcept;
  void linear(int rank, Poll &poll, const Weights::Linear &layer, const float *x, ptrdiff_t x_stride, Epilogue epilogue,
              float *y, ptrdiff_t y_stride) noexcept;
  void linear_parts(int rank, Poll &poll, const std::vector<Weights::Linear> &parts, const float *x,
                    ptrdiff_t x_stride) noexcept;
  const float *normalised(int rank, const Weights::LayerNorm &norm) noexcept;
  void normalise(const Weights::LayerNorm &norm, const float *z, ptrdiff_t rows, float *y) noexcept;
  void attend(int rank, Poll &poll, int layer, ptrdiff_t begin, ptrdiff_t end) noexcept;
  ptrdiff_t first_head(int rank) const noexcept;

  const DecoderConfig config_;
  const DecodeKernels &kernels_;
  const Weights weights_;
  KvCache cache_;
  ThreadPool pool_;
  mutable InUse in_use_;

  std::vector<int64_t> position_;    // (B), tokens in the cache
  std::vector<int64_t> prefix_end_;  // (B), h
  AlignedFloats last_;               // (B, k), coordinates of the last token
  AlignedFloats prediction_;         // (B, k), of the coordinates that follow it

  // The current pass. Rows of one sequence lie together.
  std::vector<Row> rows_;        // (M)
  std::vector<int> groups_;      // first row of each sequence's run of rows, then M
  std::vector<ptrdiff_t> work_;  // slots that a head of the groups before each reads, then of all
  bool stopped_ = false;         // as the poll says; written by rank 0 before a barrier, read by all behind it
  int team_size_ = 1;            // ranks at work: all of the pool, or 1 where the pass is too small to share
  const ptrdiff_t max_rows_;     // room for M below
  const int token_stride_, d_stride_, qkv_stride_, ff_stride_, k_stride_;
  AlignedFloats token_;     // (M, 2k + 1), u in model.py
  AlignedFloats z_;         // (M, d), the residual stream
  AlignedFloats normed_;    // (M, d)
  AlignedFloats qkv_;       // (M, H, q | k | v, D)
  AlignedFloats attended_;  // (M, d)
  AlignedFloats hidden_;    // (M, d_ff)
  AlignedFloats head_;      // (M, k)
  std::vector<Own> own_;    // of each rank
};

}  // namespace tipl
