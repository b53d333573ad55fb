// The kernels of a sketch. Letters as in svd.h: p columns, l range and q test directions, L = l + q + 1 outputs.
//
// A block of b = 256 rows is read twice: by map_signs or map_directions, and by add_co_range, then from the L2 cache
// where it fits. map_* reads each byte of it once (for every 128 outputs), add_co_range once for every 128 outputs. C
// is read and written once for each block. No barrier is wider than a thread block.
//
// Flops of a block: 2 b p L in float32, and 2 p L additions in float64 for C, which take half as long again where
// doubles are 64 times slower than floats; b p multiplications in float64 for the squares.
#include <algorithm>

#include "cuda/device.h"
#include "cuda/sketch.h"
#include "sketch_signs.h"

namespace tipl::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int64_t kMostMapSpans = 32, kMostProductSpans = 64, kProductColumns = 1024;

int64_t blocks_for(int64_t items, int64_t each) { return (items + each - 1) / each; }

// [begin, end) of one of `spans` equal shares of `items`.
struct Span {
  int64_t begin, end;
};
__device__ Span span_of(int64_t items, int64_t index, int64_t spans) {
  return {items * index / spans, items * (index + 1) / spans};
}

__device__ float minus(float value, const float *origin, int64_t c) {
  return origin == nullptr ? value : value - origin[c];
}

// The sum of a value over the lanes of a warp.
__device__ double warp_sum(double value) {
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(~0u, value, step);
  return value;
}

// ---- the map

constexpr int kMapWarps = 8, kMapThreads = kMapWarps * kWarp;
constexpr int kOutputsOfWarp = 16, kMapOutputs = kMapWarps * kOutputsOfWarp;
constexpr int kMostCodes = 6 * static_cast<int>(kSignColumns);

// Grid: (spans of chunks of 256 columns, groups of 32 rows, groups of 128 outputs). A tile of 32 rows by a chunk of
// columns lies in shared memory, column by column; each warp adds up some outputs, a row in each lane. Tile strides are
// odd, so that neither side has bank conflicts.
__global__ __launch_bounds__(kMapThreads) void map_signs_kernel(DeviceRows x, const float *origin, int64_t p,
                                                                SignTables signs, int64_t mapped, MapShares out) {
  __shared__ float tile[kSignColumns][kWarp + 1];
  __shared__ uint16_t codes[kMostCodes];
  __shared__ uint32_t starts[kMapOutputs + 1];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t first_row = int64_t{blockIdx.y} * kWarp, first_output = int64_t{blockIdx.z} * kMapOutputs;
  const int outputs = static_cast<int>(min(int64_t{kMapOutputs}, mapped - first_output));
  const int64_t chunks = (p + kSignColumns - 1) / kSignColumns;
  const Span span = span_of(chunks, blockIdx.x, gridDim.x);
  float y[kOutputsOfWarp] = {};
  double squares[kWarp / kMapWarps] = {};
  for (int64_t chunk = span.begin; chunk < span.end; ++chunk) {
    const int64_t first = chunk * kSignColumns;
    const uint32_t *const chunk_starts = signs.starts + chunk * (mapped + 1) + first_output;
    const uint32_t first_code = chunk_starts[0];
    for (int i = threadIdx.x; i <= outputs; i += kMapThreads) starts[i] = chunk_starts[i] - first_code;
    const int num_codes = static_cast<int>(chunk_starts[outputs] - first_code);
    const uint16_t *const chunk_codes = signs.codes + signs.first_code[chunk] + first_code;
    for (int i = threadIdx.x; i < num_codes; i += kMapThreads) codes[i] = chunk_codes[i];
#pragma unroll
    for (int i = 0; i < kWarp / kMapWarps; ++i) {
      const int row = warp + i * kMapWarps;
#pragma unroll
      for (int c = lane; c < kSignColumns; c += kWarp) {
        const bool there = first_row + row < x.count && first + c < p;
        const float d = there ? minus(x.data[(first_row + row) * x.stride + first + c], origin, first + c) : 0.0f;
        tile[c][row] = d;
        squares[i] += static_cast<double>(d) * d;
      }
    }
    __syncthreads();
#pragma unroll
    for (int t = 0; t < kOutputsOfWarp; ++t) {
      const int output = warp + t * kMapWarps;
      if (output >= outputs) break;
      float sum = y[t];
      for (uint32_t i = starts[output]; i < starts[output + 1]; ++i) {
        const int code = codes[i];
        const float d = tile[code / 2][lane];
        sum += code % 2 ? -d : d;
      }
      y[t] = sum;
    }
    __syncthreads();
  }
#pragma unroll
  for (int t = 0; t < kOutputsOfWarp; ++t) {
    const int output = warp + t * kMapWarps;
    if (output < outputs) {
      out.y[(blockIdx.x * mapped + first_output + output) * kMappedRows + first_row + lane] = y[t];
    }
  }
  if (blockIdx.z > 0) return;
#pragma unroll
  for (int i = 0; i < kWarp / kMapWarps; ++i) {
    const double sum = warp_sum(squares[i]);
    if (lane == 0) out.squares[blockIdx.x * int64_t{kMappedRows} + first_row + warp + i * kMapWarps] = sum;
  }
}

constexpr int kDirectedRows = 64, kDirectedOutputs = 64, kDirectedColumns = 32, kOutputsOfThread = 8;

// Grid: (spans of columns, groups of 64 rows, groups of 64 outputs). Each lane multiplies two rows, each warp 8
// outputs.
__global__ __launch_bounds__(kMapThreads) void map_directions_kernel(DeviceRows x, const float *origin, int64_t p,
                                                                     const float *directions, int64_t pitch,
                                                                     int64_t mapped, MapShares out) {
  __shared__ float ds[kDirectedColumns][kDirectedRows + 1];
  __shared__ __align__(16) float vs[kDirectedColumns][kDirectedOutputs];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t first_row = int64_t{blockIdx.y} * kDirectedRows, first_output = int64_t{blockIdx.z} * kDirectedOutputs;
  const int64_t tiles = (p + kDirectedColumns - 1) / kDirectedColumns;
  const Span span = span_of(tiles, blockIdx.x, gridDim.x);
  float y[2][kOutputsOfThread] = {};
  double squares[kDirectedRows / kMapWarps] = {};
  for (int64_t tile = span.begin; tile < span.end; ++tile) {
    const int64_t first = tile * kDirectedColumns, c = first + lane;
#pragma unroll
    for (int i = 0; i < kDirectedRows / kMapWarps; ++i) {
      const int row = warp + i * kMapWarps;
      const bool there = first_row + row < x.count && c < p;
      const float d = there ? minus(x.data[(first_row + row) * x.stride + c], origin, c) : 0.0f;
      ds[lane][row] = d;
      squares[i] += static_cast<double>(d) * d;
    }
    for (int i = threadIdx.x; i < kDirectedColumns * kDirectedOutputs; i += kMapThreads) {
      const int column = i / kDirectedOutputs, output = i % kDirectedOutputs;
      vs[column][output] = first + column < p ? directions[(first + column) * pitch + first_output + output] : 0.0f;
    }
    __syncthreads();
#pragma unroll 8
    for (int k = 0; k < kDirectedColumns; ++k) {
      const float d[2] = {ds[k][lane], ds[k][lane + kWarp]};
      const float4 *const v = reinterpret_cast<const float4 *>(&vs[k][warp * kOutputsOfThread]);
      const float4 low = v[0], high = v[1];
      const float weights[kOutputsOfThread] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
      for (int j = 0; j < kOutputsOfThread; ++j) {
        y[0][j] += d[0] * weights[j];
        y[1][j] += d[1] * weights[j];
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int j = 0; j < kOutputsOfThread; ++j) {
    const int64_t output = first_output + warp * kOutputsOfThread + j;
    if (output >= mapped) break;
    float *const row = out.y + (blockIdx.x * mapped + output) * kMappedRows + first_row + lane;
    row[0] = y[0][j];
    row[kWarp] = y[1][j];
  }
  if (blockIdx.z > 0) return;
#pragma unroll
  for (int i = 0; i < kDirectedRows / kMapWarps; ++i) {
    const double sum = warp_sum(squares[i]);
    if (lane == 0) out.squares[blockIdx.x * int64_t{kMappedRows} + first_row + warp + i * kMapWarps] = sum;
  }
}

// Grid: (groups of 32 rows, groups of 32 outputs), blocks of 32 x 8 threads. Turns shares, row by row, into y, output
// by output.
__global__ void add_shares_kernel(MapShares shares, int64_t spans, int64_t rows, int64_t mapped, float *y,
                                  int64_t pitch, double *squares) {
  __shared__ float tile[kWarp][kWarp + 1];
  const int64_t first_row = int64_t{blockIdx.x} * kWarp, first_output = int64_t{blockIdx.y} * kWarp;
  for (int j = threadIdx.y; j < kWarp; j += blockDim.y) {
    const int64_t output = first_output + j, row = first_row + threadIdx.x;
    float sum = output == mapped ? 1.0f : 0.0f;
    for (int64_t span = 0; span < spans && output < mapped; ++span) {
      sum += shares.y[(span * mapped + output) * kMappedRows + row];
    }
    tile[j][threadIdx.x] = row < rows ? sum : 0.0f;
  }
  __syncthreads();
  for (int i = threadIdx.y; i < kWarp; i += blockDim.y) {
    const int64_t output = first_output + threadIdx.x;
    if (output < pitch) y[(first_row + i) * pitch + output] = tile[threadIdx.x][i];
  }
  if (blockIdx.y > 0 || threadIdx.y > 0) return;
  double sum = 0.0;
  for (int64_t span = 0; span < spans; ++span) sum += shares.squares[span * kMappedRows + first_row + threadIdx.x];
  squares[first_row + threadIdx.x] = sum;
}

// ---- the sums

constexpr int kPanelColumns = 64, kPanelRows = 32, kThreadColumns = 4, kThreadOutputs = 8;
constexpr int kColumnThreads = kPanelColumns / kThreadColumns, kMostGroups = 16;

// Grid: (groups of 64 columns, groups of 8 * blockDim.y outputs), blocks of 16 x blockDim.y threads. Each thread has 4
// columns, 16 apart, of 8 outputs, and a float32 sum of each for either half of the rows.
__global__ __launch_bounds__(kColumnThreads *kMostGroups) void add_co_range_kernel(DeviceRows x, const float *origin,
                                                                                   int64_t p, const float *y,
                                                                                   int64_t pitch, int64_t outputs,
                                                                                   double *co_range) {
  constexpr int kHalf = kMappedRows / 2;
  __shared__ float ds[kPanelRows][kPanelColumns];
  __shared__ __align__(16) float ys[kPanelRows][kMostGroups * kThreadOutputs];
  const int width = blockDim.y * kThreadOutputs, threads = kColumnThreads * blockDim.y;
  const int thread = threadIdx.y * kColumnThreads + threadIdx.x;
  const int64_t first_column = int64_t{blockIdx.x} * kPanelColumns, first_output = int64_t{blockIdx.y} * width;
  float sums[2][kThreadOutputs][kThreadColumns] = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    for (int first = half * kHalf; first < min((half + 1) * kHalf, static_cast<int>(x.count)); first += kPanelRows) {
      for (int i = thread; i < kPanelRows * kPanelColumns; i += threads) {
        const int row = i / kPanelColumns, column = i % kPanelColumns;
        const int64_t c = first_column + column;
        const bool there = first + row < x.count && c < p;
        ds[row][column] = there ? minus(x.data[(first + row) * x.stride + c], origin, c) : 0.0f;
      }
      for (int i = thread; i < kPanelRows * width; i += threads) {
        const int row = i / width, output = i % width;
        ys[row][output] = first_output + output < pitch ? y[(first + row) * pitch + first_output + output] : 0.0f;
      }
      __syncthreads();
#pragma unroll 4
      for (int k = 0; k < kPanelRows; ++k) {
        const float4 *const weights = reinterpret_cast<const float4 *>(&ys[k][threadIdx.y * kThreadOutputs]);
        const float4 low = weights[0], high = weights[1];
        const float w[kThreadOutputs] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
        float d[kThreadColumns];
#pragma unroll
        for (int c = 0; c < kThreadColumns; ++c) d[c] = ds[k][threadIdx.x + c * kColumnThreads];
#pragma unroll
        for (int j = 0; j < kThreadOutputs; ++j) {
#pragma unroll
          for (int c = 0; c < kThreadColumns; ++c) sums[half][j][c] += w[j] * d[c];
        }
      }
      __syncthreads();
    }
  }
#pragma unroll
  for (int j = 0; j < kThreadOutputs; ++j) {
    const int64_t output = first_output + threadIdx.y * kThreadOutputs + j;
#pragma unroll
    for (int c = 0; c < kThreadColumns; ++c) {
      const int64_t column = first_column + threadIdx.x + c * kColumnThreads;
      if (output < outputs && column < p) {
        double &sum = co_range[output * p + column];
        sum = (sum + sums[0][j][c]) + sums[1][j][c];
      }
    }
  }
}

// Grid: tiles of 16 x 16 of G, an element for each thread.
__global__ void add_gram_kernel(const float *y, int64_t pitch, int64_t outputs, double *gram) {
  const int64_t i = int64_t{blockIdx.y} * blockDim.y + threadIdx.y, j = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= outputs || j >= outputs) return;
  double sum = 0.0;
  for (int row = 0; row < kMappedRows; ++row) {
    sum += static_cast<double>(y[row * pitch + i]) * static_cast<double>(y[row * pitch + j]);
  }
  gram[i * outputs + j] += sum;
}

// Grid: (columns, outputs).
__global__ void merge_co_ranges_kernel(const double *ours, const double *theirs, const double *their_gram,
                                       const float *shift, const float *step, int64_t outputs, int64_t p, double *to) {
  const int64_t c = int64_t{blockIdx.x} * blockDim.x + threadIdx.x, j = blockIdx.y, last = outputs - 1;
  if (c >= p) return;
  const double rows = their_gram[last * outputs + last], sum_of_y = their_gram[j * outputs + last];
  const double moved = theirs[last * p + c] + rows * shift[c];  // the sum of their rows about our origin
  to[j * p + c] = ours[j * p + c] + (theirs[j * p + c] + sum_of_y * shift[c] + step[j] * moved);
}

// ---- rows

constexpr int kRowThreads = 256;

// A block for each row.
__global__ __launch_bounds__(kRowThreads) void sum_squares_kernel(DeviceRows x, const float *origin, int64_t p,
                                                                  double *squares) {
  __shared__ double of_warp[kRowThreads / kWarp];
  const float *const row = x.data + int64_t{blockIdx.x} * x.stride;
  double sum = 0.0;
  for (int64_t c = threadIdx.x; c < p; c += kRowThreads) {
    const double d = static_cast<double>(row[c]) - (origin == nullptr ? 0.0 : static_cast<double>(origin[c]));
    sum += d * d;
  }
  sum = warp_sum(sum);
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = sum;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int warp = 1; warp < kRowThreads / kWarp; ++warp) sum += of_warp[warp];
  squares[blockIdx.x] = sum;
}

constexpr int kProductSide = 32, kProductThreads = 16, kProductTile = 32;

// Grid: (groups of 32 rows of x, groups of 32 rows of y, spans of columns), blocks of 16 x 16 threads with 2 x 2
// products each. `same`: only where x's group is not before y's.
__global__ void multiply_rows_kernel(DeviceRows x, DeviceRows y, const float *origin, int64_t p, bool same,
                                     double *shares) {
  __shared__ double xs[kProductSide][kProductTile + 1], ys[kProductSide][kProductTile + 1];
  if (same && blockIdx.x < blockIdx.y) return;
  const int thread = threadIdx.y * kProductThreads + threadIdx.x;
  const int64_t first_x = int64_t{blockIdx.x} * kProductSide, first_y = int64_t{blockIdx.y} * kProductSide;
  const Span span = span_of((p + kProductTile - 1) / kProductTile, blockIdx.z, gridDim.z);
  double sums[2][2] = {};
  for (int64_t tile = span.begin; tile < span.end; ++tile) {
    for (int i = thread; i < kProductSide * kProductTile; i += kProductThreads * kProductThreads) {
      const int row = i / kProductTile, k = i % kProductTile;
      const int64_t c = tile * kProductTile + k;
      const double zero = origin == nullptr || c >= p ? 0.0 : static_cast<double>(origin[c]);
      xs[row][k] = c < p && first_x + row < x.count ? x.data[(first_x + row) * x.stride + c] - zero : 0.0;
      ys[row][k] = c < p && first_y + row < y.count ? y.data[(first_y + row) * y.stride + c] - zero : 0.0;
    }
    __syncthreads();
#pragma unroll 4
    for (int k = 0; k < kProductTile; ++k) {
#pragma unroll
      for (int a = 0; a < 2; ++a) {
#pragma unroll
        for (int b = 0; b < 2; ++b) {
          sums[a][b] += xs[threadIdx.y + a * kProductThreads][k] * ys[threadIdx.x + b * kProductThreads][k];
        }
      }
    }
    __syncthreads();
  }
  for (int a = 0; a < 2; ++a) {
    for (int b = 0; b < 2; ++b) {
      const int64_t i = first_x + threadIdx.y + a * kProductThreads, j = first_y + threadIdx.x + b * kProductThreads;
      if (i < x.count && j < y.count) shares[(blockIdx.z * x.count + i) * y.count + j] = sums[a][b];
    }
  }
}

__global__ void add_product_shares_kernel(const double *shares, int64_t spans, int64_t n, int64_t m, bool same,
                                          double *out) {
  const int64_t at = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (at >= n * m) return;
  const int64_t i = at / m, j = at % m;
  const int64_t from = same && j > i ? j * m + i : at;  // the products of the other half are the same
  double sum = 0.0;
  for (int64_t span = 0; span < spans; ++span) sum += shares[span * n * m + from];
  out[at] = sum;
}

constexpr int kCombineThreads = 128, kCombineRows = 64, kCombineOutputs = 8;

// Grid: (groups of 128 columns, groups of 8 outputs), a column for each thread.
template <class T>
__global__ __launch_bounds__(kCombineThreads) void combine_rows_kernel(const T *x, int64_t stride, int64_t rows,
                                                                       int64_t p, const double *weights, int64_t r,
                                                                       float *out) {
  __shared__ double ws[kCombineRows][kCombineOutputs];
  const int64_t c = int64_t{blockIdx.x} * kCombineThreads + threadIdx.x;
  const int64_t first_output = int64_t{blockIdx.y} * kCombineOutputs;
  double sums[kCombineOutputs] = {};
  for (int64_t first = 0; first < rows; first += kCombineRows) {
    const int count = static_cast<int>(min(int64_t{kCombineRows}, rows - first));
    for (int i = threadIdx.x; i < count * kCombineOutputs; i += kCombineThreads) {
      const int64_t output = first_output + i % kCombineOutputs;
      ws[i / kCombineOutputs][i % kCombineOutputs] =
          output < r ? weights[(first + i / kCombineOutputs) * r + output] : 0.0;
    }
    __syncthreads();
    for (int row = 0; row < count && c < p; ++row) {
      const auto value = static_cast<double>(x[(first + row) * stride + c]);
#pragma unroll
      for (int j = 0; j < kCombineOutputs; ++j) sums[j] += ws[row][j] * value;
    }
    __syncthreads();
  }
#pragma unroll
  for (int j = 0; j < kCombineOutputs; ++j) {
    if (c < p && first_output + j < r) out[(first_output + j) * p + c] = static_cast<float>(sums[j]);
  }
}

dim3 grid(int64_t x, int64_t y = 1, int64_t z = 1) {
  return dim3(static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z));
}

}  // namespace

int64_t map_spans(int64_t p) { return std::clamp(blocks_for(p, kSignColumns), int64_t{1}, kMostMapSpans); }

int64_t product_spans(int64_t p) { return std::clamp(blocks_for(p, kProductColumns), int64_t{1}, kMostProductSpans); }

void map_signs(DeviceRows x, const float *origin, int64_t p, SignTables signs, int64_t mapped, MapShares out,
               cudaStream_t stream) {
  const dim3 blocks = grid(map_spans(p), kMappedRows / kWarp, blocks_for(mapped, kMapOutputs));
  map_signs_kernel<<<blocks, kMapThreads, 0, stream>>>(x, origin, p, signs, mapped, out);
  succeed(cudaGetLastError(), "map_signs");
}

void map_directions(DeviceRows x, const float *origin, int64_t p, const float *directions, int64_t pitch,
                    int64_t mapped, MapShares out, cudaStream_t stream) {
  const dim3 blocks = grid(map_spans(p), kMappedRows / kDirectedRows, blocks_for(mapped, kDirectedOutputs));
  map_directions_kernel<<<blocks, kMapThreads, 0, stream>>>(x, origin, p, directions, pitch, mapped, out);
  succeed(cudaGetLastError(), "map_directions");
}

void add_shares(MapShares shares, int64_t rows, int64_t p, int64_t mapped, float *y, int64_t pitch, double *squares,
                cudaStream_t stream) {
  const dim3 blocks = grid(kMappedRows / kWarp, blocks_for(pitch, kWarp));
  add_shares_kernel<<<blocks, dim3(kWarp, 8), 0, stream>>>(shares, map_spans(p), rows, mapped, y, pitch, squares);
  succeed(cudaGetLastError(), "add_shares");
}

void add_co_range(DeviceRows x, const float *origin, int64_t p, const float *y, int64_t pitch, int64_t outputs,
                  double *co_range, cudaStream_t stream) {
  const int64_t passes = blocks_for(outputs, kMostGroups * kThreadOutputs);
  const int64_t groups = blocks_for(blocks_for(outputs, passes), kThreadOutputs);
  const dim3 threads(kColumnThreads, static_cast<unsigned>(groups));
  add_co_range_kernel<<<grid(blocks_for(p, kPanelColumns), passes), threads, 0, stream>>>(x, origin, p, y, pitch,
                                                                                          outputs, co_range);
  succeed(cudaGetLastError(), "add_co_range");
}

void add_gram(const float *y, int64_t pitch, int64_t outputs, double *gram, cudaStream_t stream) {
  constexpr unsigned kSide = 16;
  const int64_t tiles = blocks_for(outputs, kSide);
  add_gram_kernel<<<grid(tiles, tiles), dim3(kSide, kSide), 0, stream>>>(y, pitch, outputs, gram);
  succeed(cudaGetLastError(), "add_gram");
}

void merge_co_ranges(const double *ours, const double *theirs, const double *their_gram, const float *shift,
                     const float *step, int64_t outputs, int64_t p, double *to, cudaStream_t stream) {
  merge_co_ranges_kernel<<<grid(blocks_for(p, kRowThreads), outputs), kRowThreads, 0, stream>>>(
      ours, theirs, their_gram, shift, step, outputs, p, to);
  succeed(cudaGetLastError(), "merge_co_ranges");
}

void sum_squares(DeviceRows x, const float *origin, int64_t p, double *squares, cudaStream_t stream) {
  sum_squares_kernel<<<grid(x.count), kRowThreads, 0, stream>>>(x, origin, p, squares);
  succeed(cudaGetLastError(), "sum_squares");
}

void multiply_rows(DeviceRows x, DeviceRows y, const float *origin, int64_t p, bool same, double *shares, double *out,
                   cudaStream_t stream) {
  const int64_t spans = product_spans(p);
  const dim3 blocks = grid(blocks_for(x.count, kProductSide), blocks_for(y.count, kProductSide), spans);
  multiply_rows_kernel<<<blocks, dim3(kProductThreads, kProductThreads), 0, stream>>>(x, y, origin, p, same, shares);
  succeed(cudaGetLastError(), "multiply_rows");
  add_product_shares_kernel<<<grid(blocks_for(x.count * y.count, kRowThreads)), kRowThreads, 0, stream>>>(
      shares, spans, x.count, y.count, same, out);
  succeed(cudaGetLastError(), "add_product_shares");
}

template <class T>
void combine_rows(const T *x, int64_t stride, int64_t rows, int64_t p, const double *weights, int64_t r, float *out,
                  cudaStream_t stream) {
  const dim3 blocks = grid(blocks_for(p, kCombineThreads), blocks_for(r, kCombineOutputs));
  combine_rows_kernel<<<blocks, kCombineThreads, 0, stream>>>(x, stride, rows, p, weights, r, out);
  succeed(cudaGetLastError(), "combine_rows");
}

template void combine_rows(const float *, int64_t, int64_t, int64_t, const double *, int64_t, float *, cudaStream_t);
template void combine_rows(const double *, int64_t, int64_t, int64_t, const double *, int64_t, float *, cudaStream_t);

}  // namespace tipl::cuda
