#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "base/probe.h"
#include "server/engine/token_constraint.h"

namespace tidepool {

// ConstraintRun: a sequence's constraint with the mask of its next token. It belongs to one thread at a time:
// to the engine's, except from MaskWorker::Submit on until MaskWorker::Ready. Outlives its sequence where the
// mask worker still computes.
class ConstraintRun {
 public:
  // `stop_tokens`, below `vocab`, may come wherever the answer is complete.
  ConstraintRun(std::unique_ptr<TokenConstraint> constraint, std::vector<int32_t> stop_tokens,
                uint32_t vocab);

  TokenConstraint& constraint() { return *constraint_; }
  // What ComputeMask gave.
  const absl::Status& status() const { return status_; }
  std::span<const uint32_t> mask() const { return mask_; }
  // Sets mask() and status().
  void ComputeMask();

 private:
  friend class MaskWorker;
  const std::unique_ptr<TokenConstraint> constraint_;
  const std::vector<int32_t> stop_tokens_;
  std::vector<uint32_t> mask_;
  absl::Status status_;
  // The mask worker's, whose lock guards them.
  bool pending_ = false;
  bool slow_ = false;                                 // its last mask was
  std::chrono::steady_clock::time_point taken_up_{};  // while its mask is computed, else the epoch
};

// MaskWorker: computes the masks of the next tokens beside the engine's forward pass, one after another, in
// the order in which they were asked for; but those whose last mask took longer than kSlow stand back, so
// that one tenant's grammar does not slow down everybody's: they get every kSlowEvery-th turn, and those that
// nobody else wants. Driver: owns a thread.
class MaskWorker {
 public:
  static constexpr std::chrono::milliseconds kSlow{2};
  static constexpr int kSlowEvery = 16;

  // At most `queue_max` masks wait. `on_ready` runs on the worker's thread after each mask.
  MaskWorker(size_t queue_max, Histogram& seconds, std::function<void()> on_ready);
  // Drops what waits, and waits for the mask at hand.
  ~MaskWorker();

  // False: the queue is full, and `run` is still the caller's.
  bool Submit(std::shared_ptr<ConstraintRun> run);
  // The mask is there, and `run` the caller's again.
  bool Ready(const ConstraintRun& run) const;
  // Ready, waiting for it until `deadline` at most.
  bool WaitReady(const ConstraintRun& run, std::chrono::steady_clock::time_point deadline) const;
  // How long its mask has been computed by now; zero while it waits for its turn.
  std::chrono::nanoseconds Computing(const ConstraintRun& run) const;

 private:
  using Queue = std::deque<std::shared_ptr<ConstraintRun>>;

  void Loop();
  // Whose turn it is; one waits.
  std::shared_ptr<ConstraintRun> Take();

  const size_t queue_max_;
  Histogram& seconds_;
  const std::function<void()> on_ready_;

  mutable std::mutex mu_;
  std::condition_variable wake_;
  mutable std::condition_variable done_;
  Queue queue_, slow_queue_;  // together at most queue_max_
  int turns_ = 0;             // since the last of slow_queue_
  bool stop_ = false;
  std::thread thread_;
};

}  // namespace tidepool
