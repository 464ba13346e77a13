#include "kernels/moe.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

#include "base/status.h"

namespace tidepool {
namespace {

struct Choice {
  float weight = 0;
  int32_t id = 0;
};

void RouteRow(const float* logits, int experts, int top_k, bool renormalise, int32_t* ids, float* weights) {
  float max = logits[0];
  for (int e = 1; e < experts; ++e) max = std::max(max, logits[e]);
  double sum = 0;
  // The best so far, falling. Exponentials are compared, as the probabilities are in the reference: the
  // common divisor changes no order.
  std::array<Choice, kMoeTopKMax> best;
  int held = 0;
  for (int e = 0; e < experts; ++e) {
    const float p = std::exp(logits[e] - max);
    sum += p;
    if (held == top_k && !(p > best[static_cast<size_t>(held - 1)].weight)) continue;
    if (held < top_k) ++held;
    size_t at = static_cast<size_t>(held - 1);
    for (; at > 0 && p > best[at - 1].weight; --at) best[at] = best[at - 1];
    best[at] = {p, e};
  }
  const auto chosen = best.begin() + top_k;
  if (renormalise) {
    sum = 0;
    for (auto c = best.begin(); c != chosen; ++c) sum += c->weight;
  }
  std::sort(best.begin(), chosen, [](const Choice& a, const Choice& b) { return a.id < b.id; });
  for (int s = 0; s < top_k; ++s) {
    ids[s] = best[static_cast<size_t>(s)].id;
    weights[s] = static_cast<float>(best[static_cast<size_t>(s)].weight / sum);
  }
}

}  // namespace

void MoeRoute(const float* logits, int64_t rows, int experts, int top_k, bool renormalise, int32_t* ids,
              float* weights, ThreadPool& pool) {
  TP_CHECK(rows >= 0 && top_k >= 1 && top_k <= experts && top_k <= kMoeTopKMax);
  pool.ParallelFor(rows, 1024 / experts + 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r) {
      RouteRow(logits + r * experts, experts, top_k, renormalise, ids + r * top_k, weights + r * top_k);
    }
  });
}

void MoeGroup(const int32_t* ids, int64_t rows, int top_k, int experts, int32_t* offsets, int32_t* place) {
  const int64_t n = rows * top_k;
  std::fill(offsets, offsets + experts + 1, 0);
  for (int64_t i = 0; i < n; ++i) ++offsets[ids[i] + 1];
  for (int e = 0; e < experts; ++e) offsets[e + 1] += offsets[e];
  // offsets[e] walks through e's places, and so ends where e + 1 begins: moved back by one expert below.
  for (int64_t i = 0; i < n; ++i) place[i] = offsets[ids[i]]++;
  for (int e = experts; e > 0; --e) offsets[e] = offsets[e - 1];
  offsets[0] = 0;
}

void MoeGather(const float* x, const int32_t* place, int64_t rows, int top_k, int64_t hidden, float* y,
               ThreadPool& pool) {
  pool.ParallelFor(rows * top_k, 16384 / (hidden + 1) + 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      std::memcpy(y + place[i] * hidden, x + i / top_k * hidden, static_cast<size_t>(hidden) * sizeof(float));
    }
  });
}

void MoeCombine(const float* x, const float* weights, const int32_t* place, int64_t rows, int top_k,
                int64_t hidden, float* y, ThreadPool& pool) {
  pool.ParallelFor(rows, 16384 / (hidden * top_k + 1) + 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r) {
      float* __restrict out = y + r * hidden;
      std::fill(out, out + hidden, 0.0f);
      for (int64_t i = r * top_k; i < (r + 1) * top_k; ++i) {
        const float* __restrict in = x + place[i] * hidden;
        const float w = weights[i];
        for (int64_t d = 0; d < hidden; ++d) out[d] += w * in[d];
      }
    }
  });
}

}  // namespace tidepool
