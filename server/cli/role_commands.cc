// `tidepool scheduler | worker | gateway | store`: one role in this process.
#include <sched.h>
#include <unistd.h>

#include <atomic>
#include <memory>

#include "absl/strings/str_cat.h"
#include "base/clock.h"
#include "base/digest.h"
#include "base/log.h"
#include "config/address.h"
#include "server/cli/commands.h"
#include "server/cli/config_flags.h"
#include "server/cli/role_process.h"
#include "server/cluster/cluster_member.h"
#include "server/cluster/live_config.h"
#include "server/gateway/gateway_server.h"
#include "server/http/admin_server.h"
#include "server/kv/store_server.h"
#include "server/scheduler/scheduler_server.h"
#include "server/worker/worker.h"

namespace tidepool {
namespace {

// The configured host with the port that was really bound.
std::string Bound(const std::string& listen, int port) {
  HostPort address = ParseHostPort(listen).value_or(HostPort{"127.0.0.1", 0});
  address.port = static_cast<uint16_t>(port);
  return address.ToString();
}

// As etcd knows it.
v1::Member SchedulerMember(const std::string& address) {
  char host[256] = {};
  if (gethostname(host, sizeof host - 1) != 0) *host = '\0';
  v1::Member self;
  self.set_id(absl::StrCat("scheduler-", host, "-", getpid()));
  self.set_role("scheduler");
  self.set_address(address);
  self.set_version(TIDEPOOL_VERSION);
  self.set_pid(static_cast<uint32_t>(getpid()));
  self.set_host(host);
  return self;
}

// What outlives the role's server: it borrows them.
struct SchedulerParts {
  std::shared_ptr<ClusterMember> member;  // null: no etcd
  std::unique_ptr<SchedulerServer> server;
  std::unique_ptr<HttpServer> admin;
};

absl::StatusOr<RunningRole> StartScheduler(const Config& config, MetricRegistry& metrics) {
  auto parts = std::make_shared<SchedulerParts>();
  ClusterMember::Options membership;
  membership.config = config.cluster;
  membership.candidate = true;
  membership.watch_members = true;
  membership.boot_id = RandomHexId();
  membership.metrics = &metrics;
  TP_ASSIGN_OR_RETURN(parts->member, ClusterMember::StartIfConfigured(std::move(membership)));
  TP_ASSIGN_OR_RETURN(parts->server, SchedulerServer::Start(config.scheduler, config.cluster.token, metrics,
                                                            Clock::Real(), parts->member.get()));
  SchedulerServer* server = parts->server.get();
  if (parts->member) parts->member->Join(SchedulerMember(Bound(config.scheduler.listen, server->port())));
  auto draining = std::make_shared<std::atomic<bool>>(false);
  TP_ASSIGN_OR_RETURN(parts->admin, StartAdminServer(config.scheduler.metrics_listen, metrics, [=] {
                        ReadyReport report;
                        report.checks.emplace_back("serving", draining->load()  ? "draining"
                                                              : server->ready() ? ""
                                                                                : "not listening");
                        return report;
                      }));
  RunningRole running;
  running.ready = [server] { return server->ready(); };
  running.apply = [server](const Config& now) {
    server->Apply(now.scheduler);
    return absl::OkStatus();
  };
  running.begin_drain = [draining] { draining->store(true); };
  running.shutdown = [parts](absl::Duration grace) {
    if (parts->member) parts->member->Resign();  // another takes over while this one answers its last calls
    parts->server->Shutdown(grace);
    parts->admin->Shutdown(absl::Seconds(1));
  };
  running.info = {{"role", "scheduler"},
                  {"pid", absl::StrCat(getpid())},
                  {"grpc", Bound(config.scheduler.listen, server->port())},
                  {"http", Bound(config.scheduler.metrics_listen, parts->admin->port())}};
  return running;
}

struct WorkerParts {
  std::unique_ptr<WorkerServer> server;
};

absl::StatusOr<RunningRole> StartWorker(Config config, MetricRegistry& metrics) {
  if (config.engine.threads == 0) {
    cpu_set_t cpus;
    CPU_ZERO(&cpus);
    config.engine.threads = sched_getaffinity(0, sizeof cpus, &cpus) == 0 ? CPU_COUNT(&cpus) : 1;
  }
  auto parts = std::make_shared<WorkerParts>();
  TP_ASSIGN_OR_RETURN(parts->server, WorkerServer::Start(config, metrics));
  WorkerServer* server = parts->server.get();
  RunningRole running;
  running.ready = [server] { return server->ready(); };
  running.begin_drain = [server] { server->BeginDrain(); };
  running.shutdown = [parts](absl::Duration grace) { parts->server->Shutdown(grace); };
  running.wants_to_end = [server] { return server->wants_to_end(); };
  running.apply = [server](const Config& now) {
    server->Apply(now.kv);
    return absl::OkStatus();
  };
  running.info = {{"role", config.worker.role},
                  {"pid", absl::StrCat(getpid())},
                  {"id", server->id()},
                  {"grpc", Bound(config.worker.listen, server->port())},
                  {"http", Bound(config.worker.metrics_listen, server->metrics_port())}};
  return running;
}

struct GatewayParts {
  std::unique_ptr<GatewayServer> server;
};

absl::StatusOr<RunningRole> StartGateway(const Config& config, MetricRegistry& metrics) {
  auto parts = std::make_shared<GatewayParts>();
  TP_ASSIGN_OR_RETURN(parts->server, GatewayServer::Start(config, metrics));
  GatewayServer* server = parts->server.get();
  RunningRole running;
  running.ready = [server] { return server->ready(); };
  running.begin_drain = [server] { server->BeginDrain(); };
  running.shutdown = [parts](absl::Duration grace) { parts->server->Shutdown(grace); };
  running.apply = [server](const Config& now) { return server->Apply(now); };
  running.reload = [server] { (void)server->Reload(); };
  running.info = {{"role", "gateway"},
                  {"pid", absl::StrCat(getpid())},
                  {"http", Bound(config.gateway.http_listen, server->http_port())},
                  {"grpc", Bound(config.gateway.grpc_listen, server->grpc_port())}};
  if (server->metrics_port() != 0) {
    running.info["metrics"] = Bound(config.gateway.metrics_listen, server->metrics_port());
  }
  return running;
}

struct StoreParts {
  std::unique_ptr<StoreServer> server;
};

absl::StatusOr<RunningRole> StartStore(const Config& config, MetricRegistry& metrics) {
  auto parts = std::make_shared<StoreParts>();
  TP_ASSIGN_OR_RETURN(parts->server, StoreServer::Start(config, metrics));
  StoreServer* server = parts->server.get();
  RunningRole running;
  running.ready = [server] { return server->ready(); };
  running.begin_drain = [server] { server->BeginDrain(); };
  running.shutdown = [parts](absl::Duration grace) { parts->server->Shutdown(grace); };
  running.wants_to_end = [server] { return server->wants_to_end(); };
  running.apply = [server](const Config& now) {
    server->Apply(now.kv);
    return absl::OkStatus();
  };
  running.info = {{"role", "store"},
                  {"pid", absl::StrCat(getpid())},
                  {"id", server->id()},
                  {"grpc", Bound(config.store.listen, server->port())},
                  {"http", Bound(config.store.metrics_listen, server->metrics_port())}};
  return running;
}

using StartRole = absl::StatusOr<RunningRole> (*)(const Config&, MetricRegistry&);

// The role with a configuration that may change while it runs.
absl::StatusOr<RunningRole> StartLive(const std::shared_ptr<ConfigFlags>& flags, ConfigRole role,
                                      StartRole start, MetricRegistry& metrics) {
  LiveConfig::Options options;
  options.role = role;
  options.load = [flags, role](std::shared_ptr<const LoadedConfig> cluster) {
    return flags->Load(role, std::move(cluster));
  };
  options.metrics = &metrics;
  TP_ASSIGN_OR_RETURN(std::shared_ptr<LiveConfig> live, LiveConfig::Start(std::move(options)));
  TP_ASSIGN_OR_RETURN(RunningRole running, start(live->current().config, metrics));
  live->Run(running.apply);
  running.reload = [live, also = running.reload] {
    (void)live->Reload();
    if (also) also();
  };
  running.shutdown = [live, shutdown = running.shutdown](absl::Duration grace) {
    live->Stop();  // nothing changes under what is ending
    shutdown(grace);
  };
  return running;
}

void AddRole(CLI::App& app, Command& run, const std::string& name, const std::string& help,
             ConfigRole config_role, StartRole start) {
  CLI::App* command = app.add_subcommand(name, help);
  const auto flags = ConfigFlags::AddTo(*command);
  command->callback([&run, flags, name, config_role, start] {
    run = [=]() -> int {
      const auto loaded = flags->Load(config_role);
      if (!loaded.ok()) return ReportError(loaded.status());
      const Config& config = loaded->config;
      const std::string role = config_role == ConfigRole::kWorker ? config.worker.role : name;
      if (const absl::Status status = InitLogging(role, config.log.level); !status.ok())
        return ReportError(status);
      TakeReadyFd();
      MetricRegistry metrics;  // outlives the role
      return RunRole(role, config.cluster.drain_timeout,
                     [&] { return StartLive(flags, config_role, start, metrics); });
    };
  });
}

}  // namespace

void AddRoleCommands(CLI::App& app, Command& run) {
  AddRole(app, run, "gateway", "The front door: OpenAI-compatible HTTP and gRPC", ConfigRole::kGateway,
          StartGateway);
  AddRole(app, run, "scheduler", "Places requests on workers, refuses what would be late",
          ConfigRole::kScheduler, StartScheduler);
  AddRole(app, run, "worker", "Computes: --role prefill, decode or both", ConfigRole::kWorker,
          [](const Config& config, MetricRegistry& metrics) { return StartWorker(config, metrics); });
  AddRole(app, run, "store", "Holds KV blocks for the workers: memory and disk without a model",
          ConfigRole::kStore, StartStore);
}

}  // namespace tidepool
