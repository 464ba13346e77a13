#include "server/worker/write_behind.h"

#include <chrono>
#include <memory>
#include <optional>
#include <utility>

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

WriteBehind::WriteBehind(Options options)
    : options_(std::move(options)),
      stored_(Outcome(*options_.metrics, "stored")),
      dropped_queue_(Outcome(*options_.metrics, "dropped_queue_full")),
      dropped_pressure_(Outcome(*options_.metrics, "dropped_slots_needed")),
      dropped_tier_(Outcome(*options_.metrics, "dropped_by_tier")),
      dropped_cleared_(Outcome(*options_.metrics, "cleared_meanwhile")),
      dropped_grace_(Outcome(*options_.metrics, "dropped_at_shutdown")),
      refused_(Outcome(*options_.metrics, "not_admitted")),
      present_(Outcome(*options_.metrics, "there_already")),
      queued_gauge_(options_.metrics->AddGauge("tidepool_worker_store_queue_blocks",
                                               "Blocks that wait to be stored or are being stored.")) {
  TP_CHECK(options_.pool != nullptr && options_.tier != nullptr);
  thread_ = std::thread([this] { Run(); });
}

WriteBehind::~WriteBehind() {
  {
    std::lock_guard lock(mu_);
    stop_ = true;
  }
  changed_.notify_all();
  thread_.join();
}

void WriteBehind::Show() { queued_gauge_.Set(static_cast<double>(queue_.size() + writing_)); }

void WriteBehind::Offer(const BlockKey& key, const BlockLease& lease) {
  if (lease.empty() || !lease.writable()) return;
  std::lock_guard lock(mu_);
  if (stop_ || known_.contains(key)) return;
  if (queue_.size() + writing_ >= options_.max_queued) {
    dropped_queue_.Add();
    return;
  }
  known_.insert(key);
  queue_.push_back({key, lease.Clone(LeaseKind::kTierIo)});
  Show();
  changed_.notify_all();
}

void WriteBehind::OfferAgain(const BlockKey& key, const BlockLease& lease) {
  if (!options_.tier->Contains(key)) Offer(key, lease);
}

void WriteBehind::DropQueued() {
  std::deque<Item> dropped;  // leases end without the lock
  std::lock_guard lock(mu_);
  dropped.swap(queue_);
  for (const Item& item : dropped) known_.erase(item.key);
  dropped_pressure_.Add(dropped.size());
  Show();
  changed_.notify_all();
}

bool WriteBehind::Flush(absl::Duration grace) {
  std::deque<Item> dropped;
  std::unique_lock lock(mu_);
  const bool all = changed_.wait_for(lock, absl::ToChronoNanoseconds(grace),
                                     [&] { return queue_.empty() && writing_ == 0; });
  dropped.swap(queue_);
  for (const Item& item : dropped) known_.erase(item.key);
  dropped_grace_.Add(dropped.size());
  Show();
  return all;
}

size_t WriteBehind::queued() const {
  std::lock_guard lock(mu_);
  return queue_.size() + writing_;
}

void WriteBehind::Run() {
  std::unique_lock lock(mu_);
  while (true) {
    changed_.wait(lock, [&] { return stop_ || (!queue_.empty() && writing_ < options_.max_writing); });
    if (stop_) break;
    if (options_.tier->health().state == TierState::kOpening) {
      // It will take them in a moment; what comes meanwhile waits, as far as the queue goes.
      changed_.wait_for(lock, kOpeningPoll, [&] { return stop_; });
      continue;
    }
    StoreOne(lock);
  }
  std::deque<Item> dropped;
  dropped.swap(queue_);
  dropped_grace_.Add(dropped.size());
  changed_.wait(lock, [&] { return writing_ == 0; });
}

void WriteBehind::StoreOne(std::unique_lock<std::mutex>& lock) {
  auto item = std::make_shared<Item>(std::move(queue_.front()));
  queue_.pop_front();
  ++writing_;
  lock.unlock();
  const auto end = [this, item](Counter& outcome) {
    outcome.Add();
    item->lease = BlockLease();
    std::lock_guard again(mu_);
    known_.erase(item->key);
    --writing_;
    Show();
    changed_.notify_all();
  };
  const std::optional<BlockInfo> info = options_.pool->Info(item->key);
  if (options_.tier->Contains(item->key)) {
    end(present_);
  } else if (!info) {
    end(dropped_cleared_);
  } else if (options_.admit && !options_.admit(*info)) {
    end(refused_);
  } else {
    options_.tier->Write(*info, item->lease.data(), [this, end, item](const absl::Status& status) {
      if (!status.ok()) spdlog::debug("a block was not stored: {}", status.ToString());
      if (status.ok() && !options_.pool->Info(item->key)) {
        // What is leased is not evicted, so somebody erased it; a clear of the disk may have come and gone
        // between the look at the pool and the write.
        options_.tier->Erase(item->key, [this, end](const absl::Status& erased) {
          if (!erased.ok()) spdlog::warn("a cleared block stays on the disk: {}", erased.ToString());
          end(dropped_cleared_);
        });
        return;
      }
      end(status.ok() ? stored_ : dropped_tier_);
    });
  }
  lock.lock();
}

}  // namespace tidepool
