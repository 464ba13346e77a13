#include "kernels/logits.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <string>

#include "kernels/logits_cpu.h"

namespace tidepool {
namespace {

// Higher logit first, then lower id.
bool Before(const TokenLogprob& a, const TokenLogprob& b) {
  return a.logprob != b.logprob ? a.logprob > b.logprob : a.id < b.id;
}

}  // namespace

int32_t Argmax(const float* logits, int64_t n) {
  const float max = MaxCpu(logits, n);
  for (int64_t i = 0; i < n; ++i) {
    if (logits[i] == max) return static_cast<int32_t>(i);
  }
  return -1;
}

float LogSumExp(const float* logits, int64_t n) {
  const float max = MaxCpu(logits, n);
  if (max == std::numeric_limits<float>::infinity()) return max;
  if (max == -std::numeric_limits<float>::infinity()) {
    // Nothing but -inf and NaN: the sum would be exp(-inf + inf).
    for (int64_t i = 0; i < n; ++i) {
      if (std::isnan(logits[i])) return std::numeric_limits<float>::quiet_NaN();
    }
    return max;
  }
  return static_cast<float>(double{max} + std::log(SumExpCpu(logits, n, max)));
}

absl::Status Logprobs(const float* logits, int64_t n, std::span<const int32_t> ids, std::span<float> chosen,
                      std::span<TokenLogprob> top) {
  if (chosen.size() != ids.size()) {
    return absl::InvalidArgumentError("logprobs: " + std::to_string(ids.size()) + " ids but room for " +
                                      std::to_string(chosen.size()));
  }
  if (top.size() > kTopLogprobsMax || static_cast<int64_t>(top.size()) > n) {
    return absl::InvalidArgumentError("top_logprobs is " + std::to_string(top.size()) +
                                      "; it may be at most " +
                                      std::to_string(std::min<int64_t>(kTopLogprobsMax, n)));
  }
  for (const int32_t id : ids) {
    if (id < 0 || id >= n) {
      return absl::InvalidArgumentError("logprobs: token id " + std::to_string(id) + " is outside [0, " +
                                        std::to_string(n) + ")");
    }
  }
  const float lse = LogSumExp(logits, n);
  if (std::isnan(lse))
    return absl::InvalidArgumentError("logprobs: a logit is NaN; the weights may be damaged");

  // A sorted list of at most kTopLogprobsMax: almost every logit fails the first comparison.
  std::array<TokenLogprob, kTopLogprobsMax> best;
  size_t held = 0;
  if (!top.empty()) {
    for (int64_t i = 0; i < n; ++i) {
      if (held == top.size() && logits[i] <= best[held - 1].logprob) continue;
      const TokenLogprob entry{static_cast<int32_t>(i), logits[i]};
      if (held < top.size()) ++held;
      size_t at = held - 1;
      for (; at > 0 && Before(entry, best[at - 1]); --at) best[at] = best[at - 1];
      best[at] = entry;
    }
  }
  for (size_t i = 0; i < held; ++i) top[i] = {best[i].id, best[i].logprob - lse};
  for (size_t i = 0; i < ids.size(); ++i) chosen[i] = logits[ids[i]] - lse;
  return absl::OkStatus();
}

}  // namespace tidepool
