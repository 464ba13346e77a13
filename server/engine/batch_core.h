#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"

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
// prefill. A Core: no thread, no clock, no memory of its own beyond the sequences; equal calls give equal
// plans. Not thread-safe.
//
// A step takes, within max_step_tokens, of the online sequences first and then of those of the batch class:
//   1. one token of every running sequence that decodes: online decodes are never held up by more than one
//      step;
//   2. prompts in order of (priority falling, arrival): as many of their tokens as the budget still takes,
//      running ones and, while fewer than max_batch run, waiting ones. A waiting sequence with a single
//      pending token (a handoff) queues in the same order.
// An online sequence that has begun keeps its place until Remove. One of the batch class loses it, the latest
// first, to an online one that could begin otherwise: it waits then with all that it has (its KV stays) and
// goes on where it was. So the batch class never holds an online sequence up by more than the step at hand,
// and gets nothing while online sequences take all.
class BatchCore {
 public:
  struct Options {
    uint32_t max_batch = 1;        // sequences running at once, >= 1
    uint32_t max_step_tokens = 1;  // >= max_batch, so that decodes always fit
  };
  explicit BatchCore(const Options& options);

  // A new sequence; `id` is not in use. `pending` >= 1 tokens are to be computed after `context` that are
  // there already. `prefilled`: its prompt was computed elsewhere, so the pending token is a decode.
  void Add(uint64_t id, uint32_t context, uint32_t pending, bool prefilled, int32_t priority,
           bool batch_class = false);
  // A token was drawn after an item with `last`: it is pending now.
  void Continue(uint64_t id);
  // Finished, cancelled or failed. Unknown ids are ignored.
  void Remove(uint64_t id);

  // The next step; its tokens count as computed from now on. Empty: nothing to do. An item with `last`
  // pauses its sequence until Continue or Remove. Valid until the next call.
  const std::vector<PlanItem>& Step();

  uint32_t running() const { return running_; }
  uint32_t waiting() const { return static_cast<uint32_t>(sequences_.size()) - running_; }
  uint32_t waiting_batch_class() const { return batch_class_ - running_batch_class_; }  // of waiting()
  uint64_t queued_prefill_tokens() const { return queued_prefill_; }
  uint64_t running_context_tokens() const { return running_context_; }

 private:
  // Order of prefills: class, priority falling, then arrival.
  struct Rank {
    bool batch_class;
    int64_t minus_priority;
    uint64_t arrival;
    auto operator<=>(const Rank&) const = default;
  };
  struct Sequence {
    Rank rank;
    uint32_t context = 0;
    uint32_t pending = 0;
    bool running = false;
    bool decoding = false;  // the prompt is computed (once `pending` is)
  };

  using Ranked = std::map<Rank, uint64_t>;

  void Take(uint64_t id, Sequence& s, uint32_t tokens);
  // What the sequences of one class get of a step's budget.
  void TakeDecodes(bool batch_class, uint32_t& budget);
  void TakePrefills(bool batch_class, uint32_t& budget);
  // Makes a place for an online sequence. False: there is none, and none to be had.
  bool MakePlace();
  void Suspend(Sequence& s);
  static Ranked::iterator Begin(Ranked& ranked, bool batch_class);
  static Ranked::iterator End(Ranked& ranked, bool batch_class);

  const Options options_;
  absl::flat_hash_map<uint64_t, Sequence> sequences_;
  Ranked prefills_;  // pending prompts, waiting handoffs, decodes that lost their place
  Ranked decodes_;   // running, prompt computed
  std::vector<PlanItem> plan_;
  uint64_t next_arrival_ = 0;
  uint32_t running_ = 0;
  uint32_t batch_class_ = 0, running_batch_class_ = 0;
  uint64_t queued_prefill_ = 0;
  uint64_t running_context_ = 0;
};

}  // namespace tidepool
