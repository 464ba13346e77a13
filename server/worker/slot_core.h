#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "scheduler/fair_queue.h"

namespace tidepool {

// SlotCore: who of those that wait for KV slots is served next, and who of those that have some is to give
// them up for it. A Core: no thread, no clock. Not thread-safe.
//
// Next is, by a FairQueue: online requests before those of the batch class, then the higher priority (who has
// waited for Options::aging counts with the highest that waits in its class), then who was preempted, then
// the tenant that was given least.
//
// A request may be preempted for one of a higher class, or of its class and a higher priority, and gives its
// slots up only where all that are preempted for one make room enough for it. The last in rank go first, of
// equals the one that was preempted least often, then the one that came to its slots last. So that nobody is
// preempted again and again, who has been needs kProgress tokens of its answer more than when it came back,
// twice as many each time: an answer of n tokens is preempted log2(n / kProgress) + 2 times at most. Two
// cannot preempt each other, as rank decides and does not change. A victim's slots are counted as it had them
// when it got them: what it shares with others is not freed, and somebody else is asked then.
class SlotCore {
 public:
  static constexpr uint32_t kProgress = 16;

  struct Options {
    size_t max_waiting = 1;
    FairQueue::Order order = FairQueue::Order::kVtc;
    bool preempt = true;
    absl::Duration aging = absl::Seconds(30);
  };
  explicit SlotCore(const Options& options);

  struct Request {
    uint64_t id = 0;  // not in use
    std::string tenant;
    bool batch_class = false;
    int32_t priority = 0;  // lower first, inside the class
    uint32_t prompt_tokens = 0;
    bool preemptible = false;
  };

  // At most max_waiting online requests wait; one of the batch class may wait while fewer than half of that
  // (rounded up) do, of either class.
  bool Full(bool batch_class) const;
  // It waits, however many do.
  void Push(const Request& request, absl::Time now);
  // Who is to be tried next; none: nobody waits.
  std::optional<uint64_t> Next(absl::Time now);
  // The one that waited has that many slots now.
  void Granted(uint64_t id, size_t slots, absl::Time now);
  // It has drawn so many tokens of its answer by now: what its tenant is charged for, and its progress.
  void Output(uint64_t id, uint32_t total);
  // Swap traffic and the like, in tokens' worth.
  void Charge(uint64_t id, double tokens, absl::Time now);
  // Ended, waiting or not. Unknown ids are ignored.
  void Remove(uint64_t id, absl::Time now);

  // Whom to ask for its slots where `waiter` lacks so many, of those that `may_be` asked now (null: all).
  // None: who might be asked would not do, or some that were asked have not answered yet.
  std::vector<uint64_t> Victims(uint64_t waiter, size_t missing,
                                const std::function<bool(uint64_t)>& may_be = nullptr);
  // It was asked; its answer is Preempted or Remove.
  void Asked(uint64_t id);
  // It has given its slots up, asked or not, and waits from now on. False: unknown.
  bool Preempted(uint64_t id, absl::Time now);
  // How many tokens more an answer must have, since it has its slots, before it can be preempted once more.
  static uint32_t Progress(uint32_t preempted);

  size_t waiting() const { return queue_.waiting(); }
  size_t running() const { return queue_.running(); }

 private:
  struct Entry {
    Request request;
    bool running = false;
    bool asked = false;
    size_t slots = 0;
    uint64_t granted = 0;    // when, in grants
    uint32_t preempted = 0;  // how often
    uint32_t outputs = 0;
    uint32_t counted = 0;  // of outputs, when it came to its slots
  };
  void Enqueue(const Entry& entry, absl::Time now);
  // Whether a's slots are to be had for b.
  static bool Below(const Request& a, const Request& b);

  const Options options_;
  FairQueue queue_;
  std::map<uint64_t, Entry> entries_;
  uint64_t grants_ = 0;
  size_t waiting_online_ = 0;
  size_t asked_ = 0;
};

}  // namespace tidepool
