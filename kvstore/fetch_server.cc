#include "kvstore/fetch_server.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/digest.h"

namespace tidepool {
namespace {

// A connection that never says HELLO holds an entry for so long.
constexpr absl::Duration kHelloWithin = absl::Seconds(10);

std::string IdKey(const std::string& peer_boot, const FetchId& id) {
  return absl::StrCat(peer_boot.size(), ":", peer_boot, id.request.size(), ":", id.request, "/", id.attempt,
                      "/", id.part);
}

}  // namespace

ServerActions FetchServer::Step(ServerEvent event, absl::Time now) {
  now_ = now;
  out_.clear();
  std::visit([&](auto& e) { On(e); }, event);
  Pump();
  return std::exchange(out_, {});
}

size_t FetchServer::offers() const {
  size_t n = 0;
  for (const auto& [request, blocks] : offers_) n += blocks.size();
  return n;
}

size_t FetchServer::held_blocks() const {
  size_t n = 0;
  for (const auto& [handle, s] : servings_) {
    for (const Block& block : s->blocks) n += block.lease.has_value();
  }
  return n;
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
    it = lanes_.emplace(e.lane, Lane{}).first;
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
  if (const auto* ack = std::get_if<CommitAckFrame>(&frame.body)) {
    if (Serving* s = FindServing(lane, ack->id); s != nullptr && s->committed) End(*s, std::nullopt, "");
  } else if (const auto* abort = std::get_if<AbortFrame>(&frame.body)) {
    if (Serving* s = FindServing(lane, abort->id)) End(*s, std::nullopt, "");
  } else if (const auto* release = std::get_if<ReleaseFrame>(&frame.body)) {
    offers_.erase(release->request);
  } else {
    Count(FetchReason::kMalformed);  // a frame that only a server sends
  }
}

void FetchServer::OnHello(LaneId id, Lane& lane, const FetchWireFrame& frame, const HelloFrame& hello) {
  std::string differs;
  auto check = [&](const char* what, const std::string& theirs, const std::string& ours) {
    if (theirs == ours) return;
    absl::StrAppend(&differs, differs.empty() ? "" : "; ", what, " is '", theirs, "', here it is '", ours,
                    "'");
  };
  check("protocol version", absl::StrCat(frame.version), absl::StrCat(kFetchProtocolVersion));
  check("model fingerprint", hello.fingerprint, options_.fingerprint);
  check("KV layout", hello.layout, options_.pool->layout().ToString());
  if (!differs.empty()) {
    Count(FetchReason::kMismatch);
    return Refuse(id, frame.sender_boot, FetchId{}, RefuseReason::kMismatch, differs);
  }
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
      if (s.committed && frame.id.try_number == s.id.try_number) SendCommit(s);
      return;
    }
    End(s, std::nullopt, "");  // the client has begun anew
  }
  if (servings_.size() >= options_.max_fetches) {
    Count(FetchReason::kBusy);
    return Refuse(id, lane.peer_boot, frame.id, RefuseReason::kBusy,
                  absl::StrCat("it serves ", servings_.size(), " fetches, the limit"));
  }
  auto serving = std::make_unique<Serving>();
  Serving& s = *serving;
  s.handle = next_handle_++;
  s.lane = id;
  s.id = frame.id;
  s.items = std::move(frame.items);
  s.lease_until = now_ + std::min(absl::Milliseconds(frame.time_left_ms), options_.fetch_lease);
  s.resend_after = options_.timings.retransmit;
  Arm(s.lease_until);
  s.blocks.resize(s.items.size());
  s.manifest.resize(s.items.size());
  for (size_t i = 0; i < s.items.size(); ++i) s.blocks[i].lease = Find(s.id.request, s.items[i].key);
  by_id_[key] = s.handle;
  turn_.push_back(s.handle);
  servings_[s.handle] = std::move(serving);
}

std::optional<BlockLease> FetchServer::Find(const std::string& request_id, const BlockKey& key) {
  if (auto request = offers_.find(request_id); request != offers_.end()) {
    if (auto offer = request->second.find(key); offer != request->second.end()) {
      // Its fetcher is alive: it gets a lease's length to come for the rest.
      offer->second.until = now_ + options_.offer_lease;
      return offer->second.lease.Clone();
    }
  }
  return options_.pool->Lease(key);
}

void FetchServer::Pump() {
  while (!turn_.empty() && sends_in_flight_ < options_.max_sends) {
    const uint64_t handle = turn_.front();
    turn_.pop_front();
    auto it = servings_.find(handle);
    if (it == servings_.end() || it->second->ended) continue;
    SendNext(*it->second);
    if (it->second->next < it->second->blocks.size()) {
      turn_.push_back(handle);
    } else {
      Commit(*it->second);
    }
  }
}

// Posts the next block that is here.
void FetchServer::SendNext(Serving& s) {
  while (s.next < s.blocks.size() && !s.blocks[s.next].lease.has_value()) ++s.next;
  if (s.next == s.blocks.size()) return;
  const size_t i = s.next++;
  Block& block = s.blocks[i];
  const std::span<const std::byte> payload = block.lease->data();
  s.manifest[i] = CommitItem{true, PayloadChecksum(payload)};
  FetchWireFrame frame;
  frame.sender_boot = options_.boot_id;
  frame.receiver_boot = lanes_.at(s.lane).peer_boot;
  frame.body =
      DataFrame{s.id,           static_cast<uint32_t>(i), s.items[i].slot, 0, options_.pool->layout().layers,
                payload.size(), s.manifest[i].checksum};
  block.send = next_send_++;
  sends_[block.send] = {s.handle, i};
  ++s.in_flight;
  ++sends_in_flight_;
  out_.push_back(ServerSendBulk{s.lane, block.send, EncodeFetchFrame(frame), payload});
  while (s.next < s.blocks.size() && !s.blocks[s.next].lease.has_value()) ++s.next;
}

// The manifest is complete once the last transfer is posted: it may arrive before the data.
void FetchServer::Commit(Serving& s) {
  s.committed = true;
  SendCommit(s);
}

void FetchServer::SendCommit(Serving& s) {
  CommitFrame commit;
  commit.id = s.id;
  for (const CommitItem& item : s.manifest) commit.blocks += item.present;
  commit.bytes = commit.blocks * options_.pool->layout().block_bytes();
  commit.digest = ManifestDigest(s.items, s.manifest);
  commit.items = s.manifest;
  Send(s.lane, lanes_.at(s.lane).peer_boot, std::move(commit));
  s.resend_at = now_ + s.resend_after;
  s.resend_after = std::min(s.resend_after * 2, options_.timings.retransmit_max);
  Arm(s.resend_at);
}

void FetchServer::On(ServerSendDone& e) {
  auto it = sends_.find(e.send);
  if (it == sends_.end()) return;  // given up: its block is in quarantine
  const auto [handle, index] = it->second;
  sends_.erase(it);
  --sends_in_flight_;
  Serving& s = *servings_.at(handle);
  Block& block = s.blocks[index];
  if (e.status.ok()) out_.push_back(ServerSent{block.lease->data().size()});
  block.lease.reset();
  block.send = 0;
  --s.in_flight;
  if (!e.status.ok() && !s.ended) {
    const std::string text = absl::StrCat("sending failed: ", e.status.message());
    if (lanes_.at(s.lane).state == Lane::kReady) {
      Refuse(s.lane, lanes_.at(s.lane).peer_boot, s.id, RefuseReason::kFailed, text);
    }
    Count(FetchReason::kFailed);
    return End(s, RefuseReason::kFailed, text);
  }
  EraseIfIdle(handle);
}

void FetchServer::End(Serving& s, std::optional<RefuseReason> refuse, std::string text) {
  if (s.ended) return;
  s.ended = true;
  const std::string key = IdKey(lanes_.at(s.lane).peer_boot, s.id);
  by_id_.erase(key);
  // Twice as long as anything of it may still be under way.
  const absl::Time until = now_ + 2 * options_.fetch_lease;
  auto [it, fresh] = tombstones_.try_emplace(key);
  it->second = Tombstone{s.id.try_number, until, refuse, std::move(text)};
  if (fresh) tombstone_order_.push_back(key);
  while (tombstone_order_.size() > options_.max_tombstones) {
    tombstones_.erase(tombstone_order_.front());
    tombstone_order_.pop_front();
  }
  Arm(until);
  for (Block& block : s.blocks) {
    if (block.send == 0) block.lease.reset();
  }
  EraseIfIdle(s.handle);
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
  it->second.state = Lane::kClosing;
  it->second.hello_until = absl::InfiniteFuture();
  it->second.close_until = now_ + options_.timings.close_grace;
  Arm(it->second.close_until);
  out_.push_back(ServerClose{id});
}

void FetchServer::On(ServerLaneDown& e) {
  // One that never spoke has no entry yet; it is closed all the same.
  lanes_.try_emplace(e.lane);
  CloseLane(e.lane);
}

// The transport ran the completion of every transfer before this.
void FetchServer::On(ServerLaneQuiesced& e) { lanes_.erase(e.lane); }

void FetchServer::On(ServerOffer& e) {
  const absl::Time until = now_ + options_.offer_lease;
  offers_[e.request_id].insert_or_assign(e.key, OfferEntry{std::move(e.lease), until});
  Arm(until);
}

void FetchServer::On(ServerReleaseOffers& e) { offers_.erase(e.request_id); }

void FetchServer::TickOffers() {
  size_t expired = 0;
  for (auto request = offers_.begin(); request != offers_.end();) {
    auto& blocks = request->second;
    for (auto it = blocks.begin(); it != blocks.end();) {
      auto next = std::next(it);
      if (now_ >= it->second.until) {
        blocks.erase(it);
        ++expired;
      } else {
        Arm(it->second.until);
      }
      it = next;
    }
    auto next = std::next(request);
    if (blocks.empty()) offers_.erase(request);
    request = next;
  }
  if (expired > 0) out_.push_back(ServerLeaseExpired{expired});
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
  TickOffers();
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
      for (auto& [handle, s] : servings_) {
        if (s->lane != id) continue;
        for (Block& block : s->blocks) {
          if (block.send == 0) continue;
          sends_.erase(block.send);
          --sends_in_flight_;
          --s->in_flight;
          Count(FetchReason::kQuarantined);
          out_.push_back(ServerQuarantine{std::move(*block.lease)});
          block.lease.reset();
          block.send = 0;
        }
      }
      std::erase_if(servings_, [&](const auto& item) { return item.second->lane == id; });
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
  offers_.clear();
  std::vector<LaneId> lanes;
  for (auto& [id, lane] : lanes_) lanes.push_back(id);
  for (LaneId id : lanes) CloseLane(id);
}

}  // namespace tidepool
