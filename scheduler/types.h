#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "base/block_layout.h"
#include "kvstore/types.h"

// What the scheduler's core takes and gives: plain structs, one for each message of
// proto/tidepool/v1/cluster.proto (protobuf ends in server/). Times are on the driver's monotonic clock.
namespace tidepool {

// A worker's place in the scheduler's tables: dense, given out again after the worker is forgotten. Means
// nothing outside one core.
using WorkerIndex = uint32_t;

enum class Role : uint8_t { kPrefill = 1, kDecode = 2, kBoth = 3, kStore = 4 };
std::string_view RoleName(Role role);
inline bool CanPrefill(Role r) { return r == Role::kPrefill || r == Role::kBoth; }
inline bool CanDecode(Role r) { return r == Role::kDecode || r == Role::kBoth; }

// What must be equal before any KV is exchanged. The name is for people and not compared.
struct ModelIdentity {
  std::string name;
  std::string fingerprint;
  BlockLayout layout;
  uint32_t max_model_len = 0;
  uint32_t vocab_size = 0;
  uint32_t hidden_size = 0;  // of embeddings; follows from the fingerprint
  std::string kv_codec;      // enters the block keys; empty: none
};

struct WorkerAddress {
  std::string worker_id;
  std::string boot_id;
  std::string grpc;
  std::string transport;
  uint32_t pid = 0;
  std::string host;
  std::string arena;  // see cluster.proto
};

// `key` became readable in `tier` of the worker, or no longer is.
struct BlockEvent {
  BlockKey key;
  bool removed = false;
  Tier tier = Tier::kHost;
};

struct PrefillSample {
  uint32_t new_tokens = 0;
  uint32_t cached_tokens = 0;
  double seconds = 0;
};
struct DecodeSample {
  uint32_t batch = 0;
  uint64_t context_tokens = 0;  // summed over the batch
  double seconds = 0;           // of one step
};
// From where a worker can get a block that its own host tier lacks.
enum class FetchFrom : uint8_t { kPeerHost, kPeerDisk, kOwnDisk };
inline constexpr size_t kFetchSources = 3;

struct FetchSample {
  uint64_t bytes = 0;
  double seconds = 0;
  FetchFrom from = FetchFrom::kPeerHost;
};

// What one tier of a worker holds, and could.
struct TierLoad {
  Tier tier = Tier::kHost;
  uint64_t blocks = 0;
  uint64_t bytes_used = 0;
  uint64_t bytes_total = 0;
  bool healthy = true;
};

struct WorkerLoad {
  uint32_t running = 0;
  uint32_t waiting = 0;
  uint64_t queued_prefill_tokens = 0;
  uint64_t running_context_tokens = 0;
  uint32_t slots_total = 0;
  uint32_t slots_free = 0;  // free or evictable
  bool preempts = false;    // who goes first takes the slots of running requests behind it
};

struct WorkerReport {
  WorkerAddress address;
  Role role = Role::kBoth;
  ModelIdentity model;
  std::optional<Role> next_role;  // it drains, and has this role then
  bool draining = false;
  uint64_t seq = 0;  // from 1 at boot
  bool snapshot = false;
  std::vector<BlockEvent> events;
  WorkerLoad load;
  std::vector<TierLoad> tiers;
  std::vector<PrefillSample> prefills;
  std::vector<DecodeSample> decodes;
  std::vector<FetchSample> fetches;
  std::vector<std::string> prefilled;  // request ids
  std::vector<std::string> ended;      // those that it decoded
};

struct ReportResult {
  // InvalidArgument: a malformed report. FailedPrecondition: another model or layout than the cluster's, or a
  // process that was replaced by a newer one. ResourceExhausted: too many workers. Else OK.
  absl::Status status;
  bool resync = false;      // send a snapshot next
  bool registered = false;  // the worker was unknown, lost, or another process before
};

// Who yields to whom, and which objectives hold (SchedulerOptions::classes). A batch request is placed only
// where it takes nothing from the others.
enum class SloClass : uint8_t { kInteractive, kStandard, kBatch };
inline constexpr size_t kSloClasses = 3;
std::string_view SloClassName(SloClass slo_class);

struct PlaceRequest {
  std::string request_id;
  std::vector<BlockKey> keys;  // sealed blocks of the prompt, in order
  uint32_t prompt_tokens = 0;
  uint32_t max_tokens = 0;
  std::string tenant;  // empty: one more tenant
  // What kind of request it is (completion, chat, an application's name): how long answers get is learnt for
  // each (tenant, route). May be empty.
  std::string route;
  int32_t priority = 0;  // lower is served first, inside the class
  SloClass slo_class = SloClass::kStandard;
  // Zero: the configured SLO of its class.
  absl::Duration slo_ttft;
  absl::Duration slo_itl;
  std::vector<std::string> exclude_workers;
};

// What is known of a request when it has ended; zero: not known.
struct FinishInfo {
  uint32_t output_tokens = 0;
  double ttft_seconds = 0;
  double itl_seconds = 0;  // mean
  // Of the prompt's tokens: where their blocks were.
  uint32_t cached_host_tokens = 0;    // in the host tier of who prefilled
  uint32_t cached_remote_tokens = 0;  // in another worker's
  uint32_t cached_disk_tokens = 0;    // on a disk
  uint64_t fetched_bytes = 0;
  bool completed = true;  // false: cancelled or failed; its length teaches nothing
  bool cut = false;       // at its limit: nor does this
};

// Prefix blocks [begin, end) are expected on `worker`.
struct PrefixHolder {
  WorkerAddress worker;
  uint32_t begin = 0;
  uint32_t end = 0;
  Tier tier = Tier::kHost;  // there
  double seconds = 0;       // to fetch them, predicted
};

struct Placement {
  WorkerAddress decode;
  std::optional<WorkerAddress> prefill;  // absent: the decode worker prefills by itself
  std::vector<PrefixHolder> holders;     // of what the prefilling worker should fetch
  uint32_t expected_cached_tokens = 0;   // held or fetched
  double ttft_seconds = 0;
  double itl_seconds = 0;
  std::string reason;
};

struct Rejection {
  std::string reason;     // one sentence a person understands
  std::string_view kind;  // label: ttft, itl, inflight, memory, batch
  double ttft_seconds = 0;
  double itl_seconds = 0;
  uint32_t retry_after_seconds = 1;
};

// One way in which the request could have been served; what Explain shows.
struct Candidate {
  std::string worker_id;
  std::string_view kind;        // prefill, local, decode
  uint32_t cached_tokens = 0;   // held by this worker
  uint32_t fetched_tokens = 0;  // worth fetching from another
  double queue_seconds = 0;
  double fetch_seconds = 0;
  double compute_seconds = 0;
  double total_seconds = 0;  // to the first token
  double itl_seconds = 0;
  bool chosen = false;
  std::string note;
};

struct PlaceResult {
  // OK: `placement` is set. ResourceExhausted: `rejection` is set. Unavailable: no worker can take it now.
  // InvalidArgument: a request that no worker of this cluster could ever serve, or a malformed one.
  absl::Status status;
  std::optional<Placement> placement;
  std::optional<Rejection> rejection;
  std::vector<Candidate> candidates;  // Explain only
};

// What was decided for one request, predicted and measured. Names no token and no text.
struct RequestRecord {
  std::string request_id;
  std::string tenant;
  SloClass slo_class = SloClass::kStandard;
  absl::Time placed_at;
  std::string decode_worker;   // empty where rejected
  std::string prefill_worker;  // the decode worker where it prefills by itself
  std::string holder;          // from which a prefix was to be fetched; empty: from none
  uint32_t prompt_tokens = 0;
  uint32_t expected_cached_tokens = 0;
  uint32_t expected_output_tokens = 0;
  double predicted_ttft_seconds = 0;
  double predicted_itl_seconds = 0;
  // open (placed, not ended), done, failed, lost (with its worker, or unheard of for too long), rejected, and
  // rejected_decode (when its prefill had ended).
  std::string_view outcome;
  std::string_view rejection_kind;  // as Rejection's; empty where none
  FinishInfo actual;                // where done or failed
};

// Where a block is, and how much of a chain a worker holds.
struct BlockHolder {
  std::string worker_id;
  std::vector<Tier> tiers;  // nearest first
};
struct WorkerPrefix {
  std::string worker_id;
  uint32_t blocks = 0;
  uint32_t near_blocks = 0;  // the leading ones in its host tier or nearer
};

enum class WorkerState : uint8_t { kReady, kDraining, kLost };
std::string_view WorkerStateName(WorkerState state);

struct WorkerView {
  WorkerAddress address;
  Role role = Role::kBoth;
  std::optional<Role> next_role;  // it drains, and has this role then
  WorkerState state = WorkerState::kReady;
  WorkerLoad load;
  std::vector<TierLoad> tiers;
  uint64_t indexed_blocks = 0;
  absl::Duration since_report;
  // Mean relative error of the latency model's last predictions; 0 before the first sample.
  double prefill_error = 0;
  double decode_error = 0;
  double fetch_error = 0;
};

}  // namespace tidepool
