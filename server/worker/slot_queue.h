#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <string>
#include <thread>

#include "absl/status/status.h"
#include "base/probe.h"

namespace tidepool {

// SlotQueue: first come, first served admission to the block pool, online requests before those of the batch
// class. Requests wait here, holding nothing (so that waiting requests cannot block each other), until their
// slots can be had. At most `max_waiting` online requests wait; one of the batch class may wait while fewer
// than half of that (rounded up) do, of either class. Beyond it Submit fails with ResourceExhausted. Driver:
// owns a thread, which sleeps while nobody waits and otherwise tries the head every millisecond: leases are
// dropped on any thread, without notice.
class SlotQueue {
 public:
  // True: granted (or failed for good and reported by itself). False: no slots yet, try again.
  using Attempt = std::function<bool()>;

  SlotQueue(size_t max_waiting, MetricRegistry& metrics);
  ~SlotQueue();

  // Tries at once on the caller's thread if nobody waits that goes first; else queues. `attempt` runs on one
  // thread at a time and never after Cancel(id) returned.
  absl::Status Submit(const std::string& id, Attempt attempt, bool batch_class = false);
  void Cancel(const std::string& id);
  size_t waiting() const;

 private:
  struct Waiter {
    std::string id;
    Attempt attempt;
  };
  void Run();
  size_t Waiting() const { return online_.size() + batch_.size(); }
  void Show() { waiting_gauge_.Set(static_cast<double>(Waiting())); }

  const size_t max_waiting_;
  Gauge& waiting_gauge_;
  Counter& rejected_;
  mutable std::mutex mu_;
  std::condition_variable wake_;
  std::deque<Waiter> online_, batch_;
  bool stop_ = false;
  std::thread thread_;
};

}  // namespace tidepool
