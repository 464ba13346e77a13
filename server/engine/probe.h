#pragma once

#include <array>
#include <string>

#include "base/probe.h"
#include "server/engine/preemption.h"
#include "server/engine/types.h"

namespace tidepool {

// EngineProbe: the engine's metrics, all label sets created at 0. Lock-free to write.
class EngineProbe {
 public:
  EngineProbe(MetricRegistry& metrics, const std::string& role);

  void Finished(FinishReason reason) { finished_[static_cast<size_t>(reason)]->Add(); }

  Gauge& running;
  Gauge& waiting;
  Counter& generated;          // tokens given to clients' sinks (not the prefill worker's copy of the first)
  Counter& prefill_tokens;     // computed
  Counter& decode_tokens;      // computed
  Counter& rejected_full;      // Submit refused: max_waiting
  Counter& rejected_tenant;    // Submit refused: max_waiting_per_tenant
  Counter& rejected_invalid;   // Submit refused: the sequence itself
  Counter& rejected_draining;  // Submit refused: draining or stopped
  Counter& step_failures;      // Forward returned an error for a step or for a sequence
  Histogram& step_prefill;     // steps that only prefilled
  Histogram& step_decode;      // steps that only decoded
  Histogram& step_mixed;
  Histogram& mask;          // one mask of a constraint
  Histogram& mask_wait;     // what a step waited for masks after its forward pass
  Counter& masks_late;      // tokens whose mask came after their step: drawn with a later one
  Counter& preempted_swap;  // by what is kept
  Counter& preempted_recompute;
  Counter& swapped_blocks;       // sealed blocks that stayed in the pool for a preempted sequence
  Counter& swap_copied_bytes;    // tails, out and in
  Counter& recomputed_tokens;    // of preempted sequences
  Histogram& preempted_seconds;  // from a preemption to the first step after it
  Histogram& preemption_choice;  // what choosing and giving the blocks up takes the engine
  Counter& masks_failed;         // sequences that ended because their constraint failed, or was too slow

 private:
  std::array<Counter*, kFinishReasons> finished_;
};

}  // namespace tidepool
