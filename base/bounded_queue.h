#pragma once

#include <condition_variable>
#include <cstddef>
#include <deque>
#include <mutex>
#include <optional>
#include <utility>

#include "absl/time/time.h"

namespace tidepool {

// BoundedQueue: many producers, many consumers, at most `capacity` items. Full means TryPush returns
// false and the producer decides (reject, drop, slow down); nothing here waits to push. Thread-safe.
template <typename T>
class BoundedQueue {
 public:
  explicit BoundedQueue(size_t capacity) : capacity_(capacity) {}

  // False when full or closed; `item` is then untouched.
  bool TryPush(T& item) {
    {
      std::lock_guard lock(mu_);
      if (closed_ || items_.size() >= capacity_) return false;
      items_.push_back(std::move(item));
    }
    ready_.notify_one();
    return true;
  }
  bool TryPush(T&& item) { return TryPush(item); }

  std::optional<T> TryPop() {
    std::lock_guard lock(mu_);
    return PopLocked();
  }

  // Waits at most `timeout` (InfiniteDuration: until closed); empty on timeout, and when closed and drained.
  std::optional<T> Pop(absl::Duration timeout) {
    std::unique_lock lock(mu_);
    const auto ready = [&] { return closed_ || !items_.empty(); };
    if (timeout == absl::InfiniteDuration()) {
      ready_.wait(lock, ready);  // now + infinity overflows the clock
    } else {
      ready_.wait_for(lock, absl::ToChronoNanoseconds(timeout), ready);
    }
    return PopLocked();
  }

  // No further pushes; what is queued may still be popped.
  void Close() {
    {
      std::lock_guard lock(mu_);
      closed_ = true;
    }
    ready_.notify_all();
  }

  size_t size() const {
    std::lock_guard lock(mu_);
    return items_.size();
  }
  bool closed() const {
    std::lock_guard lock(mu_);
    return closed_;
  }

 private:
  std::optional<T> PopLocked() {
    if (items_.empty()) return std::nullopt;
    std::optional<T> out(std::move(items_.front()));
    items_.pop_front();
    return out;
  }

  const size_t capacity_;
  mutable std::mutex mu_;
  std::condition_variable ready_;
  std::deque<T> items_;
  bool closed_ = false;
};

}  // namespace tidepool
