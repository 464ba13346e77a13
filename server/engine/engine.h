#pragma once

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
