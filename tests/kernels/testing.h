// Shared by the kernel tests: reproducible random tensors and comparisons.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "base/dtype.h"
#include "base/rng.h"

namespace tidepool {

// Uniform in [-scale, scale).
inline std::vector<float> RandomFloats(int64_t count, uint64_t seed, float scale = 1.0f) {
  Rng rng(seed);
  std::vector<float> out(static_cast<size_t>(count));
  for (float& v : out) v = static_cast<float>(rng.Uniform() * 2 - 1) * scale;
  return out;
}

inline std::vector<BF16> ToBF16s(const std::vector<float>& in) {
  std::vector<BF16> out;
  for (const float v : in) out.push_back(ToBF16(v));
  return out;
}

inline std::vector<float> ToFloats(const std::vector<BF16>& in) {
  std::vector<float> out;
  for (const BF16 v : in) out.push_back(ToFloat(v));
  return out;
}

inline bool SameBits(const float* a, const float* b, int64_t n) {
  return std::memcmp(a, b, static_cast<size_t>(n) * sizeof(float)) == 0;
}

// |got - want| <= absolute + relative * |want|, element by element.
inline void ExpectNear(const std::vector<float>& got, const std::vector<double>& want, double absolute,
                       double relative) {
  ASSERT_EQ(got.size(), want.size());
  for (size_t i = 0; i < got.size(); ++i) {
    ASSERT_NEAR(got[i], want[i], absolute + relative * std::abs(want[i])) << "element " << i;
  }
}

}  // namespace tidepool
