#pragma once

#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "server/bench/request_record.h"
#include "server/bench/slo.h"

namespace tidepool {

// How well the load generator itself kept up; a saturated one measures itself.
struct GeneratorHealth {
  double cpu_seconds = 0;      // of this process, during the run
  double loop_lag_ms_max = 0;  // how late the HTTP client's threads came to a timer
  double loop_lag_ms_mean = 0;
};

struct Distribution {
  double mean = 0, median = 0, std = 0;
  std::vector<double> percentiles;  // in the order of the spec
};

// Summary: the figures of one run, with vllm bench serve's definitions. Times in ms; rates a second of
// `duration`, which runs from the start to the end of the last answer.
struct Summary {
  double duration_seconds = 0;
  size_t completed = 0, failed = 0, rejected = 0;  // rejected are among the failed
  size_t good = 0;
  uint64_t input_tokens = 0, output_tokens = 0, cached_tokens = 0;  // of the completed
  bool all_usage_from_server = true, cached_known = false;
  double request_throughput = 0, request_goodput = 0, output_throughput = 0, total_token_throughput = 0;
  double output_tokens_per_second_max = 0;  // in the best whole second
  size_t concurrent_requests_max = 0;
  Distribution ttft, tpot, itl, e2el;
  Distribution cap_wait;         // released - planned, of all requests
  Distribution generator_delay;  // dispatched - released, of all requests
  GeneratorHealth health;

  // From Tidepool's trace; shares are of the requests that carried one.
  struct Paths {
    size_t traced = 0;
    size_t disaggregated = 0;  // prefilled by another worker than decoded it
    double prefill_seconds = 0, transfer_seconds = 0, queue_seconds = 0, decode_seconds = 0;
    uint64_t fetched_bytes = 0;
  } paths;
};

// percents: which percentiles the Distributions hold.
Summary Summarize(std::span<const RequestRecord> records, const Slo& slo, const std::vector<double>& percents,
                  const GeneratorHealth& health);

// vLLM's keys first, ours after them; `details` adds the lists a request (input_lens, ttfts, itls, ...).
nlohmann::ordered_json SummaryJson(const Summary& summary, const Slo& slo,
                                   const std::vector<double>& percents);
void AddDetails(std::span<const RequestRecord> records, bool texts, nlohmann::ordered_json& json);
// The table that `vllm bench serve` prints, with our lines among its own.
std::string SummaryTable(const Summary& summary, const Slo& slo, const std::vector<double>& percents);
// One object a request, for the JSONL file.
nlohmann::ordered_json RecordJson(const RequestRecord& record, const Slo& slo);

// Why the figures should not be trusted as the server's; empty: they may.
std::vector<std::string> Warnings(const Summary& summary);

}  // namespace tidepool
