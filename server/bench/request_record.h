#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/time/time.h"

namespace tidepool {

// What one request of a load came to. Plain. Times are from the run's start.
struct RequestRecord {
  uint64_t index = 0;    // in the order of planning
  uint64_t session = 0;  // of a conversation
  uint32_t turn = 0;

  // When it was to go out. Latencies count from here, so that a client (or a cap) that holds it back does not
  // make the server look better.
  absl::Duration planned;
  // When the load generator was free to send it: planned, or later where the concurrency cap had it wait.
  absl::Duration released;
  absl::Duration dispatched;         // when it was handed to the HTTP client
  absl::Duration sent;               // when its first byte went out; includes connecting
  absl::Duration first;              // the first token's event
  absl::Duration last;               // the last token's event
  absl::Duration end;                // of the answer
  std::vector<double> gaps_seconds;  // between events with tokens, after the first

  int http_status = 0;  // 0: no answer
  std::string error;    // "": complete and successful
  std::string finish_reason;
  bool got_token = false;
  uint32_t input_tokens = 0;   // as the server counted, else as planned
  uint32_t output_tokens = 0;  // as the server counted, else the events with tokens
  std::optional<uint32_t> cached_tokens;
  bool usage_from_server = false;
  std::string text;  // kept on request

  // Tidepool's own trace, where the server gave it.
  struct Path {
    std::string prefill_worker, decode_worker;
    double queue_seconds = 0, prefill_seconds = 0, transfer_seconds = 0;
    uint64_t fetched_bytes = 0;
  };
  std::optional<Path> path;

  bool ok() const { return error.empty(); }
  // The server refused it for load: 429 or 503.
  bool rejected() const { return !ok() && (http_status == 429 || http_status == 503); }
  double TtftSeconds() const { return absl::ToDoubleSeconds(first - planned); }
  double LatencySeconds() const { return absl::ToDoubleSeconds(end - planned); }
  // Per output token after the first: (E2E - TTFT) / (tokens - 1), 0 of a single token (vLLM's definition).
  // Both ends count from the same start, so the plan cancels out.
  double TpotSeconds() const {
    return output_tokens > 1 ? absl::ToDoubleSeconds(last - first) / (output_tokens - 1) : 0;
  }
};

}  // namespace tidepool
