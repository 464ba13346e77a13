#include "kvstore/event_log.h"

#include <algorithm>
#include <chrono>

#include "base/status.h"

namespace tidepool {

EventLog::EventLog(size_t capacity, Counter* lost) : capacity_(capacity), lost_(lost) {
  TP_CHECK(capacity > 0);
}

void EventLog::Append(std::span<const PoolEvent> events) {
  if (events.empty()) return;
  {
    std::lock_guard lock(mu_);
    for (const PoolEvent& event : events) {
      const size_t at = next_ % capacity_;
      if (at >= ring_.size()) ring_.resize(std::min(capacity_, std::max<size_t>(at + 1, 2 * ring_.size())));
      ring_[at] = event;
      ring_[at].seq = next_++;
    }
  }
  grown_.notify_all();
}

EventLog::Page EventLog::Read(uint64_t from, size_t max) const {
  std::lock_guard lock(mu_);
  const uint64_t oldest = next_ > capacity_ ? next_ - capacity_ : 1;
  Page page;
  if (from == 0) from = oldest;
  if (from < oldest) {
    if (lost_ != nullptr) lost_->Add(oldest - from);
    page.lost = true;
    page.next = next_;
    return page;
  }
  const uint64_t end = std::min<uint64_t>(next_, from + std::min(max, kMaxPage));
  for (uint64_t n = from; n < end; ++n) page.events.push_back(ring_[n % capacity_]);
  page.next = std::max(from, end);
  return page;
}

uint64_t EventLog::next() const {
  std::lock_guard lock(mu_);
  return next_;
}

uint64_t EventLog::oldest() const {
  std::lock_guard lock(mu_);
  return next_ > capacity_ ? next_ - capacity_ : 1;
}

bool EventLog::WaitFor(uint64_t from, absl::Duration timeout) const {
  std::unique_lock lock(mu_);
  grown_.wait_for(lock, absl::ToChronoNanoseconds(timeout), [&] { return closed_ || next_ > from; });
  return !closed_ && next_ > from;
}

void EventLog::Close() {
  {
    std::lock_guard lock(mu_);
    closed_ = true;
  }
  grown_.notify_all();
}

}  // namespace tidepool
