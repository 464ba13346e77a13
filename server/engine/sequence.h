#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "server/engine/mask_worker.h"
#include "server/engine/model_runner.h"
#include "server/engine/sampler.h"
#include "server/engine/types.h"

namespace tidepool {

// Every number of `spec` against its range and the model's limits. InvalidArgument names field, value and
// limit.
absl::Status ValidateSequence(const SequenceSpec& spec, const BlockLayout& layout, uint32_t vocab,
                              uint32_t max_model_len);

// Of these, what is about blocks, for a sequence of `prompt` tokens to be prefilled.
absl::Status ValidateBlocks(std::span<const BlockLease> blocks, size_t prompt, uint32_t published_blocks,
                            uint32_t computed_tokens, bool first_token, const BlockLayout& layout,
                            std::span<const InPlaceBlocks> in_place = {});

// Of these, what is about drawing: sampling, stop tokens, logprobs.
absl::Status ValidateDrawing(const SequenceSpec& spec, uint32_t vocab);

// Sequence: the page table and the progress of one request inside the engine. Owned by the engine's thread.
class Sequence {
 public:
  // `spec` was validated. Hashes the prompt's blocks, so it is made on the caller's thread.
  Sequence(SequenceSpec spec, uint32_t block_tokens, uint32_t vocab, absl::Time now);

  const SequenceSpec& spec() const { return spec_; }
  EngineSink& sink() const { return *spec_.sink; }
  // What is prefilled: the prompt, and what of the answer was given.
  uint32_t prompt_tokens() const { return prompt_tokens_; }
  // Of the answer, those given included.
  uint32_t outputs() const { return static_cast<uint32_t>(tokens().size()) - answer_begin_; }
  const std::vector<int32_t>& tokens() const { return spec_.tokens; }  // prompt, then answer
  uint32_t computed() const { return spec_.computed_tokens; }
  std::byte* const* block_bases() const { return bases_.data(); }
  uint32_t sealed() const { return sealed_; }  // leading blocks that are published
  uint32_t sealed_here() const;                // of them, those in this process's slots
  // The prompt's other blocks, a tail included.
  std::span<const BlockLease> unsealed_blocks() const {
    return std::span(spec_.blocks)
        .first((prompt_tokens_ + block_tokens_ - 1) / block_tokens_)
        .subspan(sealed_);
  }

  // Makes room for KV of tokens [0, context); reserves from the pool what is missing.
  absl::Status EnsureBlocks(uint32_t context, BlockPool& pool);
  // `n` more tokens have KV: publishes the blocks that this filled. `token_seconds`: what computing a token
  // of a prompt takes here; 0: not known.
  void Computed(uint32_t n, double token_seconds, BlockPool& pool);
  void Append(int32_t token) {
    spec_.tokens.push_back(token);
    if (counts_) counts_->AddOutput(token);
  }

  // Null where nothing constrains the answer.
  const std::shared_ptr<ConstraintRun>& constraint() const { return constraint_; }
  bool pooled() const { return spec_.pooling != SequencePooling::kNone; }
  // Hidden states that the next `n` tokens contribute to what is pooled.
  uint32_t PooledRows(uint32_t n, bool last) const;
  // Takes them, [rows, hidden], in the order of tokens.
  void Pool(std::span<const float> states, uint32_t hidden);

  // What the next draw looks at; valid until Append. The constraint's mask must be there.
  SampleInput sample_input() const;
  bool IsStop(int32_t token) const;

  bool preemptible() const { return spec_.preemptible; }
  uint32_t tail_tokens() const {
    return computed() - sealed_ * block_tokens_;
  }  // KV behind the sealed blocks
  // Gives up all blocks; what is kept of them is the caller's then. Until Resume nothing else is called but
  // tokens(), outputs(), computed() and spec().
  struct Vacated {
    SwappedBlocks blocks;  // with `keep`: the sealed ones
    BlockLease tail;       // with `keep_tail`: where there are tail_tokens()
  };
  Vacated Vacate(bool keep, bool keep_tail, BlockPool& pool);
  // It goes on with other blocks, which hold the KV of its first `computed` tokens; all the others, of prompt
  // and answer, are to be prefilled.
  void Resume(std::vector<BlockLease> blocks, uint32_t published, uint32_t computed);

  // What SequenceResult says of it; the leases move out.
  SequenceResult Finish(FinishReason reason, absl::Status status, int32_t stop_token);

  absl::Time submitted, started = absl::InfiniteFuture(), first_token = absl::InfiniteFuture();
  bool begun = false;          // counts no longer as waiting for max_waiting_per_tenant
  uint32_t cached_tokens;      // had KV when it came
  double compute_seconds = 0;  // of its prefill so far
  // Logits of a token whose mask was late, and since when they wait.
  std::vector<float> late_logits;
  absl::Time late_since;
  bool mask_asked = false;                           // for the mask of its next token
  uint64_t order = 0;                                // of arrival, which a preemption does not change
  bool resumed = false;                              // was preempted before
  absl::Time preempted_at = absl::InfiniteFuture();  // until its first step after it
  uint32_t keep_until_outputs = 0;                   // as Engine::ResumeWith's
  // Until it resumes, then those of them that were computed before: nobody is charged twice for a prompt.
  uint32_t computed_before = 0;
  bool timed = true;  // no step of its prefill scored a prompt: that takes longer than computing one

 private:
  std::vector<float> TakePooled();

  SequenceSpec spec_;
  uint32_t prompt_tokens_;
  const uint32_t answer_begin_;  // where in tokens() the answer begins
  const uint32_t block_tokens_;
  std::vector<std::byte*> bases_;      // of spec_.blocks, and in their gaps of spec_.in_place
  size_t in_place_sealed_ = 0;         // of spec_.in_place
  std::vector<BlockKey> keys_;         // of the prompt's full blocks, then of the answer's as they seal
  uint32_t sealed_;                    // blocks published
  std::optional<TokenCounts> counts_;  // where the request has penalties
  std::shared_ptr<ConstraintRun> constraint_;
  std::vector<double> pool_sum_;  // [hidden] once the first state is there
};

}  // namespace tidepool
