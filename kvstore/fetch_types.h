#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "absl/time/time.h"

namespace tidepool {

// A connection as a fetch core names it. The driver maps it to the transport's EndpointId.
using LaneId = uint64_t;

// Why a fetch did not deliver, and what was found odd on the way: label `reason` of
// tidepool_kv_transfer_failures_total (up to kQuarantined) and tidepool_kv_stale_frames_total (after it).
enum class FetchReason : uint8_t {
  kUnavailable,  // peer gone, silent or restarted
  kMismatch,     // HELLO differs
  kDeadline,
  kCancelled,
  kChecksum,  // bytes are not what the manifest says
  kBusy,      // a limit, here or there
  kFailed,    // the peer could not serve
  kQuarantined,
  kMalformed,        // a frame that does not decode
  kStaleBoot,        // of a process that is no more
  kUnknownFetch,     // of a fetch that has ended, or never was
  kStaleGeneration,  // for a slot that has moved on
  kWrongLength,
  kDuplicate,
  kOverCredit,  // more bytes on their way than were granted
};
inline constexpr size_t kFetchReasons = static_cast<size_t>(FetchReason::kOverCredit) + 1;
inline constexpr std::array<std::string_view, kFetchReasons> kFetchReasonNames = {
    "unavailable",   "mismatch",         "deadline",     "cancelled", "checksum",
    "busy",          "failed",           "quarantined",  "malformed", "stale_boot",
    "unknown_fetch", "stale_generation", "wrong_length", "duplicate", "over_credit"};

// Timings of the handoff. All are durations on this process's own clock.
struct FetchTimings {
  // First retransmission of a control frame; doubles up to `retransmit_max`. Over UCX frames are not lost,
  // so this is only ever needed when an endpoint died without telling.
  absl::Duration retransmit = absl::Milliseconds(250);
  absl::Duration retransmit_max = absl::Seconds(2);
  absl::Duration hello_timeout = absl::Seconds(2);  // a peer that says nothing for so long is not there
  // COMMIT is here but DATA it names is not: how long to wait for the straggler before asking again.
  absl::Duration straggler = absl::Milliseconds(500);
  // A fetch that ended early with DATA still being written: how long that may take to end by itself
  // before the endpoint is force-closed, which would cost the fetches beside it a restart.
  absl::Duration drain = absl::Milliseconds(100);
  absl::Duration close_grace = absl::Seconds(5);            // force-close without quiescence: quarantine
  absl::Duration restart_backoff = absl::Milliseconds(50);  // doubles with every restart of a fetch
  int max_tries = 5;
};

// How much of the handoff is under way at once, and in what pieces.
struct FetchFlow {
  // A receiver lets each sender have at most so many bytes on their way over one connection; less where the
  // link is slow (fetch_window.h).
  uint64_t window_bytes = 32 << 20;
  // Bytes that may be queued in front of a fetch that comes next, as the time they take to arrive.
  absl::Duration window_target = absl::Milliseconds(10);
  // Ranges of a block below `batch_below` bytes travel together, up to `batch_bytes` in a transfer (at most
  // kMaxBatchBytes; 0: never); larger ones each by itself, up to `unit_bytes` (but at least a layer):
  // what is hashed at one end or landed at the other is then still in the second-level cache, and over TCP
  // comes in one piece.
  uint64_t batch_below = 64 << 10;
  uint64_t batch_bytes = 256 << 10;
  uint64_t unit_bytes = 512 << 10;
  uint64_t quantum = 256 << 10;  // of deficit round robin between requests and between connections
  // Transfers to peers in flight, over all connections. One connection has at most as many as it leaves
  // free: by itself half, and beside others that take nothing at least one, even beyond the limit.
  size_t max_sends = 32;
  // Reads from the lower tier for peers under way, and bytes of slots that they fill until these are sent,
  // shared by the connections in the same way; so are blocks being encoded, and payloads until they are sent.
  size_t max_loads = 16;
  uint64_t max_load_bytes = 128 << 20;
};

}  // namespace tidepool
