// The persistent kernel: all steps of a pass in one launch. Letters as in decode.h and decode_plan.h.
//
// Work     A pass is tiles of R rows, and each row appends one token at a step. Each of G blocks has its parts of the
//          model (part_of), in the order in which a token meets them, for the whole launch; so the layers are a
//          pipeline, and many tiles keep all blocks busy. Only one block reads and writes the cache of a head.
// Order    Every block takes the steps in order, the tiles of a step in order, and its parts in order. What a part
//          waits for comes earlier in this order, so that blocks, which all run at once, never wait in a circle.
// Meetings 2 L for each step of a tile: the units of a layer wait for its heads, and the heads of the next layer for
//          the units. A share is written, then counted (release); whoever waits sees the count (acquire), then reads.
//          A share is written again only when all that read it have been counted.
// Memory   Weights: once for each launch where they fit into shared memory, else once for each tile and step. Shares:
//          (H + 1) R d numbers for each unit, (U + 1) R d for each head. Cache: each slot once for each row.
// Flops    2 * (4 d^2 + 2 d d_ff + 2 d slot) * L for each row, and H times those of embed and head.
#pragma once

#include "cuda/decode_math.cuh"

namespace tipl::cuda {

// ---- counts that blocks wait for

__device__ __forceinline__ unsigned load_acquire(const unsigned *from) {
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
  return value;
}
__device__ __forceinline__ void add_release(unsigned *to, unsigned value) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(to), "r"(value) : "memory");
}
__device__ __forceinline__ int load_relaxed(const int *from) {
  int value;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
  return value;
}
__device__ __forceinline__ int load_from_host(const int *from) {
  int value;
  asm volatile("ld.relaxed.sys.global.s32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
  return value;
}

// Waits until `count` is `target`. All threads of the block call this and the next function.
__device__ __forceinline__ void wait_for(const unsigned *count, unsigned target) {
  if (threadIdx.x == 0) {
    while (load_acquire(count) < target) {
    }
  }
  __syncthreads();
}

// The same, for a count of `step`; returns whether that step is made. Where it is not, nobody ever counts.
__device__ __forceinline__ bool wait_for_step(const unsigned *count, unsigned target, const int *stop_at, int step) {
  constexpr unsigned kLooks = 256;  // between two looks at stop_at, which would make each wait longer
  bool is_made = true;
  if (threadIdx.x == 0) {
    for (unsigned looks = 1; is_made && load_acquire(count) < target; ++looks) {
      if (looks % kLooks == 0) is_made = load_relaxed(stop_at) > step;
    }
  }
  return __syncthreads_and(is_made);
}

// Counts what this block has written before.
__device__ __forceinline__ void arrive(unsigned *count) {
  __syncthreads();
  if (threadIdx.x == 0) add_release(count, 1);
}

// ---- the parts

// One block at one tile: where its arrays are.
template <int R, class Weight, class Number>
struct TileWork {
  const DecodeArguments &a;
  const DecodePlan &plan;
  unsigned char *shared;  // Workspace
  const Workspace at;
  int tile, step;

  __device__ TileWork(const DecodeArguments &arguments, unsigned char *workspace)
      : a(arguments), plan(arguments.plan), shared(workspace), at(arguments.plan), tile(0), step(0) {}

  __device__ float *floats(size_t offset) const { return reinterpret_cast<float *>(shared + offset); }
  __device__ Row *rows() const { return reinterpret_cast<Row *>(shared + at.rows); }
  __device__ float *head_shares() const { return a.shares + tile * plan.tile_shares(); }
  __device__ float *unit_shares() const {
    return head_shares() + static_cast<size_t>(plan.head_shares()) * R * plan.dp();
  }
  __device__ unsigned *heads_arrived() const { return a.arrived + 2 * tile; }
  __device__ unsigned *units_arrived() const { return a.arrived + 2 * tile + 1; }

  // The weight arrays, in shared memory or not.
  template <class T>
  __device__ static const T *in(const unsigned char *weights, size_t offset) {
    return reinterpret_cast<const T *>(weights + offset);
  }

  __device__ void take(int new_tile, int new_step) {
    tile = new_tile;
    step = new_step;
    __syncthreads();  // the last tile's rows have been read
    const int *from = reinterpret_cast<const int *>(a.rows + static_cast<size_t>(tile) * R);
    for (int i = threadIdx.x; i < R * static_cast<int>(sizeof(Row) / 4); i += kThreads) {
      reinterpret_cast<int *>(rows())[i] = from[i];
    }
    __syncthreads();
  }

  // x <- the sum of `count` shares; one block of those that need it writes it to `keep` (R, dp), the first share of the
  // next sum.
  __device__ void gather(const float *shares, int count, float *keep) const {
    float *x = floats(at.x);
    const int dp = plan.dp();
    add_shares<R>(shares, count, dp, plan.slices(), floats(at.slices), [&](int r, int column, float4 sum) {
      store4(x + r * dp + column, sum);
      if (keep != nullptr) store4(keep + r * dp + column, sum);
    });
    __syncthreads();
  }

  __device__ void norm(const float *weight, const float *bias) const {
    normalise<R>(floats(at.x), plan.d, plan.dp(), weight, bias);
    __syncthreads();
  }

  // The last coordinates of a sequence (k), and then those predicted, as this head of the first layer knows them.
  __device__ float *state(int head, int sequence) const {
    return a.state + (static_cast<size_t>(head) * plan.B + sequence) * 2 * plan.k;
  }

  // What follows the tokens of step - 1, from the shares of the last layer's units.
  __device__ void predict(int head, const unsigned char *ends) const {
    const EndWeights w(plan);
    gather(unit_shares(), plan.unit_shares(), nullptr);
    norm(in<float>(ends, w.norm_weight), in<float>(ends, w.norm_bias));
    const float *bias = in<float>(ends, w.head_bias);
    multiply_rows<R>(in<float>(ends, w.head), plan.k, plan.dp(), floats(at.x), [&](int r, int i, float sum) {
      const Row &row = rows()[r];
      if (step > row.steps || !row.is_last) return;
      float *last = state(head, row.sequence) + i, *predicted = last + plan.k;
      const float x = row.x == Row::kOwn ? *predicted : a.x[row.x * plan.k + i];
      *last = x;
      *predicted = fmaf(a.out_scale, sum + bias[i], x);
    });
    __syncthreads();
  }

  // z of the tokens of this step: the embedding of [x | diff_scale * (x - previous) | (slot - h) / max_len], and pos.
  __device__ void embed(int head, const unsigned char *ends, float *keep) const {
    const EndWeights w(plan);
    const int k = plan.k, width = round_up4(plan.token()), dp = plan.dp();
    float *token = floats(at.token), *z = floats(at.x);
    for (int i = threadIdx.x; i < R * k; i += kThreads) {
      const int r = i / k, c = i % k;
      const Row &row = rows()[r];
      float x = 0.0f, previous = 0.0f;
      if (step < row.steps) {
        const float *own = state(head, row.sequence) + c;
        x = row.x == Row::kOwn ? own[k] : a.x[row.x * k + c];
        previous = row.previous == Row::kOwn ? own[0] : row.previous == Row::kNone ? x : a.x[row.previous * k + c];
        if (head == 0 && row.x == Row::kOwn) a.y[(row.sequence * a.y_steps + step) * k + c] = x;
      }
      token[r * width + c] = x;
      token[r * width + k + c] = a.diff_scale * (x - previous);
      if (c == 0) {
        const int place = row.slot + step - row.prefix_end;
        token[r * width + 2 * k] = static_cast<float>(place) / static_cast<float>(a.max_len);
      }
    }
    __syncthreads();
    const float *bias = in<float>(ends, w.embed_bias);
    multiply_columns<R>(in<float>(ends, w.embed), plan.token(), dp, token, width, plan.slices(), floats(at.slices),
                        [&](int r, int column, float4 sum) {
                          const Row &row = rows()[r];
                          float4 value = {};
                          if (step < row.steps) {
                            const float *pos = a.pos + static_cast<size_t>(row.slot + step) * dp + column;
                            value = load4(pos) + load4(bias + column) + sum;
                          }
                          store4(z + r * dp + column, value);
                          if (keep != nullptr) store4(keep + r * dp + column, value);
                        });
    __syncthreads();
  }

  // x is z: the share of a head in the sum of its layer.
  __device__ void attend(int layer, int head, const unsigned char *weights) const {
    const HeadWeights w(plan);
    const int D = plan.D, Dp = plan.Dp(), dp = plan.dp();
    float *qkv = floats(at.qkv), *attended = floats(at.attended);
    float *stripes = floats(at.stripes), *softmax = floats(at.softmax);
    const auto keys_of = [&](const Row &row) {  // (T, Dp), and then the values
      const size_t index = (static_cast<size_t>(layer) * plan.H + head) * plan.B + row.sequence;
      return reinterpret_cast<Number *>(a.cache) + index * plan.cache_head();
    };
    const size_t values = static_cast<size_t>(plan.T) * Dp;  // where they begin
    norm(in<float>(weights, w.norm_weight), in<float>(weights, w.norm_bias));
    const float *qkv_bias = in<float>(weights, w.qkv_bias);
    multiply_rows<R>(in<Weight>(weights, w.qkv), 3 * D, dp, floats(at.x),
                     [&](int r, int out, float sum) { qkv[(3 * r + out / D) * Dp + out % D] = sum + qkv_bias[out]; });
    for (int i = threadIdx.x; i < 3 * R * (Dp - D); i += kThreads) qkv[i / (Dp - D) * Dp + D + i % (Dp - D)] = 0.0f;
    __syncthreads();
    for (int i = threadIdx.x; i < R * Dp; i += kThreads) {
      const int r = i / Dp, c = i % Dp;
      const Row &row = rows()[r];
      if (step >= row.steps) continue;
      Number *key = keys_of(row) + static_cast<size_t>(row.slot + step) * Dp + c;
      key[0] = stored<Number>(qkv[(3 * r + 1) * Dp + c]);
      key[values] = stored<Number>(qkv[(3 * r + 2) * Dp + c]);
    }
    __syncthreads();
    for (int i = threadIdx.x / 32; i < R * kStripes; i += kWarps) {
      const int r = i % R, stripe = i / R;
      const Row &row = rows()[r];
      const int slots = row.slot + step + 1;
      if (step >= row.steps || stripe * kCacheSlots >= slots) continue;
      const Number *keys = keys_of(row);
      attend_stripe(keys, keys + values, slots, stripe, D, Dp, qkv + 3 * r * Dp,
                    floats(at.scores) + threadIdx.x / 32 * kCacheSlots, stripes + (r * kStripes + stripe) * Dp,
                    softmax + 2 * (r * kStripes + stripe));
    }
    __syncthreads();
    for (int i = threadIdx.x; i < R * D; i += kThreads) {
      const int r = i / D;
      const Row &row = rows()[r];
      const int used = min(kStripes, (row.slot + step + kCacheSlots) / kCacheSlots);
      attended[r * Dp + i % D] =
          step >= row.steps ? 0.0f
                            : combine_stripes(stripes + r * kStripes * Dp, softmax + 2 * r * kStripes, used, Dp, i % D);
    }
    __syncthreads();
    const float *proj_bias = in<float>(weights, w.proj_bias);
    float *share = head_shares() + static_cast<size_t>(1 + head) * R * dp;
    multiply_columns<R>(
        in<Weight>(weights, w.proj), D, dp, attended, Dp, plan.slices(), floats(at.slices),
        [&](int r, int column, float4 sum) { store4(share + r * dp + column, load4(proj_bias + column) + sum); });
  }

  // x is z: the share of a part of the MLP in the sum of its layer.
  __device__ void feed_forward(int unit, const unsigned char *weights) const {
    const UnitWeights w(plan);
    const int F = plan.F, dp = plan.dp();
    float *hidden = floats(at.hidden);
    norm(in<float>(weights, w.norm_weight), in<float>(weights, w.norm_bias));
    const float *fc1_bias = in<float>(weights, w.fc1_bias);
    multiply_rows<R>(in<Weight>(weights, w.fc1), F, dp, floats(at.x),
                     [&](int r, int out, float sum) { hidden[r * F + out] = gelu(sum + fc1_bias[out]); });
    __syncthreads();
    const float *fc2_bias = in<float>(weights, w.fc2_bias);
    float *share = unit_shares() + static_cast<size_t>(1 + unit) * R * dp;
    multiply_columns<R>(
        in<Weight>(weights, w.fc2), F, dp, hidden, F, plan.slices(), floats(at.slices),
        [&](int r, int column, float4 sum) { store4(share + r * dp + column, load4(fc2_bias + column) + sum); });
  }
};

// The weights of a part of the model, and how many bytes they are.
struct Part {
  int layer, index;  // index: of the head, or H + that of the unit
  const unsigned char *weights;
  size_t bytes;
  bool is_head;

  __device__ Part(const DecodeArguments &a, int part) {
    const DecodePlan &plan = a.plan;
    layer = part / (plan.H + plan.U);
    index = part % (plan.H + plan.U);
    is_head = index < plan.H;
    bytes = is_head ? HeadWeights(plan).bytes : UnitWeights(plan).bytes;
    weights = is_head ? a.heads + (static_cast<size_t>(layer) * plan.H + index) * bytes
                      : a.units + (static_cast<size_t>(layer) * plan.U + index - plan.H) * bytes;
  }
};

// Copies weights to shared memory.
__device__ __forceinline__ void copy_bytes(unsigned char *to, const unsigned char *from, size_t bytes) {
  for (size_t i = 16 * threadIdx.x; i < bytes; i += 16 * kThreads) {
    *reinterpret_cast<uint4 *>(to + i) = *reinterpret_cast<const uint4 *>(from + i);
  }
}

template <int R, class Weight, class Number>
__global__ void __launch_bounds__(kThreads, 1) decode(const __grid_constant__ DecodeArguments a) {
  constexpr int kStepsBetweenLooks = 16;  // at the host's flag, which takes a microsecond
  extern __shared__ uint4 shared_memory[];
  unsigned char *shared = reinterpret_cast<unsigned char *>(shared_memory);
  const DecodePlan &plan = a.plan;
  const int G = gridDim.x;
  const auto for_each_part = [&](const auto &body) {
    for (int round = 0; round * G < plan.parts(); ++round) {
      const int part = part_of(blockIdx.x, round, G);
      if (part < plan.parts()) body(part);
    }
  };
  TileWork<R, Weight, Number> work(a, shared);

  // The weights of this block's parts lie behind the workspace, in their order.
  unsigned char *kept = shared + work.at.bytes;
  const size_t end_bytes = EndWeights(plan).bytes;
  const bool has_ends = has_ends_in(plan, blockIdx.x);
  const unsigned char *ends = has_ends && plan.ends_resident ? kept : a.ends;
  if (has_ends && plan.ends_resident) {
    copy_bytes(kept, a.ends, end_bytes);
    kept += end_bytes;
  }
  if (plan.resident) {
    unsigned char *to = kept;
    for_each_part([&](int part) {
      const Part p(a, part);
      copy_bytes(to, p.weights, p.bytes);
      to += p.bytes;
    });
  }

  bool is_stopped = false;
  for (int step = 0; step <= a.num_steps && !is_stopped; ++step) {
    bool has_looked = false;
    for (int tile = 0; tile < a.num_tiles; ++tile) {
      const int steps = a.tile_steps[tile];
      if (step > steps) continue;
      work.take(tile, step);
      const unsigned char *own = kept;
      for_each_part([&](int part) {
        const Part p(a, part);
        const unsigned char *weights = plan.resident ? own : p.weights;
        own += p.bytes;
        const unsigned phase = step * plan.L + p.layer;
        if (p.is_head) {
          float *keep = p.index == 0 ? work.head_shares() : nullptr;
          if (p.layer == 0) {
            if (step > 0) {
              wait_for(work.units_arrived(), plan.U * phase);  // of the step before
              is_stopped = load_relaxed(a.stop_at) <= step;
              work.predict(p.index, ends);
            }
            if (step == steps || is_stopped) return;
            // Whoever sees step + 1 of a tile has waited for this block at `step` of it, and so sees stop_at.
            if (part == 0 && !has_looked && (step % kStepsBetweenLooks == 0 || a.num_tiles > kStepsBetweenLooks)) {
              if (threadIdx.x == 0 && load_from_host(a.stop) != 0 && step + 1 < *a.stop_at) {
                *reinterpret_cast<volatile int *>(a.stop_at) = step + 1;
              }
              has_looked = true;
            }
            work.embed(p.index, ends, keep);
          } else {
            if (step == steps) return;
            is_stopped = !wait_for_step(work.units_arrived(), plan.U * phase, a.stop_at, step);
            if (is_stopped) return;
            work.gather(work.unit_shares(), plan.unit_shares(), keep);
          }
          work.attend(p.layer, p.index, weights);
          arrive(work.heads_arrived());
        } else {
          if (step == steps) return;
          is_stopped = !wait_for_step(work.heads_arrived(), plan.H * (phase + 1), a.stop_at, step);
          if (is_stopped) return;
          float *keep = p.index == plan.H ? work.unit_shares() : nullptr;
          work.gather(work.head_shares(), plan.head_shares(), keep);
          work.feed_forward(p.index - plan.H, weights);
          arrive(work.units_arrived());
        }
      });
    }
  }
}

}  // namespace tipl::cuda
