#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <variant>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "kvstore/block_pool.h"
#include "kvstore/fetch_codec.h"
#include "kvstore/fetch_types.h"

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
  std::span<const std::byte> payload;  // leased until then
};
struct ServerClose {
  LaneId lane;
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
using ServerAction = std::variant<ServerSend, ServerSendBulk, ServerClose, ServerQuarantine, ServerCount,
                                  ServerLeaseExpired, ServerSent>;
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
struct ServerOffer {
  std::string request_id;
  BlockKey key;
  BlockLease lease;
};
struct ServerReleaseOffers {
  std::string request_id;
};
struct ServerTick {};
struct ServerShutdown {};
using ServerEvent = std::variant<ServerMessage, ServerSendDone, ServerLaneDown, ServerLaneQuiesced,
                                 ServerOffer, ServerReleaseOffers, ServerTick, ServerShutdown>;

// FetchServer: the half of the handoff that is fetched from. Core: no thread, socket or clock.
//
// A FETCH looks its keys up (offers of its request first, then the published blocks of the pool), leases
// what is there, sends DATA with a bounded number of transfers in flight (fetches take turns), then COMMIT,
// repeated until COMMIT_ACK. A block's lease ends when its own transfer has ended, whatever happened to the
// fetch. Ended fetches leave tombstones, so that a late duplicate starts nothing.
class FetchServer {
 public:
  struct Options {
    std::string worker_id;
    std::string boot_id;
    std::string fingerprint;
    BlockPool* pool = nullptr;
    FetchTimings timings;
    absl::Duration offer_lease = absl::Seconds(30);
    // The longest that one FETCH may keep blocks leased, whatever deadline it names.
    absl::Duration fetch_lease = absl::Seconds(30);
    size_t max_lanes = 1024;
    size_t max_fetches = 256;  // unfinished ones; beyond: REFUSE busy
    size_t max_sends = 16;     // bulk transfers in flight: enough to fill a link, few enough to abort soon
    size_t max_tombstones = 16384;  // oldest go first
  };

  explicit FetchServer(Options options) : options_(std::move(options)) {}

  ServerActions Step(ServerEvent event, absl::Time now);
  absl::Time next_timer() const { return next_timer_; }

  size_t active() const { return servings_.size(); }
  size_t offers() const;
  size_t lanes() const { return lanes_.size(); }
  // Blocks leased for transfers in flight or to come.
  size_t held_blocks() const;

 private:
  struct Block {
    std::optional<BlockLease> lease;  // absent: a miss, or sent
    uint64_t send = 0;                // in flight
  };
  struct Serving {
    uint64_t handle;
    LaneId lane;
    FetchId id;
    std::vector<FetchItem> items;
    std::vector<Block> blocks;
    std::vector<CommitItem> manifest;
    size_t next = 0;  // first item not yet posted
    size_t in_flight = 0;
    bool ended = false;  // only waiting for its transfers
    bool committed = false;
    absl::Time lease_until;
    absl::Time resend_at = absl::InfiniteFuture();
    absl::Duration resend_after;
  };
  struct Lane {
    enum State { kNew, kReady, kClosing } state = kNew;
    std::string peer_boot;
    absl::Time hello_until = absl::InfiniteFuture();
    absl::Time close_until = absl::InfiniteFuture();
  };
  struct Tombstone {
    uint32_t try_number;
    absl::Time until;
    std::optional<RefuseReason> refuse;  // answer to a duplicate; none: say nothing
    std::string text;
  };
  struct OfferEntry {
    BlockLease lease;
    absl::Time until;
  };

  void On(ServerMessage& e);
  void On(ServerSendDone& e);
  void On(ServerLaneDown& e);
  void On(ServerLaneQuiesced& e);
  void On(ServerOffer& e);
  void On(ServerReleaseOffers& e);
  void On(ServerTick&);
  void On(ServerShutdown&);

  void OnHello(LaneId id, Lane& lane, const FetchWireFrame& frame, const HelloFrame& hello);
  void OnFetch(LaneId id, Lane& lane, FetchFrame& frame);
  std::optional<BlockLease> Find(const std::string& request_id, const BlockKey& key);
  Serving* FindServing(const Lane& lane, const FetchId& id);
  void Pump();
  void SendNext(Serving& s);
  void Commit(Serving& s);
  void SendCommit(Serving& s);
  // Stops a serving: nothing further is sent; gone once its transfers have ended.
  void End(Serving& s, std::optional<RefuseReason> refuse, std::string text);
  void EraseIfIdle(uint64_t handle);
  void CloseLane(LaneId id);
  void Refuse(LaneId id, const std::string& receiver_boot, const FetchId& fetch, RefuseReason reason,
              std::string text);
  template <typename Body>
  void Send(LaneId id, const std::string& receiver_boot, Body body);
  void Count(FetchReason reason) { out_.push_back(ServerCount{reason}); }
  void Arm(absl::Time at) { next_timer_ = std::min(next_timer_, at); }
  void TickServing(Serving& s);
  void TickOffers();

  const Options options_;
  absl::Time now_;
  ServerActions out_;
  absl::Time next_timer_ = absl::InfiniteFuture();
  uint64_t next_handle_ = 1;
  uint64_t next_send_ = 1;
  size_t sends_in_flight_ = 0;
  std::map<LaneId, Lane> lanes_;
  std::map<uint64_t, std::unique_ptr<Serving>> servings_;
  absl::flat_hash_map<std::string, uint64_t> by_id_;  // (peer boot, request, attempt, part) → handle
  absl::flat_hash_map<uint64_t, std::pair<uint64_t, size_t>> sends_;  // → (handle, block index)
  std::deque<uint64_t> turn_;  // servings with something to post, in turn
  absl::flat_hash_map<std::string, Tombstone> tombstones_;
  std::deque<std::string> tombstone_order_;
  absl::flat_hash_map<std::string, absl::flat_hash_map<BlockKey, OfferEntry>> offers_;  // by request
};

}  // namespace tidepool
