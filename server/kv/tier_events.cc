#include "server/kv/tier_events.h"

#include <vector>

namespace tidepool {
namespace {

constexpr size_t kPageEntries = 1024;

PoolEvent OnDisk(PoolEventKind kind, const BlockKey& key) {
  return {.kind = kind, .tier = Tier::kDisk, .key = key};
}

}  // namespace

TierEvents::TierEvents(BlockTier& tier, EventLog& log) : tier_(tier), log_(log) {
  tier_.SetObserver(this);
  // What it holds already, if it was on before anybody looked.
  if (tier_.health().state == TierState::kOn) {
    std::lock_guard lock(mu_);
    on_ = list_ = true;
  }
  thread_ = std::thread([this] { Run(); });
}

TierEvents::~TierEvents() {
  tier_.SetObserver(nullptr);
  {
    std::lock_guard lock(mu_);
    stop_ = true;
  }
  wake_.notify_all();
  thread_.join();
}

void TierEvents::OnStored(const BlockInfo& info) { log_.Append(OnDisk(PoolEventKind::kStored, info.key)); }

void TierEvents::OnRemoved(const BlockKey& key, TierRemoval) {
  log_.Append(OnDisk(PoolEventKind::kRemoved, key));
}

void TierEvents::OnHealth(const TierHealth& health) {
  std::lock_guard lock(mu_);
  const bool on = health.state == TierState::kOn;
  if (on == on_) return;
  on_ = on;
  list_ = on;
  if (!on) log_.Append(OnDisk(PoolEventKind::kCleared, {}));
  wake_.notify_all();
}

void TierEvents::Run() {
  std::unique_lock lock(mu_);
  while (!stop_) {
    wake_.wait(lock, [&] { return stop_ || list_; });
    if (stop_) return;
    list_ = false;
    lock.unlock();
    List();
    lock.lock();
  }
}

void TierEvents::List() {
  for (std::optional<uint64_t> cursor = 0; cursor;) {
    const BlockTier::Page page = tier_.List(*cursor, kPageEntries);
    cursor = page.next;
    std::vector<PoolEvent> events;
    for (const TierEntry& entry : page.entries) events.push_back(OnDisk(PoolEventKind::kStored, entry.key));
    log_.Append(events);
    // What went between the listing and its event: its removal was said too early.
    events.clear();
    for (const TierEntry& entry : page.entries) {
      if (!tier_.Contains(entry.key)) events.push_back(OnDisk(PoolEventKind::kRemoved, entry.key));
    }
    log_.Append(events);
    std::lock_guard lock(mu_);
    if (stop_ || !on_) return;
  }
}

}  // namespace tidepool
