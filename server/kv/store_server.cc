#include "server/kv/store_server.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>

#include "base/clock.h"
#include "base/digest.h"
#include "base/log.h"
#include "base/status.h"
#include "kvstore/codec/block_codec.h"
#include "server/http/admin_server.h"
#include "server/kv/follower.h"
#include "server/kv/kv_service.h"
#include "server/kv/tier_events.h"
#include "server/worker/make_disk_tier.h"
#include "server/worker/reporter.h"
#include "server/worker/transport_options.h"
#include "server/worker/write_behind.h"
#include "transport/factory.h"

namespace tidepool {
namespace {

constexpr absl::Duration kModelPoll = absl::Milliseconds(200);
constexpr absl::Duration kModelAskTimeout = absl::Seconds(2);
constexpr absl::Duration kWaitLog = absl::Seconds(10);

std::string HostName() {
  char name[256] = {};
  return gethostname(name, sizeof name - 1) == 0 ? name : "localhost";
}

BlockLayout LayoutOf(const v1::ModelIdentity& model) {
  return {.layers = model.layers(),
          .kv_heads = model.kv_heads(),
          .head_dim = model.head_dim(),
          .block_tokens = model.block_tokens(),
          .dtype = static_cast<DType>(model.kv_dtype())};
}

// What a store answers of the Worker service: `ctl` asks every member of the cluster the same.
class StoreWorkerService final : public v1::Worker::CallbackService {
 public:
  StoreWorkerService(const KvContext& context, v1::DescribeReply description, std::function<void()> drain)
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
      const BlockPool::Stats pool = context_.pool->stats();
      reply->set_slots_total(pool.slots);
      reply->set_slots_free(pool.free + pool.evictable);
      reply->set_slots_leased(pool.leased);
      reply->set_slots_quarantined(pool.quarantined);
      reply->set_published_blocks(pool.published);
      reply->set_offers(static_cast<uint32_t>(context_.fetch->offers()));
    }
    reactor->Finish(ToGrpc(token));
    return reactor;
  }
  grpc::ServerUnaryReactor* Drain(grpc::CallbackServerContext* rpc, const v1::DrainRequest*,
                                  v1::DrainReply*) override {
    auto* reactor = rpc->DefaultReactor();
    const absl::Status token = CheckClusterToken(*rpc, context_.cluster_token);
    if (token.ok()) drain_();
    reactor->Finish(ToGrpc(token));
    return reactor;
  }

 private:
  const KvContext& context_;
  std::mutex mu_;
  v1::DescribeReply description_;
  const std::function<void()> drain_;
};

}  // namespace

// Members are destroyed in reverse order: servers first, then what they call.
struct StoreServer::Impl {
  Impl(Config c, MetricRegistry& m) : config(std::move(c)), metrics(m) {}

  Config config;
  MetricRegistry& metrics;
  KvContext context;
  v1::ModelIdentity model;
  ChannelCache channels;
  std::unique_ptr<HttpServer> admin;
  std::unique_ptr<BlockPool> pool;
  std::unique_ptr<BlockTier> disk;  // null: none
  std::unique_ptr<TierEvents> disk_events;
  std::unique_ptr<WriteBehind> write_behind;
  std::unique_ptr<FetchNode> fetch;
  std::unique_ptr<KvService> kv;
  std::unique_ptr<Reporter> reporter;
  std::unique_ptr<StoreWorkerService> worker;
  RpcServer rpc;
  std::unique_ptr<Follower> follower;
  std::atomic<bool> running{false};
  std::atomic<bool> draining{false};
  bool named = false;  // by the configuration
  bool shut_down = false;

  absl::Status Start();
  absl::Status StartAdmin();
  absl::Status WaitForModel();
  absl::Status StartPool();
  absl::Status StartDisk();
  absl::Status StartFetch();
  void MakeReporter();
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

absl::Status StoreServer::Impl::WaitForModel() {
  const absl::Time began = Clock::Real().Now();
  absl::Time said = absl::InfinitePast();
  const auto stub = v1::Scheduler::NewStub(channels.Get(config.cluster.scheduler));
  for (;;) {
    grpc::ClientContext call;
    SetTimeout(call, kModelAskTimeout);
    AddClusterToken(call, config.cluster.token);
    v1::ClusterReply cluster;
    const absl::Status status = FromGrpc(stub->Cluster(&call, v1::ClusterRequest(), &cluster));
    if (status.ok() && cluster.model().layers() > 0) {
      model = cluster.model();
      return absl::OkStatus();
    }
    if (absl::IsUnauthenticated(status)) return Annotate(status, config.cluster.scheduler);
    const absl::Time now = Clock::Real().Now();
    const std::string why =
        status.ok() ? "no worker has registered there yet" : std::string(status.message());
    if (now - began > config.cluster.start_timeout) {
      return absl::DeadlineExceededError("the scheduler at " + config.cluster.scheduler +
                                         " named no model within cluster.start_timeout: " + why);
    }
    if (now - said > kWaitLog) {
      spdlog::info("waiting for the scheduler at {} to name the model: {}", config.cluster.scheduler, why);
      said = now;
    }
    std::this_thread::sleep_for(absl::ToChronoNanoseconds(kModelPoll));
  }
}

absl::Status StoreServer::Impl::StartPool() {
  context.layout = LayoutOf(model);
  context.fingerprint = model.fingerprint();
  context.codec = model.kv_codec().empty() ? "none" : model.kv_codec();
  const uint64_t slots = config.kv.host_bytes / std::max<uint64_t>(context.layout.block_bytes(), 1);
  if (slots == 0) {
    return absl::InvalidArgumentError("kv.host_bytes is less than one block of " +
                                      std::to_string(context.layout.block_bytes()) + " bytes; raise it");
  }
  BlockPool::Options options;
  options.layout = context.layout;
  options.slots = static_cast<uint32_t>(std::min<uint64_t>(slots, UINT32_MAX));
  options.metrics = &metrics;
  options.policy = config.kv.policy;
  options.tenant_quota_bytes = config.kv.tenant_quota_bytes;
  options.hard_pin_share = config.kv.hard_pin_percent / 100.0;
  options.memory = {.huge_pages = config.kv.huge_pages,
                    .numa_node = config.kv.numa_node,
                    .lock_memory = config.kv.lock_memory};
  TP_ASSIGN_OR_RETURN(pool, BlockPool::Create(options));
  context.pool = pool.get();
  return absl::OkStatus();
}

// Everything that comes here is worth a disk's room, as far as kv.disk.admission says so: a block that leaves
// the host tier is there then.
absl::Status StoreServer::Impl::StartDisk() {
  // An id with a pid in it would not find its blocks again.
  KvConfig kv = config.kv;
  kv.codec = context.codec;
  TP_ASSIGN_OR_RETURN(disk, MakeDiskTier(kv, named ? config.store.id : "store", context.fingerprint,
                                         context.layout, metrics));
  if (!disk) return absl::OkStatus();
  context.disk = disk.get();
  disk_events = std::make_unique<TierEvents>(*disk, pool->events());
  TP_ASSIGN_OR_RETURN(write_behind, MakeWriteBehind(kv, *pool, *disk, metrics));
  context.on_copied = [this](const BlockKey& key, const BlockLease& lease) {
    write_behind->Offer(key, lease);
  };
  return absl::OkStatus();
}

absl::Status StoreServer::Impl::StartFetch() {
  TP_ASSIGN_OR_RETURN(auto transport, CreateTransport(TransportOptionsOf(
                                          config.transport, context.self.worker_id(), &metrics)));
  FetchNode::Options options;
  options.worker_id = context.self.worker_id();
  options.boot_id = context.self.boot_id();
  options.fingerprint = context.fingerprint;
  options.pool = pool.get();
  options.transport = std::move(transport);
  options.metrics = &metrics;
  options.offer_lease = config.kv.offer_lease;
  options.share_arena = config.transport.share_arena;
  options.lanes = config.transport.lanes;
  options.flow.window_bytes = config.transport.window_bytes;
  options.disk = disk.get();
  TP_ASSIGN_OR_RETURN(options.codec, GetBlockCodec(context.codec));
  TP_ASSIGN_OR_RETURN(fetch, FetchNode::Start(std::move(options)));
  context.fetch = fetch.get();
  context.self.set_transport(fetch->address());
  context.self.set_arena(fetch->arena_address());
  return absl::OkStatus();
}

void StoreServer::Impl::MakeReporter() {
  Reporter::Options options;
  options.scheduler = config.cluster.scheduler;
  options.cluster_token = config.cluster.token;
  options.interval = config.worker.report_interval;
  options.base.set_role(v1::ROLE_STORE);
  *options.base.mutable_model() = model;
  options.pool = pool.get();
  options.disk = disk.get();
  options.fill = [](v1::WorkerReport&) {};
  reporter = std::make_unique<Reporter>(std::move(options), channels, metrics);
}

void StoreServer::Impl::StartFollower() {
  if (config.store.follow == "none") return;
  Follower::Options options;
  options.scheduler = config.cluster.scheduler;
  options.core.all = config.store.follow == "all";
  options.bytes_per_second = config.store.follow_bytes_per_second;
  follower = std::make_unique<Follower>(std::move(options), context, kv->mover(), metrics);
}

absl::Status StoreServer::Impl::Start() {
  const std::string host = HostName();
  named = !config.store.id.empty();
  if (!named) config.store.id = "store-" + host + "-" + std::to_string(getpid());
  context.self.set_worker_id(config.store.id);
  context.self.set_boot_id(RandomHexId());
  context.self.set_pid(static_cast<uint32_t>(getpid()));
  context.self.set_host(host);
  context.cluster_token = config.cluster.token;
  context.channels = &channels;
  context.fetch_timeout = config.transport.fetch_timeout;
  TP_RETURN_IF_ERROR(StartAdmin());
  TP_RETURN_IF_ERROR(WaitForModel());
  TP_RETURN_IF_ERROR(StartPool());
  TP_RETURN_IF_ERROR(StartDisk());
  TP_RETURN_IF_ERROR(StartFetch());
  kv = std::make_unique<KvService>(context, metrics);
  MakeReporter();
  v1::DescribeReply description;
  description.set_role(v1::ROLE_STORE);
  description.set_version(TIDEPOOL_VERSION);
  *description.mutable_model() = model;
  *description.mutable_address() = context.self;
  worker = std::make_unique<StoreWorkerService>(context, std::move(description), [this] { BeginDrain(); });
  TP_ASSIGN_OR_RETURN(rpc, StartRpcServer(config.store.listen, {kv.get(), worker.get()}));
  v1::WorkerAddress self = context.self;
  self.set_grpc(config.store.listen.substr(0, config.store.listen.rfind(':')) + ":" +
                std::to_string(rpc.port));
  worker->SetGrpc(self.grpc());
  reporter->Start(self);
  running = true;
  StartFollower();
  spdlog::info("store of model {}: {}, {} KV blocks of {} tokens ({} bytes each)", model.name(),
               context.layout.ToString(), pool->stats().slots, context.layout.block_tokens,
               context.layout.block_bytes());
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
const std::string& StoreServer::id() const { return impl_->context.self.worker_id(); }
bool StoreServer::ready() const { return impl_->reporter->status().ok() && !impl_->draining; }
void StoreServer::BeginDrain() { impl_->BeginDrain(); }

void StoreServer::Shutdown(absl::Duration grace) {
  if (std::exchange(impl_->shut_down, true)) return;
  if (impl_->running) impl_->BeginDrain();
  impl_->follower.reset();
  if (impl_->kv) impl_->kv->Stop();
  if (impl_->rpc.server) {
    impl_->rpc.server->Shutdown(std::chrono::system_clock::now() + absl::ToChronoMilliseconds(grace));
    impl_->rpc.server->Wait();
  }
  if (impl_->admin) impl_->admin->Shutdown(absl::ZeroDuration());  // it asks the reporter
  impl_->reporter.reset();
  if (impl_->write_behind) impl_->write_behind->Flush(grace);
}

}  // namespace tidepool
