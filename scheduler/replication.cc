#include "scheduler/replication.h"

#include <algorithm>
#include <cmath>
#include <tuple>
#include <utility>

namespace tidepool {

namespace {

// Below it a run is forgotten when there are too many: half a use, long ago.
constexpr double kForgetUses = 0.5;
constexpr absl::Duration kForgetInterval = absl::Seconds(1);
// A budget unused for this long is lost: a pause is no reason for a burst.
constexpr double kBudgetSecondsMax = 1;
// Blocks of an order: short enough that what changed meanwhile is soon seen.
constexpr size_t kOrderBlocksMax = 256;

bool Serves(const Worker* w) { return w != nullptr && w->state != WorkerState::kLost; }

uint64_t Requests(const Worker& w) { return uint64_t{w.load.running} + w.load.waiting; }

// Who should rather take copies: stores, then who prefills (that is where prefixes are used), the idlest
// first.
auto TargetRank(const Worker& w) {
  const int kind = w.role == Role::kStore ? 0 : CanPrefill(w.role) ? 1 : 2;
  return std::tuple(kind, Requests(w), -int64_t{w.load.slots_free}, std::string_view(w.address.worker_id));
}

// Who should rather be asked for a block: the nearest tier, then the idlest.
auto SourceRank(const Worker& w, bool near) {
  return std::tuple(!near, Requests(w), std::string_view(w.address.worker_id));
}

// Workers to which copies can go, best first.
std::vector<WorkerIndex> Targets(const ClusterView& view) {
  std::vector<WorkerIndex> out;
  for (WorkerIndex i = 0; i < view.size(); ++i) {
    if (view.worker(i) != nullptr && view.worker(i)->ready()) out.push_back(i);
  }
  std::sort(out.begin(), out.end(), [&](WorkerIndex a, WorkerIndex b) {
    return TargetRank(*view.worker(a)) < TargetRank(*view.worker(b));
  });
  return out;
}

// Slots of a worker that hold nothing: a block that goes there costs no other.
uint64_t UnusedSlots(const Worker& w) {
  uint64_t readable = w.load.slots_total;  // unknown: none
  for (const TierLoad& tier : w.tiers) {
    if (tier.tier == Tier::kHost) readable = tier.blocks;
  }
  const uint64_t unused = w.load.slots_total - std::min<uint64_t>(w.load.slots_total, readable);
  return std::min<uint64_t>(unused, w.load.slots_free);
}

// Appends to the last order if it is of the same workers and has room.
void AddTo(std::vector<CopyOrder>& orders, const WorkerAddress& from, const WorkerAddress& to,
           const BlockKey& key) {
  for (auto it = orders.rbegin(); it != orders.rend(); ++it) {
    if (it->from.worker_id == from.worker_id && it->to.worker_id == to.worker_id) {
      if (it->keys.size() >= kOrderBlocksMax) break;
      it->keys.push_back(key);
      return;
    }
  }
  orders.push_back({from, to, {key}});
}

bool Holds(std::span<const PrefixIndex::Holder> holders, WorkerIndex worker) {
  return PrefixIndex::Find(holders, worker) != nullptr;
}

// The workers that hold all of `keys`: ready ones, and whom to copy from.
struct RunHolders {
  uint32_t ready = 0;
  std::vector<WorkerIndex> all;  // ready or not, but alive
  std::optional<WorkerIndex> source;
};

RunHolders HoldersOf(const ClusterView& view, std::span<const BlockKey> keys) {
  RunHolders out;
  bool source_near = false;
  for (const PrefixIndex::Holder& last : view.prefixes().Holders(keys.back())) {
    const Worker* w = view.worker(last.worker);
    if (!Serves(w)) continue;
    bool all = true, near = true;
    for (const BlockKey& key : keys) {
      const auto holders = view.prefixes().Holders(key);
      const PrefixIndex::Holder* holder = PrefixIndex::Find(holders, last.worker);
      all = all && holder != nullptr;
      near = near && holder != nullptr && holder->near();
    }
    if (!all) continue;
    out.all.push_back(last.worker);
    if (w->ready()) ++out.ready;
    if (!out.source || SourceRank(*w, near) < SourceRank(*view.worker(*out.source), source_near)) {
      out.source = last.worker;
      source_near = near;
    }
  }
  return out;
}

std::optional<WorkerIndex> Find(const ClusterView& view, std::string_view worker_id) {
  for (WorkerIndex i = 0; i < view.size(); ++i) {
    if (Serves(view.worker(i)) && view.worker(i)->address.worker_id == worker_id) return i;
  }
  return std::nullopt;
}

absl::Status NoWorker(std::string_view worker_id) {
  return absl::NotFoundError("no worker '" + std::string(worker_id) + "' is here");
}

}  // namespace

ReplicationCore::ReplicationCore(const ReplicationOptions& options) : options_(options) {}

// Instead of making all old uses smaller, a new one is made larger: by 2 for each half life since
// `counted_from_`. So a use costs one addition. Source: forward decay (Cormode et al., ICDE 2009).
double ReplicationCore::Weight(absl::Time now) const {
  return counted_from_ ? std::exp2(absl::FDivDuration(now - *counted_from_, options_.half_life)) : 1;
}

void ReplicationCore::Rebase(absl::Time now) {
  constexpr double kWeightMax = 1e100;
  if (!counted_from_) counted_from_ = now;
  const double weight = Weight(now);
  if (weight < kWeightMax) return;
  for (auto& [key, run] : runs_) run.weight /= weight;
  counted_from_ = now;
}

void ReplicationCore::OnPlaced(std::span<const BlockKey> keys, absl::Time now) {
  const size_t n = options_.run_blocks;
  const size_t runs = std::min(keys.size() / n, options_.max_runs_counted);
  Rebase(now);
  const double weight = Weight(now);
  for (size_t r = 0; r < runs; ++r) {
    const auto blocks = keys.subspan(r * n, n);
    auto it = runs_.find(blocks.back());
    if (it == runs_.end()) {
      if (runs_.size() >= options_.max_runs) Forget(now);
      if (runs_.size() >= options_.max_runs) return;
      it = runs_.emplace(blocks.back(), Run()).first;
      it->second.begin = static_cast<uint32_t>(r * n);
      it->second.keys.assign(blocks.begin(), blocks.end());
    }
    it->second.weight += weight;
  }
}

void ReplicationCore::Forget(absl::Time now) {
  if (now - forgot_at_ < kForgetInterval) return;
  forgot_at_ = now;
  const double weight = Weight(now);
  absl::erase_if(runs_, [&](const auto& entry) { return entry.second.weight < kForgetUses * weight; });
  if (runs_.size() < options_.max_runs) return;
  // All in use: those used least make room, so that something new can become hot at all.
  std::vector<double> uses;
  uses.reserve(runs_.size());
  for (const auto& [key, run] : runs_) uses.push_back(run.weight);
  const auto cut = uses.begin() + static_cast<ptrdiff_t>(uses.size() / 4);
  std::nth_element(uses.begin(), cut, uses.end());
  absl::erase_if(runs_, [limit = *cut](const auto& entry) { return entry.second.weight <= limit; });
}

size_t ReplicationCore::hot_runs(absl::Time now) const {
  const double hot = options_.hot_uses * Weight(now);
  return static_cast<size_t>(std::count_if(runs_.begin(), runs_.end(),
                                           [&](const auto& entry) { return entry.second.weight >= hot; }));
}

uint64_t ReplicationCore::TakeBudget(uint64_t bytes, absl::Time now) {
  const auto rate = static_cast<double>(options_.bytes_per_second);
  if (budget_at_) budget_bytes_ += rate * absl::ToDoubleSeconds(now - *budget_at_);
  if (!budget_at_) budget_bytes_ = rate * kBudgetSecondsMax;
  budget_at_ = now;
  budget_bytes_ = std::min(budget_bytes_, rate * kBudgetSecondsMax);
  // A debt is paid before the next: also a run larger than a second's budget is copied in its time.
  if (budget_bytes_ <= 0) return 0;
  budget_bytes_ -= static_cast<double>(bytes);
  return bytes;
}

std::vector<CopyOrder> ReplicationCore::Step(const ClusterView& view, absl::Time now) {
  std::vector<CopyOrder> orders;
  if (options_.copies < 2 || !view.model()) return orders;
  struct Wanted {
    uint32_t begin;
    double uses;
    Run* run;
  };
  std::vector<Wanted> wanted;
  const bool draining = [&] {
    for (WorkerIndex i = 0; i < view.size(); ++i) {
      if (view.worker(i) != nullptr && view.worker(i)->state == WorkerState::kDraining) return true;
    }
    return false;
  }();
  const double weight = Weight(now);
  for (auto& [key, run] : runs_) {
    if (now - run.ordered_at < options_.retry_after || now - run.looked_at < options_.look_again) continue;
    const double uses = run.weight / weight;
    if (uses >= options_.hot_uses || (draining && uses >= kForgetUses))
      wanted.push_back({run.begin, uses, &run});
  }
  if (wanted.empty()) return orders;
  // A tail without its head is worth nothing; of equal positions the most used, then any fixed order.
  std::sort(wanted.begin(), wanted.end(), [](const Wanted& a, const Wanted& b) {
    return std::tuple(a.begin, -a.uses, a.run->keys.back()) <
           std::tuple(b.begin, -b.uses, b.run->keys.back());
  });
  const std::vector<WorkerIndex> targets = Targets(view);
  const uint64_t block_bytes = view.model()->layout.block_bytes();
  for (const Wanted& w : wanted) {
    const RunHolders holders = HoldersOf(view, w.run->keys);
    const uint32_t enough = w.uses >= options_.hot_uses ? options_.copies : 1;
    if (!holders.source || holders.ready >= enough) {
      w.run->looked_at = now;
      continue;
    }
    const auto target = std::find_if(targets.begin(), targets.end(), [&](WorkerIndex i) {
      // A quarter of a worker's free slots at most: its own requests need them more.
      return std::find(holders.all.begin(), holders.all.end(), i) == holders.all.end() &&
             view.worker(i)->load.slots_free >= 4 * w.run->keys.size();
    });
    if (target == targets.end()) continue;
    if (TakeBudget(w.run->keys.size() * block_bytes, now) == 0) break;
    w.run->ordered_at = now;
    for (const BlockKey& key : w.run->keys) {
      if (!Holds(view.prefixes().Holders(key), *target))
        AddTo(orders, view.worker(*holders.source)->address, view.worker(*target)->address, key);
    }
  }
  return orders;
}

absl::StatusOr<std::vector<CopyOrder>> ReplicationCore::Evacuation(const ClusterView& view,
                                                                   std::string_view worker_id,
                                                                   absl::Time now) const {
  const auto leaving = Find(view, worker_id);
  if (!leaving) return NoWorker(worker_id);
  struct Target {
    WorkerIndex worker;
    uint64_t free;    // slots that may be taken for used blocks
    uint64_t unused;  // and for others
  };
  std::vector<Target> targets;
  for (const WorkerIndex i : Targets(view)) {
    if (i == *leaving) continue;
    const Worker& w = *view.worker(i);
    const uint64_t share = w.role == Role::kStore ? w.load.slots_free : w.load.slots_free / 2;
    targets.push_back({i, share, std::min(share, UnusedSlots(w))});
  }
  if (targets.empty()) {
    return absl::ResourceExhaustedError("no other worker or store is ready to take the blocks of " +
                                        std::string(worker_id));
  }
  // How much each block is used: as its run.
  absl::flat_hash_map<BlockKey, std::tuple<double, uint32_t>> used;  // -uses, position
  for (const auto& [last, run] : runs_) {
    const double uses = run.weight / Weight(now);
    if (uses < kForgetUses) continue;
    for (uint32_t i = 0; i < run.keys.size(); ++i) used[run.keys[i]] = {-uses, run.begin + i};
  }
  struct Block {
    std::tuple<double, uint32_t> rank;
    BlockKey key;
    bool operator<(const Block& o) const { return std::tie(rank, key) < std::tie(o.rank, o.key); }
  };
  std::vector<Block> blocks;
  view.prefixes().ForEachKey(*leaving, [&](const BlockKey& key) {
    const auto holders = view.prefixes().Holders(key);
    const bool elsewhere = std::any_of(holders.begin(), holders.end(), [&](const auto& h) {
      return h.worker != *leaving && view.worker(h.worker) != nullptr && view.worker(h.worker)->ready();
    });
    if (elsewhere || !PrefixIndex::Find(holders, *leaving)->near()) return;
    const auto it = used.find(key);
    blocks.push_back({it == used.end() ? std::tuple(0.0, 0u) : it->second, key});
  });
  std::sort(blocks.begin(), blocks.end());
  std::vector<CopyOrder> orders;
  for (const Block& block : blocks) {
    const bool is_used = std::get<0>(block.rank) < 0;
    const auto target = std::find_if(targets.begin(), targets.end(),
                                     [&](const Target& t) { return (is_used ? t.free : t.unused) > 0; });
    if (target == targets.end()) {
      if (is_used) continue;
      break;
    }
    if (target->free > 0) --target->free;
    if (target->unused > 0) --target->unused;
    AddTo(orders, view.worker(*leaving)->address, view.worker(target->worker)->address, block.key);
  }
  return orders;
}

absl::StatusOr<std::vector<CopyOrder>> ReplicationCore::Replication(const ClusterView& view,
                                                                    std::span<const BlockKey> keys,
                                                                    uint32_t copies, std::string_view to) {
  std::vector<WorkerIndex> targets = Targets(view);
  if (!to.empty()) {
    const auto only = Find(view, to);
    if (!only) return NoWorker(to);
    targets = {*only};
  }
  std::vector<CopyOrder> orders;
  for (const BlockKey& key : keys) {
    const auto holders = view.prefixes().Holders(key);
    uint32_t have = 0;
    std::optional<PrefixIndex::Holder> source;
    for (const PrefixIndex::Holder& h : holders) {
      const Worker* w = view.worker(h.worker);
      if (!Serves(w)) continue;
      if (w->ready()) ++have;
      if (!source || SourceRank(*w, h.near()) < SourceRank(*view.worker(source->worker), source->near()))
        source = h;
    }
    if (!source) continue;
    const uint32_t want = to.empty() ? copies : have + 1;
    for (const WorkerIndex target : targets) {
      if (have >= want) break;
      if (Holds(holders, target)) continue;
      AddTo(orders, view.worker(source->worker)->address, view.worker(target)->address, key);
      ++have;
    }
  }
  return orders;
}

}  // namespace tidepool
