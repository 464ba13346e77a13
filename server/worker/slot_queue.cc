#include "server/worker/slot_queue.h"

#include <algorithm>
#include <chrono>

namespace tidepool {

SlotQueue::SlotQueue(size_t max_waiting, MetricRegistry& metrics)
    : max_waiting_(max_waiting),
      waiting_gauge_(metrics.AddGauge("tidepool_worker_slot_queue_length", "Requests waiting for KV slots.")),
      rejected_(metrics.AddCounter("tidepool_worker_slot_queue_rejections_total",
                                   "Requests refused because the queue for KV slots was full.")),
      thread_([this] { Run(); }) {}

SlotQueue::~SlotQueue() {
  {
    std::lock_guard lock(mu_);
    stop_ = true;
  }
  wake_.notify_all();
  thread_.join();
}

absl::Status SlotQueue::Submit(const std::string& id, Attempt attempt) {
  // Attempts run under the lock: that is what makes "never after Cancel" true, and keeps them in order.
  std::lock_guard lock(mu_);
  if (waiters_.empty() && attempt()) return absl::OkStatus();
  if (waiters_.size() >= max_waiting_) {
    rejected_.Add();
    return absl::ResourceExhaustedError("all KV slots are taken and " + std::to_string(waiters_.size()) +
                                        " requests wait already (engine.max_waiting); try again later");
  }
  waiters_.push_back({id, std::move(attempt)});
  waiting_gauge_.Set(static_cast<double>(waiters_.size()));
  wake_.notify_all();
  return absl::OkStatus();
}

void SlotQueue::Cancel(const std::string& id) {
  std::lock_guard lock(mu_);
  std::erase_if(waiters_, [&](const Waiter& w) { return w.id == id; });
  waiting_gauge_.Set(static_cast<double>(waiters_.size()));
}

size_t SlotQueue::waiting() const {
  std::lock_guard lock(mu_);
  return waiters_.size();
}

void SlotQueue::Run() {
  std::unique_lock lock(mu_);
  while (!stop_) {
    if (waiters_.empty()) {
      wake_.wait(lock);
      continue;
    }
    if (waiters_.front().attempt()) {
      waiters_.pop_front();
      waiting_gauge_.Set(static_cast<double>(waiters_.size()));
      continue;
    }
    wake_.wait_for(lock, std::chrono::milliseconds(1));
  }
}

}  // namespace tidepool
