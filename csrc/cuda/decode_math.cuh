// The sums of one block: products with weights, layer norm, attention. R rows of shared memory; all threads of the
// block call every function together, and meet (__syncthreads) before a result is read.
//
// Bits    The order of every sum follows from the sizes of the model and kThreads alone: a row has the same bits
//         whatever other rows are beside it.
#pragma once

#include <cstdint>

#include "cuda/decode_plan.h"

namespace tipl::cuda {

struct Bfloat16 {
  uint16_t bits;
};

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(Bfloat16 value) { return __uint_as_float(uint32_t{value.bits} << 16); }

// To the nearest, ties to even.
template <class T>
__device__ __forceinline__ T stored(float value);
template <>
__device__ __forceinline__ float stored(float value) {
  return value;
}
template <>
__device__ __forceinline__ Bfloat16 stored(float value) {
  const uint32_t bits = __float_as_uint(value);
  if (!isfinite(value)) return {static_cast<uint16_t>(bits >> 16 | (isnan(value) ? 0x40u : 0u))};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

__device__ __forceinline__ float4 load4(const float *from) { return *reinterpret_cast<const float4 *>(from); }
__device__ __forceinline__ float4 load4(const Bfloat16 *from) {
  const uint2 pairs = *reinterpret_cast<const uint2 *>(from);
  return {__uint_as_float(pairs.x << 16), __uint_as_float(pairs.x & 0xffff0000u), __uint_as_float(pairs.y << 16),
          __uint_as_float(pairs.y & 0xffff0000u)};
}
// One store: the compiler makes four of an assignment, which meet in the same banks.
__device__ __forceinline__ void store4(float *to, float4 value) {
  asm volatile("st.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(value.x), "f"(value.y), "f"(value.z), "f"(value.w)
               : "memory");
}
__device__ __forceinline__ float4 operator+(float4 a, float4 b) { return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w}; }
__device__ __forceinline__ float4 fma4(float a, float4 b, float4 c) {
  return {fmaf(a, b.x, c.x), fmaf(a, b.y, c.y), fmaf(a, b.z, c.z), fmaf(a, b.w, c.w)};
}

__device__ __forceinline__ float dot4(float4 a, float4 b, float sum) {
  return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, sum))));
}

// Over groups of `lanes` lanes.
__device__ __forceinline__ float sum_lanes(float value, int lanes = 32) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}
__device__ __forceinline__ float max_lanes(float value) {
  for (int offset = 16; offset > 0; offset /= 2) value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, offset));
  return value;
}

// gelu(x) in its tanh form, x / (1 + exp(-2u)), u = sqrt(2 / pi) (x + 0.044715 x^3).
__device__ __forceinline__ float gelu(float x) {
  return x / (1.0f + expf(-1.59576912f * fmaf(x * x * x, 0.044715f, x)));
}

// How many lanes share a row of `size` numbers, four each: 32, or 16, 8 ... where fewer are enough.
__device__ __forceinline__ int lanes_for(int size) {
  int lanes = 32;
  while (lanes > 1 && 2 * lanes >= size) lanes /= 2;
  return lanes;
}

// Each of 2 * offset lanes has N sums: store(i, the sum of number i over these lanes), once for each i. The lanes halve
// the numbers between them as they add, so that no lane adds what another one does; the order of each sum is
// sum_lanes'.
template <int N, class Store>
__device__ __forceinline__ void sum_numbers(const float (&sums)[N], int offset, int first, Store store) {
  const int lane = threadIdx.x % 32;
  if (offset == 0) {
#pragma unroll
    for (int i = 0; i < N; ++i) store(first + i, sums[i]);
  } else if constexpr (N == 1) {
    const float sum = sum_lanes(sums[0], 2 * offset);
    if (lane % (2 * offset) == 0) store(first, sum);
  } else {
    const bool upper = (lane & offset) != 0;
    float half[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      const float mine = upper ? sums[i + N / 2] : sums[i], other = upper ? sums[i] : sums[i + N / 2];
      half[i] = mine + __shfl_xor_sync(0xffffffffu, other, offset);
    }
    sum_numbers<N / 2>(half, offset / 2, first + (upper ? N / 2 : 0), store);
  }
}

// store(r, o, weight[o] . x[r]) for each output o and row r: weight (outs, in), x (R, in), `in` a multiple of four.
// Many inputs: lanes_for(in) lanes share the sum of an output.
template <int R, class Weight, class Store>
__device__ __forceinline__ void multiply_rows(const Weight *weight, int outs, int in, const float *x, Store store) {
  constexpr int kOuts = 4;  // of a group of lanes at once
  const int lanes = lanes_for(in);
  const int lane = threadIdx.x % lanes, group = threadIdx.x % 32 / lanes, groups = 32 / lanes;
  for (int first = threadIdx.x / 32 * groups * kOuts; first < outs; first += kWarps * groups * kOuts) {
    float sums[kOuts * R] = {};
    for (int i = 4 * lane; i < in; i += 4 * lanes) {
      float4 inputs[R];
#pragma unroll
      for (int r = 0; r < R; ++r) inputs[r] = load4(x + r * in + i);
#pragma unroll
      for (int j = 0; j < kOuts; ++j) {
        const int out = min(first + j * groups + group, outs - 1);
        const float4 w = load4(weight + static_cast<size_t>(out) * in + i);
#pragma unroll
        for (int r = 0; r < R; ++r) sums[j * R + r] = dot4(w, inputs[r], sums[j * R + r]);
      }
    }
    sum_numbers(sums, lanes / 2, 0, [&](int number, float sum) {
      const int out = first + number / R * groups + group;
      if (out < outs) store(number % R, out, sum);
    });
  }
}

// The second half of the two functions below: store(r, q, sum over slices) for each group q of four columns and row r.
template <int R, class Store>
__device__ __forceinline__ void add_slices(int slices, int columns, const float *partial, Store store) {
  __syncthreads();
  for (int i = threadIdx.x; i < R * columns / 4; i += kThreads) {
    float4 sum = {};
    for (int slice = 0; slice < slices; ++slice)
      sum = sum + load4(partial + static_cast<size_t>(slice) * R * columns + 4 * i);
    store(i / (columns / 4), 4 * (i % (columns / 4)), sum);
  }
}

// store(r, o, sum over i of x[r][i] weight[i][o .. o + 3]) for each group of four outputs and row r: weight (in, outs),
// x (R, x_stride). Few inputs, many outputs: each thread has four outputs, and a slice of the inputs.
template <int R, class Weight, class Store>
__device__ __forceinline__ void multiply_columns(const Weight *weight, int in, int outs, const float *x, int x_stride,
                                                 int slices, float *partial, Store store) {
  const int groups = outs / 4;
  for (int i = threadIdx.x; i < slices * groups; i += kThreads) {
    const int slice = i / groups, out = 4 * (i % groups);
    float4 sums[R] = {};
    for (int k = slice; k < in; k += slices) {
      const float4 w = load4(weight + static_cast<size_t>(k) * outs + out);
#pragma unroll
      for (int r = 0; r < R; ++r) sums[r] = fma4(x[r * x_stride + k], w, sums[r]);
    }
#pragma unroll
    for (int r = 0; r < R; ++r) store4(partial + (static_cast<size_t>(slice) * R + r) * outs + out, sums[r]);
  }
  add_slices<R>(slices, outs, partial, store);
}

// store(r, o, sum over i of shares[i][r][o .. o + 3]): shares (count, R, columns) that other blocks have written.
template <int R, class Store>
__device__ __forceinline__ void add_shares(const float *shares, int count, int columns, int slices, float *partial,
                                           Store store) {
  const int groups = columns / 4;
  for (int i = threadIdx.x; i < slices * groups; i += kThreads) {
    const int slice = i / groups, column = 4 * (i % groups);
    float4 sums[R] = {};
    for (int k = slice; k < count; k += slices) {
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const float *from = shares + (static_cast<size_t>(k) * R + r) * columns + column;
        sums[r] = sums[r] + __ldcg(reinterpret_cast<const float4 *>(from));
      }
    }
#pragma unroll
    for (int r = 0; r < R; ++r) store4(partial + (static_cast<size_t>(slice) * R + r) * columns + column, sums[r]);
  }
  add_slices<R>(slices, columns, partial, store);
}

// x (R, dp) <- (x - mean) / sqrt(variance + 1e-5) * weight + bias in each row, and zeros from d on. A warp for each
// row.
template <int R>
__device__ __forceinline__ void normalise(float *x, int d, int dp, const float *weight, const float *bias) {
  const int lane = threadIdx.x % 32;
  for (int r = threadIdx.x / 32; r < R; r += kWarps) {
    float *row = x + r * dp;
    float total = 0.0f, squares = 0.0f;
    for (int i = lane; i < d; i += 32) total += row[i];
    const float mean = sum_lanes(total) / static_cast<float>(d);
    for (int i = lane; i < d; i += 32) squares = fmaf(row[i] - mean, row[i] - mean, squares);
    const float inverse = 1.0f / sqrtf(sum_lanes(squares) / static_cast<float>(d) + 1e-5f);
    for (int i = lane; i < dp; i += 32) row[i] = i < d ? fmaf((row[i] - mean) * inverse, weight[i], bias[i]) : 0.0f;
  }
}

// One warp: sums (Dp) <- the values of the blocks `stripe`, stripe + kStripes, ... of the first `slots` slots, weighted
// by exp(score - highest), and softmax <- {highest, sum of the weights}: online softmax (arXiv:1805.02867). Keys and
// values (T, Dp), query (Dp); Dp a multiple of four, zero beyond D. lanes_for(Dp) lanes share a slot, and kAtOnce loads
// of a lane are on their way at once. The stripe holds at least one slot. scores (32) are the warp's own.
template <class Number>
__device__ __forceinline__ void attend_stripe(const Number *keys, const Number *values, int slots, int stripe, int D,
                                              int Dp, const float *query, float *scores, float *sums, float *softmax) {
  constexpr int kAtOnce = 8;
  const int lanes = lanes_for(Dp), groups = 32 / lanes;
  const int lane = threadIdx.x % lanes, group = threadIdx.x % 32 / lanes, slot_lane = threadIdx.x % 32;
  const float scale = 1.0f / sqrtf(static_cast<float>(D));
  float highest = -INFINITY, total = 0.0f;
  for (int first = stripe * kCacheSlots; first < slots; first += kStripes * kCacheSlots) {
    const int count = min(kCacheSlots, slots - first);
    const auto load = [&](const Number *from, int round, int column) {  // slot `round * groups + group` of the block
      const int slot = round * groups + group;
      const bool there = round < lanes && slot < count;
      return there ? load4(from + static_cast<size_t>(first + slot) * Dp + column) : float4{};
    };
    for (int round = 0; round < lanes; round += kAtOnce) {
      float score[kAtOnce] = {};
      for (int column = 4 * lane; column < Dp; column += 4 * lanes) {
        float4 key[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) key[i] = load(keys, round + i, column);
        const float4 q = load4(query + column);
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) score[i] = dot4(q, key[i], score[i]);
      }
      sum_numbers(score, lanes / 2, 0, [&](int i, float sum) {
        if (round + i < lanes) scores[(round + i) * groups + group] = sum * scale;
      });
    }
    __syncwarp();
    const float score = slot_lane < count ? scores[slot_lane] : -INFINITY;
    const float now_highest = fmaxf(highest, max_lanes(score));
    const float decay = expf(highest - now_highest), weight = slot_lane < count ? expf(score - now_highest) : 0.0f;
    total = fmaf(total, decay, sum_lanes(weight));
    highest = now_highest;
    scores[slot_lane] = weight;
    __syncwarp();
    for (int chunk = 0; chunk < Dp; chunk += 4 * lanes) {
      const int column = chunk + 4 * lane;
      float4 sum = {};
      for (int round = 0; round < lanes; round += kAtOnce) {
        float4 value[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) value[i] = column < Dp ? load(values, round + i, column) : float4{};
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          if (round + i < lanes) sum = fma4(scores[(round + i) * groups + group], value[i], sum);
        }
      }
      for (int offset = lanes; offset < 32; offset *= 2) {
        sum = sum + float4{__shfl_xor_sync(0xffffffffu, sum.x, offset), __shfl_xor_sync(0xffffffffu, sum.y, offset),
                           __shfl_xor_sync(0xffffffffu, sum.z, offset), __shfl_xor_sync(0xffffffffu, sum.w, offset)};
      }
      if (group == 0 && column < Dp) {
        const bool is_first = first < kStripes * kCacheSlots;
        store4(sums + column, is_first ? sum : fma4(decay, load4(sums + column), sum));
      }
    }
    __syncwarp();  // the next block's scores come to the same place
  }
  if (slot_lane == 0) {
    softmax[0] = highest;
    softmax[1] = total;
  }
}

// Dimension i of the attention of a row, from its stripes.
__device__ __forceinline__ float combine_stripes(const float *sums, const float *softmax, int stripes, int Dp, int i) {
  float highest = -INFINITY, total = 0.0f, sum = 0.0f;
  for (int s = 0; s < stripes; ++s) highest = fmaxf(highest, softmax[2 * s]);
  for (int s = 0; s < stripes; ++s) {
    const float weight = expf(softmax[2 * s] - highest);
    total = fmaf(softmax[2 * s + 1], weight, total);
    sum = fmaf(sums[s * Dp + i], weight, sum);
  }
  return sum / total;
}

}  // namespace tipl::cuda
