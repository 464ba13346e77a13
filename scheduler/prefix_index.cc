#include "scheduler/prefix_index.h"

#include <algorithm>

namespace tidepool {

void PrefixIndex::Add(const BlockKey& key, WorkerIndex worker) {
  if (worker >= by_worker_.size()) by_worker_.resize(worker + 1);
  if (by_worker_[worker].contains(key)) return;
  if (entries_ >= max_entries_) {
    ++ignored_;
    return;
  }
  by_worker_[worker].insert(key);
  holders_[key].push_back(worker);
  ++entries_;
}

void PrefixIndex::Remove(const BlockKey& key, WorkerIndex worker) {
  if (worker < by_worker_.size() && by_worker_[worker].erase(key) > 0) Detach(key, worker);
}

void PrefixIndex::Clear(WorkerIndex worker) {
  if (worker >= by_worker_.size()) return;
  const auto keys = std::move(by_worker_[worker]);
  by_worker_[worker].clear();
  for (const BlockKey& key : keys) Detach(key, worker);
}

void PrefixIndex::Detach(const BlockKey& key, WorkerIndex worker) {
  const auto it = holders_.find(key);
  auto& list = it->second;
  *std::find(list.begin(), list.end(), worker) = list.back();
  list.pop_back();
  if (list.empty()) holders_.erase(it);
  --entries_;
}

void PrefixIndex::Match(std::span<const BlockKey> keys, size_t workers, std::vector<uint32_t>& out) const {
  out.assign(workers, 0);
  for (uint32_t i = 0; i < keys.size(); ++i) {
    const auto it = holders_.find(keys[i]);
    if (it == holders_.end()) return;
    bool any = false;
    for (WorkerIndex w : it->second) {
      if (w >= workers || out[w] != i) continue;  // it lacks an earlier block
      out[w] = i + 1;
      any = true;
    }
    if (!any) return;
  }
}

size_t PrefixIndex::blocks(WorkerIndex worker) const {
  return worker < by_worker_.size() ? by_worker_[worker].size() : 0;
}

}  // namespace tidepool
