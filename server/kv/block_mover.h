#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <mutex>
#include <set>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "base/probe.h"
#include "server/kv/kv_context.h"

namespace tidepool {

// What became of a long operation's blocks.
struct MoveTally {
  uint32_t total = 0;
  uint32_t done = 0;     // as asked for now (they may have been before)
  uint32_t skipped = 0;  // missing, in use, pinned, or no room
  uint64_t bytes = 0;    // moved
  std::string note;      // why blocks were skipped: the first reason
};

// How an operation is watched and stopped.
struct MoveControl {
  std::function<bool()> cancelled = [] { return false; };
  std::function<void(const MoveTally&)> progress = [](const MoveTally&) {};
  uint64_t bytes_per_second = 0;  // 0: as fast as it goes
};

// BlockMover: copies blocks between this pool, its disk tier and the pools of peers, batch by batch.
// Blocking: for threads that may wait. Thread-safe. No block that cannot be had is an error: it is counted as
// skipped. Errors: Cancelled (what was moved stays moved); Unavailable where the peer is gone; what FetchNode
// says.
class BlockMover {
 public:
  BlockMover(const KvContext& context, MetricRegistry& metrics);

  // Ends what runs, with Cancelled, and refuses what comes: within a batch, whatever a peer does. Any thread.
  void Stop();

  // From `from`'s pool or disk into the host tier here, where each block is published as soon as it is
  // verified: its bytes by the fetch's COMMIT, its identity by hashing the tokens that the peer names (a
  // block whose tokens nobody knows is skipped). Heads of chains first, as the caller orders them.
  absl::Status Copy(std::span<const BlockKey> keys, const v1::WorkerAddress& from, const MoveControl& control,
                    MoveTally& tally);
  // Those of `keys` that are here, evicted at `from`, as far as it lets them go.
  absl::Status EvictAt(std::span<const BlockKey> keys, const v1::WorkerAddress& from, MoveTally& tally);
  // Disk tier to host tier. FailedPrecondition: no disk tier.
  absl::Status Prefetch(std::span<const BlockKey> keys, const MoveControl& control, MoveTally& tally);
  // Blocks of the disk tier, stored there in fewer bytes; tally.bytes is what that gave back.
  // FailedPrecondition: no disk tier.
  absl::Status Compress(std::span<const BlockKey> keys, const MoveControl& control, MoveTally& tally);
  // Host tier to disk tier: written, and then gone from the host. Pinned blocks stay. FailedPrecondition: no
  // disk tier.
  absl::Status Demote(std::span<const BlockKey> keys, const MoveControl& control, MoveTally& tally);

 private:
  // A call to a peer, which Stop cancels.
  class PeerCall;

  size_t BatchBlocks() const;
  bool Over(const MoveControl& control) const { return stopped_ || control.cancelled(); }
  // Waits until the bytes so far are due; false: cancelled.
  bool Pace(absl::Time began, const MoveControl& control, const MoveTally& tally) const;
  // What `from` knows of those that it holds; `on_disk` gets those that it has on its disk only, of which it
  // knows no tokens.
  absl::StatusOr<std::vector<BlockInfo>> Describe(std::span<const BlockKey> keys,
                                                  const v1::WorkerAddress& from,
                                                  std::vector<BlockKey>& on_disk) const;
  absl::Status PrefetchAt(std::span<const BlockKey> keys, const v1::WorkerAddress& from) const;
  absl::Status CopyBatch(std::span<const BlockInfo> blocks, const v1::WorkerAddress& from,
                         const MoveControl& control, MoveTally& tally);

  const KvContext& context_;
  std::atomic<uint32_t> next_fetch_{0};
  std::mutex demote_mu_;  // held while a batch goes to the disk
  std::atomic<bool> stopped_{false};
  mutable std::mutex calls_mu_;
  mutable std::set<grpc::ClientContext*> calls_;  // under way
  Counter& copied_blocks_;
  Counter& copied_bytes_;
  Counter& prefetched_blocks_;
  Counter& demoted_blocks_;
  Counter& compressed_blocks_;
  Counter& skipped_blocks_;
};

}  // namespace tidepool
