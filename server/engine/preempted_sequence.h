#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "base/probe.h"
#include "kvstore/block_pool.h"
#include "server/engine/preemption.h"

namespace tidepool {

class Sequence;

// How fast a block is copied here, by what was measured. Thread-safe.
class CopySpeed {
 public:
  double bytes_per_second() const { return value_.load(std::memory_order_relaxed); }
  void Observe(size_t bytes, double seconds);

 private:
  std::atomic<double> value_{4e9};  // one core of any server, until the first copy
};

// PreemptedSequence: a sequence between OnPreempted and Engine::Resume: all that draws its next token
// (tokens, grammar, counts) and what is kept of its KV. Dropping it ends the sequence. Handle; one thread at
// a time; the pool and the metrics of its engine outlive it.
class PreemptedSequence {
 public:
  struct Kept {
    Preemption how = Preemption::kRecompute;
    SwappedBlocks blocks;  // the sealed ones
    BlockLease tail;       // what is to be saved; empty: nothing
  };
  PreemptedSequence(std::unique_ptr<Sequence> sequence, Kept kept, std::shared_ptr<CopySpeed> speed,
                    Counter& copied_bytes);
  PreemptedSequence(const PreemptedSequence&) = delete;
  ~PreemptedSequence();

  Preemption how() const { return kept_.how; }
  const std::vector<int32_t>& tokens() const;  // prompt, then answer
  uint32_t outputs() const;                    // of the answer
  uint32_t computed() const;                   // leading tokens that had KV

  // Copies the tail aside and lets go of its slot: to be called soon, but not on the engine's thread.
  void SaveTail();
  // Of computed(), the tokens that are in what SaveTail keeps: [begin, computed()).
  bool has_tail() const { return !tail_.empty(); }
  // Writes it into the block that follows the sealed ones.
  void RestoreTail(std::span<std::byte> block) const;
  // The sealed blocks are leased again, or not wanted any more.
  void DropKept() { kept_.blocks.Drop(); }

 private:
  friend class Engine;
  std::unique_ptr<Sequence> sequence_;
  Kept kept_;
  const std::shared_ptr<CopySpeed> speed_;
  Counter& copied_bytes_;
  std::vector<std::byte> tail_;
};

}  // namespace tidepool
