#include "scheduler/cluster_view.h"

#include <algorithm>
#include <utility>

#include "base/status.h"

namespace tidepool {

namespace {

// Before the first request ended: a 256-token answer at 20 ms a token.
constexpr double kDecodeSecondsPrior = 5;
constexpr double kDecodeSecondsGain = 0.05;
constexpr size_t kReplacedBootsKept = 8;
constexpr size_t kIdBytesMax = 256;

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
  // serves nothing: it does not keep the workers of another model out.
  const bool alone = std::none_of(workers_.begin(), workers_.end(), [&](const auto& w) {
    return w && w->state != WorkerState::kLost && w->address.worker_id != r.address.worker_id &&
           (w->role != Role::kStore || r.role == Role::kStore);
  });
  if (!model_ || alone) return absl::OkStatus();
  std::string what;
  const ModelIdentity &theirs = r.model, &ours = *model_;
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
    return it->second;
  }
  if (index_of_.size() >= options_.max_workers)
    return absl::ResourceExhaustedError("worker " + r.address.worker_id + " cannot join: there are " +
                                        std::to_string(options_.max_workers) + " workers already");
  const auto slot = std::find(workers_.begin(), workers_.end(), nullptr);
  const auto i = static_cast<WorkerIndex>(slot - workers_.begin());
  if (slot == workers_.end()) workers_.emplace_back();
  workers_[i] = std::make_unique<Worker>();
  index_of_[r.address.worker_id] = i;
  return i;
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
    model_ = r.model;
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
  w.address = std::move(r.address);
  w.role = r.role;
  w.state = r.draining ? WorkerState::kDraining : WorkerState::kReady;
  w.seq = r.seq;
  w.reported_at = now;
  w.load = r.load;
  w.load.slots_free = std::min(w.load.slots_free, w.load.slots_total);
  w.tiers = std::move(r.tiers);
  for (const auto& s : r.prefills) w.latency.Observe(s);
  for (const auto& s : r.decodes) w.latency.Observe(s);
  for (const auto& s : r.fetches) w.latency.Observe(s);
  for (const std::string& id : r.prefilled) {
    const auto it = booking_of_.find(id);
    if (it == booking_of_.end()) continue;
    Booking& b = bookings_.at(it->second);
    if ((b.prefill == i || b.decode == i) && !b.decode_began_at) b.decode_began_at = now;
  }
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
      index_of_.erase(w.address.worker_id);
      workers_[i].reset();
    }
  }
  // Oldest first, so the first that is young enough ends the search.
  while (!bookings_.empty() && now - bookings_.begin()->second.placed_at > options_.booking_expiry)
    EraseBooking(bookings_.begin()->first);
  return lost;
}

void ClusterView::Lose(WorkerIndex i) {
  workers_[i]->state = WorkerState::kLost;
  workers_[i]->needs_snapshot = true;
  prefixes_.Clear(i);
  DropBookingsOf(i);
}

void ClusterView::DropBookingsOf(WorkerIndex worker) {
  for (auto it = bookings_.begin(); it != bookings_.end();) {
    Booking& b = it->second;
    if (b.holder == worker) b.holder.reset();
    // A decoding request has left its prefill worker behind.
    const bool gone = b.decode == worker || (b.prefill == worker && !b.decode_began_at);
    if (gone) {
      booking_of_.erase(b.request_id);
      it = bookings_.erase(it);
    } else {
      // Its index may be given to another worker later.
      if (b.prefill == worker) b.prefill = b.decode;
      ++it;
    }
  }
}

void ClusterView::Book(Booking booking) {
  if (const auto it = booking_of_.find(booking.request_id); it != booking_of_.end()) EraseBooking(it->second);
  const uint64_t id = next_booking_++;
  booking_of_[booking.request_id] = id;
  bookings_.emplace(id, std::move(booking));
}

bool ClusterView::Finish(const std::string& request_id, absl::Time now) {
  const auto it = booking_of_.find(request_id);
  if (it == booking_of_.end()) return false;
  const Booking& b = bookings_.at(it->second);
  if (b.decode_began_at) {
    const double took = absl::ToDoubleSeconds(now - *b.decode_began_at);
    decode_seconds_mean_ += kDecodeSecondsGain * (took - decode_seconds_mean_);
  }
  EraseBooking(it->second);
  return true;
}

void ClusterView::EraseBooking(uint64_t id) {
  const auto it = bookings_.find(id);
  booking_of_.erase(it->second.request_id);
  bookings_.erase(it);
}

std::vector<WorkerView> ClusterView::Workers(absl::Time now) const {
  std::vector<WorkerView> out;
  for (WorkerIndex i = 0; i < workers_.size(); ++i) {
    if (!workers_[i]) continue;
    const Worker& w = *workers_[i];
    out.push_back({.address = w.address,
                   .role = w.role,
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
