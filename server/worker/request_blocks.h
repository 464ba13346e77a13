#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "server/worker/worker_context.h"

namespace tidepool {

// A fetch whose slots are set aside, not yet started.
struct PlannedFetch {
  uint32_t begin = 0;  // index of its first block
  FetchSpec spec;
};

// What the engine is to do with a prompt, beside what v1::Sampling says of draws.
struct SequenceGoal {
  uint32_t max_tokens = 1;
  bool prefill_only = false;
  std::optional<OutputToken> first_token;            // drawn elsewhere; complete() holds
  int32_t prompt_logprobs = -1;                      // nothing was reused then
  SequencePooling pooling = SequencePooling::kNone;  // kMean: nothing was reused then
  bool normalize = false;
  std::unique_ptr<TokenConstraint> constraint;
  bool batch_class = false;
  int32_t priority = 0;  // as SequenceSpec's
};

// RequestBlocks: the slots of one request on one worker while its prompt's KV comes together: what the pool
// had, what is fetched, what is left to compute. Not thread-safe (its request's mutex guards it), but
// fetches end on another thread: see StartFetch.
class RequestBlocks {
 public:
  RequestBlocks(WorkerContext& context, BlockKey root, std::vector<int32_t> prompt);

  // Leases the prompt's published prefix (unless `reuse` is false: all of it is to be computed) and reserves
  // the rest of `total_tokens`. False: no slots now; nothing is held then. `batch_class`: leaves a quarter of
  // the pool to online requests, unless nobody else uses it.
  bool TryReserve(uint32_t total_tokens, bool reuse = true, bool batch_class = false);

  uint32_t block_tokens() const { return context_.layout.block_tokens; }
  const std::vector<int32_t>& prompt() const { return prompt_; }
  const BlockKey& root() const { return root_; }
  const std::vector<BlockKey>& keys() const { return keys_; }  // of the prompt's sealed blocks
  bool has_tail() const { return prompt_.size() % block_tokens() != 0; }
  BlockKey TailKey() const;
  // Leading blocks that the pool had.
  uint32_t published() const { return published_; }
  // Leading blocks that may come from elsewhere if the prompt is prefilled here.
  uint32_t reusable() const { return ReusableBlocks(prompt_.size(), block_tokens()); }
  // Leading blocks that are here and valid: published, or fetched.
  uint32_t ready() const;
  // Leading tokens that the engine need not compute if the prompt is prefilled here.
  uint32_t ready_tokens() const { return std::min(ready(), reusable()) * block_tokens(); }
  // True when all of the prompt's KV is here, tail included.
  bool complete() const;
  BlockLease& at(uint32_t index) { return blocks_[index]; }

  // Calls `f` for the ranges of `holders` that are worth a fetch: not here yet, not from ourselves, of use
  // if the prompt is prefilled here, and each block once (the first holder named is asked).
  void ForEachHolderRange(
      const google::protobuf::RepeatedPtrField<v1::PrefixHolder>& holders,
      const std::function<void(const PeerAddress&, uint32_t begin, uint32_t end)>& f) const;
  // Moves blocks [begin, end) into a fetch from `peer`; `end` may be keys().size() + 1 to include the tail.
  // Pass the result to EndFetch (under the request's mutex).
  FetchSpec StartFetch(const std::string& attempt_id, uint32_t attempt, const PeerAddress& peer,
                       uint32_t begin, uint32_t end);
  // Takes the slots back. False: something of it is missing.
  bool EndFetch(uint32_t begin, FetchResult result);
  uint32_t fetches_pending() const { return pending_; }
  uint32_t fetched_blocks() const { return fetched_blocks_; }
  uint64_t fetched_bytes() const { return fetched_bytes_; }

  // Hands the prompt and all leases to the engine. Slots that a failed fetch left quarantined are replaced.
  // Errors: as Engine::Submit, ResourceExhausted where no slot is left; nothing is held here then either.
  absl::Status Submit(const std::string& attempt_id, const v1::Sampling& sampling, SequenceGoal goal,
                      std::shared_ptr<EngineSink> sink);
  // Gives back what is held here; what a fetch still holds comes back with its result.
  void Drop() { blocks_.clear(); }

 private:
  WorkerContext& context_;
  const BlockKey root_;
  const std::vector<int32_t> prompt_;
  const std::vector<BlockKey> keys_;
  std::vector<BlockLease> blocks_;
  std::vector<bool> valid_;  // per block of the prompt
  uint32_t published_ = 0;
  uint32_t parts_ = 0;
  uint32_t pending_ = 0;
  uint32_t fetched_blocks_ = 0;
  uint64_t fetched_bytes_ = 0;
};

}  // namespace tidepool
