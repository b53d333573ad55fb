// Vec: one register of floats of the instruction set that is being compiled.
//
// Only for kernels.cpp, under its rules: everything here is in an anonymous namespace, and includes only C headers.
//
// Arithmetic uses the vector extension of GCC and Clang, which exists for every CPU: the baseline (4 floats) compiles
// to SSE2 on x86-64 and to NEON on AArch64, where fma() could use vfmaq_f32 and dot_bfloat16() vbfdotq_f32. Only what
// the extension lacks is written for each instruction set, below.
#pragma once

#include <stddef.h>
#include <stdint.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef float UnalignedFloats __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef uint32_t UnalignedWords __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

struct Vec {
  Floats v;

  static Vec zero() { return {Floats{}}; }
  static Vec all(float x) { return {x - Floats{}}; }
  static Vec load(const float *p) { return {*reinterpret_cast<const UnalignedFloats *>(p)}; }
  void store(float *p) const { *reinterpret_cast<UnalignedFloats *>(p) = v; }

  friend Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
  friend Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
  friend Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
  friend Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
};

// The larger and the smaller value of each lane; b where either is NaN. (Not _mm512_max_ps, for which GCC 12 warns
// about its own header.)
inline Vec max(Vec a, Vec b) { return {a.v > b.v ? a.v : b.v}; }
inline Vec min(Vec a, Vec b) { return {a.v < b.v ? a.v : b.v}; }

// The square root of each lane, correctly rounded.
inline Vec square_root(Vec a) {
#if defined(__AVX512F__)
  return {_mm512_maskz_sqrt_ps(0xffff, a.v)};  // (for the unmasked one GCC 12 warns about its own header)
#elif defined(__AVX2__)
  return {_mm256_sqrt_ps(a.v)};
#else
  for (int lane = 0; lane < kLanes; ++lane) a.v[lane] = __builtin_sqrtf(a.v[lane]);
  return a;
#endif
}

// Lane indices 0 ... kLanes - 1.
inline Ints lane_index() {
  Ints index;
  for (int lane = 0; lane < kLanes; ++lane) index[lane] = lane;
  return index;
}

#if defined(__AVX512F__)

inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }  // a * b + c, rounded once
inline __mmask16 first_mask(ptrdiff_t n) { return static_cast<__mmask16>((1u << n) - 1); }
inline Vec load_first(const float *p, ptrdiff_t n) { return {_mm512_maskz_loadu_ps(first_mask(n), p)}; }
inline void store_first(float *p, ptrdiff_t n, Vec a) { _mm512_mask_storeu_ps(p, first_mask(n), a.v); }
// Lane i of a where i < n, of b elsewhere.
inline Vec select_first(ptrdiff_t n, Vec a, Vec b) { return {_mm512_mask_blend_ps(first_mask(n), b.v, a.v)}; }

#elif defined(__AVX2__)

inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline __m256i first_mask(ptrdiff_t n) { return reinterpret_cast<__m256i>(lane_index() < static_cast<int32_t>(n)); }
inline Vec load_first(const float *p, ptrdiff_t n) { return {_mm256_maskload_ps(p, first_mask(n))}; }
inline void store_first(float *p, ptrdiff_t n, Vec a) { _mm256_maskstore_ps(p, first_mask(n), a.v); }
inline Vec select_first(ptrdiff_t n, Vec a, Vec b) {
  return {_mm256_blendv_ps(b.v, a.v, _mm256_castsi256_ps(first_mask(n)))};
}

#else

inline Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }  // SSE2 has no fused product: rounded twice
inline Vec load_first(const float *p, ptrdiff_t n) {
  Vec a = Vec::zero();
  for (ptrdiff_t lane = 0; lane < n; ++lane) a.v[lane] = p[lane];
  return a;
}
inline void store_first(float *p, ptrdiff_t n, Vec a) {
  for (ptrdiff_t lane = 0; lane < n; ++lane) p[lane] = a.v[lane];
}
inline Vec select_first(ptrdiff_t n, Vec a, Vec b) { return {lane_index() < static_cast<int32_t>(n) ? a.v : b.v}; }

#endif

// ---- packed values

// A register of 32-bit words. Each word holds one float, two bfloat16 or four int8, the first in its lowest bits.
struct Packed {
  Words v;

  static Packed all(uint32_t x) { return {x - Words{}}; }
  static Packed load(const uint32_t *p) { return {*reinterpret_cast<const UnalignedWords *>(p)}; }
  void store(uint32_t *p) const { *reinterpret_cast<UnalignedWords *>(p) = v; }

  Vec float32() const { return {reinterpret_cast<Floats>(v)}; }
  // Value `i` of every word.
  Vec bfloat16(int i) const { return {reinterpret_cast<Floats>(i == 0 ? v << 16 : v & 0xffff0000u)}; }
  Vec int8(int i) const { return {__builtin_convertvector(reinterpret_cast<Ints>(v << (24 - 8 * i)) >> 24, Floats)}; }
};

// The nearest bfloat16 to each lane, in the low half of its word; ties to even, and NaN stays NaN.
inline Packed round_to_bfloat16(Vec a) {
  const Words bits = reinterpret_cast<Words>(a.v);
  const Words nearest = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return {a.v == a.v ? nearest : (bits >> 16) | 0x40u};
}

#if defined(__AVX512BF16__)
#define TIPL_BFLOAT16_DOT 1
// c + a * b over both bfloat16 of every word, summed in float32.
inline Vec dot_bfloat16(Packed a, Packed b, Vec c) {
  return {_mm512_dpbf16_ps(c.v, reinterpret_cast<__m512bh>(a.v), reinterpret_cast<__m512bh>(b.v))};
}
// 2 * kLanes floats at p as bfloat16, two a word.
inline Packed load_as_bfloat16(const float *p) {
  return {reinterpret_cast<Words>(_mm512_cvtne2ps_pbh(Vec::load(p + kLanes).v, Vec::load(p).v))};
}
#endif

#if defined(__AVX512VNNI__)
#define TIPL_INT8_DOT 1
typedef int8_t Bytes __attribute__((vector_size(kLanes)));
typedef int8_t UnalignedBytes __attribute__((vector_size(kLanes), aligned(1), may_alias));

// c + a * b over the four numbers of every word, those of a unsigned and those of b signed.
inline Ints dot_int8(Packed a, Packed b, Ints c) {
  return reinterpret_cast<Ints>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(c), reinterpret_cast<__m512i>(a.v),
                                                    reinterpret_cast<__m512i>(b.v)));
}
// The nearest integer to each lane; ties to even. (Masked, as square_root is.)
inline Ints nearest_integer(Vec a) { return reinterpret_cast<Ints>(_mm512_maskz_cvtps_epi32(0xffff, a.v)); }
// The lowest byte of each lane, four a word.
inline void store_bytes(uint32_t *p, Ints a) {
  *reinterpret_cast<UnalignedBytes *>(p) = __builtin_convertvector(a, Bytes);
}
inline Vec as_floats(Ints a) { return {__builtin_convertvector(a, Floats)}; }
#endif

// 2^n, where the low bits of a's representation hold n, as in n + 1.5 * 2^23.
inline Vec power_of_two(Vec a) { return {reinterpret_cast<Floats>((reinterpret_cast<Ints>(a.v) << 23) + 0x3f800000)}; }

// b, but 0 in the lanes where a < bound.
inline Vec zero_where_below(Vec a, float bound, Vec b) { return {a.v < Vec::all(bound).v ? Floats{} : b.v}; }

// Lane numbers as a pack: every_lane([]<int... LANE>() { ... }) with LANE = 0 ... kLanes - 1.
template <int N = kLanes, int... LANE, class Body>
inline auto every_lane(const Body &body) {
  if constexpr (N == 0) {
    return body.template operator()<LANE...>();
  } else {
    return every_lane<N - 1, N - 1, LANE...>(body);
  }
}

// Lane i of the result is lane (i + BY) mod kLanes of a.
template <int BY>
inline Vec rotate(Vec a) {
  return every_lane([a]<int... LANE>() -> Vec { return {__builtin_shufflevector(a.v, a.v, (LANE + BY) % kLanes...)}; });
}

// Transposes: lane i of row j becomes lane j of row i. Swaps blocks of BIT lanes of BIT rows, then blocks twice that
// size.
template <int BIT = 1>
inline void transpose(Vec (&rows)[kLanes]) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if ((i & BIT) != 0) continue;
    const Floats a = rows[i].v, b = rows[i + BIT].v;
    every_lane([&]<int... LANE>() {
      rows[i].v = __builtin_shufflevector(a, b, ((LANE & BIT) == 0 ? LANE : LANE + kLanes - BIT)...);
      rows[i + BIT].v = __builtin_shufflevector(a, b, ((LANE & BIT) == 0 ? LANE + BIT : LANE + kLanes)...);
    });
  }
  if constexpr (2 * BIT < kLanes) transpose<2 * BIT>(rows);
}

// The sum and the maximum over all lanes, by a fixed binary tree. Every lane gets the result.
template <int HALF = kLanes / 2>
inline Vec sum_lanes(Vec a) {
  a = a + rotate<HALF>(a);
  if constexpr (HALF > 1) return sum_lanes<HALF / 2>(a);
  return a;
}

template <int HALF = kLanes / 2>
inline Vec max_lanes(Vec a) {
  a = max(rotate<HALF>(a), a);
  if constexpr (HALF > 1) return max_lanes<HALF / 2>(a);
  return a;
}

inline float first_lane(Vec a) { return a.v[0]; }

// ---- float64

constexpr int kDoubleLanes = kLanes / 2;

typedef double DoubleLanes __attribute__((vector_size(8 * kDoubleLanes)));
typedef float HalfFloats __attribute__((vector_size(4 * kDoubleLanes)));
typedef float UnalignedHalfFloats __attribute__((vector_size(4 * kDoubleLanes), aligned(4), may_alias));
typedef double UnalignedDoubles __attribute__((vector_size(8 * kDoubleLanes), aligned(8), may_alias));

// A register of doubles. Loading converts floats to doubles; storing to floats rounds.
struct Doubles {
  DoubleLanes v;

  static Doubles zero() { return {DoubleLanes{}}; }
  static Doubles all(double x) { return {x - DoubleLanes{}}; }
  static Doubles load(const double *p) { return {*reinterpret_cast<const UnalignedDoubles *>(p)}; }
  static Doubles load(const float *p) {
    const HalfFloats floats = *reinterpret_cast<const UnalignedHalfFloats *>(p);
    return {__builtin_convertvector(floats, DoubleLanes)};
  }
  void store(double *p) const { *reinterpret_cast<UnalignedDoubles *>(p) = v; }
  void store(float *p) const { *reinterpret_cast<UnalignedHalfFloats *>(p) = __builtin_convertvector(v, HalfFloats); }

  friend Doubles operator+(Doubles a, Doubles b) { return {a.v + b.v}; }
  friend Doubles operator-(Doubles a, Doubles b) { return {a.v - b.v}; }
};

// a * b + c, rounded twice where the instruction set has no fused multiply-add.
#if defined(__AVX512F__)
inline Doubles fma(Doubles a, Doubles b, Doubles c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
#elif defined(__AVX2__)
inline Doubles fma(Doubles a, Doubles b, Doubles c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }
#else
inline Doubles fma(Doubles a, Doubles b, Doubles c) { return {a.v * b.v + c.v}; }
#endif

// The first n < kDoubleLanes values at p, then zeros.
template <class T>
inline Doubles load_first_doubles(const T *p, ptrdiff_t n) {
  Doubles a = Doubles::zero();
  for (ptrdiff_t lane = 0; lane < n; ++lane) a.v[lane] = static_cast<double>(p[lane]);
  return a;
}

// The sum over all lanes, by a fixed binary tree.
inline double sum(Doubles a) {
  double lanes[kDoubleLanes];
  a.store(lanes);
  for (int half = kDoubleLanes / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
}

}  // namespace
