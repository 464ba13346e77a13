#include "kvstore/fetch_client.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/digest.h"
#include "base/status.h"

namespace tidepool {
namespace {

constexpr size_t kMaxPendingReleases = 1024;

std::string IdKey(const std::string& request, uint32_t attempt, uint32_t part) {
  return absl::StrCat(request.size(), ":", request, "/", attempt, "/", part);
}

std::string PeerKey(const PeerAddress& peer) {
  return absl::StrCat(peer.worker_id.size(), ":", peer.worker_id, peer.boot_id.size(), ":", peer.boot_id,
                      peer.transport);
}

}  // namespace

ClientActions FetchClient::Step(ClientEvent event, absl::Time now) {
  now_ = now;
  out_.clear();
  std::visit([&](auto& e) { On(e); }, event);
  return std::exchange(out_, {});
}

FetchId FetchClient::IdOf(const Fetch& fetch) const {
  return FetchId{fetch.spec.request_id, fetch.spec.attempt, fetch.spec.part, fetch.try_number};
}

template <typename Body>
void FetchClient::Send(const Lane& lane, Body body) {
  FetchWireFrame frame;
  frame.sender_boot = options_.boot_id;
  frame.receiver_boot = lane.peer.boot_id;
  frame.body = std::move(body);
  out_.push_back(ClientSend{lane.id, EncodeFetchFrame(frame)});
}

void FetchClient::On(ClientStart& e) {
  auto fetch = std::make_unique<Fetch>();
  Fetch& f = *fetch;
  f.handle = e.handle;
  f.spec = std::move(e.spec);
  f.started = now_;
  f.blocks.resize(f.spec.keys.size());
  for (size_t i = 0; i < f.spec.keys.size(); ++i) f.items.push_back({f.spec.keys[i], f.spec.slots[i].ref()});
  const bool fresh = by_id_.emplace(IdKey(f.spec.request_id, f.spec.attempt, f.spec.part), f.handle).second;
  fetches_[f.handle] = std::move(fetch);
  if (!fresh) {
    f.status = absl::FailedPreconditionError(
        absl::StrCat("part ", f.spec.part, " of attempt ", f.spec.attempt, " is being fetched already"));
    Count(FetchReason::kFailed);
    return Finish(f);
  }
  if (f.spec.keys.empty()) return Finish(f);
  if (now_ >= f.spec.deadline) {
    return Fail(f, absl::DeadlineExceededError("the fetch was late when it started"), FetchReason::kDeadline);
  }
  Arm(f.spec.deadline);
  Enqueue(f);
}

FetchClient::Lane& FetchClient::LaneFor(const PeerAddress& peer) {
  auto [it, fresh] = lane_of_peer_.emplace(PeerKey(peer), next_lane_);
  if (!fresh) return lanes_.at(it->second);
  Lane& lane = lanes_[next_lane_];
  lane.id = next_lane_++;
  lane.peer = peer;
  lane.hello_until = now_ + options_.timings.hello_timeout;
  lane.resend_after = options_.timings.retransmit;
  Arm(lane.hello_until);
  out_.push_back(ClientConnect{lane.id, peer.transport});
  SendHello(lane);
  return lane;
}

void FetchClient::SendHello(Lane& lane) {
  Send(lane, HelloFrame{options_.worker_id, options_.fingerprint, options_.layout.ToString()});
  lane.resend_at = now_ + lane.resend_after;
  lane.resend_after = std::min(lane.resend_after * 2, options_.timings.retransmit_max);
  Arm(lane.resend_at);
}

void FetchClient::Enqueue(Fetch& f) {
  Lane& lane = LaneFor(f.spec.peer);
  f.lane = lane.id;
  f.phase = Phase::kQueued;
  f.try_number = next_try_++;
  f.resend_after = options_.timings.retransmit;
  if (lane.state == Lane::kReady) Ask(f);
}

void FetchClient::Ask(Fetch& f) {
  f.phase = Phase::kAsked;
  FetchFrame frame;
  frame.id = IdOf(f);
  const int64_t left = absl::ToInt64Milliseconds(f.spec.deadline - now_);
  frame.time_left_ms = static_cast<uint32_t>(std::clamp<int64_t>(left, 1, 1 << 30));
  frame.items = f.items;
  Send(lanes_.at(f.lane), std::move(frame));
  f.resend_at = now_ + f.resend_after;
  f.resend_after = std::min(f.resend_after * 2, options_.timings.retransmit_max);
  Arm(f.resend_at);
}

void FetchClient::On(ClientCancel& e) {
  std::vector<uint64_t> handles;
  for (auto& [handle, f] : fetches_) {
    if (f->spec.request_id == e.request_id && f->spec.attempt == e.attempt) handles.push_back(handle);
  }
  for (uint64_t handle : handles) {
    Fail(*fetches_.at(handle), absl::CancelledError("the request was aborted"), FetchReason::kCancelled);
  }
}

void FetchClient::On(ClientRelease& e) {
  Lane& lane = LaneFor(e.peer);
  if (lane.state == Lane::kReady) {
    Send(lane, ReleaseFrame{e.request_id});
  } else if (lane.releases.size() < kMaxPendingReleases) {
    lane.releases.push_back(std::move(e.request_id));  // beyond the limit the peer's offer lease does it
  }
}

void FetchClient::On(ClientMessage& e) {
  auto it = lanes_.find(e.lane);
  if (it == lanes_.end() || it->second.state == Lane::kClosing) return Count(FetchReason::kUnknownFetch);
  Lane& lane = it->second;
  const bool refuse = std::holds_alternative<RefuseFrame>(e.frame.body);
  // A REFUSE for a stale boot id comes from the process that took the place of the one we meant.
  if (e.frame.receiver_boot != options_.boot_id || (e.frame.sender_boot != lane.peer.boot_id && !refuse)) {
    return Count(FetchReason::kStaleBoot);
  }
  if (auto* ack = std::get_if<HelloAckFrame>(&e.frame.body)) return OnFrame(lane, *ack);
  if (auto* no = std::get_if<RefuseFrame>(&e.frame.body)) return OnFrame(lane, *no);
  if (auto* commit = std::get_if<CommitFrame>(&e.frame.body)) return OnFrame(lane, *commit);
  Count(FetchReason::kMalformed);  // a frame that only a client sends
}

void FetchClient::OnFrame(Lane& lane, HelloAckFrame&) {
  if (lane.state != Lane::kHello) return;
  lane.state = Lane::kReady;
  for (auto& [handle, f] : fetches_) {
    if (f->lane == lane.id && f->phase == Phase::kQueued) Ask(*f);
  }
  for (std::string& request : lane.releases) Send(lane, ReleaseFrame{std::move(request)});
  lane.releases.clear();
}

void FetchClient::OnFrame(Lane& lane, RefuseFrame& no) {
  const std::string text = absl::StrCat("worker ", lane.peer.worker_id, " refused: ", no.text);
  if (no.reason == RefuseReason::kStaleBoot) {
    return CloseLane(lane, absl::UnavailableError(text), FetchReason::kUnavailable, /*restart=*/false);
  }
  if (no.id.request.empty()) {
    const bool busy = no.reason == RefuseReason::kBusy;
    return CloseLane(lane, busy ? absl::ResourceExhaustedError(text) : absl::FailedPreconditionError(text),
                     busy ? FetchReason::kBusy : FetchReason::kMismatch, /*restart=*/false);
  }
  Fetch* f = Find(no.id, lane.id);
  if (f == nullptr) return;
  switch (no.reason) {
    case RefuseReason::kBusy:
      return Fail(*f, absl::ResourceExhaustedError(text), FetchReason::kBusy);
    case RefuseReason::kNoHello:
      return CloseLane(lane, absl::UnavailableError(text), FetchReason::kUnavailable, /*restart=*/true);
    case RefuseReason::kFailed:
      return Restart(*f, absl::UnavailableError(text));
    default:
      return Fail(*f, absl::UnavailableError(text), FetchReason::kFailed);
  }
}

FetchClient::Fetch* FetchClient::Find(const FetchId& id, LaneId lane) {
  auto it = by_id_.find(IdKey(id.request, id.attempt, id.part));
  if (it == by_id_.end()) return nullptr;
  Fetch& f = *fetches_.at(it->second);
  const bool current = f.phase == Phase::kAsked && f.lane == lane && f.try_number == id.try_number;
  return current ? &f : nullptr;
}

void FetchClient::OnFrame(Lane& lane, CommitFrame& commit) {
  Fetch* f = Find(commit.id, lane.id);
  if (f == nullptr) {
    // Ended here; whichever way, the peer need not keep it.
    Count(FetchReason::kUnknownFetch);
    return Send(lane, AbortFrame{commit.id});
  }
  if (f->commit.has_value()) return;
  if (commit.items.size() != f->items.size()) {
    return Fail(*f, absl::DataLossError("the manifest does not match what was asked for"),
                FetchReason::kChecksum);
  }
  f->commit = std::move(commit);
  f->resend_at = absl::InfiniteFuture();
  CheckComplete(*f);
}

BulkVerdict FetchClient::StepBulk(LaneId lane, const FetchWireFrame& frame, size_t length, absl::Time now,
                                  ClientActions& actions) {
  now_ = now;
  auto drop = [&](FetchReason reason) {
    actions.push_back(ClientCount{reason});
    return BulkVerdict{};
  };
  const auto* data = std::get_if<DataFrame>(&frame.body);
  if (data == nullptr) return drop(FetchReason::kMalformed);
  auto it = lanes_.find(lane);
  if (it == lanes_.end() || it->second.state != Lane::kReady) return drop(FetchReason::kUnknownFetch);
  if (frame.receiver_boot != options_.boot_id || frame.sender_boot != it->second.peer.boot_id) {
    return drop(FetchReason::kStaleBoot);
  }
  Fetch* f = Find(data->id, lane);
  if (f == nullptr || data->index >= f->blocks.size()) return drop(FetchReason::kUnknownFetch);
  if (data->slot != f->items[data->index].slot) return drop(FetchReason::kStaleGeneration);
  // Whole blocks only; the range is there for layer-wise streaming.
  const std::span<std::byte> dst = f->spec.slots[data->index].data();
  if (length != dst.size() || data->length != length || data->layer_begin != 0 ||
      data->layer_end != options_.layout.layers) {
    return drop(FetchReason::kWrongLength);
  }
  Block& block = f->blocks[data->index];
  if (block.state != Block::kMissing) return drop(FetchReason::kDuplicate);
  block.state = Block::kReceiving;
  block.receive = next_receive_++;
  ++f->receiving;
  receives_[block.receive] = {f->handle, data->index};
  return BulkVerdict{block.receive, dst};
}

void FetchClient::On(ClientBulkDone& e) {
  auto it = receives_.find(e.receive);
  if (it == receives_.end()) return;  // given up: its slot is in quarantine
  const auto [handle, index] = it->second;
  receives_.erase(it);
  Fetch& f = *fetches_.at(handle);
  Block& block = f.blocks[index];
  --f.receiving;
  block.receive = 0;
  block.state = Block::kMissing;
  if (f.phase == Phase::kEnding) {
    if (f.receiving == 0) Finish(f);
    return;
  }
  if (f.phase == Phase::kBackoff) return Arm(now_);
  if (!e.status.ok()) return Restart(f, e.status);
  block.state = Block::kReceived;
  block.checksum = PayloadChecksum(f.spec.slots[index].data());
  CheckComplete(f);
}

void FetchClient::CheckComplete(Fetch& f) {
  if (!f.commit.has_value()) return;
  const CommitFrame& commit = *f.commit;
  uint32_t blocks = 0;
  for (size_t i = 0; i < f.blocks.size(); ++i) {
    if (!commit.items[i].present) continue;
    ++blocks;
    if (f.blocks[i].state != Block::kReceived) {
      f.straggler_at = now_ + options_.timings.straggler;
      return Arm(f.straggler_at);
    }
  }
  bool equal = blocks == commit.blocks && commit.bytes == blocks * options_.layout.block_bytes() &&
               commit.digest == ManifestDigest(f.items, commit.items);
  for (size_t i = 0; i < f.blocks.size() && equal; ++i) {
    equal = !commit.items[i].present || f.blocks[i].checksum == commit.items[i].checksum;
  }
  if (!equal) {
    return Fail(f, absl::DataLossError("what arrived is not what the manifest says"), FetchReason::kChecksum);
  }
  // A block that arrived though the manifest knows nothing of it is still being written: not done yet.
  if (f.receiving > 0) return;
  Send(lanes_.at(f.lane), CommitAckFrame{commit.id});
  Finish(f);
}

void FetchClient::Restart(Fetch& f, const absl::Status& why) {
  if (f.receiving > 0) {
    return CloseLane(lanes_.at(f.lane), why, FetchReason::kUnavailable, /*restart=*/true);
  }
  if (++f.restarts >= options_.timings.max_tries) {
    return Fail(
        f, absl::UnavailableError(absl::StrCat("given up after ", f.restarts, " tries: ", why.message())),
        FetchReason::kUnavailable);
  }
  f.phase = Phase::kBackoff;
  f.commit.reset();
  f.resend_at = f.straggler_at = absl::InfiniteFuture();
  for (Block& block : f.blocks) block = Block{};
  f.backoff_until = now_ + options_.timings.restart_backoff * (1 << (f.restarts - 1));
  Arm(f.backoff_until);
}

void FetchClient::Fail(Fetch& f, absl::Status status, FetchReason reason) {
  if (f.phase == Phase::kEnding) return;
  Count(reason);
  f.status = std::move(status);
  auto lane = lanes_.find(f.lane);
  if (f.phase == Phase::kAsked && lane != lanes_.end() && lane->second.state == Lane::kReady) {
    Send(lane->second, AbortFrame{IdOf(f)});
  }
  f.phase = Phase::kEnding;
  if (f.receiving == 0) return Finish(f);
  f.drain_until = now_ + options_.timings.drain;
  Arm(f.drain_until);
}

// Nothing is written to the slots any more (those that may be have left for quarantine).
void FetchClient::Finish(Fetch& f) {
  FetchResult result;
  result.status = f.status;
  result.slots = std::move(f.spec.slots);
  result.filled.assign(result.slots.size(), false);
  if (f.status.ok() && f.commit.has_value()) {
    for (size_t i = 0; i < result.filled.size(); ++i) result.filled[i] = f.commit->items[i].present;
    result.bytes = f.commit->bytes;
  }
  result.elapsed = now_ - f.started;
  auto it = by_id_.find(IdKey(f.spec.request_id, f.spec.attempt, f.spec.part));
  if (it != by_id_.end() && it->second == f.handle) by_id_.erase(it);
  const uint64_t handle = f.handle;
  fetches_.erase(handle);
  out_.push_back(ClientFinish{handle, std::move(result)});
}

void FetchClient::CloseLane(Lane& lane, const absl::Status& why, FetchReason reason, bool restart) {
  if (lane.state == Lane::kClosing) return;
  lane.state = Lane::kClosing;
  lane.close_until = now_ + options_.timings.close_grace;
  Arm(lane.close_until);
  auto it = lane_of_peer_.find(PeerKey(lane.peer));
  if (it != lane_of_peer_.end() && it->second == lane.id) lane_of_peer_.erase(it);
  out_.push_back(ClientClose{lane.id});
  std::vector<uint64_t> handles;
  for (auto& [handle, f] : fetches_) {
    if (f->lane == lane.id && f->phase != Phase::kEnding) handles.push_back(handle);
  }
  for (uint64_t handle : handles) {
    Fetch& f = *fetches_.at(handle);
    if (f.phase == Phase::kBackoff) continue;  // moves to a new lane by itself
    if (!restart) {
      Fail(f, why, reason);
    } else if (f.receiving == 0) {
      Restart(f, why);
    } else if (++f.restarts >= options_.timings.max_tries) {
      Fail(f, why, reason);
    } else {
      f.phase = Phase::kBackoff;
      f.commit.reset();
      f.resend_at = f.straggler_at = absl::InfiniteFuture();
      for (Block& block : f.blocks) {
        if (block.state == Block::kReceived) block = Block{};
      }
      f.backoff_until = now_ + options_.timings.restart_backoff * (1 << (f.restarts - 1));
      Arm(f.backoff_until);
    }
  }
}

void FetchClient::On(ClientLaneDown& e) {
  auto it = lanes_.find(e.lane);
  if (it == lanes_.end()) return;
  const bool hopeless = absl::IsInvalidArgument(e.why);  // the address itself is wrong
  CloseLane(it->second, Annotate(e.why, absl::StrCat("worker ", it->second.peer.worker_id)),
            FetchReason::kUnavailable, !hopeless);
}

void FetchClient::On(ClientLaneQuiesced& e) {
  // The transport ran the completion of every receive before this.
  lanes_.erase(e.lane);
}

// The endpoint did not quiesce: what may still be written leaves for good, the rest goes on.
void FetchClient::GiveUpQuiescence(LaneId lane) {
  std::vector<uint64_t> handles;
  for (auto& [handle, f] : fetches_) {
    if (f->lane == lane && f->receiving > 0) handles.push_back(handle);
  }
  for (uint64_t handle : handles) {
    Fetch& f = *fetches_.at(handle);
    for (size_t i = 0; i < f.blocks.size(); ++i) {
      if (f.blocks[i].state != Block::kReceiving) continue;
      receives_.erase(f.blocks[i].receive);
      Count(FetchReason::kQuarantined);
      out_.push_back(ClientQuarantine{std::move(f.spec.slots[i])});
    }
    f.receiving = 0;
    if (f.phase != Phase::kEnding) {
      Count(FetchReason::kUnavailable);
      f.status = absl::UnavailableError("the endpoint could not be closed");
    }
    Finish(f);
  }
}

void FetchClient::On(ClientTick&) {
  next_timer_ = absl::InfiniteFuture();
  std::vector<uint64_t> handles;
  for (auto& [handle, f] : fetches_) handles.push_back(handle);
  for (uint64_t handle : handles) {
    // Ticking one fetch may end others (they share a lane).
    if (auto it = fetches_.find(handle); it != fetches_.end()) TickFetch(*it->second);
  }
  std::vector<LaneId> lanes;
  for (auto& [id, lane] : lanes_) lanes.push_back(id);
  for (LaneId id : lanes) TickLane(lanes_.at(id));
}

void FetchClient::TickFetch(Fetch& f) {
  if (f.phase == Phase::kEnding) {
    if (now_ < f.drain_until) return Arm(f.drain_until);
    f.drain_until = absl::InfiniteFuture();
    return CloseLane(lanes_.at(f.lane), absl::UnavailableError("the endpoint was closed for another fetch"),
                     FetchReason::kUnavailable, /*restart=*/true);
  }
  if (now_ >= f.spec.deadline) {
    return Fail(
        f,
        absl::DeadlineExceededError(absl::StrCat("worker ", f.spec.peer.worker_id, " did not deliver within ",
                                                 absl::FormatDuration(now_ - f.started))),
        FetchReason::kDeadline);
  }
  Arm(f.spec.deadline);
  if (f.phase == Phase::kBackoff) {
    if (f.receiving > 0) return;  // waits for the old lane
    if (now_ >= f.backoff_until) return Enqueue(f);
    return Arm(f.backoff_until);
  }
  if (f.phase != Phase::kAsked) return;
  if (now_ >= f.resend_at) return Ask(f);
  if (f.receiving == 0 && now_ >= f.straggler_at) {
    return Restart(f, absl::UnavailableError("data named by the manifest did not arrive"));
  }
  Arm(f.resend_at);
  if (f.receiving == 0) Arm(f.straggler_at);
}

void FetchClient::TickLane(Lane& lane) {
  if (lane.state == Lane::kClosing) {
    if (now_ < lane.close_until) return Arm(lane.close_until);
    lane.close_until = absl::InfiniteFuture();
    return GiveUpQuiescence(lane.id);
  }
  if (lane.state != Lane::kHello) return;
  if (now_ >= lane.hello_until) {
    return CloseLane(
        lane, absl::UnavailableError(absl::StrCat("worker ", lane.peer.worker_id, " did not answer HELLO")),
        FetchReason::kUnavailable, /*restart=*/false);
  }
  Arm(lane.hello_until);
  if (now_ >= lane.resend_at) SendHello(lane);
  Arm(lane.resend_at);
}

void FetchClient::On(ClientShutdown&) {
  std::vector<uint64_t> handles;
  for (auto& [handle, f] : fetches_) handles.push_back(handle);
  for (uint64_t handle : handles) {
    if (auto it = fetches_.find(handle); it != fetches_.end()) {
      Fail(*it->second, absl::CancelledError("the node is shutting down"), FetchReason::kCancelled);
    }
  }
  std::vector<LaneId> lanes;
  for (auto& [id, lane] : lanes_) lanes.push_back(id);
  for (LaneId id : lanes) {
    CloseLane(lanes_.at(id), absl::CancelledError("the node is shutting down"), FetchReason::kCancelled,
              /*restart=*/false);
  }
}

}  // namespace tidepool
