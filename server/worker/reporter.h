#pragma once

#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "absl/time/time.h"
#include "base/probe.h"
#include "kvstore/block_pool.h"
#include "kvstore/block_tier.h"
#include "server/cluster/scheduler_locator.h"
#include "server/rpc/rpc.h"
#include "tidepool/v1/cluster.grpc.pb.h"

namespace tidepool {

// Reporter: keeps the scheduler's view of this worker fresh. Driver: owns a thread that sends a
// WorkerReport (events, load of the tiers, what `fill` adds) every `interval`, or at once when Nudge was
// called. A scheduler that was not the last one is told everything. A scheduler that cannot be reached is
// retried for ever (its state is rebuilt from these reports); one that refuses the worker makes registered()
// false and says why in the log and in status(). Thread-safe.
class Reporter {
 public:
  struct Options {
    std::shared_ptr<SchedulerLocator> scheduler;
    std::string cluster_token;
    absl::Duration interval;
    v1::WorkerReport base;      // role and model, the same in every report unless `fill` says otherwise
    BlockPool* pool = nullptr;  // its slots, its blocks, and the event log of all tiers
    BlockTier* disk = nullptr;  // null: none
    // Adds load and observations to a report, and what has changed of role, next_role and draining; called on
    // the reporter's thread.
    std::function<void(v1::WorkerReport&)> fill;
    // Called on the reporter's thread when what status() says has changed; may be empty.
    std::function<void(const absl::Status&)> on_status;
  };

  Reporter(Options options, ChannelCache& channels, MetricRegistry& metrics);
  ~Reporter();

  // Starts the thread. `self` is where peers reach this worker: known once it listens.
  void Start(v1::WorkerAddress self);

  // The process is about to end: reports no more but this once, that it drains and holds nothing, so that
  // nobody is sent here for blocks while the scheduler does not know yet that it is gone. Waits for the
  // answer, half a second at most on top of a report under way.
  void Leave();

  // Reports soon instead of at the end of the interval.
  void Nudge();
  // A request's prefill ended: told to the scheduler in the next report, which is sent soon.
  void Prefilled(const std::string& request_id);
  // A request that this worker decoded has ended: in the next report.
  void Ended(const std::string& request_id);
  void SetDraining();
  // OK while the scheduler accepts this worker.
  absl::Status status() const;
  // Of the last report that a scheduler accepted; nullopt: none yet.
  struct Told {
    v1::Role role = v1::ROLE_UNSPECIFIED;
    v1::Role next_role = v1::ROLE_UNSPECIFIED;
    bool draining = false;
  };
  std::optional<Told> told() const;

 private:
  void Run();
  void Stop();
  absl::Status SendOne();
  absl::Status Send(const v1::WorkerReport& report, absl::Duration timeout, v1::ReportReply& reply);
  // Events since the last report, or (the first part of) all that is here.
  void AddEvents(v1::WorkerReport& report);
  void AddTiers(v1::WorkerReport& report) const;

  Options options_;  // constant once started
  ChannelCache& channels_;
  Counter& failures_;
  mutable std::mutex mu_;
  std::condition_variable wake_;
  bool stop_ = false;
  bool nudged_ = false;
  bool draining_ = false;
  absl::Status status_;
  std::optional<Told> last_told_;
  std::vector<std::string> prefilled_, ended_;
  // Only the thread's own:
  uint64_t seq_ = 0;
  SchedulerLocator::Place told_;  // who was told last
  bool snapshot_next_ = true;
  uint64_t next_event_ = 0;
  // Where the listing of a snapshot goes on; none: it is told.
  std::optional<uint64_t> host_cursor_, disk_cursor_;
  std::thread thread_;
};

}  // namespace tidepool
