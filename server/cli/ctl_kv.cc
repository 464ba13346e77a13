// `tidepool ctl kv ...`: the pool's control API from a terminal.
#include "server/cli/ctl_kv.h"

#include <unistd.h>

#include <cstdio>
#include <fstream>
#include <iostream>
#include <memory>

#include "absl/strings/escaping.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/strip.h"
#include "base/digest.h"
#include "base/status.h"
#include "server/cli/config_flags.h"
#include "server/cli/output.h"

namespace tidepool {
namespace {

using nlohmann::ordered_json;

constexpr size_t kKeysMax = 65536;

struct KvOptions {
  std::shared_ptr<CtlOptions> ctl;
  CtlSelectorFlags blocks;
  std::string worker;  // empty: all
  std::string from, to;
  uint32_t copies = 0;
  bool to_disk = false;
  bool hard = false;
  bool disk = false;
  bool with_tokens = false;
  bool tenants = false;
  std::string ttl = "10m";
  uint64_t from_seq = 0;
  uint64_t count = 0;
  uint64_t bytes_per_second = 0;
};

std::string Hex(std::string_view bytes) {
  return absl::BytesToHexString(absl::string_view(bytes.data(), bytes.size()));
}

std::string_view TierText(int tier) {
  switch (tier) {
    case v1::KV_TIER_DEVICE:
      return "device";
    case v1::KV_TIER_DISK:
      return "disk";
    default:
      return "host";
  }
}

template <typename Tiers>
std::string TiersText(const Tiers& tiers) {
  return absl::StrJoin(tiers, "+",
                       [](std::string* out, int tier) { absl::StrAppend(out, TierText(tier).data()); });
}

absl::StatusOr<std::string> ParseKey(std::string_view flag, std::string_view hex) {
  const std::string text(hex);
  const std::string bytes = text.size() == 64 ? absl::HexStringToBytes(text) : "";
  const bool digits = text.find_first_not_of("0123456789abcdefABCDEF") == std::string::npos;
  if (bytes.size() != 32 || !digits) {
    return absl::InvalidArgumentError(
        absl::StrCat(std::string(flag), " '", text, "' is no block key; it has 64 hex digits"));
  }
  return bytes;
}

absl::Status ReadKeys(const std::string& file, v1::KvKeys* out) {
  std::ifstream opened;
  if (file != "-") opened.open(file);
  std::istream& in = file == "-" ? std::cin : opened;
  if (!in) return absl::InvalidArgumentError("--keys-file " + file + " cannot be read");
  for (std::string line; std::getline(in, line);) {
    const std::string text(absl::StripAsciiWhitespace(line));
    if (text.empty()) continue;
    TP_ASSIGN_OR_RETURN(const std::string key, ParseKey("--keys-file", text));
    out->add_keys(key);
    if (static_cast<size_t>(out->keys_size()) > kKeysMax)
      return absl::InvalidArgumentError("--keys-file " + file +
                                        " has more than 65536 keys; send it in parts");
  }
  if (out->keys().empty()) return absl::InvalidArgumentError("--keys-file " + file + " holds no key");
  return absl::OkStatus();
}

// Those that a command is for: all that are not lost, or the one named.
absl::StatusOr<std::vector<v1::WorkerView>> Workers(CtlClient& client, const std::string& only) {
  TP_ASSIGN_OR_RETURN(const v1::ClusterReply cluster, client.Cluster());
  if (!only.empty()) {
    TP_ASSIGN_OR_RETURN(v1::WorkerView worker, FindWorker(cluster, only));
    return std::vector<v1::WorkerView>{std::move(worker)};
  }
  std::vector<v1::WorkerView> out;
  for (const v1::WorkerView& worker : cluster.workers()) {
    if (worker.state() != "lost") out.push_back(worker);
  }
  if (out.empty()) return absl::UnavailableError("no worker is registered with the scheduler");
  return out;
}

// Whether the others' answers are worth having without this worker's: not where it was named.
bool Skip(const KvOptions& o, const v1::WorkerView& worker, const absl::Status& status,
          Unreached& unreached) {
  return !status.ok() && o.worker.empty() && unreached.Note(worker.address(), status);
}

// An order that some have not got is not done.
absl::Status AllReached(const Unreached& unreached, size_t asked) {
  if (unreached.empty()) return absl::OkStatus();
  return absl::AbortedError(
      absl::StrCat("not done on all of ", asked, " workers: not reached were ", unreached.Names()));
}

// What each tenant holds of each host tier, and may.
absl::Status TenantStats(CtlClient& client, const KvOptions& o) {
  TP_ASSIGN_OR_RETURN(const auto workers, Workers(client, o.worker));
  v1::KvStatsRequest request;
  request.set_with_tenants(true);
  ordered_json rows = ordered_json::array();
  Unreached unreached;
  for (const v1::WorkerView& worker : workers) {
    v1::KvStatsReply s;
    const absl::Status status = client.Unary<v1::Kv>(worker.address().grpc(), worker.address().worker_id(),
                                                     &v1::Kv::Stub::Stats, request, &s);
    if (Skip(o, worker, status, unreached)) continue;
    TP_RETURN_IF_ERROR(status);
    for (const v1::KvTenantUsage& usage : s.tenants()) {
      rows.push_back({{"worker", s.worker_id()},
                      {"role", CtlRoleName(worker.role())},
                      {"tenant", usage.tenant()},
                      {"host_bytes", usage.host_bytes()},
                      {"quota_bytes", usage.quota_bytes()}});
    }
  }
  CtlPrint(*o.ctl, rows);
  return unreached.Report(*o.ctl, workers.size());
}

absl::Status Stats(CtlClient& client, const KvOptions& o) {
  if (o.tenants) return TenantStats(client, o);

  TP_ASSIGN_OR_RETURN(const auto workers, Workers(client, o.worker));
  ordered_json rows = ordered_json::array();
  Unreached unreached;
  for (const v1::WorkerView& worker : workers) {
    v1::KvStatsReply s;
    const absl::Status status = client.Unary<v1::Kv>(worker.address().grpc(), worker.address().worker_id(),
                                                     &v1::Kv::Stub::Stats, v1::KvStatsRequest(), &s);
    if (Skip(o, worker, status, unreached)) continue;
    TP_RETURN_IF_ERROR(status);
    ordered_json row = {{"worker", s.worker_id()}, {"role", CtlRoleName(worker.role())}};
    // The same columns for all: a worker without a disk has zeros.
    v1::TierLoad host, disk;
    bool has_disk = false;
    for (const v1::TierLoad& t : s.tiers()) {
      if (t.tier() == v1::KV_TIER_HOST) host = t;
      if (t.tier() == v1::KV_TIER_DISK) {
        disk = t;
        has_disk = true;
      }
    }
    row["host_blocks"] = host.blocks();
    row["host_bytes"] = host.bytes_used();
    row["host_bytes_total"] = host.bytes_total();
    row["disk"] = !has_disk ? "none" : disk.healthy() ? "on" : "off";
    row["disk_blocks"] = disk.blocks();
    row["disk_bytes"] = disk.bytes_used();
    row["disk_bytes_total"] = disk.bytes_total();
    row["slots_free"] = s.slots_free();
    row["slots_evictable"] = s.slots_evictable();
    row["slots_leased"] = s.slots_leased();
    row["slots_quarantined"] = s.slots_quarantined();
    row["soft_pinned"] = s.soft_pinned();
    row["hard_pinned"] = s.hard_pinned();
    row["policy"] = s.policy();
    row["fetches"] = s.active_fetches();
    row["event_seq"] = s.event_seq();
    rows.push_back(std::move(row));
  }
  CtlPrint(*o.ctl, rows);
  return unreached.Report(*o.ctl, workers.size());
}

absl::Status Lookup(CtlClient& client, const KvOptions& o) {
  TP_ASSIGN_OR_RETURN(const auto workers, Workers(client, o.worker));
  v1::KvLookupRequest request;
  TP_ASSIGN_OR_RETURN(*request.mutable_blocks(), MakeSelector(o.blocks));
  ordered_json rows = ordered_json::array();
  Unreached unreached;
  for (const v1::WorkerView& worker : workers) {
    v1::KvLookupReply reply;
    const absl::Status status = client.Unary<v1::Kv>(worker.address().grpc(), worker.address().worker_id(),
                                                     &v1::Kv::Stub::Lookup, request, &reply);
    if (Skip(o, worker, status, unreached)) continue;
    TP_RETURN_IF_ERROR(status);
    rows.push_back({{"worker", worker.address().worker_id()},
                    {"role", CtlRoleName(worker.role())},
                    {"blocks", reply.blocks()},
                    {"host_blocks", reply.host_blocks()},
                    {"asked_blocks", reply.chain_blocks()},
                    {"tokens", uint64_t{reply.blocks()} * reply.block_tokens()}});
  }
  CtlPrint(*o.ctl, rows);
  return unreached.Report(*o.ctl, workers.size());
}

absl::Status Where(CtlClient& client, const KvOptions& o) {
  TP_ASSIGN_OR_RETURN(const auto workers, Workers(client, o.worker));
  v1::KvWhereRequest request;
  TP_ASSIGN_OR_RETURN(*request.mutable_blocks(), MakeSelector(o.blocks));
  request.set_with_tokens(o.with_tokens);
  ordered_json rows = ordered_json::array();
  Unreached unreached;
  uint64_t left_out = 0;
  for (const v1::WorkerView& worker : workers) {
    v1::KvWhereReply reply;
    const absl::Status status = client.Unary<v1::Kv>(worker.address().grpc(), worker.address().worker_id(),
                                                     &v1::Kv::Stub::Where, request, &reply);
    if (Skip(o, worker, status, unreached)) continue;
    TP_RETURN_IF_ERROR(status);
    left_out += reply.selected() - static_cast<uint64_t>(reply.blocks_size());
    for (const v1::KvBlock& block : reply.blocks()) {
      if (block.tiers().empty()) continue;
      ordered_json row = {{"key", Hex(block.key())},
                          {"worker", worker.address().worker_id()},
                          {"tiers", TiersText(block.tiers())},
                          {"position", block.position()},
                          {"tenant", block.tenant()},
                          {"session", block.session()},
                          {"turn", block.turn()},
                          {"compute_seconds", block.compute_seconds()},
                          {"parent", Hex(block.parent())}};
      if (o.with_tokens) row["tokens"] = std::vector<int32_t>(block.tokens().begin(), block.tokens().end());
      rows.push_back(std::move(row));
    }
  }
  CtlPrint(*o.ctl, rows);
  if (left_out > 0) {
    std::fprintf(stderr, "%llu more blocks match; a call shows 4096 a worker\n",
                 static_cast<unsigned long long>(left_out));
  }
  return unreached.Report(*o.ctl, workers.size());
}

absl::Status Pin(CtlClient& client, const KvOptions& o) {
  TP_ASSIGN_OR_RETURN(const auto workers, Workers(client, o.worker));
  v1::KvPinRequest request;
  TP_ASSIGN_OR_RETURN(*request.mutable_blocks(), MakeSelector(o.blocks));
  absl::Duration ttl;
  if (!absl::ParseDuration(o.ttl, &ttl) || ttl <= absl::ZeroDuration())
    return absl::InvalidArgumentError(absl::StrCat("--ttl '", o.ttl, "' is not a duration; write 10m"));
  request.set_ttl_seconds(absl::ToDoubleSeconds(ttl));
  request.set_kind(o.hard ? v1::KV_PIN_KIND_HARD : v1::KV_PIN_KIND_SOFT);
  ordered_json rows = ordered_json::array();
  Unreached unreached;
  for (const v1::WorkerView& worker : workers) {
    v1::KvPinReply reply;
    const absl::Status status = client.Unary<v1::Kv>(worker.address().grpc(), worker.address().worker_id(),
                                                     &v1::Kv::Stub::Pin, request, &reply);
    if (Skip(o, worker, status, unreached)) continue;
    TP_RETURN_IF_ERROR(status);
    rows.push_back(
        {{"worker", worker.address().worker_id()}, {"pinned", reply.pinned()}, {"missing", reply.missing()}});
  }
  CtlPrint(*o.ctl, rows);
  TP_RETURN_IF_ERROR(unreached.Report(*o.ctl, workers.size()));
  return AllReached(unreached, workers.size());
}

absl::Status Unpin(CtlClient& client, const KvOptions& o) {
  TP_ASSIGN_OR_RETURN(const auto workers, Workers(client, o.worker));
  v1::KvUnpinRequest request;
  TP_ASSIGN_OR_RETURN(*request.mutable_blocks(), MakeSelector(o.blocks));
  ordered_json rows = ordered_json::array();
  Unreached unreached;
  for (const v1::WorkerView& worker : workers) {
    v1::KvUnpinReply reply;
    const absl::Status status = client.Unary<v1::Kv>(worker.address().grpc(), worker.address().worker_id(),
                                                     &v1::Kv::Stub::Unpin, request, &reply);
    if (Skip(o, worker, status, unreached)) continue;
    TP_RETURN_IF_ERROR(status);
    rows.push_back({{"worker", worker.address().worker_id()}, {"unpinned", reply.unpinned()}});
  }
  CtlPrint(*o.ctl, rows);
  TP_RETURN_IF_ERROR(unreached.Report(*o.ctl, workers.size()));
  return AllReached(unreached, workers.size());
}

// A long operation on one worker, watched to its end; its row.
template <typename Method, typename Request>
absl::StatusOr<ordered_json> Watch(CtlClient& client, const v1::WorkerView& worker, const char* what,
                                   Method method, const Request& request) {
  v1::KvProgress last;
  const absl::Status status = client.Stream<v1::Kv, v1::KvProgress>(
      worker.address().grpc(), worker.address().worker_id(), method, request, client.target().wait,
      [&](const v1::KvProgress& progress) {
        last = progress;
        PrintProgress(what, progress.done(), progress.skipped(), progress.total(), progress.bytes());
        return true;
      });
  EndProgress();
  TP_RETURN_IF_ERROR(status);
  return ordered_json{{"worker", worker.address().worker_id()},
                      {"blocks", last.total()},
                      {"done", last.done()},
                      {"skipped", last.skipped()},
                      {"bytes", last.bytes()},
                      {"seconds", last.seconds()},
                      {"note", last.note()}};
}

// On one worker after another; `rounds` times where there are several.
template <typename Request, typename Method>
absl::Status OnEach(CtlClient& client, const KvOptions& o, const char* what, Method method,
                    const Request& request, size_t rounds = 1) {
  TP_ASSIGN_OR_RETURN(const auto workers, Workers(client, o.worker));
  if (workers.size() == 1) rounds = 1;
  ordered_json rows = ordered_json::array();
  std::vector<size_t> row_of(workers.size(), SIZE_MAX);
  std::vector<std::string> failures;
  for (size_t turn = 0; turn < rounds * workers.size(); ++turn) {
    const size_t i = turn % workers.size();
    const v1::WorkerView& worker = workers[i];
    if (turn >= workers.size() && row_of[i] == SIZE_MAX) continue;  // it failed
    absl::StatusOr<ordered_json> row = Watch(client, worker, what, method, request);
    if (row.ok() && row_of[i] == SIZE_MAX) {
      row_of[i] = rows.size();
      rows.push_back(*std::move(row));
      continue;
    }
    if (row.ok()) {
      ordered_json& sum = rows[row_of[i]];
      for (const char* field : {"blocks", "done", "skipped", "bytes"})
        sum[field] = sum[field].get<uint64_t>() + (*row)[field].get<uint64_t>();
      sum["seconds"] = sum["seconds"].get<double>() + (*row)["seconds"].get<double>();
      continue;
    }
    // The one that was named: that is the answer.
    if (!o.worker.empty()) return row.status();
    // A worker without a disk has nothing to prefetch.
    if (absl::IsFailedPrecondition(row.status())) continue;
    failures.push_back(worker.address().worker_id() + ": " + std::string(row.status().message()));
  }
  if (failures.size() == workers.size()) return absl::AbortedError(absl::StrJoin(failures, "; "));
  CtlPrint(*o.ctl, rows);
  if (failures.empty()) return absl::OkStatus();
  return absl::AbortedError(absl::StrCat(what, " failed on ", failures.size(), " of ", workers.size(),
                                         " workers: ", absl::StrJoin(failures, "; ")));
}

absl::Status Prefetch(CtlClient& client, const KvOptions& o) {
  v1::KvPrefetchRequest request;
  TP_ASSIGN_OR_RETURN(*request.mutable_blocks(), MakeSelector(o.blocks));
  return OnEach(client, o, "prefetch", &v1::Kv::Stub::Prefetch, request);
}

absl::Status Evict(CtlClient& client, const KvOptions& o) {
  v1::KvEvictRequest request;
  TP_ASSIGN_OR_RETURN(*request.mutable_blocks(), MakeSelector(o.blocks));
  request.add_tiers(v1::KV_TIER_HOST);
  if (o.disk) request.add_tiers(v1::KV_TIER_DISK);
  return OnEach(client, o, "evict", &v1::Kv::Stub::Evict, request);
}

absl::Status Clear(CtlClient& client, const KvOptions& o) {
  v1::KvClearRequest request;
  TP_ASSIGN_OR_RETURN(*request.mutable_blocks(), MakeSelector(o.blocks));
  // Twice: a worker that is cleared may fetch blocks back from one whose turn is still to come.
  return OnEach(client, o, "clear", &v1::Kv::Stub::Clear, request, /*rounds=*/2);
}

absl::Status Compress(CtlClient& client, const KvOptions& o) {
  v1::KvCompressRequest request;
  TP_ASSIGN_OR_RETURN(*request.mutable_blocks(), MakeSelector(o.blocks));
  request.set_bytes_per_second(o.bytes_per_second);
  return OnEach(client, o, "compress", &v1::Kv::Stub::Compress, request);
}

absl::StatusOr<v1::KvSelector> MakeKeys(const KvOptions& o) {
  TP_ASSIGN_OR_RETURN(v1::KvSelector selector, MakeSelector(o.blocks));
  if (!selector.has_keys())
    return absl::InvalidArgumentError("name blocks by --keys or --keys-file; `ctl kv where` lists keys");
  return selector;
}

absl::Status Copy(CtlClient& client, const KvOptions& o) {
  TP_ASSIGN_OR_RETURN(const v1::KvSelector selector, MakeKeys(o));
  TP_ASSIGN_OR_RETURN(const v1::ClusterReply cluster, client.Cluster());
  if (!o.from.empty()) {
    if (o.to.empty()) return absl::InvalidArgumentError("--from needs --to");
    TP_ASSIGN_OR_RETURN(const v1::WorkerView from, FindWorker(cluster, o.from));
    TP_ASSIGN_OR_RETURN(const v1::WorkerView to, FindWorker(cluster, o.to));
    v1::KvCopyRequest request;
    *request.mutable_keys() = selector.keys().keys();
    *request.mutable_from() = from.address();
    request.set_bytes_per_second(o.bytes_per_second);
    TP_ASSIGN_OR_RETURN(ordered_json row, Watch(client, to, "copy", &v1::Kv::Stub::Copy, request));
    CtlPrint(*o.ctl, ordered_json::array({std::move(row)}));
    return absl::OkStatus();
  }
  if (o.to.empty() == (o.copies == 0))
    return absl::InvalidArgumentError(
        "say where to: --to WORKER (and --from, if not from whoever is nearest), "
        "or --copies N");
  if (!o.to.empty()) TP_RETURN_IF_ERROR(FindWorker(cluster, o.to).status());
  v1::ReplicateRequest request;
  *request.mutable_keys() = selector.keys().keys();
  request.set_copies(o.copies);
  request.set_to(o.to);
  v1::ReplicateProgress last;
  const absl::Status status = client.Stream<v1::Scheduler, v1::ReplicateProgress>(
      client.target().scheduler, client.target().scheduler, &v1::Scheduler::Stub::Replicate, request,
      client.target().wait, [&](const v1::ReplicateProgress& progress) {
        last = progress;
        PrintProgress("copy", progress.copied(), progress.skipped(), progress.total(), progress.bytes());
        return true;
      });
  EndProgress();
  TP_RETURN_IF_ERROR(status);
  CtlPrint(*o.ctl, ordered_json::array({{{"worker", o.to.empty() ? "(chosen)" : o.to},
                                         {"blocks", last.total()},
                                         {"done", last.copied()},
                                         {"skipped", last.skipped()},
                                         {"bytes", last.bytes()},
                                         {"seconds", last.seconds()},
                                         {"note", last.note()}}}));
  return absl::OkStatus();
}

absl::Status Move(CtlClient& client, const KvOptions& o) {
  v1::KvMoveRequest request;
  TP_ASSIGN_OR_RETURN(*request.mutable_blocks(), MakeSelector(o.blocks));
  if (o.to_disk) {
    if (!o.from.empty() || !o.to.empty())
      return absl::InvalidArgumentError("--to-disk moves inside a worker: name it with --worker");
    return OnEach(client, o, "move", &v1::Kv::Stub::Move, request);
  }
  if (o.from.empty() || o.to.empty())
    return absl::InvalidArgumentError("say from where to where: --from WORKER --to WORKER, or --to-disk");
  TP_ASSIGN_OR_RETURN(const v1::ClusterReply cluster, client.Cluster());
  TP_ASSIGN_OR_RETURN(const v1::WorkerView from, FindWorker(cluster, o.from));
  TP_ASSIGN_OR_RETURN(const v1::WorkerView to, FindWorker(cluster, o.to));
  *request.mutable_from() = from.address();
  TP_ASSIGN_OR_RETURN(ordered_json row, Watch(client, to, "move", &v1::Kv::Stub::Move, request));
  CtlPrint(*o.ctl, ordered_json::array({std::move(row)}));
  return absl::OkStatus();
}

const char* KindText(v1::KvEvent::Kind kind) {
  switch (kind) {
    case v1::KvEvent::KIND_STORED:
      return "stored";
    case v1::KvEvent::KIND_REMOVED:
      return "removed";
    case v1::KvEvent::KIND_CLEARED:
      return "cleared";
    case v1::KvEvent::KIND_MOVED:
      return "moved";
    default:
      return "unknown";
  }
}

absl::Status Events(CtlClient& client, const KvOptions& o) {
  TP_ASSIGN_OR_RETURN(const auto workers, Workers(client, o.worker));
  if (workers.size() != 1) {
    return absl::InvalidArgumentError("--worker is needed: each worker numbers its own events; there are " +
                                      absl::StrJoin(workers, ", ", [](std::string* out, const auto& w) {
                                        absl::StrAppend(out, w.address().worker_id());
                                      }));
  }
  v1::KvSubscribeRequest request;
  request.set_from_seq(o.from_seq);
  request.set_with_tokens(o.with_tokens);
  const bool json = o.ctl->output == "json";
  uint64_t shown = 0;
  return client.Stream<v1::Kv, v1::KvEventBatch>(
      workers[0].address().grpc(), workers[0].address().worker_id(), &v1::Kv::Stub::Subscribe, request,
      absl::InfiniteDuration(), [&](const v1::KvEventBatch& batch) {
        for (const v1::KvEvent& e : batch.events()) {
          ordered_json line = {{"seq", e.seq()},
                               {"event", batch.snapshot() ? "snapshot" : KindText(e.kind())},
                               {"tier", std::string(TierText(e.tier()))},
                               {"key", Hex(e.key())}};
          if (e.kind() == v1::KvEvent::KIND_MOVED) line["from_tier"] = std::string(TierText(e.from_tier()));
          if (!e.parent().empty()) line["parent"] = Hex(e.parent());
          if (!e.tenant().empty()) line["tenant"] = e.tenant();
          if (e.session() != 0) line["session"] = e.session();
          if (o.with_tokens) line["tokens"] = std::vector<int32_t>(e.tokens().begin(), e.tokens().end());
          if (json) {
            std::puts(line.dump(-1, ' ', false, ordered_json::error_handler_t::replace).c_str());
          } else {
            std::printf("%-8llu %-8s %-6s %s\n", static_cast<unsigned long long>(e.seq()),
                        line["event"].get<std::string>().c_str(), line["tier"].get<std::string>().c_str(),
                        line["key"].get<std::string>().c_str());
          }
          if (++shown == o.count) return false;
        }
        if (batch.snapshot_end()) {
          if (json) {
            std::puts(ordered_json{
                {"event", "snapshot_end"}, {"seq", batch.snapshot_seq()}, {"boot_id", batch.boot_id()}}
                          .dump()
                          .c_str());
          } else {
            std::printf("-- as of event %llu, boot %s --\n",
                        static_cast<unsigned long long>(batch.snapshot_seq()), batch.boot_id().c_str());
          }
        }
        return std::fflush(stdout) == 0;
      });
}

using Action = absl::Status (*)(CtlClient&, const KvOptions&);

void AddSelector(CLI::App& command, CtlSelectorFlags& flags, bool chain_only) {
  command.add_option("--keys", flags.keys, "Block keys, 64 hex digits each, comma-separated")
      ->delimiter(',')
      ->type_name("");
  command.add_option("--keys-file", flags.keys_file, "One key a line; - is stdin")->type_name("");
  command
      .add_option("--tokens", flags.tokens, "Token ids, comma-separated: the sealed blocks of this prompt")
      ->delimiter(',')
      ->type_name("");
  command.add_option("--salt", flags.salt, "Of --tokens, in hex: the tenant's, as its gateway makes it")
      ->type_name("");
  command.add_option("--model", flags.model, "Only where this fingerprint is served")->type_name("");
  if (chain_only) return;
  command.add_option("--session", flags.session, "Blocks of this session (a number)")->type_name("");
  command.add_option("--tenant", flags.tenant, "Blocks of this tenant")->type_name("");
  command.add_flag("--all", flags.all, "Every block");
}

}  // namespace

void PrintProgress(const char* what, uint64_t done, uint64_t skipped, uint64_t total, uint64_t bytes) {
  static const bool terminal = isatty(STDERR_FILENO) == 1;
  if (!terminal) return;
  std::fprintf(stderr, "\r%s: %llu of %llu blocks, %llu skipped, %.1f MiB ", what,
               static_cast<unsigned long long>(done), static_cast<unsigned long long>(total),
               static_cast<unsigned long long>(skipped), static_cast<double>(bytes) / (1 << 20));
}

void EndProgress() {
  static const bool terminal = isatty(STDERR_FILENO) == 1;
  if (terminal) std::fputs("\n", stderr);
}

absl::StatusOr<v1::KvSelector> MakeSelector(const CtlSelectorFlags& flags) {
  const int ways = (flags.keys.empty() ? 0 : 1) + (flags.keys_file.empty() ? 0 : 1) +
                   (flags.tokens.empty() ? 0 : 1) + (flags.tenant.empty() ? 0 : 1) +
                   (flags.session.empty() ? 0 : 1) + (flags.all ? 1 : 0);
  if (ways != 1) {
    return absl::InvalidArgumentError(
        absl::StrCat(ways == 0 ? "no blocks are named" : "blocks are named in several ways",
                     "; give one of --keys, --keys-file, --tokens, --session, --tenant, --all"));
  }
  if (!flags.salt.empty() && flags.tokens.empty())
    return absl::InvalidArgumentError("--salt goes with --tokens");
  v1::KvSelector out;
  out.set_fingerprint(flags.model);
  for (const std::string& hex : flags.keys) {
    TP_ASSIGN_OR_RETURN(const std::string key, ParseKey("--keys", hex));
    out.mutable_keys()->add_keys(key);
  }
  if (!flags.keys_file.empty()) TP_RETURN_IF_ERROR(ReadKeys(flags.keys_file, out.mutable_keys()));
  if (!flags.tokens.empty()) {
    out.mutable_tokens()->mutable_tokens()->Add(flags.tokens.begin(), flags.tokens.end());
    if (flags.salt.size() % 2 != 0 ||
        flags.salt.find_first_not_of("0123456789abcdefABCDEF") != std::string::npos)
      return absl::InvalidArgumentError(absl::StrCat("--salt '", flags.salt, "' is not hex"));
    out.mutable_tokens()->set_salt(absl::HexStringToBytes(flags.salt));
  }
  if (!flags.tenant.empty()) out.set_tenant(flags.tenant);
  if (!flags.session.empty()) {
    uint64_t session = 0;
    const bool hex = flags.session.starts_with("0x");
    if (!(hex ? absl::SimpleHexAtoi(flags.session, &session) : absl::SimpleAtoi(flags.session, &session)) ||
        session == 0)
      return absl::InvalidArgumentError(
          absl::StrCat("--session '", flags.session, "' is no session; `ctl kv where` shows their numbers"));
    out.set_session(session);
  }
  if (flags.all) out.set_all(true);
  return out;
}

void AddCtlKvCommands(CLI::App& kv, const std::shared_ptr<CtlOptions>& options, Command& run) {
  kv.require_subcommand(0, 1);
  const auto add = [&](const std::string& name, const std::string& help, Action action) {
    CLI::App* command = kv.add_subcommand(name, help);
    command->fallthrough();
    auto o = std::make_shared<KvOptions>();
    o->ctl = options;
    command->callback([&run, o, action] {
      run = [=]() -> int {
        const auto loaded = LoadConfig({});
        if (!loaded.ok()) return ReportError(loaded.status());
        auto target = FindCtlTarget(*o->ctl, *loaded);
        if (!target.ok()) return ReportError(target.status());
        CtlClient client(*std::move(target));
        return ReportError(action(client, *o));
      };
    });
    return std::pair(command, o);
  };
  const auto on_worker = [](CLI::App* command, const std::shared_ptr<KvOptions>& o) {
    command->add_option("--worker", o->worker, "Only this one; default: all that are alive")->type_name("");
  };
  {
    auto [c, o] = add("stats", "Tiers, slots and pins of every worker and store", Stats);
    on_worker(c, o);
    c->add_flag("--tenants", o->tenants, "What each tenant holds of the host tiers, and its quota");
  }
  {
    auto [c, o] = add("lookup", "How long a prefix of a chain each worker holds", Lookup);
    on_worker(c, o);
    AddSelector(*c, o->blocks, /*chain_only=*/true);
  }
  {
    auto [c, o] = add("where", "What each worker knows of these blocks", Where);
    on_worker(c, o);
    AddSelector(*c, o->blocks, /*chain_only=*/false);
    c->add_flag("--with-tokens", o->with_tokens, "Their token ids, too");
  }
  {
    auto [c, o] = add("pin", "Keep blocks (and what comes before them) from being evicted", Pin);
    on_worker(c, o);
    AddSelector(*c, o->blocks, /*chain_only=*/false);
    c->add_option("--ttl", o->ttl, "For so long, at most 24h [10m]")->type_name("");
    c->add_flag("--hard", o->hard, "Whatever happens; without it: unless nothing else is left");
  }
  {
    auto [c, o] = add("unpin", "End pins", Unpin);
    on_worker(c, o);
    AddSelector(*c, o->blocks, /*chain_only=*/false);
  }
  {
    auto [c, o] = add("copy", "Copy blocks to a worker, or until several hold them", Copy);
    AddSelector(*c, o->blocks, /*chain_only=*/true);
    c->add_option("--to", o->to, "The worker that is to have them")->type_name("");
    c->add_option("--from", o->from, "The worker to copy from; default: whoever is nearest")->type_name("");
    c->add_option("--copies", o->copies, "Until so many workers hold them, 2 to 16")->type_name("");
    c->add_option("--bytes-per-second", o->bytes_per_second, "With --from; 0: as fast as it goes [0]")
        ->type_name("");
  }
  {
    auto [c, o] = add("move", "Move blocks to another worker, or to a worker's disk", Move);
    on_worker(c, o);
    AddSelector(*c, o->blocks, /*chain_only=*/false);
    c->add_option("--from", o->from, "The worker that has them")->type_name("");
    c->add_option("--to", o->to, "The worker that is to have them")->type_name("");
    c->add_flag("--to-disk", o->to_disk, "From the host tier to the disk tier of --worker (default: of all)");
  }
  {
    auto [c, o] = add("prefetch", "Bring blocks from the disk tier into the host tier", Prefetch);
    on_worker(c, o);
    AddSelector(*c, o->blocks, /*chain_only=*/false);
  }
  {
    auto [c, o] = add("evict", "Make room: drop blocks from the host tier; hard-pinned ones stay", Evict);
    on_worker(c, o);
    AddSelector(*c, o->blocks, /*chain_only=*/false);
    c->add_flag("--disk", o->disk, "From the disk tier, too");
  }
  {
    auto [c, o] = add("clear", "Forget blocks in every tier, pinned or not", Clear);
    on_worker(c, o);
    AddSelector(*c, o->blocks, /*chain_only=*/false);
  }
  {
    auto [c, o] = add("compress", "Store blocks of the disk tier in fewer bytes, without loss", Compress);
    on_worker(c, o);
    AddSelector(*c, o->blocks, /*chain_only=*/false);
    c->add_option("--bytes-per-second", o->bytes_per_second,
                  "Of blocks looked at; 0: as fast as loads leave room [0]")
        ->type_name("");
  }
  {
    auto [c, o] = add("events", "Follow a worker's block events", Events);
    on_worker(c, o);
    c->add_option("--from", o->from_seq, "First event wanted; 0: what is there, then what happens [0]")
        ->type_name("");
    c->add_option("--count", o->count, "End after so many; 0: never [0]")->type_name("");
    c->add_flag("--with-tokens", o->with_tokens, "Token ids, too");
  }
}

}  // namespace tidepool
