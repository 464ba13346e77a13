// `tidepool ctl`: asks a running cluster over gRPC.
#include <signal.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iostream>
#include <iterator>
#include <map>
#include <optional>
#include <thread>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "base/clock.h"
#include "base/status.h"
#include "server/cli/commands.h"
#include "server/cli/config_flags.h"
#include "server/cli/ctl_client.h"
#include "server/cli/ctl_config.h"
#include "server/cli/ctl_kv.h"
#include "server/cli/output.h"
#include "server/cli/runtime_file.h"

namespace tidepool {
namespace {

using nlohmann::ordered_json;

constexpr absl::Duration kLookAgain = absl::Milliseconds(100);

struct Options : CtlOptions {
  std::string argument;  // of the subcommand
  bool evacuate = false;
  std::string evacuate_time = "30s";
  bool end_process = false;
  uint32_t max = 20;
  std::string role;
  std::string wait_flag;  // "": not given, kWaitAlone: for as long as --wait of ctl says, else a duration
};

constexpr char kWaitAlone[] = "true";

ordered_json WorkerRows(const v1::ClusterReply& cluster) {
  ordered_json rows = ordered_json::array();
  for (const v1::WorkerView& worker : cluster.workers()) {
    rows.push_back(
        {{"worker", worker.address().worker_id()},
         {"role", CtlRoleName(worker.role())},
         {"state", worker.state()},
         {"grpc", worker.address().grpc()},
         {"pid", worker.address().pid()},
         {"running", worker.running()},
         {"waiting", worker.waiting()},
         {"queued_prefill_tokens", worker.queued_prefill_tokens()},
         {"slots_free", worker.slots_free()},
         {"slots_total", worker.slots_total()},
         {"seconds_since_report", worker.seconds_since_report()},
         {"next_role", worker.next_role() == v1::ROLE_UNSPECIFIED ? "" : CtlRoleName(worker.next_role())}});
  }
  return rows;
}

// How long a command that may wait does; nullopt: not at all.
absl::StatusOr<std::optional<absl::Duration>> WaitOf(const CtlClient& client, const Options& options) {
  if (options.wait_flag.empty()) return std::nullopt;
  if (options.wait_flag == kWaitAlone) return client.target().wait;
  absl::Duration limit;
  if (!absl::ParseDuration(options.wait_flag, &limit) || limit <= absl::ZeroDuration()) {
    return absl::InvalidArgumentError(
        absl::StrCat("--wait=", options.wait_flag, " is no duration; write --wait=30s, or --wait"));
  }
  return limit;
}

// Until `done` says so; DeadlineExceeded with what it says of how it stands.
absl::Status WaitUntil(absl::Duration limit,
                       const std::function<absl::StatusOr<bool>(std::string& stands)>& done) {
  const absl::Time end = Clock::Real().Now() + limit;
  for (;;) {
    std::string stands;
    TP_ASSIGN_OR_RETURN(const bool is, done(stands));
    if (is) return absl::OkStatus();
    if (Clock::Real().Now() >= end) {
      return absl::DeadlineExceededError(
          absl::StrCat("not done after ", absl::FormatDuration(limit), ": ", stands, "; it goes on"));
    }
    std::this_thread::sleep_for(absl::ToChronoNanoseconds(kLookAgain));
  }
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
  Unreached unreached;
  size_t asked = 0;
  for (const v1::WorkerView& worker : cluster.workers()) {
    if (worker.state() == "lost") continue;  // nobody to ask
    ++asked;
    const auto described = client.Describe(worker.address());
    if (!described.ok()) {
      if (!unreached.Note(worker.address(), described.status())) return described.status();
      continue;
    }
    const v1::DescribeReply& pool = *described;
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
  return unreached.Report(options, asked);
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

// Says nothing but that nobody answers just now. A server that ends cancels the calls that it still has.
bool NoAnswer(const absl::Status& status) {
  return absl::IsUnavailable(status) || absl::IsDeadlineExceeded(status) || absl::IsCancelled(status);
}

// What the scheduler knows of a worker that was told to end.
enum class Gone { kNo, kUnlisted, kReplaced };
absl::StatusOr<Gone> IsGone(CtlClient& client, const v1::WorkerAddress& worker) {
  TP_ASSIGN_OR_RETURN(const v1::ClusterReply cluster, client.Cluster());
  for (const v1::WorkerView& listed : cluster.workers()) {
    if (listed.address().worker_id() != worker.worker_id()) continue;
    if (listed.address().pid() != worker.pid() || listed.address().grpc() != worker.grpc()) {
      return Gone::kReplaced;
    }
    return listed.state() == "lost" ? Gone::kUnlisted : Gone::kNo;
  }
  return Gone::kUnlisted;
}

absl::Status Drain(CtlClient& client, const Options& options) {
  TP_ASSIGN_OR_RETURN(const auto wait, WaitOf(client, options));
  TP_ASSIGN_OR_RETURN(const v1::ClusterReply cluster, client.Cluster());
  TP_ASSIGN_OR_RETURN(const v1::WorkerView worker, FindWorker(cluster, options.argument));
  if (options.evacuate) {
    const absl::Status status = Evacuate(client, options);
    // Nobody to take the blocks is no reason to keep a worker: losing them costs time only.
    if (!status.ok() && !absl::IsResourceExhausted(status)) return status;
    if (!status.ok()) std::fprintf(stderr, "%s\n", std::string(status.message()).c_str());
  }
  TP_RETURN_IF_ERROR(client.Drain(worker.address(), options.end_process));
  if (!wait) return absl::OkStatus();
  return WaitUntil(*wait, [&](std::string& stands) -> absl::StatusOr<bool> {
    const auto described = client.Describe(worker.address());
    if (options.end_process) {
      // Gone, as was asked for: nobody answers, and the scheduler does not count on it either; or somebody
      // has started it again.
      const auto gone = IsGone(client, worker.address());
      if (!gone.ok() && !NoAnswer(gone.status())) return gone.status();
      if (gone.ok() && (*gone == Gone::kReplaced ||
                        (*gone == Gone::kUnlisted && absl::IsUnavailable(described.status())))) {
        return true;
      }
    }
    if (NoAnswer(described.status())) {
      stands = std::string(described.status().message());
      return false;
    }
    TP_RETURN_IF_ERROR(described.status());
    stands = absl::StrCat(options.argument, " has ", described->running(), " running and ",
                          described->waiting(), " waiting requests");
    return !options.end_process && described->running() + described->waiting() + described->offers() == 0;
  });
}

// A worker becomes another kind of worker.
absl::Status SetRole(CtlClient& client, const Options& options) {
  const std::map<std::string, v1::Role> roles = {
      {"prefill", v1::ROLE_PREFILL}, {"decode", v1::ROLE_DECODE}, {"both", v1::ROLE_BOTH}};
  const v1::Role wanted = roles.at(options.role);  // CLI11 has checked it
  TP_ASSIGN_OR_RETURN(const auto wait, WaitOf(client, options));
  TP_ASSIGN_OR_RETURN(const v1::ClusterReply cluster, client.Cluster());
  TP_ASSIGN_OR_RETURN(const v1::WorkerView worker, FindWorker(cluster, options.argument));
  if (worker.role() == v1::ROLE_STORE) {
    return absl::InvalidArgumentError(options.argument +
                                      " is a store: it has no model and cannot become a worker");
  }
  TP_ASSIGN_OR_RETURN(v1::SetRoleReply now, client.SetRole(worker.address(), wanted));
  if (wait) {
    // Until requests are placed on it as what it is now: the worker's own word and the scheduler's.
    TP_RETURN_IF_ERROR(WaitUntil(*wait, [&](std::string& stands) -> absl::StatusOr<bool> {
      const auto described = client.Describe(worker.address());
      const auto again = client.Cluster();
      for (const absl::Status& status : {described.status(), again.status()}) {
        if (NoAnswer(status)) {
          stands = std::string(status.message());
          return false;  // not yet
        }
        TP_RETURN_IF_ERROR(status);
      }
      TP_ASSIGN_OR_RETURN(const v1::WorkerView seen, FindWorker(*again, options.argument));
      now.set_role(described->role());
      now.set_next_role(described->next_role());
      stands = absl::StrCat(options.argument, " is a ", CtlRoleName(described->role()), " worker with ",
                            described->running(), " running and ", described->waiting(), " waiting requests");
      return described->role() == wanted && described->next_role() == v1::ROLE_UNSPECIFIED &&
             seen.role() == wanted && seen.state() == "ready";
    }));
  }
  const bool changing = now.next_role() != v1::ROLE_UNSPECIFIED;
  if (options.output == "json") {
    PrintJson({{"worker", options.argument},
               {"role", CtlRoleName(now.role())},
               {"next_role", changing ? CtlRoleName(now.next_role()) : ""}});
  } else if (changing) {
    std::printf("%s: %s worker, %s when what it has is done\n", options.argument.c_str(),
                CtlRoleName(now.role()), CtlRoleName(now.next_role()));
  } else {
    std::printf("%s: %s worker\n", options.argument.c_str(), CtlRoleName(now.role()));
  }
  return absl::OkStatus();
}

// What the cluster's workers should be.
absl::Status Advice(CtlClient& client, const Options& options) {
  TP_ASSIGN_OR_RETURN(const v1::ClusterReply cluster, client.Cluster());
  const v1::Elasticity& e = cluster.elasticity();
  if (e.mode().empty() || e.mode() == "off") {
    return absl::FailedPreconditionError(
        "this scheduler gives no advice: scheduler.elasticity is off; set it to advise or act");
  }
  const ordered_json advice = {{"mode", e.mode()},
                               {"prefill", e.prefill()},
                               {"decode", e.decode()},
                               {"wanted_prefill", e.wanted_prefill()},
                               {"wanted_decode", e.wanted_decode()},
                               {"prefill_pressure", e.prefill_pressure()},
                               {"decode_pressure", e.decode_pressure()},
                               {"worker", e.worker()},
                               {"role", e.worker().empty() ? "" : CtlRoleName(e.role())},
                               {"reason", e.reason()},
                               {"flips", e.flips()},
                               {"refused", e.refused()}};
  if (options.output == "json") {
    PrintJson(advice);
    return absl::OkStatus();
  }
  std::printf("%s\n\n", e.reason().c_str());
  ordered_json table = ordered_json::array();
  for (const auto& [name, value] : advice.items()) {
    if (name != "reason") table.push_back({{"what", name}, {"value", value}});
  }
  std::printf("%s", FormatTable(table).c_str());
  return absl::OkStatus();
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
  v1::DecisionsRequest request;
  request.set_max(options.max);
  TP_ASSIGN_OR_RETURN(const v1::DecisionsReply reply, client.Decisions(request));
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
  const CtlTarget& target = client.target();
  if (target.serve == 0) {
    return absl::UnavailableError(
        "no `tidepool serve` of this user runs here; send SIGHUP to the processes of the roles, or change "
        "the cluster's configuration with `ctl config apply`");
  }
  if (!target.serve_reloads) {
    return absl::FailedPreconditionError(
        absl::StrCat("process ", target.serve,
                     " (serve) is of a version that does not read its configuration again; restart it"));
  }
  // Not SIGHUP, by which a terminal ends what was started from it.
  if (kill(target.serve, SIGUSR1) != 0) {
    return absl::UnavailableError(
        absl::StrCat("process ", target.serve, " (serve) cannot be signalled: ", std::strerror(errno)));
  }
  // The gateway first: only it has keys and certificates, too.
  ordered_json rows = ordered_json::array();
  for (const bool gateway : {true, false}) {
    for (const ChildStatus& child : target.children) {
      if ((child.name == "gateway") != gateway || child.pid <= 0) continue;
      rows.push_back({{"process", child.name}, {"pid", child.pid}, {"asked", true}});
    }
  }
  CtlPrint(options, rows);
  if (options.output != "json") {
    std::puts(
        "Their logs, tidepool_config_updates_total and the gateway's tidepool_config_reloads_total say what "
        "became of it.");
  }
  return absl::OkStatus();
}

using Action = absl::Status (*)(CtlClient&, const Options&);

// --wait may have a value, so that the parser takes whatever follows it for one: a word that is no duration
// is the command's own first word that is missing then. RequiredError: one is.
void SettleWait(const CLI::App& command, Options& options, bool role) {
  if (options.wait_flag.empty() && command.get_option("--wait")->count() > 0) options.wait_flag = kWaitAlone;
  absl::Duration ignored;
  const bool short_of_one = role ? options.role.empty() : options.argument.empty();
  const bool another = !options.wait_flag.empty() && options.wait_flag != kWaitAlone &&
                       !absl::ParseDuration(options.wait_flag, &ignored);
  if (short_of_one && another) {
    if (role) options.role = options.argument;
    options.argument = std::exchange(options.wait_flag, kWaitAlone);
  }
  if (options.argument.empty()) throw CLI::RequiredError("WORKER");
  if (!role) return;
  if (options.role.empty()) throw CLI::RequiredError("ROLE");
  if (options.role != "prefill" && options.role != "decode" && options.role != "both") {
    throw CLI::ValidationError("ROLE", options.role + " is none of prefill, decode, both");
  }
}

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
                                   Action action, const std::function<void(const CLI::App&)>& settle = {}) {
    CLI::App* command = parent->add_subcommand(name, help);
    command->fallthrough();
    command->callback([&run, options, action, settle, command] {
      if (!command->get_subcommands().empty()) return;  // one of those is meant
      if (settle) settle(*command);
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
  CLI::App* drain =
      add(ctl, "drain", "A worker refuses new requests and finishes those it has", Drain,
          [options](const CLI::App& command) { SettleWait(command, *options, /*role=*/false); });
  drain->add_option("WORKER", options->argument, "As `ctl workers` names it (required)")->type_name("");
  drain->add_flag("--evacuate", options->evacuate,
                  "First copy blocks that only it holds to others, the most used ones first");
  drain->add_option("--evacuate-time", options->evacuate_time, "At most so long [30s]")->type_name("");
  drain->add_flag("--end", options->end_process, "Its process ends by itself when nothing runs any more");
  drain
      ->add_option("--wait", options->wait_flag,
                   "Return when nothing runs there any more, with --end when it has ended; --wait 30s: at "
                   "most so long")
      ->expected(0, 1)
      ->type_name("");
  CLI::App* role =
      add(ctl, "role", "A worker becomes a prefill or decode worker, or both, when what it has is done",
          SetRole, [options](const CLI::App& command) { SettleWait(command, *options, /*role=*/true); });
  role->add_option("WORKER", options->argument, "As `ctl workers` names it (required)")->type_name("");
  role->add_option("ROLE", options->role, "prefill, decode or both (required)")->type_name("");
  role->add_option("--wait", options->wait_flag,
                   "Return when requests are placed on it as such; --wait 30s: at most so long")
      ->expected(0, 1)
      ->type_name("");
  add(ctl, "advice", "Which kind of worker is short, and which worker should change", Advice);
  CLI::App* config = ctl->add_subcommand("config", "Configuration of what runs");
  config->require_subcommand(1)->fallthrough();
  add(config, "reload",
      "`serve` reads its configuration again: what can change while it runs, the gateway's keys and "
      "certificates",
      ReloadConfig);
  AddCtlConfigCommands(*config, options, run);
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
  add(route, "recent", "The last decisions, predicted beside measured", Recent)
      ->add_option("--max", options->max, "So many, the latest first [20]")
      ->check(CLI::Range(1u, 4096u))
      ->type_name("");
}

}  // namespace tidepool
