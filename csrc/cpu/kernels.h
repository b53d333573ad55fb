// The SIMD kernels: kernels.cpp is compiled once per instruction set, and each copy fills one table of functions.
//
// Every function is noexcept and unchecked, computes on the calling thread, and keeps a fixed order of its sums: its
// results depend neither on how many rows it is given nor on how the work was split. Matrices are row-major float32.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace tipl {

// How stored numbers are packed into 32-bit words, each of one row's or one slot's lane: one float, two bfloat16 or
// four int8 a word, the lowest bits first. Sums are float32 throughout.
enum class Precision { kFloat32, kBfloat16, kInt8 };
// (static: this header is compiled for several instruction sets, and no copy of one may serve the others.)
static constexpr int values_per_word(Precision precision) {
  return precision == Precision::kFloat32 ? 1 : precision == Precision::kBfloat16 ? 2 : 4;
}
// The words that n values of one row take.
static constexpr ptrdiff_t words_of(ptrdiff_t n, Precision precision) {
  return (n + values_per_word(precision) - 1) / values_per_word(precision);
}

// A linear layer y = W x + b, its outputs in panels of N = lanes, so that a panel's sums fill one register, and the
// panels in groups of G, whose words for one input lie side by side, so that a group's weights are read as one stream.
// The last group has the panels that are left.
struct PackedLinear {
  Precision precision;
  const uint32_t *weight;  // (groups, words_of(in), G, N) words, zero beyond `out` and `in`
  const float *scale;      // (panels * N), of each output's int8 weights; null for the other precisions
  const float *bias;       // (panels * N)
  int in, out;
};
// Where the words of one output lie: the first, and how far apart. padded_out is `out` rounded up to N, group is G N.
struct PackedOutput {
  ptrdiff_t first, stride;
};
static constexpr PackedOutput packed_output(ptrdiff_t output, ptrdiff_t padded_out, ptrdiff_t words, ptrdiff_t group) {
  const ptrdiff_t within = output % group, begin = output - within, left = padded_out - begin;
  return {begin * words + within, left < group ? left : group};
}
constexpr ptrdiff_t kInputPadding = 32;  // rows of x are readable and zero up to a multiple of this

// What becomes of W x + b.
enum class Epilogue { kStore, kGelu, kAdd };  // y = ., y = gelu_tanh(.), y += .

// One head's past in one sequence, in blocks of kCacheBlock slots that follow each other in memory, each one its keys
// and then its values; c = values_per_word(precision), which is not kInt8.
struct HeadCache {
  Precision precision;
  int head_dim;      // D
  int value_stride;  // D rounded up to N
  uint32_t *keys;    // of block 0: (kCacheBlock / N, D / c rounded up, N) words, transposed inside groups of N slots
  uint32_t *values;  // of block 0: (kCacheBlock / c, value_stride) words, c slots side by side
  ptrdiff_t block_words;  // from one block to the next
};
constexpr ptrdiff_t kCacheBlock = 64;  // a multiple of every N

// Rows of one length, wherever each of them lies.
struct Rows {
  const float *const *row;
  ptrdiff_t count;
};
constexpr ptrdiff_t kProductBlock = 32;    // rows a side that one call of products takes at most
constexpr ptrdiff_t kCombinePadding = 8;   // the weights of a row lie a multiple of this apart
constexpr ptrdiff_t kSketchColumns = 256;  // columns that sketch takes at most, which stay in the L1 cache
constexpr int kUpdateOutputs = 6;          // outputs side by side in y as update takes it
constexpr ptrdiff_t kUpdateColumns = 64;   // columns of d that update takes
constexpr ptrdiff_t kUpdateRows = 128;     // rows that update takes at most: so many products are summed in float32

// A matrix, or the transpose of one, that multiply takes element by element.
struct Factor {
  const float *data;
  ptrdiff_t row_stride, k_stride;
};

enum class Activation { kTanh, kRelu, kElu };

// Steps of a trial as PPO's policy loss sees them, in columns: arrays (act_dim, stride) and (stride), readable and
// finite beyond `size` to a multiple of N.
struct PolicyBatch {
  ptrdiff_t act_dim, size, stride;
  const float *action, *log_prob, *advantage;
  const float *log_std, *inverse_std;  // (act_dim)
  float clip;
};
struct PolicyLoss {
  double objective, kl,
      clipped;  // sums over the batch: min(r a, clip(r) a), (r - 1) - log r, and steps beyond the clip
};

// Adam (arXiv:1412.6980) as torch.optim.Adam computes it.
static constexpr double kBeta1 = 0.9, kBeta2 = 0.999;
struct AdamStep {
  float grad_scale;    // of the gradients
  float step_size;     // learning rate / (1 - beta1^t)
  float second_scale;  // 1 / sqrt(1 - beta2^t)
  float eps;
};

struct Kernels {
  const char *isa;  // "baseline", "avx2", "avx512" or "avx512bf16"
  int lanes;        // floats in a register, N
  int group;        // outputs in a group of PackedLinear's, G N

  // ---- decode (decode.cpp); rows of x, y and out lie a stride of their own apart

  // Panels [first, last) of y (rows, out) <- epilogue(x (rows, in) W^T + b). Writes whole panels: the rows of y have
  // room for `out` rounded up to N. x and y do not overlap. With bfloat16 weights x is rounded to bfloat16 where the
  // instruction set multiplies it.
  void (*linear)(const PackedLinear &layer, ptrdiff_t first, ptrdiff_t last, const float *x, ptrdiff_t x_stride,
                 ptrdiff_t rows, Epilogue epilogue, float *y, ptrdiff_t y_stride) noexcept;

  // y (rows, d) <- (x - mean) / sqrt(variance + 1e-5) * weight + bias, over each row.
  void (*layer_norm)(const float *x, ptrdiff_t x_stride, ptrdiff_t rows, ptrdiff_t d, const float *weight,
                     const float *bias, float *y, ptrdiff_t y_stride) noexcept;

  // key (D) and value (D) into `slot`; the slots behind it may be overwritten.
  void (*append)(const HeadCache &cache, ptrdiff_t slot, const float *key, const float *value) noexcept;

  // out (D) <- softmax(query (D) . keys / sqrt(D)) values over the first slots >= 1, with online softmax
  // (arXiv:1805.02867): the cache is read once, and the first block of `next`, which is read after it, is fetched
  // meanwhile. `scratch` has room for value_stride floats.
  void (*attend)(const HeadCache &cache, const HeadCache &next, const float *query, ptrdiff_t slots, float *scratch,
                 float *out) noexcept;

  // ---- sketches of rows (svd.cpp); origin may be null, for zero

  // y (outputs, lanes) += Omega^T (x - origin)^T of rows <= lanes rows of x, and squares (rows) += those of x - origin.
  // Omega (columns <= kSketchColumns, outputs): output j's entries are codes[starts[j]] ... codes[starts[j + 1] - 1],
  // each 2 * column for +1 or 2 * column + 1 for -1. Lanes without a row get finite values.
  void (*sketch)(const float *const *x, ptrdiff_t rows, const float *origin, ptrdiff_t columns, const uint32_t *starts,
                 const uint16_t *codes, ptrdiff_t outputs, float *y, double *squares) noexcept;

  // z (outputs, kUpdateColumns) += y^T d, with y (outputs / kUpdateOutputs rounded up, rows, kUpdateOutputs) zero
  // beyond `outputs`, and d (rows <= kUpdateRows, kUpdateColumns). Summed over the rows in float32, added to z in
  // float64. Meanwhile `ahead` (rows, kUpdateColumns), which is read after it, is fetched.
  void (*update)(const float *y, const float *d, ptrdiff_t rows, ptrdiff_t outputs, const float *ahead,
                 ptrdiff_t ahead_stride, double *z, ptrdiff_t z_stride) noexcept;

  // d (n) <- x - origin.
  void (*subtract)(const float *x, const float *origin, ptrdiff_t n, float *d) noexcept;

  // ---- products of rows (svd.cpp); float32 rows, float64 arithmetic; origin may be null, for zero

  // out (left.count, right.count) <- (left - origin)(right - origin)^T over `columns` columns. At most kProductBlock
  // rows a side. `lower`: left and right are the same rows, and only i >= j is written.
  void (*products)(Rows left, Rows right, const float *origin, ptrdiff_t columns, bool lower, double *out,
                   ptrdiff_t out_stride) noexcept;

  // y (outputs, columns) <- weights^T rows[:, begin : begin + columns], with weights (rows, outputs rounded up to
  // kCombinePadding), zero beyond `outputs`. y overlaps no row.
  void (*combine_floats)(const float *const *row, ptrdiff_t rows, ptrdiff_t begin, ptrdiff_t columns,
                         const double *weights, ptrdiff_t outputs, float *y, ptrdiff_t y_stride) noexcept;
  void (*combine_doubles)(const double *const *row, ptrdiff_t rows, ptrdiff_t begin, ptrdiff_t columns,
                          const double *weights, ptrdiff_t outputs, float *y, ptrdiff_t y_stride) noexcept;

  // Sum of the squares of x - origin (n): NaN or Inf exactly where one of x's values is.
  double (*sum_squares)(const float *x, const float *origin, ptrdiff_t n) noexcept;

  // ---- the update of small policies (ppo.cpp); "padded" is to a multiple of N

  // c (rows, columns) <- a b + bias, with a (rows, k), b (k, columns padded) and bias (rows) or null, for zero.
  void (*multiply)(Factor a, ptrdiff_t rows, ptrdiff_t k, const float *b, ptrdiff_t b_stride, const float *bias,
                   ptrdiff_t columns, float *c, ptrdiff_t c_stride) noexcept;

  // y (rows) <- w x + bias, with w (rows, k).
  void (*multiply_vector)(const float *w, ptrdiff_t rows, ptrdiff_t k, const float *x, const float *bias,
                          float *y) noexcept;

  // y (columns padded, rows padded) <- x^T, of x (rows padded, columns padded).
  void (*transpose_matrix)(const float *x, ptrdiff_t x_stride, ptrdiff_t rows, ptrdiff_t columns, float *y,
                           ptrdiff_t y_stride) noexcept;

  // sums (rows) <- of x (rows, columns padded) over its columns, the padding too.
  void (*sum_rows)(const float *x, ptrdiff_t stride, ptrdiff_t rows, ptrdiff_t columns, float *sums) noexcept;

  // x (n padded) <- activation(x), and dx (n padded) *= its derivative where it gave y.
  void (*activate)(Activation activation, float *x, ptrdiff_t n) noexcept;
  void (*activate_backward)(Activation activation, const float *y, float *dx, ptrdiff_t n) noexcept;

  // PPO's clipped loss of a batch for these mean actions (act_dim, stride), and its gradients by them (0 in the
  // padding) and by log_std.
  PolicyLoss (*policy_loss)(const PolicyBatch &batch, const float *mean, float *mean_grad,
                            float *log_std_grad) noexcept;

  // One step of n parameters with their moments.
  void (*adam)(const AdamStep &step, float *param, const float *grad, float *first, float *second,
               ptrdiff_t n) noexcept;
};

extern const Kernels kernels_baseline;
#if defined(TIPL_X86)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx512bf16;
#endif

}  // namespace tipl
