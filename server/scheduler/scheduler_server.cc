#include "server/scheduler/scheduler_server.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>

#include "base/log.h"
#include "base/status.h"
#include "scheduler/core.h"
#include "server/cluster/model_digest.h"
#include "server/rpc/kv_convert.h"
#include "server/rpc/long_call.h"
#include "server/rpc/rpc.h"
#include "server/scheduler/convert.h"
#include "server/scheduler/elastic_driver.h"
#include "server/scheduler/probe.h"
#include "server/scheduler/replicator.h"
#include "tidepool/v1/cluster.grpc.pb.h"

namespace tidepool {

namespace {

// How often hot blocks are looked for.
constexpr absl::Duration kReplicateInterval = absl::Seconds(1);
constexpr uint32_t kCopiesMax = 16;
constexpr size_t kKeysMax = 65536;
constexpr uint32_t kDecisionsDefault = 20;
constexpr uint32_t kDecisionsMax = 4096;
constexpr double kEvacuateSeconds = 30;
constexpr double kEvacuateSecondsMax = 3600;

// What the workers' first reports after a takeover may take; they come every 100 ms.
constexpr absl::Duration kRebuild = absl::Seconds(1);

// Gauges are as old as this at most; losses are noticed this much late.
constexpr absl::Duration kTickMax = absl::Milliseconds(250);

SchedulerOptions ToOptions(const SchedulerConfig& c) {
  SchedulerOptions o;
  o.slo_ttft = c.slo.ttft;
  o.slo_itl = c.slo.itl;
  const auto of_class = [&](SloClass slo_class, const SloConfig& slo) {
    o.classes[static_cast<size_t>(slo_class)] = {.slo_ttft = slo.ttft, .slo_itl = slo.itl};
  };
  of_class(SloClass::kStandard, c.classes.standard);
  of_class(SloClass::kBatch, c.classes.batch);
  // The configuration holds names from the same lists.
  o.placement = ParsePlacementPolicy(c.placement).value_or(o.placement);
  o.admission = ParseAdmissionPolicy(c.admission).value_or(o.admission);
  o.fairness = ParseFairnessPolicy(c.fairness).value_or(o.fairness);
  o.local_prefill_tokens = c.local_prefill_tokens;
  o.worker_timeout = c.worker_timeout;
  o.max_inflight = c.max_inflight;
  return o;
}

ElasticityMode ToElasticityMode(const SchedulerConfig& c) {
  return ParseElasticityMode(c.elasticity).value_or(ElasticityMode::kAdvise);
}

absl::Duration ToTick(const SchedulerConfig& c) {
  return std::clamp(c.worker_timeout / 4, absl::Milliseconds(1), kTickMax);
}

ReplicationOptions ToReplicationOptions(const SchedulerConfig& c) {
  ReplicationOptions o;
  o.copies = c.hot_copies;
  o.bytes_per_second = c.replicate_bytes_per_second;
  return o;
}

absl::StatusOr<std::vector<BlockKey>> ToKeys(const google::protobuf::RepeatedPtrField<std::string>& in) {
  if (in.empty()) return absl::InvalidArgumentError("keys: is empty; name at least one block key");
  if (static_cast<size_t>(in.size()) > kKeysMax)
    return absl::InvalidArgumentError("keys: has " + std::to_string(in.size()) + " keys; at most " +
                                      std::to_string(kKeysMax) + " a call");
  std::vector<BlockKey> out;
  out.reserve(static_cast<size_t>(in.size()));
  for (const std::string& bytes : in) {
    TP_ASSIGN_OR_RETURN(const BlockKey key, ToBlockKey(bytes, "keys"));
    out.push_back(key);
  }
  return out;
}

}  // namespace

struct SchedulerServer::Impl final : v1::Scheduler::CallbackService {
  Impl(const SchedulerConfig& config, std::string cluster_token, MetricRegistry& metrics, const Clock& c,
       Leadership* l)
      : leadership(l),
        token(std::move(cluster_token)),
        clock(c),
        probe(metrics),
        replicator(token, config.replicate_bytes_per_second, metrics),
        options(ToOptions(config)),
        replication_options(ToReplicationOptions(config)),
        tick_interval(ToTick(config)),
        core(std::in_place, options, replication_options),
        elastic(
            ToElasticityMode(config), config.elasticity_dwell, token, [this] { return LookAtLoad(); },
            metrics, c) {}

  // ---- the service; each answers before it returns

  grpc::ServerUnaryReactor* Report(grpc::CallbackServerContext* context, const v1::WorkerReport* request,
                                   v1::ReportReply* reply) override {
    return Answer(context, [&]() -> grpc::Status {
      auto report = FromProto(*request);
      ReportResult result;
      std::lock_guard lock(mu);
      if (report.ok()) result.status = CheckProtocol(*request);
      if (report.ok() && result.status.ok()) result.status = CheckAgainstMembers(*report);
      if (report.ok() && result.status.ok()) {
        result = core->Report(std::move(*report), clock.Now());
      } else if (!report.ok()) {
        result.status = report.status();
      }
      probe.OnReport(result);
      if (result.registered) {
        spdlog::info("worker {} registered, boot {}", request->address().worker_id(),
                     request->address().boot_id());
        ExportLocked();
      }
      if (!result.status.ok()) LogRefusal(result.status);
      reply->set_resync(result.resync);
      return ToGrpc(result.status);
    });
  }

  grpc::ServerUnaryReactor* Place(grpc::CallbackServerContext* context, const v1::PlaceRequest* request,
                                  v1::PlaceReply* reply) override {
    return Answer(context, [&]() -> grpc::Status {
      auto asked = FromProto(*request);
      if (!asked.ok()) return ToGrpc(asked.status());
      const auto began = std::chrono::steady_clock::now();
      PlaceResult result;
      {
        std::lock_guard lock(mu);
        if (Rebuilding()) return Later();
        ResolveExcluded(*asked);
        result = core->Place(*asked, clock.Now());
      }
      probe.OnDecision(result, absl::FromChrono(std::chrono::steady_clock::now() - began));
      if (result.placement) {
        spdlog::debug("{}{} {}", asked->request_id, TraceNote(TraceOf(*context)), result.placement->reason);
        ToProto(*result.placement, reply);
        return grpc::Status::OK;
      }
      spdlog::debug("{}{} not placed: {}", asked->request_id, TraceNote(TraceOf(*context)),
                    std::string(result.status.message()));
      if (!result.rejection) return ToGrpc(result.status);
      v1::PlaceRejection details;
      ToProto(*result.rejection, &details);
      return grpc::Status(grpc::StatusCode::RESOURCE_EXHAUSTED, result.rejection->reason,
                          details.SerializeAsString());
    });
  }

  grpc::ServerUnaryReactor* Explain(grpc::CallbackServerContext* context, const v1::PlaceRequest* request,
                                    v1::ExplainReply* reply) override {
    return Answer(context, [&]() -> grpc::Status {
      auto asked = FromProto(*request);
      if (!asked.ok()) return ToGrpc(asked.status());
      PlaceResult result;
      {
        std::lock_guard lock(mu);
        ResolveExcluded(*asked);
        result = core->Explain(*asked, clock.Now());
      }
      // A rejection is what was asked for, not a failure of the call.
      if (!result.placement && !result.rejection) return ToGrpc(result.status);
      for (const Candidate& c : result.candidates) ToProto(c, reply->add_candidates());
      if (result.placement) ToProto(*result.placement, reply->mutable_placement());
      if (result.rejection) ToProto(*result.rejection, reply->mutable_rejection());
      return grpc::Status::OK;
    });
  }

  grpc::ServerUnaryReactor* Finish(grpc::CallbackServerContext* context, const v1::FinishRequest* request,
                                   v1::FinishReply*) override {
    return Answer(context, [&]() -> grpc::Status {
      const auto info = FromProto(*request);
      if (!info.ok()) return ToGrpc(info.status());
      std::lock_guard lock(mu);
      core->Finish(request->request_id(), clock.Now(), *info);
      return grpc::Status::OK;
    });
  }

  grpc::ServerUnaryReactor* Cluster(grpc::CallbackServerContext* context, const v1::ClusterRequest*,
                                    v1::ClusterReply* reply) override {
    return Answer(context, [&]() -> grpc::Status {
      *reply->mutable_elasticity() = elastic.Get();  // not under mu, which its thread takes, too
      std::lock_guard lock(mu);
      if (core->model()) ToProto(*core->model(), reply->mutable_model());
      for (const WorkerView& w : core->Workers(clock.Now())) ToProto(w, reply->add_workers());
      reply->set_term(term);
      if (leadership != nullptr) {
        for (v1::Member& member : leadership->Members()) reply->add_members()->Swap(&member);
        reply->set_etcd_reachable(leadership->EtcdReachable());
      }
      return grpc::Status::OK;
    });
  }

  grpc::ServerUnaryReactor* Decisions(grpc::CallbackServerContext* context,
                                      const v1::DecisionsRequest* request,
                                      v1::DecisionsReply* reply) override {
    return Answer(context, [&]() -> grpc::Status {
      if (request->max() > kDecisionsMax)
        return ToGrpc(absl::InvalidArgumentError("max: is " + std::to_string(request->max()) + "; at most " +
                                                 std::to_string(kDecisionsMax)));
      std::lock_guard lock(mu);
      const absl::Time now = clock.Now();
      if (!request->request_id().empty()) {
        const auto record = core->FindRequest(request->request_id());
        if (!record)
          return ToGrpc(absl::NotFoundError("no decision for request '" + request->request_id() +
                                            "' is remembered: it is too long ago, or another scheduler's"));
        ToProto(*record, now, reply->add_decisions());
        return grpc::Status::OK;
      }
      const uint32_t max = request->max() == 0 ? kDecisionsDefault : request->max();
      for (const RequestRecord& record : core->RecentRequests(max))
        ToProto(record, now, reply->add_decisions());
      return grpc::Status::OK;
    });
  }

  grpc::ServerUnaryReactor* Where(grpc::CallbackServerContext* context, const v1::WhereRequest* request,
                                  v1::WhereReply* reply) override {
    return Answer(context, [&]() -> grpc::Status {
      const auto keys = ToKeys(request->keys());
      if (!keys.ok()) return ToGrpc(keys.status());
      std::lock_guard lock(mu);
      if (request->chain()) {
        for (const WorkerPrefix& p : core->Prefixes(*keys)) {
          v1::HeldPrefix* prefix = reply->add_prefixes();
          prefix->set_worker_id(p.worker_id);
          prefix->set_blocks(p.blocks);
          prefix->set_host_blocks(p.near_blocks);
        }
        return grpc::Status::OK;
      }
      for (const auto& holders : core->Where(*keys)) {
        v1::BlockHolders* block = reply->add_blocks();
        for (const BlockHolder& h : holders) {
          v1::BlockHolder* holder = block->add_holders();
          holder->set_worker_id(h.worker_id);
          for (const Tier tier : h.tiers) holder->add_tiers(ToProto(tier));
        }
      }
      return grpc::Status::OK;
    });
  }

  grpc::ServerWriteReactor<v1::ReplicateProgress>* Replicate(grpc::CallbackServerContext* context,
                                                             const v1::ReplicateRequest* request) override {
    if (const absl::Status s = Admit(*context); !s.ok())
      return long_calls.Refuse<v1::ReplicateProgress>(ToGrpc(s));
    auto keys = ToKeys(request->keys());
    if (keys.ok() && request->to().empty() && (request->copies() < 2 || request->copies() > kCopiesMax))
      keys = absl::InvalidArgumentError("copies: is " + std::to_string(request->copies()) +
                                        "; it may be 2 to 16, or name a worker in `to`");
    if (!keys.ok()) return long_calls.Refuse<v1::ReplicateProgress>(ToGrpc(keys.status()));
    return Order(absl::InfiniteDuration(),
                 [this, keys = *std::move(keys), copies = request->copies(), to = request->to()] {
                   return core->Replication(keys, copies, to);
                 });
  }

  grpc::ServerWriteReactor<v1::ReplicateProgress>* Evacuate(grpc::CallbackServerContext* context,
                                                            const v1::EvacuateRequest* request) override {
    absl::Status refused = Admit(*context);
    const double seconds = request->max_seconds() == 0 ? kEvacuateSeconds : request->max_seconds();
    if (refused.ok() && !(seconds > 0 && seconds <= kEvacuateSecondsMax))
      refused = absl::InvalidArgumentError("max_seconds: is not in (0, 3600]");
    if (!refused.ok()) return long_calls.Refuse<v1::ReplicateProgress>(ToGrpc(refused));
    return Order(absl::Seconds(seconds),
                 [this, id = request->worker_id()] { return core->Evacuation(id, clock.Now()); });
  }

  // Carries out what `plan` (called under the lock) says, for at most `limit`.
  grpc::ServerWriteReactor<v1::ReplicateProgress>* Order(
      absl::Duration limit, std::function<absl::StatusOr<std::vector<CopyOrder>>()> plan) {
    return long_calls.Start<v1::ReplicateProgress>(
        [this, limit, plan = std::move(plan)](const LongCalls::Handle<v1::ReplicateProgress>& handle) {
          absl::StatusOr<std::vector<CopyOrder>> orders;
          uint64_t block_bytes = 0;
          {
            std::lock_guard lock(mu);
            orders = plan();
            if (core->model()) block_bytes = core->model()->layout.block_bytes();
          }
          if (!orders.ok()) return ToGrpc(orders.status());
          const absl::Time began = clock.Now();
          const auto over = [&] { return clock.Now() - began >= limit; };
          uint32_t total = 0;
          for (const CopyOrder& order : *orders) total += static_cast<uint32_t>(order.keys.size());
          Replicator::Tally tally;
          const auto say = [&](bool finished) {
            v1::ReplicateProgress progress;
            progress.set_total(total);
            progress.set_copied(tally.copied);
            progress.set_skipped(tally.skipped);
            progress.set_bytes(tally.bytes);
            progress.set_seconds(absl::ToDoubleSeconds(clock.Now() - began));
            progress.set_finished(finished);
            progress.set_note(tally.note);
            handle.report(progress);
          };
          say(false);
          for (const CopyOrder& order : *orders) {
            if (over()) break;
            const absl::Status status = replicator.Execute(
                order, block_bytes, [&] { return handle.cancelled() || over(); }, [&] { say(false); }, tally);
            if (!status.ok() && handle.cancelled()) return ToGrpc(status);
          }
          if (tally.copied + tally.skipped < total) {
            tally.skipped = total - tally.copied;
            if (tally.note.empty()) tally.note = "the time was over";
          }
          say(true);
          return grpc::Status::OK;
        });
  }

  template <typename Body>
  grpc::ServerUnaryReactor* Answer(grpc::CallbackServerContext* context, const Body& body) {
    auto* reactor = context->DefaultReactor();
    const absl::Status allowed = Admit(*context);
    reactor->Finish(allowed.ok() ? body() : ToGrpc(allowed));
    return reactor;
  }

  static absl::Status CheckProtocol(const v1::WorkerReport& report) {
    const uint32_t protocol = report.protocol() == 0 ? 1 : report.protocol();
    if (protocol == kClusterProtocol) return absl::OkStatus();
    return absl::FailedPreconditionError("the worker speaks protocol " + std::to_string(protocol) +
                                         " of a cluster (tidepool " + report.version() +
                                         "), this scheduler " + std::to_string(kClusterProtocol) +
                                         " (" TIDEPOOL_VERSION "); run one version of both");
  }

  // ---- of a cluster with etcd

  // Who may ask; and only while this scheduler leads. Whoever has led before knows nothing at a new term:
  // what it knew is as old as the last.
  absl::Status Admit(const grpc::CallbackServerContext& context) {
    TP_RETURN_IF_ERROR(CheckClusterToken(context, token));
    if (leadership == nullptr) return absl::OkStatus();
    const std::optional<uint64_t> leads = leadership->Term(SchedulerTermOf(context));
    if (!leads) {
      const std::string leader = leadership->LeaderAddress();
      return absl::UnavailableError(leader.empty()
                                        ? "this scheduler stands by, and none is known to lead"
                                        : "this scheduler stands by; the one at " + leader + " leads");
    }
    std::lock_guard lock(mu);
    if (*leads > term) {
      term = *leads;
      term_began = clock.Now();
      core.emplace(options, replication_options);
      replicator.SetTerm(term);
    }
    return absl::OkStatus();
  }

  // The following hold mu.

  // The first that reports must not decide which model the cluster serves where others, accepted by an
  // earlier leader, have not reported yet. A store follows the workers: it holds other stores to its model
  // only.
  absl::Status CheckAgainstMembers(const WorkerReport& report) const {
    const ModelIdentity& model = report.model;
    if (leadership == nullptr || core->model()) return absl::OkStatus();
    v1::ModelIdentity identity;
    ToProto(model, &identity);
    const std::string digest = ModelIdentityDigest(identity);
    for (const v1::Member& member : leadership->Members()) {
      if (member.fingerprint().empty()) continue;
      const bool same_model = member.fingerprint() == model.fingerprint;
      // One of a version that wrote no more than the fingerprint is held to that.
      if (same_model && (member.identity().empty() || member.identity() == digest)) continue;
      if (member.role() == RoleName(Role::kStore) && report.role != Role::kStore) continue;
      if (same_model)
        return absl::FailedPreconditionError(
            "the worker's KV layout (" + model.layout.ToString() + ", codec " +
            (model.kv_codec.empty() ? "none" : model.kv_codec) + ") or context (" +
            std::to_string(model.max_model_len) + " tokens) is not that of " + member.id() +
            " and so the cluster's; start both with the same kv.block_tokens, kv.codec and "
            "model.max_model_len");
      return absl::FailedPreconditionError("the worker's model is " + model.fingerprint.substr(0, 12) +
                                           ", that of " + member.id() + " and so the cluster's is " +
                                           member.fingerprint().substr(0, 12) + "; load the same model");
    }
    return absl::OkStatus();
  }

  // A moment after a takeover not all workers have reported: the first would get everything.
  bool Rebuilding() const {
    if (leadership == nullptr || clock.Now() - term_began > kRebuild) return false;
    size_t members = 0;
    for (const v1::Member& member : leadership->Members()) members += !member.fingerprint().empty();
    return core->Workers(clock.Now()).size() < members;
  }
  static grpc::Status Later() {
    return grpc::Status(grpc::StatusCode::UNAVAILABLE,
                        "this scheduler has just taken over; its workers report now");
  }

  // The core knows workers by name; a request excludes processes, so that one that is back under its name may
  // be tried.
  void ResolveExcluded(PlaceRequest& request) const {
    if (request.exclude_workers.empty()) return;
    for (const WorkerView& w : core->Workers(clock.Now())) {
      std::replace(request.exclude_workers.begin(), request.exclude_workers.end(), w.address.boot_id,
                   w.address.worker_id);
    }
  }

  // A refused worker asks again ten times a second: said once.
  void LogRefusal(const absl::Status& why) {
    const std::string text = why.ToString();
    if (text != last_refusal) spdlog::warn("report refused: {}", text);
    last_refusal = text;
  }

  // ---- the timer

  void RunTimer() {
    std::unique_lock lock(mu);
    while (!stop) {
      if (leadership != nullptr && !leadership->Term(0)) {
        // Stands by: nobody reports here, and nobody is lost.
        wake.wait_for(lock, absl::ToChronoNanoseconds(tick_interval), [&] { return stop; });
        continue;
      }
      for (const std::string& id : core->Tick(clock.Now())) spdlog::warn("worker {} lost: no report", id);
      ExportLocked();
      wake.wait_for(lock, absl::ToChronoNanoseconds(tick_interval), [&] { return stop; });
    }
  }

  // ---- elasticity

  std::optional<ElasticDriver::View> LookAtLoad() {
    const std::optional<uint64_t> leads = leadership == nullptr ? std::nullopt : leadership->Term(0);
    std::lock_guard lock(mu);
    // What the core knows may be of an older term: nobody has called in this one yet.
    if (leadership != nullptr && leads != term) return std::nullopt;
    return ElasticDriver::View{.term = term,
                               .load = core->Elasticity(clock.Now()),
                               .grpc = [this](const std::string& worker) { return GrpcOf(worker); }};
  }
  std::string GrpcOf(const std::string& worker) {
    std::lock_guard lock(mu);
    for (const WorkerView& w : core->Workers(clock.Now())) {
      if (w.address.worker_id == worker) return w.address.grpc;
    }
    return "";
  }

  // ---- hot blocks

  void RunReplication() {
    std::unique_lock lock(mu);
    while (!stop) {
      std::vector<CopyOrder> orders;
      if (leadership == nullptr || leadership->Term(0)) orders = core->Replicate(clock.Now());
      const uint64_t block_bytes = core->model() ? core->model()->layout.block_bytes() : 0;
      lock.unlock();
      for (const CopyOrder& order : orders) {
        Replicator::Tally tally;
        if (!replicator
                 .Execute(
                     order, block_bytes, [] { return false; }, [] {}, tally)
                 .ok())
          break;
        spdlog::debug("hot blocks: {} of {} copied from {} to {}", tally.copied, order.keys.size(),
                      order.from.worker_id, order.to.worker_id);
      }
      lock.lock();
      wake.wait_for(lock, absl::ToChronoNanoseconds(kReplicateInterval), [&] { return stop; });
    }
  }

  void ExportLocked() { probe.Export(core->Workers(clock.Now()), core->inflight(), core->index_ignored()); }

  Leadership* const leadership;  // null: there is one scheduler
  const std::string token;
  const Clock& clock;
  SchedulerProbe probe;
  std::atomic<bool> ready{false};
  RpcServer rpc;
  Replicator replicator;
  LongCalls long_calls{/*threads=*/2, /*max_waiting=*/8};

  std::mutex mu;  // guards what follows
  SchedulerOptions options;
  ReplicationOptions replication_options;
  absl::Duration tick_interval;
  std::optional<SchedulerCore> core;  // there is always one
  uint64_t term = 0;                  // that it is of; 0: no etcd, or has not led yet
  absl::Time term_began;
  std::string last_refusal;
  bool stop = false;
  std::condition_variable wake;
  std::thread timer;  // these are started and joined by the owner
  std::thread replication;
  ElasticDriver elastic;  // likewise
};

absl::StatusOr<std::unique_ptr<SchedulerServer>> SchedulerServer::Start(const SchedulerConfig& config,
                                                                        const std::string& cluster_token,
                                                                        MetricRegistry& metrics,
                                                                        const Clock& clock,
                                                                        Leadership* leadership) {
  auto impl = std::make_unique<Impl>(config, cluster_token, metrics, clock, leadership);
  TP_ASSIGN_OR_RETURN(impl->rpc, StartRpcServer(config.listen, impl.get()));
  impl->timer = std::thread([i = impl.get()] { i->RunTimer(); });
  impl->replication = std::thread([i = impl.get()] { i->RunReplication(); });
  impl->elastic.Start();
  impl->ready = true;
  spdlog::info("scheduler listens on port {}", impl->rpc.port);
  return std::unique_ptr<SchedulerServer>(new SchedulerServer(std::move(impl)));
}

SchedulerServer::SchedulerServer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

SchedulerServer::~SchedulerServer() { Shutdown(absl::ZeroDuration()); }

int SchedulerServer::port() const { return impl_->rpc.port; }

void SchedulerServer::Apply(const SchedulerConfig& config) {
  impl_->elastic.Apply(ToElasticityMode(config), config.elasticity_dwell);
  std::lock_guard lock(impl_->mu);
  impl_->options = ToOptions(config);
  impl_->replication_options = ToReplicationOptions(config);
  impl_->tick_interval = ToTick(config);
  impl_->core->SetOptions(impl_->options, impl_->replication_options);
  impl_->replicator.SetRate(config.replicate_bytes_per_second);
}

bool SchedulerServer::ready() const { return impl_->ready; }

void SchedulerServer::Shutdown(absl::Duration grace) {
  if (!impl_->ready.exchange(false)) return;
  impl_->elastic.Stop();
  impl_->replicator.Stop();
  impl_->long_calls.Stop();
  impl_->rpc.server->Shutdown(std::chrono::system_clock::now() + absl::ToChronoMilliseconds(grace));
  impl_->rpc.server->Wait();
  {
    std::lock_guard lock(impl_->mu);
    impl_->stop = true;
  }
  impl_->wake.notify_all();
  impl_->timer.join();
  impl_->replication.join();
}

}  // namespace tidepool
