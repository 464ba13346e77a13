#pragma once

#include <cstdint>
#include <map>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/time/time.h"
#include "scheduler/fair_queue.h"

namespace tidepool {

// One sequence's part of a step.
struct PlanItem {
  uint64_t id = 0;
  uint32_t tokens = 0;  // how many of its pending tokens to compute, from the first on
  bool decode = false;  // not part of a prefill
  bool last = false;    // no pending token is left after these: a token is to be drawn
  bool operator==(const PlanItem&) const = default;
};

// BatchCore: which sequences run next, and how many tokens of each: continuous batching with chunked
// prefill. A Core: no thread, no clock (every call takes `now`), no memory of its own beyond the sequences
// and what a FairQueue keeps of tenants; equal calls give equal plans. Not thread-safe.
//
// A step takes, within max_step_tokens, of the online sequences first and then of those of the batch class:
//   1. one token of every running sequence that decodes: online decodes are never held up by more than one
//      step;
//   2. prompts, as many of their tokens as the budget still takes: those that have begun, in order of
//   (priority
//      falling, when they began), and, while fewer than max_batch run, the next that waits to begin. That one
//      goes before those that have begun with a lower priority than its own, and after all others. A waiting
//      sequence with a single pending token (a handoff) queues in the same order.
//
// Which of those that wait begins next, a FairQueue says: the highest priority of the class, inside it by
// Options::order between tenants (with one tenant, and kVtc or kFcfs, that is arrival). Who has waited for
// Options::aging counts with the highest priority that waits. A tenant is charged for its prompt when it
// begins (a handoff's prompt was charged where it was computed), for each token of its answer that is
// computed on, twice, and gets back what of a prompt is not computed when it is removed. Time takes nobody
// out of the batch class.
//
// An online sequence that has begun keeps its place until Remove; with Options::yield_places, one of a lower
// priority loses it, once, to one that waits to begin, and goes on, with all that it has, before all that
// wait once it has been without one for Options::aging. One of the batch class loses it, the latest first, to
// an online one that could begin otherwise: it waits then with all that it has (its KV stays) and goes on
// where it was. So the batch class never holds an online sequence up by more than the step at hand, and gets
// nothing while online sequences take all.
class BatchCore {
 public:
  struct Options {
    uint32_t max_batch = 1;        // sequences running at once, >= 1
    uint32_t max_step_tokens = 1;  // >= max_batch, so that decodes always fit
    FairQueue::Order order = FairQueue::Order::kVtc;
    // Of one tenant, begun and not removed, online ones and those of the batch class each; 0: no limit of its
    // own.
    uint32_t max_running_per_tenant = 0;
    absl::Duration aging = absl::Seconds(30);  // zero: never
    bool yield_places = false;
  };
  explicit BatchCore(const Options& options);

  struct NewSequence {
    uint64_t id = 0;          // not in use
    uint32_t context = 0;     // tokens that are there already
    uint32_t pending = 1;     // >= 1, to be computed after them
    bool prefilled = false;   // its prompt was computed elsewhere: the one pending token is a decode
    std::string_view tenant;  // copied
    int32_t priority = 0;     // higher first
    bool batch_class = false;
    // It was here before and was preempted: it begins before its equals. `fresh` of its tokens were never
    // charged to its tenant; those that are computed again are not.
    bool resumed = false;
    uint32_t fresh = 0;
  };
  // It waits to begin. How many may wait is the caller's to limit.
  void Add(const NewSequence& sequence, absl::Time now);
  // A token was drawn after an item with `last`: it is pending now.
  void Continue(uint64_t id);
  // So many tokens more were drawn than Continue was told of (by a driver that does several steps in one).
  void CountOutput(uint64_t id, uint32_t tokens);
  // Finished, cancelled, failed or preempted. Unknown ids are ignored.
  void Remove(uint64_t id);

  // The next step; its tokens count as computed from now on. Empty: nothing to do. An item with `last`
  // pauses its sequence until Continue or Remove. Valid until the next call.
  const std::vector<PlanItem>& Step(absl::Time now);

  uint32_t running() const { return running_; }
  uint32_t waiting() const { return static_cast<uint32_t>(sequences_.size()) - running_; }
  uint32_t waiting_batch_class() const { return batch_class_ - running_batch_class_; }  // of waiting()
  uint64_t queued_prefill_tokens() const { return queued_prefill_; }
  uint64_t running_context_tokens() const { return running_context_; }

 private:
  // Order of those that have begun: class, priority falling, then when they began.
  struct Rank {
    bool batch_class;
    int64_t minus_priority;
    uint64_t begun;
    auto operator<=>(const Rank&) const = default;
  };
  struct Sequence {
    Rank rank;
    uint32_t context = 0;
    uint32_t pending = 0;
    uint32_t outputs = 0;  // drawn, as far as the queue was told
    uint32_t charged = 0;  // of its prompt, when it began
    bool running = false;
    bool decoding = false;  // the prompt is computed (once `pending` is)
    // When it lost its place to a higher priority; that happens once.
    absl::Time yielded = absl::InfiniteFuture();
  };

  using Ranked = std::map<Rank, uint64_t>;

  void Take(uint64_t id, Sequence& s, uint32_t tokens);
  // The next to begin of this class, where it may go before the one at `begun`. Null: none.
  const FairQueue::Item* NextToBegin(bool batch_class, Ranked::iterator begun);
  bool IsOf(Ranked::iterator it, bool batch_class) const;
  // What the sequences of one class get of a step's budget.
  void TakeDecodes(bool batch_class, uint32_t& budget);
  void TakePrefills(bool batch_class, uint32_t& budget);
  // Makes a place for an online sequence. False: there is none, and none to be had.
  bool MakePlace();
  // Takes an online sequence's place for one of a higher priority that waits.
  void YieldPlace();
  // Some that lost their places so are without for too long.
  bool Overdue() const;
  void Suspend(Sequence& s);
  // It begins, or goes.
  void WaitsNoMore(const Sequence& s);
  static Ranked::iterator Begin(Ranked& ranked, bool batch_class);
  static Ranked::iterator End(Ranked& ranked, bool batch_class);

  const Options options_;
  absl::flat_hash_map<uint64_t, Sequence> sequences_;
  FairQueue queue_;  // those that wait to begin, and what tenants were given
  // Of online ones that wait to begin: how many of each priority (negated).
  std::map<int64_t, uint32_t> waiting_ranks_;
  Ranked prefills_;  // begun: pending prompts, decodes that lost their place
  Ranked decodes_;   // running, prompt computed
  std::vector<PlanItem> plan_;
  uint64_t begun_ = 0;                     // so far
  absl::Time now_ = absl::InfinitePast();  // as of the last call that was told
  uint32_t running_ = 0;
  uint32_t batch_class_ = 0, running_batch_class_ = 0;
  uint64_t queued_prefill_ = 0;
  uint64_t running_context_ = 0;
};

}  // namespace tidepool
