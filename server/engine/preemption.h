#pragma once

#include <cstdint>
#include <optional>
#include <string_view>

namespace tidepool {

// What a preempted sequence keeps. A label value.
enum class Preemption : uint8_t {
  kSwap,       // its published blocks stay in the pool for it as long as anything else can go
  kRecompute,  // nothing: what others evict meanwhile is computed again
};
constexpr std::string_view PreemptionName(Preemption how) {
  return how == Preemption::kSwap ? "swap" : "recompute";
}

// EngineConfig::preemption.
enum class PreemptionMode : uint8_t { kAuto, kSwap, kRecompute, kOff };
std::optional<PreemptionMode> ParsePreemptionMode(std::string_view name);

// What is known when a sequence is preempted. Its sealed blocks are in the pool already, under their keys: a
// swap moves only what no sealed block holds (FastSwitch's delta).
struct PreemptionCost {
  uint32_t sealed_tokens = 0;        // KV in published blocks
  uint32_t tail_tokens = 0;          // KV behind them
  uint64_t tail_bytes = 0;           // that saving those would copy, once out and once in
  double copy_bytes_per_second = 0;  // > 0
  double prefill_token_seconds = 0;  // of computing a token again; 0: not known, and taken for dear
};

struct PreemptionChoice {
  Preemption how = Preemption::kRecompute;
  bool save_tail = false;
  double seconds = 0;  // that it is expected to cost the processor, going and coming
};

// With c = 2 tail_bytes / copy speed and r(n) = n * prefill_token_seconds, a swap costs min(c, r(tail)) and
// recomputing r(sealed + tail), where everything that is not kept is gone by then. kAuto takes the cheaper,
// recomputing where they are equal; the tail is saved where c < r(tail). kSwap saves the tail always.
PreemptionChoice ChoosePreemption(PreemptionMode mode, const PreemptionCost& cost);

}  // namespace tidepool
