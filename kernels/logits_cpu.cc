#include "kernels/logits_cpu.h"

#include <string.h>

#include "kernels/simd.h"

namespace tidepool {
namespace {

// Lanes of float32 are summed into double after this many vectors: the error stays that of a short sum.
constexpr int64_t kRun = 64;

}  // namespace

float MaxCpu(const float* x, int64_t n) {
  const int64_t whole = n / kLanes * kLanes;
  F16 m = Set1(-INFINITY);
  for (int64_t i = 0; i < whole; i += kLanes) m = Max(Load(x + i), m);  // m where x is NaN
  float max = ReduceMax(m);
  for (int64_t i = whole; i < n; ++i) max = x[i] > max ? x[i] : max;
  return max;
}

double SumExpCpu(const float* x, int64_t n, float max) {
  const F16 m = Set1(max);
  const int64_t whole = n / kLanes * kLanes;
  double total = 0;
  for (int64_t i = 0; i < whole;) {
    const int64_t end = i + kRun * kLanes < whole ? i + kRun * kLanes : whole;
    F16 sum = Zero();
    for (; i < end; i += kLanes) sum = Add(sum, Exp(Sub(Load(x + i), m)));
    total += static_cast<double>(ReduceAdd(sum));
  }
  if (whole < n) {
    float rest[kLanes];
    for (float& r : rest) r = -INFINITY;
    memcpy(rest, x + whole, static_cast<size_t>(n - whole) * sizeof(float));
    total += static_cast<double>(ReduceAdd(Exp(Sub(Load(rest), m))));
  }
  return total;
}

}  // namespace tidepool
