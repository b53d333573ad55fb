// Launches of the kernels of a sketch, and of products and combinations of rows. All pointers are to the device's
// memory; rows are `stride` floats apart. A null origin means zero. Each sum has a fixed order, which depends on the
// number of columns alone: the same bits on any device.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace tipl::cuda {

constexpr int kMappedRows = 256;  // rows of a block of a sketch, and of all arrays that map_* write

struct DeviceRows {
  const float *data;
  int64_t count, stride;
};

// Random signs, as draw_signs makes them: those of all chunks of columns one after another.
struct SignTables {
  const uint32_t *starts;     // (chunks, l + q + 1)
  const uint16_t *codes;      // those of chunk i from first_code[i] on
  const int64_t *first_code;  // (chunks)
};

// The work of map_*: shares of y and of the squares, summed over some of the columns.
struct MapShares {
  float *y;         // (spans, mapped, kMappedRows)
  double *squares;  // (spans, kMappedRows)
};

// Into how many spans of columns the work on rows of p columns is split.
int64_t map_spans(int64_t p);
int64_t product_spans(int64_t p);

// The shares of y (x.count <= kMappedRows, mapped) = (x - origin) Omega and of each row's squares: through signs, or
// through directions (p, pitch) that are zero beyond `mapped` <= pitch, a multiple of 64.
void map_signs(DeviceRows x, const float *origin, int64_t p, SignTables signs, int64_t mapped, MapShares out,
               cudaStream_t stream);
void map_directions(DeviceRows x, const float *origin, int64_t p, const float *directions, int64_t pitch,
                    int64_t mapped, MapShares out, cudaStream_t stream);

// y (kMappedRows, pitch) and squares (kMappedRows) <- the sums of the shares; y[i, mapped] <- 1 for i < rows. All else
// of y becomes zero.
void add_shares(MapShares shares, int64_t rows, int64_t p, int64_t mapped, float *y, int64_t pitch, double *squares,
                cudaStream_t stream);

// C (outputs, p) += y^T (x - origin), summed in float32 over each half of the rows, and G (outputs, outputs) += y^T y.
void add_co_range(DeviceRows x, const float *origin, int64_t p, const float *y, int64_t pitch, int64_t outputs,
                  double *co_range, cudaStream_t stream);
void add_gram(const float *y, int64_t pitch, int64_t outputs, double *gram, cudaStream_t stream);

// to (outputs, p) <- ours + theirs, whose rows d become d + shift (p) and whose y become y + step (outputs).
void merge_co_ranges(const double *ours, const double *theirs, const double *their_gram, const float *shift,
                     const float *step, int64_t outputs, int64_t p, double *to, cudaStream_t stream);

// squares (x.count) <- the sum of squares of each row of x - origin, in float64.
void sum_squares(DeviceRows x, const float *origin, int64_t p, double *squares, cudaStream_t stream);

// out (x.count, y.count) <- (x - origin)(y - origin)^T in float64. shares: (product_spans(p), x.count, y.count).
// `same`: x and y are the same rows.
void multiply_rows(DeviceRows x, DeviceRows y, const float *origin, int64_t p, bool same, double *shares, double *out,
                   cudaStream_t stream);

// out (r, p) <- weights^T x with weights (rows, r) and x (rows, p), in float64. T is float or double.
template <class T>
void combine_rows(const T *x, int64_t stride, int64_t rows, int64_t p, const double *weights, int64_t r, float *out,
                  cudaStream_t stream);

}  // namespace tipl::cuda
