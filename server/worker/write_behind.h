#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <thread>

#include "absl/time/time.h"
#include "base/probe.h"
#include "kvstore/block_pool.h"
#include "kvstore/block_tier.h"

namespace tidepool {

// WriteBehind: copies sealed blocks to the tier below the pool, after the fact: nobody waits for it. Driver:
// owns a thread. A block that is offered is leased (kind tier I/O) until it is written, so at most
// `max_queued` wait; beyond that, and when the pool needs the slots (DropQueued), stores are dropped and
// counted: the block is then in the host tier only until it is offered again, which a hit does. What `admit`
// refuses is not written. Thread-safe.
class WriteBehind {
 public:
  struct Options {
    BlockPool* pool = nullptr;  // these outlive it
    BlockTier* tier = nullptr;
    MetricRegistry* metrics = nullptr;
    size_t max_queued = 256;  // blocks
    size_t max_writing = 8;   // of them, given to the tier and not answered
    // Whether the block is worth a write; called on the thread, once for each offer. Null: all are.
    std::function<bool(const BlockInfo&)> admit;
    // A block that the tier has was used; called by whoever offers it, the engine's thread too. May be null.
    std::function<void(const BlockKey&)> used;
    absl::Duration end_wait = absl::Seconds(2);  // at the end, for what the tier has
  };

  explicit WriteBehind(Options options);
  // Drops what is queued and waits for what the tier has, as long as end_wait. What it answers later, at its
  // own end at the latest, gives the leases back; pool and metrics are still there then.
  ~WriteBehind();

  // Block `key`, published in the pool, is to be stored if it is not yet. Never blocks: for the engine's
  // thread.
  void Offer(const BlockKey& key, const BlockLease& lease);
  // A use of such a block: offered, unless the tier has it; that counts as a use, too (Options::used).
  void OfferAgain(const BlockKey& key, const BlockLease& lease);
  // Gives up what is not with the tier yet: its slots are needed.
  void DropQueued();
  // Waits until everything offered so far is written or dropped; false after `grace`, with the rest dropped.
  bool Flush(absl::Duration grace);

  size_t queued() const;  // waiting or being written

 private:
  struct Impl;  // shared with what the tier has not answered
  const std::shared_ptr<Impl> impl_;
  std::thread thread_;
};

}  // namespace tidepool
