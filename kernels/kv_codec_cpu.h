// Internal to kernels/kv_codec*.cc. Files compiled for other instruction sets include it, so it holds plain
// data and code of internal linkage only (simd.h says why).
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>

namespace tidepool {

inline constexpr int kKvF32 = 1, kKvBf16 = 2, kKvF16 = 3;  // as DType

struct KvPlaneView {
  int dtype;
  int tokens;
  int dim;
  bool v;
};

// One instruction set's version of the family; `quant` is a KvQuant.
struct KvCodecOps {
  bool (*quantize)(int quant, const KvPlaneView& plane, const uint8_t* src, uint8_t* out);
  void (*dequantize)(int quant, const KvPlaneView& plane, const uint8_t* in, uint8_t* dst);
  void (*widen)(int dtype, const uint8_t* src, size_t n, float* out);
  void (*narrow)(int dtype, const float* in, size_t n, uint8_t* dst);
};
extern const KvCodecOps kKvCodecAvx2;
extern const KvCodecOps kKvCodecAvx512;

namespace {

// The smallest power of two that brings amax within e4m3's 448 = 1.75 * 2^8.
[[maybe_unused]] inline float Fp8Scale(float amax) {
  int exponent;
  const float mantissa = frexpf(amax, &exponent);  // [0.5, 1) * 2^exponent
  return ldexpf(1.0f, exponent - (mantissa > 0.875f ? 8 : 9));
}

}  // namespace
}  // namespace tidepool
