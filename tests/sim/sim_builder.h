#pragma once

#include <string>

#include "base/rng.h"
#include "tools/simulate/simulation.h"

namespace tidepool {

// A small worker without jitter: 1 ms of overhead, 0.1 ms a token, so that times can be reckoned by hand.
inline WorkerProfile TestProfile() {
  WorkerProfile p;
  p.name = "test";
  p.layout = {.layers = 2, .kv_heads = 1, .head_dim = 8, .block_tokens = 32, .dtype = DType::kBF16};
  p.max_model_len = 100'000;
  p.pool_blocks = 500;
  p.max_batch = 8;
  p.max_step_tokens = 256;
  p.max_waiting = 64;
  p.overhead_seconds = 1e-3;
  p.weights_seconds = 4e-3;
  p.token_seconds = 1e-4;
  p.sequence_seconds = 1e-4;
  p.pair_seconds = 1e-9;
  p.context_seconds = 1e-7;
  p.link_bytes_per_second = 1e9;
  p.link_latency_seconds = 1e-4;
  p.control_seconds = 5e-4;
  p.slo_ttft_seconds = 2;
  p.slo_itl_seconds = 0.05;
  return p;
}

inline SimOptions TestOptions(uint32_t prefill, uint32_t decode, uint32_t both) {
  SimOptions o;
  o.prefill = prefill;
  o.decode = decode;
  o.both = both;
  o.scheduler.slo_ttft = absl::Seconds(2);
  o.scheduler.slo_itl = absl::Milliseconds(50);
  o.scheduler.admission = AdmissionPolicy::kNone;
  o.max_tokens = 64;
  return o;
}

inline SyntheticOptions TestMix(double rate, uint64_t requests) {
  SyntheticOptions mix;
  mix.rate = rate;
  mix.requests = requests;
  mix.input = *LengthSpec::Parse("64-512");
  mix.output = *LengthSpec::Parse("1-64");
  mix.turns = *LengthSpec::Parse("1-4");
  mix.system = *LengthSpec::Parse("128");
  mix.think_seconds = 2;
  mix.answer_seconds = 0.5;
  mix.prompt_max = 4000;
  mix.stretch_tokens = 32;
  return mix;
}

}  // namespace tidepool
