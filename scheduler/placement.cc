#include "scheduler/placement.h"

#include <algorithm>
#include <string>
#include <tuple>
#include <utility>

namespace tidepool {

namespace {

// A small prompt's estimates differ by noise: it stays on its decode worker unless a remote prefill promises
// to be this many times faster.
constexpr double kLocalPreference = 2;

// What the bookings say that a worker's last report does not.
struct Demand {
  double prefill_seconds = 0;
  uint64_t blocks = 0;
  uint32_t outgoing_fetches = 0;
  uint64_t requests = 0;
  std::vector<const Booking*> decoding;  // bookings whose decode worker this is, told or not
};

class Evaluator {
 public:
  Evaluator(const ClusterView& view, const SchedulerOptions& options, const PlaceRequest& request,
            absl::Time now)
      : view_(view),
        options_(options),
        request_(request),
        layout_(view.model()->layout),
        now_(now),
        output_tokens_(std::clamp(request.max_tokens, 1u, options.expected_output_tokens)),
        ttft_slo_(absl::ToDoubleSeconds(EffectiveTtftSlo(options, request))),
        itl_slo_(absl::ToDoubleSeconds(EffectiveItlSlo(options, request))) {}

  Evaluation Run() {
    SumDemand();
    view_.prefixes().Match(request_.keys, view_.size(), held_, runs_);
    FindHolders();

    Evaluation out;
    for (WorkerIndex i = 0; i < view_.size(); ++i) {
      if (Usable(i) && CanPrefill(view_.worker(i)->role) && Fits(i, prompt_blocks()))
        out.prefills.push_back(Prefill(i));
    }
    const PrefillOption* best_prefill = nullptr;
    for (const PrefillOption& p : out.prefills)
      if (best_prefill == nullptr || PrefillRank(p) < PrefillRank(*best_prefill)) best_prefill = &p;

    std::optional<Plan> remote, local, small;
    bool any_decode = false;
    for (WorkerIndex i = 0; i < view_.size(); ++i) {
      if (!Usable(i) || !CanDecode(view_.worker(i)->role)) continue;
      any_decode = true;
      if (!Fits(i, Blocks(request_.prompt_tokens + 1))) continue;
      const bool is_small = Uncached(i) <= options_.local_prefill_tokens;
      if (is_small || view_.worker(i)->role == Role::kBoth || out.prefills.empty()) {
        Plan plan = Finish(Prefill(i), i);
        out.locals.push_back(plan);
        Keep(local, plan);
        if (is_small) Keep(small, plan);
      }
      if (best_prefill == nullptr || best_prefill->worker == i) continue;
      Plan plan = Finish(*best_prefill, i);
      out.decodes.push_back(plan.decode);
      Keep(remote, plan);
    }
    if (!remote && !local) {
      out.status = WhyNone(any_decode);
      return out;
    }
    if (small && (!remote || (std::tuple(small->full, small->violations) <=
                                  std::tuple(remote->full, remote->violations) &&
                              small->ttft_seconds() <= kLocalPreference * remote->ttft_seconds()))) {
      out.best = small;
    } else {
      out.best = remote;
      if (local) Keep(out.best, *local);
    }
    return out;
  }

 private:
  std::string_view Id(WorkerIndex i) const { return view_.worker(i)->address.worker_id; }
  std::tuple<bool, double, uint64_t, std::string_view> PrefillRank(const PrefillOption& p) const {
    return std::tuple(!p.room, p.total_seconds(), p.load, Id(p.worker));
  }
  auto PlanRank(const Plan& p) const {
    return std::tuple(p.full, p.violations, p.cost_seconds, p.decode.load, p.prefill.load,
                      Id(p.decode.worker), Id(p.prefill.worker));
  }
  void Keep(std::optional<Plan>& best, const Plan& plan) const {
    if (!best || PlanRank(plan) < PlanRank(*best)) best = plan;
  }
  // Of those that hold `blocks` of the prefix.
  auto HolderRank(WorkerIndex i, uint32_t blocks) const {
    return std::tuple(ReusableMax() - blocks, demand_[i].outgoing_fetches, demand_[i].requests,
                      std::string_view(view_.worker(i)->address.worker_id));
  }

  uint32_t Blocks(uint64_t tokens) const {
    return static_cast<uint32_t>((tokens + layout_.block_tokens - 1) / layout_.block_tokens);
  }
  uint32_t prompt_blocks() const { return Blocks(request_.prompt_tokens); }
  // The last token is always computed (it gives the logits), so its block is never taken from a cache.
  uint32_t ReusableMax() const { return (request_.prompt_tokens - 1) / layout_.block_tokens; }
  uint32_t Held(WorkerIndex i) const { return std::min(held_[i].blocks, ReusableMax()); }
  uint32_t Near(WorkerIndex i) const { return std::min(held_[i].near_blocks, ReusableMax()); }
  // What holder h has of the blocks from `from` on: [from, near_blocks) in its host tier, [from, blocks) in
  // all.
  HeldPrefix HeldFrom(WorkerIndex h, uint32_t from) const {
    const HeldRun& run = runs_[h];
    if (held_[h].blocks > from || from < run.begin || from >= run.end)
      return {.blocks = Held(h), .near_blocks = Near(h)};
    return {.blocks = std::min(run.end, ReusableMax()), .near_blocks = std::min(run.near_end, ReusableMax())};
  }
  uint32_t Uncached(WorkerIndex i) const { return request_.prompt_tokens - Held(i) * layout_.block_tokens; }

  bool Excluded(WorkerIndex i) const {
    const auto& ex = request_.exclude_workers;
    return std::find(ex.begin(), ex.end(), view_.worker(i)->address.worker_id) != ex.end();
  }
  bool Usable(WorkerIndex i) const {
    const Worker* w = view_.worker(i);
    return w != nullptr && w->ready() && !Excluded(i);
  }
  bool Fits(WorkerIndex i, uint32_t blocks) const { return view_.worker(i)->load.slots_total >= blocks; }
  uint64_t FreeBlocks(WorkerIndex i) const {
    const uint64_t free = view_.worker(i)->load.slots_free;
    return free - std::min(free, demand_[i].blocks);
  }
  // Whether the last report of worker i was made after the booked request reached it.
  bool Reported(const Booking& b, WorkerIndex i) const {
    return b.placed_at + options_.settle <= view_.worker(i)->reported_at;
  }

  void SumDemand() {
    demand_.resize(view_.size());
    for (WorkerIndex i = 0; i < view_.size(); ++i)
      if (const Worker* w = view_.worker(i)) demand_[i].requests = w->load.running + w->load.waiting;
    for (const auto& [id, b] : view_.bookings()) {
      demand_[b.decode].decoding.push_back(&b);
      if (!Reported(b, b.decode)) {
        demand_[b.decode].blocks += b.decode_blocks;
        ++demand_[b.decode].requests;
      }
      if (b.decode_began_at) continue;
      if (b.holder) ++demand_[*b.holder].outgoing_fetches;
      if (Reported(b, b.prefill)) continue;
      demand_[b.prefill].prefill_seconds += b.prefill_seconds;
      if (b.local()) continue;
      demand_[b.prefill].blocks += b.prefill_blocks;
      ++demand_[b.prefill].requests;
    }
  }

  // The worker with the longest prefix, and the one with the longest in its host tier; of several, the one
  // that feeds the fewest. A draining worker still serves fetches, and a store does nothing else.
  void FindHolders() {
    std::optional<WorkerIndex> near, any;
    for (WorkerIndex i = 0; i < view_.size(); ++i) {
      if (view_.worker(i) == nullptr || held_[i].blocks == 0 || Excluded(i)) continue;
      if (Near(i) > 0 && (!near || HolderRank(i, Near(i)) < HolderRank(*near, Near(*near)))) near = i;
      if (!any || HolderRank(i, Held(i)) < HolderRank(*any, Held(*any))) any = i;
    }
    if (near) holders_.push_back(*near);
    if (any && any != near && (!near || Held(*any) > Near(*near))) holders_.push_back(*any);
    // And who goes on where others end.
    std::optional<WorkerIndex> beyond;
    const auto end = [&](WorkerIndex i) { return std::min(runs_[i].end, ReusableMax()); };
    for (WorkerIndex i = 0; i < view_.size(); ++i) {
      if (view_.worker(i) == nullptr || end(i) == 0 || Excluded(i)) continue;
      if (!beyond || HolderRank(i, end(i)) < HolderRank(*beyond, end(*beyond))) beyond = i;
    }
    if (beyond && std::find(holders_.begin(), holders_.end(), *beyond) == holders_.end())
      holders_.push_back(*beyond);
  }
  double ComputeSeconds(WorkerIndex i, uint32_t cached_blocks) const {
    const Worker& w = *view_.worker(i);
    const uint64_t cached = uint64_t{cached_blocks} * layout_.block_tokens;
    const uint64_t fresh = request_.prompt_tokens - cached;
    double seconds = w.latency.PrefillSeconds(fresh, cached);
    // Beside decodes, a prefill gets chunk_tokens of each step.
    if (CanDecode(w.role)) {
      const double steps = static_cast<double>((fresh + options_.chunk_tokens - 1) / options_.chunk_tokens);
      seconds += steps * w.latency.DecodeStepSeconds(w.load.running, w.load.running_context_tokens);
    }
    return seconds;
  }

  PrefillOption Prefill(WorkerIndex i) const {
    const Worker& w = *view_.worker(i);
    PrefillOption p{.worker = i, .near_blocks = Near(i), .held_blocks = Near(i), .cached_blocks = Near(i)};
    p.load = demand_[i].requests;
    p.blocks_needed = prompt_blocks();
    p.room = FreeBlocks(i) >= p.blocks_needed;
    // The reported queue has been worked on since it was reported.
    const double reported = w.latency.QueueSeconds(w.load.queued_prefill_tokens, w.load.waiting);
    const double since = absl::ToDoubleSeconds(now_ - w.reported_at);
    p.queue_seconds = std::max(0.0, reported - std::max(0.0, since)) + demand_[i].prefill_seconds;
    p.compute_seconds = ComputeSeconds(i, p.held_blocks);

    PrefillOption best = p;
    const auto consider = [&](PrefillOption option) {
      option.compute_seconds = ComputeSeconds(i, option.cached_blocks);
      if (option.service_seconds() < best.service_seconds()) best = option;
    };
    ConsiderHolders(p, consider);
    if (Held(i) > p.near_blocks) {
      p.held_blocks = p.cached_blocks = Held(i);
      p.fetch_seconds = w.latency.FetchSeconds(Bytes(p.near_blocks, Held(i)), FetchFrom::kOwnDisk);
      consider(p);
      ConsiderHolders(p, consider);
    }
    return best;
  }

  uint64_t Bytes(uint32_t begin, uint32_t end) const {
    return end > begin ? uint64_t{end - begin} * layout_.block_bytes() : 0;
  }

  // `p`, and then what each holder has beyond it: of its host tier alone, and of its disk, too.
  template <typename Consider>
  void ConsiderHolders(const PrefillOption& p, const Consider& consider) const {
    const LatencyModel& latency = view_.worker(p.worker)->latency;
    for (const WorkerIndex h : holders_) {
      const auto [all, near] = HeldFrom(h, p.held_blocks);
      if (h == p.worker || all <= p.cached_blocks) continue;
      // Transfers out of one worker share its link.
      const double share = 1.0 + demand_[h].outgoing_fetches;
      PrefillOption option = p;
      option.holder = h;
      option.holder_near_blocks = std::max(near, p.held_blocks);
      option.peer_host_seconds = share * latency.FetchSeconds(Bytes(p.held_blocks, near));
      if (near > p.cached_blocks) {
        option.cached_blocks = near;
        option.fetch_seconds = p.fetch_seconds + option.peer_host_seconds;
        consider(option);
      }
      if (all > near) {
        option.cached_blocks = all;
        option.peer_disk_seconds =
            share * latency.FetchSeconds(Bytes(option.holder_near_blocks, all), FetchFrom::kPeerDisk);
        option.fetch_seconds = p.fetch_seconds + option.peer_host_seconds + option.peer_disk_seconds;
        consider(option);
      }
    }
  }

  // The batch of decode worker i at time t, this request included: how long one step takes.
  double ItlSeconds(WorkerIndex i, absl::Time t) const {
    const Worker& w = *view_.worker(i);
    int64_t batch = int64_t{w.load.running} + w.load.waiting;
    auto context = static_cast<int64_t>(w.load.running_context_tokens);
    for (const Booking* b : demand_[i].decoding) {
      const bool counted = b->decode_began_at ? *b->decode_began_at + options_.settle <= w.reported_at
                                              : b->local() && Reported(*b, i);
      const bool there =
          b->decode_began_at ? *b->decode_began_at + DecodeTime(*b, w) > t : b->prefill_ends_at <= t;
      if (counted && b->decode_began_at && !there) {
        --batch;
        context -= b->prompt_tokens;
      } else if (!counted && there) {
        ++batch;
        context += b->prompt_tokens;
      }
    }
    return w.latency.DecodeStepSeconds(
        static_cast<uint64_t>(std::max<int64_t>(batch, 0) + 1),
        static_cast<uint64_t>(std::max<int64_t>(context, 0)) + request_.prompt_tokens);
  }

  // How long a request is expected to decode: the mean of those seen, and never longer than its max_tokens
  // take at the worker's present pace.
  absl::Duration DecodeTime(const Booking& b, const Worker& w) const {
    const double pace =
        w.latency.DecodeStepSeconds(std::max(w.load.running, 1u), w.load.running_context_tokens);
    return absl::Seconds(std::min(view_.decode_seconds_mean(), pace * b.output_tokens));
  }

  // Prefill p, then decode on worker i.
  Plan Finish(const PrefillOption& p, WorkerIndex i) const {
    Plan plan;
    plan.prefill = p;
    DecodeOption& d = plan.decode;
    d.worker = i;
    d.load = demand_[i].requests;
    d.blocks_needed = Blocks(uint64_t{request_.prompt_tokens} + output_tokens_);
    d.room = FreeBlocks(i) >= d.blocks_needed;
    d.full = FreeBlocks(i) < Blocks(uint64_t{request_.prompt_tokens} + 1);
    if (p.worker != i) {
      const LatencyModel& m = view_.worker(i)->latency;
      const uint64_t blocks = prompt_blocks() - Near(i);
      d.handoff_seconds = std::max(m.FetchSeconds(layout_.block_bytes()),
                                   m.FetchSeconds(blocks * layout_.block_bytes()) - p.compute_seconds);
    }
    d.itl_seconds = ItlSeconds(i, now_ + absl::Seconds(plan.ttft_seconds()));
    plan.full = d.full || !p.room;
    plan.violations =
        (d.room ? 0 : 1) + (plan.ttft_seconds() > ttft_slo_ ? 1 : 0) + (d.itl_seconds > itl_slo_ ? 1 : 0);
    plan.cost_seconds = plan.ttft_seconds() + output_tokens_ * d.itl_seconds;
    return plan;
  }

  absl::Status WhyNone(bool any_decode) const {
    if (any_decode) {
      uint32_t largest = 0;
      for (WorkerIndex i = 0; i < view_.size(); ++i)
        if (Usable(i) && CanDecode(view_.worker(i)->role))
          largest = std::max(largest, view_.worker(i)->load.slots_total);
      return absl::InvalidArgumentError(
          "a prompt of " + std::to_string(request_.prompt_tokens) + " tokens needs " +
          std::to_string(Blocks(request_.prompt_tokens + 1)) + " KV blocks; the largest decode worker has " +
          std::to_string(largest) + ". Shorten the prompt or raise kv.host_bytes");
    }
    size_t excluded = 0, draining = 0, lost = 0;
    for (WorkerIndex i = 0; i < view_.size(); ++i) {
      const Worker* w = view_.worker(i);
      if (w == nullptr || !CanDecode(w->role)) continue;
      if (w->state == WorkerState::kLost) {
        ++lost;
      } else if (w->state == WorkerState::kDraining) {
        ++draining;
      } else {
        ++excluded;
      }
    }
    return absl::UnavailableError("no decode worker is ready (" + std::to_string(draining) + " draining, " +
                                  std::to_string(lost) + " lost, " + std::to_string(excluded) +
                                  " failed this request already)");
  }

  const ClusterView& view_;
  const SchedulerOptions& options_;
  const PlaceRequest& request_;
  const BlockLayout layout_;
  const absl::Time now_;
  const uint32_t output_tokens_;
  const double ttft_slo_;
  const double itl_slo_;
  std::vector<HeldPrefix> held_;
  std::vector<HeldRun> runs_;
  std::vector<Demand> demand_;
  std::vector<WorkerIndex> holders_;  // worth a fetch: at most two
};

}  // namespace

absl::Duration EffectiveTtftSlo(const SchedulerOptions& options, const PlaceRequest& request) {
  const absl::Duration slo = request.slo_ttft > absl::ZeroDuration() ? request.slo_ttft : options.slo_ttft;
  return slo > absl::ZeroDuration() ? slo : absl::InfiniteDuration();
}

absl::Duration EffectiveItlSlo(const SchedulerOptions& options, const PlaceRequest& request) {
  const absl::Duration slo = request.slo_itl > absl::ZeroDuration() ? request.slo_itl : options.slo_itl;
  return slo > absl::ZeroDuration() ? slo : absl::InfiniteDuration();
}

Evaluation Evaluate(const ClusterView& view, const SchedulerOptions& options, const PlaceRequest& request,
                    absl::Time now) {
  if (!view.model()) return {.status = absl::UnavailableError("no worker has registered yet")};
  return Evaluator(view, options, request, now).Run();
}

}  // namespace tidepool
