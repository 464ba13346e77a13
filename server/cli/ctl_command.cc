// `tidepool ctl`: asks a running cluster over gRPC.
#include <signal.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iostream>
#include <iterator>
#include <map>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "config/address.h"
#include "server/cli/commands.h"
#include "server/cli/config_flags.h"
#include "server/cli/output.h"
#include "server/cli/runtime_file.h"
#include "server/rpc/rpc.h"
#include "tidepool/v1/cluster.grpc.pb.h"

namespace tidepool {
namespace {

using nlohmann::ordered_json;

struct Options {
  std::string scheduler;
  std::string timeout = "5s";
  std::string output = "table";
  std::string argument;  // of the subcommand
};

// Where to call and with which token.
struct Target {
  std::string scheduler;
  std::string token;
  absl::Duration timeout;
  std::vector<ChildStatus> children;  // of a `serve` on this machine; empty for a cluster
};

absl::StatusOr<Target> FindTarget(const Options& options, const LoadedConfig& loaded) {
  Target target;
  target.token = loaded.config.cluster.token;
  if (!absl::ParseDuration(options.timeout, &target.timeout) || target.timeout <= absl::ZeroDuration()) {
    return absl::InvalidArgumentError(
        absl::StrCat("--timeout '", options.timeout, "' is not a duration; write 5s"));
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
  return target;
}

// Client: the calls of ctl, each with the token and a deadline.
class Client {
 public:
  explicit Client(Target target) : target_(std::move(target)) {}

  absl::StatusOr<v1::ClusterReply> Cluster() {
    const auto stub = v1::Scheduler::NewStub(channels_.Get(target_.scheduler));
    return Call<v1::ClusterReply>(target_.scheduler,
                                  [&](grpc::ClientContext* context, v1::ClusterReply* reply) {
                                    return stub->Cluster(context, v1::ClusterRequest(), reply);
                                  });
  }
  absl::StatusOr<v1::ExplainReply> Explain(const v1::PlaceRequest& request) {
    const auto stub = v1::Scheduler::NewStub(channels_.Get(target_.scheduler));
    return Call<v1::ExplainReply>(target_.scheduler,
                                  [&](grpc::ClientContext* context, v1::ExplainReply* reply) {
                                    return stub->Explain(context, request, reply);
                                  });
  }
  absl::StatusOr<v1::DescribeReply> Describe(const v1::WorkerAddress& worker) {
    const auto stub = v1::Worker::NewStub(channels_.Get(worker.grpc()));
    return Call<v1::DescribeReply>(worker.worker_id(),
                                   [&](grpc::ClientContext* context, v1::DescribeReply* reply) {
                                     return stub->Describe(context, v1::DescribeRequest(), reply);
                                   });
  }
  absl::Status Drain(const v1::WorkerAddress& worker) {
    const auto stub = v1::Worker::NewStub(channels_.Get(worker.grpc()));
    return Call<v1::DrainReply>(worker.worker_id(),
                                [&](grpc::ClientContext* context, v1::DrainReply* reply) {
                                  return stub->Drain(context, v1::DrainRequest(), reply);
                                })
        .status();
  }
  const Target& target() const { return target_; }

 private:
  template <typename Reply, typename Rpc>
  absl::StatusOr<Reply> Call(const std::string& peer, Rpc rpc) {
    grpc::ClientContext context;
    AddClusterToken(context, target_.token);
    SetTimeout(context, target_.timeout);
    Reply reply;
    TP_RETURN_IF_ERROR(Annotate(FromGrpc(rpc(&context, &reply)), peer));
    return reply;
  }

  const Target target_;
  ChannelCache channels_;
};

const char* RoleName(v1::Role role) {
  switch (role) {
    case v1::ROLE_PREFILL:
      return "prefill";
    case v1::ROLE_DECODE:
      return "decode";
    case v1::ROLE_BOTH:
      return "both";
    default:
      return "unknown";
  }
}

ordered_json WorkerRows(const v1::ClusterReply& cluster) {
  ordered_json rows = ordered_json::array();
  for (const v1::WorkerView& worker : cluster.workers()) {
    rows.push_back({{"worker", worker.address().worker_id()},
                    {"role", RoleName(worker.role())},
                    {"state", worker.state()},
                    {"grpc", worker.address().grpc()},
                    {"pid", worker.address().pid()},
                    {"running", worker.running()},
                    {"waiting", worker.waiting()},
                    {"queued_prefill_tokens", worker.queued_prefill_tokens()},
                    {"slots_free", worker.slots_free()},
                    {"slots_total", worker.slots_total()},
                    {"seconds_since_report", worker.seconds_since_report()}});
  }
  return rows;
}

void Print(const Options& options, const ordered_json& rows) {
  if (options.output == "json") {
    PrintJson(rows);
  } else {
    std::fputs(FormatTable(rows).c_str(), stdout);
  }
}

absl::Status Status(Client& client, const Options& options) {
  TP_ASSIGN_OR_RETURN(const v1::ClusterReply cluster, client.Cluster());
  std::map<std::string, int> states;
  uint64_t running = 0, waiting = 0;
  for (const v1::WorkerView& worker : cluster.workers()) {
    ++states[absl::StrCat(RoleName(worker.role()), " ", worker.state())];
    running += worker.running();
    waiting += worker.waiting();
  }
  ordered_json processes = ordered_json::array();
  for (const ChildStatus& child : client.target().children) {
    const auto http = child.ready.find("http");
    processes.push_back({{"process", child.name},
                         {"state", StateName(child.state)},
                         {"pid", child.pid},
                         {"restarts", child.restarts},
                         {"http", http == child.ready.end() ? "" : http->second}});
  }
  const ordered_json status = {{"scheduler", client.target().scheduler},
                               {"model", cluster.model().name()},
                               {"fingerprint", cluster.model().fingerprint()},
                               {"max_model_len", cluster.model().max_model_len()},
                               {"block_tokens", cluster.model().block_tokens()},
                               {"workers", states},
                               {"running", running},
                               {"waiting", waiting},
                               {"processes", processes}};
  if (options.output == "json") {
    PrintJson(status);
    return absl::OkStatus();
  }
  std::vector<std::vector<std::string>> rows;
  for (const auto& [key, value] : status.items()) {
    if (key == "processes") continue;
    rows.push_back({key, value.is_string() ? value.get<std::string>() : value.dump()});
  }
  std::fputs(FormatTable({"cluster", ""}, rows).c_str(), stdout);
  if (!processes.empty()) std::fputs(("\n" + FormatTable(processes)).c_str(), stdout);
  return absl::OkStatus();
}

absl::Status Workers(Client& client, const Options& options) {
  TP_ASSIGN_OR_RETURN(const v1::ClusterReply cluster, client.Cluster());
  Print(options, WorkerRows(cluster));
  return absl::OkStatus();
}

absl::Status Kv(Client& client, const Options& options) {
  TP_ASSIGN_OR_RETURN(const v1::ClusterReply cluster, client.Cluster());
  ordered_json rows = ordered_json::array();
  for (const v1::WorkerView& worker : cluster.workers()) {
    if (worker.state() == "lost") continue;  // nobody to ask
    TP_ASSIGN_OR_RETURN(const v1::DescribeReply pool, client.Describe(worker.address()));
    rows.push_back({{"worker", worker.address().worker_id()},
                    {"role", RoleName(worker.role())},
                    {"slots_total", pool.slots_total()},
                    {"slots_free", pool.slots_free()},
                    {"slots_leased", pool.slots_leased()},
                    {"slots_quarantined", pool.slots_quarantined()},
                    {"published_blocks", pool.published_blocks()},
                    {"indexed_blocks", worker.indexed_blocks()},
                    {"offers", pool.offers()}});
  }
  Print(options, rows);
  return absl::OkStatus();
}

absl::Status Drain(Client& client, const Options& options) {
  TP_ASSIGN_OR_RETURN(const v1::ClusterReply cluster, client.Cluster());
  std::vector<std::string> known;
  for (const v1::WorkerView& worker : cluster.workers()) {
    if (worker.address().worker_id() == options.argument) return client.Drain(worker.address());
    known.push_back(worker.address().worker_id());
  }
  return absl::InvalidArgumentError(
      absl::StrCat("no worker '", options.argument, "'; there are: ", absl::StrJoin(known, ", ")));
}

// {"prompt_tokens": 512, "max_tokens": 64, "keys": ["<64 hex digits>", ...], "tenant": "default"}
absl::StatusOr<v1::PlaceRequest> ReadPlaceRequest(const std::string& file) {
  std::ifstream opened;
  if (file != "-") opened.open(file);
  std::istream& in = file == "-" ? std::cin : opened;
  if (!in) return absl::NotFoundError(file + " cannot be read");
  const std::string text{std::istreambuf_iterator<char>(in), {}};
  const auto parsed = nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!parsed.is_object()) return absl::InvalidArgumentError(file + ": is no JSON object");
  v1::PlaceRequest request;
  request.set_request_id("explain");
  request.set_tenant("default");
  request.set_max_tokens(16);
  for (const auto& [key, value] : parsed.items()) {
    const bool count = value.is_number_unsigned() && value.get<uint64_t>() <= UINT32_MAX;
    if (key == "prompt_tokens" && count) {
      request.set_prompt_tokens(value.get<uint32_t>());
    } else if (key == "max_tokens" && count) {
      request.set_max_tokens(value.get<uint32_t>());
    } else if (key == "tenant" && value.is_string()) {
      request.set_tenant(value.get<std::string>());
    } else if (key == "keys" && value.is_array()) {
      for (const auto& hex : value) {
        const bool digest = hex.is_string() && hex.get<std::string>().size() == 64;
        const std::string bytes = digest ? absl::HexStringToBytes(hex.get<std::string>()) : "";
        if (bytes.size() != 32) return absl::InvalidArgumentError(file + ": keys must be 64 hex digits each");
        request.add_keys(bytes);
      }
    } else {
      return absl::InvalidArgumentError(absl::StrCat(
          file, ": '", key,
          "' is unknown or of a wrong type; known are prompt_tokens and max_tokens (whole numbers), ",
          "keys (list of 64 hex digits), tenant (text)"));
    }
  }
  if (request.prompt_tokens() == 0) return absl::InvalidArgumentError(file + ": prompt_tokens is missing");
  return request;
}

absl::Status Explain(Client& client, const Options& options) {
  TP_ASSIGN_OR_RETURN(const v1::PlaceRequest request, ReadPlaceRequest(options.argument));
  TP_ASSIGN_OR_RETURN(const v1::ExplainReply reply, client.Explain(request));
  ordered_json candidates = ordered_json::array();
  for (const v1::Candidate& c : reply.candidates()) {
    candidates.push_back({{"chosen", c.chosen()},
                          {"worker", c.worker_id()},
                          {"kind", c.kind()},
                          {"cached_tokens", c.cached_tokens()},
                          {"fetched_tokens", c.fetched_tokens()},
                          {"queue_seconds", c.queue_seconds()},
                          {"fetch_seconds", c.fetch_seconds()},
                          {"compute_seconds", c.compute_seconds()},
                          {"total_seconds", c.total_seconds()},
                          {"itl_seconds", c.itl_seconds()},
                          {"note", c.note()}});
  }
  const bool rejected = reply.has_rejection();
  const std::string verdict =
      rejected ? "rejected: " + reply.rejection().reason() : reply.placement().reason();
  if (options.output == "json") {
    PrintJson({{"rejected", rejected}, {"reason", verdict}, {"candidates", candidates}});
    return absl::OkStatus();
  }
  std::printf("%s\n\n%s", verdict.c_str(), FormatTable(candidates).c_str());
  return absl::OkStatus();
}

absl::Status ReloadConfig(Client& client, const Options& options) {
  ordered_json rows = ordered_json::array();
  for (const ChildStatus& child : client.target().children) {
    if (child.name != "gateway" || child.pid <= 0) continue;
    if (kill(child.pid, SIGHUP) != 0) {
      return absl::UnavailableError(absl::StrCat("process ", child.pid, " (", child.name,
                                                 ") cannot be signalled: ", std::strerror(errno)));
    }
    rows.push_back({{"process", child.name}, {"pid", child.pid}, {"asked", true}});
  }
  if (rows.empty()) {
    return absl::UnavailableError(
        "no gateway of a `tidepool serve` of this user runs here; send SIGHUP to the gateway's process");
  }
  Print(options, rows);
  if (options.output != "json") {
    std::puts("The gateway's log and tidepool_config_reloads_total say what became of it.");
  }
  return absl::OkStatus();
}

using Action = absl::Status (*)(Client&, const Options&);

}  // namespace

void AddCtlCommand(CLI::App& app, Command& run) {
  CLI::App* ctl = app.add_subcommand("ctl", "Ask a running cluster");
  ctl->require_subcommand(1);
  const auto options = std::make_shared<Options>();
  ctl->add_option("--scheduler", options->scheduler,
                  "HOST:PORT; default: TIDEPOOL_CLUSTER_SCHEDULER, else the `tidepool serve` of this user")
      ->type_name("");
  ctl->add_option("--timeout", options->timeout, "Of one call [5s]")->type_name("");
  ctl->add_option("-o,--output", options->output, "table or json")->check(CLI::IsMember({"table", "json"}));
  ctl->fallthrough();
  const auto add = [&run, options](CLI::App* parent, const std::string& name, const std::string& help,
                                   Action action) {
    CLI::App* command = parent->add_subcommand(name, help);
    command->fallthrough();
    command->callback([&run, options, action] {
      run = [=]() -> int {
        const auto loaded = LoadConfig({});
        if (!loaded.ok()) return ReportError(loaded.status());
        auto target = FindTarget(*options, *loaded);
        if (!target.ok()) return ReportError(target.status());
        Client client(*std::move(target));
        return ReportError(action(client, *options));
      };
    });
    return command;
  };
  add(ctl, "status", "Model, workers by state, processes", Status);
  add(ctl, "workers", "Every worker with its load", Workers);
  add(ctl, "kv", "Every worker's pool of KV blocks", Kv);
  CLI::App* drain = add(ctl, "drain", "A worker refuses new requests and finishes those it has", Drain);
  drain->add_option("WORKER", options->argument, "As `ctl workers` names it")->required()->type_name("");
  CLI::App* config = ctl->add_subcommand("config", "Configuration of what runs");
  config->require_subcommand(1)->fallthrough();
  add(config, "reload", "The gateway reads keys, limits and certificates again", ReloadConfig);
  CLI::App* route = ctl->add_subcommand("route", "Placement decisions");
  route->require_subcommand(1)->fallthrough();
  CLI::App* explain = add(route, "explain", "Where a request would go and why, without sending it", Explain);
  explain
      ->add_option("FILE", options->argument, "JSON with prompt_tokens, max_tokens, keys, tenant; - is stdin")
      ->required()
      ->type_name("");
}

}  // namespace tidepool
