#pragma once

#include <condition_variable>
#include <cstddef>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include "kvstore/disk/plane_codec.h"

namespace tidepool {

// CoderPool: threads that encode and decode payloads, so that neither callers nor the thread that serves the
// disk wait for that. Driver. Decoding goes first: somebody waits for it. Its queue is bounded by its owner,
// who gives every piece of work a buffer. Thread-safe; the destructor finishes what was given.
class CoderPool {
 public:
  using Work = std::function<void(PlaneCodec&)>;

  CoderPool(size_t threads, size_t width) : width_(width) {
    for (size_t i = 0; i < threads; ++i) threads_.emplace_back([this] { Run(); });
  }
  ~CoderPool() {
    {
      std::lock_guard lock(mu_);
      stop_ = true;
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  void Decode(Work work) { Push(decodes_, std::move(work)); }
  void Encode(Work work) { Push(encodes_, std::move(work)); }

 private:
  void Push(std::deque<Work>& queue, Work work) {
    {
      std::lock_guard lock(mu_);
      queue.push_back(std::move(work));
    }
    wake_.notify_one();
  }
  void Run() {
    PlaneCodec codec(width_);
    std::unique_lock lock(mu_);
    while (true) {
      wake_.wait(lock, [&] { return stop_ || !decodes_.empty() || !encodes_.empty(); });
      std::deque<Work>& queue = decodes_.empty() ? encodes_ : decodes_;
      if (queue.empty()) return;
      {
        const Work work = std::move(queue.front());
        queue.pop_front();
        lock.unlock();
        work(codec);
      }
      lock.lock();
    }
  }

  const size_t width_;
  std::mutex mu_;
  std::condition_variable wake_;
  std::deque<Work> decodes_, encodes_;
  bool stop_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace tidepool
