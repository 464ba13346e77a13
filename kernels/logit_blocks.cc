#include "kernels/logit_blocks.h"

#include <string.h>

#include "kernels/simd.h"

namespace tidepool {
namespace {

// The row's last logits in a full vector, padded with what neither wins a maximum nor adds to a sum.
TP_INLINE F16 LoadRest(const float* x, int64_t count) {
  float rest[kLanes];
  for (float& r : rest) r = -INFINITY;
  memcpy(rest, x, static_cast<size_t>(count) * sizeof(float));
  return Load(rest);
}

}  // namespace

bool BlockMaxima(const float* logits, int64_t n, float* maxima) {
  const F16 infinity = Set1(INFINITY), one = Set1(1.0f);
  F16 bad = Zero();
  for (int64_t begin = 0, b = 0; begin < n; begin += kLogitBlock, ++b) {
    const int64_t end = begin + kLogitBlock < n ? begin + kLogitBlock : n;
    F16 max = Set1(-INFINITY);
    for (int64_t i = begin; i < end; i += kLanes) {
      const F16 x = i + kLanes <= end ? Load(logits + i) : LoadRest(logits + i, end - i);
      max = Max(x, max);
      bad = Max(bad, ZeroWhereLess(x, infinity, one));  // NaN is less than nothing
    }
    maxima[b] = ReduceMax(max);
  }
  return ReduceMax(bad) == 0.0f;
}

double ExpBlocks(const float* logits, int64_t n, float max, float scale, float* weights, float* sums) {
  const F16 m = Set1(max), s = Set1(scale);
  double total = 0;
  for (int64_t begin = 0, b = 0; begin < n; begin += kLogitBlock, ++b) {
    const int64_t end = begin + kLogitBlock < n ? begin + kLogitBlock : n;
    F16 sum = Zero();
    for (int64_t i = begin; i < end; i += kLanes) {
      const bool whole = i + kLanes <= end;
      const F16 x = whole ? Load(logits + i) : LoadRest(logits + i, end - i);
      const F16 w = Exp(Mul(Sub(x, m), s));
      sum = Add(sum, w);
      if (whole) {
        Store(weights + i, w);
      } else {
        float rest[kLanes];
        Store(rest, w);
        memcpy(weights + i, rest, static_cast<size_t>(end - i) * sizeof(float));
      }
    }
    sums[b] = ReduceAdd(sum);
    total += static_cast<double>(sums[b]);
  }
  return total;
}

}  // namespace tidepool
