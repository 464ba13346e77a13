#include "server/engine/preemption.h"

#include <algorithm>
#include <limits>

namespace tidepool {

std::optional<PreemptionMode> ParsePreemptionMode(std::string_view name) {
  if (name == "auto") return PreemptionMode::kAuto;
  if (name == "swap") return PreemptionMode::kSwap;
  if (name == "recompute") return PreemptionMode::kRecompute;
  if (name == "off") return PreemptionMode::kOff;
  return std::nullopt;
}

PreemptionChoice ChoosePreemption(PreemptionMode mode, const PreemptionCost& cost) {
  const auto recompute = [&](uint32_t tokens) {
    if (tokens == 0) return 0.0;
    return cost.prefill_token_seconds > 0 ? tokens * cost.prefill_token_seconds
                                          : std::numeric_limits<double>::infinity();
  };
  const double copy =
      cost.tail_tokens == 0 ? 0 : 2 * static_cast<double>(cost.tail_bytes) / cost.copy_bytes_per_second;
  const double tail = recompute(cost.tail_tokens);
  const double swap = std::min(copy, tail), all = recompute(cost.sealed_tokens + cost.tail_tokens);
  if (mode == PreemptionMode::kRecompute || (mode != PreemptionMode::kSwap && all <= swap)) {
    return {.how = Preemption::kRecompute, .save_tail = false, .seconds = all};
  }
  const bool save = cost.tail_tokens > 0 && (mode == PreemptionMode::kSwap || copy < tail);
  return {.how = Preemption::kSwap, .save_tail = save, .seconds = save ? copy : tail};
}

}  // namespace tidepool
