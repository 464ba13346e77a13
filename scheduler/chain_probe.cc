#include "scheduler/chain_probe.h"

#include <algorithm>

namespace tidepool {

template <typename Holds>
uint32_t ChainProbe::FirstNot(uint32_t lo, uint32_t hi, const Holds& holds) {
  while (lo < hi) {
    const uint32_t mid = lo + (hi - lo) / 2;
    if (holds(mid)) {
      lo = mid + 1;
    } else {
      hi = mid;
    }
  }
  return lo;
}

// Positions 0, 1, 3, 7, ... until one fails, then by halves: what most are asked about is asked first, and
// the same positions for all of them.
template <typename Holds>
uint32_t ChainProbe::Gallop(const Holds& holds) {
  uint32_t lo = 0;
  for (uint32_t at = 0; at < known_; at = 2 * at + 1) {
    if (!holds(at)) return FirstNot(lo, at, holds);
    lo = at + 1;
  }
  if (lo >= known_) return lo;
  // Most of those who go so far go to the end.
  return holds(known_ - 1) ? known_ : FirstNot(lo, known_ - 1, holds);
}

// The same, from the end: at most positions most workers fail, where few hold anything and a look is cheap;
// and who holds the last block mostly holds all.
uint32_t ChainProbe::Descend(WorkerIndex worker) {
  constexpr size_t kChecks = 3;
  const auto holds = [&](uint32_t at) { return PrefixIndex::Find(At(at), worker) != nullptr; };
  const auto at_level = [&](size_t k) { return PrefixIndex::Find(levels_[k].holders, worker) != nullptr; };
  uint32_t above = known_;
  for (size_t k = 0; k < levels_.size(); ++k) {
    if (!at_level(k)) {
      above = levels_[k].position;
      continue;
    }
    bool whole = at_level(levels_.size() - 1);
    for (size_t c = k + 1; whole && c < std::min(levels_.size(), k + 1 + kChecks); ++c) whole = at_level(c);
    if (!whole) return Gallop(holds);
    return FirstNot(levels_[k].position + 1, above, holds);
  }
  return 0;
}

ChainProbe::ChainProbe(const PrefixIndex& index, std::span<const BlockKey> keys)
    : index_(index), keys_(keys) {
  const auto n = static_cast<uint32_t>(keys.size());
  // All of the first round's memory at once: one after the other would be most of the time that this takes.
  for (uint32_t at = 0; at < n; at = 2 * at + 1) index.Prefetch(keys[at]);
  if (n > 0) index.Prefetch(keys[n - 1]);
  for (uint32_t at = 0; at < n; at = 2 * at + 1) index.PrefetchEntry(keys[at]);
  // And then of what may be asked for next, whichever way it goes.
  uint32_t lo = 0, hi = n;
  for (uint32_t at = 0; at < n; at = 2 * at + 1) {
    if (At(at).empty()) {
      hi = at;
      break;
    }
    lo = at + 1;
  }
  if (hi == n && lo < n && !At(n - 1).empty()) lo = n;
  while (lo < hi) {
    const uint32_t mid = lo + (hi - lo) / 2;
    if (mid > lo) index.Prefetch(keys[lo + (mid - lo) / 2]);
    if (mid + 1 < hi) index.Prefetch(keys[mid + 1 + (hi - mid - 1) / 2]);
    if (At(mid).empty()) {
      hi = mid;
    } else {
      lo = mid + 1;
    }
  }
  known_ = lo;
  if (known_ == 0) return;
  levels_.push_back({known_ - 1, At(known_ - 1)});
  uint32_t at = 0;
  while (2 * at + 1 < known_ - 1) at = 2 * at + 1;
  for (; at < levels_.back().position; at = (at - 1) / 2) {
    levels_.push_back({at, At(at)});
    if (at == 0) break;
  }
}

std::span<const PrefixIndex::Holder> ChainProbe::At(uint32_t position) {
  const auto it = std::lower_bound(asked_.begin(), asked_.end(), position,
                                   [](const Level& a, uint32_t p) { return a.position < p; });
  if (it != asked_.end() && it->position == position) return it->holders;
  const auto holders = index_.Holders(keys_[position]);
  asked_.insert(it, {position, holders});
  return holders;
}

HeldPrefix ChainProbe::Prefix(WorkerIndex worker) {
  const auto find = [&](uint32_t at) { return PrefixIndex::Find(At(at), worker); };
  HeldPrefix out;
  out.blocks = Descend(worker);
  if (out.blocks == 0) return out;
  // Blocks leave the host tier from the end of a chain on, mostly.
  out.near_blocks = find(out.blocks - 1)->near() ? out.blocks : Gallop([&](uint32_t at) {
    const PrefixIndex::Holder* h = find(at);
    return at < out.blocks && h != nullptr && h->near();
  });
  return out;
}

HeldRun ChainProbe::Run(WorkerIndex worker, const HeldPrefix& prefix) {
  if (known_ == 0 || prefix.blocks >= known_) return {};
  const PrefixIndex::Holder* last = PrefixIndex::Find(levels_.front().holders, worker);
  if (last == nullptr) return {};
  const auto lacks = [&](uint32_t at) { return PrefixIndex::Find(At(at), worker) == nullptr; };
  HeldRun run{.begin = FirstNot(prefix.blocks, known_ - 1, lacks), .end = known_};
  const PrefixIndex::Holder* first = PrefixIndex::Find(At(run.begin), worker);
  run.near_end = last->near() ? run.end : run.begin;
  if (!last->near() && first != nullptr && first->near()) {
    run.near_end = FirstNot(run.begin, run.end, [&](uint32_t at) {
      const PrefixIndex::Holder* h = PrefixIndex::Find(At(at), worker);
      return h != nullptr && h->near();
    });
  }
  return run;
}

}  // namespace tidepool
