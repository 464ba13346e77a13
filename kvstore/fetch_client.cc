#include "kvstore/fetch_client.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
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

FetchClient::FetchClient(Options options)
    : options_([&] {
        // What cannot be divided must fit: a layer, or a payload.
        const uint64_t unit =
            options.codec == nullptr
                ? options.layout.layer_bytes()
                : std::max(options.layout.layer_bytes(), options.codec->MaxEncodedBytes(options.layout));
        FetchWindow::Options& w = options.window;
        w.max = std::max(w.max, unit);
        w.min = std::clamp(w.min, unit, w.max);
        options.lanes = std::max<size_t>(options.lanes, 1);
        return std::move(options);
      }()) {}

uint64_t FetchClient::receiving(LaneId lane) const {
  auto it = lanes_.find(lane);
  return it == lanes_.end() ? 0 : it->second.receiving;
}

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

FetchClient::Lane& FetchClient::OpenLane(const PeerAddress& peer) {
  Lane& lane = lanes_[next_lane_];
  lane.id = next_lane_++;
  lane.peer = peer;
  lane.hello_at = now_;
  lane.hello_until = now_ + options_.timings.hello_timeout;
  lane.resend_after = options_.timings.retransmit;
  lanes_of_peer_[PeerKey(peer)].push_back(lane.id);
  Arm(lane.hello_until);
  out_.push_back(ClientConnect{lane.id, peer.transport});
  SendHello(lane);
  return lane;
}

uint64_t FetchClient::BytesToCome(LaneId lane) const {
  uint64_t bytes = 0;
  for (const auto& [handle, f] : fetches_) {
    if (f->lane != lane || (f->phase != Phase::kQueued && f->phase != Phase::kAsked)) continue;
    const uint64_t all = f->blocks.size() * options_.layout.block_bytes();
    bytes += all - std::min(all, f->received);
  }
  return bytes;
}

// The open lane with the least to come; another one where none is idle.
FetchClient::Lane& FetchClient::LaneFor(const PeerAddress& peer, bool may_open) {
  const auto it = lanes_of_peer_.find(PeerKey(peer));
  if (it == lanes_of_peer_.end()) return OpenLane(peer);
  LaneId best = 0;
  uint64_t least = UINT64_MAX;
  for (LaneId id : it->second) {
    const uint64_t bytes = BytesToCome(id);
    if (bytes < least) best = id, least = bytes;
  }
  if (may_open && least > 0 && it->second.size() < options_.lanes) return OpenLane(peer);
  return lanes_.at(best);
}

void FetchClient::SendHello(Lane& lane) {
  Send(lane,
       HelloFrame{options_.worker_id, options_.fingerprint, HelloLayout(options_.layout, options_.codec)});
  lane.resend_at = now_ + lane.resend_after;
  lane.resend_after = std::min(lane.resend_after * 2, options_.timings.retransmit_max);
  Arm(lane.resend_at);
}

void FetchClient::Enqueue(Fetch& f) {
  f.lane = 0;  // its own bytes weigh on no lane
  // One that had to begin again takes what there is: perhaps the peer allows no more connections.
  Lane& lane = LaneFor(f.spec.peer, f.restarts == 0);
  f.lane = lane.id;
  f.phase = Phase::kQueued;
  f.try_number = next_try_++;
  f.resend_after = options_.timings.retransmit;
  if (lane.state == Lane::kReady) Ask(f);
}

void FetchClient::Ask(Fetch& f) {
  Lane& lane = lanes_.at(f.lane);
  const bool idle = std::none_of(fetches_.begin(), fetches_.end(), [&](const auto& other) {
    return other.second->lane == f.lane && other.second->phase == Phase::kAsked;
  });
  if (idle) lane.window->Restart(now_);
  f.phase = Phase::kAsked;
  FetchFrame frame;
  frame.id = IdOf(f);
  const int64_t left = absl::ToInt64Milliseconds(f.spec.deadline - now_);
  frame.time_left_ms = static_cast<uint32_t>(std::clamp<int64_t>(left, 1, 1 << 30));
  frame.window = lane.window->bytes();
  frame.items = f.items;
  Send(lane, std::move(frame));
  f.resend_at = now_ + f.resend_after;
  f.resend_after = std::min(f.resend_after * 2, options_.timings.retransmit_max);
  Arm(f.resend_at);
}

// Nothing came for a while: where is the server?
void FetchClient::Poll(Fetch& f) {
  SendCredit(lanes_.at(f.lane), f, /*poll=*/true);
  f.resend_at = now_ + f.resend_after;
  f.resend_after = std::min(f.resend_after * 2, options_.timings.retransmit_max);
  Arm(f.resend_at);
}

// The server knows of the try; `moved`: something came of it.
void FetchClient::Heard(Fetch& f, bool moved) {
  f.heard = true;
  if (!moved || f.commit.has_value()) return;
  f.resend_after = options_.timings.retransmit;
  f.resend_at = now_ + f.resend_after;
  Arm(f.resend_at);
}

void FetchClient::SendCredit(Lane& lane, Fetch& f, bool poll) {
  lane.uncredited -= f.received - f.credited;
  f.credited = f.received;
  Send(lane, CreditFrame{IdOf(f), f.received, lane.window->bytes(), poll});
}

// In time for the sender not to run dry: well before the window is used up.
void FetchClient::SendCredits(Lane& lane) {
  if (lane.state != Lane::kReady || lane.uncredited < lane.window->bytes() / 4) return;
  for (auto& [handle, f] : fetches_) {
    if (f->lane == lane.id && f->phase == Phase::kAsked && f->received > f->credited) {
      SendCredit(lane, *f, /*poll=*/false);
    }
  }
}

// What came of the try counts no more.
void FetchClient::ForgetTry(Fetch& f) {
  if (auto lane = lanes_.find(f.lane); lane != lanes_.end()) {
    lane->second.uncredited -= f.received - f.credited;
  }
  f.commit.reset();
  f.resend_at = f.straggler_at = absl::InfiniteFuture();
  f.try_number = 0;
  f.heard = false;
  f.batches = 0;
  f.under_way = f.received = f.credited = f.sent_by_peer = 0;
  for (Block& block : f.blocks) block = Block{};
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
  const auto open = lanes_of_peer_.find(PeerKey(e.peer));
  Lane& lane = open == lanes_of_peer_.end() ? OpenLane(e.peer) : lanes_.at(open->second.front());
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
  if (auto* progress = std::get_if<ProgressFrame>(&e.frame.body)) return OnFrame(lane, *progress);
  Count(FetchReason::kMalformed);  // a frame that only a client sends
}

void FetchClient::OnFrame(Lane& lane, HelloAckFrame&) {
  if (lane.state != Lane::kHello) return;
  lane.state = Lane::kReady;
  FetchWindow::Options window = options_.window;
  window.target = std::max(window.target, 2 * (now_ - lane.hello_at));
  lane.window.emplace(window);
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
                     busy ? FetchReason::kBusy : FetchReason::kMismatch, busy && HasOtherLane(lane));
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
  Heard(*f, /*moved=*/true);
  f->commit = std::move(commit);
  f->resend_at = absl::InfiniteFuture();
  f->incomplete = 0;
  for (size_t i = 0; i < f->blocks.size(); ++i) {
    f->incomplete += f->commit->items[i].present && f->blocks[i].layers < options_.layout.layers;
  }
  ArmStraggler(*f, /*moved=*/true);
  CheckComplete(*f);
}

void FetchClient::OnFrame(Lane& lane, ProgressFrame& progress) {
  Fetch* f = Find(progress.id, lane.id);
  if (f == nullptr) return;
  Heard(*f, /*moved=*/false);
  f->sent_by_peer = std::max(f->sent_by_peer, progress.sent);
  ArmStraggler(*f, /*moved=*/false);
}

// Something was sent, as the sender says, and is not here.
bool FetchClient::Lacks(const Fetch& f) const {
  return (f.commit.has_value() && f.incomplete > 0) || f.received + f.under_way < f.sent_by_peer;
}

// `moved`: something came just now, so the rest may be on its way too.
void FetchClient::ArmStraggler(Fetch& f, bool moved) {
  if (!Lacks(f)) {
    f.straggler_at = absl::InfiniteFuture();
  } else if (moved || f.straggler_at == absl::InfiniteFuture()) {
    f.straggler_at = now_ + options_.timings.straggler;
    Arm(f.straggler_at);
  }
}

std::optional<FetchReason> FetchClient::Misfit(const Fetch& f, const DataRange& range) const {
  if (range.index >= f.blocks.size()) return FetchReason::kUnknownFetch;
  if (range.slot != f.items[range.index].slot) return FetchReason::kStaleGeneration;
  if (range.codec != kRawCodec) {
    if (options_.codec == nullptr || !options_.codec->Decodes(static_cast<CodecId>(range.codec))) {
      return FetchReason::kMalformed;
    }
    const bool whole = range.layer_begin == 0 && range.layer_end == options_.layout.layers;
    if (!whole || range.length == 0 || range.length > options_.codec->MaxEncodedBytes(options_.layout)) {
      return FetchReason::kWrongLength;
    }
  } else {
    const bool inside = range.layer_begin < range.layer_end && range.layer_end <= options_.layout.layers;
    if (!inside || range.length != (range.layer_end - range.layer_begin) * options_.layout.layer_bytes()) {
      return FetchReason::kWrongLength;
    }
  }
  for (const RangeSum& other : f.blocks[range.index].ranges) {
    if (range.layer_begin < other.layer_end && other.layer_begin < range.layer_end) {
      return FetchReason::kDuplicate;
    }
  }
  return std::nullopt;
}

void FetchClient::Insert(Fetch& f, const DataRange& range) {
  auto& ranges = f.blocks[range.index].ranges;
  const auto at = std::find_if(ranges.begin(), ranges.end(),
                               [&](const RangeSum& other) { return other.layer_begin >= range.layer_end; });
  ranges.insert(at, RangeSum{range.layer_begin, range.layer_end, range.checksum});
}

std::span<std::byte> FetchClient::BytesOf(const Fetch& f, const DataRange& range) const {
  return f.spec.slots[range.index].data().subspan(range.layer_begin * options_.layout.layer_bytes(),
                                                  range.length);
}

BulkVerdict FetchClient::StepBulk(LaneId id, const FetchWireFrame& frame, size_t length, absl::Time now,
                                  ClientActions& actions) {
  now_ = now;
  auto drop = [&](FetchReason reason) {
    actions.push_back(ClientCount{reason});
    return BulkVerdict{};
  };
  const auto* data = std::get_if<DataFrame>(&frame.body);
  const auto* batch = std::get_if<BatchFrame>(&frame.body);
  if (data == nullptr && batch == nullptr) return drop(FetchReason::kMalformed);
  auto it = lanes_.find(id);
  if (it == lanes_.end() || it->second.state != Lane::kReady) return drop(FetchReason::kUnknownFetch);
  Lane& lane = it->second;
  if (frame.receiver_boot != options_.boot_id || frame.sender_boot != lane.peer.boot_id) {
    return drop(FetchReason::kStaleBoot);
  }
  const FetchId& fetch_id = data != nullptr ? data->id : batch->id;
  Fetch* f = Find(fetch_id, id);
  if (f == nullptr) {
    // Ended here, and its ABORT was lost or overtook the FETCH: without credits the peer would wait for long.
    FetchWireFrame abort{.sender_boot = options_.boot_id, .receiver_boot = lane.peer.boot_id};
    abort.body = AbortFrame{fetch_id};
    actions.push_back(ClientSend{id, EncodeFetchFrame(abort)});
    return drop(FetchReason::kUnknownFetch);
  }
  // Twice: what was under way of an aborted fetch weighs on the lane here, and not any more there.
  if (lane.receiving + length > 2 * options_.window.max) return drop(FetchReason::kOverCredit);
  Receive receive{id, f->handle, f->try_number, length, {}, {}, nullptr, nullptr};
  BulkVerdict verdict{next_receive_, {}};
  if (data != nullptr) {
    if (const auto reason = Misfit(*f, data->range)) return drop(*reason);
    if (data->range.length != length) return drop(FetchReason::kWrongLength);
    Insert(*f, data->range);
    receive.range = data->range;
    if (data->range.codec == kRawCodec) {
      verdict.dst = BytesOf(*f, data->range);
    } else {
      receive.buffer.reset(new std::byte[length]);
      verdict.dst = {receive.buffer.get(), length};
    }
    receive.digest = std::make_unique<PayloadDigest>(length);
    verdict.digest = receive.digest.get();
    ++f->receiving;
  } else {
    if (batch->length != length || length > kMaxBatchBytes || batch->count == 0) {
      return drop(FetchReason::kWrongLength);
    }
    receive.batch = *batch;
    receive.buffer.reset(new std::byte[length]);
    verdict.dst = {receive.buffer.get(), length};
    ++f->batches;
  }
  lane.receiving += length;
  f->under_way += length;
  Heard(*f, /*moved=*/true);
  receives_.emplace(next_receive_++, std::move(receive));
  return verdict;
}

void FetchClient::On(ClientBulkDone& e) {
  auto it = receives_.find(e.receive);
  if (it == receives_.end()) return;  // given up: what it writes to is in quarantine
  Receive& receive = it->second;
  if (auto lane = lanes_.find(receive.lane); lane != lanes_.end()) lane->second.receiving -= receive.bytes;
  if (receive.range.codec != kRawCodec && StartDecoding(receive, e.status)) {
    out_.push_back(ClientDecode{e.receive,
                                {receive.buffer.get(), receive.bytes},
                                fetches_.at(receive.handle)->spec.slots[receive.range.index].data()});
    return;
  }
  Ended(e.receive, e.status);
}

void FetchClient::On(ClientDecoded& e) { Ended(e.receive, e.status); }

// `bytes`: all that landed. What the transport let the digest take on the way was in its final place then.
bool FetchClient::Undamaged(const Receive& receive, std::span<const std::byte> bytes) {
  receive.digest->Update(bytes.subspan(receive.digest->size()));
  return receive.digest->Finish() == receive.range.checksum;
}

// A payload came whole and is still wanted: until it is decoded its slot counts as being written to.
bool FetchClient::StartDecoding(Receive& receive, const absl::Status& status) {
  auto it = fetches_.find(receive.handle);
  if (!status.ok() || it == fetches_.end()) return false;
  Fetch& f = *it->second;
  if (f.phase != Phase::kAsked || f.try_number != receive.try_number ||
      !Undamaged(receive, {receive.buffer.get(), receive.bytes})) {
    return false;
  }
  receive.decoding = true;
  --f.receiving, ++f.decoding;
  return true;
}

// Nothing writes for the receive any more.
void FetchClient::Ended(uint64_t id, const absl::Status& status) {
  auto it = receives_.find(id);
  if (it == receives_.end()) return;  // given up: what it writes to is in quarantine
  const Receive receive = std::move(it->second);
  receives_.erase(it);
  auto fetch = fetches_.find(receive.handle);
  if (fetch == fetches_.end()) return;  // of a batch only: its buffer goes now
  Fetch& f = *fetch->second;
  const bool batch = receive.batch.has_value();
  if (!batch) --(receive.decoding ? f.decoding : f.receiving);
  if (f.try_number == receive.try_number) {
    if (batch) --f.batches;
    f.under_way -= receive.bytes;
  }
  if (f.phase == Phase::kEnding) {
    if (!batch && !Written(f)) Finish(f);
    return;
  }
  if (f.phase == Phase::kBackoff) return Arm(now_);
  if (f.phase != Phase::kAsked || f.try_number != receive.try_number) return;
  const bool counts = batch ? TakeBatch(f, receive, status) : TakeRange(f, receive, status);
  if (!counts) return;
  // The fetch may be at its end: credits for what else is on its lane are due all the same.
  f.received += receive.bytes;
  Lane& lane = lanes_.at(receive.lane);
  lane.uncredited += receive.bytes;
  lane.window->OnArrived(receive.bytes, now_);
  Heard(f, /*moved=*/true);
  ArmStraggler(f, /*moved=*/true);
  CheckComplete(f);
  if (auto left = lanes_.find(receive.lane); left != lanes_.end()) SendCredits(left->second);
}

// False: nothing of it counts (the fetch may have ended).
bool FetchClient::TakeRange(Fetch& f, const Receive& receive, const absl::Status& status) {
  if (!status.ok() && !receive.decoding) {
    Restart(f, status);
    return false;
  }
  // A payload was verified before it was decoded; one that is not being decoded did not pass.
  const bool good = receive.range.codec != kRawCodec ? receive.decoding && status.ok()
                                                     : Undamaged(receive, BytesOf(f, receive.range));
  if (!good) {
    const std::string why = status.ok() ? "" : absl::StrCat(": ", status.message());
    Fail(f, absl::DataLossError("a block arrived damaged" + why), FetchReason::kChecksum);
    return false;
  }
  Arrived(f, receive.range);
  return true;
}

bool FetchClient::TakeBatch(Fetch& f, const Receive& receive, const absl::Status& status) {
  if (!status.ok()) {
    Restart(f, status);
    return false;
  }
  const std::span<const std::byte> bytes(receive.buffer.get(), receive.bytes);
  const auto ranges = DecodeDirectory(*receive.batch, bytes);
  if (!ranges.ok()) {
    Fail(f, ranges.status(), FetchReason::kChecksum);
    return false;
  }
  size_t at = ranges->size() * kRangeBytes;
  bool any = false;
  for (const DataRange& range : *ranges) {
    const std::span<const std::byte> from = bytes.subspan(at, range.length);
    at += range.length;
    auto reason = Misfit(f, range);
    if (range.codec != kRawCodec) reason = FetchReason::kMalformed;  // payloads travel by themselves
    if (reason.has_value()) {
      Count(*reason);
      continue;
    }
    // A slot is nobody's but the fetch's until all of it is verified: damage may reach it, in one pass.
    PayloadDigest digest(range.length);
    digest.Copy(BytesOf(f, range).data(), from, /*stream=*/false);
    if (digest.Finish() != range.checksum) {
      Fail(f, absl::DataLossError("a block arrived damaged"), FetchReason::kChecksum);
      return false;
    }
    Insert(f, range);
    Arrived(f, range);
    any = true;
  }
  return any;
}

void FetchClient::Arrived(Fetch& f, const DataRange& range) {
  Block& block = f.blocks[range.index];
  block.layers += range.layer_end - range.layer_begin;
  if (block.layers == options_.layout.layers && f.commit.has_value()) {
    f.incomplete -= f.commit->items[range.index].present;
  }
}

void FetchClient::CheckComplete(Fetch& f) {
  if (!f.commit.has_value() || f.incomplete > 0) return;
  const CommitFrame& commit = *f.commit;
  uint32_t blocks = 0;
  bool equal = true;
  for (size_t i = 0; i < f.blocks.size() && equal; ++i) {
    if (!commit.items[i].present) continue;
    ++blocks;
    equal = BlockSum(f.blocks[i].ranges) == commit.items[i].sum;
  }
  equal = equal && blocks == commit.blocks && commit.bytes == blocks * options_.layout.block_bytes() &&
          commit.digest == ManifestDigest(f.items, commit.items);
  if (!equal) {
    return Fail(f, absl::DataLossError("what arrived is not what the manifest says"), FetchReason::kChecksum);
  }
  // A block that arrived though the manifest knows nothing of it is still being written: not done yet.
  if (Written(f)) return;
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
  ForgetTry(f);
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
  if (!Written(f)) return Finish(f);
  // Nothing more of it is placed.
  if (f.receiving == 0) return;
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
  if (auto lane = lanes_.find(f.lane); lane != lanes_.end()) {
    lane->second.uncredited -= f.received - f.credited;
  }
  auto it = by_id_.find(IdKey(f.spec.request_id, f.spec.attempt, f.spec.part));
  if (it != by_id_.end() && it->second == f.handle) by_id_.erase(it);
  const uint64_t handle = f.handle;
  fetches_.erase(handle);
  out_.push_back(ClientFinish{handle, std::move(result)});
}

bool FetchClient::HasOtherLane(const Lane& lane) const {
  const auto it = lanes_of_peer_.find(PeerKey(lane.peer));
  return it != lanes_of_peer_.end() && std::any_of(it->second.begin(), it->second.end(), [&](LaneId id) {
           return id != lane.id && lanes_.at(id).state == Lane::kReady;
         });
}

void FetchClient::CloseLane(Lane& lane, const absl::Status& why, FetchReason reason, bool restart) {
  if (lane.state == Lane::kClosing) return;
  lane.state = Lane::kClosing;
  lane.close_until = now_ + options_.timings.close_grace;
  Arm(lane.close_until);
  if (auto it = lanes_of_peer_.find(PeerKey(lane.peer)); it != lanes_of_peer_.end()) {
    std::erase(it->second, lane.id);
    if (it->second.empty()) lanes_of_peer_.erase(it);
  }
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
      ForgetTry(f);
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
  absl::erase_if(receives_, [&](auto& item) {
    Receive& receive = item.second;
    if (receive.lane != lane) return false;
    if (receive.buffer != nullptr) abandoned_.push_back(std::move(receive.buffer));
    if (receive.digest != nullptr) abandoned_digests_.push_back(std::move(receive.digest));
    // Only what is decoded is written to the slot.
    if (receive.batch.has_value() || (receive.range.codec != kRawCodec && !receive.decoding)) return true;
    BlockLease& slot = fetches_.at(receive.handle)->spec.slots[receive.range.index];
    if (slot.empty()) return true;  // it went with another range of it
    Count(FetchReason::kQuarantined);
    out_.push_back(ClientQuarantine{std::move(slot)});
    return true;
  });
  std::vector<uint64_t> handles;
  for (auto& [handle, f] : fetches_) {
    if (f->lane == lane && Written(*f)) handles.push_back(handle);
  }
  for (uint64_t handle : handles) {
    Fetch& f = *fetches_.at(handle);
    f.receiving = f.decoding = 0;
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
    auto lane = lanes_.find(f.lane);
    if (f.receiving == 0 || lane == lanes_.end()) return;  // the decoder ends by itself
    return CloseLane(lane->second, absl::UnavailableError("the endpoint was closed for another fetch"),
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
    if (Written(f)) return;  // waits for the old lane, or the decoder
    if (now_ >= f.backoff_until) return Enqueue(f);
    return Arm(f.backoff_until);
  }
  if (f.phase != Phase::kAsked) return;
  const bool idle = !Written(f) && f.batches == 0;
  if (idle && now_ >= f.straggler_at) {
    return Restart(f, absl::UnavailableError("data that was sent did not arrive"));
  }
  if (idle) Arm(f.straggler_at);
  if (now_ >= f.resend_at) return f.heard ? Poll(f) : Ask(f);
  Arm(f.resend_at);
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
        FetchReason::kUnavailable, HasOtherLane(lane));
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
