#include "kvstore/fetch_server.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/digest.h"
#include "base/status.h"

namespace tidepool {
namespace {

// A connection that never says HELLO holds an entry for so long.
constexpr absl::Duration kHelloWithin = absl::Seconds(10);
// How long a load waits in a full pool for a slot that another block of ours will give back, with none coming
// back meanwhile: so many times what sending one took, and at least so long. Computing it begins then.
constexpr absl::Duration kNoRoomPatience = absl::Milliseconds(50);
constexpr int kNoRoomSends = 4;

std::string IdKey(const std::string& peer_boot, const FetchId& id) {
  return absl::StrCat(peer_boot.size(), ":", peer_boot, id.request.size(), ":", id.request, "/", id.attempt,
                      "/", id.part);
}

}  // namespace

FetchServer::FetchServer(Options options)
    : options_(std::move(options)),
      layers_(options_.pool->layout().layers),
      layer_bytes_(options_.pool->layout().layer_bytes()),
      block_bytes_(options_.pool->layout().block_bytes()),
      lane_ring_(options_.flow.quantum),
      unit_bytes_(options_.codec == nullptr
                      ? layer_bytes_
                      : std::max(layer_bytes_, options_.codec->MaxEncodedBytes(options_.pool->layout()))),
      max_held_(options_.flow.max_load_bytes / block_bytes_),
      sums_(options_.pool->stats().slots) {
  TP_CHECK(options_.flow.batch_bytes <= kMaxBatchBytes);
}

ServerActions FetchServer::Step(ServerEvent event, absl::Time now) {
  now_ = now;
  out_.clear();
  std::visit([&](auto& e) { On(e); }, event);
  PumpLoads();
  PumpEncodes();
  Pump();
  return std::exchange(out_, {});
}

size_t FetchServer::held_blocks() const {
  size_t n = loads_.size();
  for (const auto& [handle, s] : servings_) {
    for (const Block& block : s->blocks) n += block.lease.has_value();
  }
  return n;
}

FetchServer::Lane* FetchServer::FindLane(LaneId id) {
  auto it = lanes_.find(id);
  return it == lanes_.end() ? nullptr : &it->second;
}

uint64_t FetchServer::outstanding(LaneId lane) const {
  auto it = lanes_.find(lane);
  return it == lanes_.end() ? 0 : it->second.outstanding;
}

template <typename Body>
void FetchServer::Send(LaneId id, const std::string& receiver_boot, Body body) {
  FetchWireFrame frame;
  frame.sender_boot = options_.boot_id;
  frame.receiver_boot = receiver_boot;
  frame.body = std::move(body);
  out_.push_back(ServerSend{id, EncodeFetchFrame(frame)});
}

void FetchServer::Refuse(LaneId id, const std::string& receiver_boot, const FetchId& fetch,
                         RefuseReason reason, std::string text) {
  if (text.size() > kMaxTextBytes) text.resize(kMaxTextBytes);
  Send(id, receiver_boot, RefuseFrame{fetch, reason, std::move(text)});
}

void FetchServer::On(ServerMessage& e) {
  auto it = lanes_.find(e.lane);
  if (it == lanes_.end()) {
    if (lanes_.size() >= options_.max_lanes) {
      Count(FetchReason::kBusy);
      Refuse(e.lane, e.frame.sender_boot, FetchId{}, RefuseReason::kBusy,
             absl::StrCat("there are ", lanes_.size(), " connections, the limit"));
      out_.push_back(ServerClose{e.lane});
      return;
    }
    it = lanes_.try_emplace(e.lane, options_.flow.quantum).first;
    it->second.hello_until = now_ + kHelloWithin;
    Arm(it->second.hello_until);
  }
  Lane& lane = it->second;
  if (lane.state == Lane::kClosing) return;
  const FetchWireFrame& frame = e.frame;
  auto* fetch = std::get_if<FetchFrame>(&e.frame.body);
  if (frame.receiver_boot != options_.boot_id) {
    Count(FetchReason::kStaleBoot);
    return Refuse(e.lane, frame.sender_boot, fetch != nullptr ? fetch->id : FetchId{},
                  RefuseReason::kStaleBoot,
                  absl::StrCat("boot id ", frame.receiver_boot, " is of a process that is no more"));
  }
  if (const auto* hello = std::get_if<HelloFrame>(&frame.body)) return OnHello(e.lane, lane, frame, *hello);
  if (lane.state != Lane::kReady || lane.peer_boot != frame.sender_boot) {
    Count(FetchReason::kStaleBoot);
    if (fetch != nullptr) {
      Refuse(e.lane, frame.sender_boot, fetch->id, RefuseReason::kNoHello, "FETCH before HELLO");
    }
    return;
  }
  if (fetch != nullptr) return OnFetch(e.lane, lane, *fetch);
  if (const auto* credit = std::get_if<CreditFrame>(&frame.body)) return OnCredit(e.lane, lane, *credit);
  if (const auto* ack = std::get_if<CommitAckFrame>(&frame.body)) {
    if (Serving* s = FindServing(lane, ack->id); s != nullptr && s->committed) {
      const uint64_t rest = s->sent - s->received;
      End(*s, std::nullopt, "");
      ObserveArrived(lane, rest);
    }
  } else if (const auto* abort = std::get_if<AbortFrame>(&frame.body)) {
    if (Serving* s = FindServing(lane, abort->id)) End(*s, std::nullopt, "");
  } else if (const auto* release = std::get_if<ReleaseFrame>(&frame.body)) {
    options_.offers->Close(release->request);
    PollOffers();
  } else {
    Count(FetchReason::kMalformed);  // a frame that only a server sends
  }
}

void FetchServer::OnHello(LaneId id, Lane& lane, const FetchWireFrame& frame, const HelloFrame& hello) {
  if (lane.state == Lane::kReady && lane.peer_boot != frame.sender_boot) {
    // A connection is one process's, to its end.
    Count(FetchReason::kStaleBoot);
    Refuse(id, frame.sender_boot, FetchId{}, RefuseReason::kStaleBoot,
           "the connection belongs to another boot id");
    return CloseLane(id);
  }
  std::string differs;
  auto check = [&](const char* what, const std::string& theirs, const std::string& ours) {
    if (theirs == ours) return;
    absl::StrAppend(&differs, differs.empty() ? "" : "; ", what, " is '", theirs, "', here it is '", ours,
                    "'");
  };
  check("protocol version", absl::StrCat(frame.version), absl::StrCat(kFetchProtocolVersion));
  check("model fingerprint", hello.fingerprint, options_.fingerprint);
  check("KV layout", hello.layout, HelloLayout(options_.pool->layout(), options_.codec));
  if (!differs.empty()) {
    Count(FetchReason::kMismatch);
    return Refuse(id, frame.sender_boot, FetchId{}, RefuseReason::kMismatch, differs);
  }
  if (lane.state == Lane::kNew) lane_ring_.Add(id);
  if (options_.codec != nullptr && !lane.chooser)
    lane.chooser.emplace(*options_.codec, options_.pool->layout());
  lane.state = Lane::kReady;
  lane.hello_until = absl::InfiniteFuture();
  lane.peer_boot = frame.sender_boot;
  Send(id, lane.peer_boot, HelloAckFrame{options_.worker_id});
}

FetchServer::Serving* FetchServer::FindServing(const Lane& lane, const FetchId& id) {
  auto it = by_id_.find(IdKey(lane.peer_boot, id));
  if (it == by_id_.end()) return nullptr;
  Serving& s = *servings_.at(it->second);
  return s.id.try_number == id.try_number ? &s : nullptr;
}

void FetchServer::OnFetch(LaneId id, Lane& lane, FetchFrame& frame) {
  const std::string key = IdKey(lane.peer_boot, frame.id);
  lane.window = frame.window;
  if (auto it = tombstones_.find(key);
      it != tombstones_.end() && frame.id.try_number <= it->second.try_number) {
    Count(FetchReason::kDuplicate);
    const Tombstone& t = it->second;
    if (t.refuse && frame.id.try_number == t.try_number)
      Refuse(id, lane.peer_boot, frame.id, *t.refuse, t.text);
    return;
  }
  if (auto it = by_id_.find(key); it != by_id_.end()) {
    Serving& s = *servings_.at(it->second);
    if (frame.id.try_number <= s.id.try_number) {
      Count(FetchReason::kDuplicate);
      if (frame.id.try_number != s.id.try_number) return;
      if (s.committed) return SendCommit(s);
      return Send(id, lane.peer_boot, ProgressFrame{s.id, s.sent});
    }
    End(s, std::nullopt, "");  // the client has begun anew
  }
  if (servings_.size() >= options_.max_fetches) {
    Count(FetchReason::kBusy);
    return Refuse(id, lane.peer_boot, frame.id, RefuseReason::kBusy,
                  absl::StrCat("it serves ", servings_.size(), " fetches, the limit"));
  }
  if (frame.window < unit_bytes_) {
    Count(FetchReason::kMismatch);
    return Refuse(
        id, lane.peer_boot, frame.id, RefuseReason::kMismatch,
        absl::StrCat("a window of ", frame.window, " bytes holds no layer or payload of ", unit_bytes_));
  }
  auto serving = std::make_unique<Serving>();
  Serving& s = *serving;
  s.handle = next_handle_++;
  s.lane = id;
  s.id = frame.id;
  s.key = key;
  s.items = std::move(frame.items);
  s.lease_until = now_ + std::min(absl::Milliseconds(frame.time_left_ms), options_.fetch_lease);
  s.resend_after = options_.timings.retransmit;
  Arm(s.lease_until);
  s.blocks.resize(s.items.size());
  s.unresolved = s.items.size();
  by_id_[key] = s.handle;
  servings_[s.handle] = std::move(serving);
  for (uint32_t i = 0; i < s.items.size(); ++i) Resolve(s, i);
  CommitIfDone(s);  // of no keys
}

// Looks for the block, from nothing sent of it.
void FetchServer::Resolve(Serving& s, uint32_t i) {
  Block& block = s.blocks[i];
  const BlockKey& key = s.items[i].key;
  auto offer = options_.offers->Find(s.id.request, key, now_);
  // Not as a use of it: what peers ask for is no sign of what is needed here.
  BlockLease published = std::move(options_.pool->LeaseMany(std::span(&key, 1), LeaseKind::kTransfer)[0]);
  if (!published.empty()) {
    block.lease = std::move(published);
    return Ready(s, i, /*sealed=*/true);
  }
  if (offer.has_value()) {
    block.lease = std::move(offer->lease);
    block.layers_ready = offer->layers_ready;
    block.epoch = offer->epoch;
    if (block.layers_ready >= layers_) return Ready(s, i, /*sealed=*/false);
    block.state = Block::kGrowing;
    ++s.growing, ++growing_;
    if (block.layers_ready > 0) Queue(s, i);
  } else if (options_.disk != nullptr && options_.disk->Contains(key)) {
    block.state = Block::kLoading;
    if (s.to_load.empty()) load_turn_.push_back(s.handle);
    s.to_load.push_back(i);
  } else {
    Absent(s, i);
  }
}

// The block has layers to send.
void FetchServer::Queue(Serving& s, uint32_t i) {
  if (std::exchange(s.blocks[i].queued, true)) return;
  s.ready.push_back(i);
  if (s.ready.size() > 1) return;
  Lane& lane = lanes_.at(s.lane);
  auto& servings = lane.servings[s.id.request];
  if (servings.empty()) lane.requests.Add(s.id.request);
  servings.push_back(s.handle);
}

// What was queued of the block is sent, or will not be.
void FetchServer::Unqueue(Serving& s, uint32_t i) {
  if (!std::exchange(s.blocks[i].queued, false)) return;
  if (s.ready.front() == i) {
    s.ready.pop_front();
  } else {
    std::erase(s.ready, i);
  }
  if (!s.ready.empty()) return;
  Lane& lane = lanes_.at(s.lane);
  auto it = lane.servings.find(s.id.request);
  std::erase(it->second, s.handle);
  if (!it->second.empty()) return;
  lane.servings.erase(it);
  lane.requests.Remove(s.id.request);
}

void FetchServer::Absent(Serving& s, uint32_t i) {
  Block& block = s.blocks[i];
  if (block.state == Block::kGrowing) --s.growing, --growing_;
  block.state = Block::kAbsent;
  Unqueue(s, i);
  if (block.in_flight == 0) DropLease(s, block);
  --s.unresolved;
  CommitIfDone(s);
}

void FetchServer::DropLease(const Serving& s, Block& block) {
  block.lease.reset();
  Lane* lane = FindLane(s.lane);
  if (std::exchange(block.from_disk, false)) {
    --loaded_held_;
    no_room_since_.reset();
    if (lane != nullptr) --lane->loads;
  }
  if (std::exchange(block.payload, nullptr) != nullptr) {
    --payloads_held_;
    if (lane != nullptr) --lane->payloads;
  }
}

void FetchServer::SetCharge(Serving& s, uint64_t bytes) {
  if (auto it = lanes_.find(s.lane); it != lanes_.end()) it->second.outstanding += bytes - s.charged;
  s.charged = bytes;
}

void FetchServer::OnCredit(LaneId id, Lane& lane, const CreditFrame& credit) {
  lane.window = credit.window;
  Serving* s = FindServing(lane, credit.id);
  if (s == nullptr) {
    if (!credit.poll) return;
    auto it = tombstones_.find(IdKey(lane.peer_boot, credit.id));
    if (it != tombstones_.end() && it->second.try_number >= credit.id.try_number) {
      const Tombstone& t = it->second;
      if (t.refuse && t.try_number == credit.id.try_number) {
        Refuse(id, lane.peer_boot, credit.id, *t.refuse, t.text);
      }
      return;
    }
    Count(FetchReason::kUnknownFetch);
    return Refuse(id, lane.peer_boot, credit.id, RefuseReason::kFailed, "it does not know the fetch");
  }
  // What arrived twice counts once.
  const uint64_t before = s->received;
  s->received = std::max(s->received, std::min(credit.received, s->sent));
  SetCharge(*s, s->sent - s->received);
  ObserveArrived(lane, s->received - before);
  if (!credit.poll) return;
  if (s->committed) return SendCommit(*s);
  Send(id, lane.peer_boot, ProgressFrame{s->id, s->sent});
}

// --- growing offers ---

void FetchServer::On(ServerOffersMoved&) { PollOffers(); }

void FetchServer::PollOffers() {
  if (growing_ == 0) return;
  for (auto& [handle, serving] : servings_) {
    Serving& s = *serving;
    if (s.growing == 0 || s.ended) continue;
    for (uint32_t i = 0; i < s.blocks.size() && s.growing > 0; ++i) {
      Block& block = s.blocks[i];
      if (block.state != Block::kGrowing) continue;
      auto offer = options_.offers->Find(s.id.request, s.items[i].key, now_);
      if (!offer.has_value() || offer->epoch != block.epoch || offer->lease.ref() != block.lease->ref()) {
        // Withdrawn, or begun again, there or elsewhere. Layers of two computations never make one block.
        if (block.layers_sent > 0) {
          Absent(s, i);
          continue;
        }
        Unqueue(s, i);
        --s.growing, --growing_;
        DropLease(s, block);
        block.layers_ready = 0;
        block.state = Block::kAbsent;
        Resolve(s, i);
        continue;
      }
      block.layers_ready = std::max(block.layers_ready, offer->layers_ready);
      if (block.layers_ready >= layers_) {
        block.state = Block::kReady;
        --s.growing, --growing_;
      }
      if (block.layers_ready > block.layers_sent) Queue(s, i);
    }
  }
}

void FetchServer::ExpireOffers() {
  const size_t expired = options_.offers->Expire(now_);
  if (expired == 0) return;
  out_.push_back(ServerLeaseExpired{expired});
  PollOffers();
}

// --- the lower tier ---

void FetchServer::PumpLoads() {
  bool full = false;  // the pool has no slot
  for (size_t skipped = 0; skipped < load_turn_.size();) {
    const uint64_t handle = load_turn_.front();
    load_turn_.pop_front();
    auto it = servings_.find(handle);
    if (it == servings_.end() || it->second->ended || it->second->to_load.empty()) continue;
    skipped = LoadNext(*it->second, full) ? 0 : skipped + 1;
    load_turn_.push_back(handle);
  }
  if (!full) no_room_since_.reset();  // none waits for a slot
}

// When a load no longer waits for a slot. What the other blocks of its fetch took is lost unless COMMIT comes
// well before the fetch's own end.
absl::Time FetchServer::RoomUntil(absl::Time lease_until) const {
  absl::Duration patience = kNoRoomPatience;
  for (const auto& [id, lane] : lanes_) {
    if (lane.loads > 0) patience = std::max(patience, kNoRoomSends * lane.block_send);
  }
  return *no_room_since_ + std::min(patience, (lease_until - *no_room_since_) / 2);
}

// False: not now.
bool FetchServer::LoadNext(Serving& s, bool& full) {
  const uint32_t i = s.to_load.front();
  const BlockKey& key = s.items[i].key;
  if (auto load = load_of_key_.find(key); load != load_of_key_.end()) {
    s.to_load.pop_front();
    loads_.at(load->second).waiters.emplace_back(s.handle, i);
    return true;
  }
  // What is looked up below is looked up at every step: only where it could be loaded.
  const size_t held = loads_.size() + loaded_held_;
  Lane& lane = lanes_.at(s.lane);
  if (full || loads_.size() >= options_.flow.max_loads || !MayTake(lane.loads, held, max_held_)) return false;
  if (BlockLease lease = std::move(options_.pool->LeaseMany(std::span(&key, 1), LeaseKind::kTransfer)[0]);
      !lease.empty()) {  // somebody was faster
    s.to_load.pop_front();
    s.blocks[i].lease = std::move(lease);
    Ready(s, i, /*sealed=*/true);
    return true;
  }
  auto slots = options_.pool->Reserve(1, {.kind = LeaseKind::kTierIo});
  if (!slots.ok()) {
    if (held > 0) {  // one of ours will be given back, unless a peer that takes nothing has them all
      if (!no_room_since_) no_room_since_ = now_;
      const absl::Time until = RoomUntil(s.lease_until);
      if (now_ < until) {
        Arm(until);
        full = true;
        return false;
      }
    }
    s.to_load.pop_front();
    Absent(s, i);
    return true;
  }
  no_room_since_.reset();
  s.to_load.pop_front();
  const uint64_t id = next_load_++;
  LoadState& load = loads_[id];
  load.key = key;
  load.lane = s.lane;
  ++lane.loads;
  load.waiters.emplace_back(s.handle, i);
  load_of_key_[key] = id;
  out_.push_back(ServerLoad{id, key, std::move((*slots)[0]), s.lease_until - now_});
  return true;
}

void FetchServer::On(ServerLoaded& e) {
  auto it = loads_.find(e.load);
  const LoadState load = std::move(it->second);
  loads_.erase(it);
  load_of_key_.erase(load.key);
  if (Lane* lane = FindLane(load.lane)) --lane->loads;
  std::optional<BlockLease> lease;
  if (e.record.ok()) {
    // The tier verified the record against its own checksum; that it is the one asked for is verified here.
    if (e.record->info.key == load.key && e.record->bytes == block_bytes_) {
      // One that was cleared meanwhile is absent, as it would be a moment later.
      if (options_.pool->PublishLoaded(e.slot, std::move(e.record->info))) lease = std::move(e.slot);
    } else {
      Count(FetchReason::kChecksum);
    }
  }
  for (const auto& [handle, index] : load.waiters) {
    Serving& s = *servings_.at(handle);
    if (!lease.has_value()) {
      Absent(s, index);
      continue;
    }
    Block& block = s.blocks[index];
    block.lease = lease->Clone(LeaseKind::kTransfer);
    block.from_disk = true;
    ++loaded_held_;
    ++lanes_.at(s.lane).loads;
    Ready(s, index, /*sealed=*/true);
  }
}

// --- encoding ---

// The block is here, all of it final: it goes as it is, or encoded first.
void FetchServer::Ready(Serving& s, uint32_t i, bool sealed) {
  Block& block = s.blocks[i];
  block.layers_ready = layers_;
  block.state = Block::kReady;
  block.sealed = sealed;
  block.codec = CodecId::kNone;
  Lane& lane = lanes_.at(s.lane);
  if (sealed && lane.chooser) {
    // Whether computing were faster was for the fetcher to say; here nobody computes.
    const CodecChoice choice = lane.chooser->Choose(s.unresolved, std::numeric_limits<double>::infinity(),
                                                    absl::ToDoubleSeconds(s.lease_until - now_));
    if (!choice.recompute) block.codec = lane.chooser->levels()[choice.level].codec;
  }
  if (block.codec == CodecId::kNone) return Queue(s, i);
  block.state = Block::kEncoding;
  if (lane.to_encode.empty()) encode_turn_.push_back(s.lane);
  lane.to_encode.emplace_back(s.handle, i);
}

void FetchServer::PumpEncodes() {
  const auto wanted = [&](const std::pair<uint64_t, uint32_t>& of) {
    auto it = servings_.find(of.first);
    return it != servings_.end() && !it->second->ended;
  };
  for (size_t skipped = 0; skipped < encode_turn_.size() && encodes_.size() < options_.flow.max_loads;) {
    const LaneId id = encode_turn_.front();
    encode_turn_.pop_front();
    Lane* const lane = FindLane(id);
    if (lane == nullptr) continue;
    while (!lane->to_encode.empty() && !wanted(lane->to_encode.front())) lane->to_encode.pop_front();
    if (lane->to_encode.empty()) continue;
    if (MayTake(lane->payloads, encodes_.size() + payloads_held_, max_held_)) {
      const auto [handle, index] = lane->to_encode.front();
      lane->to_encode.pop_front();
      const Block& block = servings_.at(handle)->blocks[index];
      const uint64_t job = next_job_++;
      encodes_[job] = {handle, index, id};
      ++lane->payloads;
      out_.push_back(ServerEncode{job, block.codec, block.lease->Clone(LeaseKind::kTransfer)});
      skipped = 0;
      if (lane->to_encode.empty()) continue;
    } else {
      ++skipped;
    }
    encode_turn_.push_back(id);
  }
}

void FetchServer::On(ServerEncoded& e) {
  auto it = encodes_.find(e.job);
  const auto [handle, index, lane_id] = it->second;
  encodes_.erase(it);
  Lane* const lane = FindLane(lane_id);
  if (lane != nullptr) --lane->payloads;
  auto serving = servings_.find(handle);
  if (serving == servings_.end() || serving->second->ended) return;
  Serving& s = *serving->second;
  Block& block = s.blocks[index];
  if (e.payload.ok()) {
    if (lane->chooser) lane->chooser->ObserveEncode(block.codec, (*e.payload)->size(), e.seconds);
    block.payload = std::move(*e.payload);
    ++payloads_held_;
    ++lane->payloads;
  } else {
    block.codec = CodecId::kNone;  // it goes as it is
  }
  block.state = Block::kReady;
  Queue(s, index);
}

// Bytes of the connection are known to have arrived.
void FetchServer::ObserveArrived(Lane& lane, uint64_t bytes) {
  if (!lane.chooser || lane.busy_since == absl::InfiniteFuture() || bytes == 0) return;
  lane.chooser->ObserveSend(static_cast<double>(bytes), absl::ToDoubleSeconds(now_ - lane.busy_since));
  lane.busy_since = lane.outstanding > 0 ? now_ : absl::InfiniteFuture();
}

// --- sending ---

void FetchServer::Pump() {
  while (true) {
    const auto bytes_of_lane = [&](LaneId id) -> std::optional<uint64_t> {
      Lane& lane = lanes_.at(id);
      if (!MayTake(lane.transfers, transfers_.size(), options_.flow.max_sends)) return std::nullopt;
      const auto request = NextRequest(lane);
      return request.has_value() ? NextBytes(lane, *request) : std::nullopt;
    };
    const std::optional<LaneId> id = lane_ring_.Next(bytes_of_lane);
    if (!id.has_value()) return;
    Lane& lane = lanes_.at(*id);
    const std::string request = *NextRequest(lane);
    const uint64_t bytes = *NextBytes(lane, request);
    lane_ring_.Charge(*id, bytes);
    lane.requests.Charge(request, bytes);
    for (uint64_t handle : lane.servings.at(request)) {
      Serving& s = *servings_.at(handle);
      if (!NextBytes(lane, s).has_value()) continue;
      SendNext(lane, s);
      break;
    }
  }
}

std::optional<std::string> FetchServer::NextRequest(Lane& lane) {
  return lane.requests.Next([&](const std::string& request) { return NextBytes(lane, request); });
}

std::optional<uint64_t> FetchServer::NextBytes(const Lane& lane, const std::string& request) const {
  for (uint64_t handle : lane.servings.at(request)) {
    if (auto bytes = NextBytes(lane, *servings_.at(handle))) return bytes;
  }
  return std::nullopt;
}

// The end of the layers that go next, in one transfer.
uint32_t FetchServer::UnitEnd(const Lane& lane, const Block& block) const {
  if (block.payload != nullptr) return layers_;
  const uint64_t unit = std::min(options_.flow.unit_bytes, lane.window) / layer_bytes_;
  return std::min<uint64_t>(block.layers_ready, block.layers_sent + std::max<uint64_t>(unit, 1));
}

uint64_t FetchServer::UnitBytes(const Lane& lane, const Block& block) const {
  if (block.payload != nullptr) return block.payload->size();
  return (UnitEnd(lane, block) - block.layers_sent) * layer_bytes_;
}

// The size of the serving's next transfer, as SendNext will make it.
std::optional<uint64_t> FetchServer::NextBytes(const Lane& lane, const Serving& s) const {
  if (s.ready.empty() || lane.outstanding >= lane.window) return std::nullopt;
  const uint64_t credit = lane.window - lane.outstanding;
  uint64_t batch = 0;
  uint64_t first = 0;
  size_t count = 0;
  for (uint32_t i : s.ready) {
    const Block& block = s.blocks[i];
    const uint64_t bytes = UnitBytes(lane, block);
    if (count == 0) first = bytes;
    const uint64_t with = batch + kRangeBytes + bytes;
    if (block.payload != nullptr || bytes >= options_.flow.batch_below || with > options_.flow.batch_bytes ||
        with > credit)
      break;
    batch = with;
    ++count;
  }
  if (count > 1) return batch;
  return first <= credit ? std::optional(first) : std::nullopt;
}

void FetchServer::SendNext(Lane& lane, Serving& s) {
  const uint64_t credit = lane.window - lane.outstanding;
  std::vector<std::pair<uint32_t, uint32_t>> batch;  // (index, end of its layers)
  uint64_t length = 0;
  for (uint32_t i : s.ready) {
    const uint32_t end = UnitEnd(lane, s.blocks[i]);
    const uint64_t bytes = UnitBytes(lane, s.blocks[i]);
    const uint64_t with = length + kRangeBytes + bytes;
    if (s.blocks[i].payload != nullptr || bytes >= options_.flow.batch_below ||
        with > options_.flow.batch_bytes || with > credit)
      break;
    length = with;
    batch.emplace_back(i, end);
  }
  if (batch.size() > 1) {
    SendBatch(lane, s, batch, length);
  } else {
    SendRange(lane, s, s.ready.front(), UnitEnd(lane, s.blocks[s.ready.front()]));
  }
  CommitIfDone(s);
}

// Of what is sealed and goes as it lies in the slot, made once.
uint64_t FetchServer::ChecksumOf(const Block& block, const DataRange& range,
                                 std::span<const std::byte> bytes) {
  if (!block.sealed || block.payload != nullptr) return PayloadChecksum(bytes);
  const SlotRef slot = block.lease->ref();
  if (const auto kept = sums_.Find(slot, range.layer_begin, range.layer_end)) return *kept;
  const uint64_t made = PayloadChecksum(bytes);
  sums_.Keep(slot, {range.layer_begin, range.layer_end, made});
  return made;
}

// Layers [layers_sent, end) of a block leave: their bytes, and what the wire says of them.
std::span<const std::byte> FetchServer::TakeRange(Serving& s, uint32_t i, uint32_t end, DataRange& range) {
  Block& block = s.blocks[i];
  const std::span<const std::byte> bytes =
      block.payload != nullptr ? std::span<const std::byte>(*block.payload)
                               : block.lease->data().subspan(block.layers_sent * layer_bytes_,
                                                             (end - block.layers_sent) * layer_bytes_);
  const auto codec = block.payload != nullptr ? static_cast<uint8_t>(block.codec) : kRawCodec;
  range = DataRange{i, s.items[i].slot, block.layers_sent, end, codec, bytes.size(), 0};
  range.checksum = ChecksumOf(block, range, bytes);
  block.ranges.push_back({range.layer_begin, range.layer_end, range.checksum});
  block.layers_sent = end;
  if (block.layers_sent == block.layers_ready) Unqueue(s, i);
  if (block.layers_sent == layers_) {
    block.state = Block::kSent;
    --s.unresolved;
  }
  return bytes;
}

void FetchServer::SendRange(Lane& lane, Serving& s, uint32_t i, uint32_t end) {
  DataFrame frame{s.id, {}};
  const std::span<const std::byte> bytes = TakeRange(s, i, end, frame.range);
  if (frame.range.layer_begin == 0) s.blocks[i].sending_since = now_;
  ++s.blocks[i].in_flight;
  Post(lane, s, std::move(frame), bytes, i, nullptr);
}

void FetchServer::SendBatch(Lane& lane, Serving& s, std::span<const std::pair<uint32_t, uint32_t>> batch,
                            uint64_t length) {
  std::unique_ptr<std::byte[]> buffer;
  if (buffers_.empty()) {
    buffer.reset(new std::byte[options_.flow.batch_bytes]);
  } else {
    buffer = std::move(buffers_.back());
    buffers_.pop_back();
  }
  const size_t directory = batch.size() * kRangeBytes;
  std::vector<DataRange> ranges(batch.size());
  std::byte* out = buffer.get() + directory;
  for (size_t n = 0; n < batch.size(); ++n) {
    const std::span<const std::byte> bytes = TakeRange(s, batch[n].first, batch[n].second, ranges[n]);
    std::memcpy(out, bytes.data(), bytes.size());
    out += bytes.size();
    Block& block = s.blocks[batch[n].first];
    if (block.state == Block::kSent && block.in_flight == 0) DropLease(s, block);
  }
  const std::span<std::byte> payload(buffer.get(), length);
  const uint64_t checksum = EncodeDirectory(ranges, payload.first(directory));
  Post(lane, s, BatchFrame{s.id, static_cast<uint32_t>(ranges.size()), length, checksum}, payload,
       std::nullopt, std::move(buffer));
}

template <typename Body>
void FetchServer::Post(Lane& lane, Serving& s, Body body, std::span<const std::byte> payload,
                       std::optional<uint32_t> index, std::unique_ptr<std::byte[]> buffer) {
  FetchWireFrame frame;
  frame.sender_boot = options_.boot_id;
  frame.receiver_boot = lane.peer_boot;
  frame.body = std::move(body);
  const uint64_t send = next_send_++;
  transfers_[send] = Transfer{s.handle, payload.size(), index, std::move(buffer)};
  ++s.in_flight;
  ++lane.transfers;
  s.in_flight_bytes += payload.size();
  s.sent += payload.size();
  if (lane.busy_since == absl::InfiniteFuture()) lane.busy_since = now_;
  SetCharge(s, s.charged + payload.size());
  out_.push_back(ServerSendBulk{s.lane, send, EncodeFetchFrame(frame), payload});
}

// The manifest is complete once the last transfer is posted: it may arrive before the data.
void FetchServer::CommitIfDone(Serving& s) {
  if (s.unresolved > 0 || s.committed || s.ended) return;
  s.committed = true;
  SendCommit(s);
}

void FetchServer::SendCommit(Serving& s) {
  CommitFrame commit;
  commit.id = s.id;
  commit.items.resize(s.blocks.size());
  for (size_t i = 0; i < s.blocks.size(); ++i) {
    const Block& block = s.blocks[i];
    if (block.state != Block::kSent) continue;
    commit.items[i] = {true, BlockSum(block.ranges)};
    ++commit.blocks;
  }
  commit.bytes = commit.blocks * block_bytes_;
  commit.digest = ManifestDigest(s.items, commit.items);
  Send(s.lane, lanes_.at(s.lane).peer_boot, std::move(commit));
  s.resend_at = now_ + s.resend_after;
  s.resend_after = std::min(s.resend_after * 2, options_.timings.retransmit_max);
  Arm(s.resend_at);
}

void FetchServer::On(ServerSendDone& e) {
  auto it = transfers_.find(e.send);
  if (it == transfers_.end()) return;  // given up: what it reads from is in quarantine
  Transfer transfer = std::move(it->second);
  transfers_.erase(it);
  Serving& s = *servings_.at(transfer.handle);
  --s.in_flight;
  Lane* const lane = FindLane(s.lane);
  if (lane != nullptr) --lane->transfers;
  s.in_flight_bytes -= transfer.bytes;
  if (e.status.ok()) out_.push_back(ServerSent{transfer.bytes});
  if (transfer.buffer != nullptr) buffers_.push_back(std::move(transfer.buffer));
  if (transfer.index.has_value()) {
    Block& block = s.blocks[*transfer.index];
    const bool over = s.ended || block.state == Block::kSent || block.state == Block::kAbsent;
    if (--block.in_flight == 0 && over) DropLease(s, block);
    if (lane != nullptr && e.status.ok() && block.in_flight == 0 && block.state == Block::kSent &&
        block.sealed) {
      lane->block_send = now_ - block.sending_since;
    }
  }
  if (s.ended) SetCharge(s, std::min(s.charged, s.in_flight_bytes));
  if (!e.status.ok() && !s.ended) {
    const std::string text = absl::StrCat("sending failed: ", e.status.message());
    if (lanes_.at(s.lane).state == Lane::kReady) {
      Refuse(s.lane, lanes_.at(s.lane).peer_boot, s.id, RefuseReason::kFailed, text);
    }
    Count(FetchReason::kFailed);
    return End(s, RefuseReason::kFailed, text);
  }
  EraseIfIdle(transfer.handle);
}

void FetchServer::End(Serving& s, std::optional<RefuseReason> refuse, std::string text) {
  if (s.ended) return;
  s.ended = true;
  by_id_.erase(s.key);
  // Twice as long as anything of it may still be under way.
  const absl::Time until = now_ + 2 * options_.fetch_lease;
  auto [it, fresh] = tombstones_.try_emplace(s.key);
  it->second = Tombstone{s.id.try_number, until, refuse, std::move(text)};
  if (fresh) tombstone_order_.push_back(s.key);
  while (tombstone_order_.size() > options_.max_tombstones) {
    tombstones_.erase(tombstone_order_.front());
    tombstone_order_.pop_front();
  }
  Arm(until);
  s.to_load.clear();
  while (!s.ready.empty()) Unqueue(s, s.ready.front());
  growing_ -= std::exchange(s.growing, 0);
  bool waits = false;
  for (Block& block : s.blocks) {
    waits |= block.state == Block::kLoading;
    if (block.in_flight == 0) DropLease(s, block);
  }
  if (waits) StopWaiting(s.handle);
  SetCharge(s, std::min(s.charged, s.in_flight_bytes));
  EraseIfIdle(s.handle);
}

// The serving takes no more blocks from the lower tier.
void FetchServer::StopWaiting(uint64_t handle) {
  for (auto& [id, load] : loads_) {
    if (std::erase_if(load.waiters, [&](const auto& w) { return w.first == handle; }) > 0 &&
        load.waiters.empty()) {
      out_.push_back(ServerCancelLoad{id});
    }
  }
}

void FetchServer::EraseIfIdle(uint64_t handle) {
  auto it = servings_.find(handle);
  if (it != servings_.end() && it->second->ended && it->second->in_flight == 0) servings_.erase(it);
}

void FetchServer::CloseLane(LaneId id) {
  auto it = lanes_.find(id);
  if (it == lanes_.end() || it->second.state == Lane::kClosing) return;
  std::vector<uint64_t> handles;
  for (auto& [handle, s] : servings_) {
    if (s->lane == id) handles.push_back(handle);
  }
  for (uint64_t handle : handles) {
    if (auto s = servings_.find(handle); s != servings_.end()) {
      End(*s->second, RefuseReason::kFailed, "the connection was lost");
    }
  }
  lane_ring_.Remove(id);
  it->second.state = Lane::kClosing;
  it->second.hello_until = absl::InfiniteFuture();
  it->second.close_until = now_ + options_.timings.close_grace;
  Arm(it->second.close_until);
  out_.push_back(ServerClose{id});
}

void FetchServer::On(ServerLaneDown& e) {
  // One that never spoke has no entry yet; it is closed all the same.
  lanes_.try_emplace(e.lane, options_.flow.quantum);
  CloseLane(e.lane);
}

// The transport ran the completion of every transfer before this.
void FetchServer::On(ServerLaneQuiesced& e) { lanes_.erase(e.lane); }

// The endpoint did not quiesce: what may still be read from leaves for good.
void FetchServer::GiveUpQuiescence(LaneId id) {
  absl::erase_if(transfers_, [&](auto& item) {
    Transfer& transfer = item.second;
    Serving& s = *servings_.at(transfer.handle);
    if (s.lane != id) return false;
    --lanes_.at(id).transfers;
    if (transfer.buffer != nullptr) abandoned_.push_back(std::move(transfer.buffer));
    if (!transfer.index.has_value()) return true;
    Block& block = s.blocks[*transfer.index];
    if (block.payload != nullptr) {  // read from in place of the slot
      abandoned_payloads_.push_back(block.payload);
      DropLease(s, block);
    } else if (block.lease.has_value()) {
      Count(FetchReason::kQuarantined);
      out_.push_back(ServerQuarantine{std::move(*block.lease)});
      DropLease(s, block);
    }
    return true;
  });
  std::erase_if(servings_, [&](const auto& item) { return item.second->lane == id; });
}

void FetchServer::TickServing(Serving& s) {
  if (s.ended) return;
  if (now_ >= s.lease_until) {
    // The client is past its deadline too, or gone. What is in flight can only be stopped with its lane.
    size_t held = 0;
    for (const Block& block : s.blocks) held += block.lease.has_value();
    if (held > 0) out_.push_back(ServerLeaseExpired{held});
    const LaneId lane = s.lane;
    const bool in_flight = s.in_flight > 0;
    End(s, RefuseReason::kExpired, "the lease on the fetch ran out");
    if (in_flight) CloseLane(lane);
    return;
  }
  Arm(s.lease_until);
  if (s.committed && now_ >= s.resend_at) return SendCommit(s);
  Arm(s.resend_at);
}

void FetchServer::On(ServerTick&) {
  next_timer_ = absl::InfiniteFuture();
  ExpireOffers();
  std::vector<uint64_t> handles;
  for (auto& [handle, s] : servings_) handles.push_back(handle);
  for (uint64_t handle : handles) {
    if (auto it = servings_.find(handle); it != servings_.end()) TickServing(*it->second);
  }
  std::vector<LaneId> lanes;
  for (auto& [id, lane] : lanes_) lanes.push_back(id);
  for (LaneId id : lanes) {
    Lane& lane = lanes_.at(id);
    if (lane.state == Lane::kNew && now_ >= lane.hello_until) CloseLane(id);
    if (lane.state == Lane::kClosing && now_ >= lane.close_until) {
      lane.close_until = absl::InfiniteFuture();
      GiveUpQuiescence(id);
    }
    Arm(lane.hello_until);
    Arm(lane.close_until);
  }
  while (!tombstone_order_.empty()) {
    auto it = tombstones_.find(tombstone_order_.front());
    if (it != tombstones_.end() && now_ < it->second.until) {
      Arm(it->second.until);
      break;
    }
    if (it != tombstones_.end()) tombstones_.erase(it);
    tombstone_order_.pop_front();
  }
}

void FetchServer::On(ServerShutdown&) {
  options_.offers->Clear();
  std::vector<LaneId> lanes;
  for (auto& [id, lane] : lanes_) lanes.push_back(id);
  for (LaneId id : lanes) CloseLane(id);
  for (auto& [id, load] : loads_) out_.push_back(ServerCancelLoad{id});
}

}  // namespace tidepool
