// `tidepool bench serve`: a measured load against any OpenAI-compatible endpoint.
#include <atomic>
#include <csignal>
#include <memory>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "server/bench/bench_serve.h"
#include "server/cli/commands.h"
#include "server/cli/config_flags.h"

namespace tidepool {
namespace {

using Workload = BenchServeOptions::Workload;

std::atomic<bool> g_stop{false};

// The first signal ends the load with what was measured; the second ends the process as usual.
void OnSignal(int signal) {
  g_stop = true;
  std::signal(signal, SIG_DFL);
}

// Flags whose text is parsed by the bench room itself: what does not parse is a usage error that names the
// flag.
struct Texts {
  std::string endpoint_type = "completions", workload, input = "1024", output = "128", turns = "4",
              think = "0", rate = "inf", arrival = "poisson", duration, timeout = "600s", slo, goodput,
              prompt_ids, percentiles = "50,90,95,99", output_format = "table";
  double attainment = 0.9;
};

absl::Status Named(std::string_view flag, const absl::Status& status) {
  return absl::InvalidArgumentError(absl::StrCat(std::string(flag), ": ", std::string(status.message())));
}

template <typename Out, typename In>
absl::Status Set(std::string_view flag, absl::StatusOr<In> parsed, Out& out) {
  if (!parsed.ok()) return Named(flag, parsed.status());
  out = *std::move(parsed);
  return absl::OkStatus();
}

absl::StatusOr<double> ParseRate(const std::string& text) {
  double rate = 0;
  if (text == "inf") return 0.0;
  if (!absl::SimpleAtod(text, &rate) || !(rate > 0) || rate > 1e6) {
    return absl::InvalidArgumentError("'" + text + "' is neither a rate in requests a second nor inf");
  }
  return rate;
}

absl::StatusOr<std::pair<int32_t, int32_t>> ParseIds(const std::string& text) {
  const std::vector<std::string> parts = absl::StrSplit(text, '-');
  int32_t low = 0, high = 0;
  if (parts.size() != 2 || !absl::SimpleAtoi(parts[0], &low) || !absl::SimpleAtoi(parts[1], &high) ||
      low < 0 || high < low) {
    return absl::InvalidArgumentError("'" + text + "' is not LOW-HIGH");
  }
  return std::pair{low, high + 1};
}

absl::StatusOr<std::vector<double>> ParsePercents(const std::string& text) {
  std::vector<double> out;
  for (const auto part : absl::StrSplit(text, ',', absl::SkipWhitespace())) {
    double percent = 0;
    if (!absl::SimpleAtod(part, &percent)) return absl::InvalidArgumentError(absl::StrCat("'", part, "'"));
    out.push_back(percent);
  }
  return out;
}

absl::StatusOr<Workload> ParseWorkload(const std::string& text, const BenchServeOptions& options) {
  if (text.empty()) {
    // A file says what to do with it.
    if (!options.trace_file.empty()) return Workload::kTrace;
    return options.dataset_file.empty() ? Workload::kRandom : Workload::kDataset;
  }
  if (text == "random") return Workload::kRandom;
  if (text == "shared-prefix") return Workload::kSharedPrefix;
  if (text == "multi-turn") return Workload::kMultiTurn;
  if (text == "dataset") return Workload::kDataset;
  return Workload::kTrace;
}

absl::Status Complete(const Texts& texts, BenchServeOptions& options) {
  options.chat = texts.endpoint_type == "chat";
  options.json = texts.output_format == "json";
  options.sweep_options.attainment = texts.attainment;
  absl::Status status;
  const auto set = [&](std::string_view flag, auto parsed, auto& out) {
    if (status.ok()) status = Set(flag, std::move(parsed), out);
  };
  set("--workload", ParseWorkload(texts.workload, options), options.workload);
  // Conversations of a file.
  if (options.workload == Workload::kMultiTurn && !options.dataset_file.empty()) {
    options.workload = Workload::kDataset;
    options.multi_turn = true;
  }
  set("--input-len", LengthSpec::Parse(texts.input), options.input);
  set("--output-len", LengthSpec::Parse(texts.output), options.output);
  set("--turns", LengthSpec::Parse(texts.turns), options.turns);
  set("--think-time", ParseDurationIn(texts.think, absl::Seconds(1)), options.think);
  set("--request-rate", ParseRate(texts.rate), options.arrivals.rate);
  set("--arrival", ParseArrivalKind(texts.arrival), options.arrivals.kind);
  if (!texts.duration.empty()) {
    set("--duration", ParseDurationIn(texts.duration, absl::Seconds(1)), options.duration);
  }
  set("--request-timeout", ParseDurationIn(texts.timeout, absl::Seconds(1)), options.timeout);
  if (!texts.slo.empty() && !texts.goodput.empty()) {
    return absl::InvalidArgumentError("--slo and --goodput say the same; give one");
  }
  set("--slo", Slo::Parse(texts.slo.empty() ? texts.goodput : texts.slo), options.slo);
  if (!texts.prompt_ids.empty()) set("--prompt-ids", ParseIds(texts.prompt_ids), options.prompt_ids);
  set("--percentiles", ParsePercents(texts.percentiles), options.percents);
  return status;
}

void AddTargetFlags(CLI::App& command, BenchServeOptions& o, Texts& t) {
  const std::string group = "Target";
  command.add_option("--base-url", o.base_url, "The server")->capture_default_str()->group(group);
  command.add_option("--endpoint-type", t.endpoint_type, "completions or chat")
      ->check(CLI::IsMember({"completions", "chat"}))
      ->capture_default_str()
      ->group(group);
  command
      .add_option("--endpoint", o.endpoint, "Path, where it is not /v1/completions or /v1/chat/completions")
      ->group(group);
  command.add_option("--model", o.model, "Model name; default: the first that the server lists")
      ->group(group);
  command.add_option("--api-key-env", o.api_key_env, "Variable that holds the API key")->group(group);
  command.add_option("--header", o.headers, "'Name: value', sent with each request; repeatable")
      ->group(group);
  command.add_option("--ca-file", o.ca_file, "Certificate authorities (PEM) for https")->group(group);
  command.add_flag("--insecure", o.insecure, "Do not verify the server's certificate")->group(group);
}

void AddWorkloadFlags(CLI::App& command, BenchServeOptions& o, Texts& t) {
  const std::string group = "Workload";
  command
      .add_option("--workload", t.workload,
                  "random, shared-prefix, multi-turn, dataset or trace; default: random, or what the file is")
      ->check(CLI::IsMember({"random", "shared-prefix", "multi-turn", "dataset", "trace"}))
      ->group(group);
  command
      .add_option("--input-len,--random-input-len", t.input,
                  "Prompt tokens (of a suffix, of a turn): 128, 64-256, normal:128,32, lognormal:128,0.8, "
                  "exponential:128; @MIN-MAX clamps")
      ->capture_default_str()
      ->group(group);
  command.add_option("--output-len,--random-output-len", t.output, "Answer tokens, the same way")
      ->capture_default_str()
      ->group(group);
  command.add_option("--prefix-groups", o.prefix_groups, "shared-prefix: how many prefixes")
      ->check(CLI::Range(1u, 1'000'000'000u))
      ->capture_default_str()
      ->group(group);
  command.add_option("--prefix-len", o.prefix_tokens, "shared-prefix: their tokens")
      ->check(CLI::Range(1u, LengthSpec::kTokensMax))
      ->capture_default_str()
      ->group(group);
  command.add_option("--turns", t.turns, "multi-turn: requests of a conversation, a length")
      ->capture_default_str()
      ->group(group);
  command.add_option("--think-time", t.think, "From an answer's end to the next turn, for instance 2s")
      ->capture_default_str()
      ->group(group);
  command
      .add_option("--dataset", o.dataset_file,
                  "JSONL or JSON list of prompt, input, messages or ShareGPT conversations")
      ->group(group);
  command.add_flag("--shuffle", o.shuffle, "dataset: in an order drawn with the seed")->group(group);
  command.add_option("--trace", o.trace_file, "Mooncake JSONL, BurstGPT CSV or Azure CSV")->group(group);
  command.add_option("--speed", o.speed, "trace: how much faster than recorded")
      ->check(CLI::Range(1e-6, 1e6))
      ->capture_default_str()
      ->group(group);
  command.add_option("--length-scale", o.length_scale, "trace: factor on all token counts")
      ->check(CLI::Range(1e-6, 1e3))
      ->capture_default_str()
      ->group(group);
  command
      .add_option("--trace-block-tokens", o.trace_block_tokens, "trace: tokens that one hash id stands for")
      ->check(CLI::Range(1u, 1'000'000u))
      ->capture_default_str()
      ->group(group);
  command.add_option("--max-input-len", o.input_tokens_max, "trace: longer prompts lose their end; 0: none")
      ->capture_default_str()
      ->group(group);
  command.add_option("--max-output-len", o.output_tokens_max, "trace: longer answers are cut; 0: none")
      ->capture_default_str()
      ->group(group);
  command
      .add_option("--prompt-ids", t.prompt_ids,
                  "LOW-HIGH: prompts of random token ids, of exact length, instead of words")
      ->group(group);
}

void AddLoadFlags(CLI::App& command, BenchServeOptions& o, Texts& t) {
  const std::string group = "Load";
  command
      .add_option("--request-rate", t.rate,
                  "Requests (conversations) a second; inf: as fast as --max-concurrency lets them")
      ->capture_default_str()
      ->group(group);
  command.add_option("--arrival", t.arrival, "poisson, constant or gamma")
      ->capture_default_str()
      ->group(group);
  command
      .add_option("--burstiness", o.arrivals.burstiness,
                  "gamma's shape: below 1 bursty, 1 Poisson, above even")
      ->check(CLI::Range(1e-3, 1e6))
      ->capture_default_str()
      ->group(group);
  command.add_option("--max-concurrency", o.concurrency_max, "Requests under way at most; 0: no cap")
      ->check(CLI::Range(size_t{0}, size_t{1'000'000}))
      ->capture_default_str()
      ->group(group);
  command
      .add_option("--num-prompts", o.requests,
                  "Requests; default 1000, or what --duration or the trace holds")
      ->check(CLI::Range(uint64_t{1}, uint64_t{100'000'000}))
      ->group(group);
  command.add_option("--duration", t.duration, "Plan no request later than this, for instance 60s")
      ->group(group);
  command.add_option("--warmup,--num-warmups", o.warmups, "Requests that come first and are not counted")
      ->check(CLI::Range(uint64_t{0}, uint64_t{1'000'000}))
      ->capture_default_str()
      ->group(group);
  command.add_option("--seed", o.seed, "Of prompts, lengths and arrivals")
      ->capture_default_str()
      ->group(group);
  command.add_option("--request-timeout", t.timeout, "A request fails after this")
      ->capture_default_str()
      ->group(group);
  command.add_option("--threads", o.threads, "Network threads of the load generator")
      ->check(CLI::Range(1, 64))
      ->capture_default_str()
      ->group(group);
}

void AddRequestFlags(CLI::App& command, BenchServeOptions& o) {
  const std::string group = "Request";
  command.add_flag("--ignore-eos", o.ignore_eos, "Ask for answers of full length")->group(group);
  command.add_option("--temperature", o.temperature, "Default: the server's")
      ->check(CLI::Range(0.0, 2.0))
      ->group(group);
  command.add_option("--extra-body", o.extra_body, "JSON object whose fields go into each request")
      ->group(group);
  command
      .add_option("--return-trace", o.return_trace,
                  "Ask for Tidepool's trace of each request; default: where the server is Tidepool")
      ->group(group);
}

void AddReportFlags(CLI::App& command, BenchServeOptions& o, Texts& t) {
  const std::string group = "Report";
  command
      .add_option("--slo", t.slo,
                  "What makes a request good: ttft:200ms,itl:50ms; also tpot, e2el, itl_p99, itl_max")
      ->group(group);
  command
      .add_option_function<std::vector<std::string>>(
          "--goodput", [&t](const std::vector<std::string>& parts) { t.goodput = absl::StrJoin(parts, " "); },
          "The same as vLLM writes it: ttft:200 tpot:50, in milliseconds")
      ->group(group);
  command
      .add_flag("--sweep", o.sweep,
                "Find the highest request rate of which --slo-attainment is good: double, then bisect, "
                "beginning at --request-rate")
      ->group(group);
  command
      .add_option("--slo-attainment", t.attainment, "sweep: the share of good requests that a rate must hold")
      ->check(CLI::Range(0.01, 1.0))
      ->capture_default_str()
      ->group(group);
  command
      .add_option("--sweep-tolerance", o.sweep_options.tolerance,
                  "sweep: stop when the highest rate that holds and the lowest that does not are this close")
      ->check(CLI::Range(0.001, 10.0))
      ->capture_default_str()
      ->group(group);
  command.add_option("--sweep-steps", o.sweep_options.steps_max, "sweep: stop after so many rates")
      ->check(CLI::Range(size_t{1}, size_t{1000}))
      ->capture_default_str()
      ->group(group);
  command.add_option("--percentiles,--metric-percentiles", t.percentiles, "Which to report")
      ->capture_default_str()
      ->group(group);
  command.add_option("--result-file", o.result_file, "Write the result as JSON")->group(group);
  command.add_option("--requests-file", o.requests_file, "Write one JSON line a request")->group(group);
  command.add_flag("--save-detailed", o.details, "Lists a request (ttfts, itls, ...) into the result file")
      ->group(group);
  command.add_flag("--save-texts", o.texts, "With --save-detailed: the answers' texts too")->group(group);
  command.add_option("--label", o.label, "Into the result")->group(group);
  command.add_option("--metadata", o.metadata, "KEY=VALUE, into the result; repeatable")->group(group);
  command.add_option("-o,--output", t.output_format, "table or json")
      ->check(CLI::IsMember({"table", "json"}))
      ->capture_default_str()
      ->group(group);
  command.add_flag("-q,--quiet", o.quiet, "No progress")->group(group);
}

int RunServe(const Texts& texts, BenchServeOptions options) {
  if (const absl::Status status = Complete(texts, options); !status.ok()) return ReportError(status);
  std::signal(SIGINT, OnSignal);
  std::signal(SIGTERM, OnSignal);
  const auto code = RunBenchServe(options, g_stop);
  return code.ok() ? *code : ReportError(code.status());
}

}  // namespace

void AddBenchCommand(CLI::App& app, Command& run) {
  CLI::App* bench = app.add_subcommand("bench", "Measure a server, or how KV moves on this machine");
  bench->require_subcommand(1);
  CLI::App* serve = bench->add_subcommand(
      "serve",
      "Open-loop load against any OpenAI-compatible endpoint. Latencies count from the planned start.\n"
      "Exit code 0: all answered or refused for load (429, 503); 1: a request failed, none succeeded, or it\n"
      "was interrupted; 2: usage.");
  AddBenchKvCommand(*bench, run);
  const auto options = std::make_shared<BenchServeOptions>();
  const auto texts = std::make_shared<Texts>();
  AddTargetFlags(*serve, *options, *texts);
  AddWorkloadFlags(*serve, *options, *texts);
  AddLoadFlags(*serve, *options, *texts);
  AddRequestFlags(*serve, *options);
  AddReportFlags(*serve, *options, *texts);
  serve->callback([&run, options, texts] { run = [=]() -> int { return RunServe(*texts, *options); }; });
}

}  // namespace tidepool
