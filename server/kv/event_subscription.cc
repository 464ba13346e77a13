#include "server/kv/event_subscription.h"

#include <utility>
#include <vector>

#include "server/rpc/kv_convert.h"

namespace tidepool {
namespace {

// Events of one message: with tokens, some 300 KB.
constexpr size_t kBatchEvents = 1024;
// How often a quiet subscription looks whether it is still wanted.
constexpr absl::Duration kLook = absl::Milliseconds(100);

v1::KvEvent::Kind ToProto(PoolEventKind kind) {
  switch (kind) {
    case PoolEventKind::kStored:
      return v1::KvEvent::KIND_STORED;
    case PoolEventKind::kRemoved:
      return v1::KvEvent::KIND_REMOVED;
    case PoolEventKind::kCleared:
      return v1::KvEvent::KIND_CLEARED;
    case PoolEventKind::kMoved:
      return v1::KvEvent::KIND_MOVED;
  }
  return v1::KvEvent::KIND_UNSPECIFIED;
}

}  // namespace

// The gRPC half. Deletes itself when the call is over.
class EventSubscription::Reactor final : public grpc::ServerWriteReactor<v1::KvEventBatch> {
 public:
  explicit Reactor(std::shared_ptr<EventSubscription> owner) : owner_(std::move(owner)) {}

  void Write(v1::KvEventBatch batch) {
    in_flight_ = std::move(batch);
    StartWrite(&in_flight_);
  }

 private:
  void OnWriteDone(bool ok) override {
    std::lock_guard lock(owner_->mu_);
    owner_->writing_ = false;
    if (!ok) owner_->over_ = true;
    owner_->changed_.notify_all();
  }
  void OnCancel() override { owner_->Stop(); }
  void OnDone() override {
    std::function<void()> on_end;
    {
      std::lock_guard lock(owner_->mu_);
      owner_->over_ = true;
      owner_->reactor_ = nullptr;
      owner_->changed_.notify_all();
      on_end = std::move(owner_->on_end_);
    }
    if (on_end) on_end();
    delete this;
  }

  const std::shared_ptr<EventSubscription> owner_;
  v1::KvEventBatch in_flight_;
};

EventSubscription::EventSubscription(const KvContext& context, const v1::KvSubscribeRequest& request)
    : context_(context), with_tokens_(request.with_tokens()), next_(request.from_seq()) {
  const bool other_boot = !request.boot_id().empty() && request.boot_id() != context.self.boot_id();
  // A number of the future is another boot's, too.
  if (other_boot || next_ > context.pool->events().next()) next_ = 0;
}

EventSubscription::~EventSubscription() { Join(); }

grpc::ServerWriteReactor<v1::KvEventBatch>* EventSubscription::Start(std::function<void()> on_end) {
  auto* reactor = new Reactor(shared_from_this());
  std::lock_guard lock(mu_);
  reactor_ = reactor;
  on_end_ = std::move(on_end);
  thread_ = std::thread([this] { Run(); });
  return reactor;
}

void EventSubscription::Stop() {
  std::lock_guard lock(mu_);
  over_ = true;
  changed_.notify_all();
}

void EventSubscription::Join() {
  if (thread_.joinable() && thread_.get_id() != std::this_thread::get_id()) thread_.join();
}

bool EventSubscription::Over() {
  std::lock_guard lock(mu_);
  return over_;
}

void EventSubscription::Run() {
  while (!Over()) {
    if (next_ == 0 ? !SendSnapshot() : !SendEvents()) break;
  }
  std::unique_lock lock(mu_);
  over_ = true;
  changed_.wait(lock, [&] { return !writing_ || reactor_ == nullptr; });
  if (reactor_ != nullptr) {
    reactor_->Finish(
        {grpc::StatusCode::UNAVAILABLE, "the subscription ended; subscribe again from next_seq"});
  }
}

bool EventSubscription::Send(v1::KvEventBatch batch) {
  std::unique_lock lock(mu_);
  changed_.wait(lock, [&] { return over_ || !writing_; });
  if (over_ || reactor_ == nullptr) return false;
  writing_ = true;
  reactor_->Write(std::move(batch));
  return true;
}

v1::KvEventBatch EventSubscription::NewBatch() const {
  v1::KvEventBatch batch;
  batch.set_worker_id(context_.self.worker_id());
  batch.set_boot_id(context_.self.boot_id());
  return batch;
}

void EventSubscription::Describe(v1::KvEvent& event, const BlockKey& key, Tier tier) const {
  if (tier == Tier::kDisk) {
    const auto entry = context_.disk == nullptr ? std::nullopt : context_.disk->Find(key);
    if (!entry) return;
    if (entry->parent) event.set_parent(std::string(KeyBytes(*entry->parent)));
    event.set_tenant(entry->tenant);
    event.set_session(entry->session);
    return;
  }
  const auto info = context_.pool->Info(key);
  if (!info) return;
  if (info->parent) event.set_parent(std::string(KeyBytes(*info->parent)));
  if (with_tokens_) event.mutable_tokens()->Add(info->tokens.begin(), info->tokens.end());
  event.set_tenant(info->tenant);
  event.set_session(info->session);
}

bool EventSubscription::SendSnapshot() {
  // Noted first: what changes during the listing comes again as events.
  const uint64_t next = context_.pool->events().next();
  const auto begin_batch = [&] {
    v1::KvEventBatch batch = NewBatch();
    batch.set_snapshot(true);
    batch.set_snapshot_seq(next - 1);
    batch.set_next_seq(0);  // cut off here, it begins again
    return batch;
  };
  const auto add = [&](v1::KvEventBatch& batch, const BlockKey& key, Tier tier) {
    v1::KvEvent* event = batch.add_events();
    event->set_kind(v1::KvEvent::KIND_STORED);
    event->set_key(std::string(KeyBytes(key)));
    event->set_tier(tidepool::ToProto(tier));
    Describe(*event, key, tier);
  };
  for (std::optional<uint64_t> cursor = 0; cursor;) {
    const BlockPool::Page page = context_.pool->List(*cursor, kBatchEvents);
    cursor = page.next;
    v1::KvEventBatch batch = begin_batch();
    for (const BlockPool::Entry& entry : page.entries) add(batch, entry.info.key, Tier::kHost);
    if (batch.events_size() > 0 && !Send(std::move(batch))) return false;
  }
  for (std::optional<uint64_t> cursor = context_.disk == nullptr ? std::nullopt : std::optional<uint64_t>(0);
       cursor;) {
    const BlockTier::Page page = context_.disk->List(*cursor, kBatchEvents);
    cursor = page.next;
    v1::KvEventBatch batch = begin_batch();
    for (const TierEntry& entry : page.entries) add(batch, entry.key, Tier::kDisk);
    if (batch.events_size() > 0 && !Send(std::move(batch))) return false;
  }
  v1::KvEventBatch last = begin_batch();
  last.set_snapshot_end(true);
  last.set_next_seq(next);
  next_ = next;
  return Send(std::move(last));
}

bool EventSubscription::SendEvents() {
  if (!context_.pool->events().WaitFor(next_, kLook)) {
    // Closed logs answer at once: the process ends.
    std::unique_lock lock(mu_);
    changed_.wait_for(lock, absl::ToChronoNanoseconds(absl::Milliseconds(1)), [&] { return over_; });
    return !over_;
  }
  EventLog::Page page = context_.pool->events().Read(next_, kBatchEvents);
  if (page.lost) {
    next_ = 0;
    return true;
  }
  v1::KvEventBatch batch = NewBatch();
  for (const PoolEvent& e : page.events) {
    v1::KvEvent* event = batch.add_events();
    event->set_seq(e.seq);
    event->set_kind(ToProto(e.kind));
    event->set_tier(tidepool::ToProto(e.tier));
    if (e.kind == PoolEventKind::kMoved) event->set_from_tier(tidepool::ToProto(e.from));
    if (e.kind == PoolEventKind::kCleared) continue;
    event->set_key(std::string(KeyBytes(e.key)));
    if (e.kind != PoolEventKind::kRemoved) Describe(*event, e.key, e.tier);
  }
  next_ = page.next;
  batch.set_next_seq(next_);
  return Send(std::move(batch));
}

}  // namespace tidepool
