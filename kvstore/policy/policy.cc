#include "kvstore/policy/policy.h"

#include <algorithm>
#include <bit>
#include <deque>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "base/status.h"
#include "kvstore/policy/ranked_policy.h"
#include "kvstore/policy/reuse_gap.h"

namespace tidepool {

namespace {

// Doubles that are not negative order like their bits.
uint64_t OrderedBits(double v) { return std::bit_cast<uint64_t>(v); }

class Lru final : public RankedPolicy {
 public:
  using RankedPolicy::RankedPolicy;
  std::string_view name() const override { return "lru"; }
  void OnInsert(uint32_t id, const PolicyEntry& entry, const PolicyUse& use) override {
    Enter(id, entry.group);
    rank(id) = {use.request, ++uses_};
  }
  void OnUse(std::span<const uint32_t> ids, const PolicyUse& use) override { OnRelease(ids, use.request); }
  void OnRelease(std::span<const uint32_t> ids, uint64_t now) override {
    ++uses_;
    for (uint32_t id : ids) rank(id) = {std::max(rank(id).major, now), uses_};
  }

 private:
  uint64_t uses_ = 0;  // orders the uses of one request
};

class Lfu final : public RankedPolicy {
 public:
  using RankedPolicy::RankedPolicy;
  std::string_view name() const override { return "lfu"; }
  void OnInsert(uint32_t id, const PolicyEntry& entry, const PolicyUse&) override {
    Enter(id, entry.group);
    rank(id) = {1, ++uses_};
  }
  void OnUse(std::span<const uint32_t> ids, const PolicyUse&) override {
    ++uses_;
    for (uint32_t id : ids) rank(id) = {rank(id).major + 1, uses_};
  }
  void OnRelease(std::span<const uint32_t> ids, uint64_t) override {
    ++uses_;
    for (uint32_t id : ids) rank(id).minor = uses_;
  }

 private:
  uint64_t uses_ = 0;
};

// Priority = clock + uses * cost / bytes; the clock is the priority of the last victim, so that what was once
// popular ages. GDSF: cost 1. PGDSF: the seconds that computing the block took; one for which nobody said is
// taken to cost the mean of those for which somebody did.
class Gdsf final : public RankedPolicy {
 public:
  Gdsf(uint32_t capacity, bool costs) : RankedPolicy(capacity), costs_(costs), entries_(capacity) {}
  std::string_view name() const override { return costs_ ? "pgdsf" : "gdsf"; }
  void OnInsert(uint32_t id, const PolicyEntry& entry, const PolicyUse&) override {
    Enter(id, entry.group);
    double cost = 1;
    if (costs_) {
      if (entry.compute_seconds > 0) {
        ++known_;
        mean_ += (entry.compute_seconds - mean_) / static_cast<double>(known_);
      }
      cost = entry.compute_seconds > 0 ? entry.compute_seconds : (known_ > 0 ? mean_ : 1);
    }
    entries_[id] = {1, cost / std::max<uint32_t>(entry.bytes, 1)};
    ++uses_;
    Set(id);
  }
  void OnUse(std::span<const uint32_t> ids, const PolicyUse&) override {
    ++uses_;
    for (uint32_t id : ids) {
      ++entries_[id].uses;
      Set(id);
    }
  }
  void OnRelease(std::span<const uint32_t> ids, uint64_t) override {
    ++uses_;
    for (uint32_t id : ids) rank(id).minor = uses_;
  }
  void OnErase(uint32_t id, bool evicted) override {
    if (evicted) clock_ = std::max(clock_, std::bit_cast<double>(rank(id).major));
    RankedPolicy::OnErase(id, evicted);
  }

 private:
  struct Weight {
    uint32_t uses = 0;
    double per_use = 0;
  };

  void Set(uint32_t id) {
    rank(id) = {OrderedBits(clock_ + entries_[id].uses * entries_[id].per_use), uses_};
  }

  const bool costs_;
  std::vector<Weight> entries_;
  uint64_t uses_ = 0;
  double clock_ = 0;
  double mean_ = 0;
  uint64_t known_ = 0;
};

// LRU, but what a later turn of a conversation used counts as used `bonus` requests later: P(another turn |
// turn k) rises with k (.31, .42, .51, .59 for k = 1..4 on Mooncake's conversation trace), so a conversation
// that has come back once is worth more than a prompt seen once. The bonus is measured, see reuse_gap.h.
class TurnAware final : public RankedPolicy {
 public:
  TurnAware(uint32_t capacity, uint64_t bonus) : RankedPolicy(capacity), bonus_(bonus), last_(capacity) {}
  std::string_view name() const override { return "turn-aware"; }
  void OnInsert(uint32_t id, const PolicyEntry& entry, const PolicyUse& use) override {
    Enter(id, entry.group);
    last_[id] = use;
    rank(id) = {use.request + Bonus(use), ++uses_};
  }
  void OnUse(std::span<const uint32_t> ids, const PolicyUse& use) override {
    ++uses_;
    if (use.extends_session && use.session_gap > 0) gaps_.Observe(use.session_gap);
    for (uint32_t id : ids) {
      last_[id] = use;
      rank(id) = {std::max(rank(id).major, use.request + Bonus(use)), uses_};
    }
  }
  void OnRelease(std::span<const uint32_t> ids, uint64_t now) override {
    ++uses_;
    for (uint32_t id : ids) {
      last_[id].request = std::max(last_[id].request, now);
      rank(id) = {std::max(rank(id).major, now + Bonus(last_[id])), uses_};
    }
  }

 private:
  uint64_t Bonus(const PolicyUse& use) const {
    if (!use.extends_session) return 0;
    return bonus_ > 0 ? bonus_ : gaps_.Bonus();
  }

  const uint64_t bonus_;  // 0: measured

  std::vector<PolicyUse> last_;
  uint64_t uses_ = 0;
  ReuseGap gaps_;
};

// S3-FIFO (Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023, algorithm 1): what
// comes waits in a small FIFO queue of a tenth of the cache; what was used there more than once by the time
// it reaches the end goes on to the main queue, the rest leaves and is remembered for as long as the main
// queue is long. One that comes back while it is remembered enters the main queue, where entries get another
// round per use (3 at most).
class S3Fifo final : public EvictionPolicy {
 public:
  S3Fifo(uint32_t capacity, uint32_t typical)
      : small_target_(std::max<uint32_t>(1, typical / 10)),
        ghost_limit_(typical - typical / 10),
        entries_(capacity),
        candidates_(capacity) {}
  std::string_view name() const override { return "s3-fifo"; }

  void OnInsert(uint32_t id, const PolicyEntry& entry, const PolicyUse&) override {
    Entry& e = entries_[id];
    e = {.key = entry.key,
         .seq = ++seq_,
         .group = entry.group,
         .uses = 0,
         .main = ghosts_.erase(entry.key) > 0};
    if (!e.main) ++small_;
  }
  void OnUse(std::span<const uint32_t> ids, const PolicyUse&) override {
    for (uint32_t id : ids) entries_[id].uses = std::min<uint8_t>(entries_[id].uses + 1, kMaxUses);
  }
  void OnRelease(std::span<const uint32_t>, uint64_t) override {}
  void OnErase(uint32_t id, bool evicted) override {
    Entry& e = entries_[id];
    candidates_.Clear(id);
    if (e.main) return;
    --small_;
    if (!evicted) return;
    ghosts_[e.key] = ++ghost_seq_;
    ghost_order_.emplace_back(e.key, ghost_seq_);
    while (ghosts_.size() > ghost_limit_ || ghost_order_.size() > 2 * size_t{ghost_limit_} + 64) {
      const auto& [key, seq] = ghost_order_.front();
      if (const auto it = ghosts_.find(key); it != ghosts_.end() && it->second == seq) ghosts_.erase(it);
      ghost_order_.pop_front();
    }
  }
  void SetCandidate(uint32_t id, EvictionBand band) override {
    const uint32_t lane = LaneOf(entries_[id], static_cast<uint32_t>(band));
    if (!candidates_.contains(id) || candidates_.lane(id) != lane)
      candidates_.Set(id, lane, {entries_[id].seq, 0});
  }
  void ClearCandidate(uint32_t id) override { candidates_.Clear(id); }

  std::optional<uint32_t> Victim(uint32_t group) override {
    for (uint32_t band = 0; band < 2; ++band) {
      // Each pass either ends or takes a use away or moves an entry to the main queue, so it is finite.
      for (;;) {
        const auto small = Oldest(group, band, false), main = Oldest(group, band, true);
        if (!small && !main) break;
        if (small && (small_ >= small_target_ || !main)) {
          Entry& e = entries_[*small];
          if (e.uses <= kUsesToStay) return small;
          e.main = true;
          --small_;
          e.uses = 0;
          Requeue(*small, band);
        } else {
          Entry& e = entries_[*main];
          if (e.uses == 0) return main;
          --e.uses;
          Requeue(*main, band);
        }
      }
    }
    return std::nullopt;
  }

 private:
  static constexpr uint8_t kMaxUses = 3;
  static constexpr uint8_t kUsesToStay = 0;

  struct Entry {
    BlockKey key;
    uint64_t seq = 0;  // its place in its queue
    uint32_t group = 0;
    uint8_t uses = 0;
    bool main = false;
  };

  static uint32_t LaneOf(const Entry& e, uint32_t band) { return 4 * e.group + 2 * band + (e.main ? 1 : 0); }

  std::optional<uint32_t> Oldest(uint32_t group, uint32_t band, bool main) {
    std::optional<Candidates::Top> best;
    const uint32_t in_group = 2 * band + (main ? 1 : 0);
    const uint32_t first = group == kAnyGroup ? in_group : 4 * group + in_group;
    const uint32_t end = group == kAnyGroup ? candidates_.lanes() : first + 1;
    for (uint32_t lane = first; lane < end; lane += 4) {
      const auto top = candidates_.Lowest(lane);
      if (top && (!best || top->rank < best->rank)) best = top;
    }
    if (!best) return std::nullopt;
    return best->id;
  }

  void Requeue(uint32_t id, uint32_t band) {
    entries_[id].seq = ++seq_;
    candidates_.Set(id, LaneOf(entries_[id], band), {entries_[id].seq, 0});
  }

  const uint32_t small_target_;
  const size_t ghost_limit_;
  std::vector<Entry> entries_;
  Candidates candidates_;  // lane: 4 * group + 2 * band + queue
  uint64_t seq_ = 0;
  uint32_t small_ = 0;  // entries in the small queue
  absl::flat_hash_map<BlockKey, uint64_t> ghosts_;
  std::deque<std::pair<BlockKey, uint64_t>> ghost_order_;  // stale where ghosts_ has another number
  uint64_t ghost_seq_ = 0;
};

// Belady's MIN: what is used again last goes first.
class Belady final : public RankedPolicy {
 public:
  Belady(uint32_t capacity, NextUse next_use)
      : RankedPolicy(capacity), next_use_(std::move(next_use)), keys_(capacity) {}
  std::string_view name() const override { return "belady"; }
  void OnInsert(uint32_t id, const PolicyEntry& entry, const PolicyUse& use) override {
    Enter(id, entry.group);
    keys_[id] = entry.key;
    Look(id, use.request);
  }
  void OnUse(std::span<const uint32_t> ids, const PolicyUse& use) override {
    for (uint32_t id : ids) Look(id, use.request);
  }
  void OnRelease(std::span<const uint32_t>, uint64_t) override {}

 private:
  void Look(uint32_t id, uint64_t request) {
    rank(id) = {kNever - next_use_(keys_[id], request), 0};
    Moved(id);
  }

  const NextUse next_use_;
  std::vector<BlockKey> keys_;
};

}  // namespace

std::vector<std::string_view> PolicyNames() {
  return {"lru", "lfu", "s3-fifo", "gdsf", "pgdsf", "turn-aware"};
}

absl::StatusOr<std::unique_ptr<EvictionPolicy>> CreatePolicy(const PolicyOptions& o) {
  if (o.capacity == 0)
    return absl::InvalidArgumentError("eviction policy: a capacity of 0; it must be at least 1");
  std::unique_ptr<EvictionPolicy> policy;
  if (o.name == "lru") policy = std::make_unique<Lru>(o.capacity);
  if (o.name == "lfu") policy = std::make_unique<Lfu>(o.capacity);
  if (o.name == "s3-fifo")
    policy = std::make_unique<S3Fifo>(o.capacity, o.typical != 0 ? o.typical : o.capacity);
  if (o.name == "gdsf") policy = std::make_unique<Gdsf>(o.capacity, false);
  if (o.name == "pgdsf") policy = std::make_unique<Gdsf>(o.capacity, true);
  if (o.name == "turn-aware") policy = std::make_unique<TurnAware>(o.capacity, o.turn_bonus);
  if (o.name == "belady") {
    if (!o.next_use)
      return absl::InvalidArgumentError(
          "eviction policy: belady needs the future, it exists in simulation only");
    policy = std::make_unique<Belady>(o.capacity, o.next_use);
  }
  if (policy == nullptr) {
    std::string names;
    for (std::string_view name : PolicyNames()) names += (names.empty() ? "" : ", ") + std::string(name);
    return absl::InvalidArgumentError("eviction policy: no policy is called '" + o.name + "'; there are " +
                                      names);
  }
  return policy;
}

}  // namespace tidepool
