#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "absl/container/inlined_vector.h"
#include "scheduler/prefix_index.h"

namespace tidepool {

// ChainProbe: who holds how much of a chain, from few of its blocks: for a chain of n blocks about 2 log2 n
// lookups instead of n. It takes for granted what is nearly always so: where somebody holds a block, somebody
// holds those before it, and one worker's blocks of a chain are a prefix, or one run, or both (the first
// block, and those at half, a quarter and an eighth of the way, are looked at to tell). Where that is wrong
// (a hole in the middle), a prefix seems longer than it is, and the worker computes what it lacks. View:
// borrows both for its life, during which the index must not change. Not thread-safe.
class ChainProbe {
 public:
  ChainProbe(const PrefixIndex& index, std::span<const BlockKey> keys);

  // Somebody holds [0, known()).
  uint32_t known() const { return known_; }
  // Positions to look for holders of a prefix at, deepest first: the last known one, then about half as far
  // each time, down to the first block.
  struct Level {
    uint32_t position;
    std::span<const PrefixIndex::Holder> holders;
  };
  std::span<const Level> levels() const { return levels_; }
  // By worker, ascending; each position is looked up once.
  std::span<const PrefixIndex::Holder> At(uint32_t position);

  HeldPrefix Prefix(WorkerIndex worker);
  // What it holds beyond that prefix, up to known().
  HeldRun Run(WorkerIndex worker, const HeldPrefix& prefix);

 private:
  // The first position in [lo, hi) that fails, given that those that hold come first; hi: none.
  template <typename Holds>
  static uint32_t FirstNot(uint32_t lo, uint32_t hi, const Holds& holds);
  template <typename Holds>
  uint32_t Gallop(const Holds& holds);
  uint32_t Descend(WorkerIndex worker);

  const PrefixIndex& index_;
  const std::span<const BlockKey> keys_;
  uint32_t known_ = 0;
  absl::InlinedVector<Level, 32> levels_;
  absl::InlinedVector<Level, 48> asked_;  // by position
};

}  // namespace tidepool
