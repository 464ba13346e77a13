#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "nlohmann/json.hpp"
#include "scheduler/types.h"
#include "tools/simulate/weighted_histogram.h"
#include "tools/simulate/workload.h"

namespace tidepool {

struct Distribution {
  double mean = 0, p50 = 0, p90 = 0, p99 = 0;
};
Distribution Describe(std::vector<float> values);
Distribution Describe(const WeightedHistogram& values);

// What became of some of the requests. Each ends exactly once: requests == completed + rejected + failed.
struct GroupResult {
  uint64_t requests = 0, completed = 0, rejected = 0, failed = 0;
  uint64_t good = 0;                              // completed within both objectives
  uint64_t prompt_tokens = 0, output_tokens = 0;  // of the completed ones
  std::vector<float> ttft;                        // seconds, of the completed ones
  WeightedHistogram itl;                          // of a request's mean gap, weighted by its tokens
};

struct LoadSample {
  float at = 0;            // seconds
  float prefill_load = 0;  // seconds of queued prompts per prefill worker, over the TTFT objective
  float decode_load = 0;   // mean decode step over the ITL objective
  uint32_t decoding = 0, queued = 0;
};

struct SimResult {
  // What was simulated.
  std::string workload;
  uint32_t prefill = 0, decode = 0, both = 0;
  double slo_ttft_seconds = 0, slo_itl_seconds = 0;
  uint64_t seed = 0;
  std::map<std::string, std::string> settings;  // what a sweep varied

  GroupResult all;
  std::map<std::string, GroupResult> tenants;
  std::array<GroupResult, kSloClasses> classes;
  WeightedHistogram gaps;                      // before every token but first ones
  std::map<std::string, uint64_t> rejections;  // by kind
  // Prompt tokens of the prefills that ran, and of them: not computed.
  uint64_t prefilled_tokens = 0, cached_tokens = 0, fetched_tokens = 0;
  double prefill_seconds = 0;  // of compute
  // As the pools of who prefilled counted: sealed blocks asked for, and found there.
  uint64_t blocks_asked = 0, blocks_found = 0;
  // Decodes that were refused after their prefill had been computed.
  uint64_t prefills_wasted = 0;
  // Workers that changed between prefill and decode, and how many of each there are at the end.
  uint64_t role_changes = 0;
  uint32_t prefill_at_end = 0, decode_at_end = 0;
  uint64_t retries = 0, crashes = 0, scheduler_restarts = 0, reports_lost = 0;
  uint64_t bytes_fetched = 0, bytes_handed_over = 0, bytes_replicated = 0;
  std::vector<float> ttft_error, itl_error;  // |predicted - actual| / actual
  std::vector<float> ttft_bias;              // (predicted - actual) / actual
  std::vector<LoadSample> load;
  // What each tenant was given in each second: prompt tokens computed, and twice the answer's, as VTC counts.
  std::vector<std::vector<float>> service;

  double arrival_seconds = 0;    // from the first arrival to the last
  double simulated_seconds = 0;  // to the last end
  double wall_seconds = 0;
  uint64_t decisions = 0, reports = 0, events = 0;
  double place_seconds = 0;   // of wall time in Place
  uint32_t slots_leaked = 0;  // leased at the end
  uint64_t bookings_left = 0;

  // Good requests a second of arrivals: what the cluster was asked for in that time and did well.
  double goodput() const { return arrival_seconds > 0 ? static_cast<double>(all.good) / arrival_seconds : 0; }
  double hit_rate() const {
    return prefilled_tokens > 0 ? static_cast<double>(cached_tokens) / static_cast<double>(prefilled_tokens)
                                : 0;
  }
};

// Mean and standard deviation of a load from the first arrivals' tenth on, and how it swings: see plot.h.
struct LoadSummary {
  double mean = 0, deviation = 0;
};
LoadSummary Summarize(const std::vector<LoadSample>& load, float LoadSample::*which);

nlohmann::ordered_json ToJson(const SimResult& result);

}  // namespace tidepool
