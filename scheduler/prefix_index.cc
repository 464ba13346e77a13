#include "scheduler/prefix_index.h"

#include <algorithm>
#include <utility>

namespace tidepool {

void PrefixIndex::Add(const BlockKey& key, WorkerIndex worker, Tier tier) {
  if (worker >= by_worker_.size()) by_worker_.resize(worker + 1);
  if (by_worker_[worker].contains(key)) {
    for (Holder& h : holders_.find(key)->second) {
      if (h.worker == worker) h.tiers |= TierBit(tier);
    }
    return;
  }
  if (entries_ >= max_entries_) {
    ++ignored_;
    return;
  }
  by_worker_[worker].insert(key);
  holders_[key].push_back({worker, TierBit(tier)});
  ++entries_;
}

void PrefixIndex::Remove(const BlockKey& key, WorkerIndex worker, Tier tier) {
  if (worker >= by_worker_.size() || !by_worker_[worker].contains(key)) return;
  for (Holder& h : holders_.find(key)->second) {
    if (h.worker != worker) continue;
    h.tiers &= ~TierBit(tier);
    if (h.tiers != 0) return;
    break;
  }
  by_worker_[worker].erase(key);
  Detach(key, worker);
}

void PrefixIndex::Clear(WorkerIndex worker) {
  if (worker >= by_worker_.size()) return;
  const auto keys = std::exchange(by_worker_[worker], {});
  for (const BlockKey& key : keys) Detach(key, worker);
}

void PrefixIndex::Detach(const BlockKey& key, WorkerIndex worker) {
  const auto it = holders_.find(key);
  auto& list = it->second;
  *std::find_if(list.begin(), list.end(), [&](const Holder& h) { return h.worker == worker; }) = list.back();
  list.pop_back();
  if (list.empty()) holders_.erase(it);
  --entries_;
}

void PrefixIndex::Match(std::span<const BlockKey> keys, size_t workers, std::vector<HeldPrefix>& out) const {
  out.assign(workers, {});
  for (uint32_t i = 0; i < keys.size(); ++i) {
    const auto it = holders_.find(keys[i]);
    if (it == holders_.end()) return;
    bool any = false;
    for (const Holder& h : it->second) {
      if (h.worker >= workers || out[h.worker].blocks != i) continue;  // it lacks an earlier block
      HeldPrefix& held = out[h.worker];
      if (held.near_blocks == i && h.near()) held.near_blocks = i + 1;
      held.blocks = i + 1;
      any = true;
    }
    if (!any) return;
  }
}

void PrefixIndex::Match(std::span<const BlockKey> keys, size_t workers, std::vector<HeldPrefix>& out,
                        std::vector<HeldRun>& runs) const {
  out.assign(workers, {});
  runs.assign(workers, {});
  for (uint32_t i = 0; i < keys.size(); ++i) {
    const auto it = holders_.find(keys[i]);
    if (it == holders_.end()) return;
    for (const Holder& h : it->second) {
      if (h.worker >= workers) continue;
      if (HeldPrefix& held = out[h.worker]; held.blocks == i) {
        if (held.near_blocks == i && h.near()) held.near_blocks = i + 1;
        held.blocks = i + 1;
        continue;
      }
      HeldRun& run = runs[h.worker];
      if (run.end != i || run.begin == run.end) run = {i, i, i};
      if (run.near_end == i && h.near()) run.near_end = i + 1;
      run.end = i + 1;
    }
  }
}

std::span<const PrefixIndex::Holder> PrefixIndex::Holders(const BlockKey& key) const {
  const auto it = holders_.find(key);
  return it == holders_.end() ? std::span<const Holder>() : std::span<const Holder>(it->second);
}

const absl::flat_hash_set<BlockKey>& PrefixIndex::Keys(WorkerIndex worker) const {
  static const auto* const kNone = new absl::flat_hash_set<BlockKey>();
  return worker < by_worker_.size() ? by_worker_[worker] : *kNone;
}

size_t PrefixIndex::blocks(WorkerIndex worker) const {
  return worker < by_worker_.size() ? by_worker_[worker].size() : 0;
}

}  // namespace tidepool
