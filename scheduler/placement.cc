#include "scheduler/placement.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <tuple>
#include <utility>

#include "absl/container/inlined_vector.h"
#include "scheduler/chain_probe.h"

namespace tidepool {

namespace {

// A small prompt's estimates differ by noise: it stays on its decode worker unless a remote prefill promises
// to be this many times faster.
constexpr double kLocalPreference = 2;

// How many are looked at where not all are. What that costs: PlacementRegret in tests/scheduler.
struct Breadth {
  size_t holders;     // of the longest prefix, by queue,
  size_t feeders;     // by transfers out of them,
  size_t decoders;    // and by decode step
  size_t levels;      // shorter prefixes
  size_t per_level;   // holders of each
  size_t idle, busy;  // prefill workers, whatever they hold
  size_t quick;       // decode workers, by each of their three orders
};
constexpr Breadth kNarrow = {
    .holders = 3, .feeders = 2, .decoders = 2, .levels = 2, .per_level = 1, .idle = 3, .busy = 3, .quick = 3};
constexpr Breadth kWide = {.holders = 8,
                           .feeders = 4,
                           .decoders = 8,
                           .levels = 6,
                           .per_level = 2,
                           .idle = 8,
                           .busy = 16,
                           .quick = 8};
// Holders of one block that are looked at: of a system prompt that everybody has, enough.
constexpr size_t kHoldersScanned = 128;
// So many typical requests' excess is kept free by one that asks for more than a typical one. From 5 to 20
// the goodput of the overloads in tools/simulate/README.md differs by 2%; 0 costs a quarter of it.
constexpr double kReserved = 10;
constexpr double kNever = std::numeric_limits<double>::infinity();

class Evaluator {
 public:
  Evaluator(const ClusterView& view, const SchedulerOptions& options, const PlaceRequest& request,
            const PlacementInput& input, absl::Time now)
      : view_(view),
        options_(options),
        request_(request),
        input_(input),
        layout_(view.model()->layout),
        now_(now),
        keys_(std::span(request.keys).first(std::min<size_t>(request.keys.size(), ReusableMax()))),
        output_tokens_(std::clamp(request.max_tokens, 1u, std::max(input.length.mean, 1u))),
        output_tokens_high_(std::clamp(request.max_tokens, 1u, std::max(input.length.high, 1u))),
        ttft_slo_(absl::ToDoubleSeconds(EffectiveTtftSlo(options, request))),
        itl_slo_(absl::ToDoubleSeconds(EffectiveItlSlo(options, request))) {
    if (request.slo_class == SloClass::kBatch && options.admission != AdmissionPolicy::kNone) {
      PlaceRequest standard;
      gap_queue_ = options.batch_slo_share * absl::ToDoubleSeconds(EffectiveTtftSlo(options, standard));
      gap_itl_ = options.batch_slo_share * absl::ToDoubleSeconds(EffectiveItlSlo(options, standard));
    }
  }

  Evaluation Run() {
    if (input_.all_workers || view_.size() <= options_.evaluate_all_workers ||
        !request_.exclude_workers.empty()) {
      SeatAll();
      return Compare();
    }
    ChainProbe probe(view_.prefixes(), keys_);
    Seat(probe, kNarrow);
    Evaluation out = Compare();
    if (out.best && out.best->violations > 0 && !out.best->full) {
      Seat(probe, kWide);
      out = Compare();
    }
    if (!out.best) {
      SeatAll();
      out = Compare();
    }
    return out;
  }

  Evaluation RunPolicy(PolicyState& state) {
    SeatAll();
    std::sort(seats_.begin(), seats_.end(),
              [](const Seated& a, const Seated& b) { return a.w->name < b.w->name; });
    std::vector<const Seated*> prefills, decodes;
    bool any_decode = false, apart = false;
    for (const Seated& s : seats_) {
      if (!Usable(s)) continue;
      any_decode = any_decode || CanDecode(s.w->role);
      if (CanDecode(s.w->role) && Fits(s, Blocks(request_.prompt_tokens + 1))) decodes.push_back(&s);
      if (CanPrefill(s.w->role) && Fits(s, prompt_blocks())) prefills.push_back(&s);
      apart = apart || s.w->role != Role::kBoth;
    }
    prefill_share_mean_ = PrefillShareMean();
    Evaluation out;
    if (decodes.empty()) {
      out.status = WhyNone(any_decode);
      return out;
    }
    if (!apart) prefills.clear();
    const auto seats = [&](const std::vector<const Seated*>& from) {
      std::vector<PolicySeat> to;
      to.reserve(from.size());
      for (const Seated* s : from) to.push_back(PolicySeatOf(*s));
      return to;
    };
    const auto [first, second] =
        ChooseByPolicy(options_.placement, state, seats(prefills), seats(decodes), prompt_blocks());
    const Seated* decode = decodes[second];
    const Seated* prefill = first ? prefills[*first] : decode;
    // A worker that does both keeps what it has prefilled.
    if (CanDecode(prefill->w->role) && Fits(*prefill, Blocks(request_.prompt_tokens + 1))) decode = prefill;
    out.best = Finish(PrefillBy(*prefill), *decode);
    if (out.best->local()) {
      out.locals.push_back(*out.best);
    } else {
      out.prefills.push_back(out.best->prefill);
      out.decodes.push_back(out.best->decode);
    }
    return out;
  }

 private:
  // A worker that is looked at, with what it holds of the prompt.
  struct Seated {
    WorkerIndex index;
    const Worker* w;
    HeldPrefix held;
    HeldRun run;
  };

  Evaluation Compare() {
    holders_.clear();
    FindHolders();
    prefill_share_mean_ = PrefillShareMean();
    Evaluation out;
    out.prefills.reserve(seats_.size());
    out.decodes.reserve(seats_.size());
    for (const Seated& s : seats_) {
      if (Usable(s) && CanPrefill(s.w->role) && Fits(s, prompt_blocks())) out.prefills.push_back(Prefill(s));
    }
    const PrefillOption* best_prefill = nullptr;
    for (const PrefillOption& p : out.prefills)
      if (best_prefill == nullptr || PrefillRank(p) < PrefillRank(*best_prefill)) best_prefill = &p;

    std::optional<Plan> remote, local, small;
    bool any_decode = false;
    for (const Seated& s : seats_) {
      if (!Usable(s) || !CanDecode(s.w->role)) continue;
      any_decode = true;
      if (!Fits(s, Blocks(request_.prompt_tokens + 1))) continue;
      const bool is_small = Uncached(s) <= options_.local_prefill_tokens;
      if (is_small || s.w->role == Role::kBoth || out.prefills.empty()) {
        Plan plan = Finish(Prefill(s), s);
        out.locals.push_back(plan);
        Keep(local, plan);
        if (is_small) Keep(small, plan);
      }
      if (best_prefill == nullptr || best_prefill->worker == s.index) continue;
      Plan plan = Finish(*best_prefill, s);
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

  // ---- who is looked at

  void SeatAll() {
    std::vector<HeldPrefix> held;
    std::vector<HeldRun> runs;
    view_.prefixes().Match(keys_, view_.size(), held, runs);
    seats_.clear();
    seats_.reserve(view_.size());
    for (WorkerIndex i = 0; i < view_.size(); ++i) {
      if (view_.worker(i) != nullptr) seats_.push_back({i, view_.worker(i), held[i], runs[i]});
    }
  }

  // Adds to those who are seated.
  void Seat(ChainProbe& probe, const Breadth& breadth) {
    absl::InlinedVector<WorkerIndex, 96> found;
    const uint32_t answer_blocks = Blocks(uint64_t{request_.prompt_tokens} + output_tokens_high_);
    if (probe.known() > 0) {
      const double now = absl::ToDoubleSeconds(now_ - absl::UnixEpoch());
      const auto prefill = [&](WorkerIndex i) {
        return view_.FreeBlocks(i) < prompt_blocks() ? kNever : view_.PrefillOrder(i, now);
      };
      const auto decode = [&](WorkerIndex i) {
        return view_.FreeBlocks(i) < answer_blocks ? kNever : view_.DecodeOrder(i);
      };
      const auto feed = [&](WorkerIndex i) {
        const Worker& w = *view_.worker(i);
        return static_cast<double>(w.demand.outgoing_fetches) + 1e-6 * static_cast<double>(w.requests());
      };
      const auto top = probe.levels().front().holders;
      AddBest(top, breadth.holders, prefill, found);
      AddBest(top, breadth.decoders, decode, found);
      AddBest(top, breadth.feeders, feed, found);
      // Where fewer blocks are held by more workers.
      size_t levels = 0, holders = top.size();
      for (const ChainProbe::Level& level : probe.levels().subspan(1)) {
        if (levels == breadth.levels) break;
        const auto here = level.holders;
        if (here.size() <= holders) continue;
        holders = here.size();
        ++levels;
        AddBest(here, breadth.per_level, prefill, found);
      }
    }
    // Those without room are no better for being idle; but a cluster that is full is not gone through either.
    const auto take = [&](const RankTree& tree, size_t n, uint32_t blocks) {
      size_t left = 8 * n;
      tree.Walk([&](WorkerIndex i) {
        if (view_.FreeBlocks(i) >= blocks) {
          found.push_back(i);
          --n;
        }
        return n > 0 && --left > 0;
      });
    };
    take(view_.idle_prefill(), breadth.idle, prompt_blocks());
    take(view_.busy_prefill(), breadth.busy, prompt_blocks());
    take(view_.roomy_prefill(), 1, 0);
    take(view_.quick_decode(), breadth.quick, answer_blocks);
    take(view_.quick_half_decode(), breadth.quick, answer_blocks);
    take(view_.quick_now_decode(), breadth.quick, answer_blocks);
    take(view_.roomy_decode(), 1, 0);
    std::sort(found.begin(), found.end());
    found.erase(std::unique(found.begin(), found.end()), found.end());
    const size_t before = seats_.size();
    seats_.reserve(before + found.size());
    for (const WorkerIndex i : found) {
      const auto end = seats_.begin() + static_cast<ptrdiff_t>(before);
      if (std::any_of(seats_.begin(), end, [&](const Seated& s) { return s.index == i; })) continue;
      const HeldPrefix held = probe.Prefix(i);
      seats_.push_back({i, view_.worker(i), held, probe.Run(i, held)});
    }
  }

  // The `n` of least value; infinite ones are not taken.
  template <typename Value>
  static void AddBest(std::span<const PrefixIndex::Holder> holders, size_t n, const Value& value,
                      absl::InlinedVector<WorkerIndex, 96>& to) {
    absl::InlinedVector<std::pair<double, WorkerIndex>, 16> best;  // ascending
    for (const PrefixIndex::Holder& h : holders.first(std::min(holders.size(), kHoldersScanned))) {
      const std::pair<double, WorkerIndex> it(value(h.worker), h.worker);
      if (it.first == kNever || (best.size() == n && !(it < best.back()))) continue;
      if (best.size() == n) best.pop_back();
      best.insert(std::upper_bound(best.begin(), best.end(), it), it);
    }
    for (const auto& [v, i] : best) to.push_back(i);
  }

  // ---- comparisons

  std::tuple<bool, bool, double, uint64_t, uint64_t> PrefillRank(const PrefillOption& p) const {
    return std::tuple(!p.room, !Credit(p.worker), p.total_seconds(), p.load, view_.worker(p.worker)->name);
  }
  auto PlanRank(const Plan& p) const {
    return std::tuple(p.full, p.violations, !p.credit, p.cost_seconds, p.decode.load, p.prefill.load,
                      view_.worker(p.decode.worker)->name, view_.worker(p.prefill.worker)->name);
  }
  void Keep(std::optional<Plan>& best, const Plan& plan) const {
    if (!best || PlanRank(plan) < PlanRank(*best)) best = plan;
  }
  bool Credit(WorkerIndex i) const { return FairShare::HasCredit(input_.deficits, i); }
  // Of those that hold `blocks` of the prefix.
  auto HolderRank(const Seated& s, uint32_t blocks) const {
    return std::tuple(ReusableMax() - blocks, s.w->demand.outgoing_fetches, s.w->requests(), s.w->name);
  }

  uint32_t Blocks(uint64_t tokens) const {
    return static_cast<uint32_t>((tokens + layout_.block_tokens - 1) / layout_.block_tokens);
  }
  uint32_t prompt_blocks() const { return Blocks(request_.prompt_tokens); }
  // The last token is always computed (it gives the logits), so its block is never taken from a cache.
  uint32_t ReusableMax() const { return (request_.prompt_tokens - 1) / layout_.block_tokens; }
  uint32_t Uncached(const Seated& s) const {
    return request_.prompt_tokens - s.held.blocks * layout_.block_tokens;
  }
  // What holder h has of the blocks from `from` on: [from, near_blocks) in its host tier, [from, blocks) in
  // all.
  static HeldPrefix HeldFrom(const Seated& h, uint32_t from) {
    if (h.held.blocks > from || from < h.run.begin || from >= h.run.end) return h.held;
    return {.blocks = h.run.end, .near_blocks = h.run.near_end};
  }

  bool Excluded(const Seated& s) const {
    const auto& ex = request_.exclude_workers;
    return !ex.empty() && std::find(ex.begin(), ex.end(), s.w->address.worker_id) != ex.end();
  }
  bool Usable(const Seated& s) const { return s.w->ready() && !Excluded(s); }
  static bool Fits(const Seated& s, uint32_t blocks) { return s.w->load.slots_total >= blocks; }

  // The worker with the longest prefix, and the one with the longest in its host tier; of several, the one
  // that feeds the fewest. A draining worker still serves fetches, and a store does nothing else.
  void FindHolders() {
    if (!options_.peer_fetch) return;
    const Seated *near = nullptr, *any = nullptr, *beyond = nullptr;
    for (const Seated& s : seats_) {
      if ((s.held.blocks == 0 && s.run.end == 0) || Excluded(s)) continue;
      if (s.held.near_blocks > 0 &&
          (near == nullptr || HolderRank(s, s.held.near_blocks) < HolderRank(*near, near->held.near_blocks)))
        near = &s;
      if (s.held.blocks > 0 &&
          (any == nullptr || HolderRank(s, s.held.blocks) < HolderRank(*any, any->held.blocks)))
        any = &s;
      // And who goes on where others end.
      if (s.run.end > 0 &&
          (beyond == nullptr || HolderRank(s, s.run.end) < HolderRank(*beyond, beyond->run.end)))
        beyond = &s;
    }
    if (near != nullptr) holders_.push_back(near);
    if (any != nullptr && any != near && (near == nullptr || any->held.blocks > near->held.near_blocks))
      holders_.push_back(any);
    if (beyond != nullptr && std::find(holders_.begin(), holders_.end(), beyond) == holders_.end())
      holders_.push_back(beyond);
  }

  // ---- predictions

  double ComputeSeconds(const Seated& s, uint32_t cached_blocks) const {
    const Worker& w = *s.w;
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

  // With what is in its host tier alone.
  PrefillOption PrefillFromHost(const Seated& s) const {
    const uint32_t near = s.held.near_blocks;
    PrefillOption p{.worker = s.index, .near_blocks = near, .held_blocks = near, .cached_blocks = near};
    p.load = s.w->requests();
    p.blocks_needed = prompt_blocks();
    p.room = s.w->free_blocks() >= p.blocks_needed;
    p.queue_seconds = view_.QueueSeconds(*s.w, now_);
    p.compute_seconds = ComputeSeconds(s, p.held_blocks);
    return p;
  }

  // From its own disk, too.
  PrefillOption WithOwnDisk(const Seated& s, PrefillOption p) const {
    p.held_blocks = p.cached_blocks = s.held.blocks;
    p.fetch_seconds = view_.FetchSeconds(*s.w, Bytes(p.near_blocks, s.held.blocks), FetchFrom::kOwnDisk);
    p.compute_seconds = ComputeSeconds(s, p.cached_blocks);
    return p;
  }

  PrefillOption Prefill(const Seated& s) const {
    const PrefillOption p = PrefillFromHost(s);
    PrefillOption best = p;
    const auto consider = [&](PrefillOption option) {
      option.compute_seconds = ComputeSeconds(s, option.cached_blocks);
      if (option.service_seconds() < best.service_seconds()) best = option;
    };
    ConsiderHolders(s, p, consider);
    if (s.held.blocks > p.near_blocks) {
      const PrefillOption all = WithOwnDisk(s, p);
      consider(all);
      ConsiderHolders(s, all, consider);
    }
    return best;
  }

  uint64_t Bytes(uint32_t begin, uint32_t end) const {
    return end > begin ? uint64_t{end - begin} * layout_.block_bytes() : 0;
  }

  // `p`, and then what each holder has beyond it: of its host tier alone, and of its disk, too.
  template <typename Consider>
  void ConsiderHolders(const Seated& s, const PrefillOption& p, const Consider& consider) const {
    const Worker& w = *s.w;
    for (const Seated* h : holders_) {
      const auto [all, near] = HeldFrom(*h, p.held_blocks);
      if (h->index == p.worker || all <= p.cached_blocks) continue;
      // Transfers out of one worker share its link.
      const double share = 1.0 + h->w->demand.outgoing_fetches;
      PrefillOption option = p;
      option.holder = h->index;
      option.holder_near_blocks = std::max(near, p.held_blocks);
      option.peer_host_seconds = share * view_.FetchSeconds(w, Bytes(p.held_blocks, near));
      if (near > p.cached_blocks) {
        option.cached_blocks = near;
        option.fetch_seconds = p.fetch_seconds + option.peer_host_seconds;
        consider(option);
      }
      if (all > near) {
        option.cached_blocks = all;
        option.peer_disk_seconds =
            share * view_.FetchSeconds(w, Bytes(option.holder_near_blocks, all), FetchFrom::kPeerDisk);
        option.fetch_seconds = p.fetch_seconds + option.peer_host_seconds + option.peer_disk_seconds;
        consider(option);
      }
    }
  }

  // The batch of a decode worker at time t, this request included: how long one step takes, and how long
  // admission takes it to be.
  void PredictStep(const Seated& s, absl::Time t, DecodeOption& d) const {
    const Worker& w = *s.w;
    int64_t batch = int64_t{w.load.running} + w.load.waiting;
    auto context = static_cast<int64_t>(w.load.running_context_tokens);
    const double pace =
        w.latency.DecodeStepSeconds(std::max(w.load.running, 1u), w.load.running_context_tokens);
    // Of those that prefill now.
    int64_t prefilling = 0, prefilling_tokens = 0;
    absl::Duration prefilling_for;
    for (const BookingSlot slot : w.decoding) {
      const Booking& b = view_.booking(slot);
      const bool counted = b.decode_began_at ? *b.decode_began_at + options_.settle <= w.reported_at
                                             : b.local() && b.placed_at + options_.settle <= w.reported_at;
      const bool there = b.decode_began_at ? DecodeEnds(b, pace) > t : b.prefill_ends_at <= t;
      if (counted && b.decode_began_at && !there) {
        --batch;
        context -= b.prompt_tokens;
      } else if (!counted && there) {
        ++batch;
        context += b.prompt_tokens;
      }
      if (b.decode_began_at) continue;
      ++prefilling;
      prefilling_tokens += b.prompt_tokens;
      // One that is late, or whose end nobody has told of, is there for longer than was predicted.
      prefilling_for += std::max(b.prefill_ends_at, now_) - b.placed_at;
    }
    batch = std::max<int64_t>(batch, 0);
    context = std::max<int64_t>(context, 0);
    // Beside prefills, steps come further apart. Who has prefilled little of late will be given some:
    // admission takes it for no better than the others.
    const double apart =
        1 / (1 - (w.role == Role::kBoth ? std::max(w.prefill_share, prefill_share_mean_) : 0));
    const auto step = [&](double n, double tokens) {
      return apart * w.latency.DecodeStepSeconds(static_cast<uint64_t>(n), static_cast<uint64_t>(tokens));
    };
    auto n = static_cast<double>(batch), tokens = static_cast<double>(context);
    d.judged_itl_seconds = step(n + 1, tokens + request_.prompt_tokens);
    d.itl_seconds = d.judged_itl_seconds / apart / (1 - w.prefill_share);
    if (options_.admission != AdmissionPolicy::kPredicted || itl_slo_ == kNever) return;
    const double stay = pace * output_tokens_;
    if (const double lead = absl::ToDoubleSeconds(prefilling_for); lead > 0 && stay > 0) {
      const double mean = lead / static_cast<double>(prefilling);
      const double later = std::max(0.0, absl::ToDoubleSeconds(t - now_) - mean);
      const double more = static_cast<double>(prefilling) / mean * stay * (1 - std::exp(-later / stay));
      n += more;
      tokens += more * (static_cast<double>(prefilling_tokens) / static_cast<double>(prefilling) +
                        output_tokens_ / 2.0);
    }
    const double without = step(n + 1, tokens);
    const double with = step(n + 1, tokens + request_.prompt_tokens);
    const double typical = step(n + 1, tokens + input_.typical.prompt_tokens);
    d.judged_itl_seconds = with;
    if (input_.typical.prompt_tokens > 0) {
      const double idle = step(1, 0);
      d.judged_itl_seconds +=
          kReserved * std::max(0.0, with - typical) * Fullness(without - idle, itl_slo_ - idle);
    }
  }

  // Of those that are looked at and do both.
  double PrefillShareMean() const {
    double sum = 0, workers = 0;
    for (const Seated& s : seats_) {
      if (s.w->role != Role::kBoth) continue;
      sum += s.w->prefill_share;
      ++workers;
    }
    return workers > 0 ? sum / workers : 0;
  }

  static double Fullness(double used, double of) { return of > 0 ? std::clamp(used / of, 0.0, 1.0) : 1; }

  // What admission takes the time to the first token to be.
  double JudgedTtft(const Plan& plan) const {
    const double ttft = plan.ttft_seconds(), typical = input_.typical.compute_seconds;
    if (options_.admission != AdmissionPolicy::kPredicted || ttft_slo_ == kNever || typical == 0) return ttft;
    // Squared: a queue of a third of the objective is no overload yet.
    const double full = Fullness(plan.prefill.queue_seconds, ttft_slo_);
    return ttft + kReserved * full * full * std::max(0.0, plan.prefill.compute_seconds - typical);
  }

  // When a request that decodes is expected to end: after the mean of those seen, and never later than its
  // expected tokens take at the worker's present pace. Who is past that takes what few answers take; who is
  // past that, too, will be there for as long again as a quarter of it.
  absl::Time DecodeEnds(const Booking& b, double pace) const {
    const double mean = b.length_learnt ? pace * b.output_tokens
                                        : std::min(view_.decode_seconds_mean(), pace * b.output_tokens);
    const absl::Time expected = *b.decode_began_at + absl::Seconds(mean);
    if (expected > now_) return expected;
    const absl::Time late =
        *b.decode_began_at +
        absl::Seconds(std::max(mean, b.length_learnt ? pace * b.output_tokens_high : mean));
    return late > now_ ? late : now_ + absl::Seconds(mean / 4);
  }

  // Blocks that requests behind this one hold on `w`, and give up for it. The last resort: a plan that needs
  // them still breaks a limit.
  uint64_t PreemptibleBlocks(const Worker& w) const {
    if (!w.load.preempts) return 0;
    const auto rank = [](SloClass slo_class, int32_t priority) {
      return std::pair(slo_class == SloClass::kBatch, priority);
    };
    const auto own = rank(request_.slo_class, request_.priority);
    uint64_t blocks = 0;
    for (const BookingSlot slot : w.decoding) {
      const Booking& b = view_.booking(slot);
      if (own < rank(b.slo_class, b.priority)) blocks += b.decode_blocks;
    }
    // One that gave way already holds nothing.
    return std::min<uint64_t>(blocks, w.load.slots_total - w.load.slots_free);
  }

  // Prefill p, then decode on s.
  Plan Finish(const PrefillOption& p, const Seated& s) const {
    Plan plan;
    plan.prefill = p;
    plan.credit = Credit(p.worker);
    DecodeOption& d = plan.decode;
    d.worker = s.index;
    d.load = s.w->requests();
    d.blocks_needed = Blocks(uint64_t{request_.prompt_tokens} + output_tokens_high_);
    const uint64_t free = s.w->free_blocks();
    d.room = free >= d.blocks_needed;
    const uint64_t least = Blocks(uint64_t{request_.prompt_tokens} + 1);
    d.full = free < least && free + PreemptibleBlocks(*s.w) < least;
    if (p.worker != s.index) {
      const uint64_t blocks = prompt_blocks() - s.held.near_blocks;
      d.handoff_seconds =
          std::max(view_.FetchSeconds(*s.w, layout_.block_bytes()),
                   view_.FetchSeconds(*s.w, blocks * layout_.block_bytes()) - p.compute_seconds);
    }
    PredictStep(s, now_ + absl::Seconds(plan.ttft_seconds()), d);
    if (options_.admission == AdmissionPolicy::kEarly)
      d.judged_itl_seconds = DecodeStepNow(view_, options_, *s.w, request_.prompt_tokens);
    plan.judged_ttft_seconds = JudgedTtft(plan);
    const double itl = d.judged_itl_seconds;
    if (request_.slo_class == SloClass::kBatch && options_.admission != AdmissionPolicy::kNone) {
      const double left = static_cast<double>(free) - d.blocks_needed;
      d.gap = itl <= gap_itl_ && p.queue_seconds <= gap_queue_ && d.room &&
              left >= options_.batch_free_share * s.w->load.slots_total;
      // It takes nothing from anybody where nobody is: what no worker ever has room for beside others would
      // be refused for ever.
      if (p.load == 0 && d.load == 0) d.gap = !d.full && p.room;
    }
    plan.full = d.full || (!p.room && p.worker != s.index);
    plan.violations = (d.room ? 0 : 1) + (plan.judged_ttft_seconds > ttft_slo_ ? 1 : 0) +
                      (itl > itl_slo_ ? 1 : 0) + (d.gap ? 0 : 1);
    // Prefills beside it left out: to go where there were few of them spreads them over all, and then
    // nobody's tokens are on time.
    plan.cost_seconds = plan.ttft_seconds() + output_tokens_ * d.itl_seconds * (1 - s.w->prefill_share);
    return plan;
  }

  // ---- the baselines

  // As the policy would prefill: Mooncake's fetches by its rule, the others from what the worker has.
  PrefillOption PrefillBy(const Seated& s) {
    if (options_.placement == PlacementPolicy::kMooncake) {
      if (!mooncake_sought_) {
        FindHolders();
        mooncake_sought_ = true;
      }
      const double longest = holders_.empty() ? 0 : holders_.front()->held.near_blocks;
      if (longest > options_.mooncake_threshold * s.held.near_blocks && holders_.front()->index != s.index) {
        const Seated& h = *holders_.front();
        PrefillOption p = PrefillFromHost(s);
        p.holder = h.index;
        p.holder_near_blocks = p.cached_blocks = h.held.near_blocks;
        p.fetch_seconds = p.peer_host_seconds =
            (1.0 + h.w->demand.outgoing_fetches) *
            view_.FetchSeconds(*s.w, Bytes(p.held_blocks, h.held.near_blocks));
        p.compute_seconds = ComputeSeconds(s, p.cached_blocks);
        return p;
      }
    }
    const PrefillOption p = PrefillFromHost(s);
    if (s.held.blocks <= p.near_blocks) return p;
    const PrefillOption all = WithOwnDisk(s, p);
    return all.service_seconds() < p.service_seconds() ? all : p;
  }

  PolicySeat PolicySeatOf(const Seated& s) {
    PolicySeat out{.name = s.w->name,
                   .load = s.w->requests(),
                   .held_blocks = s.held.blocks,
                   .near_blocks = s.held.near_blocks};
    if (options_.placement == PlacementPolicy::kCacheAware)
      out.cached_blocks = view_.prefixes().blocks(s.index);
    if (options_.placement == PlacementPolicy::kDynamo) {
      out.queued_blocks = Blocks(s.w->load.queued_prefill_tokens + s.w->demand.prefill_tokens);
      out.active_blocks = Blocks(std::max(s.w->load.running_context_tokens, s.w->decoding_tokens));
    }
    if (options_.placement == PlacementPolicy::kMooncake) {
      if (CanPrefill(s.w->role)) out.ttft_seconds = PrefillBy(s).total_seconds();
      if (CanDecode(s.w->role))
        out.itl_seconds = DecodeStepNow(view_, options_, *s.w, request_.prompt_tokens);
    }
    return out;
  }

  absl::Status WhyNone(bool any_decode) const {
    if (any_decode) {
      uint32_t largest = 0;
      for (const Seated& s : seats_)
        if (Usable(s) && CanDecode(s.w->role)) largest = std::max(largest, s.w->load.slots_total);
      return absl::InvalidArgumentError(
          "a prompt of " + std::to_string(request_.prompt_tokens) + " tokens needs " +
          std::to_string(Blocks(request_.prompt_tokens + 1)) + " KV blocks; the largest decode worker has " +
          std::to_string(largest) + ". Shorten the prompt or raise kv.host_bytes");
    }
    size_t excluded = 0, draining = 0, lost = 0;
    for (const Seated& s : seats_) {
      const Worker* w = s.w;
      if (!CanDecode(w->role)) continue;
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
  const PlacementInput& input_;
  const BlockLayout layout_;
  const absl::Time now_;
  const std::span<const BlockKey> keys_;  // those that a cache could give
  const uint32_t output_tokens_;
  const uint32_t output_tokens_high_;
  const double ttft_slo_;
  const double itl_slo_;
  // Of a batch request: see SchedulerOptions::batch_slo_share.
  double gap_queue_ = kNever;
  double gap_itl_ = kNever;
  std::vector<Seated> seats_;
  absl::InlinedVector<const Seated*, 4> holders_;  // worth a fetch: at most three
  bool mooncake_sought_ = false;
  double prefill_share_mean_ = 0;
};

absl::Duration EffectiveSlo(const SchedulerOptions& options, const PlaceRequest& request, absl::Duration own,
                            absl::Duration ClassOptions::*of_class, absl::Duration general) {
  const absl::Duration by_class = options.classes[static_cast<size_t>(request.slo_class)].*of_class;
  // Nobody waits for a batch request's tokens: the general objective is not meant for it.
  if (request.slo_class == SloClass::kBatch) general = absl::ZeroDuration();
  for (const absl::Duration slo : {own, by_class, general}) {
    if (slo > absl::ZeroDuration()) return slo;
  }
  return absl::InfiniteDuration();
}

}  // namespace

absl::Duration EffectiveTtftSlo(const SchedulerOptions& options, const PlaceRequest& request) {
  return EffectiveSlo(options, request, request.slo_ttft, &ClassOptions::slo_ttft, options.slo_ttft);
}

absl::Duration EffectiveItlSlo(const SchedulerOptions& options, const PlaceRequest& request) {
  return EffectiveSlo(options, request, request.slo_itl, &ClassOptions::slo_itl, options.slo_itl);
}

double DecodeStepNow(const ClusterView& view, const SchedulerOptions& options, const Worker& w,
                     uint64_t tokens, const Booking* except) {
  uint64_t batch = uint64_t{w.load.running} + w.load.waiting;
  uint64_t context = w.load.running_context_tokens;
  for (const BookingSlot slot : w.decoding) {
    const Booking& b = view.booking(slot);
    if (&b == except || !b.decode_began_at || *b.decode_began_at + options.settle <= w.reported_at) continue;
    if (b.local() && b.placed_at + options.settle <= w.reported_at) continue;  // it waited, or ran
    ++batch;
    context += b.prompt_tokens;
  }
  return w.latency.DecodeStepSeconds(batch + 1, context + tokens);
}

Evaluation Evaluate(const ClusterView& view, const SchedulerOptions& options, const PlaceRequest& request,
                    const PlacementInput& input, PolicyState& policy, absl::Time now) {
  if (!view.model()) return {.status = absl::UnavailableError("no worker has registered yet")};
  Evaluator evaluator(view, options, request, input, now);
  return options.placement == PlacementPolicy::kTidepool ? evaluator.Run() : evaluator.RunPolicy(policy);
}

}  // namespace tidepool
