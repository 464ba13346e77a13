#pragma once

#include <functional>
#include <thread>
#include <vector>

#include "base/bounded_queue.h"

namespace tidepool {

// WorkPool: a few threads for work that is too long for an I/O thread (rendering, tokenising). The queue is
// bounded; full means the caller refuses the request. Thread-safe.
class WorkPool {
 public:
  WorkPool(int threads, size_t queue_max) : queue_(queue_max) {
    for (int i = 0; i < threads; ++i) {
      threads_.emplace_back([this] {
        for (;;) {
          auto work = queue_.Pop(absl::Seconds(1));
          if (work) {
            (*work)();
          } else if (queue_.closed()) {
            return;
          }
        }
      });
    }
  }
  ~WorkPool() { Stop(); }

  // False when full or stopped.
  bool TrySubmit(std::function<void()> work) { return queue_.TryPush(std::move(work)); }
  // Runs what is queued, then joins. Idempotent.
  void Stop() {
    queue_.Close();
    for (std::thread& thread : threads_) thread.join();
    threads_.clear();
  }

 private:
  BoundedQueue<std::function<void()>> queue_;
  std::vector<std::thread> threads_;
};

}  // namespace tidepool
