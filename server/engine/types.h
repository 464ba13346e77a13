#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/container/inlined_vector.h"
#include "absl/status/status.h"
#include "absl/time/time.h"
#include "kernels/logits.h"
#include "kvstore/block_pool.h"
#include "kvstore/block_run.h"
#include "kvstore/types.h"
#include "server/engine/token_constraint.h"

namespace tidepool {

struct LogitBias {
  int32_t id = 0;
  float bias = 0;
  bool operator==(const LogitBias&) const = default;
};

// How the next token is drawn; sampler.h says what each does and in which order. The draw for output `i`
// depends on (seed, i), the logits, the prompt and the outputs before it only, so that the worker that
// prefills and the one that decodes draw alike.
struct SamplingParams {
  float temperature = 1.0f;         // >= 0; below 1e-5 is greedy
  int32_t top_k = 0;                // keep the k likeliest; 0: all
  float top_p = 1.0f;               // (0, 1]: keep the likeliest whose mass reaches p
  float min_p = 0.0f;               // [0, 1]: drop what is less likely than min_p times the likeliest
  float typical_p = 1.0f;           // (0, 1]: keep what is closest to the expected surprise; 1: all
  float repetition_penalty = 1.0f;  // > 0; of tokens in prompt or answer; 1: none
  float presence_penalty = 0.0f;    // finite; of tokens in the answer
  float frequency_penalty = 0.0f;   // finite; of tokens in the answer, each time
  uint64_t seed = 0;
  std::vector<LogitBias> logit_bias;            // each id once; at most kLogitBiasMax
  std::vector<int32_t> allowed_token_ids;       // empty: all; each id once; at most kAllowedTokensMax
  std::vector<std::vector<int32_t>> bad_words;  // token sequences, none empty; at most kBadWordsMax

  bool penalises() const {
    return repetition_penalty != 1.0f || presence_penalty != 0.0f || frequency_penalty != 0.0f;
  }
};
inline constexpr size_t kLogitBiasMax = 1024;
inline constexpr size_t kAllowedTokensMax = 8192;
inline constexpr size_t kBadWordsMax = 256;        // sequences: a word may need two, with and without a space
inline constexpr size_t kBadWordTokensMax = 1024;  // of one sequence
inline constexpr size_t kStopTokensMax = 256;

// Inline, so that a token allocates nothing.
using TopLogprobs = absl::InlinedVector<TokenLogprob, kTopLogprobsMax>;

struct OutputToken {
  int32_t id = 0;
  uint32_t index = 0;  // of the answer, contiguous from 0
  float logprob = 0;   // natural log, raw model distribution; 0 where top_logprobs is -1
  TopLogprobs top;     // the top_logprobs likeliest, falling
};

// What the model thought of one token of the prompt.
struct PromptLogprob {
  float logprob = 0;  // natural log, of the raw distribution after the tokens before it
  uint32_t rank = 1;  // 1: the likeliest; equals rank by id
  TopLogprobs top;    // the prompt_logprobs likeliest, falling
};

// What of a prompt's hidden states after the final norm is wanted instead of an answer.
enum class SequencePooling : uint8_t {
  kNone,  // an answer
  kLast,  // the last token's
  kMean,  // the mean over all tokens: summed in double in the order of tokens, however they are computed
};

enum class FinishReason : uint8_t {
  kStop,       // a stop token was drawn, or the constraint allows no token after the last
  kLength,     // max_tokens were drawn
  kPrefilled,  // prefill_only, and the first token was drawn
  kPooled,     // SequenceResult::pooled is what was asked for
  kCancelled,  // Cancel, or the engine stopped
  kError,      // see SequenceResult::status
};
inline constexpr size_t kFinishReasons = 6;
std::string_view FinishReasonName(FinishReason reason);

// Blocks that are read where another process has them: those of a sequence from block `begin` on.
struct InPlaceBlocks {
  uint32_t begin = 0;
  BlockRun run;
};

// What became of a sequence: given exactly once.
struct SequenceResult {
  FinishReason reason = FinishReason::kError;
  absl::Status status;          // not OK for kCancelled and kError only
  int32_t stop_token = -1;      // the token drawn, where reason is kStop; -1 where the constraint ended it
  uint32_t output_tokens = 0;   // drawn, SequenceSpec::emitted_tokens too, a stop token not counted
  absl::Duration queue_time;    // Submit to the first step
  absl::Duration prefill_time;  // first step to the first token; zero where that was given
  // All leases of the sequence, those of sealed blocks published. KV is valid for the first
  // `computed_tokens` tokens (prompt, then answer). After kPrefilled, blocks[prompt / block_tokens] is the
  // unsealed tail (where the prompt has one). Dropping the leases frees the blocks.
  std::vector<BlockLease> blocks;
  std::vector<InPlaceBlocks> in_place;  // as in the spec
  uint32_t computed_tokens = 0;
  std::vector<float> pooled;  // [hidden], with kPooled
};

class PreemptedSequence;  // preempted_sequence.h

// EngineSink: where a sequence's results go. Called on the engine's thread, which every other sequence
// waits for: hand over and return, never block. Calls come in the order: OnBlockSealed in block order, all
// blocks of the prompt before OnToken 0; all OnPromptLogprobs before OnToken 0; OnToken in index order;
// OnFinished last, exactly once. OnPreempted may come at any time before it: nothing more comes then until
// Engine::Resume, and goes on where it was; blocks that are computed again are told of again.
class EngineSink {
 public:
  virtual ~EngineSink() = default;
  // Block `index` of the sequence is full and published in the pool under `key`. Clone the lease to keep
  // the block. Not called for the blocks that were published when the sequence came, here or by the process
  // that they are read in.
  virtual void OnBlockSealed(uint32_t index, const BlockKey& key, const BlockLease& lease) = 0;
  // Only where SequenceSpec::stream_layers asks for it, once, when the step begins that computes the rest of
  // the prompt: blocks [first, first + blocks.size()) hold all of the prompt's KV after it, the last perhaps
  // an unsealed tail. Nothing but that step's KV is missing in them, and layer after layer comes to be there.
  // Clone a lease to keep a block. The block is sealed later (OnBlockSealed may name another slot of equal
  // contents).
  virtual void OnLastChunk(uint32_t /*first*/, std::span<const BlockLease> /*blocks*/) {}
  // Layers [0, layers) of those blocks are complete and not written again. 0: the step failed and is
  // repeated; what was said of its layers no longer holds, and no more is said. A step may also fail after
  // the model's last layer: somebody may read those blocks already, so the sequence ends with an error then.
  virtual void OnLayersComputed(uint32_t /*layers*/) {}
  // The prompt's next logprobs, in order; the first call begins with prompt token 1 (nothing stands before
  // token 0). Only where SequenceSpec::prompt_logprobs asks for them.
  virtual void OnPromptLogprobs(std::vector<PromptLogprob>) {}
  // The stop token is not given here (see SequenceResult::stop_token), except with prefill_only, where the
  // first token always is: the engine that decodes judges it.
  virtual void OnToken(OutputToken token) = 0;
  // Only where SequenceSpec::preemptible allows it: the sequence has left the engine, which holds nothing of
  // it any more. It ends when it is dropped.
  virtual void OnPreempted(std::unique_ptr<PreemptedSequence>) {}
  virtual void OnFinished(SequenceResult result) = 0;
};

// SequenceSpec: one request as the engine takes it.
//
// Blocks: `blocks` covers at least the prompt; the engine reserves more from its pool, one by one, when
// the answer outgrows them (where the pool has none then, the last in rank of those that may be preempted is,
// itself perhaps; where none may, the sequence ends with ResourceExhausted). The first
// `published_blocks` may be leases on shared, published blocks and are never written. The next ones, up to
// `computed_tokens`, hold valid KV already (fetched): those that are this process's own are published by the
// engine, those of another process (`in_place`) stay as they are. The rest, with the block of token
// `computed_tokens`, is the sequence's own, and written.
//
// A prefix hit may cover whole blocks only, and never the whole prompt: the last token has to be computed
// to give logits, and its block must be writable for that. So a caller reuses at most
// ReusableBlocks(prompt size, block_tokens) blocks.
struct SequenceSpec {
  std::string request_id;  // unique among the engine's live sequences
  std::vector<int32_t> tokens;
  // The last so many of `tokens` are no prompt but the answer's first, drawn before by an engine that is
  // gone: the answer goes on behind them, as if they had been drawn here. They are computed and sealed as a
  // prompt is, they count against max_tokens and min_tokens, in penalties and bad words, and are not told to
  // the sink again; the first draw has their number as its index. `constraint` has accepted them. Where
  // max_tokens are there already the sequence ends at once.
  uint32_t emitted_tokens = 0;
  std::vector<BlockLease> blocks;
  // In rising order, all inside the blocks that were fetched; `blocks` is empty there.
  std::vector<InPlaceBlocks> in_place;
  uint32_t published_blocks = 0;
  uint32_t computed_tokens = 0;  // [published_blocks * block_tokens, prompt), or the prompt with first_token

  // The first token of the answer where another engine drew it (handoff): all of the prompt's KV is in
  // `blocks`. It comes out of OnToken again as index 0, so that a sink sees every answer alike.
  std::optional<OutputToken> first_token;

  BlockKey root;  // of the block keys: RootKey(fingerprint, layout, salt, codec)
  // What is remembered of the blocks that it seals (BlockInfo).
  std::string tenant;
  uint64_t session = 0;
  uint32_t turn = 0;
  SamplingParams sampling;
  // What the answer is held to; null: nothing. With first_token, it has not seen that token yet. sampler.h
  // says what it does to a draw; sequences that end because of it end with kStop. Where CanEnd(), the stop
  // tokens may be drawn too. A stop token that the constraint allows as part of the answer may be drawn at
  // any time and ends the answer there, as a stop string would. min_tokens does not outlive MustEnd(): a
  // complete answer is not padded. Without stop tokens (ignore_eos) the answer goes on to MustEnd() or to
  // max_tokens. Where nothing is left to draw, the sequence ends with InvalidArgument.
  std::unique_ptr<TokenConstraint> constraint;
  uint32_t max_tokens = 1;              // of the answer, >= 1; prompt + max_tokens <= max_model_len
  uint32_t min_tokens = 0;              // until then no stop token is drawn
  std::vector<int32_t> stop_token_ids;  // end of sequence included, unless ignored; at most kStopTokensMax
  int32_t top_logprobs = -1;            // -1: no logprobs; 0: the drawn token's; up to kTopLogprobsMax
  // As top_logprobs, for the prompt's own tokens. The whole prompt is computed here then: computed_tokens
  // is 0, and there is neither first_token nor prefill_only.
  int32_t prompt_logprobs = -1;
  bool prefill_only = false;   // finish with kPrefilled after the first token
  bool stream_layers = false;  // tell the sink of the last chunk's layers
  // Instead of an answer: finish with kPooled once the prompt is computed. Nothing is drawn; max_tokens,
  // sampling and stop tokens are not looked at. kMean needs the whole prompt computed here: computed_tokens
  // is 0. With neither first_token, prefill_only, prompt_logprobs nor constraint.
  SequencePooling pooling = SequencePooling::kNone;
  bool normalize = false;    // the pooled vector to Euclidean length 1 (one of length 0 stays)
  bool batch_class = false;  // yields to all that are not (see BatchCore)
  int32_t priority = 0;      // higher runs first, inside the class
  // It may have to give up its blocks and go on later (EngineSink::OnPreempted), unless config.preemption is
  // off. With neither prefill_only, prompt_logprobs nor pooling.
  bool preemptible = false;
  std::shared_ptr<EngineSink> sink;
};

// How many leading blocks of a prompt may come from elsewhere when the prompt is to be prefilled here.
inline uint32_t ReusableBlocks(size_t prompt_tokens, uint32_t block_tokens) {
  return prompt_tokens == 0 ? 0 : static_cast<uint32_t>((prompt_tokens - 1) / block_tokens);
}

// Measurements for the latency model.
struct PrefillObservation {
  uint32_t new_tokens = 0;
  uint32_t cached_tokens = 0;
  double seconds = 0;  // of compute: each step's time times this sequence's share of the step's tokens
};
struct DecodeObservation {
  uint32_t batch = 0;
  uint64_t context_tokens = 0;  // summed over the batch
  double seconds = 0;           // of one step that only decoded
};
struct EngineObservations {
  std::vector<PrefillObservation> prefills;
  std::vector<DecodeObservation> decodes;
};

struct EngineStats {
  uint32_t running = 0;                 // sequences that hold a place in the batch
  uint32_t waiting = 0;                 // submitted, not (or no more) in the batch
  uint32_t waiting_batch_class = 0;     // of them
  uint64_t queued_prefill_tokens = 0;   // prompt tokens still to be computed, running or waiting
  uint64_t running_context_tokens = 0;  // KV tokens of the running sequences
};

}  // namespace tidepool
