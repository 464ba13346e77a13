#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <mutex>

#include "base/clock.h"
#include "server/batch/admission_core.h"
#include "server/batch/retry.h"

namespace tidepool {

// BatchGate: the room that several runs share, as AdmissionCore gives it out: whoever has least running goes
// first. Thread-safe.
class BatchGate {
 public:
  // `load`: what online traffic looks like, asked often; null: there is none to yield to.
  BatchGate(AdmissionCore::Options options, std::function<OnlineLoad()> load, const Clock& clock)
      : core_(options), load_(std::move(load)), clock_(clock) {}

  using RunId = uint64_t;
  RunId Join();
  // Nothing of it runs any more.
  void Leave(RunId run);

  // True: one more line of `run` counts as running. `more`: the run would start further ones.
  bool TryStart(RunId run);
  void SetHungry(RunId run, bool more);
  // A line that was started with TryStart ended; null: it was given back, or never sent.
  void Ended(RunId run, absl::Time started, const BatchReply* reply);
  // How many running lines of `run` should be stopped for online traffic.
  size_t GiveBack(RunId run);

  size_t running() const;
  // When TryStart may succeed that does not now, without a line ending; `now` or earlier: any time.
  absl::Time paused_until() const;

 private:
  struct Member {
    size_t running = 0;
    bool hungry = false;
  };
  OnlineLoad Load() const { return load_ ? load_() : OnlineLoad{}; }

  mutable std::mutex mu_;
  AdmissionCore core_;
  const std::function<OnlineLoad()> load_;
  const Clock& clock_;
  std::map<RunId, Member> members_;
  size_t running_ = 0;
  RunId next_ = 1;
};

}  // namespace tidepool
