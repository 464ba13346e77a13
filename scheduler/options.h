#pragma once

#include <cstddef>
#include <cstdint>

#include "absl/time/time.h"

namespace tidepool {

// What the scheduler's core may be told. The first five come from the configuration (SchedulerConfig).
struct SchedulerOptions {
  absl::Duration slo_ttft;  // zero: none
  absl::Duration slo_itl;   // zero: none
  uint32_t local_prefill_tokens = 32;
  absl::Duration worker_timeout = absl::Seconds(3);
  uint32_t max_inflight = 4096;

  // A booking whose request was neither finished nor lost with its worker: longer than any request may
  // take by default (gateway.request_timeout), so that it only catches a gateway that died.
  absl::Duration booking_expiry = absl::Minutes(15);
  // How long a lost worker stays visible to operators.
  absl::Duration forget_lost_after = absl::Minutes(5);
  // A booking is part of the worker's own report once the report is at least this much younger: the way of
  // a request from the gateway over the decode worker to the prefill worker's queue.
  absl::Duration settle = absl::Milliseconds(50);
  uint32_t max_workers = 4096;
  // (block, worker) pairs in the prefix index, about 120 bytes each.
  size_t max_index_entries = 16u << 20;
  // Answers are guessed to be at most this long when slots and time are planned; max_tokens, which clients
  // leave high, says little.
  uint32_t expected_output_tokens = 256;
  // Tokens that a prefill may take of one engine step (engine.max_step_tokens): a prefill beside decodes
  // needs that many steps.
  uint32_t chunk_tokens = 256;
};

}  // namespace tidepool
