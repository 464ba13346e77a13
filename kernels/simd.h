// Internal to kernels/*_{cpu,avx2,avx512}.cc: sixteen float32 lanes as one type, on AVX-512 one register,
// on AVX2 two, with the same bits from both. Everything has internal linkage and is always inlined,
// because the including files are compiled for different instruction sets: an inline function shared
// between them could be linked in the version that this CPU does not have. For the same reason those files
// include nothing of the standard library but C headers.
#pragma once

#include <immintrin.h>
#include <math.h>
#include <stdint.h>

#define TP_INLINE static inline __attribute__((always_inline))

namespace tidepool {
namespace {

inline constexpr int kLanes = 16;

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__)

struct F16 {
  __m512 v;
};
TP_INLINE F16 Zero() { return {_mm512_setzero_ps()}; }
TP_INLINE F16 Set1(float x) { return {_mm512_set1_ps(x)}; }
TP_INLINE F16 Load(const float* p) { return {_mm512_loadu_ps(p)}; }
TP_INLINE void Store(float* p, F16 a) { _mm512_storeu_ps(p, a.v); }
TP_INLINE F16 Add(F16 a, F16 b) { return {_mm512_add_ps(a.v, b.v)}; }
TP_INLINE F16 Sub(F16 a, F16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
TP_INLINE F16 Mul(F16 a, F16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
TP_INLINE F16 Div(F16 a, F16 b) { return {_mm512_div_ps(a.v, b.v)}; }
TP_INLINE F16 Fma(F16 a, F16 b, F16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }    // a*b + c
TP_INLINE F16 Fnma(F16 a, F16 b, F16 c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }  // c - a*b
TP_INLINE F16 Max(F16 a, F16 b) { return {_mm512_max_ps(a.v, b.v)}; }  // b where either is NaN
TP_INLINE F16 Min(F16 a, F16 b) { return {_mm512_min_ps(a.v, b.v)}; }
TP_INLINE F16 Round(F16 a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
// 2^n for integral n in [-126, 127].
TP_INLINE F16 Pow2(F16 n) {
  const __m512i e = _mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(e, 23))};
}
// a < b ? 0 : x
TP_INLINE F16 ZeroWhereLess(F16 a, F16 b, F16 x) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_NLT_UQ), x.v)};
}
// a < b ? x : y
TP_INLINE F16 SelectLess(F16 a, F16 b, F16 x, F16 y) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), y.v, x.v)};
}
TP_INLINE F16 Abs(F16 a) { return {_mm512_andnot_ps(_mm512_set1_ps(-0.0f), a.v)}; }
// |a| with the sign of s.
TP_INLINE F16 CopySign(F16 a, F16 s) {
  return {_mm512_or_ps(Abs(a).v, _mm512_and_ps(_mm512_set1_ps(-0.0f), s.v))};
}
TP_INLINE F16 LoadBf16(const uint16_t* p) {
  const __m512i w = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(w, 16))};
}
TP_INLINE __m256 Low8(F16 a) { return _mm512_castps512_ps256(a.v); }
TP_INLINE __m256 High8(F16 a) { return _mm512_extractf32x8_ps(a.v, 1); }

#else

struct F16 {
  __m256 lo, hi;
};
TP_INLINE F16 Zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
TP_INLINE F16 Set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
TP_INLINE F16 Load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
TP_INLINE void Store(float* p, F16 a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
TP_INLINE F16 Add(F16 a, F16 b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
TP_INLINE F16 Sub(F16 a, F16 b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
TP_INLINE F16 Mul(F16 a, F16 b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
TP_INLINE F16 Div(F16 a, F16 b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
TP_INLINE F16 Fma(F16 a, F16 b, F16 c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
TP_INLINE F16 Fnma(F16 a, F16 b, F16 c) {
  return {_mm256_fnmadd_ps(a.lo, b.lo, c.lo), _mm256_fnmadd_ps(a.hi, b.hi, c.hi)};
}
TP_INLINE F16 Max(F16 a, F16 b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
TP_INLINE F16 Min(F16 a, F16 b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
TP_INLINE F16 Round(F16 a) {
  constexpr int kMode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.lo, kMode), _mm256_round_ps(a.hi, kMode)};
}
TP_INLINE __m256 Pow2Half(__m256 n) {
  const __m256i e = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_castsi256_ps(_mm256_slli_epi32(e, 23));
}
TP_INLINE F16 Pow2(F16 n) { return {Pow2Half(n.lo), Pow2Half(n.hi)}; }
TP_INLINE F16 ZeroWhereLess(F16 a, F16 b, F16 x) {
  return {_mm256_and_ps(_mm256_cmp_ps(a.lo, b.lo, _CMP_NLT_UQ), x.lo),
          _mm256_and_ps(_mm256_cmp_ps(a.hi, b.hi, _CMP_NLT_UQ), x.hi)};
}
TP_INLINE F16 SelectLess(F16 a, F16 b, F16 x, F16 y) {
  return {_mm256_blendv_ps(y.lo, x.lo, _mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ)),
          _mm256_blendv_ps(y.hi, x.hi, _mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ))};
}
TP_INLINE F16 Abs(F16 a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
}
TP_INLINE F16 CopySign(F16 a, F16 s) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  const F16 b = Abs(a);
  return {_mm256_or_ps(b.lo, _mm256_and_ps(sign, s.lo)), _mm256_or_ps(b.hi, _mm256_and_ps(sign, s.hi))};
}
TP_INLINE __m256 LoadBf16Half(const uint16_t* p) {
  const __m256i w = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(w, 16));
}
TP_INLINE F16 LoadBf16(const uint16_t* p) { return {LoadBf16Half(p), LoadBf16Half(p + 8)}; }
TP_INLINE __m256 Low8(F16 a) { return a.lo; }
TP_INLINE __m256 High8(F16 a) { return a.hi; }

#endif

// Sum of the lanes, always by the tree l + (l+8), + 4, + 2, + 1.
TP_INLINE float ReduceAdd(F16 a) {
  const __m256 h = _mm256_add_ps(Low8(a), High8(a));
  const __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  const __m128 d = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(d, _mm_shuffle_ps(d, d, 1)));
}

TP_INLINE float ReduceMax(F16 a) {
  const __m256 h = _mm256_max_ps(Low8(a), High8(a));
  const __m128 q = _mm_max_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  const __m128 d = _mm_max_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_max_ss(d, _mm_shuffle_ps(d, d, 1)));
}

// The sums of four vectors at once, each by ReduceAdd's tree (same bits).
TP_INLINE __m128 ReduceAdd4(F16 a, F16 b, F16 c, F16 d) {
  const __m256 ha = _mm256_add_ps(Low8(a), High8(a)), hb = _mm256_add_ps(Low8(b), High8(b));
  const __m256 hc = _mm256_add_ps(Low8(c), High8(c)), hd = _mm256_add_ps(Low8(d), High8(d));
  const __m256 ab = _mm256_add_ps(_mm256_permute2f128_ps(ha, hb, 0x20), _mm256_permute2f128_ps(ha, hb, 0x31));
  const __m256 cd = _mm256_add_ps(_mm256_permute2f128_ps(hc, hd, 0x20), _mm256_permute2f128_ps(hc, hd, 0x31));
  // Per 128 bits: [x0+x2, x1+x3] of a (or b), then of c (or d).
  const __m256 t = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
  const __m128 lo = _mm256_castps256_ps128(t), hi = _mm256_extractf128_ps(t, 1);  // [a a c c], [b b d d]
  const __m128 s = _mm_add_ps(_mm_shuffle_ps(lo, hi, 0x88), _mm_shuffle_ps(lo, hi, 0xdd));  // [a c b d]
  return _mm_shuffle_ps(s, s, _MM_SHUFFLE(3, 1, 2, 0));
}

// e^x, relative error about 2 ulp; 0 below -87.33, e^88.37 above 88.37, NaN stays NaN. Range reduction and
// polynomial of the Cephes library's expf (S. Moshier, netlib.org/cephes).
TP_INLINE F16 Exp(F16 x) {
  const F16 lowest = Set1(-87.33f);
  const F16 c = Min(Set1(88.37f), Max(lowest, x));
  const F16 n = Round(Mul(c, Set1(1.44269504088896341f)));
  F16 r = Fnma(n, Set1(0.693359375f), c);
  r = Fnma(n, Set1(-2.12194440e-4f), r);
  F16 p = Set1(1.9875691500e-4f);
  p = Fma(p, r, Set1(1.3981999507e-3f));
  p = Fma(p, r, Set1(8.3334519073e-3f));
  p = Fma(p, r, Set1(4.1665795894e-2f));
  p = Fma(p, r, Set1(1.6666665459e-1f));
  p = Fma(p, r, Set1(5.0000001201e-1f));
  p = Add(Fma(p, Mul(r, r), r), Set1(1.0f));
  return ZeroWhereLess(x, lowest, Mul(p, Pow2(n)));
}

// tanh x, relative error about 3 ulp, NaN stays NaN: Cephes' polynomial near zero, where 1 - 2/(e^2x + 1)
// would cancel.
TP_INLINE F16 Tanh(F16 x) {
  const F16 a = Abs(x), z = Mul(x, x), one = Set1(1.0f);
  F16 p = Set1(-5.70498872745e-3f);
  p = Fma(p, z, Set1(2.06390887954e-2f));
  p = Fma(p, z, Set1(-5.37397155531e-2f));
  p = Fma(p, z, Set1(1.33314422036e-1f));
  p = Fma(p, z, Set1(-3.33332819422e-1f));
  const F16 near_zero = Fma(Mul(p, z), x, x);
  const F16 far = Sub(one, Div(Set1(2.0f), Add(Exp(Add(a, a)), one)));
  return SelectLess(a, Set1(0.625f), near_zero, CopySign(far, x));
}

// cap * tanh(x / cap)
TP_INLINE F16 CapLanes(F16 x, F16 cap) { return Mul(cap, Tanh(Div(x, cap))); }

}  // namespace
}  // namespace tidepool
