#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <optional>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/time/time.h"
#include "kvstore/types.h"

namespace tidepool {

// FollowCore: which blocks a store takes over from the workers whose events it follows. Core: no thread, no
// clock. Most blocks are never asked for again (three of four on the conversation trace), so by default only
// those of chains that proved to be used are taken:
//
//   - a block is stored under a parent that was stored more than `carried_on_after` before: a later request
//     carried the conversation on;
//   - two different blocks follow one parent: several requests share what comes before them.
//
// Then the chain from its first block on is taken, and from then on what is added to it. Not thread-safe.
class FollowCore {
 public:
  struct Options {
    bool all = false;  // every sealed block is taken
    // Longer than a decode takes for a block: that is the same request going on.
    absl::Duration carried_on_after = absl::Seconds(10);
    size_t max_blocks = 1 << 18;  // remembered, about 150 bytes each; the oldest are forgotten
    size_t max_wanted = 1 << 16;  // waiting to be taken; beyond it the oldest are dropped
  };
  struct Wanted {
    std::string worker_id;  // that has them
    std::vector<BlockKey> keys;
  };

  explicit FollowCore(const Options& options) : options_(options) {}

  // `worker` stored a block. `parent`: absent where it is not known.
  void OnStored(const std::string& worker, const BlockKey& key, const std::optional<BlockKey>& parent,
                absl::Time now);
  void OnRemoved(const std::string& worker, const BlockKey& key);
  // Nothing that this worker stored is there any more, as far as we know.
  void OnGone(const std::string& worker);

  // The next blocks to take, all from one worker, heads first; at most `max`. Empty: nothing.
  Wanted Take(size_t max);

  size_t wanted() const { return queue_.size(); }
  uint64_t dropped() const { return dropped_; }

 private:
  struct Block {
    std::optional<BlockKey> parent;
    std::optional<BlockKey> child;  // the first that followed
    std::string worker;
    absl::Time stored_at;
    bool taken = false;  // asked for, with all before it
  };

  void Want(const BlockKey& key);
  void Forget();

  const Options options_;
  absl::flat_hash_map<BlockKey, Block> blocks_;
  std::deque<BlockKey> order_;  // of arrival; may name what is gone
  std::deque<BlockKey> queue_;  // wanted, heads before tails
  uint64_t dropped_ = 0;
};

}  // namespace tidepool
