// How a decoder is laid out on a device: the parts of its layers, their weights, and what a block keeps in shared
// memory. Plain structs and sums: the host fills them, the kernel reads them.
//
// A layer has H + U parts, each small enough for one block, whose weights stay in its shared memory while they fit:
//
//   head h   z -> norm1 -> query, key, value of the head -> attention -> its share of proj   (d)
//   unit u   z -> norm2 -> F units of the MLP -> their share of fc2                          (d)
//
// Each part writes its share of the next sum of the residual stream z; every part that needs z adds the shares up,
// always in the same order. So a step has two meetings for each layer, and weights are read from global memory once for
// all steps.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)
#define TIPL_BOTH __host__ __device__
#else
#define TIPL_BOTH
#endif

namespace tipl::cuda {

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr int kTileRows = 4;  // of a tile, where there are many rows; else one
constexpr int kStripes = 16;  // of the slots of a row: each is one online softmax, and then they are combined in order
constexpr int kCacheSlots = 32;  // slots of a block of a stripe: a lane for each score

TIPL_BOTH constexpr int round_up4(int n) { return (n + 3) / 4 * 4; }

struct DecodePlan {
  int k, L, H, D, d, d_ff, T, B;
  int U, F;           // parts of an MLP, and units of each; the last may have fewer, and zeros
  int weight_bytes;   // of one number of a block's matrix
  int cache_bytes;    // of one number of the cache
  int rows;           // R, of a tile
  int resident;       // whether the weights of a block's parts stay in shared memory
  int ends_resident;  // and those of embed, norm and head, in blocks with a head of the first layer

  TIPL_BOTH int parts() const { return L * (H + U); }
  TIPL_BOTH int token() const { return 2 * k + 1; }
  // Padded to whole groups of four numbers.
  TIPL_BOTH int dp() const { return round_up4(d); }
  TIPL_BOTH int kp() const { return round_up4(k); }
  TIPL_BOTH int Dp() const { return round_up4(D); }

  // Slices of the sums of multiply_columns and add_shares, each with a group of threads.
  TIPL_BOTH int slices() const { return dp() / 4 < kThreads ? kThreads / (dp() / 4) : 1; }
  // Numbers of a head of a sequence in the cache: keys (T, Dp), then values (T, Dp).
  TIPL_BOTH size_t cache_head() const { return static_cast<size_t>(2) * T * Dp(); }
  // Shares that make up z behind the heads, z itself before them included; and behind the units.
  TIPL_BOTH int head_shares() const { return H + 1; }
  TIPL_BOTH int unit_shares() const { return U + 1; }
  TIPL_BOTH size_t tile_shares() const { return static_cast<size_t>(head_shares() + unit_shares()) * rows * dp(); }
};

// The part that a block of G has in a round: each round has the next G parts, moved on by one block, so that blocks
// with several parts have heads and units.
TIPL_BOTH inline int part_of(int block, int round, int G) { return round * G + (block + G - round % G) % G; }

// Whether a block has a head of the first layer, which needs what comes before it and after the last one.
TIPL_BOTH inline bool has_ends_in(const DecodePlan &plan, int block) { return block < plan.H; }

// Byte offsets of arrays that lie one behind the other, each on 16 bytes.
class Offsets {
 public:
  TIPL_BOTH size_t add(size_t count, size_t bytes) {
    const size_t at = end_;
    end_ = (end_ + count * bytes + 15) / 16 * 16;
    return at;
  }
  TIPL_BOTH size_t end() const { return end_; }

 private:
  size_t end_ = 0;
};

// The weights of a head: (rows, columns) in float32, but for qkv and proj.
struct HeadWeights {
  size_t norm_weight, norm_bias;  // (dp)
  size_t qkv_bias;                // (3, D)
  size_t proj_bias;               // (dp), zeros but for the first head
  size_t qkv;                     // (3, D; dp)
  size_t proj;                    // (D, dp): transposed
  size_t bytes;
  TIPL_BOTH explicit HeadWeights(const DecodePlan &plan) {
    Offsets at;
    norm_weight = at.add(plan.dp(), 4);
    norm_bias = at.add(plan.dp(), 4);
    qkv_bias = at.add(3 * plan.D, 4);
    proj_bias = at.add(plan.dp(), 4);
    qkv = at.add(static_cast<size_t>(3) * plan.D * plan.dp(), plan.weight_bytes);
    proj = at.add(static_cast<size_t>(plan.D) * plan.dp(), plan.weight_bytes);
    bytes = at.end();
  }
};

// The weights of a part of an MLP, in float32 but for fc1 and fc2.
struct UnitWeights {
  size_t norm_weight, norm_bias;  // (dp)
  size_t fc1_bias;                // (F)
  size_t fc2_bias;                // (dp), zeros but for the first part
  size_t fc1;                     // (F, dp)
  size_t fc2;                     // (F, dp): transposed
  size_t bytes;
  TIPL_BOTH explicit UnitWeights(const DecodePlan &plan) {
    Offsets at;
    norm_weight = at.add(plan.dp(), 4);
    norm_bias = at.add(plan.dp(), 4);
    fc1_bias = at.add(plan.F, 4);
    fc2_bias = at.add(plan.dp(), 4);
    fc1 = at.add(static_cast<size_t>(plan.F) * plan.dp(), plan.weight_bytes);
    fc2 = at.add(static_cast<size_t>(plan.F) * plan.dp(), plan.weight_bytes);
    bytes = at.end();
  }
};

// What comes before the first layer and after the last one, all float32.
struct EndWeights {
  size_t embed_bias;              // (dp)
  size_t embed;                   // (2k + 1, dp): transposed
  size_t norm_weight, norm_bias;  // (dp)
  size_t head_bias;               // (kp)
  size_t head;                    // (k, dp)
  size_t bytes;
  TIPL_BOTH explicit EndWeights(const DecodePlan &plan) {
    Offsets at;
    embed_bias = at.add(plan.dp(), 4);
    embed = at.add(static_cast<size_t>(plan.token()) * plan.dp(), 4);
    norm_weight = at.add(plan.dp(), 4);
    norm_bias = at.add(plan.dp(), 4);
    head_bias = at.add(plan.kp(), 4);
    head = at.add(static_cast<size_t>(plan.k) * plan.dp(), 4);
    bytes = at.end();
  }
};

// A row of a pass: the tokens that it appends to its sequence.
struct Row {
  int sequence, slot;  // of its first token
  int steps;           // tokens; 0: the row is there to fill its tile
  int prefix_end;      // h
  int is_last;         // whether what follows it is what its sequence predicts next
  int64_t previous;    // kNone, kOwn, or the row of x that comes before it
  int64_t x;           // the row of x that it appends, or kOwn: its predictions

  static constexpr int kNone = -1, kOwn = -2;
};

// What a block works on, in shared memory behind its weights. R rows.
struct Workspace {
  size_t rows;      // (R) Row
  size_t x;         // (R, dp), z, then its norm
  size_t token;     // (R, round_up4(2k + 1))
  size_t qkv;       // (R, 3, Dp)
  size_t scores;    // (kWarps, kCacheSlots)
  size_t stripes;   // (R, kStripes, Dp), sums of values
  size_t softmax;   // (R, kStripes, 2), the highest score and the sum of weights
  size_t attended;  // (R, Dp)
  size_t hidden;    // (R, F)
  size_t slices;    // (slices, R, dp)
  size_t bytes;
  TIPL_BOTH explicit Workspace(const DecodePlan &plan) {
    const size_t R = plan.rows;
    Offsets at;
    rows = at.add(R, sizeof(Row));
    x = at.add(R * plan.dp(), 4);
    token = at.add(R * round_up4(plan.token()), 4);
    qkv = at.add(R * 3 * plan.Dp(), 4);
    scores = at.add(kWarps * kCacheSlots, 4);
    stripes = at.add(R * kStripes * plan.Dp(), 4);
    softmax = at.add(R * kStripes * 2, 4);
    attended = at.add(R * plan.Dp(), 4);
    hidden = at.add(R * plan.F, 4);
    slices = at.add(R * plan.slices() * plan.dp(), 4);
    bytes = at.end();
  }
};

// The arguments of the kernel. Pointers are to the device's memory.
struct DecodeArguments {
  DecodePlan plan;
  float diff_scale, out_scale;
  int max_len;                 // of the model, which scales the place in the path
  const unsigned char *heads;  // (L, H) HeadWeights
  const unsigned char *units;  // (L, U) UnitWeights
  const unsigned char *ends;   // EndWeights
  const float *pos;            // (max_len, dp)
  unsigned char *cache;        // (L, H, B) heads of the cache
  float *state;                // (H, B, 2, k): the last coordinates and those predicted, for each head of layer 0
  const Row *rows;             // (tiles, R)
  const int *tile_steps;       // (tiles), the most steps of a row
  int num_tiles, num_steps;    // the most steps of a tile
  const float *x;              // (any, k)
  float *y;                    // (B, y_steps, k)
  int64_t y_steps;
  float *shares;      // (tiles, shares of heads and units, R, dp)
  unsigned *arrived;  // (tiles, 2), parts that have written their share: heads, units
  const int *stop;    // the host's: whether to stop
  int *stop_at;       // the first step that is not made any more
};

}  // namespace tipl::cuda
