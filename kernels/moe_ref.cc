#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "kernels/moe.h"

namespace tidepool {

void MoeRouteRef(const float* logits, int64_t rows, int experts, int top_k, bool renormalise, int32_t* ids,
                 double* weights) {
  for (int64_t r = 0; r < rows; ++r) {
    const float* row = logits + r * experts;
    std::vector<int32_t> order(static_cast<size_t>(experts));
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return row[a] > row[b]; });
    double all = 0, chosen = 0;
    for (int e = 0; e < experts; ++e) all += std::exp(double{row[e]} - row[order[0]]);
    order.resize(static_cast<size_t>(top_k));
    for (const int32_t e : order) chosen += std::exp(double{row[e]} - row[order[0]]);
    const float max = row[order[0]];
    std::sort(order.begin(), order.end());
    for (int s = 0; s < top_k; ++s) {
      const int32_t e = order[static_cast<size_t>(s)];
      ids[r * top_k + s] = e;
      weights[r * top_k + s] = std::exp(double{row[e]} - max) / (renormalise ? chosen : all);
    }
  }
}

}  // namespace tidepool
