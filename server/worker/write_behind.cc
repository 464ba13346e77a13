#include "server/worker/write_behind.h"

#include <chrono>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>

#include "absl/container/flat_hash_set.h"
#include "base/log.h"
#include "base/status.h"

namespace tidepool {
namespace {

constexpr std::chrono::milliseconds kOpeningPoll(20);

Counter& Outcome(MetricRegistry& metrics, const char* outcome) {
  return metrics.AddCounter("tidepool_worker_stores_total",
                            "Sealed blocks offered to the disk tier, by what became of it.",
                            {{"outcome", outcome}});
}

}  // namespace

struct WriteBehind::Impl : std::enable_shared_from_this<Impl> {
  struct Item {
    BlockKey key;
    BlockLease lease;
  };

  explicit Impl(Options o)
      : options(std::move(o)),
        stored(Outcome(*options.metrics, "stored")),
        dropped_queue(Outcome(*options.metrics, "dropped_queue_full")),
        dropped_pressure(Outcome(*options.metrics, "dropped_slots_needed")),
        dropped_tier(Outcome(*options.metrics, "dropped_by_tier")),
        dropped_cleared(Outcome(*options.metrics, "cleared_meanwhile")),
        dropped_grace(Outcome(*options.metrics, "dropped_at_shutdown")),
        refused(Outcome(*options.metrics, "not_admitted")),
        present(Outcome(*options.metrics, "there_already")),
        queued_gauge(options.metrics->AddGauge("tidepool_worker_store_queue_blocks",
                                               "Blocks that wait to be stored or are being stored.")) {}

  void Run();
  // Holds mu, unlocks while it asks others.
  void StoreOne(std::unique_lock<std::mutex>& lock);
  // The tier is through with it.
  void End(Item& item, Counter& outcome);
  void OnWritten(const std::shared_ptr<Item>& item, const absl::Status& status);
  void Show() { queued_gauge.Set(static_cast<double>(queue.size() + writing)); }

  const Options options;
  Counter& stored;
  Counter& dropped_queue;
  Counter& dropped_pressure;
  Counter& dropped_tier;
  Counter& dropped_cleared;
  Counter& dropped_grace;
  Counter& refused;
  Counter& present;
  Gauge& queued_gauge;
  std::mutex mu;  // guards everything below
  std::condition_variable changed;
  std::deque<Item> queue;
  absl::flat_hash_set<BlockKey> known;  // queued or being written
  size_t writing = 0;
  bool stop = false;
  bool left = false;  // the end did not wait for the tier any longer
};

WriteBehind::WriteBehind(Options options) : impl_(std::make_shared<Impl>(std::move(options))) {
  TP_CHECK(impl_->options.pool != nullptr && impl_->options.tier != nullptr);
  thread_ = std::thread([impl = impl_.get()] { impl->Run(); });
}

WriteBehind::~WriteBehind() {
  {
    std::lock_guard lock(impl_->mu);
    impl_->stop = true;
  }
  impl_->changed.notify_all();
  thread_.join();
}

void WriteBehind::Offer(const BlockKey& key, const BlockLease& lease) {
  if (lease.empty()) return;
  Impl& s = *impl_;
  std::lock_guard lock(s.mu);
  if (s.stop || s.known.contains(key)) return;
  if (s.queue.size() + s.writing >= s.options.max_queued) {
    s.dropped_queue.Add();
    return;
  }
  s.known.insert(key);
  s.queue.push_back({key, lease.Clone(LeaseKind::kTierIo)});
  s.Show();
  s.changed.notify_all();
}

void WriteBehind::OfferAgain(const BlockKey& key, const BlockLease& lease) {
  const Options& options = impl_->options;
  if (!options.tier->Contains(key)) return Offer(key, lease);
  if (options.used) options.used(key);
}

void WriteBehind::DropQueued() {
  Impl& s = *impl_;
  std::deque<Impl::Item> dropped;  // leases end without the lock
  std::lock_guard lock(s.mu);
  dropped.swap(s.queue);
  for (const Impl::Item& item : dropped) s.known.erase(item.key);
  s.dropped_pressure.Add(dropped.size());
  s.Show();
  s.changed.notify_all();
}

bool WriteBehind::Flush(absl::Duration grace) {
  Impl& s = *impl_;
  std::deque<Impl::Item> dropped;
  std::unique_lock lock(s.mu);
  const bool all = s.changed.wait_for(lock, absl::ToChronoNanoseconds(grace),
                                      [&] { return s.queue.empty() && s.writing == 0; });
  dropped.swap(s.queue);
  for (const Impl::Item& item : dropped) s.known.erase(item.key);
  s.dropped_grace.Add(dropped.size());
  s.Show();
  return all;
}

size_t WriteBehind::queued() const {
  std::lock_guard lock(impl_->mu);
  return impl_->queue.size() + impl_->writing;
}

void WriteBehind::Impl::Run() {
  std::unique_lock lock(mu);
  while (true) {
    changed.wait(lock, [&] { return stop || (!queue.empty() && writing < options.max_writing); });
    if (stop) break;
    if (options.tier->health().state == TierState::kOpening) {
      // It will take them in a moment; what comes meanwhile waits, as far as the queue goes.
      changed.wait_for(lock, kOpeningPoll, [&] { return stop; });
      continue;
    }
    StoreOne(lock);
  }
  std::deque<Item> dropped;
  dropped.swap(queue);
  dropped_grace.Add(dropped.size());
  if (changed.wait_for(lock, absl::ToChronoNanoseconds(options.end_wait), [&] { return writing == 0; }))
    return;
  left = true;
  spdlog::warn("the disk tier has not answered {} stores; they are left to its end", writing);
}

void WriteBehind::Impl::End(Item& item, Counter& outcome) {
  outcome.Add();
  item.lease = BlockLease();
  std::lock_guard lock(mu);
  known.erase(item.key);
  --writing;
  Show();
  changed.notify_all();
}

void WriteBehind::Impl::StoreOne(std::unique_lock<std::mutex>& lock) {
  auto item = std::make_shared<Item>(std::move(queue.front()));
  queue.pop_front();
  ++writing;
  lock.unlock();
  const std::optional<BlockInfo> info = options.pool->Info(item->key);
  if (options.tier->Contains(item->key)) {
    End(*item, present);
  } else if (!info) {
    End(*item, dropped_cleared);
  } else if (options.admit && !options.admit(*info)) {
    End(*item, refused);
  } else {
    options.tier->Write(*info, item->lease.data(), [self = shared_from_this(), item](const absl::Status& s) {
      self->OnWritten(item, s);
    });
  }
  lock.lock();
}

void WriteBehind::Impl::OnWritten(const std::shared_ptr<Item>& item, const absl::Status& status) {
  if (!status.ok()) {
    spdlog::debug("a block was not stored: {}", status.ToString());
    return End(*item, dropped_tier);
  }
  if (options.pool->Info(item->key)) return End(*item, stored);
  // What is leased is not evicted, so somebody erased it; a clear of the disk may have come and gone between
  // the look at the pool and the write.
  const auto erased = [self = shared_from_this(), item](const absl::Status& s) {
    if (!s.ok()) spdlog::warn("a cleared block stays on the disk: {}", s.ToString());
    self->End(*item, self->dropped_cleared);
  };
  {
    std::unique_lock lock(mu);
    if (left) {
      lock.unlock();
      return erased(absl::UnavailableError("the tier is being closed"));
    }
  }
  options.tier->Erase(item->key, erased);
}

}  // namespace tidepool
