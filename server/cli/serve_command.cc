// `tidepool serve`: scheduler, prefill worker, decode worker and gateway as supervised processes.
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <filesystem>

#include "absl/strings/str_cat.h"
#include "base/digest.h"
#include "base/log.h"
#include "config/address.h"
#include "config/cluster_document.h"
#include "config/fields.h"
#include "server/cli/commands.h"
#include "server/cli/config_flags.h"
#include "server/cli/role_process.h"
#include "server/cli/runtime_file.h"
#include "server/cli/supervisor.h"
#include "server/cluster/live_config.h"
#include "server/http/admin_server.h"
#include "server/model/model.h"
#include "server/model/template/chat_template.h"
#include "server/model/text/tokenizer.h"

namespace tidepool {
namespace {

// The source of what nobody configured.
constexpr char kDecidedHere[] = "serve";
// Prefill and decode.
constexpr uint32_t kWorkers = 2;

uint32_t UsableCores() {
  cpu_set_t cpus;
  CPU_ZERO(&cpus);
  return sched_getaffinity(0, sizeof cpus, &cpus) == 0 ? static_cast<uint32_t>(CPU_COUNT(&cpus)) : 1;
}

void Set(LoadedConfig& loaded, std::string_view path, const std::string& text) {
  const Field* field = FindField(path);
  TP_CHECK(field != nullptr && SetField(*field, text, loaded.config).ok());
  loaded.sources[std::string(path)] = kDecidedHere;
}

// $XDG_STATE_HOME/tidepool, else ~/.local/state/tidepool; empty where there is neither.
std::string StateDirectory() {
  const char* xdg = std::getenv("XDG_STATE_HOME");
  if (xdg != nullptr && *xdg == '/') return absl::StrCat(xdg, "/tidepool");
  const char* home = std::getenv("HOME");
  return home != nullptr && *home == '/' ? absl::StrCat(home, "/.local/state/tidepool") : "";
}

// What the children would refuse, said once and before any of them starts.
absl::Status CheckModelFiles(const ModelConfig& model) {
  TP_RETURN_IF_ERROR(CheckModel(model));
  const std::string& dir = model.tokenizer.empty() ? model.path : model.tokenizer;
  TP_ASSIGN_OR_RETURN(const auto tokenizer, Tokenizer::Load(dir));
  if (tokenizer->chat_template().empty()) return absl::OkStatus();
  return Annotate(ChatTemplate::Parse(tokenizer->chat_template()).status(), dir);
}

// What `serve` decides where nobody else did.
absl::Status Complete(LoadedConfig& loaded) {
  Config& config = loaded.config;
  if (config.model.path.empty()) {
    const std::string demo = DemoModelPath();
    if (demo.empty()) {
      return absl::NotFoundError("no model is configured and the demo model is not there; give --model DIR");
    }
    Set(loaded, "model.path", demo);
    if (config.model.name.empty()) Set(loaded, "model.name", "demo");
  }
  if (std::error_code error; !std::filesystem::is_directory(config.model.path, error)) {
    return absl::NotFoundError(absl::StrCat(loaded.Describe("model.path"), ": '", config.model.path,
                                            "' is not there; give a directory in Hugging Face layout"));
  }
  TP_RETURN_IF_ERROR(CheckModelFiles(config.model));
  if (config.cluster.token.empty()) Set(loaded, "cluster.token", RandomHexId());
  // Drawn here, so that a restarted gateway finds its tenants' cached prefixes again.
  if (config.gateway.server_key.empty()) Set(loaded, "gateway.server_key", RandomHexId() + RandomHexId());
  // Files and batches survive restarts: not in the runtime directory, which the next boot empties.
  if (config.gateway.batch_dir.empty()) {
    if (const std::string state = StateDirectory(); !state.empty())
      Set(loaded, "gateway.batch_dir", state + "/batch");
  }
  if (config.engine.threads == 0) {
    Set(loaded, "engine.threads", absl::StrCat(std::max(1u, UsableCores() / kWorkers)));
  }
  // A second `serve` on this machine must not clash over a port that no client needs to know.
  if (loaded.IsDefault("scheduler.listen")) Set(loaded, "scheduler.listen", "127.0.0.1:0");
  return absl::OkStatus();
}

// Children read everything from their environment: secrets stay off the command line, and a file that
// changed meanwhile cannot make a restarted child disagree with its siblings. What can change while they run
// they read from a file of ours, once SIGHUP has asked for it.
std::map<std::string, std::string> Environment(const LoadedConfig& loaded) {
  std::map<std::string, std::string> env;
  for (const Field& field : Fields()) {
    if (!loaded.IsDefault(field.path)) env[field.env()] = FormatField(field, loaded.config);
  }
  env[kReloadedConfigEnv] = ReloadedPath(getpid());
  return env;
}

std::string Learned(const std::map<std::string, ReadyInfo>& ready, const std::string& child,
                    const std::string& key) {
  const auto it = ready.find(child);
  if (it == ready.end() || it->second.count(key) == 0) return "";
  return it->second.at(key);
}

std::vector<ChildSpec> Children(const LoadedConfig& loaded) {
  const auto base = Environment(loaded);
  const auto child = [base](std::string name, int stage, std::vector<std::string> args, auto adjust) {
    return ChildSpec{name, stage, [=](const std::map<std::string, ReadyInfo>& ready) {
                       // The running binary, even where its file was replaced meanwhile.
                       ChildLaunch launch{"/proc/self/exe", {"tidepool"}, base};
                       launch.argv.insert(launch.argv.end(), args.begin(), args.end());
                       adjust(launch.env, ready);
                       return launch;
                     }};
  };
  using Env = std::map<std::string, std::string>;
  using Ready = std::map<std::string, ReadyInfo>;
  // A restarted child takes the port it had: others were told it.
  const auto keep = [](Env& env, const Ready& ready, const std::string& name, const std::string& key,
                       std::string_view path) {
    const std::string address = Learned(ready, name, key);
    if (!address.empty()) env[FindField(path)->env()] = address;
  };
  const auto know_scheduler = [](Env& env, const Ready& ready) {
    env[FindField("cluster.scheduler")->env()] = Learned(ready, "scheduler", "grpc");
  };
  std::vector<ChildSpec> children = {
      child("scheduler", 0, {"scheduler"},
            [keep](Env& env, const Ready& ready) {
              keep(env, ready, "scheduler", "grpc", "scheduler.listen");
              keep(env, ready, "scheduler", "http", "scheduler.metrics_listen");
            }),
      child("prefill", 1, {"worker", "--role", "prefill"}, know_scheduler),
      child("decode", 1, {"worker", "--role", "decode"}, know_scheduler),
      child("gateway", 2, {"gateway"},
            [keep, know_scheduler](Env& env, const Ready& ready) {
              know_scheduler(env, ready);
              keep(env, ready, "gateway", "http", "gateway.http_listen");
              keep(env, ready, "gateway", "grpc", "gateway.grpc_listen");
              keep(env, ready, "gateway", "metrics", "gateway.metrics_listen");
            }),
  };
  // Beside the workers: it waits for the first of them to say which model is served.
  if (loaded.config.serve.store) {
    children.insert(children.end() - 1, child("store", 1, {"store"}, know_scheduler));
  }
  return children;
}

const ChildStatus* Find(const std::vector<ChildStatus>& children, std::string_view name) {
  for (const ChildStatus& child : children) {
    if (child.name == name) return &child;
  }
  return nullptr;
}

std::string Value(const ReadyInfo& info, const std::string& key) {
  const auto it = info.find(key);
  return it == info.end() ? "" : it->second;
}

// What clients can connect to: a listener on all interfaces is reached through loopback.
std::string Reachable(const std::string& address) {
  auto parsed = ParseHostPort(address);
  if (parsed.ok() && (parsed->host == "0.0.0.0" || parsed->host == "::")) parsed->host = "127.0.0.1";
  return parsed.ok() ? parsed->ToString() : address;
}

// Where a process serves its metrics: apart from its other HTTP, if it says so.
std::string MetricsAddress(const ReadyInfo& ready) {
  const std::string apart = Value(ready, "metrics");
  return Reachable(apart.empty() ? Value(ready, "http") : apart);
}

void PrintBanner(const Config& config, const std::vector<ChildStatus>& children) {
  const std::string http = Reachable(Value(Find(children, "gateway")->ready, "http"));
  const std::string name = config.model.name.empty()
                               ? std::filesystem::path(config.model.path).filename().string()
                               : config.model.name;
  std::printf("tidepool %s serves %s (%s)\n", TIDEPOOL_VERSION, name.c_str(), config.model.path.c_str());
  std::printf("  HTTP  http://%s/v1    gRPC  %s    metrics  http://%s/metrics\n", http.c_str(),
              Reachable(Value(Find(children, "gateway")->ready, "grpc")).c_str(),
              MetricsAddress(Find(children, "gateway")->ready).c_str());
  for (const ChildStatus& child : children) {
    std::printf("  %-9s process %d, http://%s/metrics\n", child.name.c_str(), child.pid,
                MetricsAddress(child.ready).c_str());
  }
  std::printf(
      "Try:\n  curl http://%s/v1/chat/completions -H 'Content-Type: application/json' \\\n"
      "    -d '{\"model\": \"%s\", \"messages\": [{\"role\": \"user\", \"content\": \"Hello\"}]}'\n",
      http.c_str(), name.c_str());
  std::fflush(stdout);
}

// ServeProcess: the supervisor with its own HTTP, its runtime file and its readiness line.
class ServeProcess {
 public:
  using Load = std::function<absl::StatusOr<LoadedConfig>()>;
  // `load`: what is configured, read again, without what Complete decides.
  ServeProcess(LoadedConfig loaded, Load load)
      : loaded_(std::move(loaded)), config_(loaded_.config), load_(std::move(load)) {}

  absl::Status Run() {
    Supervisor::BlockSignals();
    signal(SIGPIPE, SIG_IGN);
    TakeReadyFd();
    Supervisor::Options options;
    options.policy.start_timeout = config_.cluster.start_timeout;
    options.policy.drain_timeout = config_.cluster.drain_timeout;
    options.metrics = &metrics_;
    options.on_change = [this](const auto& children) { Changed(children); };
    options.on_all_ready = [this](const auto& children) { AllReady(children); };
    options.on_hangup = [this] { Reload(); };
    RemoveRuntime(getpid());  // of another process that had this number, and was killed
    TP_RETURN_IF_ERROR(StartLive());
    Supervisor supervisor(options, Children(loaded_));
    SetReady("starting");
    TP_ASSIGN_OR_RETURN(admin_,
                        StartAdminServer(config_.serve.metrics_listen, metrics_, [this] { return Ready(); }));
    const absl::Status status = supervisor.Run();
    RemoveRuntime(getpid());
    admin_->Shutdown(absl::Seconds(1));
    return status;
  }

 private:
  absl::Status StartLive() {
    LiveConfig::Options options;
    options.role = ConfigRole::kServe;
    options.load = [this](std::shared_ptr<const LoadedConfig>) -> absl::StatusOr<LoadedConfig> {
      TP_ASSIGN_OR_RETURN(LoadedConfig again, load_());
      for (const auto& [path, source] : loaded_.sources) {
        if (source == kDecidedHere && again.IsDefault(path)) {
          Set(again, path, FormatField(*FindField(path), config_));
        }
      }
      return again;
    };
    options.metrics = &metrics_;
    TP_ASSIGN_OR_RETURN(live_, LiveConfig::Start(std::move(options)));
    live_->Run([](const Config& now) { return WriteReloaded(getpid(), FormatLiveFields(now)); });
    return absl::OkStatus();
  }

  // The children are told when this returns.
  void Reload() {
    ++reloads_;
    reloads_known_.clear();  // those that are gone with it
    for (const ChildStatus& child : children_) {
      if (child.pid <= 0) continue;
      // The supervisor tells those that are ready.
      reloads_known_[child.pid] = child.state == SupervisorCore::State::kReady ? reloads_ : reloads_ - 1;
    }
    (void)live_->Reload();
  }

  // Who was started before a reload, and was not ready yet when the others were told, is told now.
  void TellLate(const std::vector<ChildStatus>& children) {
    for (const ChildStatus& child : children) {
      if (child.pid <= 0) continue;
      const auto known = reloads_known_.emplace(child.pid, reloads_).first;
      if (child.state != SupervisorCore::State::kReady || known->second == reloads_) continue;
      known->second = reloads_;
      kill(child.pid, SIGHUP);
    }
  }

  ReadyReport Ready() {
    std::lock_guard lock(mu_);
    ReadyReport report;
    report.checks.emplace_back("children", not_ready_);
    return report;
  }

  void SetReady(std::string why_not) {
    std::lock_guard lock(mu_);
    not_ready_ = std::move(why_not);
  }

  std::string AdminAddress() const {
    HostPort address = ParseHostPort(config_.serve.metrics_listen).value_or(HostPort{"127.0.0.1", 0});
    address.port = static_cast<uint16_t>(admin_->port());
    return address.ToString();
  }

  void Changed(const std::vector<ChildStatus>& children) {
    TellLate(children);
    children_ = children;
    std::string why_not;
    for (const ChildStatus& child : children) {
      if (child.state != SupervisorCore::State::kReady)
        why_not = absl::StrCat(child.name, " is ", StateName(child.state));
    }
    SetReady(why_not);
    ServeRuntime runtime;
    runtime.pid = getpid();
    runtime.http = Value(Find(children, "gateway")->ready, "http");
    runtime.grpc = Value(Find(children, "gateway")->ready, "grpc");
    runtime.scheduler = Value(Find(children, "scheduler")->ready, "grpc");
    runtime.token = config_.cluster.token;
    runtime.metrics = AdminAddress();
    runtime.children = children;
    const absl::Status status = WriteRuntime(runtime);
    if (!status.ok() && !runtime_failed_) {
      runtime_failed_ = true;  // said once: `ctl` then needs --scheduler and the token
      spdlog::warn("no runtime file for ctl: {}", std::string(status.message()));
    }
  }

  void AllReady(const std::vector<ChildStatus>& children) {
    PrintBanner(config_, children);
    ReportReady({{"role", "serve"},
                 {"pid", absl::StrCat(getpid())},
                 {"http", Value(Find(children, "gateway")->ready, "http")},
                 {"grpc", Value(Find(children, "gateway")->ready, "grpc")},
                 {"metrics", AdminAddress()}});
  }

  const LoadedConfig loaded_;
  const Config& config_;
  const Load load_;
  MetricRegistry metrics_;
  // Of Run's thread.
  std::unique_ptr<LiveConfig> live_;
  int reloads_ = 0;
  std::vector<ChildStatus> children_;   // as last heard of
  std::map<pid_t, int> reloads_known_;  // when a child was first seen, or told late
  std::unique_ptr<HttpServer> admin_;
  bool runtime_failed_ = false;
  std::mutex mu_;
  std::string not_ready_;  // guarded by mu_
};

}  // namespace

void AddServeCommand(CLI::App& app, Command& run) {
  CLI::App* command = app.add_subcommand(
      "serve", "Everything on this machine: scheduler, prefill and decode worker, gateway, supervised");
  command->footer(
      "Without --model it serves the demo model: share/tidepool/demo_model beside the executable's folder,\n"
      "else tools/demo_model/model of the source tree.");
  const auto flags = ConfigFlags::AddTo(*command);
  command->callback([&run, flags] {
    run = [=]() -> int {
      auto loaded = flags->Load(ConfigRole::kServe);
      if (!loaded.ok()) return ReportError(loaded.status());
      if (const absl::Status status = InitLogging("serve", loaded->config.log.level); !status.ok()) {
        return ReportError(status);
      }
      if (const absl::Status status = Complete(*loaded); !status.ok()) return ReportError(status);
      return ReportError(
          ServeProcess(*std::move(loaded), [flags] { return flags->Load(ConfigRole::kServe); }).Run());
    };
  });
}

}  // namespace tidepool
