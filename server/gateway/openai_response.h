#pragma once

#include <string>
#include <vector>

#include "server/gateway/request_runner.h"

namespace tidepool {

// OpenAiAnswer: Codec of the answers to one request to OpenAI's JSON, for chat or text completions, whole or
// in chunks. All chunks share id, created and model. Not thread-safe.
class OpenAiAnswer {
 public:
  // `tokenizer` is borrowed. `created`: Unix seconds.
  OpenAiAnswer(const InferenceRequest& request, std::string model, std::string fingerprint, int64_t created,
               const Tokenizer& tokenizer);

  void Begin(const Admission& admission);
  void AddPromptLogprobs(std::vector<PromptScore> scores);

  // The stream, in the order in which the chunks of one choice go out; each is one JSON object.
  // Chat: the role; text: the echoed prompt, with its logprobs where asked for, or empty (nothing to send).
  std::string FirstChunk(uint32_t choice);
  std::string DeltaChunk(uint32_t choice, const OutputDelta& delta, const TokenUsage& usage);
  std::string FinishChunk(uint32_t choice, const ChoiceEnd& end, const TokenUsage& usage, bool with_trace);
  std::string UsageChunk(const Outcome& outcome, bool with_trace);

  // The whole answer: Append deltas, End each choice, then Whole.
  void Append(uint32_t choice, OutputDelta delta);
  void Clear(uint32_t choice);
  void End(uint32_t choice, ChoiceEnd end) { choices_[choice].end = std::move(end); }
  std::string Whole(const Outcome& outcome);

 private:
  struct Choice {
    OutputDelta all;
    ChoiceEnd end;
    size_t text_offset = 0;  // code points before the next token
  };

  OrderedJson Head(bool chunk) const;
  OrderedJson ChunkWith(OrderedJson choice, const TokenUsage* usage) const;
  OrderedJson Logprobs(Choice& choice, const std::vector<DeliveredToken>& tokens, bool with_prompt);
  OrderedJson ChatLogprobs(const std::vector<DeliveredToken>& tokens) const;
  // The legacy lists' entries for the echoed prompt.
  void AddPrompt(OrderedJson& lists) const;
  // {text: logprob} of the likeliest and of the token itself.
  OrderedJson TopOf(int32_t id, float logprob, const std::vector<OutputLogprob>& top) const;
  // vLLM's prompt_logprobs: null, then {id: {logprob, rank, decoded_token}} for each prompt token.
  OrderedJson PromptLogprobs() const;

  const bool chat_, include_usage_, continuous_, token_ids_, trace_, echo_;
  const int logprobs_, prompt_logprobs_;  // -1: none
  const std::string model_, fingerprint_;
  const int64_t created_;
  const Tokenizer& tokenizer_;
  std::string id_;
  std::vector<int32_t> prompt_ids_;
  std::string prompt_text_;
  std::vector<PromptScore> prompt_scores_;
  std::vector<Choice> choices_;
};

OrderedJson UsageJson(const TokenUsage& usage);
OrderedJson TraceJson(const RequestTrace& trace);

}  // namespace tidepool
