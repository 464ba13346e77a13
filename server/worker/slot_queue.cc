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

absl::Status SlotQueue::Submit(const std::string& id, Attempt attempt, bool batch_class) {
  // Attempts run under the lock: that is what makes "never after Cancel" true, and keeps them in order.
  std::lock_guard lock(mu_);
  std::deque<Waiter>& queue = batch_class ? batch_ : online_;
  if (online_.empty() && queue.empty() && attempt()) return absl::OkStatus();
  if (batch_class ? Waiting() >= (max_waiting_ + 1) / 2 : online_.size() >= max_waiting_) {
    rejected_.Add();
    return absl::ResourceExhaustedError("all KV slots are taken and " + std::to_string(Waiting()) +
                                        " requests wait already (engine.max_waiting" +
                                        (batch_class ? ", of which batches may take half" : "") +
                                        "); try again later");
  }
  queue.push_back({id, std::move(attempt)});
  Show();
  wake_.notify_all();
  return absl::OkStatus();
}

void SlotQueue::Cancel(const std::string& id) {
  std::lock_guard lock(mu_);
  for (std::deque<Waiter>* queue : {&online_, &batch_}) {
    std::erase_if(*queue, [&](const Waiter& w) { return w.id == id; });
  }
  Show();
}

size_t SlotQueue::waiting() const {
  std::lock_guard lock(mu_);
  return Waiting();
}

void SlotQueue::Run() {
  std::unique_lock lock(mu_);
  while (!stop_) {
    std::deque<Waiter>& queue = online_.empty() ? batch_ : online_;
    if (queue.empty()) {
      wake_.wait(lock);
      continue;
    }
    if (queue.front().attempt()) {
      queue.pop_front();
      Show();
      continue;
    }
    wake_.wait_for(lock, std::chrono::milliseconds(1));
  }
}

}  // namespace tidepool
