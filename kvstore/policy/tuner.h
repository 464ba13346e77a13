#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "kvstore/types.h"

namespace tidepool {

class PoolCore;

// PolicyTuner: picks the eviction policy by trying all of them on the side. A sample of the blocks (those
// whose key falls into a fixed share of the key space, so that all requests agree on it, as in SHARDS:
// Waldspurger et al., FAST 2015) is run through one small ghost cache per policy, with a capacity that is the
// same share of the pool's; the ghosts are the pool's own code without memory. After each window of sampled
// lookups the hit rates are compared; a policy that beats the present one by more than the margin in two
// windows running is proposed. Prompts are sampled, not what was generated (the next turn's prompt contains
// it).
//
// Core: no clock, no thread; not thread-safe.
class PolicyTuner {
 public:
  struct Options {
    uint32_t slots = 0;                 // of the pool
    uint32_t ghost_slots = 1024;        // of each ghost: about as many blocks are sampled at a time
    uint64_t window = 16384;            // sampled lookups between two looks
    double margin = 0.01;               // of hit rate, absolute: below it switching costs more than it wins
    std::string policy = "turn-aware";  // in force at first
  };

  struct Score {
    std::string policy;
    double hit_rate = 0;  // of the last full window
  };

  explicit PolicyTuner(const Options& options);
  ~PolicyTuner();

  // A request looked these blocks up. Returns the policy to go over to, if it is time for that.
  std::optional<std::string> OnRequest(std::span<const BlockKey> keys, uint64_t session);

  const std::string& policy() const { return policy_; }
  const std::vector<Score>& scores() const { return scores_; }

 private:
  struct Ghost {
    std::string policy;
    std::unique_ptr<PoolCore> core;
    uint64_t hits = 0;
  };

  bool Sampled(const BlockKey& key) const;
  std::optional<std::string> Compare();

  const Options options_;
  uint64_t threshold_ = 0;  // keys whose hash is below it are sampled
  std::vector<Ghost> ghosts_;
  std::vector<Score> scores_;
  std::string policy_;
  std::string ahead_;  // better than policy_ in the last window; empty: none was
  uint64_t lookups_ = 0;
  std::vector<BlockKey> sample_;
  std::vector<SlotRef> refs_;
};

}  // namespace tidepool
