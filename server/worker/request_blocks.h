#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "server/worker/block_loader.h"
#include "server/worker/worker_context.h"

namespace tidepool {

// A fetch whose slots are set aside, not yet started.
struct PlannedFetch {
  uint32_t begin = 0;    // index of its first block
  std::string peer;      // worker id
  bool growing = false;  // the last of them were still being computed
  FetchSpec spec;        // gone once it is started
};

// What the engine is to do with a prompt, beside what v1::Sampling says of draws.
struct SequenceGoal {
  uint32_t max_tokens = 1;
  uint32_t emitted_tokens = 0;  // as SequenceSpec's
  bool prefill_only = false;
  bool stream_layers = false;
  std::optional<OutputToken> first_token;            // drawn elsewhere; complete() holds
  int32_t prompt_logprobs = -1;                      // nothing was reused then
  SequencePooling pooling = SequencePooling::kNone;  // kMean: nothing was reused then
  bool normalize = false;
  std::unique_ptr<TokenConstraint> constraint;
  bool batch_class = false;
  int32_t priority = 0;  // as SequenceSpec's
  bool preemptible = false;
};

// Whose blocks they are: what BlockInfo remembers of them, and quotas are charged by.
struct BlockOwner {
  std::string tenant;
  uint64_t session = 0;
  uint32_t turn = 0;
};

// RequestBlocks: the slots of one request on one worker while its prompt's KV comes together: what the pool
// had, what is loaded from below or from peers, what is handed over, what is left to compute. Not thread-safe
// (its request's mutex guards it), but loads and fetches end on another thread: see MakeLoader, StartFetch.
class RequestBlocks {
 public:
  // `resumed`: the request has run here already, and was preempted: the pool counts no further use, and
  // nobody a hit, of what it finds again. `prompt` is all that it is to go on behind then.
  RequestBlocks(WorkerContext& context, BlockKey root, std::vector<int32_t> prompt, BlockOwner owner,
                bool resumed = false);

  // Leases the prompt's published prefix (unless `reuse` is false: all of it is to be computed) and reserves
  // the rest of `total_tokens`. False: no slots now; nothing is held then. `batch_class`: leaves a quarter of
  // the pool to online requests, unless nobody else uses it. However often it is called, the pool counts one
  // use of the prefix.
  bool TryReserve(uint32_t total_tokens, bool reuse = true, bool batch_class = false);

  // After TryReserve: the blocks that it holds, or how many it was short of (at least 1).
  size_t held() const { return blocks_.size(); }
  size_t missing() const { return missing_; }

  uint32_t block_tokens() const { return context_.layout.block_tokens; }
  const std::vector<int32_t>& prompt() const { return prompt_; }
  const BlockKey& root() const { return root_; }
  const std::vector<BlockKey>& keys() const { return keys_; }  // of the prompt's sealed blocks
  bool has_tail() const { return prompt_.size() % block_tokens() != 0; }
  BlockKey TailKey() const;
  // Leading blocks that are published here: what the pool had, and what was loaded.
  uint32_t published() const { return published_; }
  // Of them: where they were loaded from.
  uint32_t loaded(LoadedFrom from) const { return loaded_[static_cast<size_t>(from)]; }
  // Leading blocks that may come from elsewhere if the prompt is prefilled here.
  uint32_t reusable() const { return ReusableBlocks(prompt_.size(), block_tokens()); }
  // Leading blocks that are here and valid: published, or fetched.
  uint32_t ready() const;
  // Leading tokens that the engine need not compute if the prompt is prefilled here.
  uint32_t ready_tokens() const { return std::min(ready(), reusable()) * block_tokens(); }
  // True when all of the prompt's KV is here, tail included.
  bool complete() const;
  BlockLease& at(uint32_t index) { return blocks_[index]; }

  // What loads the blocks that follow the published ones, where that is faster than computing them (as
  // config.kv.load says); null: nothing is to be loaded. Pass its result to EndLoad, under the request's
  // mutex.
  std::shared_ptr<BlockLoader> MakeLoader(
      const std::string& attempt_id, uint32_t attempt,
      const google::protobuf::RepeatedPtrField<v1::PrefixHolder>& holders);
  void EndLoad(BlockLoader::Result result);

  // Moves blocks [begin, end) into a fetch from `peer`; `end` may be keys().size() + 1 to include the tail.
  // Pass the result to EndFetch (under the request's mutex).
  PlannedFetch StartFetch(const std::string& attempt_id, uint32_t attempt, const PeerAddress& peer,
                          uint32_t begin, uint32_t end, bool growing);
  // Takes the slots back. False: something of it is missing.
  bool EndFetch(const PlannedFetch& fetch, FetchResult result);
  uint32_t fetches_pending() const { return pending_; }
  uint32_t fetched_blocks() const { return fetched_blocks_; }
  uint64_t fetched_bytes() const { return fetched_bytes_; }
  // How the last of them came: "arena", or a transport's name. Empty: none was handed over.
  std::string_view transport() const { return transport_; }

  // BlockInfo of a sealed block of the prompt.
  BlockInfo InfoOf(uint32_t index) const;

  // Hands the prompt and all leases to the engine. Slots that a failed fetch left quarantined are replaced by
  // others of the request's own: those set aside for blocks in place, or for the answer, and only where it
  // has neither by one more of the pool. Errors: as Engine::Submit, ResourceExhausted where no slot is left;
  // nothing is held here then either.
  absl::Status Submit(const std::string& attempt_id, const v1::Sampling& sampling, SequenceGoal goal,
                      std::shared_ptr<EngineSink> sink);
  // Hands all leases to the engine for a sequence that was preempted, whose tokens are the prompt here, and
  // with them the tail that was saved, where the blocks before it are here. Nothing is held here then.
  // Errors: as Engine::Resume; ResourceExhausted, and `sequence` as it was: a slot was quarantined, and none
  // is left.
  absl::Status Resume(std::unique_ptr<PreemptedSequence>& sequence, uint32_t keep_until_outputs);
  // Gives back what is held here; what a fetch still holds comes back with its result.
  void Drop() {
    BlockLease::DropAll(std::exchange(blocks_, {}));
    for (InPlace& there : std::exchange(in_place_, {})) BlockLease::DropAll(std::move(there.own));
  }

 private:
  // What was handed over in place: `blocks_` is empty there.
  struct InPlace {
    InPlaceBlocks blocks;
    // The slots that were set aside for them. Behind a gap they are computed here after all.
    std::vector<BlockLease> own;
  };

  // What follows the loaded blocks may be here, behind a gap: an answer's, whose prompt was read in place.
  void LeaseFollowing();
  // Gives `spec` the blocks: in place what is usable, in slots of this pool the rest.
  absl::Status TakeBlocks(SequenceSpec& spec);

  WorkerContext& context_;
  const BlockKey root_;
  const std::vector<int32_t> prompt_;
  const std::vector<BlockKey> keys_;
  const BlockOwner owner_;
  std::vector<BlockLease> blocks_;
  std::vector<InPlace> in_place_;
  std::vector<bool> valid_;  // per block of the prompt
  const bool resumed_;
  bool counted_;  // as a use of what the pool has
  size_t missing_ = 0;
  uint32_t published_ = 0;
  std::array<uint32_t, kLoadedFrom> loaded_{};
  uint32_t parts_ = 0;
  uint32_t pending_ = 0;
  uint32_t fetched_blocks_ = 0;
  uint64_t fetched_bytes_ = 0;
  std::string_view transport_;
};

}  // namespace tidepool
