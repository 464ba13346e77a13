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
#include "absl/container/inlined_vector.h"
#include "base/block_layout.h"
#include "base/digest.h"
#include "kvstore/fetch_codec.h"
#include "kvstore/fetch_node.h"
#include "kvstore/fetch_types.h"
#include "kvstore/fetch_window.h"

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
struct ClientDecode {  // a payload that arrived, into its slot; its end comes back as ClientDecoded
  uint64_t receive;
  std::span<const std::byte> payload;  // both stay as they are until then
  std::span<std::byte> dst;
};
using ClientAction = std::variant<ClientConnect, ClientSend, ClientClose, ClientFinish, ClientQuarantine,
                                  ClientCount, ClientDecode>;
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
struct ClientDecoded {  // nothing writes to the slot any more
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
using ClientEvent =
    std::variant<ClientStart, ClientCancel, ClientRelease, ClientMessage, ClientBulkDone, ClientDecoded,
                 ClientLaneDown, ClientLaneQuiesced, ClientTick, ClientShutdown>;

// Where announced DATA goes; an empty `dst` drops it.
struct BulkVerdict {
  uint64_t receive = 0;  // names the receive in ClientBulkDone; 0 when dropped
  std::span<std::byte> dst;
  PayloadDigest* digest = nullptr;  // as in BulkSink
};

// FetchClient: the fetching half of the handoff. Core: no thread, socket or clock; `now` only grows.
//
// A fetch takes the lane to its peer with the fewest bytes to come (another one is opened while there are
// fewer than `lanes` and none is idle). It is queued until the lane's HELLO is acknowledged → asked (FETCH
// sent, repeated while nothing comes; then polls, while nothing more comes) → ranges of layers land in its
// slots (DATA), or in a buffer from which they are copied (BATCH) or decoded there, COMMIT names what there
// is → every checksum and the digest hold → COMMIT_ACK, finished. What arrived is told to the sender
// (CREDIT), which never has more on its way than the lane's window. A fetch ends early by deadline, cancel,
// refusal or damage: ABORT is sent, and it is finished only when no receive into its slots is outstanding:
// they end by themselves, or the lane is force-closed and quiesced (the other fetches of this lane restart on
// another), or, `close_grace` after that, the slots that may still be written are quarantined.
class FetchClient {
 public:
  struct Options {
    std::string worker_id;
    std::string boot_id;
    std::string fingerprint;
    BlockLayout layout;
    const BlockCodec* codec = nullptr;  // what blocks may be sent as; null: only as they are
    FetchTimings timings;
    size_t lanes = 1;  // to one peer, at most
    // Of each lane; raised to what holds a layer. `target` is raised to twice the round trip.
    FetchWindow::Options window;
  };

  explicit FetchClient(Options options);

  ClientActions Step(ClientEvent event, absl::Time now);
  // DATA or a BATCH is announced. Part of Step, apart because its answer cannot wait; `actions` (to send, to
  // count) can.
  BulkVerdict StepBulk(LaneId lane, const FetchWireFrame& frame, size_t length, absl::Time now,
                       ClientActions& actions);

  // When Tick is next needed; InfiniteFuture when nothing is pending. May be early, never late.
  absl::Time next_timer() const { return next_timer_; }
  size_t active() const { return fetches_.size(); }
  size_t lanes() const { return lanes_.size(); }
  // Bytes of announced transfers that have not ended; of a well-behaved sender at most the lane's window.
  uint64_t receiving(LaneId lane) const;

 private:
  enum class Phase { kQueued, kBackoff, kAsked, kEnding };
  struct Block {
    absl::InlinedVector<RangeSum, 1> ranges;  // as announced, in the order of layers, without overlap
    uint32_t layers = 0;                      // arrived and verified
  };
  // A bulk transfer under way, into a slot or into a buffer.
  struct Receive {
    LaneId lane;
    uint64_t handle;
    uint32_t try_number;
    uint64_t bytes;
    DataRange range;  // into a slot
    std::optional<BatchFrame> batch;
    std::unique_ptr<std::byte[]> buffer;    // of a batch, or of a payload to be decoded
    std::unique_ptr<PayloadDigest> digest;  // of a range, as it lands
    bool decoding = false;                  // arrived; being decoded into its slot
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
    size_t receiving = 0;       // transfers into its slots or of payloads for them, of any try
    size_t decoding = 0;        // payloads that arrived and are being decoded into its slots, of any try
    size_t batches = 0;         // transfers into buffers, of this try
    bool heard = false;         // the server knows of this try
    uint64_t under_way = 0;     // bytes, this try: announced and not ended
    uint64_t received = 0;      // bytes, this try
    uint64_t credited = 0;      // of those, told to the sender
    uint64_t sent_by_peer = 0;  // bytes, this try: as it said
    size_t incomplete = 0;      // blocks that `commit` names and that are not all here
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
    absl::Time hello_at;
    std::vector<std::string> releases;  // to send once ready
    std::optional<FetchWindow> window;  // once ready
    uint64_t receiving = 0;             // bytes under way
    uint64_t uncredited = 0;            // bytes of its fetches arrived and not told to the sender
  };

  void On(ClientStart& e);
  void On(ClientCancel& e);
  void On(ClientRelease& e);
  void On(ClientMessage& e);
  void On(ClientBulkDone& e);
  void On(ClientDecoded& e);
  void On(ClientLaneDown& e);
  void On(ClientLaneQuiesced& e);
  void On(ClientTick&);
  void On(ClientShutdown&);

  void OnFrame(Lane& lane, HelloAckFrame& frame);
  void OnFrame(Lane& lane, RefuseFrame& frame);
  void OnFrame(Lane& lane, CommitFrame& frame);
  void OnFrame(Lane& lane, ProgressFrame& frame);

  Lane& OpenLane(const PeerAddress& peer);
  Lane& LaneFor(const PeerAddress& peer, bool may_open);
  bool HasOtherLane(const Lane& lane) const;
  uint64_t BytesToCome(LaneId lane) const;
  Fetch* Find(const FetchId& id, LaneId lane);
  void SendHello(Lane& lane);
  void Enqueue(Fetch& fetch);
  void Ask(Fetch& fetch);
  void Poll(Fetch& fetch);
  void Heard(Fetch& fetch, bool moved);
  void SendCredit(Lane& lane, Fetch& fetch, bool poll);
  void SendCredits(Lane& lane);
  void ForgetTry(Fetch& fetch);
  bool Lacks(const Fetch& fetch) const;
  void ArmStraggler(Fetch& fetch, bool moved);
  // Why the range may not be placed.
  std::optional<FetchReason> Misfit(const Fetch& fetch, const DataRange& range) const;
  void Insert(Fetch& fetch, const DataRange& range);
  void Arrived(Fetch& fetch, const DataRange& range);
  std::span<std::byte> BytesOf(const Fetch& fetch, const DataRange& range) const;
  static bool Undamaged(const Receive& receive, std::span<const std::byte> bytes);
  bool StartDecoding(Receive& receive, const absl::Status& status);
  void Ended(uint64_t receive, const absl::Status& status);
  bool TakeRange(Fetch& fetch, const Receive& receive, const absl::Status& status);
  bool TakeBatch(Fetch& fetch, const Receive& receive, const absl::Status& status);
  // Something may still write to its slots: a transfer, which its lane can be closed to end, or the decoder,
  // which ends by itself.
  static bool Written(const Fetch& fetch) { return fetch.receiving + fetch.decoding > 0; }
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
  absl::flat_hash_map<std::string, std::vector<LaneId>> lanes_of_peer_;  // open lanes only
  absl::flat_hash_map<uint64_t, Receive> receives_;
  // May still be written: kept to the end.
  std::vector<std::unique_ptr<std::byte[]>> abandoned_;
  std::vector<std::unique_ptr<PayloadDigest>> abandoned_digests_;
};

}  // namespace tidepool
