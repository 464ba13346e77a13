#include "server/bench/bench_serve.h"

#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <memory>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/status.h"
#include "server/bench/build_info.h"
#include "server/bench/dataset.h"
#include "server/bench/endpoint.h"
#include "server/bench/http_client.h"
#include "server/bench/load_runner.h"
#include "server/bench/progress.h"
#include "server/bench/report.h"
#include "server/bench/trace.h"
#include "server/bench/workload.h"

namespace tidepool {
namespace {

using Json = nlohmann::ordered_json;
using Options = BenchServeOptions;
using Workload = BenchServeOptions::Workload;

constexpr uint64_t kRequestsDefault = 1000;  // as vLLM's
// A server that does not count its prompts: English words in a tokenizer of today.
constexpr double kTokensPerWordGuess = 1.1;
constexpr size_t kWarmupConcurrency = 8;

std::string Dump(const Json& json, int indent) {
  return json.dump(indent, ' ', false, Json::error_handler_t::replace);
}

// Thousands of streams need as many descriptors.
void RaiseFileLimit() {
  rlimit limit{};
  if (getrlimit(RLIMIT_NOFILE, &limit) != 0) return;
  limit.rlim_cur = limit.rlim_max;
  setrlimit(RLIMIT_NOFILE, &limit);
}

const char* WorkloadName(Workload workload) {
  switch (workload) {
    case Workload::kRandom:
      return "random";
    case Workload::kSharedPrefix:
      return "shared-prefix";
    case Workload::kMultiTurn:
      return "multi-turn";
    case Workload::kDataset:
      return "dataset";
    case Workload::kTrace:
      return "trace";
  }
  return "";
}

absl::StatusOr<HttpHeaders> Headers(const Options& options) {
  HttpHeaders headers;
  if (!options.api_key_env.empty()) {
    const char* key = std::getenv(options.api_key_env.c_str());
    if (key == nullptr || *key == '\0') {
      return absl::InvalidArgumentError(
          absl::StrCat("--api-key-env: the variable ", options.api_key_env, " is not set"));
    }
    headers.emplace_back("Authorization", absl::StrCat("Bearer ", key));
  }
  for (const std::string& line : options.headers) {
    const size_t colon = line.find(':');
    if (colon == line.npos || colon == 0) {
      return absl::InvalidArgumentError(absl::StrCat("--header: '", line, "' is not 'Name: value'"));
    }
    headers.emplace_back(line.substr(0, colon),
                         std::string(absl::StripAsciiWhitespace(line.substr(colon + 1))));
  }
  return headers;
}

// BenchServe: one invocation.
class BenchServe {
 public:
  BenchServe(const Options& options, const std::atomic<bool>& stop)
      : options_(options), stop_(stop), client_(ClientOptions(options)) {}

  absl::StatusOr<int> Run();

 private:
  struct Outcome {
    Json json;  // of the result file
    Summary summary;
    LoadResult load;
  };

  static HttpClient::Options ClientOptions(const Options& options) {
    HttpClient::Options out;
    out.threads = options.threads;
    out.ca_file = options.ca_file;
    out.verify_peer = !options.insecure;
    out.measure_lag = true;
    return out;
  }

  absl::Status Prepare();
  absl::Status ReadFiles();
  absl::Status FindModel();
  absl::Status Calibrate();
  std::unique_ptr<SessionSource> Source(uint64_t seed) const;
  uint64_t Requests() const;
  void WarmUp();
  Outcome Measure(double rate, uint64_t seed, const std::string& label);
  absl::StatusOr<int> Sweep();
  absl::StatusOr<int> Once();
  Json Head(double rate) const;
  Json Configuration() const;
  absl::Status Write(const Json& result, std::span<const RequestRecord> records) const;
  void Say(const std::string& text) const {
    if (!options_.quiet) std::fprintf(stderr, "%s\n", text.c_str());
  }
  static void Warn(const std::string& text) { std::fprintf(stderr, "warning: %s\n", text.c_str()); }

  const Options& options_;
  const std::atomic<bool>& stop_;
  HttpClient client_;
  RequestShape shape_;
  ServedModel model_;
  std::optional<WordTokens> words_;
  std::shared_ptr<const Trace> trace_;
  std::shared_ptr<const std::vector<DatasetRecord>> dataset_;
};

absl::Status BenchServe::ReadFiles() {
  if (options_.workload == Workload::kTrace) {
    TP_ASSIGN_OR_RETURN(Trace trace, ReadTrace(options_.trace_file));
    Say(absl::StrFormat("%s: %s, %d requests over %s", options_.trace_file, trace.format,
                        trace.entries.size(), absl::FormatDuration(trace.entries.back().at)));
    if (trace.left_out > 0) {
      Warn(absl::StrCat(trace.left_out, " entries of the trace have no input or no output and are left out"));
    }
    trace_ = std::make_shared<const Trace>(std::move(trace));
  }
  if (options_.workload == Workload::kDataset) {
    TP_ASSIGN_OR_RETURN(auto records, ReadDataset(options_.dataset_file));
    Say(absl::StrCat(options_.dataset_file, ": ", records.size(), " records"));
    dataset_ = std::make_shared<const std::vector<DatasetRecord>>(std::move(records));
  }
  return absl::OkStatus();
}

absl::Status BenchServe::FindModel() {
  auto models = ListModels(client_, shape_.url, shape_.headers);
  if (!models.ok() && (options_.model.empty() || absl::IsUnavailable(models.status()))) {
    return Annotate(models.status(), options_.base_url);
  }
  if (models.ok()) {
    for (const ServedModel& model : *models) {
      if (options_.model.empty() || model.id == options_.model) {
        model_ = model;
        break;
      }
    }
  }
  if (!options_.model.empty()) model_.id = options_.model;
  if (model_.id.empty()) {
    return absl::FailedPreconditionError(options_.base_url + ": lists no model; name one with --model");
  }
  shape_.model = model_.id;
  shape_.return_trace = options_.return_trace.value_or(model_.owned_by == "tidepool");
  return absl::OkStatus();
}

absl::Status BenchServe::Calibrate() {
  if (options_.prompt_ids) {
    shape_.prompts = PromptWriter::Ids(options_.prompt_ids->first, options_.prompt_ids->second);
    return absl::OkStatus();
  }
  if (options_.workload == Workload::kDataset) return absl::OkStatus();
  TP_ASSIGN_OR_RETURN(words_, MeasureWords(client_, shape_));
  if (!words_) {
    Warn("the server does not count prompt tokens; the prompts' lengths are a guess");
    words_ = WordTokens{kTokensPerWordGuess, 0};
  }
  shape_.prompts = PromptWriter::Words(words_->per_word, words_->overhead);
  return absl::OkStatus();
}

absl::Status BenchServe::Prepare() {
  RaiseFileLimit();
  auto url = ParseHttpUrl(options_.base_url);
  if (!url.ok()) return Annotate(url.status(), "--base-url");
  // OpenAI's clients take a base with /v1; the endpoints have it themselves.
  if (url->path.ends_with("/v1")) url->path.resize(url->path.size() - 3);
  shape_.url = *url;
  shape_.chat = options_.chat;
  shape_.target = url->path + (!options_.endpoint.empty() ? options_.endpoint
                               : options_.chat            ? "/v1/chat/completions"
                                                          : "/v1/completions");
  TP_ASSIGN_OR_RETURN(shape_.headers, Headers(options_));
  shape_.ignore_eos = options_.ignore_eos;
  shape_.temperature = options_.temperature;
  shape_.timeout = options_.timeout;
  shape_.keep_text = options_.texts;
  if (!options_.extra_body.empty()) shape_.extra = Json::parse(options_.extra_body, nullptr, false);
  TP_RETURN_IF_ERROR(ReadFiles());
  TP_RETURN_IF_ERROR(FindModel());
  return Calibrate();
}

std::unique_ptr<SessionSource> BenchServe::Source(uint64_t seed) const {
  switch (options_.workload) {
    case Workload::kRandom:
      return MakeSource(RandomWorkload{options_.input, options_.output}, seed);
    case Workload::kSharedPrefix:
      return MakeSource(SharedPrefixWorkload{options_.prefix_groups, options_.prefix_tokens, options_.input,
                                             options_.output},
                        seed);
    case Workload::kMultiTurn:
      return MakeSource(MultiTurnWorkload{options_.turns, options_.input, options_.output, options_.think},
                        seed);
    case Workload::kDataset:
      return MakeSource(dataset_,
                        DatasetReplay{.output = options_.output,
                                      .multi_turn = options_.multi_turn,
                                      .shuffle = options_.shuffle,
                                      .think = options_.think},
                        seed);
    case Workload::kTrace:
      return MakeSource(trace_,
                        TraceReplay{.speed = options_.speed,
                                    .length_scale = options_.length_scale,
                                    .block_tokens = options_.trace_block_tokens,
                                    .input_tokens_max = options_.input_tokens_max,
                                    .output_tokens_max = options_.output_tokens_max},
                        seed);
  }
  return nullptr;
}

uint64_t BenchServe::Requests() const {
  if (options_.requests) return *options_.requests;
  if (trace_ != nullptr) return trace_->entries.size();
  return options_.duration == absl::InfiniteDuration() ? kRequestsDefault : UINT64_MAX;
}

void BenchServe::WarmUp() {
  if (options_.warmups == 0) return;
  Say(absl::StrCat("warming up with ", options_.warmups, " requests"));
  LoadOptions load;
  load.requests_max = options_.warmups;
  load.concurrency_max = options_.concurrency_max > 0 ? std::min(options_.concurrency_max, kWarmupConcurrency)
                                                      : kWarmupConcurrency;
  // Another seed: what is measured must not find its prompts cached.
  const uint64_t seed = ~options_.seed;
  auto source = options_.workload == Workload::kTrace
                    ? MakeSource(RandomWorkload{options_.input, options_.output}, seed)
                    : Source(seed);
  const LoadResult result = LoadRunner(client_, shape_).Run(*source, load, nullptr, stop_);
  const auto failed = std::count_if(result.records.begin(), result.records.end(),
                                    [](const RequestRecord& record) { return !record.ok(); });
  if (failed > 0) {
    Warn(absl::StrCat(
        failed, " warm-up requests failed; the first: ",
        std::find_if(result.records.begin(), result.records.end(), [](const RequestRecord& record) {
          return !record.ok();
        })->error));
  }
}

Json BenchServe::Configuration() const {
  Json json;
  json["base_url"] = options_.base_url;
  json["endpoint"] = shape_.target;
  json["workload"] = WorkloadName(options_.workload);
  const bool drawn = options_.workload == Workload::kRandom || options_.workload == Workload::kMultiTurn ||
                     options_.workload == Workload::kSharedPrefix;
  if (drawn) json["input_len"] = options_.input.text();
  if (options_.workload != Workload::kTrace) json["output_len"] = options_.output.text();
  if (options_.workload == Workload::kSharedPrefix) {
    json["prefix_groups"] = options_.prefix_groups;
    json["prefix_len"] = options_.prefix_tokens;
  }
  if (options_.workload == Workload::kMultiTurn) json["turns"] = options_.turns.text();
  json["think_time_s"] = absl::ToDoubleSeconds(options_.think);
  if (dataset_ != nullptr) {
    json["dataset"] = options_.dataset_file;
    json["multi_turn"] = options_.multi_turn;
    json["shuffle"] = options_.shuffle;
  }
  if (trace_ != nullptr) {
    json["trace"] = options_.trace_file;
    json["trace_format"] = trace_->format;
    json["speed"] = options_.speed;
    json["length_scale"] = options_.length_scale;
    json["trace_block_tokens"] = options_.trace_block_tokens;
    json["max_input_len"] = options_.input_tokens_max;
    json["max_output_len"] = options_.output_tokens_max;
  }
  if (options_.prompt_ids) {
    json["prompt_ids"] = {options_.prompt_ids->first, options_.prompt_ids->second};
  } else if (words_) {
    json["tokens_per_word"] = words_->per_word;
    json["prompt_overhead_tokens"] = words_->overhead;
  }
  json["duration_max_s"] =
      options_.duration == absl::InfiniteDuration() ? Json() : Json(absl::ToDoubleSeconds(options_.duration));
  json["warmup"] = options_.warmups;
  json["ignore_eos"] = options_.ignore_eos;
  json["temperature"] = options_.temperature ? Json(*options_.temperature) : Json();
  json["extra_body"] = shape_.extra;
  json["request_timeout_s"] = absl::ToDoubleSeconds(options_.timeout);
  json["threads"] = options_.threads;
  return json;
}

Json BenchServe::Head(double rate) const {
  Json json;
  json["date"] = absl::FormatTime("%Y%m%d-%H%M%S", absl::Now(), absl::UTCTimeZone());
  json["endpoint_type"] = options_.chat ? "openai-chat" : "openai";
  json["backend"] = json["endpoint_type"];
  json["label"] = options_.label.empty() ? Json() : Json(options_.label);
  json["model_id"] = model_.id;
  json["tokenizer_id"] = nullptr;
  const uint64_t requests = Requests();
  json["num_prompts"] = requests == UINT64_MAX ? Json() : Json(requests);
  // A trace brings its own times.
  if (trace_ != nullptr) {
    json["request_rate"] = "trace";
  } else if (rate > 0) {
    json["request_rate"] = rate;
  } else {
    json["request_rate"] = "inf";
  }
  json["arrival"] = trace_ != nullptr ? "trace" : rate > 0 ? ArrivalName(options_.arrivals.kind) : "closed";
  json["burstiness"] = options_.arrivals.burstiness;
  json["max_concurrency"] = options_.concurrency_max > 0 ? Json(options_.concurrency_max) : Json();
  json["seed"] = options_.seed;
  json["tidepool_version"] = kBuildVersion;
  json["git"] = kBuildGit;
  json["config"] = Configuration();
  for (const std::string& entry : options_.metadata) {
    const size_t equals = entry.find('=');
    json["metadata"][entry.substr(0, equals)] = entry.substr(equals + 1);
  }
  return json;
}

BenchServe::Outcome BenchServe::Measure(double rate, uint64_t seed, const std::string& label) {
  LoadOptions load;
  load.requests_max = Requests();
  load.duration = options_.duration;
  load.arrivals = options_.arrivals;
  load.arrivals.rate = rate;
  load.concurrency_max = options_.concurrency_max;
  load.seed = seed;
  Outcome out;
  {
    ProgressLine line(label, options_.quiet);
    line.SetDuration(options_.duration);
    auto source = Source(seed);
    out.load = LoadRunner(client_, shape_)
                   .Run(
                       *source, load, [&](const LoadProgress& progress) { line.Show(progress); }, stop_);
  }
  out.summary = Summarize(out.load.records, options_.slo, options_.percents, out.load.health);
  out.json = Head(rate);
  out.json.update(SummaryJson(out.summary, options_.slo, options_.percents));
  out.json["stopped"] = out.load.stopped;
  for (const std::string& warning : Warnings(out.summary)) {
    Warn(warning);
    out.json["warnings"].push_back(warning);
  }
  return out;
}

absl::Status BenchServe::Write(const Json& result, std::span<const RequestRecord> records) const {
  const auto write = [](const std::string& path, const auto& fill) {
    std::ofstream file(path, std::ios::trunc);
    fill(file);
    file.flush();
    if (file) return absl::OkStatus();
    return absl::UnavailableError(absl::StrCat(path, ": cannot be written"));
  };
  if (!options_.requests_file.empty()) {
    TP_RETURN_IF_ERROR(write(options_.requests_file, [&](std::ofstream& file) {
      for (const RequestRecord& record : records) file << Dump(RecordJson(record, options_.slo), -1) << '\n';
    }));
  }
  if (options_.result_file.empty()) return absl::OkStatus();
  Json whole = result;
  if (options_.details) AddDetails(records, options_.texts, whole);
  return write(options_.result_file, [&](std::ofstream& file) { file << Dump(whole, 2) << '\n'; });
}

absl::StatusOr<int> BenchServe::Once() {
  const Outcome outcome = Measure(options_.arrivals.rate, options_.seed, "");
  const Summary& summary = outcome.summary;
  if (options_.json) {
    std::puts(Dump(outcome.json, 2).c_str());
  } else {
    std::fputs(SummaryTable(summary, options_.slo, options_.percents).c_str(), stdout);
  }
  TP_RETURN_IF_ERROR(Write(outcome.json, outcome.load.records));
  const auto broken = std::find_if(outcome.load.records.begin(), outcome.load.records.end(),
                                   [](const RequestRecord& r) { return !r.ok() && !r.rejected(); });
  if (broken != outcome.load.records.end()) {
    Warn(absl::StrCat(summary.failed - summary.rejected, " requests failed; the first: ", broken->error));
  }
  const bool failed = broken != outcome.load.records.end() || summary.completed == 0 || outcome.load.stopped;
  return failed ? 1 : 0;
}

absl::StatusOr<int> BenchServe::Sweep() {
  SweepCore::Options sweep = options_.sweep_options;
  if (options_.arrivals.rate > 0) sweep.first_rate = options_.arrivals.rate;
  SweepCore core(sweep);
  Json steps = Json::array();
  std::optional<Outcome> best;
  bool stopped = false;
  while (const auto rate = core.Next()) {
    const size_t number = core.steps().size() + 1;
    // A seed of its own: a step must not find the last one's prompts cached.
    Outcome outcome =
        Measure(*rate, options_.seed + number, absl::StrFormat("step %d, %.4g req/s ", number, *rate));
    stopped = outcome.load.stopped;
    if (stopped) break;
    const double share = outcome.load.records.empty() ? 0
                                                      : static_cast<double>(outcome.summary.good) /
                                                            static_cast<double>(outcome.load.records.size());
    core.Report(outcome.summary.request_goodput, share);
    const SweepCore::Step& step = core.steps().back();
    Say(absl::StrFormat(
        "step %d: %.4g req/s: %.1f%% good, goodput %.4g req/s, ttft p50 %.1f ms, tpot p50 %.2f ms: %s",
        number, step.rate, step.good_share * 100, step.goodput, outcome.summary.ttft.median,
        outcome.summary.tpot.median, step.passed ? "holds" : "does not hold"));
    outcome.json["good_share"] = step.good_share;
    outcome.json["passed"] = step.passed;
    steps.push_back(outcome.json);
    if (core.Best() == &step) best = std::move(outcome);
  }
  Json result = best ? best->json : Head(sweep.first_rate);
  result["sweep"] = {{"attainment", sweep.attainment},
                     {"tolerance", sweep.tolerance},
                     {"stop_reason", stopped ? "stopped" : core.StopReason()},
                     {"best_request_rate", best ? Json(core.Best()->rate) : Json()},
                     {"best_goodput", best ? Json(core.Best()->goodput) : Json()},
                     {"steps", steps}};
  if (options_.json) {
    std::puts(Dump(result, 2).c_str());
  } else {
    std::puts("request_rate  good_%   goodput   holds");
    for (const SweepCore::Step& step : core.steps()) {
      std::printf("%-12.4g  %-7.1f  %-8.4g  %s\n", step.rate, step.good_share * 100, step.goodput,
                  step.passed ? "yes" : "no");
    }
    if (best) {
      std::printf("highest goodput: %.4g req/s at a request rate of %.4g (%.0f%% within %s)\n",
                  core.Best()->goodput, core.Best()->rate, sweep.attainment * 100,
                  options_.slo.text().c_str());
      std::fputs(SummaryTable(best->summary, options_.slo, options_.percents).c_str(), stdout);
    } else {
      std::puts("no rate was sustained within the SLO");
    }
  }
  TP_RETURN_IF_ERROR(Write(
      result, best ? std::span<const RequestRecord>(best->load.records) : std::span<const RequestRecord>()));
  return best && !stopped ? 0 : 1;
}

absl::StatusOr<int> BenchServe::Run() {
  TP_RETURN_IF_ERROR(Prepare());
  WarmUp();
  if (stop_) return 1;
  return options_.sweep ? Sweep() : Once();
}

}  // namespace

absl::Status CheckOptions(const Options& o) {
  const auto bad = [](std::string_view text) {
    return absl::InvalidArgumentError(absl::string_view(text.data(), text.size()));
  };
  if (o.workload == Workload::kTrace && o.trace_file.empty())
    return bad("--workload trace needs --trace FILE");
  if (o.workload == Workload::kDataset && o.dataset_file.empty()) {
    return bad("--workload dataset needs --dataset FILE");
  }
  if (o.prompt_ids) {
    if (o.chat) return bad("--prompt-ids is for --endpoint-type completions: chat messages are text");
    if (o.workload == Workload::kDataset || o.workload == Workload::kMultiTurn) {
      return bad("--prompt-ids is for workloads of made-up single prompts");
    }
  }
  if (o.workload != Workload::kTrace && o.arrivals.rate <= 0 && o.concurrency_max == 0) {
    if (!o.sweep && !o.requests && o.duration != absl::InfiniteDuration()) {
      return bad("--request-rate inf without --max-concurrency sends everything at once: give --num-prompts");
    }
  }
  if (o.sweep && o.slo.empty()) return bad("--sweep needs --slo");
  if (o.sweep && o.workload == Workload::kTrace) {
    return bad("--sweep sets the rate; a trace has its own: change --speed instead");
  }
  if (!o.extra_body.empty()) {
    const Json extra = Json::parse(o.extra_body, nullptr, false);
    if (!extra.is_object()) return bad("--extra-body is not a JSON object");
  }
  for (const std::string& entry : o.metadata) {
    if (entry.find('=') == entry.npos) return bad("--metadata takes KEY=VALUE");
  }
  for (const double percent : o.percents) {
    if (!(percent >= 0 && percent <= 100)) return bad("--percentiles are between 0 and 100");
  }
  if (o.insecure && !o.ca_file.empty()) return bad("--insecure and --ca-file contradict each other");
  return absl::OkStatus();
}

absl::StatusOr<int> RunBenchServe(const Options& options, const std::atomic<bool>& stop) {
  TP_RETURN_IF_ERROR(CheckOptions(options));
  return BenchServe(options, stop).Run();
}

}  // namespace tidepool
