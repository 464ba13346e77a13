#include "server/engine/probe.h"

namespace tidepool {
namespace {

Counter& Rejected(MetricRegistry& m, const std::string& role, const char* reason) {
  return m.AddCounter("tidepool_engine_rejections_total", "Sequences that the engine refused to take.",
                      {{"role", role}, {"reason", reason}});
}

Counter& Computed(MetricRegistry& m, const std::string& role, const char* kind) {
  return m.AddCounter("tidepool_engine_computed_tokens_total", "Tokens whose KV was computed.",
                      {{"role", role}, {"kind", kind}});
}

Counter& Preempted(MetricRegistry& m, const std::string& role, Preemption how) {
  return m.AddCounter("tidepool_engine_preemptions_total",
                      "Sequences that gave up their KV slots to others, by what is kept for them.",
                      {{"role", role}, {"how", std::string(PreemptionName(how))}});
}

// Microseconds are the rule; what takes longer than a step matters.
std::vector<double> MaskBuckets() {
  return {1e-6, 2e-6, 5e-6, 1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.1, 1};
}

Histogram& Steps(MetricRegistry& m, const std::string& role, const char* kind) {
  return m.AddHistogram("tidepool_engine_step_seconds", "Duration of one step of the continuous batch.",
                        LatencyBuckets(), {{"role", role}, {"kind", kind}});
}

}  // namespace

EngineProbe::EngineProbe(MetricRegistry& m, const std::string& role)
    : running(m.AddGauge("tidepool_requests_running", "Requests in the continuous batch.", {{"role", role}})),
      waiting(m.AddGauge("tidepool_requests_waiting", "Requests that wait, by what they wait for.",
                         {{"role", role}, {"reason", "capacity"}})),
      generated(m.AddCounter("tidepool_generation_tokens_total", "Tokens generated.")),
      prefill_tokens(Computed(m, role, "prefill")),
      decode_tokens(Computed(m, role, "decode")),
      rejected_full(Rejected(m, role, "queue_full")),
      rejected_tenant(Rejected(m, role, "tenant_queue_full")),
      rejected_invalid(Rejected(m, role, "invalid")),
      rejected_draining(Rejected(m, role, "draining")),
      step_failures(m.AddCounter("tidepool_engine_step_failures_total",
                                 "Steps, or one sequence's part of them, that failed to compute.",
                                 {{"role", role}})),
      step_prefill(Steps(m, role, "prefill")),
      step_decode(Steps(m, role, "decode")),
      step_mixed(Steps(m, role, "mixed")),
      mask(m.AddHistogram("tidepool_engine_mask_seconds", "Computing the token mask of a structured answer.",
                          MaskBuckets(), {{"role", role}})),
      mask_wait(m.AddHistogram("tidepool_engine_mask_wait_seconds",
                               "Time that a step waited for token masks after its forward pass.",
                               MaskBuckets(), {{"role", role}})),
      masks_late(m.AddCounter("tidepool_engine_masks_late_total",
                              "Tokens that were drawn a step late because their mask was not there.",
                              {{"role", role}})),
      preempted_swap(Preempted(m, role, Preemption::kSwap)),
      preempted_recompute(Preempted(m, role, Preemption::kRecompute)),
      swapped_blocks(m.AddCounter("tidepool_engine_swapped_blocks_total",
                                  "Sealed blocks that stayed in the pool for a preempted sequence.",
                                  {{"role", role}})),
      swap_copied_bytes(m.AddCounter("tidepool_engine_swap_copied_bytes_total",
                                     "Bytes copied for preempted sequences, out and in.", {{"role", role}})),
      recomputed_tokens(m.AddCounter("tidepool_engine_recomputed_tokens_total",
                                     "Tokens that were to be computed again after a preemption.",
                                     {{"role", role}})),
      preempted_seconds(m.AddHistogram("tidepool_engine_preempted_seconds",
                                       "Time from a preemption to the first step after it.", LatencyBuckets(),
                                       {{"role", role}})),
      preemption_choice(
          m.AddHistogram("tidepool_engine_preemption_choice_seconds",
                         "Time in which the engine chooses how to preempt a sequence and gives its "
                         "blocks up.",
                         MaskBuckets(), {{"role", role}})),
      masks_failed(m.AddCounter("tidepool_engine_mask_failures_total",
                                "Structured answers that ended because their grammar failed or was too slow.",
                                {{"role", role}})) {
  for (size_t i = 0; i < finished_.size(); ++i) {
    const std::string reason(FinishReasonName(static_cast<FinishReason>(i)));
    finished_[i] = &m.AddCounter("tidepool_engine_sequences_total", "Sequences that ended, by how.",
                                 {{"role", role}, {"reason", reason}});
  }
}

}  // namespace tidepool
