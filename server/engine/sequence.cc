#include "server/engine/sequence.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "kvstore/keys.h"

namespace tidepool {
namespace {

absl::Status Invalid(const std::string& message) { return absl::InvalidArgumentError(message); }

absl::Status ValidateIds(std::string_view what, std::span<const int32_t> ids, uint32_t vocab) {
  for (size_t i = 0; i < ids.size(); ++i) {
    if (ids[i] < 0 || static_cast<uint32_t>(ids[i]) >= vocab) {
      return Invalid(
          absl::StrCat(std::string(what), "[", i, "] is ", ids[i], "; the vocabulary is [0, ", vocab, ")"));
    }
  }
  return absl::OkStatus();
}

absl::Status ValidateSize(std::string_view what, size_t size, size_t max) {
  if (size <= max) return absl::OkStatus();
  return Invalid(absl::StrCat(std::string(what), " holds ", size, "; at most ", max));
}

absl::Status ValidateSampling(const SamplingParams& s, uint32_t vocab) {
  // Negated comparisons, so that NaN fails.
  if (!(s.temperature >= 0 && std::isfinite(s.temperature))) {
    return Invalid(absl::StrCat("temperature is ", s.temperature, "; it must be finite and at least 0"));
  }
  if (s.top_k < 0) return Invalid(absl::StrCat("top_k is ", s.top_k, "; it must be at least 0 (0: all)"));
  if (!(s.top_p > 0 && s.top_p <= 1))
    return Invalid(absl::StrCat("top_p is ", s.top_p, "; it must be in (0, 1]"));
  if (!(s.min_p >= 0 && s.min_p <= 1))
    return Invalid(absl::StrCat("min_p is ", s.min_p, "; it must be in [0, 1]"));
  if (!(s.typical_p > 0 && s.typical_p <= 1))
    return Invalid(absl::StrCat("typical_p is ", s.typical_p, "; it must be in (0, 1]"));
  if (!(s.repetition_penalty > 0 && std::isfinite(s.repetition_penalty))) {
    return Invalid(
        absl::StrCat("repetition_penalty is ", s.repetition_penalty, "; it must be finite and above 0"));
  }
  if (!std::isfinite(s.presence_penalty))
    return Invalid(absl::StrCat("presence_penalty is ", s.presence_penalty, "; it must be finite"));
  if (!std::isfinite(s.frequency_penalty))
    return Invalid(absl::StrCat("frequency_penalty is ", s.frequency_penalty, "; it must be finite"));
  TP_RETURN_IF_ERROR(ValidateSize("logit_bias", s.logit_bias.size(), kLogitBiasMax));
  for (const LogitBias& b : s.logit_bias) {
    TP_RETURN_IF_ERROR(ValidateIds("logit_bias", std::span(&b.id, 1), vocab));
    if (!std::isfinite(b.bias))
      return Invalid(absl::StrCat("logit_bias of token ", b.id, " is ", b.bias, "; it must be finite"));
  }
  TP_RETURN_IF_ERROR(ValidateSize("allowed_token_ids", s.allowed_token_ids.size(), kAllowedTokensMax));
  TP_RETURN_IF_ERROR(ValidateIds("allowed_token_ids", s.allowed_token_ids, vocab));
  TP_RETURN_IF_ERROR(ValidateSize("bad_words", s.bad_words.size(), kBadWordsMax));
  for (const std::vector<int32_t>& word : s.bad_words) {
    if (word.empty()) return Invalid("bad_words holds an empty token sequence");
    TP_RETURN_IF_ERROR(ValidateSize("a sequence of bad_words", word.size(), kBadWordTokensMax));
    TP_RETURN_IF_ERROR(ValidateIds("bad_words", word, vocab));
  }
  return absl::OkStatus();
}

absl::Status ValidateLogprobs(std::string_view what, int32_t n) {
  if (n >= -1 && n <= kTopLogprobsMax) return absl::OkStatus();
  return Invalid(absl::StrCat(std::string(what), " is ", n, "; it must be in [-1, ", kTopLogprobsMax, "]"));
}

}  // namespace

absl::Status ValidateBlocks(std::span<const BlockLease> blocks, size_t prompt, uint32_t published_blocks,
                            uint32_t computed_tokens, bool first_token, const BlockLayout& layout,
                            std::span<const InPlaceBlocks> in_place) {
  const size_t needed = (prompt + layout.block_tokens - 1) / layout.block_tokens;
  if (blocks.size() < needed) {
    return Invalid(
        absl::StrCat("blocks holds ", blocks.size(), "; a prompt of ", prompt, " tokens takes ", needed));
  }
  const auto check = [&](std::span<const BlockLease> leases) {
    for (const BlockLease& lease : leases) {
      if (lease.empty() || lease.data().size() != layout.block_bytes()) {
        return Invalid(
            absl::StrCat("blocks holds a lease that is empty or of another layout than ", layout.ToString()));
      }
    }
    return absl::OkStatus();
  };
  size_t at = 0;
  for (const InPlaceBlocks& there : in_place) {
    const size_t least = std::max<size_t>(at, published_blocks), end = there.begin + there.run.size();
    const size_t most = computed_tokens / layout.block_tokens;
    if (there.run.empty() || there.begin < least || end > most || end > blocks.size()) {
      return Invalid(absl::StrCat("in_place holds blocks [", there.begin, ", ", end,
                                  ") of another process, which cannot be written; they must be in [", least,
                                  ", ", most, ")"));
    }
    if (there.run.data(0).size() != layout.block_bytes())
      return Invalid(absl::StrCat("in_place holds blocks of another layout than ", layout.ToString()));
    TP_RETURN_IF_ERROR(check(blocks.subspan(at, there.begin - at)));
    at = end;
  }
  TP_RETURN_IF_ERROR(check(blocks.subspan(at)));
  const size_t published_tokens = size_t{published_blocks} * layout.block_tokens;
  const size_t computed_max = first_token ? prompt : prompt - 1;
  if (computed_tokens < published_tokens || computed_tokens > computed_max ||
      (first_token && computed_tokens != prompt)) {
    return Invalid(absl::StrCat(
        "computed_tokens is ", computed_tokens, "; with ", published_blocks, " published blocks it must be ",
        first_token ? absl::StrCat(prompt, " (the prompt, as first_token is given)")
                    : absl::StrCat("in [", published_tokens, ", ", computed_max, "]")));
  }
  return absl::OkStatus();
}

absl::Status ValidateDrawing(const SequenceSpec& spec, uint32_t vocab) {
  TP_RETURN_IF_ERROR(ValidateSize("stop_token_ids", spec.stop_token_ids.size(), kStopTokensMax));
  TP_RETURN_IF_ERROR(ValidateLogprobs("top_logprobs", spec.top_logprobs));
  TP_RETURN_IF_ERROR(ValidateLogprobs("prompt_logprobs", spec.prompt_logprobs));
  return ValidateSampling(spec.sampling, vocab);
}

absl::Status ValidateSequence(const SequenceSpec& spec, const BlockLayout& layout, uint32_t vocab,
                              uint32_t max_model_len) {
  if (spec.sink == nullptr) return Invalid("sink is null");
  if (spec.request_id.empty()) return Invalid("request_id is empty");
  if (spec.tokens.empty()) return Invalid("the prompt is empty; it must hold at least one token");
  const bool pooled = spec.pooling != SequencePooling::kNone;
  if (spec.max_tokens < 1 && !pooled) return Invalid("max_tokens is 0; it must be at least 1");
  if (spec.emitted_tokens >= spec.tokens.size()) {
    return Invalid(absl::StrCat("emitted_tokens is ", spec.emitted_tokens, " of ", spec.tokens.size(),
                                " tokens; the prompt must hold at least one"));
  }
  if (spec.emitted_tokens > 0 && (pooled || spec.prompt_logprobs >= 0)) {
    return Invalid("emitted_tokens goes with neither pooling nor prompt_logprobs");
  }
  if (!spec.prefill_only && !pooled &&
      (spec.emitted_tokens > spec.max_tokens ||
       (spec.first_token && spec.emitted_tokens == spec.max_tokens))) {
    return Invalid(absl::StrCat("emitted_tokens is ", spec.emitted_tokens,
                                spec.first_token ? ", with first_token" : "", ", and max_tokens ",
                                spec.max_tokens, ": that is more than the whole answer"));
  }
  const uint64_t prompt = uint64_t{spec.tokens.size()} - spec.emitted_tokens;
  if (std::max<uint64_t>(prompt + (spec.prefill_only || pooled ? 0 : spec.max_tokens), spec.tokens.size()) >
      max_model_len) {
    return Invalid(absl::StrCat("the prompt's ", prompt, " tokens and max_tokens ", spec.max_tokens,
                                " exceed max_model_len ", max_model_len));
  }
  TP_RETURN_IF_ERROR(ValidateIds("prompt", spec.tokens, vocab));
  if (spec.first_token)
    TP_RETURN_IF_ERROR(ValidateIds("first_token", std::span(&spec.first_token->id, 1), vocab));
  if (spec.first_token && spec.prefill_only)
    return Invalid("prefill_only with first_token: nothing is left to do");
  if (spec.prompt_logprobs >= 0 && (spec.computed_tokens > 0 || spec.first_token || spec.prefill_only)) {
    return Invalid("prompt_logprobs needs the whole prompt computed here, and its answer");
  }
  if (pooled && (spec.first_token || spec.prefill_only || spec.prompt_logprobs >= 0 || spec.constraint)) {
    return Invalid(
        "pooling gives no answer: it goes with neither first_token, prefill_only, prompt_logprobs"
        " nor a constraint");
  }
  if (spec.pooling == SequencePooling::kMean && spec.computed_tokens > 0) {
    return Invalid(absl::StrCat("computed_tokens is ", spec.computed_tokens,
                                "; the mean of all hidden states needs the whole prompt computed here"));
  }
  if (spec.preemptible && (spec.prefill_only || spec.prompt_logprobs >= 0 || pooled)) {
    return Invalid("preemptible goes with neither prefill_only, prompt_logprobs nor pooling");
  }
  if (!pooled) TP_RETURN_IF_ERROR(ValidateDrawing(spec, vocab));
  return ValidateBlocks(spec.blocks, spec.tokens.size(), spec.published_blocks, spec.computed_tokens,
                        spec.first_token.has_value(), layout, spec.in_place);
}

Sequence::Sequence(SequenceSpec spec, uint32_t block_tokens, uint32_t vocab, absl::Time now)
    : submitted(now),
      cached_tokens(spec.computed_tokens),
      spec_(std::move(spec)),
      prompt_tokens_(static_cast<uint32_t>(spec_.tokens.size())),
      answer_begin_(prompt_tokens_ - spec_.emitted_tokens),
      block_tokens_(block_tokens),
      keys_(BlockKeys(spec_.root, spec_.tokens, block_tokens)),
      sealed_(spec_.published_blocks) {
  // Everything that grows by a token or a block is given its room here: steps allocate nothing.
  const size_t tokens_max =
      spec_.prefill_only || pooled() ? prompt_tokens_ : answer_begin_ + spec_.max_tokens;
  const size_t blocks_max = std::max(spec_.blocks.size(), tokens_max / block_tokens_ + 1);
  spec_.tokens.reserve(tokens_max);
  spec_.blocks.reserve(blocks_max);
  bases_.reserve(blocks_max);
  keys_.reserve(blocks_max);
  for (const BlockLease& lease : spec_.blocks)
    bases_.push_back(lease.empty() ? nullptr : lease.data().data());
  for (const InPlaceBlocks& there : spec_.in_place) {
    // Read only: what is written begins behind them.
    for (size_t i = 0; i < there.run.size(); ++i)
      bases_[there.begin + i] = const_cast<std::byte*>(there.run.data(i).data());
  }
  if (spec_.constraint) {
    constraint_ = std::make_shared<ConstraintRun>(std::move(spec_.constraint), spec_.stop_token_ids, vocab);
  }
  if (spec_.sampling.penalises()) {
    counts_.emplace(std::span(spec_.tokens).first(answer_begin_), tokens_max - answer_begin_);
    for (size_t i = answer_begin_; i < prompt_tokens_; ++i) counts_->AddOutput(spec_.tokens[i]);
  }
}

uint32_t Sequence::sealed_here() const {
  uint32_t here = sealed_;
  for (size_t i = 0; i < in_place_sealed_; ++i) here -= static_cast<uint32_t>(spec_.in_place[i].run.size());
  return here;
}

absl::Status Sequence::EnsureBlocks(uint32_t context, BlockPool& pool) {
  const size_t needed = (size_t{context} + block_tokens_ - 1) / block_tokens_;
  if (needed <= spec_.blocks.size()) return absl::OkStatus();
  TP_ASSIGN_OR_RETURN(std::vector<BlockLease> more,
                      pool.Reserve(needed - spec_.blocks.size(), {.tenant = spec_.tenant}));
  for (BlockLease& lease : more) {
    bases_.push_back(lease.data().data());
    spec_.blocks.push_back(std::move(lease));
  }
  return absl::OkStatus();
}

void Sequence::Computed(uint32_t n, double token_seconds, BlockPool& pool) {
  spec_.computed_tokens += n;
  for (; (size_t{sealed_} + 1) * block_tokens_ <= spec_.computed_tokens; ++sealed_) {
    const uint32_t i = sealed_;
    if (in_place_sealed_ < spec_.in_place.size() && spec_.in_place[in_place_sealed_].begin == i) {
      // Sealed and published where they are: however many, nothing is to be done for them.
      sealed_ += static_cast<uint32_t>(spec_.in_place[in_place_sealed_++].run.size()) - 1;
      continue;
    }
    if (i == keys_.size()) {
      const std::span<const int32_t> tokens(spec_.tokens);
      keys_.push_back(ChildKey(i == 0 ? spec_.root : keys_[i - 1],
                               tokens.subspan(size_t{i} * block_tokens_, block_tokens_)));
    }
    BlockInfo info{.key = keys_[i],
                   .parent = i == 0 ? spec_.root : keys_[i - 1],
                   .tenant = spec_.tenant,
                   .session = spec_.session,
                   .turn = spec_.turn,
                   .position = i,
                   .compute_seconds = static_cast<float>(token_seconds * block_tokens_)};
    const auto tokens =
        std::span<const int32_t>(spec_.tokens).subspan(size_t{i} * block_tokens_, block_tokens_);
    info.tokens.assign(tokens.begin(), tokens.end());
    // May hand back another slot with the same contents: somebody published this key first.
    if (i < cached_tokens / block_tokens_) {
      // Fetched, not computed here. One that was cleared meanwhile serves this sequence and nobody else.
      if (!pool.PublishLoaded(spec_.blocks[i], std::move(info))) continue;
    } else {
      spec_.blocks[i] = pool.Publish(std::move(spec_.blocks[i]), std::move(info));
    }
    bases_[i] = spec_.blocks[i].data().data();
    sink().OnBlockSealed(i, keys_[i], spec_.blocks[i]);
  }
}

Sequence::Vacated Sequence::Vacate(bool keep, bool keep_tail, BlockPool& pool) {
  Vacated out;
  std::vector<BlockLease> blocks = std::exchange(spec_.blocks, {});
  spec_.in_place.clear();
  in_place_sealed_ = 0;
  bases_.clear();
  if (keep_tail && tail_tokens() > 0) out.tail = std::move(blocks[sealed_]);
  if (keep) {
    std::vector<BlockLease> sealed(std::make_move_iterator(blocks.begin()),
                                   std::make_move_iterator(blocks.begin() + sealed_));
    blocks.erase(blocks.begin(), blocks.begin() + sealed_);
    out.blocks = pool.SwapOut(std::move(sealed));
  }
  BlockLease::DropAll(std::move(blocks));
  return out;
}

void Sequence::Resume(std::vector<BlockLease> blocks, uint32_t published, uint32_t computed) {
  spec_.blocks = std::move(blocks);
  spec_.first_token.reset();
  spec_.published_blocks = published;
  spec_.computed_tokens = cached_tokens = computed;
  sealed_ = published;
  prompt_tokens_ = static_cast<uint32_t>(spec_.tokens.size());
  const size_t blocks_max =
      std::max(spec_.blocks.size(), (size_t{answer_begin_} + spec_.max_tokens) / block_tokens_ + 1);
  spec_.blocks.reserve(blocks_max);
  bases_.reserve(blocks_max);
  for (const BlockLease& lease : spec_.blocks) bases_.push_back(lease.data().data());
  resumed = true;
  compute_seconds = 0;
  late_logits.clear();
}

uint32_t Sequence::PooledRows(uint32_t n, bool last) const {
  switch (spec_.pooling) {
    case SequencePooling::kNone:
      return 0;
    case SequencePooling::kLast:
      return last ? 1 : 0;
    case SequencePooling::kMean:
      return n;
  }
  return 0;
}

void Sequence::Pool(std::span<const float> states, uint32_t hidden) {
  pool_sum_.resize(hidden);
  for (size_t row = 0; row < states.size(); row += hidden) {
    for (size_t i = 0; i < hidden; ++i) pool_sum_[i] += states[row + i];
  }
}

std::vector<float> Sequence::TakePooled() {
  double scale = spec_.pooling == SequencePooling::kMean ? 1.0 / prompt_tokens_ : 1.0;
  if (spec_.normalize) {
    double squares = 0;
    for (double x : pool_sum_) squares += x * x;
    if (squares > 0) scale = 1 / std::sqrt(squares);
  }
  std::vector<float> out;
  out.reserve(pool_sum_.size());
  for (double x : pool_sum_) out.push_back(static_cast<float>(x * scale));
  return out;
}

SampleInput Sequence::sample_input() const {
  SampleInput input{.index = outputs(),
                    .outputs = std::span(tokens()).subspan(answer_begin_),
                    .counts = counts_ ? &*counts_ : nullptr,
                    .top_logprobs = spec_.top_logprobs};
  if (outputs() < spec_.min_tokens) input.banned = spec_.stop_token_ids;
  if (constraint_) input.mask = constraint_->mask();
  return input;
}

bool Sequence::IsStop(int32_t token) const {
  return outputs() >= spec_.min_tokens && std::find(spec_.stop_token_ids.begin(), spec_.stop_token_ids.end(),
                                                    token) != spec_.stop_token_ids.end();
}

SequenceResult Sequence::Finish(FinishReason reason, absl::Status status, int32_t stop_token) {
  SequenceResult out;
  out.reason = reason;
  out.status = std::move(status);
  out.stop_token = stop_token;
  out.output_tokens = outputs();
  if (started != absl::InfiniteFuture()) {
    out.queue_time = started - submitted;
    if (first_token != absl::InfiniteFuture()) out.prefill_time = first_token - started;
  }
  if (reason == FinishReason::kPooled) out.pooled = TakePooled();
  out.blocks = std::move(spec_.blocks);
  out.in_place = std::move(spec_.in_place);
  out.computed_tokens = spec_.computed_tokens;
  return out;
}

}  // namespace tidepool
