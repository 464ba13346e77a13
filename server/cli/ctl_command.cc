// `tidepool ctl`: asks a running cluster over gRPC.
#include <signal.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <iterator>
#include <map>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "base/status.h"
#include "server/cli/commands.h"
#include "server/cli/config_flags.h"
#include "server/cli/ctl_client.h"
#include "server/cli/ctl_kv.h"
#include "server/cli/output.h"
#include "server/cli/runtime_file.h"

namespace tidepool {
namespace {

using nlohmann::ordered_json;

struct Options : CtlOptions {
  std::string argument;  // of the subcommand
  bool evacuate = false;
  std::string evacuate_time = "30s";
};

ordered_json WorkerRows(const v1::ClusterReply& cluster) {
  ordered_json rows = ordered_json::array();
  for (const v1::WorkerView& worker : cluster.workers()) {
    rows.push_back({{"worker", worker.address().worker_id()},
                    {"role", CtlRoleName(worker.role())},
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

absl::Status Status(CtlClient& client, const Options& options) {
  TP_ASSIGN_OR_RETURN(const v1::ClusterReply cluster, client.Cluster());
  std::map<std::string, int> states;
  uint64_t running = 0, waiting = 0;
  for (const v1::WorkerView& worker : cluster.workers()) {
    ++states[absl::StrCat(CtlRoleName(worker.role()), " ", worker.state())];
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
  ordered_json members = ordered_json::array();
  for (const v1::Member& member : cluster.members()) {
    members.push_back({{"role", member.role()},
                       {"id", member.id()},
                       {"address", member.address()},
                       {"host", member.host()},
                       {"pid", member.pid()},
                       {"version", member.version()},
                       {"model", member.fingerprint().substr(0, 12)}});
  }
  ordered_json status = {{"scheduler", client.target().scheduler},
                         {"model", cluster.model().name()},
                         {"fingerprint", cluster.model().fingerprint()},
                         {"max_model_len", cluster.model().max_model_len()},
                         {"block_tokens", cluster.model().block_tokens()},
                         {"workers", states},
                         {"running", running},
                         {"waiting", waiting},
                         {"processes", processes}};
  if (cluster.term() != 0) {
    status["term"] = cluster.term();
    status["etcd"] = cluster.etcd_reachable() ? "answers" : "does not answer: members as last seen";
    status["members"] = members;
  }
  if (options.output == "json") {
    PrintJson(status);
    return absl::OkStatus();
  }
  std::vector<std::vector<std::string>> rows;
  for (const auto& [key, value] : status.items()) {
    if (key == "processes" || key == "members") continue;
    rows.push_back({key, value.is_string() ? value.get<std::string>() : value.dump()});
  }
  std::fputs(FormatTable({"cluster", ""}, rows).c_str(), stdout);
  if (!processes.empty()) std::fputs(("\n" + FormatTable(processes)).c_str(), stdout);
  if (!members.empty()) std::fputs(("\n" + FormatTable(members)).c_str(), stdout);
  return absl::OkStatus();
}

absl::Status Workers(CtlClient& client, const Options& options) {
  TP_ASSIGN_OR_RETURN(const v1::ClusterReply cluster, client.Cluster());
  CtlPrint(options, WorkerRows(cluster));
  return absl::OkStatus();
}

absl::Status Kv(CtlClient& client, const Options& options) {
  TP_ASSIGN_OR_RETURN(const v1::ClusterReply cluster, client.Cluster());
  ordered_json rows = ordered_json::array();
  for (const v1::WorkerView& worker : cluster.workers()) {
    if (worker.state() == "lost") continue;  // nobody to ask
    TP_ASSIGN_OR_RETURN(const v1::DescribeReply pool, client.Describe(worker.address()));
    rows.push_back({{"worker", worker.address().worker_id()},
                    {"role", CtlRoleName(worker.role())},
                    {"slots_total", pool.slots_total()},
                    {"slots_free", pool.slots_free()},
                    {"slots_leased", pool.slots_leased()},
                    {"slots_quarantined", pool.slots_quarantined()},
                    {"published_blocks", pool.published_blocks()},
                    {"indexed_blocks", worker.indexed_blocks()},
                    {"offers", pool.offers()}});
  }
  CtlPrint(options, rows);
  return absl::OkStatus();
}

// Copies what only this worker holds to others, as far as the time goes, and says how it goes on.
absl::Status Evacuate(CtlClient& client, const Options& options) {
  v1::EvacuateRequest request;
  request.set_worker_id(options.argument);
  absl::Duration limit;
  if (!absl::ParseDuration(options.evacuate_time, &limit) || limit <= absl::ZeroDuration() ||
      limit > absl::Hours(1)) {
    return absl::InvalidArgumentError(absl::StrCat("--evacuate-time '", options.evacuate_time,
                                                   "' is no duration of at most 1h; write 30s"));
  }
  request.set_max_seconds(absl::ToDoubleSeconds(limit));
  v1::ReplicateProgress last;
  const absl::Status status = client.Stream<v1::Scheduler, v1::ReplicateProgress>(
      client.target().scheduler, client.target().scheduler, &v1::Scheduler::Stub::Evacuate, request,
      limit + client.target().wait, [&](const v1::ReplicateProgress& progress) {
        last = progress;
        PrintProgress("evacuate", progress.copied(), progress.skipped(), progress.total(), progress.bytes());
        return true;
      });
  EndProgress();
  TP_RETURN_IF_ERROR(status);
  if (options.output == "json") {
    PrintJson({{"worker", options.argument},
               {"blocks", last.total()},
               {"copied", last.copied()},
               {"skipped", last.skipped()},
               {"bytes", last.bytes()},
               {"seconds", last.seconds()},
               {"note", last.note()}});
  } else {
    std::printf("%s: %u of %u blocks copied to others%s%s\n", options.argument.c_str(), last.copied(),
                last.total(), last.note().empty() ? "" : "; skipped ones: ", last.note().c_str());
  }
  return absl::OkStatus();
}

absl::Status Drain(CtlClient& client, const Options& options) {
  TP_ASSIGN_OR_RETURN(const v1::ClusterReply cluster, client.Cluster());
  TP_ASSIGN_OR_RETURN(const v1::WorkerView worker, FindWorker(cluster, options.argument));
  if (options.evacuate) {
    const absl::Status status = Evacuate(client, options);
    // Nobody to take the blocks is no reason to keep a worker: losing them costs time only.
    if (!status.ok() && !absl::IsResourceExhausted(status)) return status;
    if (!status.ok()) std::fprintf(stderr, "%s\n", std::string(status.message()).c_str());
  }
  return client.Drain(worker.address());
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

ordered_json DecisionRow(const v1::Decision& d) {
  return {{"request", d.request_id()},
          {"seconds_ago", d.seconds_ago()},
          {"tenant", d.tenant()},
          {"class", d.request_class()},
          {"outcome", d.outcome()},
          {"rejection", d.rejection()},
          {"prefill", d.prefill_worker()},
          {"decode", d.decode_worker()},
          {"fetched_from", d.holder()},
          {"prompt_tokens", d.prompt_tokens()},
          {"predicted_ttft_seconds", d.predicted_ttft_seconds()},
          {"ttft_seconds", d.ttft_seconds()},
          {"predicted_itl_seconds", d.predicted_itl_seconds()},
          {"itl_seconds", d.itl_seconds()},
          {"expected_output_tokens", d.expected_output_tokens()},
          {"output_tokens", d.output_tokens()},
          {"expected_cached_tokens", d.expected_cached_tokens()},
          {"cached_host_tokens", d.cached_host_tokens()},
          {"cached_remote_tokens", d.cached_remote_tokens()},
          {"cached_disk_tokens", d.cached_disk_tokens()},
          {"fetched_bytes", d.fetched_bytes()}};
}

// What was decided for one request, predicted beside measured.
absl::Status ExplainPast(CtlClient& client, const Options& options) {
  v1::DecisionsRequest request;
  request.set_request_id(options.argument);
  TP_ASSIGN_OR_RETURN(const v1::DecisionsReply reply, client.Decisions(request));
  if (reply.decisions_size() != 1) return absl::InternalError("the scheduler gave no decision");
  const ordered_json row = DecisionRow(reply.decisions(0));
  if (options.output == "json") {
    PrintJson(row);
    return absl::OkStatus();
  }
  ordered_json table = ordered_json::array();
  for (const auto& [name, value] : row.items()) table.push_back({{"what", name}, {"value", value}});
  std::printf("%s", FormatTable(table).c_str());
  return absl::OkStatus();
}

absl::Status Recent(CtlClient& client, const Options& options) {
  TP_ASSIGN_OR_RETURN(const v1::DecisionsReply reply, client.Decisions({}));
  ordered_json rows = ordered_json::array();
  for (const v1::Decision& d : reply.decisions()) {
    const ordered_json row = DecisionRow(d);
    if (options.output == "json") {
      rows.push_back(row);
      continue;
    }
    ordered_json few;
    for (const char* name : {"request", "seconds_ago", "outcome", "rejection", "prefill", "decode",
                             "predicted_ttft_seconds", "ttft_seconds", "itl_seconds"}) {
      few[name] = row[name];
    }
    rows.push_back(few);
  }
  if (options.output == "json") {
    PrintJson(rows);
  } else {
    std::printf("%s", FormatTable(rows).c_str());
  }
  return absl::OkStatus();
}

absl::Status Explain(CtlClient& client, const Options& options) {
  if (options.argument != "-" && !std::filesystem::exists(options.argument))
    return ExplainPast(client, options);
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

absl::Status ReloadConfig(CtlClient& client, const Options& options) {
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
  CtlPrint(options, rows);
  if (options.output != "json") {
    std::puts("The gateway's log and tidepool_config_reloads_total say what became of it.");
  }
  return absl::OkStatus();
}

using Action = absl::Status (*)(CtlClient&, const Options&);

}  // namespace

void AddCtlCommand(CLI::App& app, Command& run) {
  CLI::App* ctl = app.add_subcommand("ctl", "Ask a running cluster");
  ctl->require_subcommand(1);
  const auto options = std::make_shared<Options>();
  ctl->add_option("--scheduler", options->scheduler,
                  "HOST:PORT; default: TIDEPOOL_CLUSTER_SCHEDULER, else the `tidepool serve` of this user")
      ->type_name("");
  ctl->add_option("--timeout", options->timeout, "Of one call [5s]")->type_name("");
  ctl->add_option("--wait", options->wait, "Of one long operation [10m]")->type_name("");
  ctl->add_option("-o,--output", options->output, "table or json")->check(CLI::IsMember({"table", "json"}));
  ctl->fallthrough();
  const auto add = [&run, options](CLI::App* parent, const std::string& name, const std::string& help,
                                   Action action) {
    CLI::App* command = parent->add_subcommand(name, help);
    command->fallthrough();
    command->callback([&run, options, action, command] {
      if (!command->get_subcommands().empty()) return;  // one of those is meant
      run = [=]() -> int {
        const auto loaded = LoadConfig({});
        if (!loaded.ok()) return ReportError(loaded.status());
        auto target = FindCtlTarget(*options, *loaded);
        if (!target.ok()) return ReportError(target.status());
        CtlClient client(*std::move(target));
        return ReportError(action(client, *options));
      };
    });
    return command;
  };
  add(ctl, "status", "Model, workers by state, processes", Status);
  add(ctl, "workers", "Every worker with its load", Workers);
  CLI::App* kv = add(ctl, "kv", "Every worker's pool of KV blocks, and orders about it", Kv);
  AddCtlKvCommands(*kv, options, run);
  CLI::App* drain = add(ctl, "drain", "A worker refuses new requests and finishes those it has", Drain);
  drain->add_option("WORKER", options->argument, "As `ctl workers` names it")->required()->type_name("");
  drain->add_flag("--evacuate", options->evacuate,
                  "First copy blocks that only it holds to others, the most used ones first");
  drain->add_option("--evacuate-time", options->evacuate_time, "At most so long [30s]")->type_name("");
  CLI::App* config = ctl->add_subcommand("config", "Configuration of what runs");
  config->require_subcommand(1)->fallthrough();
  add(config, "reload", "The gateway reads keys, limits and certificates again", ReloadConfig);
  CLI::App* route = ctl->add_subcommand("route", "Placement decisions");
  route->require_subcommand(1)->fallthrough();
  CLI::App* explain = add(route, "explain",
                          "Where a request went and what came of it, or where one would go and why", Explain);
  explain
      ->add_option(
          "REQUEST", options->argument,
          "The id of a request of late; or a file: JSON with prompt_tokens, max_tokens, keys, tenant; - is "
          "stdin")
      ->required()
      ->type_name("");
  add(route, "recent", "The last decisions, predicted beside measured", Recent);
}

}  // namespace tidepool
