#pragma once

#include <span>
#include <string>
#include <vector>

#include "server/gateway/answer_encoder.h"

namespace tidepool {

// OpenAiAnswer: Codec of the answers to one request to OpenAI's JSON, for chat or text completions, whole or
// in chunks. All chunks share id, created and model. See AnswerEncoder.
class OpenAiAnswer final : public AnswerEncoder {
 public:
  // `tokenizer` is borrowed. `created`: Unix seconds.
  OpenAiAnswer(const InferenceRequest& request, std::string model, std::string fingerprint, int64_t created,
               const Tokenizer& tokenizer);

  void Begin(const Admission& admission) override;
  void AddPromptLogprobs(std::vector<PromptScore> scores) override;

  // Chat: the role; text: the echoed prompt, with its logprobs where asked for, or nothing.
  void First(uint32_t choice, std::string& out) override;
  // A chunk for each piece of the message; logprobs and token ids come with the first.
  void Delta(uint32_t choice, const OutputDelta& delta, std::span<const MessageDelta> message,
             const TokenUsage& usage, std::string& out) override;
  void Finish(uint32_t choice, const ChoiceEnd& end, const TokenUsage& usage, std::string& out) override;
  void End(const Outcome& outcome, std::string& out) override;
  // No [DONE]: a client that reads only that must not take this for a complete answer.
  void Error(const ApiError& error, std::string& out) override;

  void Append(uint32_t choice, OutputDelta delta, std::span<const MessageDelta> message) override;
  void Clear(uint32_t choice) override;
  void Append(uint32_t choice, const ChoiceEnd& end) override { choices_[choice].end = end; }
  std::string Whole(const Outcome& outcome) override;

  std::string ErrorBody(const ApiError& error) const override;

 private:
  struct Choice {
    OutputDelta all;
    Message message;
    ChoiceEnd end;
    size_t text_offset = 0;  // code points before the next token
  };

  OrderedJson Head(bool chunk) const;
  // A chunk is written between these two: its fields before the choice, and what follows the choice.
  void OpenChunk(uint32_t choice, std::string& out) const;
  void CloseChunk(const TokenUsage* usage, const RequestTrace* trace, std::string& out) const;
  // After a choice's delta.
  void AppendDetails(uint32_t choice, const std::vector<DeliveredToken>& tokens, std::string& out);
  OrderedJson Logprobs(Choice& choice, const std::vector<DeliveredToken>& tokens, bool with_prompt);
  const AdmittedPrompt& PromptOf(size_t choice) const { return prompts_[choice / choices_per_prompt_]; }
  // How logprobs name a token, and with which bytes.
  std::string TokenName(int32_t id) const;
  // The legacy lists' entries for the echoed prompt.
  void AddPrompt(OrderedJson& lists) const;
  // {text: logprob} of the likeliest and of the token itself.
  OrderedJson TopOf(int32_t id, float logprob, const std::vector<OutputLogprob>& top) const;
  // vLLM's prompt_logprobs: null, then {id: {logprob, rank, decoded_token}} for each prompt token.
  OrderedJson PromptLogprobs() const;

  const bool chat_, include_usage_, continuous_, token_ids_, trace_, echo_, tokens_as_ids_;
  const int logprobs_, prompt_logprobs_;  // -1: none
  const std::string model_, fingerprint_, service_tier_;
  const int64_t created_;
  const uint32_t choices_per_prompt_;
  const std::vector<std::pair<std::string, std::string>> metadata_;
  const Tokenizer& tokenizer_;
  std::string id_;
  std::string chunk_head_;  // of every chunk, up to its choice's index
  std::vector<AdmittedPrompt> prompts_;
  std::vector<PromptScore> prompt_scores_;
  std::vector<Choice> choices_;
};

OrderedJson UsageJson(const TokenUsage& usage);
// [{token, logprob, bytes, top_logprobs}], as chats and responses have them.
OrderedJson LogprobEntries(const Tokenizer& tokenizer, const std::vector<DeliveredToken>& tokens,
                           bool tokens_as_ids = false);
OrderedJson TraceJson(const RequestTrace& trace);

}  // namespace tidepool
