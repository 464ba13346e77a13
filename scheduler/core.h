#pragma once

#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/time/time.h"
#include "scheduler/cluster_view.h"
#include "scheduler/elasticity.h"
#include "scheduler/options.h"
#include "scheduler/placement.h"
#include "scheduler/predict_len.h"
#include "scheduler/replication.h"
#include "scheduler/types.h"

namespace tidepool {

// SchedulerCore: which workers serve which request. Core: holds no thread, no socket and no clock; the same
// calls with the same times give the same decisions, so a trace replays as a test and the simulator runs the
// code that ships. Not thread-safe: one owner (SchedulerServer in the daemon). `now` is on one monotonic
// clock and does not go back.
class SchedulerCore {
 public:
  // `lengths` null: LengthQuantiles. A simulator that knows the answers gives an oracle.
  explicit SchedulerCore(const SchedulerOptions& options, const ReplicationOptions& replication = {},
                         std::unique_ptr<LengthPredictor> lengths = nullptr);

  // From now on; what is booked stays as it was judged. Of the options that the configuration gives (see
  // SchedulerOptions and ReplicationOptions); the sizes of tables, seeds and the like stay as they were.
  void SetOptions(const SchedulerOptions& options, const ReplicationOptions& replication);

  // A worker registered, or told what changed. See ReportResult.
  ReportResult Report(WorkerReport report, absl::Time now);
  // Chooses workers and books the predicted work on them until the worker reports the prefill, Finish, the
  // worker is lost, or the booking expires. Asking again for the same request replaces its booking.
  PlaceResult Place(const PlaceRequest& request, absl::Time now);
  // What Place would answer, with every candidate; books nothing.
  PlaceResult Explain(const PlaceRequest& request, absl::Time now) const;
  // Whether a placed request whose prefill has just ended may decode where it was to: what AdmissionPolicy
  // kAtStage asks (the load now against its ITL objective). False: its booking is gone, do not call Finish.
  // True under every other policy, and for a request without booking.
  bool AdmitDecode(const std::string& request_id, absl::Time now);
  // A request ended; false: nothing was booked for it (any more). What `info` says is learnt from.
  bool Finish(const std::string& request_id, absl::Time now, const FinishInfo& info = {});
  // To be called about every worker_timeout/4: ends what ran out. Returns the workers lost just now.
  std::vector<std::string> Tick(absl::Time now);

  // Who holds each of `keys`: workers that are not lost, with the tiers, in registration order.
  std::vector<std::vector<BlockHolder>> Where(std::span<const BlockKey> keys) const;
  // How much of the chain `keys` each such worker holds; longest first, none without its first block.
  std::vector<WorkerPrefix> Prefixes(std::span<const BlockKey> keys) const;

  // See ReplicationCore; Step is to be called about once a second.
  std::vector<CopyOrder> Replicate(absl::Time now) { return replication_.Step(view_, now); }
  absl::StatusOr<std::vector<CopyOrder>> Evacuation(std::string_view worker_id, absl::Time now) const {
    return replication_.Evacuation(view_, worker_id, now);
  }
  absl::StatusOr<std::vector<CopyOrder>> Replication(std::span<const BlockKey> keys, uint32_t copies,
                                                     std::string_view to) const {
    return ReplicationCore::Replication(view_, keys, copies, to);
  }
  size_t hot_runs(absl::Time now) const { return replication_.hot_runs(now); }

  // What was decided for the last options.max_records requests, the latest first; at most `max`.
  std::vector<RequestRecord> RecentRequests(size_t max) const;
  // The latest decision for this request; nullopt: too long ago, or never.
  std::optional<RequestRecord> FindRequest(std::string_view request_id) const;

  // What ElasticityCore weighs.
  ElasticityLoad Elasticity(absl::Time now) const;

  std::vector<WorkerView> Workers(absl::Time now) const { return view_.Workers(now); }
  const std::optional<ModelIdentity>& model() const { return view_.model(); }
  size_t inflight() const { return view_.inflight(); }
  const PrefixIndex& prefixes() const { return view_.prefixes(); }
  uint64_t index_ignored() const { return view_.prefixes().ignored(); }

 private:
  // Fills status, placement or rejection. `evaluation` is set when one was made.
  PlaceResult Decide(const PlaceRequest& request, const PlacementInput& input, PolicyState& policy,
                     absl::Time now, Evaluation& evaluation) const;
  absl::Status CheckRequest(const PlaceRequest& request) const;
  PlacementInput InputFor(const PlaceRequest& request) const;
  Placement Describe(const Plan& plan) const;
  std::vector<Candidate> Candidates(const Evaluation& evaluation, const PlaceRequest& request,
                                    absl::Time now) const;
  // For Elasticity: a request that was placed, or refused for want of something.
  void Count(const PlaceResult& result, const Evaluation& evaluation, const PlaceRequest& request);
  // The slot of the next record, emptied.
  RequestRecord& NewRecord();
  // Of a booking; null: it is forgotten.
  RequestRecord* Open(const Booking& booking);
  void RecordEnded();

  SchedulerOptions options_;
  ClusterView view_;
  ReplicationCore replication_;
  std::unique_ptr<LengthPredictor> lengths_;
  PolicyState policy_;
  FairShare fair_;
  DecisionCounts counts_;
  std::vector<RequestRecord> records_;  // a ring
  uint64_t recorded_ = 0;
  TypicalRequest typical_;
  uint64_t typical_of_ = 0;  // requests
};

}  // namespace tidepool
