#include "scheduler/cluster_view.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "base/status.h"

namespace tidepool {

namespace {

// Before the first request ended: a 256-token answer at 20 ms a token.
constexpr double kDecodeSecondsPrior = 5;
constexpr double kDecodeSecondsGain = 0.05;
// How far back a worker's share of time for prefills goes.
constexpr double kPrefillShareSeconds = 5;
// Prefills leave decodes a part of their worker's time, whatever was measured.
constexpr double kPrefillShareMax = 0.9;
constexpr size_t kReplacedBootsKept = 8;
constexpr size_t kIdBytesMax = 256;

// What a prompt of kTypicalTokens would take on an idle worker: beside decodes, chunk by chunk.
double TypicalPrefill(const Worker& w, const SchedulerOptions& options) {
  double seconds = w.latency.PrefillSeconds(ClusterView::kTypicalTokens, 0);
  if (CanDecode(w.role)) {
    seconds += static_cast<double>(ClusterView::kTypicalTokens / options.chunk_tokens) *
               w.latency.DecodeStepSeconds(w.load.running, w.load.running_context_tokens);
  }
  return seconds;
}

// Before `reported_at` moves on. Where nothing decodes, nobody asks.
void NotePrefills(Worker& w, const std::vector<PrefillSample>& prefills, absl::Time now) {
  if (w.role != Role::kBoth) {
    w.prefill_share = 0;
    return;
  }
  double seconds = 0;
  for (const PrefillSample& s : prefills) seconds += s.seconds;
  const double since = std::max(0.0, absl::ToDoubleSeconds(now - w.reported_at));
  w.prefill_share = std::min(kPrefillShareMax, w.prefill_share * std::exp(-since / kPrefillShareSeconds) +
                                                   seconds / kPrefillShareSeconds);
}

// A decode step with what is there, a share of what is on its way, and one more.
double TypicalStep(const Worker& w, uint64_t quarters) {
  const uint64_t batch = uint64_t{w.load.running} + w.load.waiting;
  const uint64_t context = w.load.running_context_tokens;
  const uint64_t coming = std::max<uint64_t>(batch, w.decoding.size()) - batch;
  const uint64_t coming_context = std::max(context, w.decoding_tokens) - context;
  return w.latency.DecodeStepSeconds(batch + 1 + coming * quarters / 4,
                                     context + ClusterView::kTypicalTokens + coming_context * quarters / 4) /
         (1 - w.prefill_share);
}

std::string Difference(std::string_view what, const std::string& theirs, const std::string& ours) {
  std::string out(what);
  out += " is '";
  out += theirs + "', the cluster's is '" + ours + "'; ";
  return out;
}

}  // namespace

std::string_view RoleName(Role role) {
  switch (role) {
    case Role::kPrefill:
      return "prefill";
    case Role::kDecode:
      return "decode";
    case Role::kBoth:
      return "both";
    case Role::kStore:
      return "store";
  }
  return "unknown";
}

std::string_view WorkerStateName(WorkerState state) {
  switch (state) {
    case WorkerState::kReady:
      return "ready";
    case WorkerState::kDraining:
      return "draining";
    case WorkerState::kLost:
      return "lost";
  }
  return "unknown";
}

std::string_view SloClassName(SloClass slo_class) {
  switch (slo_class) {
    case SloClass::kInteractive:
      return "interactive";
    case SloClass::kStandard:
      return "standard";
    case SloClass::kBatch:
      return "batch";
  }
  return "unknown";
}

ClusterView::ClusterView(const SchedulerOptions& options)
    : options_(options), prefixes_(options.max_index_entries), decode_seconds_mean_(kDecodeSecondsPrior) {}

absl::Status ClusterView::CheckReport(const WorkerReport& r) const {
  const auto bad = [](std::string_view field, std::string_view why) {
    return absl::InvalidArgumentError("report: " + std::string(field) + " " + std::string(why));
  };
  if (r.address.worker_id.empty() || r.address.worker_id.size() > kIdBytesMax)
    return bad("worker_id", "must have 1 to 256 bytes");
  if (r.address.boot_id.empty() || r.address.boot_id.size() > kIdBytesMax)
    return bad("boot_id", "must have 1 to 256 bytes");
  if (r.address.grpc.empty()) return bad("grpc", "is empty; it must be host:port");
  if (r.role != Role::kStore && !CanPrefill(r.role) && !CanDecode(r.role))
    return bad("role", "must be prefill, decode, both or store");
  if (r.seq == 0) return bad("seq", "must count from 1");
  if (r.model.layout.block_bytes() == 0) return bad("model", "has a zero dimension");
  if (r.model.max_model_len == 0) return bad("max_model_len", "must be at least 1");
  return absl::OkStatus();
}

absl::Status ClusterView::CheckModel(const WorkerReport& r) const {
  // With no live worker there is no cluster to differ from: the first to come says what is served. A store
  // serves nothing: it is held to the workers' model, or, before any has come, to that of the other stores,
  // and keeps no worker of another model out.
  const bool store = r.role == Role::kStore;
  const bool alone = std::none_of(workers_.begin(), workers_.end(), [&](const auto& w) {
    return w && w->state != WorkerState::kLost && w->address.worker_id != r.address.worker_id &&
           (w->role == Role::kStore) == (store && !model_);
  });
  const std::optional<ModelIdentity>& cluster = store && !model_ ? store_model_ : model_;
  if (!cluster || (alone && !(store && model_))) return absl::OkStatus();
  std::string what;
  const ModelIdentity &theirs = r.model, &ours = *cluster;
  if (theirs.fingerprint != ours.fingerprint)
    what += Difference("model fingerprint", theirs.fingerprint + " (" + theirs.name + ")",
                       ours.fingerprint + " (" + ours.name + ")");
  if (theirs.layout.block_tokens != ours.layout.block_tokens)
    what += Difference("kv.block_tokens", std::to_string(theirs.layout.block_tokens),
                       std::to_string(ours.layout.block_tokens));
  if (!(theirs.layout == ours.layout))
    what += Difference("KV block layout", theirs.layout.ToString(), ours.layout.ToString());
  if (theirs.kv_codec != ours.kv_codec)
    what += Difference("kv.codec", theirs.kv_codec.empty() ? "none" : theirs.kv_codec,
                       ours.kv_codec.empty() ? "none" : ours.kv_codec);
  if (theirs.max_model_len != ours.max_model_len)
    what += Difference("model.max_model_len", std::to_string(theirs.max_model_len),
                       std::to_string(ours.max_model_len));
  if (theirs.vocab_size != ours.vocab_size)
    what += Difference("vocabulary size", std::to_string(theirs.vocab_size), std::to_string(ours.vocab_size));
  if (what.empty()) return absl::OkStatus();
  what.resize(what.size() - 2);
  return absl::FailedPreconditionError("worker " + r.address.worker_id + " cannot join: " + what +
                                       ". Start it with the cluster's model");
}

absl::StatusOr<WorkerIndex> ClusterView::Register(const WorkerReport& r) {
  if (const auto it = index_of_.find(r.address.worker_id); it != index_of_.end()) {
    Worker& w = *workers_[it->second];
    if (w.address.boot_id != r.address.boot_id) {
      // A restart: nothing of the old process is there any more. Only its speed still tells something.
      w.replaced_boots.push_back(w.address.boot_id);
      if (w.replaced_boots.size() > kReplacedBootsKept) w.replaced_boots.erase(w.replaced_boots.begin());
    }
    Lose(it->second);
    w.seq = 0;
    w.load = {};
    w.prefill_share = 0;
    return it->second;
  }
  if (index_of_.size() >= options_.max_workers)
    return absl::ResourceExhaustedError("worker " + r.address.worker_id + " cannot join: there are " +
                                        std::to_string(options_.max_workers) + " workers already");
  const auto slot = std::find(workers_.begin(), workers_.end(), nullptr);
  const auto i = static_cast<WorkerIndex>(slot - workers_.begin());
  if (slot == workers_.end()) workers_.emplace_back();
  workers_[i] = std::make_unique<Worker>();
  if (i >= order_.size()) order_.resize(i + 1);
  Name(i, r.address.worker_id);
  return i;
}

// Names are numbers between those of their neighbours, so that comparing two workers' ids costs nothing.
// Where there is no number left between two, all get new ones, far apart.
void ClusterView::Name(WorkerIndex i, const std::string& worker_id) {
  constexpr uint64_t kApart = uint64_t{1} << 40;
  const auto it = index_of_.emplace(worker_id, i).first;
  const auto next = std::next(it);
  const uint64_t below = it == index_of_.begin() ? 0 : workers_[std::prev(it)->second]->name;
  const uint64_t above = next == index_of_.end() ? below + 2 * kApart : workers_[next->second]->name;
  if (above - below >= 2) {
    workers_[i]->name = below + (above - below) / 2;
    return;
  }
  uint64_t name = 0;
  for (const auto& [id, worker] : index_of_) workers_[worker]->name = name += kApart;
  for (const auto& [id, worker] : index_of_) Rank(worker);
}

ReportResult ClusterView::Report(WorkerReport r, absl::Time now) {
  ReportResult out;
  out.status = CheckReport(r);
  if (out.status.ok()) out.status = CheckModel(r);
  if (!out.status.ok()) return out;

  const auto known = index_of_.find(r.address.worker_id);
  WorkerIndex i = 0;
  if (known == index_of_.end() || workers_[known->second]->address.boot_id != r.address.boot_id ||
      workers_[known->second]->state == WorkerState::kLost) {
    if (known != index_of_.end()) {
      const auto& old = workers_[known->second]->replaced_boots;
      if (std::find(old.begin(), old.end(), r.address.boot_id) != old.end()) {
        out.status = absl::FailedPreconditionError(
            "worker " + r.address.worker_id +
            ": a newer process has registered under this id; give each worker its own worker.id");
        return out;
      }
    }
    auto registered = Register(r);
    if (!registered.ok()) {
      out.status = registered.status();
      return out;
    }
    i = *registered;
    out.registered = true;
    (r.role == Role::kStore ? store_model_ : model_) = r.model;
  } else {
    i = known->second;
  }

  Worker& w = *workers_[i];
  if (!out.registered && r.seq <= w.seq) {
    // A repeat, or overtaken on the way: what it says is old.
    out.resync = w.needs_snapshot;
    return out;
  }
  if (out.registered || r.seq != w.seq + 1) w.needs_snapshot = true;
  if (r.snapshot) {
    prefixes_.Clear(i);
    w.needs_snapshot = false;
  }
  for (const BlockEvent& e : r.events)
    e.removed ? prefixes_.Remove(e.key, i, e.tier) : prefixes_.Add(e.key, i, e.tier);
  if (r.address.grpc != w.address.grpc || r.address.boot_id != w.address.boot_id ||
      r.address.transport != w.address.transport || r.address.arena != w.address.arena || out.registered) {
    w.address = std::move(r.address);
  }
  w.role = r.role;
  w.next_role = r.next_role;
  w.state = r.draining ? WorkerState::kDraining : WorkerState::kReady;
  w.seq = r.seq;
  // Not those that it measured to know its speed when it started.
  if (!out.registered) NotePrefills(w, r.prefills, now);
  w.reported_at = now;
  w.load = r.load;
  w.load.slots_free = std::min(w.load.slots_free, w.load.slots_total);
  w.tiers = std::move(r.tiers);
  for (const auto& s : r.prefills) w.latency.Observe(s);
  for (const auto& s : r.decodes) w.latency.Observe(s);
  for (const auto& s : r.fetches) {
    w.latency.Observe(s);
    all_latency_.Observe(s);
  }
  for (const std::string& id : r.prefilled) {
    const auto it = booking_of_.find(id);
    if (it == booking_of_.end()) continue;
    Slot& slot = bookings_[it->second];
    Booking& b = slot.booking;
    if ((b.prefill != i && b.decode != i) || b.decode_began_at) continue;
    b.decode_began_at = now;
    LeavePrefill(slot);
    LeaveReported(slot);
    LeaveHolder(slot);
  }
  for (const std::string& id : r.ended) {
    const auto it = booking_of_.find(id);
    if (it == booking_of_.end() || bookings_[it->second].booking.decode != i) continue;
    ending_.push_back({it->second, bookings_[it->second].serial, now});
  }
  Settle(i);
  Rank(i);
  out.resync = w.needs_snapshot;
  return out;
}

std::vector<std::string> ClusterView::Tick(absl::Time now) {
  std::vector<std::string> lost;
  for (WorkerIndex i = 0; i < workers_.size(); ++i) {
    if (!workers_[i]) continue;
    const Worker& w = *workers_[i];
    if (w.state != WorkerState::kLost && now - w.reported_at > options_.worker_timeout) {
      lost.push_back(w.address.worker_id);
      Lose(i);
    } else if (w.state == WorkerState::kLost && now - w.reported_at > options_.forget_lost_after) {
      index_of_.erase(w.address.worker_id);  // its orders forgot it when it was lost
      workers_[i].reset();
    }
  }
  // Oldest first, so the first that is young enough ends the search.
  while (oldest_ != kNone && now - bookings_[oldest_].booking.placed_at > options_.booking_expiry) {
    ended_.push_back(bookings_[oldest_].booking);
    EraseBooking(oldest_);
  }
  while (!ending_.empty() && now - ending_.front().at > options_.ended_expiry) {
    const Ending e = ending_.front();
    ending_.pop_front();
    // Mostly its gateway has said Finish, and the slot is another's by now.
    if (bookings_[e.slot].serial != e.serial) continue;
    ended_.push_back(bookings_[e.slot].booking);
    EraseBooking(e.slot);
  }
  return lost;
}

void ClusterView::Lose(WorkerIndex i) {
  workers_[i]->state = WorkerState::kLost;
  workers_[i]->needs_snapshot = true;
  prefixes_.Clear(i);
  DropBookingsOf(i);
  workers_[i]->demand = {};
  workers_[i]->unreported.clear();
  Rank(i);
}

void ClusterView::DropBookingsOf(WorkerIndex worker) {
  for (BookingSlot at = oldest_; at != kNone;) {
    Slot& slot = bookings_[at];
    Booking& b = slot.booking;
    const BookingSlot next = slot.newer;
    if (b.holder == worker) {
      LeaveHolder(slot);
      b.holder.reset();
    }
    // A decoding request has left its prefill worker behind.
    if (b.decode == worker || (b.prefill == worker && !b.decode_began_at)) {
      ended_.push_back(b);
      EraseBooking(at);
    } else if (b.prefill == worker) {
      b.prefill = b.decode;  // its index may be given to another worker later
    }
    at = next;
  }
}

void ClusterView::Book(Booking booking) {
  if (const auto it = booking_of_.find(booking.request_id); it != booking_of_.end()) EraseBooking(it->second);
  BookingSlot at;
  if (free_.empty()) {
    at = static_cast<BookingSlot>(bookings_.size());
    bookings_.emplace_back();
  } else {
    at = free_.back();
    free_.pop_back();
  }
  booking_of_.emplace(booking.request_id, at);
  Slot& slot = bookings_[at];
  slot.booking = std::move(booking);
  slot.serial = next_serial_++;
  slot.older = newest_;
  slot.newer = kNone;
  (newest_ == kNone ? oldest_ : bookings_[newest_].newer) = at;
  newest_ = at;

  const Booking& b = slot.booking;
  Worker& decode = *workers_[b.decode];
  Worker& prefill = *workers_[b.prefill];
  slot.at = static_cast<uint32_t>(decode.decoding.size());
  decode.decoding.push_back(at);
  decode.decoding_tokens += b.prompt_tokens;
  // A report that was made after the request reached its worker shows it already.
  const auto reported = [&](const Worker& w) { return b.placed_at + options_.settle <= w.reported_at; };
  slot.in_decode = !reported(decode);
  if (slot.in_decode) {
    decode.demand.blocks += b.decode_blocks;
    ++decode.demand.requests;
  }
  slot.in_prefill = !reported(prefill);
  if (slot.in_prefill) {
    prefill.demand.prefill_ns += absl::ToInt64Nanoseconds(absl::Seconds(b.prefill_seconds));
    prefill.demand.prefill_tokens += b.uncached_tokens;
    if (!b.local()) {
      prefill.demand.blocks += b.prefill_blocks;
      ++prefill.demand.requests;
    }
  }
  if (!slot.in_prefill) EnterReported(slot);
  slot.in_holder = b.holder.has_value();
  if (slot.in_holder) ++workers_[*b.holder]->demand.outgoing_fetches;
  const auto wait_for_report = [&](Worker& w) {
    while (!w.unreported.empty() &&
           bookings_[w.unreported.front().first].serial != w.unreported.front().second)
      w.unreported.pop_front();
    w.unreported.emplace_back(at, slot.serial);
  };
  if (slot.in_decode || (slot.in_prefill && b.local())) wait_for_report(decode);
  if (slot.in_prefill && !b.local()) wait_for_report(prefill);
  Rank(b.decode);
  if (!b.local()) Rank(b.prefill);
}

void ClusterView::LeavePrefill(Slot& slot) {
  if (!std::exchange(slot.in_prefill, false)) return;
  const Booking& b = slot.booking;
  Demand& demand = workers_[b.prefill]->demand;
  demand.prefill_ns -= absl::ToInt64Nanoseconds(absl::Seconds(b.prefill_seconds));
  demand.prefill_tokens -= b.uncached_tokens;
  if (!b.local()) {
    demand.blocks -= b.prefill_blocks;
    --demand.requests;
  }
  Rank(b.prefill);
}

void ClusterView::EnterReported(Slot& slot) {
  if (std::exchange(slot.in_reported, true)) return;
  const Booking& b = slot.booking;
  Demand& demand = workers_[b.prefill]->demand;
  demand.reported_ns += absl::ToInt64Nanoseconds(absl::Seconds(b.prefill_seconds));
  demand.reported_tokens += b.uncached_tokens;
}

void ClusterView::LeaveReported(Slot& slot) {
  if (!std::exchange(slot.in_reported, false)) return;
  const Booking& b = slot.booking;
  Demand& demand = workers_[b.prefill]->demand;
  demand.reported_ns -= absl::ToInt64Nanoseconds(absl::Seconds(b.prefill_seconds));
  demand.reported_tokens -= b.uncached_tokens;
}

void ClusterView::LeaveDecode(Slot& slot) {
  if (!std::exchange(slot.in_decode, false)) return;
  Demand& demand = workers_[slot.booking.decode]->demand;
  demand.blocks -= slot.booking.decode_blocks;
  --demand.requests;
}

void ClusterView::LeaveHolder(Slot& slot) {
  if (std::exchange(slot.in_holder, false)) --workers_[*slot.booking.holder]->demand.outgoing_fetches;
}

void ClusterView::Settle(WorkerIndex worker) {
  Worker& w = *workers_[worker];
  while (!w.unreported.empty()) {
    const auto [at, serial] = w.unreported.front();
    Slot& slot = bookings_[at];
    if (slot.serial == serial) {
      if (slot.booking.placed_at + options_.settle > w.reported_at) return;
      if (slot.booking.prefill == worker && slot.in_prefill) {
        LeavePrefill(slot);
        EnterReported(slot);
      }
      if (slot.booking.decode == worker) LeaveDecode(slot);
    }
    w.unreported.pop_front();
  }
}

const Booking* ClusterView::FindBooking(const std::string& request_id) const {
  const auto it = booking_of_.find(request_id);
  return it == booking_of_.end() ? nullptr : &bookings_[it->second].booking;
}

std::optional<Booking> ClusterView::Finish(const std::string& request_id, absl::Time now) {
  const auto it = booking_of_.find(request_id);
  if (it == booking_of_.end()) return std::nullopt;
  Booking b = bookings_[it->second].booking;
  if (b.decode_began_at) {
    const double took = absl::ToDoubleSeconds(now - *b.decode_began_at);
    decode_seconds_mean_ += kDecodeSecondsGain * (took - decode_seconds_mean_);
  }
  EraseBooking(it->second);
  return b;
}

void ClusterView::EraseBooking(BookingSlot at) {
  Slot& slot = bookings_[at];
  LeavePrefill(slot);
  LeaveReported(slot);
  LeaveDecode(slot);
  LeaveHolder(slot);
  const WorkerIndex decode = slot.booking.decode;
  Worker& w = *workers_[decode];
  bookings_[w.decoding.back()].at = slot.at;
  w.decoding[slot.at] = w.decoding.back();
  w.decoding.pop_back();
  w.decoding_tokens -= slot.booking.prompt_tokens;
  (slot.older == kNone ? oldest_ : bookings_[slot.older].newer) = slot.newer;
  (slot.newer == kNone ? newest_ : bookings_[slot.newer].older) = slot.older;
  booking_of_.erase(slot.booking.request_id);
  slot.booking = {};
  slot.serial = 0;
  free_.push_back(at);
  Rank(decode);
}

double ClusterView::ReportedQueueSeconds(const Worker& w) const {
  const uint64_t tokens = w.load.queued_prefill_tokens;
  double seconds = 0;
  if (tokens > 0 && w.demand.reported_tokens > 0) {
    // What a token of these very prompts costs. (Equal shares of the tokens would forget that attention grows
    // with the square of a prompt: a tenth of a long queue.)
    seconds = static_cast<double>(tokens) * 1e-9 * static_cast<double>(w.demand.reported_ns) /
              static_cast<double>(w.demand.reported_tokens);
  } else {
    seconds = w.latency.QueueSeconds(tokens, w.load.waiting);
  }
  // The tokens of the step at hand are not queued any more: half of one is left on average, and half of that
  // where it was the last.
  if (!CanDecode(w.role) && w.load.running > 0)
    seconds += w.latency.PrefillSeconds(options_.chunk_tokens, 0) / (tokens > 0 ? 2 : 4);
  return seconds;
}

double ClusterView::QueueSeconds(const Worker& w, absl::Time now) const {
  // The reported queue has been worked on since it was reported.
  const double reported = ReportedQueueSeconds(w);
  const double since = absl::ToDoubleSeconds(now - w.reported_at);
  return std::max(0.0, reported - std::max(0.0, since)) + static_cast<double>(w.demand.prefill_ns) * 1e-9;
}

void ClusterView::Rank(WorkerIndex i) {
  const Worker& w = *workers_[i];
  Order& order = order_[i];
  order = {.then = std::numeric_limits<double>::infinity(),
           .decode = std::numeric_limits<double>::infinity(),
           .free = w.free_blocks()};
  RankTree::Key idle, busy, roomy_prefill, quick, quick_half, quick_now, roomy_decode;
  const uint64_t load = w.requests();
  const double used = -static_cast<double>(order.free);
  if (w.ready() && CanPrefill(w.role)) {
    order.begins = absl::ToDoubleSeconds(w.reported_at - absl::UnixEpoch()) + ReportedQueueSeconds(w);
    order.then = static_cast<double>(w.demand.prefill_ns) * 1e-9 + TypicalPrefill(w, options_);
    const bool queued = w.load.queued_prefill_tokens > 0 || w.demand.prefill_ns > 0;
    (queued ? busy : idle) = {queued ? order.begins + order.then : order.then, load, w.name};
    roomy_prefill = {used, load, w.name};
  }
  if (w.ready() && CanDecode(w.role)) {
    order.decode = TypicalStep(w, 4);
    quick = {order.decode, load, w.name};
    quick_half = {TypicalStep(w, 2), load, w.name};
    quick_now = {TypicalStep(w, 0), load, w.name};
    roomy_decode = {used, load, w.name};
  }
  idle_prefill_.Set(i, idle);
  busy_prefill_.Set(i, busy);
  roomy_prefill_.Set(i, roomy_prefill);
  quick_decode_.Set(i, quick);
  quick_half_decode_.Set(i, quick_half);
  quick_now_decode_.Set(i, quick_now);
  roomy_decode_.Set(i, roomy_decode);
}

std::vector<WorkerView> ClusterView::Workers(absl::Time now) const {
  std::vector<WorkerView> out;
  for (WorkerIndex i = 0; i < workers_.size(); ++i) {
    if (!workers_[i]) continue;
    const Worker& w = *workers_[i];
    out.push_back({.address = w.address,
                   .role = w.role,
                   .next_role = w.state == WorkerState::kLost ? std::nullopt : w.next_role,
                   .state = w.state,
                   .load = w.load,
                   .tiers = w.tiers,
                   .indexed_blocks = prefixes_.blocks(i),
                   .since_report = now - w.reported_at,
                   .prefill_error = w.latency.prefill_error(),
                   .decode_error = w.latency.decode_error(),
                   .fetch_error = w.latency.fetch_error()});
  }
  std::sort(out.begin(), out.end(), [](const WorkerView& a, const WorkerView& b) {
    return a.address.worker_id < b.address.worker_id;
  });
  return out;
}

}  // namespace tidepool
