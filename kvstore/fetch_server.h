#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <variant>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/container/inlined_vector.h"
#include "absl/status/statusor.h"
#include "kvstore/block_pool.h"
#include "kvstore/block_tier.h"
#include "kvstore/codec/block_codec.h"
#include "kvstore/codec/level_chooser.h"
#include "kvstore/fetch_codec.h"
#include "kvstore/fetch_fair.h"
#include "kvstore/fetch_sums.h"
#include "kvstore/fetch_types.h"
#include "kvstore/offer_table.h"

namespace tidepool {

// What the server core wants done, in order.
struct ServerSend {
  LaneId lane;
  std::string frame;
};
struct ServerSendBulk {  // its end comes back as ServerSendDone, also when it could not be started
  LaneId lane;
  uint64_t send;
  std::string header;
  std::span<const std::byte> payload;  // stays as it is until then
};
struct ServerClose {
  LaneId lane;
};
struct ServerLoad {  // from the lower tier into the slot; its end comes back as ServerLoaded, with the slot
  uint64_t load;
  BlockKey key;
  BlockLease slot;
  absl::Duration timeout;
};
struct ServerCancelLoad {  // not wanted any more; its end comes back all the same
  uint64_t load;
};
struct ServerEncode {  // a block that is to be sent in fewer bytes; its end comes back as ServerEncoded
  uint64_t job;
  CodecId codec;
  BlockLease lease;
};
struct ServerQuarantine {  // still being read from when its endpoint would not quiesce
  BlockLease lease;
};
struct ServerCount {
  FetchReason reason;
};
struct ServerLeaseExpired {
  size_t blocks;
};
struct ServerSent {  // bytes handed to the peer
  uint64_t bytes;
};
using ServerAction =
    std::variant<ServerSend, ServerSendBulk, ServerClose, ServerLoad, ServerCancelLoad, ServerEncode,
                 ServerQuarantine, ServerCount, ServerLeaseExpired, ServerSent>;
using ServerActions = std::vector<ServerAction>;

struct ServerMessage {
  LaneId lane;
  FetchWireFrame frame;
};
struct ServerSendDone {
  uint64_t send;
  absl::Status status;
};
struct ServerLaneDown {
  LaneId lane;
};
struct ServerLaneQuiesced {
  LaneId lane;
};
struct ServerLoaded {  // nothing writes to the slot any more
  uint64_t load;
  BlockLease slot;
  absl::StatusOr<BlockTier::Record> record;
};
struct ServerEncoded {
  uint64_t job;
  absl::StatusOr<std::shared_ptr<std::vector<std::byte>>> payload;
  double seconds;  // that it took
};
struct ServerOffersMoved {};  // the table of offers is not what it was
struct ServerTick {};
struct ServerShutdown {};
using ServerEvent = std::variant<ServerMessage, ServerSendDone, ServerLaneDown, ServerLaneQuiesced,
                                 ServerLoaded, ServerEncoded, ServerOffersMoved, ServerTick, ServerShutdown>;

// FetchServer: the half of the handoff that is fetched from. Core: no thread, socket or clock.
//
// A FETCH looks its keys up: offers of its request first, then the published blocks of the pool, then the
// lower tier, from which blocks are read into slots of the pool, a bounded number at a time, and published. A
// block is sent as soon as it is here, a growing offer layer by layer as it grows: as a bulk transfer of its
// own out of the slot, or, where it is small, copied together with others into one. With a codec, sealed
// blocks are encoded first, a bounded number at a time, at the level that suits the connection
// (level_chooser.h); what grows, and the unsealed tail, goes as it is. Connections take turns, requests of a
// connection take turns (deficit round robin), and no connection has more on its way than its receiver
// allows. What all of them share (transfers, slots for loading, payloads) is never used up by those that do
// not take what they asked for: a connection holds at most as much as it leaves free. COMMIT follows when
// every key is sent or known to be absent, repeated until COMMIT_ACK. A block's lease ends when its own
// transfers have ended, whatever happened to the fetch. Ended fetches leave tombstones, so that a late
// duplicate starts nothing. What is sent of a sealed block is hashed once (KeptSums); of anything else each
// time.
class FetchServer {
 public:
  struct Options {
    std::string worker_id;
    std::string boot_id;
    std::string fingerprint;
    BlockPool* pool = nullptr;
    std::shared_ptr<OfferTable> offers;
    BlockTier* disk = nullptr;          // null: none
    const BlockCodec* codec = nullptr;  // what sealed blocks are sent as; null: as they are
    FetchTimings timings;
    // The longest that one FETCH may keep blocks leased, whatever deadline it names.
    absl::Duration fetch_lease = absl::Seconds(30);
    size_t max_lanes = 1024;
    size_t max_fetches = 256;       // unfinished ones; beyond: REFUSE busy
    size_t max_tombstones = 16384;  // oldest go first
    FetchFlow flow;
  };

  explicit FetchServer(Options options);

  ServerActions Step(ServerEvent event, absl::Time now);
  absl::Time next_timer() const { return std::min(next_timer_, options_.offers->next_expiry()); }

  size_t active() const { return servings_.size(); }
  size_t lanes() const { return lanes_.size(); }
  size_t loads() const { return loads_.size(); }
  // Blocks leased for transfers in flight or to come.
  size_t held_blocks() const;
  // Bytes sent over a connection that its receiver is not known to have; at most its window.
  uint64_t outstanding(LaneId lane) const;

 private:
  struct Block {
    enum State : uint8_t {
      kAbsent,    // a miss, or withdrawn
      kLoading,   // comes from the lower tier
      kGrowing,   // an offer that is not complete
      kEncoding,  // waits for its payload
      kReady,     // all layers are final
      kSent,      // all layers are on their way
    } state = kAbsent;
    bool queued = false;     // in Serving::ready
    bool from_disk = false;  // counts in loaded_held_ and Lane::loads
    bool sealed = false;     // published: its bytes never change
    uint32_t layers_ready = 0;
    uint32_t layers_sent = 0;
    uint32_t in_flight = 0;    // transfers that read from the slot
    uint64_t epoch = 0;        // of the offer
    absl::Time sending_since;  // its first transfer
    std::optional<BlockLease> lease;
    CodecId codec = CodecId::kNone;
    std::shared_ptr<std::vector<std::byte>> payload;  // encoded: what is sent in place of the slot's bytes
    absl::InlinedVector<RangeSum, 1> ranges;          // sent, in the order of layers
  };
  struct Serving {
    uint64_t handle;
    LaneId lane;
    FetchId id;
    std::string key;  // in by_id_
    std::vector<FetchItem> items;
    std::vector<Block> blocks;
    std::deque<uint32_t> ready;       // blocks with layers to send
    std::deque<uint32_t> to_load;     // blocks to be read from the lower tier
    size_t unresolved = 0;            // blocks neither sent nor absent
    size_t growing = 0;               // blocks in kGrowing
    size_t in_flight = 0;             // transfers
    uint64_t in_flight_bytes = 0;     // of those
    uint64_t sent = 0, received = 0;  // bytes, this try
    uint64_t charged = 0;             // its part of Lane::outstanding
    bool ended = false;               // only waiting for its transfers
    bool committed = false;
    absl::Time lease_until;
    absl::Time resend_at = absl::InfiniteFuture();
    absl::Duration resend_after;
  };
  struct Lane {
    explicit Lane(uint64_t quantum) : requests(quantum) {}
    enum State { kNew, kReady, kClosing } state = kNew;
    std::string peer_boot;
    uint64_t window = 0;
    uint64_t outstanding = 0;
    size_t transfers = 0;       // in flight
    absl::Duration block_send;  // what the last sealed block took, from its first transfer to its last's end
    size_t loads = 0;           // blocks being read for it from the lower tier, or read and not yet sent
    size_t payloads = 0;        // being encoded for it, or encoded and not yet sent
    std::deque<std::pair<uint64_t, uint32_t>> to_encode;  // (handle, index)
    DeficitRing<std::string> requests;  // those with fetches that may have something to send
    std::map<std::string, std::deque<uint64_t>> servings;  // of each, in the order they came
    std::optional<CodecLevelChooser> chooser;              // where there is a codec
    absl::Time busy_since = absl::InfiniteFuture();        // something was on its way since, unmeasured
    absl::Time hello_until = absl::InfiniteFuture();
    absl::Time close_until = absl::InfiniteFuture();
  };
  struct Tombstone {
    uint32_t try_number;
    absl::Time until;
    std::optional<RefuseReason> refuse;  // answer to a duplicate; none: say nothing
    std::string text;
  };
  // A transfer in flight: of one range out of its slot, or of a buffer.
  struct Transfer {
    uint64_t handle;
    uint64_t bytes;
    std::optional<uint32_t> index;
    std::unique_ptr<std::byte[]> buffer;
  };
  struct LoadState {
    BlockKey key;
    LaneId lane;                                         // that it was begun for
    std::vector<std::pair<uint64_t, uint32_t>> waiters;  // (handle, index)
  };
  struct EncodeState {
    uint64_t handle;
    uint32_t index;
    LaneId lane;
  };

  void On(ServerMessage& e);
  void On(ServerSendDone& e);
  void On(ServerLaneDown& e);
  void On(ServerLaneQuiesced& e);
  void On(ServerLoaded& e);
  void On(ServerEncoded& e);
  void On(ServerOffersMoved& e);
  void On(ServerTick&);
  void On(ServerShutdown&);

  void OnHello(LaneId id, Lane& lane, const FetchWireFrame& frame, const HelloFrame& hello);
  void OnFetch(LaneId id, Lane& lane, FetchFrame& frame);
  void OnCredit(LaneId id, Lane& lane, const CreditFrame& credit);
  void Resolve(Serving& s, uint32_t index);
  Serving* FindServing(const Lane& lane, const FetchId& id);
  void Ready(Serving& s, uint32_t index, bool sealed);
  void PumpEncodes();
  void ObserveArrived(Lane& lane, uint64_t bytes);
  void Queue(Serving& s, uint32_t index);
  void Unqueue(Serving& s, uint32_t index);
  void Absent(Serving& s, uint32_t index);
  void DropLease(const Serving& s, Block& block);
  void SetCharge(Serving& s, uint64_t bytes);
  void PollOffers();
  void PumpLoads();
  bool LoadNext(Serving& s, bool& full);
  absl::Time RoomUntil(absl::Time lease_until) const;
  Lane* FindLane(LaneId id);
  // Whether a connection that holds `mine` of `limit`, of which `all` are taken, may take one more: the first
  // always, and never more than are left free (Choudhury and Hahne's dynamic threshold, 1998), so that there
  // is room for others however many of them never give back.
  static bool MayTake(size_t mine, size_t all, size_t limit) { return mine == 0 || mine + all < limit; }
  void StopWaiting(uint64_t handle);

  void Pump();
  std::optional<uint64_t> NextBytes(const Lane& lane, const std::string& request) const;
  std::optional<uint64_t> NextBytes(const Lane& lane, const Serving& s) const;
  std::optional<std::string> NextRequest(Lane& lane);
  uint32_t UnitEnd(const Lane& lane, const Block& block) const;
  uint64_t UnitBytes(const Lane& lane, const Block& block) const;
  void SendNext(Lane& lane, Serving& s);
  void SendRange(Lane& lane, Serving& s, uint32_t index, uint32_t end);
  void SendBatch(Lane& lane, Serving& s, std::span<const std::pair<uint32_t, uint32_t>> batch,
                 uint64_t length);
  template <typename Body>
  void Post(Lane& lane, Serving& s, Body body, std::span<const std::byte> payload,
            std::optional<uint32_t> index, std::unique_ptr<std::byte[]> buffer);
  uint64_t ChecksumOf(const Block& block, const DataRange& range, std::span<const std::byte> bytes);
  std::span<const std::byte> TakeRange(Serving& s, uint32_t index, uint32_t end, DataRange& range);
  void CommitIfDone(Serving& s);
  void SendCommit(Serving& s);
  // Stops a serving: nothing further is sent; gone once its transfers have ended.
  void End(Serving& s, std::optional<RefuseReason> refuse, std::string text);
  void EraseIfIdle(uint64_t handle);
  void CloseLane(LaneId id);
  void GiveUpQuiescence(LaneId id);
  void Refuse(LaneId id, const std::string& receiver_boot, const FetchId& fetch, RefuseReason reason,
              std::string text);
  template <typename Body>
  void Send(LaneId id, const std::string& receiver_boot, Body body);
  void Count(FetchReason reason) { out_.push_back(ServerCount{reason}); }
  void Arm(absl::Time at) { next_timer_ = std::min(next_timer_, at); }
  void TickServing(Serving& s);
  void ExpireOffers();

  const Options options_;
  const uint32_t layers_;
  const uint64_t layer_bytes_;
  const uint64_t block_bytes_;
  absl::Time now_;
  ServerActions out_;
  absl::Time next_timer_ = absl::InfiniteFuture();
  uint64_t next_handle_ = 1;
  uint64_t next_send_ = 1;
  uint64_t next_load_ = 1;
  std::map<LaneId, Lane> lanes_;
  DeficitRing<LaneId> lane_ring_;
  std::map<uint64_t, std::unique_ptr<Serving>> servings_;
  absl::flat_hash_map<std::string, uint64_t> by_id_;  // (peer boot, request, attempt, part) → handle
  absl::flat_hash_map<uint64_t, Transfer> transfers_;
  std::vector<std::unique_ptr<std::byte[]>> buffers_;    // of batch_bytes each, not in use
  std::vector<std::unique_ptr<std::byte[]>> abandoned_;  // may still be read: kept to the end
  std::vector<std::shared_ptr<std::vector<std::byte>>> abandoned_payloads_;
  size_t growing_ = 0;  // over all servings
  std::map<uint64_t, LoadState> loads_;
  absl::flat_hash_map<BlockKey, uint64_t> load_of_key_;
  std::deque<uint64_t> load_turn_;  // servings with blocks to load, in turn
  // Since when loads wait for a slot of a full pool without any having been given back.
  std::optional<absl::Time> no_room_since_;
  const uint64_t unit_bytes_;  // the most that cannot be divided
  const size_t max_held_;      // blocks that flow.max_load_bytes holds
  uint64_t next_job_ = 1;
  std::deque<LaneId> encode_turn_;                      // connections with blocks to encode, in turn
  absl::flat_hash_map<uint64_t, EncodeState> encodes_;  // by job
  size_t payloads_held_ = 0;                            // not yet sent
  size_t loaded_held_ = 0;                              // blocks read from the lower tier and not yet sent
  KeptSums sums_;
  absl::flat_hash_map<std::string, Tombstone> tombstones_;
  std::deque<std::string> tombstone_order_;
};

}  // namespace tidepool
