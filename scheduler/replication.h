#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "scheduler/cluster_view.h"
#include "scheduler/types.h"

namespace tidepool {

struct ReplicationOptions {
  uint32_t copies = 2;  // workers that are to hold a hot block; below 2: hot blocks are left where they are
  // Uses, each counting half after `half_life`, from which a block is hot: what one conversation does by
  // itself stays below it.
  double hot_uses = 4;
  absl::Duration half_life = absl::Minutes(1);
  uint64_t bytes_per_second = 64 << 20;            // of all copies together, on average
  absl::Duration look_again = absl::Seconds(5);    // at what has holders enough: a look costs lookups
  absl::Duration retry_after = absl::Seconds(30);  // until what was ordered once is ordered again
  uint32_t run_blocks = 8;        // consecutive blocks of a prompt that are counted and copied together
  size_t max_runs = 8192;         // that are counted; about 400 bytes each
  size_t max_runs_counted = 512;  // of one prompt: its first; beyond them only its own conversation goes
};

// `to` is to copy these blocks from `from`.
struct CopyOrder {
  WorkerAddress from;
  WorkerAddress to;
  std::vector<BlockKey> keys;
};

// ReplicationCore: what should be copied where, so that blocks that many use are on several workers and those
// of a worker that leaves are not lost. Core: no thread, no clock. Counts what prompts use; the copies
// themselves are its driver's work (server/scheduler/replicator.h). Not thread-safe.
class ReplicationCore {
 public:
  explicit ReplicationCore(const ReplicationOptions& options);
  // From now on; what is counted stays.
  void SetOptions(const ReplicationOptions& options) { options_ = options; }

  // A request with this prompt was placed. Costs one lookup per run_blocks blocks.
  void OnPlaced(std::span<const BlockKey> keys, absl::Time now);

  // The copies to be made now, head of a chain first, as far as the byte budget goes: of hot runs that fewer
  // than `copies` ready workers hold, to a store if one has room, else to the idlest worker; and of runs in
  // use that nobody but draining workers holds.
  std::vector<CopyOrder> Step(const ClusterView& view, absl::Time now);

  // What only `worker_id` has in its host tier and no other ready worker anywhere: most used first, then the
  // rest, for which no used block gives way (free slots only). What is on its disk stays there: it is back
  // when the worker is. NotFound: no such worker. ResourceExhausted: nobody to take anything.
  absl::StatusOr<std::vector<CopyOrder>> Evacuation(const ClusterView& view, std::string_view worker_id,
                                                    absl::Time now) const;

  // Copies by which each of `keys` is on `copies` ready workers (or, where `to` is set, there). Keys that
  // nobody holds, or that are there already, are in no order. NotFound: no worker `to`.
  static absl::StatusOr<std::vector<CopyOrder>> Replication(const ClusterView& view,
                                                            std::span<const BlockKey> keys, uint32_t copies,
                                                            std::string_view to);

  size_t runs() const { return runs_.size(); }
  // How many runs are hot.
  size_t hot_runs(absl::Time now) const;

 private:
  struct Run {
    double weight = 0;  // its uses, times Weight of now
    absl::Time ordered_at = absl::InfinitePast();
    absl::Time looked_at = absl::InfinitePast();  // and found to have holders enough
    uint32_t begin = 0;                           // position of its first block
    std::vector<BlockKey> keys;
  };

  // What one use counts now.
  double Weight(absl::Time now) const;
  void Rebase(absl::Time now);
  void Forget(absl::Time now);
  uint64_t TakeBudget(uint64_t bytes, absl::Time now);

  ReplicationOptions options_;
  absl::flat_hash_map<BlockKey, Run> runs_;  // by their last block: it names all before it
  std::optional<absl::Time> counted_from_;
  absl::Time forgot_at_ = absl::InfinitePast();
  double budget_bytes_ = 0;
  std::optional<absl::Time> budget_at_;
};

}  // namespace tidepool
