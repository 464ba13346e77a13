#include "server/kv/follower.h"

#include <utility>

#include "base/log.h"
#include "server/rpc/kv_convert.h"
#include "tidepool/v1/cluster.grpc.pb.h"

namespace tidepool {
namespace {

constexpr absl::Duration kLookInterval = absl::Seconds(1);
constexpr absl::Duration kAskTimeout = absl::Seconds(2);
constexpr size_t kSourcesMax = 64;
constexpr size_t kTakeBlocks = 64;

}  // namespace

Follower::Follower(Options options, const KvContext& context, BlockMover& mover, MetricRegistry& metrics)
    : options_(std::move(options)),
      context_(context),
      mover_(mover),
      dropped_(metrics.AddCounter("tidepool_store_follow_dropped_blocks_total",
                                  "Blocks that a store wanted and did not come to in time.")),
      failures_(metrics.AddCounter("tidepool_store_follow_failures_total",
                                   "Subscriptions and copies of a store that failed.")),
      wanted_(metrics.AddGauge("tidepool_store_follow_wanted_blocks", "Blocks that a store is yet to copy.")),
      followed_(metrics.AddGauge("tidepool_store_followed_workers", "Workers whose events a store follows.")),
      core_(options_.core),
      thread_([this] { Run(); }) {}

Follower::~Follower() {
  {
    std::lock_guard lock(mu_);
    stop_ = true;
    for (auto& [id, source] : sources_) source->call.TryCancel();
  }
  wake_.notify_all();
  thread_.join();
  for (auto& [id, source] : sources_) source->thread.join();
}

void Follower::Run() {
  absl::Time looked_at = absl::InfinitePast();
  std::unique_lock lock(mu_);
  while (!stop_) {
    lock.unlock();
    if (context_.clock->Now() - looked_at >= kLookInterval) {
      looked_at = context_.clock->Now();
      LookForWorkers();
    }
    Take();
    lock.lock();
    wake_.wait_for(lock, absl::ToChronoNanoseconds(kLookInterval),
                   [&] { return stop_ || core_.wanted() > 0; });
  }
}

void Follower::LookForWorkers() {
  grpc::ClientContext call;
  SetTimeout(call, kAskTimeout);
  AddClusterToken(call, context_.cluster_token);
  v1::ClusterReply cluster;
  const SchedulerLocator::Place scheduler = context_.scheduler->Get();
  if (scheduler.address.empty()) return;
  AddSchedulerTerm(call, scheduler.term);
  const auto stub = v1::Scheduler::NewStub(context_.channels->Get(scheduler.address));
  if (!stub->Cluster(&call, v1::ClusterRequest(), &cluster).ok()) return;  // the reporter says so, too
  std::vector<std::unique_ptr<Source>> gone;
  {
    std::lock_guard lock(mu_);
    for (auto it = sources_.begin(); it != sources_.end();) {
      if (it->second->ended) {
        gone.push_back(std::move(it->second));
        it = sources_.erase(it);
      } else {
        ++it;
      }
    }
    for (const v1::WorkerView& worker : cluster.workers()) {
      const auto& address = worker.address();
      if (worker.role() == v1::ROLE_STORE || worker.state() == "lost" || stop_ ||
          sources_.size() >= kSourcesMax || sources_.contains(address.worker_id()))
        continue;
      auto source = std::make_unique<Source>();
      source->address = address;
      source->thread = std::thread([this, s = source.get()] { Follow(*s); });
      sources_[address.worker_id()] = std::move(source);
    }
    followed_.Set(static_cast<double>(sources_.size()));
  }
  for (const auto& source : gone) source->thread.join();
}

void Follower::Follow(Source& source) {
  AddClusterToken(source.call, context_.cluster_token);
  const auto stub = v1::Kv::NewStub(context_.channels->Get(source.address.grpc()));
  const auto stream = stub->Subscribe(&source.call, v1::KvSubscribeRequest());
  v1::KvEventBatch batch;
  while (stream->Read(&batch)) {
    // Another process at the same address: the scheduler will tell of it.
    if (batch.boot_id() != source.address.boot_id()) break;
    OnBatch(source, batch);
  }
  source.call.TryCancel();
  const grpc::Status status = stream->Finish();
  std::lock_guard lock(mu_);
  if (!stop_) {
    failures_.Add();
    spdlog::info("events of {} ended: {}", source.address.worker_id(), status.error_message());
  }
  core_.OnGone(source.address.worker_id());
  source.ended = true;
}

void Follower::OnBatch(Source& source, const v1::KvEventBatch& batch) {
  const std::string& worker = source.address.worker_id();
  const absl::Time now = context_.clock->Now();
  std::lock_guard lock(mu_);
  for (const v1::KvEvent& event : batch.events()) {
    // Only what is in a host tier is taken: what is on a worker's disk survives it.
    const auto tier = FromProto(event.tier(), "tier");
    if (!tier.ok() || *tier != Tier::kHost) continue;
    if (event.kind() == v1::KvEvent::KIND_CLEARED) core_.OnGone(worker);
    const auto key = ToBlockKey(event.key(), "key");
    if (!key.ok()) continue;
    if (event.kind() == v1::KvEvent::KIND_REMOVED) core_.OnRemoved(worker, *key);
    if (event.kind() != v1::KvEvent::KIND_STORED && event.kind() != v1::KvEvent::KIND_MOVED) continue;
    std::optional<BlockKey> parent;
    if (const auto p = ToBlockKey(event.parent(), "parent"); p.ok()) parent = *p;
    // What was there before us was stored long ago: what follows it carries it on.
    core_.OnStored(worker, *key, parent, batch.snapshot() ? absl::InfinitePast() : now);
  }
  wanted_.Set(static_cast<double>(core_.wanted()));
  dropped_.Add(core_.dropped() - std::exchange(dropped_said_, core_.dropped()));
  if (core_.wanted() > 0) wake_.notify_all();
}

void Follower::Take() {
  FollowCore::Wanted wanted;
  v1::WorkerAddress from;
  {
    std::lock_guard lock(mu_);
    wanted = core_.Take(kTakeBlocks);
    wanted_.Set(static_cast<double>(core_.wanted()));
    const auto source = sources_.find(wanted.worker_id);
    if (source == sources_.end()) return;
    from = source->second->address;
  }
  MoveControl control;
  control.bytes_per_second = options_.bytes_per_second;
  control.cancelled = [this] {
    std::lock_guard lock(mu_);
    return stop_;
  };
  MoveTally tally;
  const absl::Status status = mover_.Copy(wanted.keys, from, control, tally);
  if (!status.ok() && !absl::IsCancelled(status)) {
    failures_.Add();
    spdlog::debug("{} blocks of {} not taken over: {}", wanted.keys.size() - tally.done, from.worker_id(),
                  std::string(status.message()));
  }
}

}  // namespace tidepool
