#pragma once

#include <functional>
#include <memory>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "base/clock.h"
#include "base/probe.h"
#include "config/config.h"
#include "kvstore/block_pool.h"
#include "server/engine/model_runner.h"
#include "server/engine/preempted_sequence.h"
#include "server/engine/types.h"

namespace tidepool {

// Engine: runs sequences in one continuous batch, step by step, on a thread of its own (Driver around
// BatchCore). Publishes every block that fills up. Never waits on I/O or on a sink. A sequence that fails
// (NaN logits, no block left, a constraint that fails) ends alone. The mask of a constrained sequence's next
// token is computed on a second thread while the model computes; where it comes late, the token is drawn
// after a later step, and the others do not wait. Thread-safe.
class Engine {
 public:
  struct Options {
    EngineConfig config;
    std::unique_ptr<ModelRunner> runner;
    BlockPool* pool = nullptr;          // outlives the engine; its layout equals the runner's
    std::string role;                   // label of the metrics: prefill, decode, both
    MetricRegistry* metrics = nullptr;  // outlives the engine
    const Clock* clock = &Clock::Real();
    // A token whose mask takes longer, from its turn on, ends its sequence (DeadlineExceeded).
    absl::Duration mask_deadline = absl::Seconds(10);
    // The pool has no block for an answer that grows, and somebody is preempted or ends next: whoever keeps
    // blocks that can be done without gives them up. On the engine's thread; null: nobody does.
    std::function<void()> on_short;
  };

  // Starts the thread. InvalidArgument: a limit of 0, max_step_tokens below max_batch (a step decodes every
  // running sequence), an order that there is not, or a pool with another layout.
  static absl::StatusOr<std::unique_ptr<Engine>> Start(Options options);
  // As Stop.
  ~Engine();

  // Takes the sequence over. Errors, upon which the sink is never called and the leases are dropped:
  // InvalidArgument (names field, value and limit), AlreadyExists (request_id), ResourceExhausted
  // (max_waiting online sequences wait; for one of the batch class: half as many of either; or
  // max_waiting_per_tenant of its tenant), Unavailable (draining or stopped).
  absl::Status Submit(SequenceSpec spec);

  // The sequence ends with kCancelled before the next step starts, its leases with it. False: no such
  // sequence (any more), which is no error.
  bool Cancel(std::string_view request_id);

  // The sequence is preempted before the next step starts: its sink hears OnPreempted, unless it has ended by
  // then. False: no such sequence, or one that may not be.
  bool Preempt(std::string_view request_id);

  // What a preempted sequence goes on with, as SequenceSpec's fields of these names, for all of its tokens.
  struct ResumeWith {
    std::vector<BlockLease> blocks;
    uint32_t published_blocks = 0;
    uint32_t computed_tokens = 0;
    // Until its answer has that many tokens no other sequence's growth takes its blocks again.
    uint32_t keep_until_outputs = 0;
  };
  // Takes it back, whatever waits: it was admitted before. It begins before its equals. InvalidArgument, or
  // Unavailable (stopped): as Submit.
  absl::Status Resume(std::unique_ptr<PreemptedSequence> sequence, ResumeWith with);

  EngineStats stats() const;
  // What was measured since the last call; at most 1024 of each are kept, the newest.
  EngineObservations DrainObservations();

  // Refuses new sequences; those here run on.
  void Drain();
  // True once no sequence is left; false after `timeout`.
  bool WaitIdle(absl::Duration timeout) const;
  // Drain, end every sequence with kCancelled (status Unavailable), and join. Idempotent. Not from a sink.
  void Stop();

 private:
  struct Impl;
  explicit Engine(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace tidepool
