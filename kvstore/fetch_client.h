#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <variant>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "base/block_layout.h"
#include "kvstore/fetch_codec.h"
#include "kvstore/fetch_node.h"
#include "kvstore/fetch_types.h"

namespace tidepool {

// What the client core wants done, in order.
struct ClientConnect {  // failure comes back as LaneDown
  LaneId lane;
  std::string address;
};
struct ClientSend {
  LaneId lane;
  std::string frame;
};
struct ClientClose {  // force-close; its quiescence comes back as LaneQuiesced
  LaneId lane;
};
struct ClientFinish {
  uint64_t handle;
  FetchResult result;
};
struct ClientQuarantine {
  BlockLease lease;
};
struct ClientCount {
  FetchReason reason;
};
using ClientAction =
    std::variant<ClientConnect, ClientSend, ClientClose, ClientFinish, ClientQuarantine, ClientCount>;
using ClientActions = std::vector<ClientAction>;

// What happened.
struct ClientStart {
  uint64_t handle;  // chosen by the driver, unique
  FetchSpec spec;   // valid: see FetchNode::Fetch
};
struct ClientCancel {
  std::string request_id;
  uint32_t attempt;
};
struct ClientRelease {
  PeerAddress peer;
  std::string request_id;
};
struct ClientMessage {
  LaneId lane;
  FetchWireFrame frame;
};
struct ClientBulkDone {
  uint64_t receive;
  absl::Status status;
};
struct ClientLaneDown {
  LaneId lane;
  absl::Status why;
};
struct ClientLaneQuiesced {
  LaneId lane;
};
struct ClientTick {};
struct ClientShutdown {};  // ends every fetch with Cancelled and closes every lane
using ClientEvent = std::variant<ClientStart, ClientCancel, ClientRelease, ClientMessage, ClientBulkDone,
                                 ClientLaneDown, ClientLaneQuiesced, ClientTick, ClientShutdown>;

// Where announced DATA goes; an empty `dst` drops it.
struct BulkVerdict {
  uint64_t receive = 0;  // names the receive in ClientBulkDone; 0 when dropped
  std::span<std::byte> dst;
};

// FetchClient: the fetching half of the handoff. Core: no thread, socket or clock; `now` only grows.
//
// A fetch: queued until its lane's HELLO is acknowledged → asked (FETCH sent, repeated while nothing comes)
// → DATA lands in its slots, COMMIT names what there is → every checksum and the digest hold → COMMIT_ACK,
// finished. It ends early by deadline, cancel, refusal or damage: ABORT is sent, and it is finished only
// when no receive into its slots is outstanding: they end by themselves, or the lane is force-closed and
// quiesced (the other fetches of the lane restart on a new one), or, `close_grace` after that, the slots
// that may still be written are quarantined.
class FetchClient {
 public:
  struct Options {
    std::string worker_id;
    std::string boot_id;
    std::string fingerprint;
    BlockLayout layout;
    FetchTimings timings;
  };

  explicit FetchClient(Options options) : options_(std::move(options)) {}

  ClientActions Step(ClientEvent event, absl::Time now);
  // DATA is announced. Part of Step, apart because its answer cannot wait. Only counts are added to
  // `actions`.
  BulkVerdict StepBulk(LaneId lane, const FetchWireFrame& frame, size_t length, absl::Time now,
                       ClientActions& actions);

  // When Tick is next needed; InfiniteFuture when nothing is pending. May be early, never late.
  absl::Time next_timer() const { return next_timer_; }
  size_t active() const { return fetches_.size(); }
  size_t lanes() const { return lanes_.size(); }

 private:
  enum class Phase { kQueued, kBackoff, kAsked, kEnding };
  struct Block {
    enum State { kMissing, kReceiving, kReceived } state = kMissing;
    uint64_t checksum = 0;  // computed over what was received
    uint64_t receive = 0;
  };
  struct Fetch {
    uint64_t handle;
    FetchSpec spec;
    std::vector<FetchItem> items;
    Phase phase = Phase::kQueued;
    LaneId lane = 0;
    uint32_t try_number = 0;
    absl::Status status;  // of an ending fetch
    std::vector<Block> blocks;
    size_t receiving = 0;
    int restarts = 0;
    std::optional<CommitFrame> commit;
    absl::Time started;
    absl::Time resend_at = absl::InfiniteFuture();
    absl::Duration resend_after;
    absl::Time straggler_at = absl::InfiniteFuture();
    absl::Time drain_until = absl::InfiniteFuture();
    absl::Time backoff_until = absl::InfiniteFuture();
  };
  struct Lane {
    LaneId id;
    PeerAddress peer;
    enum State { kHello, kReady, kClosing } state = kHello;
    absl::Time resend_at;
    absl::Duration resend_after;
    absl::Time hello_until;
    absl::Time close_until = absl::InfiniteFuture();
    std::vector<std::string> releases;  // to send once ready
  };

  void On(ClientStart& e);
  void On(ClientCancel& e);
  void On(ClientRelease& e);
  void On(ClientMessage& e);
  void On(ClientBulkDone& e);
  void On(ClientLaneDown& e);
  void On(ClientLaneQuiesced& e);
  void On(ClientTick&);
  void On(ClientShutdown&);

  void OnFrame(Lane& lane, HelloAckFrame& frame);
  void OnFrame(Lane& lane, RefuseFrame& frame);
  void OnFrame(Lane& lane, CommitFrame& frame);

  Lane& LaneFor(const PeerAddress& peer);
  Fetch* Find(const FetchId& id, LaneId lane);
  void SendHello(Lane& lane);
  void Enqueue(Fetch& fetch);
  void Ask(Fetch& fetch);
  void CheckComplete(Fetch& fetch);
  void Restart(Fetch& fetch, const absl::Status& why);
  void Fail(Fetch& fetch, absl::Status status, FetchReason reason);
  void Finish(Fetch& fetch);
  void CloseLane(Lane& lane, const absl::Status& why, FetchReason reason, bool restart);
  void TickFetch(Fetch& fetch);
  void TickLane(Lane& lane);
  void GiveUpQuiescence(LaneId lane);
  template <typename Body>
  void Send(const Lane& lane, Body body);
  void Count(FetchReason reason) { out_.push_back(ClientCount{reason}); }
  void Arm(absl::Time at) { next_timer_ = std::min(next_timer_, at); }
  FetchId IdOf(const Fetch& fetch) const;

  const Options options_;
  absl::Time now_;
  ClientActions out_;
  absl::Time next_timer_ = absl::InfiniteFuture();
  LaneId next_lane_ = 1;
  uint64_t next_receive_ = 1;
  uint32_t next_try_ = 1;  // across fetches: a part asked for again is never taken for its old self
  std::map<uint64_t, std::unique_ptr<Fetch>> fetches_;  // by handle: age order
  absl::flat_hash_map<std::string, uint64_t> by_id_;    // (request, attempt, part) → handle
  std::map<LaneId, Lane> lanes_;
  absl::flat_hash_map<std::string, LaneId> lane_of_peer_;                // open lanes only
  absl::flat_hash_map<uint64_t, std::pair<uint64_t, size_t>> receives_;  // → (handle, block index)
};

}  // namespace tidepool
