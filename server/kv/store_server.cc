#include "server/kv/store_server.h"

#include <algorithm>
#include <atomic>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>

#include "base/clock.h"
#include "base/log.h"
#include "base/status.h"
#include "server/http/admin_server.h"
#include "server/kv/follower.h"
#include "server/kv/kv_service.h"
#include "server/model/model.h"
#include "server/model/text/tokenizer.h"
#include "server/worker/kv_node.h"

namespace tidepool {
namespace {

constexpr absl::Duration kModelPoll = absl::Milliseconds(200);
constexpr absl::Duration kModelAskTimeout = absl::Seconds(2);
constexpr absl::Duration kWaitLog = absl::Seconds(10);

// What storing the last blocks may take at shutdown where the grace is used up.
constexpr absl::Duration kFlushMin = absl::Milliseconds(200);

// Of the model in the directory `store.model`, under everything else that the configuration says of models.
absl::StatusOr<v1::ModelIdentity> ConfiguredModel(const Config& config) {
  ModelConfig model = config.model;
  model.path = config.store.model;
  auto identity = [&]() -> absl::StatusOr<v1::ModelIdentity> {
    TP_ASSIGN_OR_RETURN(const auto tokenizer,
                        Tokenizer::Load(model.tokenizer.empty() ? model.path : model.tokenizer));
    TP_ASSIGN_OR_RETURN(const ModelDescription described, DescribeModel(model, tokenizer->Digest()));
    return IdentityOf(described, config.kv.block_tokens, config.kv.codec);
  }();
  if (!identity.ok()) return Annotate(identity.status(), "store.model");
  return identity;
}

// What a store answers of the Worker service: `ctl` asks every member of the cluster the same.
class StoreWorkerService final : public v1::Worker::CallbackService {
 public:
  StoreWorkerService(const KvContext& context, v1::DescribeReply description,
                     std::function<void(bool end)> drain)
      : context_(context), description_(std::move(description)), drain_(std::move(drain)) {}

  // Where it is reached: known once it listens.
  void SetGrpc(const std::string& address) {
    std::lock_guard lock(mu_);
    description_.mutable_address()->set_grpc(address);
  }

  grpc::ServerUnaryReactor* Describe(grpc::CallbackServerContext* rpc, const v1::DescribeRequest*,
                                     v1::DescribeReply* reply) override {
    auto* reactor = rpc->DefaultReactor();
    const absl::Status token = CheckClusterToken(*rpc, context_.cluster_token);
    if (token.ok()) {
      {
        std::lock_guard lock(mu_);
        *reply = description_;
      }
      FillCounts(*context_.pool, *context_.fetch, *reply);
    }
    reactor->Finish(ToGrpc(token));
    return reactor;
  }
  grpc::ServerUnaryReactor* Drain(grpc::CallbackServerContext* rpc, const v1::DrainRequest* request,
                                  v1::DrainReply*) override {
    auto* reactor = rpc->DefaultReactor();
    const absl::Status token = CheckClusterToken(*rpc, context_.cluster_token);
    if (token.ok()) drain_(request->end_process());
    reactor->Finish(ToGrpc(token));
    return reactor;
  }

 private:
  const KvContext& context_;
  std::mutex mu_;
  v1::DescribeReply description_;
  const std::function<void(bool end)> drain_;
};

}  // namespace

// Members are destroyed in reverse order: servers first, then what they call.
struct StoreServer::Impl {
  Impl(Config c, MetricRegistry& m) : config(std::move(c)), metrics(m), node(config, channels, metrics) {}

  Config config;
  MetricRegistry& metrics;
  ChannelCache channels;
  std::unique_ptr<HttpServer> admin;
  KvNode node;
  std::unique_ptr<KvService> kv;
  std::unique_ptr<Reporter> reporter;
  std::unique_ptr<StoreWorkerService> worker;
  RpcServer rpc;
  std::unique_ptr<Follower> follower;
  std::atomic<bool> running{false};
  std::atomic<bool> draining{false}, end_process{false};
  bool shut_down = false;

  absl::Status Start();
  absl::Status StartAdmin();
  absl::StatusOr<v1::ModelIdentity> WaitForModel();
  void StartFollower();
  void BeginDrain() {
    if (draining.exchange(true)) return;
    spdlog::info("draining: peers may still fetch what is here");
    reporter->SetDraining();
  }
};

absl::Status StoreServer::Impl::StartAdmin() {
  TP_ASSIGN_OR_RETURN(admin, StartAdminServer(config.store.metrics_listen, metrics, [this] {
                        ReadyReport report;
                        std::string waits = "the scheduler knows of no model yet: no worker has registered";
                        if (running) waits = std::string(reporter->status().message());
                        report.checks.emplace_back("scheduler", waits);
                        report.checks.emplace_back("accepting", draining ? "draining" : "");
                        return report;
                      }));
  return absl::OkStatus();
}

absl::StatusOr<v1::ModelIdentity> StoreServer::Impl::WaitForModel() {
  const absl::Time began = Clock::Real().Now();
  absl::Time said = absl::InfinitePast();
  for (;;) {
    const SchedulerLocator::Place scheduler = node.scheduler->Get();
    grpc::ClientContext call;
    AddSchedulerTerm(call, scheduler.term);
    SetTimeout(call, kModelAskTimeout);
    AddClusterToken(call, config.cluster.token);
    v1::ClusterReply cluster;
    const absl::Status status =
        scheduler.address.empty()
            ? absl::UnavailableError("none is known to lead")
            : FromGrpc(v1::Scheduler::NewStub(channels.Get(scheduler.address))->Cluster(&call, {}, &cluster));
    if (status.ok() && cluster.model().layers() > 0) return cluster.model();
    if (absl::IsUnauthenticated(status)) return Annotate(status, scheduler.address);
    const absl::Time now = Clock::Real().Now();
    const std::string why =
        status.ok() ? "no worker has registered there yet" : std::string(status.message());
    if (now - began > config.cluster.start_timeout) {
      return absl::DeadlineExceededError("the scheduler at " + scheduler.address +
                                         " named no model within cluster.start_timeout: " + why);
    }
    if (now - said > kWaitLog) {
      spdlog::info("waiting for the scheduler at {} to name the model: {}", scheduler.address, why);
      said = now;
    }
    std::this_thread::sleep_for(absl::ToChronoNanoseconds(kModelPoll));
  }
}

void StoreServer::Impl::StartFollower() {
  if (config.store.follow == "none") return;
  Follower::Options options;
  options.core.all = config.store.follow == "all";
  options.bytes_per_second = config.store.follow_bytes_per_second;
  follower = std::make_unique<Follower>(std::move(options), node.context, kv->mover(), metrics);
}

absl::Status StoreServer::Impl::Start() {
  node.SetName("store", config.store.id);
  TP_RETURN_IF_ERROR(node.FindScheduler());
  TP_RETURN_IF_ERROR(StartAdmin());
  v1::ModelIdentity model;
  if (config.store.model.empty()) {
    TP_ASSIGN_OR_RETURN(model, WaitForModel());
  } else {
    TP_ASSIGN_OR_RETURN(model, ConfiguredModel(config));
  }
  TP_RETURN_IF_ERROR(node.StartTiers(model));
  TP_RETURN_IF_ERROR(node.StartFetch());
  if (WriteBehind* const store = node.store.get(); store != nullptr) {
    // Everything that comes here is worth a disk's room, as far as kv.disk.admission says so: a block that
    // leaves the host tier is there then.
    node.context.on_copied = [store](const BlockKey& key, const BlockLease& lease) {
      store->Offer(key, lease);
    };
  }
  kv = std::make_unique<KvService>(node.context, metrics);
  reporter = node.MakeReporter(v1::ROLE_STORE, [](v1::WorkerReport&) {});
  v1::DescribeReply description = node.Describe(v1::ROLE_STORE);
  *description.mutable_address() = node.context.self;
  worker = std::make_unique<StoreWorkerService>(node.context, std::move(description), [this](bool end) {
    BeginDrain();
    if (end) end_process = true;
  });
  TP_ASSIGN_OR_RETURN(rpc, StartRpcServer(config.store.listen, {kv.get(), worker.get()}));
  node.SetListening(config.store.listen, rpc.port);
  worker->SetGrpc(node.context.self.grpc());
  reporter->Start(node.context.self);
  running = true;
  StartFollower();
  spdlog::info("store of model {}: {}, {} KV blocks of {} tokens ({} bytes each)", model.name(),
               node.layout.ToString(), node.pool->stats().slots, node.layout.block_tokens,
               node.layout.block_bytes());
  return absl::OkStatus();
}

StoreServer::StoreServer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
StoreServer::~StoreServer() { Shutdown(absl::ZeroDuration()); }

absl::StatusOr<std::unique_ptr<StoreServer>> StoreServer::Start(const Config& config,
                                                                MetricRegistry& metrics) {
  std::unique_ptr<StoreServer> server(new StoreServer(std::make_unique<Impl>(config, metrics)));
  TP_RETURN_IF_ERROR(server->impl_->Start());
  return server;
}

int StoreServer::port() const { return impl_->rpc.port; }
int StoreServer::metrics_port() const { return impl_->admin->port(); }
const std::string& StoreServer::id() const { return impl_->node.context.self.worker_id(); }
bool StoreServer::ready() const { return impl_->reporter->status().ok() && !impl_->draining; }
bool StoreServer::wants_to_end() const {
  if (!impl_->end_process || impl_->node.fetch->offers() > 0) return false;
  const auto last = impl_->reporter->told();
  return !impl_->reporter->status().ok() || (last && last->draining);
}
void StoreServer::Apply(const KvConfig& kv) { impl_->node.Apply(kv); }
void StoreServer::BeginDrain() { impl_->BeginDrain(); }

void StoreServer::Shutdown(absl::Duration grace) {
  if (std::exchange(impl_->shut_down, true)) return;
  const absl::Time deadline = Clock::Real().Now() + grace;
  if (impl_->running) impl_->BeginDrain();
  if (impl_->kv) impl_->kv->Stop();  // the follower's copies, too
  impl_->follower.reset();
  if (impl_->rpc.server) {
    impl_->rpc.server->Shutdown(std::chrono::system_clock::now() + absl::ToChronoMilliseconds(grace));
    impl_->rpc.server->Wait();
  }
  if (impl_->admin) impl_->admin->Shutdown(absl::ZeroDuration());  // it asks the reporter
  WriteBehind* const store = impl_->node.store.get();
  if (store != nullptr && !store->Flush(std::max(deadline - Clock::Real().Now(), kFlushMin))) {
    spdlog::warn("some blocks were not stored: the drain time is over");
  }
  if (impl_->running) impl_->reporter->Leave();
  impl_->reporter.reset();
}

}  // namespace tidepool
