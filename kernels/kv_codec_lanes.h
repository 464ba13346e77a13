// Internal: the body of the kv_codec family, included once by each instruction set's file. The bits are those
// of the reference.
#pragma once

#include "kernels/kv_codec_cpu.h"
#include "kernels/simd.h"

namespace tidepool {
namespace {

constexpr int kFp8 = 0, kInt8 = 1, kInt4 = 2;  // KvQuant
constexpr int kGroup = 32;
constexpr float kTiny = 0x1p-100f, kHuge = 0x1p120f;

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__)

TP_INLINE F16 LoadHalf(const uint16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
TP_INLINE void StoreHalf(uint16_t* p, F16 a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
TP_INLINE void StoreBf16(uint16_t* p, F16 a) {
  const __m512i u = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i r = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(r, 16)));
}
// Rounds to nearest even; |lanes| below 128.
TP_INLINE __m128i ToBytes(F16 a) { return _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a.v)); }
TP_INLINE F16 FromSigned(__m128i b) { return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(b))}; }
// y scaled to |y| <= 448.
TP_INLINE __m128i ToE4m3(F16 y) {
  const __m512i u = _mm512_castps_si512(y.v), a = _mm512_and_si512(u, _mm512_set1_epi32(0x7fffffff));
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(a, 20), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(a, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7ffff)));
  const __m512i normal = _mm512_sub_epi32(_mm512_srli_epi32(rounded, 20), _mm512_set1_epi32(120 << 3));
  // Adding 2^14 leaves multiples of 2^-9, the last step, in the low bits.
  const __m512i shifted =
      _mm512_castps_si512(_mm512_add_ps(_mm512_castsi512_ps(a), _mm512_set1_ps(16384.0f)));
  const __m512i small = _mm512_sub_epi32(shifted, _mm512_castps_si512(_mm512_set1_ps(16384.0f)));
  const __mmask16 is_small = _mm512_cmplt_epi32_mask(a, _mm512_set1_epi32((127 - 6) << 23));
  const __m512i sign = _mm512_and_si512(_mm512_srli_epi32(u, 24), _mm512_set1_epi32(0x80));
  return _mm512_cvtepi32_epi8(_mm512_or_si512(_mm512_mask_blend_epi32(is_small, normal, small), sign));
}
TP_INLINE F16 FromE4m3(__m128i b) {
  const __m512i c = _mm512_cvtepu8_epi32(b), m = _mm512_and_si512(c, _mm512_set1_epi32(0x7f));
  const __m512 normal =
      _mm512_castsi512_ps(_mm512_add_epi32(_mm512_slli_epi32(m, 20), _mm512_set1_epi32(120 << 23)));
  const __m512 small = _mm512_mul_ps(_mm512_cvtepi32_ps(m), _mm512_set1_ps(0x1p-9f));
  const __mmask16 is_small = _mm512_cmplt_epi32_mask(m, _mm512_set1_epi32(8));
  const __m512i sign = _mm512_slli_epi32(_mm512_and_si512(c, _mm512_set1_epi32(0x80)), 24);
  const __m512 a = _mm512_mask_blend_ps(is_small, normal, small);
  return {_mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(a), sign))};
}

#else

TP_INLINE F16 LoadHalf(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
          _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
}
TP_INLINE void StoreHalf(uint16_t* p, F16 a) {
  constexpr int kMode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.lo, kMode));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(a.hi, kMode));
}
TP_INLINE __m256i Bf16Half(__m256 a) {
  const __m256i u = _mm256_castps_si256(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  return _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
}
TP_INLINE void StoreBf16(uint16_t* p, F16 a) {
  const __m256i packed = _mm256_packus_epi32(Bf16Half(a.lo), Bf16Half(a.hi));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
}
// The low bytes of 2 x 8 lanes in [-128, 127].
TP_INLINE __m128i Narrow8(__m256i lo, __m256i hi) {
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(lo, hi), 0xd8);
  return _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}
TP_INLINE __m128i ToBytes(F16 a) { return Narrow8(_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)); }
TP_INLINE F16 FromSigned(__m128i b) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(b)),
          _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(b, 8)))};
}
TP_INLINE __m256i E4m3Half(__m256 y) {
  const __m256i u = _mm256_castps_si256(y), a = _mm256_and_si256(u, _mm256_set1_epi32(0x7fffffff));
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(a, 20), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(a, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7ffff)));
  const __m256i normal = _mm256_sub_epi32(_mm256_srli_epi32(rounded, 20), _mm256_set1_epi32(120 << 3));
  // Adding 2^14 leaves multiples of 2^-9, the last step, in the low bits.
  const __m256i shifted =
      _mm256_castps_si256(_mm256_add_ps(_mm256_castsi256_ps(a), _mm256_set1_ps(16384.0f)));
  const __m256i small = _mm256_sub_epi32(shifted, _mm256_castps_si256(_mm256_set1_ps(16384.0f)));
  const __m256i is_small = _mm256_cmpgt_epi32(_mm256_set1_epi32((127 - 6) << 23), a);
  // As a signed byte, so that Narrow8 does not saturate: the sign is the lane's.
  const __m256i code = _mm256_blendv_epi8(normal, small, is_small);
  const __m256i sign = _mm256_and_si256(_mm256_srai_epi32(u, 31), _mm256_set1_epi32(-128));
  return _mm256_or_si256(code, sign);
}
TP_INLINE __m128i ToE4m3(F16 y) { return Narrow8(E4m3Half(y.lo), E4m3Half(y.hi)); }
TP_INLINE __m256 FromE4m3Half(__m256i c) {
  const __m256i m = _mm256_and_si256(c, _mm256_set1_epi32(0x7f));
  const __m256 normal =
      _mm256_castsi256_ps(_mm256_add_epi32(_mm256_slli_epi32(m, 20), _mm256_set1_epi32(120 << 23)));
  const __m256 small = _mm256_mul_ps(_mm256_cvtepi32_ps(m), _mm256_set1_ps(0x1p-9f));
  const __m256 is_small = _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(8), m));
  const __m256i sign = _mm256_slli_epi32(_mm256_and_si256(c, _mm256_set1_epi32(0x80)), 24);
  return _mm256_or_ps(_mm256_blendv_ps(normal, small, is_small), _mm256_castsi256_ps(sign));
}
TP_INLINE F16 FromE4m3(__m128i b) {
  return {FromE4m3Half(_mm256_cvtepu8_epi32(b)), FromE4m3Half(_mm256_cvtepu8_epi32(_mm_srli_si128(b, 8)))};
}

#endif

TP_INLINE __m128i LoadBytes(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
TP_INLINE void StoreBytes(uint8_t* p, __m128i b) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), b); }

// What a dtype is in memory.
struct OfF32 {
  static constexpr int kBytes = 4;
  __attribute__((always_inline)) static F16 LoadFull(const uint8_t* p) {
    return Load(reinterpret_cast<const float*>(p));
  }
  __attribute__((always_inline)) static void StoreFull(uint8_t* p, F16 a) {
    Store(reinterpret_cast<float*>(p), a);
  }
};
struct OfBf16 {
  static constexpr int kBytes = 2;
  __attribute__((always_inline)) static F16 LoadFull(const uint8_t* p) {
    return LoadBf16(reinterpret_cast<const uint16_t*>(p));
  }
  __attribute__((always_inline)) static void StoreFull(uint8_t* p, F16 a) {
    StoreBf16(reinterpret_cast<uint16_t*>(p), a);
  }
};
struct OfF16 {
  static constexpr int kBytes = 2;
  __attribute__((always_inline)) static F16 LoadFull(const uint8_t* p) {
    return LoadHalf(reinterpret_cast<const uint16_t*>(p));
  }
  __attribute__((always_inline)) static void StoreFull(uint8_t* p, F16 a) {
    StoreHalf(reinterpret_cast<uint16_t*>(p), a);
  }
};

// The first n <= 16 lanes; the others are zero.
template <typename T>
TP_INLINE F16 LoadPart(const uint8_t* p, size_t n) {
  if (n >= kLanes) return T::LoadFull(p);
  alignas(64) uint8_t padded[64] = {};
  __builtin_memcpy(padded, p, n * T::kBytes);
  return T::LoadFull(padded);
}
template <typename T>
TP_INLINE void StorePart(uint8_t* p, size_t n, F16 a) {
  if (n >= kLanes) return T::StoreFull(p, a);
  alignas(64) uint8_t padded[64];
  T::StoreFull(padded, a);
  __builtin_memcpy(p, padded, n * T::kBytes);
}
TP_INLINE __m128i LoadBytesPart(const uint8_t* p, size_t n) {
  if (n >= kLanes) return LoadBytes(p);
  alignas(16) uint8_t padded[16] = {};
  __builtin_memcpy(padded, p, n);
  return LoadBytes(padded);
}
TP_INLINE void StoreBytesPart(uint8_t* p, size_t n, __m128i b) {
  if (n >= kLanes) return StoreBytes(p, b);
  alignas(16) uint8_t padded[16];
  StoreBytes(padded, b);
  __builtin_memcpy(p, padded, n);
}

// The largest magnitude of n numbers, or -1 where one of them cannot be encoded.
template <typename T>
float LargestMagnitude(const uint8_t* src, size_t n) {
  F16 amax = Zero(), bad = Zero();
  for (size_t i = 0; i < n; i += kLanes) {
    const F16 a = Abs(LoadPart<T>(src + i * T::kBytes, n - i));
    amax = Max(amax, a);
    bad = Add(bad, ZeroWhereLess(a, Set1(kHuge), Set1(1.0f)));
  }
  return ReduceAdd(bad) > 0.0f ? -1.0f : ReduceMax(amax);
}

template <typename T>
void QuantizeFlat(int quant, float amax, const uint8_t* src, size_t n, uint8_t* out) {
  const bool tiny = amax < kTiny;
  const float scale = tiny ? 0.0f : quant == kFp8 ? Fp8Scale(amax) : amax / 127.0f;
  const F16 inverse = Set1(tiny ? 0.0f : quant == kFp8 ? 1.0f / scale : 127.0f / amax);
  __builtin_memcpy(out, &scale, sizeof(scale));
  out += sizeof(scale);
  for (size_t i = 0; i < n; i += kLanes) {
    const F16 y = Mul(LoadPart<T>(src + i * T::kBytes, n - i), inverse);
    StoreBytesPart(out + i, n - i, quant == kFp8 ? ToE4m3(y) : ToBytes(y));
  }
}

template <typename T>
void DequantizeFlat(int quant, const uint8_t* in, size_t n, uint8_t* dst) {
  float scale;
  __builtin_memcpy(&scale, in, sizeof(scale));
  in += sizeof(scale);
  const F16 s = Set1(scale);
  for (size_t i = 0; i < n; i += kLanes) {
    const __m128i b = LoadBytesPart(in + i, n - i);
    StorePart<T>(dst + i * T::kBytes, n - i, Mul(quant == kFp8 ? FromE4m3(b) : FromSigned(b), s));
  }
}

TP_INLINE int RowBytes(int dim) { return dim / kGroup * (kGroup / 2) + (dim % kGroup + 1) / 2; }
TP_INLINE int MinOf(int a, int b) { return a < b ? a : b; }

// Lanes [0, low) and [low, w) of a group: halves as they share bytes.
struct Halves {
  int low, high;
};
TP_INLINE Halves HalvesOf(int w) { return {(w + 1) / 2, w / 2}; }

// 15 / (max - min), 0 where the span is tiny.
TP_INLINE F16 InverseOf(F16 min, F16 max) {
  const F16 range = Sub(max, min);
  return SelectLess(range, Set1(kTiny), Zero(), Div(Set1(15.0f), range));
}
TP_INLINE F16 StepOf(F16 min, F16 max) { return Mul(Sub(max, min), Set1(1.0f / 15.0f)); }
TP_INLINE __m128i Codes4(F16 x, F16 min, F16 inverse) { return ToBytes(Mul(Sub(x, min), inverse)); }
TP_INLINE __m128i Join4(__m128i low, __m128i high) { return _mm_or_si128(low, _mm_slli_epi16(high, 4)); }
TP_INLINE F16 Low4(__m128i b) { return FromSigned(_mm_and_si128(b, _mm_set1_epi8(15))); }
TP_INLINE F16 High4(__m128i b) { return FromSigned(_mm_and_si128(_mm_srli_epi16(b, 4), _mm_set1_epi8(15))); }

template <typename T>
void QuantizeInt4K(const KvPlaneView& p, const uint8_t* src, uint8_t* out) {
  const int row_bytes = RowBytes(p.dim);
  const size_t stride = static_cast<size_t>(p.dim) * T::kBytes;
  for (int first = 0; first < p.tokens; first += kGroup) {
    const int count = MinOf(kGroup, p.tokens - first);
    const uint8_t* group = src + static_cast<size_t>(first) * stride;
    uint8_t *min_out = out, *max_out = out + stride, *rows = out + 2 * stride;
    for (int c = 0; c < p.dim; c += kGroup) {
      const Halves h = HalvesOf(MinOf(kGroup, p.dim - c));
      F16 min[2], max[2], inverse[2];
      for (int side = 0; side < 2; ++side) {
        const int at = c + side * h.low, n = side == 0 ? h.low : h.high;
        F16 lo = LoadPart<T>(group + at * T::kBytes, n), hi = lo;
        for (int t = 1; t < count; ++t) {
          const F16 x = LoadPart<T>(group + t * stride + at * T::kBytes, n);
          lo = Min(x, lo);
          hi = Max(x, hi);
        }
        StorePart<T>(min_out + at * T::kBytes, n, lo);
        StorePart<T>(max_out + at * T::kBytes, n, hi);
        min[side] = lo;
        max[side] = hi;
        inverse[side] = InverseOf(lo, hi);
      }
      for (int t = 0; t < count; ++t) {
        const uint8_t* x = group + t * stride + c * T::kBytes;
        const __m128i low = Codes4(LoadPart<T>(x, h.low), min[0], inverse[0]);
        const __m128i high = Codes4(LoadPart<T>(x + h.low * T::kBytes, h.high), min[1], inverse[1]);
        StoreBytesPart(rows + t * row_bytes + c / 2, h.low, Join4(low, high));
      }
    }
    out = rows + count * row_bytes;
  }
}

template <typename T>
void DequantizeInt4K(const KvPlaneView& p, const uint8_t* in, uint8_t* dst) {
  const int row_bytes = RowBytes(p.dim);
  const size_t stride = static_cast<size_t>(p.dim) * T::kBytes;
  for (int first = 0; first < p.tokens; first += kGroup) {
    const int count = MinOf(kGroup, p.tokens - first);
    uint8_t* group = dst + static_cast<size_t>(first) * stride;
    const uint8_t *min_in = in, *max_in = in + stride, *rows = in + 2 * stride;
    for (int c = 0; c < p.dim; c += kGroup) {
      const Halves h = HalvesOf(MinOf(kGroup, p.dim - c));
      const int at = c + h.low;
      const F16 min0 = LoadPart<T>(min_in + c * T::kBytes, h.low);
      const F16 min1 = LoadPart<T>(min_in + at * T::kBytes, h.high);
      const F16 step0 = StepOf(min0, LoadPart<T>(max_in + c * T::kBytes, h.low));
      const F16 step1 = StepOf(min1, LoadPart<T>(max_in + at * T::kBytes, h.high));
      for (int t = 0; t < count; ++t) {
        const __m128i b = LoadBytesPart(rows + t * row_bytes + c / 2, h.low);
        StorePart<T>(group + t * stride + c * T::kBytes, h.low, Fma(Low4(b), step0, min0));
        StorePart<T>(group + t * stride + at * T::kBytes, h.high, Fma(High4(b), step1, min1));
      }
    }
    in = rows + count * row_bytes;
  }
}

TP_INLINE float ReduceMin(F16 a) { return -ReduceMax(Sub(Zero(), a)); }

template <typename T>
void QuantizeInt4V(const KvPlaneView& p, const uint8_t* src, uint8_t* out) {
  const int groups = (p.dim + kGroup - 1) / kGroup, row_bytes = RowBytes(p.dim);
  for (int t = 0; t < p.tokens; ++t) {
    uint8_t *min_out = out, *max_out = out + groups * T::kBytes, *row = out + 2 * groups * T::kBytes;
    for (int g = 0; g < groups; ++g) {
      const uint8_t* x = src + (static_cast<size_t>(t) * p.dim + g * kGroup) * T::kBytes;
      const Halves h = HalvesOf(MinOf(kGroup, p.dim - g * kGroup));
      const F16 low = LoadPart<T>(x, h.low);
      const F16 high = h.high > 0 ? LoadPart<T>(x + h.low * T::kBytes, h.high) : low;
      float lo, hi;
      if (h.high == kLanes) {
        lo = ReduceMin(Min(low, high));
        hi = ReduceMax(Max(low, high));
      } else {  // the padding's zeros do not count
        alignas(64) float lanes[2 * kLanes];
        Store(lanes, low);
        Store(lanes + kLanes, high);
        lo = hi = lanes[0];
        for (int j = 0; j < h.low; ++j)
          lo = lanes[j] < lo ? lanes[j] : lo, hi = lanes[j] > hi ? lanes[j] : hi;
        for (int j = kLanes; j < kLanes + h.high; ++j)
          lo = lanes[j] < lo ? lanes[j] : lo, hi = lanes[j] > hi ? lanes[j] : hi;
      }
      lo += 0.0f;  // -0 becomes 0: which of the two comes out depends on the order of comparisons
      hi += 0.0f;
      StorePart<T>(min_out + g * T::kBytes, 1, Set1(lo));
      StorePart<T>(max_out + g * T::kBytes, 1, Set1(hi));
      const F16 min = Set1(lo), inverse = InverseOf(min, Set1(hi));
      __m128i high_codes = Codes4(high, min, inverse);
      if (h.high < kLanes) {  // of the padding no code
        alignas(16) uint8_t codes[kLanes] = {};
        StoreBytesPart(codes, h.high, high_codes);
        high_codes = LoadBytes(codes);
      }
      StoreBytesPart(row + g * (kGroup / 2), h.low, Join4(Codes4(low, min, inverse), high_codes));
    }
    out = row + row_bytes;
  }
}

template <typename T>
void DequantizeInt4V(const KvPlaneView& p, const uint8_t* in, uint8_t* dst) {
  const int groups = (p.dim + kGroup - 1) / kGroup, row_bytes = RowBytes(p.dim);
  for (int t = 0; t < p.tokens; ++t) {
    const uint8_t *min_in = in, *max_in = in + groups * T::kBytes, *row = in + 2 * groups * T::kBytes;
    for (int g = 0; g < groups; ++g) {
      alignas(64) float ends[2 * kLanes];
      Store(ends, LoadPart<T>(min_in + g * T::kBytes, 1));
      Store(ends + kLanes, LoadPart<T>(max_in + g * T::kBytes, 1));
      const F16 min = Set1(ends[0]), step = StepOf(min, Set1(ends[kLanes]));
      const Halves h = HalvesOf(MinOf(kGroup, p.dim - g * kGroup));
      const __m128i b = LoadBytesPart(row + g * (kGroup / 2), h.low);
      uint8_t* x = dst + (static_cast<size_t>(t) * p.dim + g * kGroup) * T::kBytes;
      StorePart<T>(x, h.low, Fma(Low4(b), step, min));
      StorePart<T>(x + h.low * T::kBytes, h.high, Fma(High4(b), step, min));
    }
    in = row + row_bytes;
  }
}

template <typename T>
bool QuantizeOf(int quant, const KvPlaneView& p, const uint8_t* src, uint8_t* out) {
  const size_t n = static_cast<size_t>(p.tokens) * static_cast<size_t>(p.dim);
  const float amax = LargestMagnitude<T>(src, n);
  if (amax < 0.0f) return false;
  if (quant != kInt4) {
    QuantizeFlat<T>(quant, amax, src, n, out);
  } else if (p.v) {
    QuantizeInt4V<T>(p, src, out);
  } else {
    QuantizeInt4K<T>(p, src, out);
  }
  return true;
}

template <typename T>
void DequantizeOf(int quant, const KvPlaneView& p, const uint8_t* in, uint8_t* dst) {
  if (quant != kInt4) {
    DequantizeFlat<T>(quant, in, static_cast<size_t>(p.tokens) * static_cast<size_t>(p.dim), dst);
  } else if (p.v) {
    DequantizeInt4V<T>(p, in, dst);
  } else {
    DequantizeInt4K<T>(p, in, dst);
  }
}

template <typename T>
void WidenOf(const uint8_t* src, size_t n, float* out) {
  for (size_t i = 0; i < n; i += kLanes) {
    StorePart<OfF32>(reinterpret_cast<uint8_t*>(out + i), n - i, LoadPart<T>(src + i * T::kBytes, n - i));
  }
}
template <typename T>
void NarrowOf(const float* in, size_t n, uint8_t* dst) {
  for (size_t i = 0; i < n; i += kLanes) {
    StorePart<T>(dst + i * T::kBytes, n - i,
                 LoadPart<OfF32>(reinterpret_cast<const uint8_t*>(in + i), n - i));
  }
}

bool QuantizeAny(int quant, const KvPlaneView& p, const uint8_t* src, uint8_t* out) {
  if (p.dtype == kKvBf16) return QuantizeOf<OfBf16>(quant, p, src, out);
  if (p.dtype == kKvF16) return QuantizeOf<OfF16>(quant, p, src, out);
  return QuantizeOf<OfF32>(quant, p, src, out);
}
void DequantizeAny(int quant, const KvPlaneView& p, const uint8_t* in, uint8_t* dst) {
  if (p.dtype == kKvBf16) return DequantizeOf<OfBf16>(quant, p, in, dst);
  if (p.dtype == kKvF16) return DequantizeOf<OfF16>(quant, p, in, dst);
  DequantizeOf<OfF32>(quant, p, in, dst);
}
void WidenAny(int dtype, const uint8_t* src, size_t n, float* out) {
  if (dtype == kKvBf16) return WidenOf<OfBf16>(src, n, out);
  if (dtype == kKvF16) return WidenOf<OfF16>(src, n, out);
  WidenOf<OfF32>(src, n, out);
}
void NarrowAny(int dtype, const float* in, size_t n, uint8_t* dst) {
  if (dtype == kKvBf16) return NarrowOf<OfBf16>(in, n, dst);
  if (dtype == kKvF16) return NarrowOf<OfF16>(in, n, dst);
  NarrowOf<OfF32>(in, n, dst);
}

}  // namespace
}  // namespace tidepool
