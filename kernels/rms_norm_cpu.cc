#include "kernels/rms_norm_cpu.h"

#include "kernels/simd.h"

namespace tidepool {

void RmsNormRowCpu(const float* x, const float* w, int64_t hidden, float eps, float* y) {
  const int64_t whole = hidden / kLanes * kLanes;
  F16 sum = Zero();
  for (int64_t i = 0; i < whole; i += kLanes) {
    const F16 v = Load(x + i);
    sum = Fma(v, v, sum);
  }
  float total = ReduceAdd(sum);
  for (int64_t i = whole; i < hidden; ++i) total += x[i] * x[i];
  const float scale = 1.0f / sqrtf(total / static_cast<float>(hidden) + eps);
  const F16 s = Set1(scale);
  for (int64_t i = 0; i < whole; i += kLanes) Store(y + i, Mul(Mul(Load(x + i), s), Load(w + i)));
  for (int64_t i = whole; i < hidden; ++i) y[i] = x[i] * scale * w[i];
}

}  // namespace tidepool
