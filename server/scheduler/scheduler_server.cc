#include "server/scheduler/scheduler_server.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <utility>

#include "base/log.h"
#include "base/status.h"
#include "scheduler/core.h"
#include "server/rpc/rpc.h"
#include "server/scheduler/convert.h"
#include "server/scheduler/probe.h"
#include "tidepool/v1/cluster.grpc.pb.h"

namespace tidepool {

namespace {

// Gauges are as old as this at most; losses are noticed this much late.
constexpr absl::Duration kTickMax = absl::Milliseconds(250);

SchedulerOptions ToOptions(const SchedulerConfig& c) {
  SchedulerOptions o;
  o.slo_ttft = c.slo.ttft;
  o.slo_itl = c.slo.itl;
  o.local_prefill_tokens = c.local_prefill_tokens;
  o.worker_timeout = c.worker_timeout;
  o.max_inflight = c.max_inflight;
  return o;
}

}  // namespace

struct SchedulerServer::Impl final : v1::Scheduler::CallbackService {
  Impl(const SchedulerConfig& config, std::string cluster_token, MetricRegistry& metrics, const Clock& c)
      : token(std::move(cluster_token)),
        clock(c),
        tick_interval(std::clamp(config.worker_timeout / 4, absl::Milliseconds(1), kTickMax)),
        probe(metrics),
        core(ToOptions(config)) {}

  // ---- the service; each answers before it returns

  grpc::ServerUnaryReactor* Report(grpc::CallbackServerContext* context, const v1::WorkerReport* request,
                                   v1::ReportReply* reply) override {
    return Answer(context, [&]() -> grpc::Status {
      auto report = FromProto(*request);
      ReportResult result;
      std::lock_guard lock(mu);
      if (report.ok()) {
        result = core.Report(std::move(*report), clock.Now());
      } else {
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
        result = core.Place(*asked, clock.Now());
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
        result = core.Explain(*asked, clock.Now());
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
      std::lock_guard lock(mu);
      core.Finish(request->request_id(), clock.Now());
      return grpc::Status::OK;
    });
  }

  grpc::ServerUnaryReactor* Cluster(grpc::CallbackServerContext* context, const v1::ClusterRequest*,
                                    v1::ClusterReply* reply) override {
    return Answer(context, [&]() -> grpc::Status {
      std::lock_guard lock(mu);
      if (core.model()) ToProto(*core.model(), reply->mutable_model());
      for (const WorkerView& w : core.Workers(clock.Now())) ToProto(w, reply->add_workers());
      return grpc::Status::OK;
    });
  }

  template <typename Body>
  grpc::ServerUnaryReactor* Answer(grpc::CallbackServerContext* context, const Body& body) {
    auto* reactor = context->DefaultReactor();
    const absl::Status allowed = CheckClusterToken(*context, token);
    reactor->Finish(allowed.ok() ? body() : ToGrpc(allowed));
    return reactor;
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
      for (const std::string& id : core.Tick(clock.Now())) spdlog::warn("worker {} lost: no report", id);
      ExportLocked();
      wake.wait_for(lock, absl::ToChronoNanoseconds(tick_interval), [&] { return stop; });
    }
  }

  void ExportLocked() { probe.Export(core.Workers(clock.Now()), core.inflight(), core.index_ignored()); }

  const std::string token;
  const Clock& clock;
  const absl::Duration tick_interval;
  SchedulerProbe probe;
  std::atomic<bool> ready{false};
  RpcServer rpc;

  std::mutex mu;  // guards what follows
  SchedulerCore core;
  std::string last_refusal;
  bool stop = false;
  std::condition_variable wake;
  std::thread timer;  // started and joined by the owner
};

absl::StatusOr<std::unique_ptr<SchedulerServer>> SchedulerServer::Start(const SchedulerConfig& config,
                                                                        const std::string& cluster_token,
                                                                        MetricRegistry& metrics,
                                                                        const Clock& clock) {
  auto impl = std::make_unique<Impl>(config, cluster_token, metrics, clock);
  TP_ASSIGN_OR_RETURN(impl->rpc, StartRpcServer(config.listen, impl.get()));
  impl->timer = std::thread([i = impl.get()] { i->RunTimer(); });
  impl->ready = true;
  spdlog::info("scheduler listens on port {}", impl->rpc.port);
  return std::unique_ptr<SchedulerServer>(new SchedulerServer(std::move(impl)));
}

SchedulerServer::SchedulerServer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

SchedulerServer::~SchedulerServer() { Shutdown(absl::ZeroDuration()); }

int SchedulerServer::port() const { return impl_->rpc.port; }

bool SchedulerServer::ready() const { return impl_->ready; }

void SchedulerServer::Shutdown(absl::Duration grace) {
  if (!impl_->ready.exchange(false)) return;
  impl_->rpc.server->Shutdown(std::chrono::system_clock::now() + absl::ToChronoMilliseconds(grace));
  impl_->rpc.server->Wait();
  {
    std::lock_guard lock(impl_->mu);
    impl_->stop = true;
  }
  impl_->wake.notify_all();
  impl_->timer.join();
}

}  // namespace tidepool
