// Attention over a KV cache. Part of kernels.cpp, under its rules.
#pragma once

#include "cpu/decode_kernels.h"
#include "cpu/simd/math.h"
#include "cpu/simd/vec.h"

namespace {

using tipl::HeadCache;
using tipl::kCacheBlock;
using tipl::Precision;

constexpr int kKeyGroups = 4;           // groups of N slots whose scores are computed side by side
constexpr ptrdiff_t kBlocksAtOnce = 4;  // blocks in one round of the online softmax: their scores share a maximum
static_assert(kCacheBlock % (kKeyGroups * kLanes) == 0);

// Value `i` of every word.
template <Precision PRECISION>
inline Vec unpack(Packed word, int i) {
  return PRECISION == Precision::kFloat32 ? word.float32() : word.bfloat16(i);
}

// scores (GROUPS groups of N) <- query . keys, for groups that lie group_words apart. With each word it reads it
// prefetches the one `ahead` words behind.
template <Precision PRECISION, int GROUPS>
inline void score_groups(const float *query, const uint32_t *keys, ptrdiff_t ahead, ptrdiff_t group_words, int head_dim,
                         Vec (&score)[GROUPS]) {
  constexpr int kPerWord = tipl::values_per_word(PRECISION);
  const auto add = [&](int i, int j) {
    const Vec q = Vec::all(query[i + j]);
#pragma GCC unroll 4
    for (int g = 0; g < GROUPS; ++g) {
      score[g] = fma(q, unpack<PRECISION>(Packed::load(keys + g * group_words), j), score[g]);
    }
  };
#pragma GCC unroll 4
  for (int g = 0; g < GROUPS; ++g) score[g] = Vec::zero();
  int i = 0;
  for (; i + kPerWord <= head_dim; i += kPerWord, keys += kLanes) {
#pragma GCC unroll 4
    for (int g = 0; g < GROUPS; ++g) __builtin_prefetch(keys + g * group_words + ahead);
#pragma GCC unroll 2
    for (int j = 0; j < kPerWord; ++j) add(i, j);
  }
  for (int j = 0; i + j < head_dim; ++j) add(i, j);
}

// scores (<= 64, rounded up to N) <- query . keys / sqrt(D) for `count` slots, and -inf beyond. Returns their maximum.
template <Precision PRECISION>
inline Vec score_slots(const HeadCache &cache, const float *query, float scale, const uint32_t *keys, ptrdiff_t ahead,
                       ptrdiff_t group_words, ptrdiff_t count, float *scores) {
  const Vec lowest = Vec::all(-__builtin_inff());
  Vec highest = lowest;
  const auto finish = [&](Vec score, ptrdiff_t slot) {
    score = score * Vec::all(scale);
    if (slot + kLanes > count) score = select_first(count - slot, score, lowest);
    score.store(scores + slot);
    highest = max(highest, score);
  };
  ptrdiff_t slot = 0;
  for (; slot + (kKeyGroups - 1) * kLanes < count; slot += kKeyGroups * kLanes, keys += kKeyGroups * group_words) {
    Vec score[kKeyGroups];
    score_groups<PRECISION>(query, keys, ahead, group_words, cache.head_dim, score);
#pragma GCC unroll 4
    for (int g = 0; g < kKeyGroups; ++g) finish(score[g], slot + g * kLanes);
  }
  for (; slot < count; slot += kLanes, keys += group_words) {
    Vec score[1];
    score_groups<PRECISION>(query, keys, ahead, group_words, cache.head_dim, score);
    finish(score[0], slot);
  }
  return highest;
}

// acc (COLUMNS registers) <- acc * decay + sum over slots of weight * value. Sums PHASES words side by side. With each
// word it reads it prefetches the one `ahead` words behind.
template <Precision PRECISION, int COLUMNS, int PHASES>
inline void add_values(const uint32_t *values, ptrdiff_t ahead, ptrdiff_t stride, const float *weights, ptrdiff_t count,
                       Vec decay, float *acc) {
  constexpr int kPerWord = tipl::values_per_word(PRECISION);
  Vec partial[PHASES][COLUMNS];
  for (int phase = 0; phase < PHASES; ++phase) {
    for (int c = 0; c < COLUMNS; ++c) partial[phase][c] = Vec::zero();
  }
  const auto add = [&](int phase, ptrdiff_t slot) {
#pragma GCC unroll 8
    for (int c = 0; c < COLUMNS; ++c) __builtin_prefetch(values + phase * stride + c * kLanes + ahead);
#pragma GCC unroll 2
    for (int j = 0; j < kPerWord; ++j) {
      const Vec weight = Vec::all(weights[slot + j]);
#pragma GCC unroll 8
      for (int c = 0; c < COLUMNS; ++c) {
        const Packed word = Packed::load(values + phase * stride + c * kLanes);
        partial[phase][c] = fma(weight, unpack<PRECISION>(word, j), partial[phase][c]);
      }
    }
  };
  ptrdiff_t slot = 0;
  for (; slot + PHASES * kPerWord <= count; slot += PHASES * kPerWord, values += PHASES * stride) {
#pragma GCC unroll 8
    for (int phase = 0; phase < PHASES; ++phase) add(phase, slot + phase * kPerWord);
  }
  for (; slot < count; slot += kPerWord, values += stride) add(0, slot);
  for (int c = 0; c < COLUMNS; ++c) {
    Vec total = partial[0][c];
    for (int phase = 1; phase < PHASES; ++phase) total = total + partial[phase][c];
    fma(Vec::load(acc + c * kLanes), decay, total).store(acc + c * kLanes);
  }
}

template <Precision PRECISION>
inline void attend_in(const HeadCache &cache, const HeadCache &next, const float *query, ptrdiff_t slots, float *acc,
                      float *out) {
  const ptrdiff_t group_words = tipl::words_of(cache.head_dim, PRECISION) * kLanes;
  const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(cache.head_dim));
  const ptrdiff_t stride = cache.value_stride, blocks = (slots + kCacheBlock - 1) / kCacheBlock;
  alignas(64) float weights[kBlocksAtOnce * kCacheBlock];
  Vec total = Vec::zero();                    // of the weights, for each lane
  Vec highest = Vec::all(-__builtin_inff());  // the highest score so far, in every lane
  for (ptrdiff_t i = 0; i < stride; i += kLanes) Vec::zero().store(acc + i);
  for (ptrdiff_t round = 0; round < blocks; round += kBlocksAtOnce) {
    const ptrdiff_t behind = round + kBlocksAtOnce < blocks ? round + kBlocksAtOnce : blocks;
    const auto slots_of = [&](ptrdiff_t block) {
      return block + 1 < blocks ? kCacheBlock : slots - block * kCacheBlock;
    };
    Vec now_highest = highest;
    for (ptrdiff_t block = round; block < behind; ++block) {  // prefetches the values of the block
      now_highest = max(now_highest, score_slots<PRECISION>(cache, query, scale, cache.keys + block * cache.block_words,
                                                            cache.values - cache.keys, group_words, slots_of(block),
                                                            weights + (block - round) * kCacheBlock));
    }
    now_highest = max_lanes(now_highest);
    Vec decay = exp(highest - now_highest);  // 0 in the first round
    highest = now_highest;
    total = total * decay;
    for (ptrdiff_t slot = 0; slot < slots - round * kCacheBlock && slot < kBlocksAtOnce * kCacheBlock; slot += kLanes) {
      const Vec weight = exp(Vec::load(weights + slot) - highest);
      weight.store(weights + slot);  // 0 beyond the last slot, up to a whole register
      total = total + weight;
    }
    for (ptrdiff_t block = round; block < behind; ++block) {  // prefetches the keys of the next round
      const uint32_t *values = cache.values + block * cache.block_words;
      const float *block_weights = weights + (block - round) * kCacheBlock;
      const uint32_t *later = block + kBlocksAtOnce < blocks ? cache.keys + (block + kBlocksAtOnce) * cache.block_words
                                                             : next.keys + (block - round) * next.block_words;
      const ptrdiff_t ahead = later - values, count = slots_of(block);
      ptrdiff_t column = 0;
      for (; column + 4 * kLanes <= stride; column += 4 * kLanes) {
        add_values<PRECISION, 4, 2>(values + column, ahead, stride, block_weights, count, decay, acc + column);
      }
      for (; column + 2 * kLanes <= stride; column += 2 * kLanes) {
        add_values<PRECISION, 2, 4>(values + column, ahead, stride, block_weights, count, decay, acc + column);
      }
      for (; column < stride; column += kLanes) {
        add_values<PRECISION, 1, 8>(values + column, ahead, stride, block_weights, count, decay, acc + column);
      }
      decay = Vec::all(1.0f);
    }
  }
  const Vec inverse = Vec::all(1.0f) / sum_lanes(total);
  const int whole = cache.head_dim / kLanes * kLanes, rest = cache.head_dim - whole;
  for (int i = 0; i < whole; i += kLanes) (Vec::load(acc + i) * inverse).store(out + i);
  if (rest > 0) store_first(out + whole, rest, Vec::load(acc + whole) * inverse);
}

void attend(const HeadCache &cache, const HeadCache &next, const float *query, ptrdiff_t slots, float *scratch,
            float *out) noexcept {
  if (cache.precision == Precision::kBfloat16) {
    attend_in<Precision::kBfloat16>(cache, next, query, slots, scratch, out);
  } else {
    attend_in<Precision::kFloat32>(cache, next, query, slots, scratch, out);
  }
}

void append(const HeadCache &cache, ptrdiff_t slot, const float *key, const float *value) noexcept {
  const int per_word = tipl::values_per_word(cache.precision), D = cache.head_dim;
  const ptrdiff_t block = slot / kCacheBlock * cache.block_words, row = slot % kCacheBlock;
  uint32_t *keys = cache.keys + block + row / kLanes * (tipl::words_of(D, cache.precision) * kLanes) + row % kLanes;
  uint32_t *values = cache.values + block + row / per_word * cache.value_stride;
  for (int i = 0; i < D; i += kLanes) {
    const ptrdiff_t count = D - i < kLanes ? D - i : kLanes;
    Packed k = {reinterpret_cast<Words>(load_first(key + i, count).v)};
    Packed v = {reinterpret_cast<Words>(load_first(value + i, count).v)};
    if (cache.precision == Precision::kBfloat16) {
      k = round_to_bfloat16({k.float32()});
      v = round_to_bfloat16({v.float32()});
      // The even slot of a pair clears the odd one, where an earlier path may have left NaN: NaN times a weight of zero
      // is NaN.
      if (slot % 2 == 1) v.v = (v.v << 16) | (Packed::load(values + i).v & 0xffffu);
    }
    v.store(values + i);
    for (int lane = 0; lane < count; ++lane) {
      uint32_t &word = keys[(i + lane) / per_word * kLanes];
      word = (i + lane) % per_word == 0 ? k.v[lane] : word | k.v[lane] << 16;
    }
  }
}

}  // namespace
