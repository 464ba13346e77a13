#pragma once

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "scheduler/latency_model.h"
#include "scheduler/options.h"
#include "scheduler/prefix_index.h"
#include "scheduler/types.h"

namespace tidepool {

// One worker as the scheduler knows it.
struct Worker {
  WorkerAddress address;
  Role role = Role::kBoth;
  WorkerState state = WorkerState::kReady;
  uint64_t seq = 0;
  absl::Time reported_at;
  bool needs_snapshot = true;
  WorkerLoad load;
  std::vector<TierLoad> tiers;
  LatencyModel latency;
  std::vector<std::string> replaced_boots;  // of this id, the last few

  bool ready() const { return state == WorkerState::kReady; }
};

// What a placed request was promised, until its worker's own reports show it.
struct Booking {
  std::string request_id;
  WorkerIndex prefill = 0;  // == decode where it is prefilled locally
  WorkerIndex decode = 0;
  std::optional<WorkerIndex> holder;  // it fetches its prefix from
  absl::Time placed_at;
  absl::Time prefill_ends_at;  // predicted
  double prefill_seconds = 0;  // fetch and compute, without the queue
  uint32_t prompt_tokens = 0;
  uint32_t output_tokens = 0;  // expected
  uint32_t prefill_blocks = 0;
  uint32_t decode_blocks = 0;
  // Set when the prefill was reported to have ended.
  std::optional<absl::Time> decode_began_at;

  bool local() const { return prefill == decode; }
};

// ClusterView: the workers, what they hold and how fast they are, and the bookings on them: the state of the
// core. Soft: all of it comes back from reports within seconds. Not thread-safe; knows no time but `now`.
class ClusterView {
 public:
  explicit ClusterView(const SchedulerOptions& options);

  ReportResult Report(WorkerReport report, absl::Time now);
  // Workers past their timeout become lost (their blocks and bookings go), bookings past theirs vanish.
  // Returns the ids of the workers lost.
  std::vector<std::string> Tick(absl::Time now);

  // Replaces a booking of the same request (a retry).
  void Book(Booking booking);
  // False: no such booking (any more).
  bool Finish(const std::string& request_id, absl::Time now);
  size_t inflight() const { return bookings_.size(); }
  bool HasBooking(const std::string& request_id) const { return booking_of_.contains(request_id); }
  // In the order in which they were made, so that sums are the same on every run.
  const std::map<uint64_t, Booking>& bookings() const { return bookings_; }

  // Null for an index that is not in use. Indices are below size().
  const Worker* worker(WorkerIndex i) const { return workers_[i].get(); }
  size_t size() const { return workers_.size(); }
  const PrefixIndex& prefixes() const { return prefixes_; }
  // Of the workers here; that of the last ones while none is left.
  const std::optional<ModelIdentity>& model() const { return model_; }
  // Decayed mean time from the end of a prefill to the end of its request.
  double decode_seconds_mean() const { return decode_seconds_mean_; }

  // Sorted by id.
  std::vector<WorkerView> Workers(absl::Time now) const;

 private:
  absl::Status CheckReport(const WorkerReport& report) const;
  absl::Status CheckModel(const WorkerReport& report) const;
  absl::StatusOr<WorkerIndex> Register(const WorkerReport& report);
  void DropBookingsOf(WorkerIndex worker);
  void Lose(WorkerIndex worker);
  void EraseBooking(uint64_t id);

  const SchedulerOptions options_;
  std::vector<std::unique_ptr<Worker>> workers_;
  absl::flat_hash_map<std::string, WorkerIndex> index_of_;
  PrefixIndex prefixes_;
  std::optional<ModelIdentity> model_;
  std::map<uint64_t, Booking> bookings_;
  absl::flat_hash_map<std::string, uint64_t> booking_of_;
  uint64_t next_booking_ = 1;
  double decode_seconds_mean_;
};

}  // namespace tidepool
