// The forecaster (tipl/model.py) over a KV cache: prefill, step, generate. Not a general Transformer runtime.
//
// Shapes  L layers, B sequences, H heads, D head_dim, T slots, d = H * D, k coordinates, M rows; row-major float32.
// Rows    One pass takes M tokens, each a (sequence, slot): a step is one row a sequence, a prefill many. Prefixes may
// be
//         ragged, and a sequence without a row costs nothing.
// Cache   (L, B, H, T, D): a head's past lies together, and attention reads it once, with online softmax
//         (arXiv:1805.02867). Keys are transposed inside blocks of N slots, so that N scores fill one register.
// Threads split a layer's outputs, and (sequence, head) in attention; no sum is split. A row's result has the same bits
//         for any thread count and whatever rows are beside it: a prefill equals the same tokens one by one.
// Cost    2 * M * L * (4 d^2 + 2 d d_ff + 2 d slot) flops; bound by reading the weights at small M.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "aligned.h"
#include "kernels.h"
#include "parallel.h"

namespace tipl {

struct DecoderConfig {
  int n_components, n_layer, n_head, d_model, d_ff, max_len;
  float diff_scale, out_scale;

  int head_dim() const noexcept { return d_model / n_head; }
  int token_width() const noexcept { return 2 * n_components + 1; }
};

// One tensor of the model: its name in the state_dict, and its shape.
struct TensorSpec {
  std::string name;
  std::vector<ptrdiff_t> shape;
};

// The tensors of a model of these sizes, in the order in which Decoder takes them.
// Throws std::invalid_argument where the sizes make no model.
std::vector<TensorSpec> tensor_specs(const DecoderConfig &config);

// The model's tensors, packed for the kernels in use. Every constructor takes its tensors from the front of a list in
// tensor_specs' order, and moves the list on.
struct Weights {
  using Tensors = const float *const *;

  struct Linear {
    Linear(Tensors &tensors, int in, int out);  // weight (out, in), bias (out)
    AlignedFloats weight, bias;                 // as PackedLinear wants them
    PackedLinear packed;
  };
  struct LayerNorm {
    LayerNorm(Tensors &tensors, int d);
    AlignedFloats weight, bias;  // (d) each
  };
  struct Block {
    Block(Tensors &tensors, const DecoderConfig &config);
    LayerNorm norm1;
    Linear qkv, proj;  // (3d, d) with rows q | k | v and heads contiguous inside each, (d, d)
    LayerNorm norm2;
    Linear fc1, fc2;  // (d_ff, d), (d, d_ff)
  };

  Weights(Tensors tensors, const DecoderConfig &config);

  Linear embed;               // (d, 2k + 1)
  AlignedFloats pos;          // (max_len, d)
  std::vector<Block> blocks;  // L
  LayerNorm norm;
  Linear head;  // (k, d)
};

struct KvCache {
  KvCache(const DecoderConfig &config, int batch_size, int max_len, int lanes);

  // Head h of sequence b in layer l: its keys (T / N, D, N) and its values (T, D rounded up to N).
  float *keys_of(int l, int b, int h) noexcept { return keys.data() + head_index(l, b, h) * keys_size; }
  float *values_of(int l, int b, int h) noexcept { return values.data() + head_index(l, b, h) * values_size; }
  ptrdiff_t head_index(int l, int b, int h) const noexcept { return (ptrdiff_t{l} * B + b) * H + h; }

  int B, H, T;
  int value_stride;                  // D rounded up to N
  ptrdiff_t keys_size, values_size;  // floats of one head
  AlignedFloats keys, values;        // (L, B, H, keys_size), (L, B, H, values_size)
};

// B trajectories and their caches. One call at a time: a second thread's is refused with std::runtime_error.
class Decoder {
 public:
  // Asked between passes, about every 20 ms. True stops the work.
  using Interrupted = std::function<bool()>;

  // `tensors` as tensor_specs(config) lists them; max_len is T, the tokens that a sequence can hold.
  // Throws std::invalid_argument for wrong sizes and for NaN or Inf in a tensor.
  Decoder(const DecoderConfig &config, const std::vector<const float *> &tensors, ptrdiff_t batch_size,
          ptrdiff_t max_len, ptrdiff_t num_threads);

  // y (B, k) <- the next coordinates, from the observed prefixes x (B, t, k), of which sequence b has lengths[b] tokens
  // (all t where lengths is null) and h = lengths[b] - 1. The decoder must be empty. False: interrupted, and empty
  // again.
  bool prefill(const float *x, ptrdiff_t t, const int64_t *lengths, float *y, const Interrupted &interrupted);

  // Appends x (B, k); y (B, k) <- the next coordinates.
  void step(const float *x, float *y);

  // Appends n predictions, the last one returned first, and writes them to y (B, n, k). False: interrupted after some
  // steps; position() tells how many, and generate goes on from there.
  bool generate(ptrdiff_t n, float *y, const Interrupted &interrupted);

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
  class InUse;

  void check_room(const char *where, ptrdiff_t tokens) const;
  void begin_rows() noexcept;
  void add_row(Row row, const float *x, const float *previous) noexcept;
  void step_rows(const float *x);
  void run_rows();
  void pass(int rank) noexcept;
  void barrier() noexcept;
  void linear(int rank, const Weights::Linear &layer, const float *x, ptrdiff_t x_stride, Epilogue epilogue, float *y,
              ptrdiff_t y_stride) noexcept;
  const float *normalised(int rank, const Weights::LayerNorm &norm) noexcept;
  void attend(int rank, int layer) noexcept;

  const DecoderConfig config_;
  const Kernels &kernels_;
  const Weights weights_;
  const double products_;  // multiplications of one row, without attention's
  KvCache cache_;
  ThreadPool pool_;
  mutable std::atomic_flag in_use_;

  std::vector<int64_t> position_;    // (B), tokens in the cache
  std::vector<int64_t> prefix_end_;  // (B), h
  std::vector<float> last_;          // (B, k), coordinates of the last token
  std::vector<float> prediction_;    // (B, k), of the coordinates that follow it

  // The current pass. Rows of one sequence lie together.
  std::vector<Row> rows_;     // (M)
  std::vector<int> groups_;   // first row of each sequence's run of rows, then M
  int team_size_ = 1;         // ranks at work: all of the pool, or 1 where the pass is too small to share
  const ptrdiff_t max_rows_;  // room for M below
  const int token_stride_, d_stride_, qkv_stride_, ff_stride_, k_stride_;
  AlignedFloats token_;             // (M, 2k + 1), u in model.py
  AlignedFloats z_;                 // (M, d), the residual stream
  AlignedFloats normed_;            // (M, d)
  AlignedFloats qkv_, attended_;    // (M, 3d), (M, d)
  AlignedFloats hidden_;            // (M, d_ff)
  AlignedFloats head_;              // (M, k)
  std::vector<AlignedFloats> own_;  // of each rank: (kOwnRows, d) normalised rows, then one head's sum
};

}  // namespace tipl
