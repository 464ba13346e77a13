#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "base/clock.h"
#include "base/probe.h"
#include "kvstore/block_pool.h"
#include "kvstore/fetch_types.h"
#include "kvstore/types.h"
#include "transport/transport.h"

namespace tidepool {

// Who a peer is. The boot id is new at every start of the process, so that a restarted worker is never
// taken for the one that was there before.
struct PeerAddress {
  std::string worker_id;
  std::string boot_id;
  std::string transport;  // Transport::Address() of the peer; authenticated by the caller before use
};

struct FetchSpec {
  std::string request_id;  // of the inference request
  uint32_t attempt = 0;    // of the inference request
  uint32_t part = 0;       // numbers the fetches of one (request, attempt); each is idempotent
  PeerAddress peer;
  std::vector<BlockKey> keys;
  std::vector<BlockLease> slots;  // one per key, unpublished; given back in the result
  absl::Time deadline;            // on the node's clock
};

struct FetchResult {
  // OK: COMMIT was verified (blocks may still be absent: see `filled`). Anything else: nothing is filled.
  absl::Status status;
  // As in the spec, quiescent: nothing will write to them any more. Slots that could not be made quiescent
  // are quarantined and come back empty.
  std::vector<BlockLease> slots;
  std::vector<bool> filled;  // slots[i] holds keys[i], verified
  uint64_t bytes = 0;
  absl::Duration elapsed;
};

// FetchNode: this process's end of every KV transfer, both as the one that fetches and as the one that
// is fetched from. Driver: owns a thread, a Transport and the two fetch cores (fetch_client.h,
// fetch_server.h), which hold the rules of the handoff: HELLO, FETCH, DATA, COMMIT, COMMIT_ACK, ABORT,
// RELEASE. Thread-safe. Callbacks run on the node's thread and must not block.
class FetchNode {
 public:
  struct Options {
    std::string worker_id;
    std::string boot_id;
    std::string fingerprint;    // of the model
    BlockPool* pool = nullptr;  // outlives the node; its layout is checked in HELLO
    std::unique_ptr<Transport> transport;
    const Clock* clock = &Clock::Real();
    MetricRegistry* metrics = nullptr;
    // An offer not fetched or released within this time is dropped (its fetcher is gone).
    absl::Duration offer_lease = absl::Seconds(30);
    size_t max_fetches = 1024;  // beyond it Fetch fails with ResourceExhausted
    FetchTimings timings;
  };

  // InvalidArgument: no pool, transport or metrics, or an id that is empty or too long for the wire.
  static absl::StatusOr<std::unique_ptr<FetchNode>> Start(Options options);
  // Force-closes every endpoint, waits for quiescence (at most 5 s; the rest is quarantined), joins.
  ~FetchNode();

  const std::string& address() const;  // for PeerAddress::transport
  std::string_view transport_name() const;

  // `done` runs exactly once, at the latest shortly after the deadline (on the caller's own thread where the
  // spec is refused at once: InvalidArgument, or ResourceExhausted at max_fetches). At most 4096 keys.
  // Status: Unavailable (peer gone or refused: wrong boot id), FailedPrecondition (HELLO differs: says in
  // what), DeadlineExceeded, Cancelled, DataLoss (checksum), ResourceExhausted.
  void Fetch(FetchSpec spec, std::function<void(FetchResult)> done);
  // Ends every fetch of (request, attempt) with Cancelled, as soon as its slots are quiescent.
  void Abort(const std::string& request_id, uint32_t attempt);

  // Returns at once; whatever a peer asks for afterwards finds it. (More than 65536 calls not yet taken up
  // by the node's thread: the offer is dropped and counted, and its fetcher finds the block absent.)
  // Lets peers fetch `key` on behalf of `request_id`, published or not (the unsealed tail is not), until
  // the fetcher RELEASEs, ReleaseOffers is called, or the lease runs out. Sealed and published blocks of
  // the pool can always be fetched; offering them pins them against eviction.
  void Offer(const std::string& request_id, const BlockKey& key, BlockLease lease);
  void ReleaseOffers(const std::string& request_id);
  // Tells `peer` that nothing more of the request will be fetched from it: its offers may go.
  void SendRelease(const PeerAddress& peer, const std::string& request_id);

  // As of the node's last step.
  size_t offers() const;          // blocks on offer
  size_t active_fetches() const;  // fetches not yet ended, both directions

 private:
  struct Impl;
  explicit FetchNode(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace tidepool
