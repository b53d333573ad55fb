// One pass of rows through the forecaster, over a KV cache, on the CPU. Letters as in decode.h.
//
// Cache   (L, B, H, T / 64, keys and values of 64 slots) in float32 or bfloat16: attention reads the past of a head as
//         one stream, once, with online softmax (arXiv:1805.02867). Keys are transposed inside groups of N slots, so
//         that N scores fill one register.
// Threads share the outputs of each layer, and the (sequence, head) pairs in attention, with five barriers for each
//         block. Two threads with few rows share each block by halves instead, with two barriers: see run_in_halves.
// Bits    Only the sums of proj and fc2 are split, where halved(config): into two halves, for every number of threads.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "call.h"
#include "cpu/aligned.h"
#include "cpu/decode_kernels.h"
#include "cpu/parallel.h"
#include "cpu/team_choice.h"
#include "cpu/weights.h"
#include "decoder_config.h"
#include "forward_pass.h"

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
  const ptrdiff_t block_keys, block_words, head_words;  // words of the keys of a block, of a block, of a head
  AlignedWords words;                                   // (L, B, H, head_words)
};

class DecoderPass final : public ForwardPass {
 public:
  // Throws as check_decoder does.
  DecoderPass(const DecoderConfig &config, const std::vector<const float *> &tensors, const DecoderOptions &options,
              Poll &poll);

  std::optional<NotFinite> find_not_finite(const float *x, ptrdiff_t t, const std::vector<int64_t> &tokens,
                                           Poll &poll) override;
  void observe(const float *x, ptrdiff_t t, const std::vector<int64_t> &tokens, Sequences &sequences,
               Poll &poll) override;
  void predict(const std::vector<int64_t> &n, float *y, Sequences &sequences, Poll &poll) override;
  void read(float *y) override;

 private:
  struct Row {
    int sequence, slot;
  };
  struct Own {                      // buffers of one rank
    AlignedFloats normed;           // (kOwnRows, d)
    AlignedFloats sum;              // (D), of the values of one head
    AlignedFloats z;                // (kOwnRows, d); this and the next line are for run_in_halves
    AlignedFloats projected, down;  // (kOwnRows, d), results of proj and fc2 on the half of this rank
  };

  // The rows of the next pass: clear() them, then add() at most max_rows_, those of one sequence together and in order.
  // x (k) are the coordinates of the row and `previous` those before it, null for the first token of its sequence;
  // prefix_end is h.
  void clear() noexcept;
  void add(Row row, const float *x, const float *previous, int64_t prefix_end) noexcept;
  // Runs the pass. Afterwards each row is in the cache and counted by the position of its sequence, and prediction_ is
  // what follows it. Throws Interrupted, and has changed only slots that no position covers yet then.
  void run(Sequences &sequences, Poll &poll);

  void run_on_all(int rank, Poll &poll) noexcept;
  void run_in_halves(int rank, Poll &poll) noexcept;
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

  // The current pass. Rows of one sequence lie together.
  std::vector<Row> rows_;        // (M)
  std::vector<int> groups_;      // (sequences + 1), the first row of each sequence, then M
  std::vector<ptrdiff_t> work_;  // (sequences + 1), slots that a head reads for all sequences before each
  bool stopped_ = false;         // whether to stop; rank 0 writes it before a barrier, all read it after it
  int team_size_ = 1;            // ranks at work: all, or 1 where the pass is too small to share or others take cores
  std::array<TeamChoice, 32> team_choices_;  // by the number of binary digits of M: passes of like size
  const ptrdiff_t max_rows_;                 // the largest M
  const int token_stride_, d_stride_, qkv_stride_, ff_stride_, k_stride_;
  AlignedFloats token_;     // (M, 2k + 1), u in transformer.py
  AlignedFloats z_;         // (M, d), the residual stream
  AlignedFloats normed_;    // (M, d)
  AlignedFloats qkv_;       // (M, H, q | k | v, D)
  AlignedFloats attended_;  // (M, d)
  AlignedFloats hidden_;    // (M, d_ff)
  AlignedFloats head_;      // (M, k)
  std::vector<Own> own_;    // for each rank

  std::vector<float> last_;        // (B, k), coordinates of the last token
  std::vector<float> prediction_;  // (B, k), of the coordinates that follow it
};

}  // namespace tipl
