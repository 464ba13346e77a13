#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "scheduler/latency_model.h"
#include "scheduler/options.h"
#include "scheduler/prefix_index.h"
#include "scheduler/rank_tree.h"
#include "scheduler/types.h"

namespace tidepool {

// Where a booking is kept; given out again after it is gone.
using BookingSlot = uint32_t;

// What the bookings say of a worker that its last report does not. Whole numbers, so that sums are the same
// in whatever order they were made.
struct Demand {
  int64_t prefill_ns = 0;
  // Of the prefills that it shows already, until they have ended: what they were predicted to take to
  // compute, and their tokens.
  int64_t reported_ns = 0;
  uint64_t reported_tokens = 0;
  uint64_t prefill_tokens = 0;
  uint64_t blocks = 0;
  uint64_t requests = 0;
  uint32_t outgoing_fetches = 0;
};

// One worker as the scheduler knows it.
struct Worker {
  WorkerAddress address;
  Role role = Role::kBoth;
  std::optional<Role> next_role;  // it drains, and has this role then
  WorkerState state = WorkerState::kReady;
  uint64_t seq = 0;
  absl::Time reported_at;
  bool needs_snapshot = true;
  WorkerLoad load;
  std::vector<TierLoad> tiers;
  LatencyModel latency;
  std::vector<std::string> replaced_boots;  // of this id, the last few
  uint64_t name = 0;                        // orders workers as their ids do

  // Of its time, what prefills took lately (decayed).
  double prefill_share = 0;

  Demand demand;
  std::vector<BookingSlot> decoding;  // bookings whose decode worker this is, in no order
  uint64_t decoding_tokens = 0;       // of their prompts
  // Bookings that its report did not show when they were made, the oldest first: where there are any.
  std::deque<std::pair<BookingSlot, uint64_t>> unreported;  // with their serial

  bool ready() const { return state == WorkerState::kReady; }
  // Requests there.
  uint64_t requests() const { return uint64_t{load.running} + load.waiting + demand.requests; }
  uint64_t free_blocks() const {
    return load.slots_free - std::min<uint64_t>(load.slots_free, demand.blocks);
  }
};

// What a placed request was promised, until its worker's own reports show it.
struct Booking {
  std::string request_id;
  std::string tenant;
  std::string route;
  SloClass slo_class = SloClass::kStandard;
  int32_t priority = 0;
  absl::Duration slo_itl = absl::InfiniteDuration();
  WorkerIndex prefill = 0;  // == decode where it is prefilled locally
  WorkerIndex decode = 0;
  std::optional<WorkerIndex> holder;  // it fetches its prefix from
  absl::Time placed_at;
  absl::Time prefill_ends_at;  // predicted
  double prefill_seconds = 0;  // predicted, of compute alone
  uint32_t prompt_tokens = 0;
  uint32_t uncached_tokens = 0;     // of the prompt
  uint32_t output_tokens = 0;       // expected,
  uint32_t output_tokens_high = 0;  // and hardly ever exceeded
  bool length_learnt = false;       // from answers like it
  uint32_t prefill_blocks = 0;
  uint32_t decode_blocks = 0;
  uint64_t record = 0;  // the caller's number for it
  // Set when the prefill was reported to have ended.
  std::optional<absl::Time> decode_began_at;

  bool local() const { return prefill == decode; }
};

// ClusterView: the workers, what they hold and how fast they are, and the bookings on them: the state of the
// core. Soft: all of it comes back from reports within seconds. Not thread-safe; knows no time but `now`.
class ClusterView {
 public:
  explicit ClusterView(const SchedulerOptions& options);
  // See SchedulerCore::SetOptions.
  void SetOptions(const SchedulerOptions& options) { options_ = options; }

  ReportResult Report(WorkerReport report, absl::Time now);
  // Workers past their timeout become lost (their blocks and bookings go), bookings past theirs, or whose
  // worker was through with them a while ago, vanish. Returns the ids of the workers lost.
  std::vector<std::string> Tick(absl::Time now);

  // Replaces a booking of the same request (a retry).
  void Book(Booking booking);
  // The booking that ended; nullopt: none (any more).
  std::optional<Booking> Finish(const std::string& request_id, absl::Time now);
  size_t inflight() const { return booking_of_.size(); }
  // Null: none. Borrowed until the next change.
  const Booking* FindBooking(const std::string& request_id) const;
  const Booking& booking(BookingSlot slot) const { return bookings_[slot].booking; }
  // Those that ended since the last call with their worker or by expiry. To be called after Report and Tick.
  std::vector<Booking> TakeEnded() { return std::exchange(ended_, {}); }

  // Of a worker that is known.
  WorkerIndex IndexOf(std::string_view worker_id) const { return index_of_.find(worker_id)->second; }
  // Null for an index that is not in use. Indices are below size().
  const Worker* worker(WorkerIndex i) const { return workers_[i].get(); }
  size_t size() const { return workers_.size(); }
  const PrefixIndex& prefixes() const { return prefixes_; }
  // Of the workers here; that of the last ones while none is left.
  const std::optional<ModelIdentity>& model() const { return model_; }
  // Decayed mean time from the end of a prefill to the end of its request.
  double decode_seconds_mean() const { return decode_seconds_mean_; }
  // How long worker w takes to fetch, by what it measured; where it measured nothing from there yet, by what
  // the others did. (A guess in its place can say for ever that fetching is slow: nobody would try.)
  double FetchSeconds(const Worker& w, uint64_t bytes, FetchFrom from = FetchFrom::kPeerHost) const {
    return (w.latency.fetch_samples(from) > 0 ? w.latency : all_latency_).FetchSeconds(bytes, from);
  }

  // What is queued at worker i before it could begin a prompt, predicted.
  double QueueSeconds(const Worker& w, absl::Time now) const;

  // Orders of the ready workers, for those who do not want to look at all of them. An estimate for a prompt
  // of kTypicalTokens stands for the request.
  static constexpr uint32_t kTypicalTokens = 2048;
  // Those who can prefill and have nothing queued, by how fast they are; those who have, by when they are
  // through; both by free blocks, most first.
  const RankTree& idle_prefill() const { return idle_prefill_; }
  const RankTree& busy_prefill() const { return busy_prefill_; }
  const RankTree& roomy_prefill() const { return roomy_prefill_; }
  // Those who can decode, by how long a step would take with what is there, with half of what is on its way
  // to them, too, and with all of it; and by free blocks.
  const RankTree& quick_now_decode() const { return quick_now_decode_; }
  const RankTree& quick_half_decode() const { return quick_half_decode_; }
  const RankTree& quick_decode() const { return quick_decode_; }
  const RankTree& roomy_decode() const { return roomy_decode_; }
  // The same values for one worker: seconds until a typical prompt's first token (`now_seconds`: since the
  // Unix epoch), and of a decode step; infinite where it does not do that.
  double PrefillOrder(WorkerIndex i, double now_seconds) const {
    return std::max(0.0, order_[i].begins - now_seconds) + order_[i].then;
  }
  double DecodeOrder(WorkerIndex i) const { return order_[i].decode; }
  uint64_t FreeBlocks(WorkerIndex i) const { return order_[i].free; }

  // Sorted by id.
  std::vector<WorkerView> Workers(absl::Time now) const;

 private:
  struct Slot {
    Booking booking;
    uint64_t serial = 0;  // of the booking; 0: free
    // What of it is in the sums of its workers.
    bool in_prefill = false, in_reported = false, in_decode = false, in_holder = false;
    uint32_t at = 0;  // in its decode worker's `decoding`
    BookingSlot older = kNone, newer = kNone;
  };
  struct Order {
    double begins = 0;  // when the reported queue will have been worked off, seconds of the clock
    double then = 0;    // and from then on to the first token
    double decode = 0;
    uint64_t free = 0;
  };
  static constexpr BookingSlot kNone = ~BookingSlot{0};

  absl::Status CheckReport(const WorkerReport& report) const;
  absl::Status CheckModel(const WorkerReport& report) const;
  absl::StatusOr<WorkerIndex> Register(const WorkerReport& report);
  void Name(WorkerIndex i, const std::string& worker_id);
  void DropBookingsOf(WorkerIndex worker);
  void Lose(WorkerIndex worker);
  void EraseBooking(BookingSlot slot);
  void LeavePrefill(Slot& slot);
  void EnterReported(Slot& slot);
  void LeaveReported(Slot& slot);
  // Of what worker w's last report says to be queued.
  double ReportedQueueSeconds(const Worker& w) const;
  void LeaveDecode(Slot& slot);
  void LeaveHolder(Slot& slot);
  void Settle(WorkerIndex worker);
  // Puts worker i where it belongs in the orders. After every change of it.
  void Rank(WorkerIndex i);

  SchedulerOptions options_;
  std::vector<std::unique_ptr<Worker>> workers_;
  std::map<std::string, WorkerIndex, std::less<>> index_of_;
  PrefixIndex prefixes_;
  std::optional<ModelIdentity> model_;        // the workers'
  std::optional<ModelIdentity> store_model_;  // the stores', while no worker has named one
  std::deque<Slot> bookings_;
  std::vector<BookingSlot> free_;
  BookingSlot oldest_ = kNone, newest_ = kNone;
  absl::flat_hash_map<std::string, BookingSlot> booking_of_;
  std::vector<Booking> ended_;
  // Bookings whose decode worker is through with them, the oldest first, with their serial and since when.
  struct Ending {
    BookingSlot slot;
    uint64_t serial;
    absl::Time at;
  };
  std::deque<Ending> ending_;
  uint64_t next_serial_ = 1;
  double decode_seconds_mean_;
  LatencyModel all_latency_;  // of fetches, fitted to all workers' samples
  std::vector<Order> order_;
  RankTree idle_prefill_, busy_prefill_, roomy_prefill_;
  RankTree quick_decode_, quick_half_decode_, quick_now_decode_, roomy_decode_;
};

}  // namespace tidepool
