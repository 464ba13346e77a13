#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>

#include "absl/container/flat_hash_set.h"
#include "absl/time/time.h"
#include "base/clock.h"
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
  };

  explicit WriteBehind(Options options);
  // Drops what is queued and waits for what the tier has (the tier answers it within its own time limits).
  ~WriteBehind();

  // Block `key`, published in the pool, is to be stored if it is not yet. Never blocks: for the engine's
  // thread. A block of another process is its owner's to store.
  void Offer(const BlockKey& key, const BlockLease& lease);
  // A use of such a block: offered, unless the tier has it.
  void OfferAgain(const BlockKey& key, const BlockLease& lease);
  // Gives up what is not with the tier yet: its slots are needed.
  void DropQueued();
  // Waits until everything offered so far is written or dropped; false after `grace`, with the rest dropped.
  bool Flush(absl::Duration grace);

  size_t queued() const;  // waiting or being written

 private:
  struct Item {
    BlockKey key;
    BlockLease lease;
  };
  void Run();
  // Holds mu_, unlocks while it asks others.
  void StoreOne(std::unique_lock<std::mutex>& lock);
  void Show();

  const Options options_;
  Counter& stored_;
  Counter& dropped_queue_;
  Counter& dropped_pressure_;
  Counter& dropped_tier_;
  Counter& dropped_cleared_;
  Counter& dropped_grace_;
  Counter& refused_;
  Counter& present_;
  Gauge& queued_gauge_;
  mutable std::mutex mu_;
  std::condition_variable changed_;
  std::deque<Item> queue_;
  absl::flat_hash_set<BlockKey> known_;  // queued or being written
  size_t writing_ = 0;
  bool stop_ = false;
  std::thread thread_;
};

}  // namespace tidepool
