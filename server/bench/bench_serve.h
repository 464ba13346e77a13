#pragma once

#include <atomic>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "server/bench/arrivals.h"
#include "server/bench/random.h"
#include "server/bench/slo.h"
#include "server/bench/sweep.h"

namespace tidepool {

// BenchServeOptions: what `tidepool bench serve` is asked to do; the flags, parsed.
struct BenchServeOptions {
  enum class Workload { kRandom, kSharedPrefix, kMultiTurn, kDataset, kTrace };

  std::string base_url = "http://127.0.0.1:8000";
  bool chat = false;
  std::string endpoint;  // "": /v1/chat/completions or /v1/completions
  std::string model;     // "": the first that /v1/models lists
  std::string api_key_env;
  std::vector<std::string> headers;  // "Name: value"
  std::string ca_file;
  bool insecure = false;
  int threads = 1;

  Workload workload = Workload::kRandom;
  LengthSpec input = LengthSpec::Fixed(1024), output = LengthSpec::Fixed(128);
  uint32_t prefix_groups = 10, prefix_tokens = 512;
  LengthSpec turns = LengthSpec::Fixed(4);
  absl::Duration think;
  std::string dataset_file, trace_file;
  bool shuffle = false;
  bool multi_turn = false;  // of a dataset's conversations
  double speed = 1, length_scale = 1;
  uint32_t trace_block_tokens = 512, input_tokens_max = 0, output_tokens_max = 0;
  std::optional<std::pair<int32_t, int32_t>> prompt_ids;  // [low, high): prompts as token ids

  ArrivalSpec arrivals;
  size_t concurrency_max = 0;
  std::optional<uint64_t> requests;  // default: 1000 without a duration; a trace's all
  absl::Duration duration = absl::InfiniteDuration();
  uint64_t warmups = 0;
  uint64_t seed = 0;
  absl::Duration timeout = absl::Minutes(10);

  bool ignore_eos = false;
  std::optional<double> temperature;
  std::string extra_body;            // a JSON object
  std::optional<bool> return_trace;  // default: of a server that says it is Tidepool

  Slo slo;
  bool sweep = false;
  SweepCore::Options sweep_options;

  std::vector<double> percents = {50, 90, 95, 99};
  std::string result_file, requests_file;
  bool details = false, texts = false;
  std::string label;
  std::vector<std::string> metadata;  // "key=value", into the result
  bool json = false;                  // on stdout, instead of the table
  bool quiet = false;
};

// Why the options do not fit together; OK: they do. Messages name the flag.
absl::Status CheckOptions(const BenchServeOptions& options);

// Runs it: result on stdout (and in the files), progress and warnings on stderr. `stop`: set by a signal;
// what was measured until then is still reported. Returns the exit code: 0, 1 where a request failed other
// than by being refused for load, none succeeded, or it was stopped; an error is for what kept it from
// running (InvalidArgument: exit code 2).
absl::StatusOr<int> RunBenchServe(const BenchServeOptions& options, const std::atomic<bool>& stop);

}  // namespace tidepool
