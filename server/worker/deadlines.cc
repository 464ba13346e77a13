#include "server/worker/deadlines.h"

#include <algorithm>

namespace tidepool {

Deadlines::Deadlines(const Clock* clock) : clock_(clock), thread_([this] { Run(); }) {}

Deadlines::~Deadlines() {
  {
    std::lock_guard lock(mu_);
    stop_ = true;
  }
  wake_.notify_all();
  thread_.join();
}

Deadlines::Id Deadlines::At(absl::Time when, std::function<void()> due) {
  std::lock_guard lock(mu_);
  const Id id = next_++;
  const auto it = due_.emplace(std::pair(when, id), std::move(due)).first;
  times_.emplace(id, when);
  if (it == due_.begin()) wake_.notify_all();
  return id;
}

bool Deadlines::Cancel(Id id) {
  std::function<void()> dropped;  // what it holds may take locks as it goes
  std::lock_guard lock(mu_);
  const auto it = times_.find(id);
  if (it == times_.end()) return false;
  auto node = due_.extract(std::pair(it->second, id));
  dropped = std::move(node.mapped());
  times_.erase(it);
  return true;
}

void Deadlines::Run() {
  std::unique_lock lock(mu_);
  while (!stop_) {
    if (due_.empty()) {
      wake_.wait(lock);
      continue;
    }
    const absl::Duration left = due_.begin()->first.first - clock_->Now();
    if (left > absl::ZeroDuration()) {
      wake_.wait_for(lock, absl::ToChronoNanoseconds(std::min(left, absl::Seconds(1))));
      continue;
    }
    auto node = due_.extract(due_.begin());
    times_.erase(node.key().second);
    lock.unlock();
    std::exchange(node.mapped(), nullptr)();
    lock.lock();
  }
}

}  // namespace tidepool
