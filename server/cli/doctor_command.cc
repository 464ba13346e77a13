// `tidepool doctor`: will `serve` or a worker of a cluster work on this machine, and if not, why.
#include <cstdio>

#include "absl/strings/str_cat.h"
#include "base/log.h"
#include "server/cli/commands.h"
#include "server/cli/config_flags.h"
#include "server/cli/ctl_client.h"
#include "server/cli/doctor.h"
#include "server/cli/doctor_checks.h"
#include "server/cli/output.h"

namespace tidepool {
namespace {

struct DoctorOptions {
  std::string output = "table";
  bool quick = false;
  CtlOptions cluster;
};

// What the workers of a running cluster say of their model, next to this configuration's; nothing to say
// where none runs.
std::vector<Finding> AskCluster(const DoctorOptions& options, const LoadedConfig& loaded,
                                const absl::StatusOr<ModelSeen>& local) {
  const auto target = FindCtlTarget(options.cluster, loaded);
  if (!target.ok()) {
    return {Ok("cluster", "not compared: " + std::string(target.status().message()))};
  }
  CtlClient client(*target);
  const auto cluster = client.Cluster();
  if (!cluster.ok()) {
    const bool refused = absl::IsUnauthenticated(cluster.status());
    return {Warn("cluster",
                 absl::StrCat("scheduler ", target->scheduler, ": ", std::string(cluster.status().message()),
                              refused ? "; set TIDEPOOL_CLUSTER_TOKEN" : ""))};
  }
  if (!local.ok()) return {};
  std::vector<ModelSeen> others;
  std::vector<Finding> out;
  for (const v1::WorkerView& worker : cluster->workers()) {
    const std::string who = absl::StrCat("worker ", worker.address().worker_id());
    const auto described = client.Describe(worker.address());
    if (described.ok()) {
      others.push_back({who, described->model(), described->version()});
    } else {
      out.push_back(Warn("cluster", absl::StrCat(who, " does not answer at ", worker.address().grpc(), ": ",
                                                 std::string(described.status().message()))));
    }
  }
  if (others.empty() && out.empty()) {
    out.push_back(Ok("cluster", absl::StrCat("scheduler ", target->scheduler, " has no workers")));
  }
  for (Finding& finding : CompareModels(*local, others)) out.push_back(std::move(finding));
  return out;
}

int Run(const ConfigFlags& flags, const DoctorOptions& options) {
  auto loaded = flags.Load(ConfigRole::kServe);
  if (!loaded.ok()) return ReportError(loaded.status());
  Config& config = loaded->config;
  // Standard output is the report's.
  if (absl::Status s = InitLogging("doctor", config.log.level == "info" ? "warn" : config.log.level);
      !s.ok()) {
    return ReportError(s);
  }
  if (config.model.path.empty()) config.model.path = DemoModelPath();
  std::vector<Finding> findings;
  const auto add = [&](std::vector<Finding> found) {
    for (Finding& finding : found) findings.push_back(std::move(finding));
  };
  // First, as long as this process has no threads: it forks.
  std::vector<Finding> bandwidth;
  if (!options.quick) {
    bandwidth.push_back(MeasureTransport(config.transport));
    bandwidth.push_back(MeasureArena(config.transport));
  }
  for (Finding& finding : Diagnose(config)) findings.push_back(std::move(finding));
  add(std::move(bandwidth));
  if (!options.quick && !config.kv.disk.path.empty()) {
    findings.push_back(MeasureDisk(config.kv));
  }
  const absl::StatusOr<ModelSeen> local =
      config.model.path.empty() ? absl::NotFoundError("no model") : LocalModel(config);
  if (!local.ok() && !config.model.path.empty()) {
    findings.push_back(Fail("model", std::string(local.status().message())));
  }
  if (local.ok()) add(CompareDisk(config.kv, *local));
  add(AskCluster(options, *loaded, local));

  nlohmann::ordered_json rows = nlohmann::ordered_json::array();
  bool failed = false;
  for (const Finding& finding : findings) {
    failed |= finding.level == Finding::kFail;
    rows.push_back(
        {{"check", finding.check}, {"result", LevelName(finding.level)}, {"detail", finding.detail}});
  }
  if (options.output == "json") {
    PrintJson(rows);
  } else {
    std::fputs(FormatTable(rows).c_str(), stdout);
  }
  return failed ? 1 : 0;
}

}  // namespace

void AddDoctorCommand(CLI::App& app, Command& run) {
  CLI::App* command = app.add_subcommand(
      "doctor", "Check CPU, memory, limits, ports, transports, clock, disk, model and cluster");
  const auto flags = ConfigFlags::AddTo(*command);
  const auto options = std::make_shared<DoctorOptions>();
  command->add_option("-o,--output", options->output, "table or json")
      ->check(CLI::IsMember({"table", "json"}));
  command->add_flag("--quick", options->quick, "Measure neither the disk nor the transport");
  command->add_option("--scheduler", options->cluster.scheduler,
                      "HOST:PORT of the scheduler whose workers are compared with this configuration");
  command->callback([&run, flags, options] { run = [=] { return Run(*flags, *options); }; });
}

}  // namespace tidepool
