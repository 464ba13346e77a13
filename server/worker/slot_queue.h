#pragma once

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "base/clock.h"
#include "base/probe.h"
#include "server/worker/slot_core.h"

namespace tidepool {

// What became of an attempt to have slots.
struct SlotGrant {
  bool granted = false;  // or it is over, and wants none
  size_t slots = 0;      // that it has now, or else those that were missing, at least 1
};

// SlotQueue: admission to the block pool, in the order of a SlotCore, which also says who gives its slots up
// for another. Requests wait here, holding nothing, so that waiting requests cannot block each other, until
// their slots can be had; then it knows them until Released. Beyond its limit (see SlotCore::Full) Submit
// fails with ResourceExhausted; who was preempted waits however many do. Driver: owns a thread, which sleeps
// while nobody waits and otherwise tries the next every millisecond: leases are dropped on any thread,
// without notice.
class SlotQueue {
 public:
  // What a call knows of its place in the queue: another of the same name may have got in instead, and keeps
  // its own. Not thread-safe.
  struct Place {
    bool entered = false, left = false;
    // True, once, where it has entered: the queue is to be told.
    bool Leave() { return entered && !std::exchange(left, true); }
  };

  struct Request {
    std::string id;  // not in use
    std::string tenant;
    bool batch_class = false;
    int32_t priority = 0;  // lower first, inside the class
    uint32_t prompt_tokens = 0;

    // Runs on one thread at a time and never after Cancel(id) returned.
    std::function<SlotGrant()> attempt;
    // Asks it for its slots, which it has been granted. True: Preempted or Released follows. False: not now.
    // Null: it is never asked.
    std::function<bool()> preempt;
    // Whether preempt would be true, most likely: nobody else is asked along with one that would say no.
    // Null: it would.
    std::function<bool()> may_preempt;
    // After Preempted, before the next attempt, on the queue's thread or that of a Submit: saves what is to
    // be saved. Returns what it cost, in tokens' worth: its tenant's.
    std::function<double()> swap_out;
    // Tokens of its answer drawn by now. Null: none ever.
    std::function<uint32_t()> outputs;
  };

  SlotQueue(const SlotCore::Options& options, MetricRegistry& metrics, const Clock* clock = &Clock::Real());
  ~SlotQueue();

  // Tries at once on the caller's thread if nobody waits that goes first; else queues, or where it may not,
  // makes nobody give way. AlreadyExists: one of that id is here.
  absl::Status Submit(Request request);
  // It does not want slots any more, or has none.
  void Cancel(const std::string& id);

  // Of one that was granted. Both take one leaf lock only, for any thread that holds others, the engine's
  // too. It has ended and gives its slots up, or has done so.
  void Released(const std::string& id);
  // It has given them up and is to have some again (asked for it or not).
  void Preempted(const std::string& id);

  size_t waiting() const;

 private:
  struct Notice {
    std::string id;
    bool preempted;
  };
  void Run();
  void Notify(Notice notice);
  // These hold mu_.
  void TakeNotices();
  void Count();
  // True: the one that is next has its slots. Else others are asked for theirs, where it may preempt.
  bool TryNext(uint64_t id, bool may_preempt);
  void Forget(const std::string& id);
  void Show() { waiting_gauge_.Set(static_cast<double>(core_.waiting())); }

  const Clock* const clock_;
  Gauge& waiting_gauge_;
  Counter& rejected_;
  const size_t max_waiting_;

  mutable std::mutex mu_;
  SlotCore core_;
  absl::flat_hash_map<std::string, uint64_t> ids_;
  absl::flat_hash_map<uint64_t, Request> requests_;
  uint64_t next_id_ = 1;

  std::mutex notices_mu_;  // taken last
  std::condition_variable wake_;
  std::vector<Notice> notices_;  // at most two for each that is known
  bool stirred_ = false;         // there is something new
  bool stop_ = false;
  std::thread thread_;
};

}  // namespace tidepool
