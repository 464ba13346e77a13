// `tidepool run-batch`: a file of requests through an endpoint, or through a cluster started for it.
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "base/log.h"
#include "base/status.h"
#include "config/fields.h"
#include "server/batch/batch_run.h"
#include "server/batch/http_transport.h"
#include "server/batch/journal.h"
#include "server/batch/ordered_output.h"
#include "server/cli/commands.h"
#include "server/cli/config_flags.h"
#include "server/cli/run_batch_cluster.h"
#include "server/cli/run_batch_progress.h"

namespace tidepool {
namespace {

constexpr size_t kDuplicatesShown = 10;
constexpr absl::Duration kCheckTimeout = absl::Seconds(10);

struct Options {
  std::string input, output, endpoint, api_key_env, ca_file, order = "prefix";
  uint32_t concurrency = 64;
  std::string retry_for = "10m", timeout = "30m";
  bool ordered = false;
};

// StopSignals: SIGINT and SIGTERM stop the run in order, a second one at once.
class StopSignals {
 public:
  StopSignals() {
    sigemptyset(&set_);
    sigaddset(&set_, SIGINT);
    sigaddset(&set_, SIGTERM);
    sigprocmask(SIG_BLOCK, &set_, nullptr);
    signal(SIGPIPE, SIG_IGN);
    thread_ = std::thread([this] { Watch(); });
  }
  ~StopSignals() {
    end_ = true;
    thread_.join();
  }
  const std::atomic<bool>& stopped() const { return stopped_; }

 private:
  void Watch() {
    while (!end_) {
      const timespec wait = absl::ToTimespec(absl::Milliseconds(50));
      if (sigtimedwait(&set_, nullptr, &wait) <= 0) continue;
      if (stopped_.exchange(true)) _exit(1);
    }
  }

  sigset_t set_;
  std::atomic<bool> stopped_{false}, end_{false};
  std::thread thread_;
};

absl::StatusOr<absl::Duration> ParsePositive(const char* flag, const std::string& text) {
  absl::Duration duration;
  if (!absl::ParseDuration(text, &duration) || duration <= absl::ZeroDuration()) {
    return absl::InvalidArgumentError(absl::StrCat(flag, ": '", text, "' is no duration such as 90s or 10m"));
  }
  return duration;
}

// What a run writes: the output itself, or, until it is put in order, a file beside it.
struct OutputPaths {
  std::string output, journal, unordered;

  explicit OutputPaths(const std::string& path)
      : output(path), journal(path + ".journal"), unordered(path + ".unordered") {}
};

absl::Status NoDuplicates(const InputIndex& index, const std::string& path) {
  const auto duplicates = index.Duplicates(kDuplicatesShown + 1);
  if (duplicates.empty()) return absl::OkStatus();
  std::string message;
  for (size_t i = 0; i < duplicates.size() && i < kDuplicatesShown; ++i) {
    absl::StrAppend(&message, i == 0 ? "" : "\n", path, ":", duplicates[i].number, ": the custom_id is line ",
                    duplicates[i].first, "'s already; each line needs its own");
  }
  if (duplicates.size() > kDuplicatesShown) absl::StrAppend(&message, "\nand more");
  return absl::InvalidArgumentError(message);
}

absl::StatusOr<InputIndex> ReadInput(const std::string& path, BatchProgress& progress,
                                     const StopSignals& signals) {
  uint64_t bytes = 0;
  InputIndex::Options options;
  std::error_code error;
  bytes = std::filesystem::file_size(path, error);
  options.progress = [&](uint64_t read) {
    progress.Reading(read, bytes);
    return !signals.stopped();
  };
  TP_ASSIGN_OR_RETURN(InputIndex index, InputIndex::Build(path, options));
  TP_RETURN_IF_ERROR(NoDuplicates(index, path));
  return index;
}

bool EmptyOrAbsent(const std::string& path) {
  std::error_code error;
  const auto bytes = std::filesystem::file_size(path, error);
  return error || bytes == 0;
}

absl::Status Claim(const OutputPaths& paths, const InputIndex& index, const Options& options) {
  if (!options.ordered && !EmptyOrAbsent(paths.unordered)) {
    return absl::FailedPreconditionError(
        absl::StrCat(paths.unordered, ": this output was begun with --ordered; give it again"));
  }
  const RunIdentity identity{index.digest(), index.bytes(), index.lines().size()};
  const bool empty = EmptyOrAbsent(paths.output) && EmptyOrAbsent(paths.unordered);
  TP_ASSIGN_OR_RETURN(const bool goes_on, ClaimOutput(paths.journal, identity, empty));
  if (goes_on) spdlog::info("going on with {}", paths.output);
  // Begun without --ordered, or finished: what is there is put in order at the end.
  if (options.ordered && !EmptyOrAbsent(paths.output) && EmptyOrAbsent(paths.unordered)) {
    if (std::rename(paths.output.c_str(), paths.unordered.c_str()) != 0)
      return ErrnoStatus(paths.output, errno);
    return SyncDirectoryOf(paths.output);
  }
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<HttpBatchTransport>> Connect(const Options& options,
                                                            const std::string& endpoint,
                                                            absl::Duration timeout,
                                                            const StopSignals& signals,
                                                            absl::Duration patience) {
  HttpBatchTransport::Options http;
  http.endpoint = endpoint;
  http.timeout = timeout;
  http.ca_file = options.ca_file;
  if (!options.api_key_env.empty()) {
    const char* key = std::getenv(options.api_key_env.c_str());
    if (key == nullptr || *key == '\0') {
      return absl::InvalidArgumentError(
          absl::StrCat("--api-key-env: the variable ", options.api_key_env, " is not set"));
    }
    http.api_key = key;
  }
  TP_ASSIGN_OR_RETURN(auto transport, HttpBatchTransport::Create(http));
  const absl::Time deadline = Clock::Real().Now() + patience;
  for (bool said = false;;) {
    const absl::Status status = transport->Check(kCheckTimeout);
    if (!absl::IsUnavailable(status) && !absl::IsDeadlineExceeded(status)) {
      TP_RETURN_IF_ERROR(status);
      return transport;
    }
    if (signals.stopped()) return absl::CancelledError("stopped");
    if (Clock::Real().Now() >= deadline) return status;
    if (!std::exchange(said, true)) spdlog::warn("{}; waiting for it", std::string(status.message()));
    absl::SleepFor(absl::Milliseconds(200));
  }
}

void Report(const BatchCounts& counts, absl::Duration elapsed, uint64_t before) {
  const uint64_t done = counts.completed + counts.failed;
  std::string shared;
  if (counts.prompt_units > 0) {
    shared = absl::StrFormat(
        ", %.0f%% of the prompts' bytes in shared prefixes",
        100.0 * static_cast<double>(counts.prompt_units_shared) / static_cast<double>(counts.prompt_units));
  }
  spdlog::info("{} of {} lines answered, {} failed; {} now, in {}{}", counts.completed, counts.lines,
               counts.failed, done - before,
               absl::FormatDuration(absl::Trunc(elapsed, absl::Milliseconds(1))), shared);
}

absl::StatusOr<int> RunLines(const Options& options, const InputIndex& index, BatchTransport& transport,
                             absl::Duration patience, BatchProgress& progress, const StopSignals& signals,
                             DoneLines done, OutputLog& log) {
  AdmissionCore::Options admission;
  admission.inflight_max = options.concurrency;
  BatchGate gate(admission, nullptr, Clock::Real());
  BatchRun::Options run_options;
  run_options.index = &index;
  run_options.done = std::move(done);
  run_options.answers = run_options.failures = &log;
  run_options.transport = &transport;
  run_options.gate = &gate;
  run_options.retry.patience = patience;
  run_options.by_prefix = options.order == "prefix";
  run_options.lookahead = std::max<size_t>(256, size_t{4} * options.concurrency);
  BatchRun* running = nullptr;
  run_options.on_tick = [&](const BatchCounts& counts) {
    progress.Running(counts);
    if (signals.stopped() && running != nullptr) running->Stop(BatchRun::StopKind::kPause);
  };
  BatchRun run(std::move(run_options));
  running = &run;
  const uint64_t before = run.counts().completed + run.counts().failed;
  const absl::Time began = Clock::Real().Now();
  const auto end = run.Run();
  progress.Clear();
  const BatchCounts counts = run.counts();
  Report(counts, Clock::Real().Now() - began, before);
  TP_RETURN_IF_ERROR(end.status());
  if (*end != BatchRun::End::kComplete) {
    spdlog::warn("stopped with {} lines left; the same command goes on with {}", counts.left(),
                 options.output);
    return 1;
  }
  return counts.failed == 0 ? 0 : 1;
}

absl::StatusOr<int> Execute(const Options& options, const ConfigFlags& flags, const StopSignals& signals) {
  TP_ASSIGN_OR_RETURN(const absl::Duration patience, ParsePositive("--retry-for", options.retry_for));
  TP_ASSIGN_OR_RETURN(const absl::Duration timeout, ParsePositive("--timeout", options.timeout));
  BatchProgress progress;
  TP_ASSIGN_OR_RETURN(const InputIndex index, ReadInput(options.input, progress, signals));
  const OutputPaths paths(options.output);
  TP_RETURN_IF_ERROR(Claim(paths, index, options));
  DoneLines done;
  TP_ASSIGN_OR_RETURN(auto log, OpenOutput(options.ordered ? paths.unordered : paths.output, index, done));
  int code = done.failed == 0 ? 0 : 1;
  if (done.completed + done.failed < index.lines().size()) {
    std::unique_ptr<EmbeddedCluster> cluster;
    std::string endpoint = options.endpoint;
    if (endpoint.empty()) {
      TP_ASSIGN_OR_RETURN(const LoadedConfig config, flags.Load(ConfigRole::kServe));
      TP_ASSIGN_OR_RETURN(cluster, EmbeddedCluster::Start(config, signals.stopped()));
      endpoint = cluster->endpoint();
    }
    TP_ASSIGN_OR_RETURN(const auto transport, Connect(options, endpoint, timeout, signals, patience));
    TP_ASSIGN_OR_RETURN(
        code, RunLines(options, index, *transport, patience, progress, signals, std::move(done), *log));
  } else {
    spdlog::info("nothing to do: every line of {} has its answer in {}", options.input, paths.output);
  }
  log.reset();
  if (options.ordered) TP_RETURN_IF_ERROR(PutInOrder(index, paths.unordered, paths.output));
  return code;
}

int Run(const Options& options, const ConfigFlags& flags) {
  std::string level = "info";
  if (options.endpoint.empty()) {
    const auto config = flags.Load(ConfigRole::kServe);
    if (!config.ok()) return ReportError(config.status());
    level = config->config.log.level;
  }
  if (const absl::Status status = InitLogging("run-batch", level); !status.ok()) return ReportError(status);
  const StopSignals signals;
  const auto code = Execute(options, flags, signals);
  if (code.ok()) return *code;
  ReportError(code.status());
  // An output that is another run's is the caller's to mend, too.
  return absl::IsFailedPrecondition(code.status()) ? 2 : ExitCode(code.status());
}

}  // namespace

void AddRunBatchCommand(CLI::App& app, Command& run) {
  CLI::App* command = app.add_subcommand(
      "run-batch",
      "Answer a file of requests (OpenAI's batch format): lines {\"custom_id\", \"method\": \"POST\", "
      "\"url\", "
      "\"body\"}\n"
      "to lines {\"id\", \"custom_id\", \"response\", \"error\"}, in the order in which they are done. "
      "Requests that\n"
      "share a prefix run together. A run that was killed goes on where it was when it is started again.");
  command->footer(
      "Without --endpoint a private `tidepool serve` runs for the duration, with --config and --model; "
      "--help-all\n"
      "lists every field. OUT.journal says which input the output belongs to. Refusals (429, 503) are waited "
      "out,\n"
      "lines that cannot be read or answered become lines with \"error\".\n"
      "Exit codes: 0 every line was answered; 1 some have errors, or the run was stopped; 2 usage, "
      "configuration,\n"
      "custom_ids that are not unique, an output of another input.");
  const auto options = std::make_shared<Options>();
  command->add_option("-i,--input", options->input, "Requests, a JSON object a line")
      ->required()
      ->type_name("FILE");
  command->add_option("-o,--output", options->output, "Answers; appended to, never overwritten")
      ->required()
      ->type_name("OUT");
  CLI::Option* endpoint =
      command
          ->add_option("--endpoint", options->endpoint, "An OpenAI-compatible server, as http://host:8000/v1")
          ->type_name("URL");
  command->add_option("--api-key-env", options->api_key_env, "Variable that holds the endpoint's API key")
      ->type_name("VAR");
  command->add_option("--ca-file", options->ca_file, "PEM certificates to trust, for https")
      ->type_name("FILE");
  command
      ->add_option("--concurrency", options->concurrency, "Requests in flight at most; fewer after refusals")
      ->check(CLI::Range(1u, 65536u))
      ->capture_default_str();
  command->add_option("--order", options->order, "prefix (requests that share one together) or file")
      ->check(CLI::IsMember({"prefix", "file"}))
      ->capture_default_str();
  command->add_flag("--ordered", options->ordered,
                    "Answers in the input's order, written when all are there");
  command->add_option("--retry-for", options->retry_for, "How long one line is tried again when refused")
      ->type_name("DURATION")
      ->capture_default_str();
  command->add_option("--timeout", options->timeout, "Of one request")
      ->type_name("DURATION")
      ->capture_default_str();
  const auto flags = ConfigFlags::AddTo(*command);
  command->callback([&run, command, options, flags, endpoint] {
    if (endpoint->count() > 0) {
      for (const Field& field : Fields()) {
        const CLI::Option* option = field.secret ? nullptr : command->get_option_no_throw(field.flag());
        if (option != nullptr && option->count() > 0) {
          throw CLI::ValidationError(field.flag(),
                                     "is for a cluster of one's own; leave out --endpoint or this");
        }
      }
      if (command->get_option("--config")->count() > 0) {
        throw CLI::ValidationError("--config", "is for a cluster of one's own; leave out --endpoint or this");
      }
    }
    run = [options, flags] { return Run(*options, *flags); };
  });
}

}  // namespace tidepool
