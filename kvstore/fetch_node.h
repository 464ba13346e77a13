#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "base/clock.h"
#include "base/probe.h"
#include "kvstore/block_pool.h"
#include "kvstore/block_run.h"
#include "kvstore/fetch_types.h"
#include "kvstore/types.h"
#include "transport/transport.h"

namespace tidepool {

class BlockCodec;
class BlockTier;

// Who a peer is. The boot id is new at every start of the process, so that a restarted worker is never
// taken for the one that was there before.
struct PeerAddress {
  std::string worker_id;
  std::string boot_id;
  std::string transport;  // Transport::Address() of the peer; authenticated by the caller before use
  std::string arena;      // FetchNode::arena_address() of the peer; empty: it shares none
};

struct FetchSpec {
  std::string request_id;  // of the inference request
  uint32_t attempt = 0;    // of the inference request
  uint32_t part = 0;       // numbers the fetches of one (request, attempt); each is idempotent
  PeerAddress peer;
  std::vector<BlockKey> keys;
  std::vector<BlockLease> slots;  // one per key, unpublished; given back in the result
  absl::Time deadline;            // on the node's clock
  // Sealed blocks may stay in the peer's own memory, where it shares that with this process, to be read
  // there. False: they are copied into `slots`.
  bool in_place = false;
  // The last key is an unsealed tail with so many valid tokens, and only those are needed; 0: it is sealed.
  uint32_t tail_tokens = 0;
};

struct FetchResult {
  // OK: COMMIT was verified (blocks may still be absent: see `filled`). Anything else: nothing is filled.
  absl::Status status;
  // As in the spec, quiescent: nothing will write to them any more. Slots that could not be made quiescent
  // are quarantined and come back empty.
  std::vector<BlockLease> slots;
  // Where the blocks of keys[0 .. in_place.size()) are: nothing is in their slots.
  BlockRun in_place;
  std::vector<bool> filled;  // slots[i], or block i of in_place, holds keys[i], verified
  uint64_t bytes = 0;        // of the filled blocks
  absl::Duration elapsed;
  std::string_view transport;  // how they came: "arena", or the transport's name
};

// Whether a fetch may write to these slots: InvalidArgument where one is empty or not of `pool`. Asked when
// it comes to that: what is handed over in place needs none of them, and a thousand take longer to look at
// than all the rest.
absl::Status CheckFetchSlots(std::span<const BlockLease> slots, const BlockPool& pool);

// FetchNode: this process's end of every KV transfer, both as the one that fetches and as the one that
// is fetched from. Driver: owns a thread, a Transport and the two fetch cores (fetch_client.h,
// fetch_server.h), which hold the rules of the handoff: HELLO, FETCH, DATA, COMMIT, COMMIT_ACK, ABORT,
// RELEASE. Thread-safe. Callbacks run on the node's threads and must not block.
// Between processes of one host, an ArenaLink (arena_link.h) does the same without any of that.
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
    // Where keys are looked for that are in no offer and not in the pool: read into slots of the pool and
    // published there before they are sent. Null: no lower tier. Outlives the node.
    BlockTier* disk = nullptr;
    // What sealed blocks may be sent as, checked in HELLO: config kv.codec. Null: as they are.
    const BlockCodec* codec = nullptr;
    size_t lanes = 1;  // connections to one peer: what breaks on one costs only its own fetches a restart
    FetchFlow flow;
    FetchTimings timings;
    // Processes of this host and user may read this one's blocks where they lie, and the other way round.
    bool share_arena = true;
  };

  // InvalidArgument: no pool, transport or metrics, or an id that is empty or too long for the wire.
  static absl::StatusOr<std::unique_ptr<FetchNode>> Start(Options options);
  // Force-closes every endpoint, waits for quiescence (at most 5 s; the rest is quarantined), joins.
  ~FetchNode();

  const std::string& address() const;        // for PeerAddress::transport
  const std::string& arena_address() const;  // for PeerAddress::arena; empty: not shared
  std::string_view transport_name() const;

  // `done` runs exactly once, at the latest shortly after the deadline; on the caller's own thread where that
  // is at once: the spec is refused (InvalidArgument, or ResourceExhausted at max_fetches), or a process of
  // this host has all of it on offer. At most 4096 keys. Status: Unavailable (peer gone or refused: wrong
  // boot id), FailedPrecondition (HELLO differs: says in what), DeadlineExceeded, Cancelled, DataLoss
  // (checksum), ResourceExhausted.
  void Fetch(FetchSpec spec, std::function<void(FetchResult)> done);
  // Ends every fetch of (request, attempt) with Cancelled, as soon as its slots are quiescent.
  void Abort(const std::string& request_id, uint32_t attempt);

  // Returns at once; whatever a peer asks for afterwards finds it.
  // Lets peers fetch `key` on behalf of `request_id`, published or not (the unsealed tail is not), until
  // the fetcher RELEASEs, ReleaseOffers is called, or the lease runs out. Sealed and published blocks of
  // the pool can always be fetched; offering them pins them against eviction.
  void Offer(const std::string& request_id, const BlockKey& key, BlockLease lease);
  // Offers a block that is still being computed: layers [0, layers_ready) of the slot are final, the others
  // are written by the caller meanwhile. A FETCH of it is sent layer by layer as they become ready, and
  // readable at the fetcher only after the last one. layers_ready at or above the layout's layers: as Offer.
  void Offer(const std::string& request_id, const BlockKey& key, BlockLease lease, uint32_t layers_ready);
  // Layers [0, layers_ready) of every growing offer of the request are final now (of those that are further
  // already, nothing changes). Keeps the offers' leases alive.
  void AdvanceOffer(const std::string& request_id, uint32_t layers_ready);
  // The same for some of its blocks only.
  void AdvanceOffer(const std::string& request_id, std::span<const BlockKey> keys, uint32_t layers_ready);
  // The computation failed: the request's growing offers are withdrawn, and a fetch under way finds those
  // blocks absent. Offers that are complete stay. To be called before what is in the slots may become
  // invalid; the slots themselves stay leased until nothing reads from them.
  void RevokeOffers(const std::string& request_id);
  void ReleaseOffers(const std::string& request_id);
  // Tells `peer` that nothing more of the request will be fetched from it: its offers may go.
  void SendRelease(const PeerAddress& peer, const std::string& request_id);

  size_t offers() const;          // blocks on offer
  size_t active_fetches() const;  // fetches not yet ended, both directions; as of the node's last step

 private:
  struct Impl;
  explicit FetchNode(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace tidepool
