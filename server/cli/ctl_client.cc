#include "server/cli/ctl_client.h"

#include <cstdio>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/log.h"
#include "base/status.h"
#include "config/address.h"
#include "server/cli/output.h"
#include "server/cli/runtime_file.h"
#include "server/cluster/cluster_member.h"

namespace tidepool {
namespace {

absl::StatusOr<absl::Duration> ParsePositive(const std::string& flag, const std::string& text) {
  absl::Duration out;
  if (!absl::ParseDuration(text, &out) || out <= absl::ZeroDuration()) {
    return absl::InvalidArgumentError(absl::StrCat(flag, " '", text, "' is not a duration; write 5s"));
  }
  return out;
}

}  // namespace

absl::StatusOr<CtlTarget> FindCtlTarget(const CtlOptions& options, const LoadedConfig& loaded) {
  CtlTarget target;
  target.token = loaded.config.cluster.token;
  TP_ASSIGN_OR_RETURN(target.timeout, ParsePositive("--timeout", options.timeout));
  TP_ASSIGN_OR_RETURN(target.wait, ParsePositive("--wait", options.wait));
  if (options.scheduler.empty() && !loaded.config.cluster.etcd.empty()) {
    TP_ASSIGN_OR_RETURN(target.scheduler, FindLeader(loaded.config.cluster));
    return target;
  }
  if (!options.scheduler.empty() || !loaded.IsDefault("cluster.scheduler")) {
    target.scheduler = options.scheduler.empty() ? loaded.config.cluster.scheduler : options.scheduler;
    TP_RETURN_IF_ERROR(Annotate(ParseHostPort(target.scheduler).status(), "--scheduler"));
    return target;
  }
  std::vector<ServeRuntime> running = ListRuntimes();
  if (running.empty()) {
    return absl::UnavailableError("no `tidepool serve` of this user runs here; give --scheduler HOST:PORT");
  }
  if (running.size() > 1) {
    const auto name = [](std::string* out, const ServeRuntime& r) {
      absl::StrAppend(out, r.scheduler, " (process ", r.pid, ")");
    };
    return absl::InvalidArgumentError(
        "several `tidepool serve` run here; choose with --scheduler and "
        "TIDEPOOL_CLUSTER_TOKEN: " +
        absl::StrJoin(running, ", ", name));
  }
  if (running[0].scheduler.empty())
    return absl::UnavailableError("`tidepool serve` is still starting its scheduler");
  target.scheduler = running[0].scheduler;
  target.token = running[0].token;
  target.children = std::move(running[0].children);
  target.serve = running[0].pid;
  target.serve_reloads = running[0].reloads;
  return target;
}

absl::Status CtlClient::Annotated(const absl::Status& status, const std::string& peer) {
  return Annotate(status, peer);
}

absl::StatusOr<v1::ClusterReply> CtlClient::Cluster() {
  v1::ClusterReply reply;
  TP_RETURN_IF_ERROR(Unary<v1::Scheduler>(target_.scheduler, target_.scheduler, &v1::Scheduler::Stub::Cluster,
                                          v1::ClusterRequest(), &reply));
  return reply;
}

absl::StatusOr<v1::ExplainReply> CtlClient::Explain(const v1::PlaceRequest& request) {
  v1::ExplainReply reply;
  TP_RETURN_IF_ERROR(Unary<v1::Scheduler>(target_.scheduler, target_.scheduler, &v1::Scheduler::Stub::Explain,
                                          request, &reply));
  return reply;
}

absl::StatusOr<v1::DecisionsReply> CtlClient::Decisions(const v1::DecisionsRequest& request) {
  v1::DecisionsReply reply;
  TP_RETURN_IF_ERROR(Unary<v1::Scheduler>(target_.scheduler, target_.scheduler,
                                          &v1::Scheduler::Stub::Decisions, request, &reply));
  return reply;
}

absl::StatusOr<v1::WhereReply> CtlClient::Where(const v1::WhereRequest& request) {
  v1::WhereReply reply;
  TP_RETURN_IF_ERROR(Unary<v1::Scheduler>(target_.scheduler, target_.scheduler, &v1::Scheduler::Stub::Where,
                                          request, &reply));
  return reply;
}

absl::StatusOr<v1::DescribeReply> CtlClient::Describe(const v1::WorkerAddress& worker) {
  v1::DescribeReply reply;
  TP_RETURN_IF_ERROR(Unary<v1::Worker>(worker.grpc(), worker.worker_id(), &v1::Worker::Stub::Describe,
                                       v1::DescribeRequest(), &reply));
  return reply;
}

absl::Status CtlClient::Drain(const v1::WorkerAddress& worker, bool end_process) {
  v1::DrainRequest request;
  request.set_end_process(end_process);
  v1::DrainReply reply;
  return Unary<v1::Worker>(worker.grpc(), worker.worker_id(), &v1::Worker::Stub::Drain, request, &reply);
}

absl::StatusOr<v1::SetRoleReply> CtlClient::SetRole(const v1::WorkerAddress& worker, v1::Role role) {
  v1::SetRoleRequest request;
  request.set_role(role);
  v1::SetRoleReply reply;
  TP_RETURN_IF_ERROR(
      Unary<v1::Worker>(worker.grpc(), worker.worker_id(), &v1::Worker::Stub::SetRole, request, &reply));
  return reply;
}

bool Unreached::Note(const v1::WorkerAddress& worker, const absl::Status& status) {
  if (!absl::IsUnavailable(status) && !absl::IsDeadlineExceeded(status)) return false;
  workers_.emplace_back(worker.worker_id(), std::string(status.message()));
  return true;
}

std::string Unreached::Names() const {
  return absl::StrJoin(workers_, ", ",
                       [](std::string* out, const auto& worker) { absl::StrAppend(out, worker.first); });
}

absl::Status Unreached::Report(const CtlOptions& options, size_t asked) const {
  if (workers_.empty()) return absl::OkStatus();
  if (options.output == "json") {
    nlohmann::ordered_json list = nlohmann::ordered_json::array();
    for (const auto& [worker, reason] : workers_) list.push_back({{"worker", worker}, {"reason", reason}});
    const nlohmann::ordered_json line = {{"unreachable", list}};
    std::fprintf(stderr, "%s\n",
                 line.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace).c_str());
  } else {
    for (const auto& [worker, reason] : workers_) {
      std::fprintf(stderr, "%s\n", Printable(absl::StrCat("not reached: ", reason)).c_str());
    }
  }
  if (workers_.size() < asked) return absl::OkStatus();
  return absl::UnavailableError(absl::StrCat("none of ", asked, " workers answers"));
}

const char* CtlRoleName(v1::Role role) {
  switch (role) {
    case v1::ROLE_PREFILL:
      return "prefill";
    case v1::ROLE_DECODE:
      return "decode";
    case v1::ROLE_BOTH:
      return "both";
    case v1::ROLE_STORE:
      return "store";
    default:
      return "unknown";
  }
}

void CtlPrint(const CtlOptions& options, const nlohmann::ordered_json& rows) {
  if (options.output == "json") {
    PrintJson(rows);
  } else {
    std::fputs(FormatTable(rows).c_str(), stdout);
  }
}

absl::StatusOr<v1::WorkerView> FindWorker(const v1::ClusterReply& cluster, const std::string& worker_id) {
  std::vector<std::string> known;
  for (const v1::WorkerView& worker : cluster.workers()) {
    if (worker.address().worker_id() == worker_id) return worker;
    known.push_back(worker.address().worker_id());
  }
  return absl::InvalidArgumentError(
      absl::StrCat("no worker '", worker_id, "'; there are: ", absl::StrJoin(known, ", ")));
}

}  // namespace tidepool
