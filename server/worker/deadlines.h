#pragma once

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <thread>

#include "absl/time/time.h"
#include "base/clock.h"

namespace tidepool {

// Deadlines: calls that are due at a time. Driver: owns a thread that sleeps until the next. What is called
// must not block. As many wait as there are callers that wait for something: their number is bounded
// elsewhere. Thread-safe.
class Deadlines {
 public:
  using Id = uint64_t;

  explicit Deadlines(const Clock* clock = &Clock::Real());
  // Calls nothing more.
  ~Deadlines();

  // Calls `due` once, on the thread, when `when` (on the clock) has come.
  Id At(absl::Time when, std::function<void()> due);
  // True: it will not be called. False: it was, or is being called now.
  bool Cancel(Id id);

 private:
  void Run();

  const Clock* const clock_;
  std::mutex mu_;
  std::condition_variable wake_;
  std::map<std::pair<absl::Time, Id>, std::function<void()>> due_;
  std::map<Id, absl::Time> times_;
  Id next_ = 1;
  bool stop_ = false;
  std::thread thread_;
};

}  // namespace tidepool
