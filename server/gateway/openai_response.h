#pragma once

#include <string>

#include "server/gateway/request_runner.h"

namespace tidepool {

// OpenAiAnswer: Codec of one answer to OpenAI's JSON, for chat or text completions, whole or in chunks. All
// chunks share id, created and model. Not thread-safe.
class OpenAiAnswer {
 public:
  // `tokenizer` is borrowed. `created`: Unix seconds.
  OpenAiAnswer(const InferenceRequest& request, std::string model, std::string fingerprint, int64_t created,
               const Tokenizer& tokenizer);

  void Begin(const Admission& admission);

  // The stream, in the order in which the chunks go out; each is one JSON object.
  std::string FirstChunk();  // chat: the role; text: the echoed prompt, or empty (nothing to send)
  std::string DeltaChunk(const OutputDelta& delta, const TokenUsage& usage);
  std::string FinishChunk(const Outcome& outcome, bool with_trace);
  std::string UsageChunk(const Outcome& outcome, bool with_trace);

  // The whole answer: Append deltas, then Whole.
  void Append(OutputDelta delta);
  void Clear();
  std::string Whole(const Outcome& outcome);

 private:
  OrderedJson Head(bool chunk) const;
  OrderedJson ChunkWith(OrderedJson choice, const TokenUsage* usage) const;
  OrderedJson Logprobs(const std::vector<DeliveredToken>& tokens);

  const bool chat_, logprobs_, include_usage_, continuous_, token_ids_, trace_, echo_;
  const std::string model_, fingerprint_;
  const int64_t created_;
  const Tokenizer& tokenizer_;
  std::string id_;
  std::vector<int32_t> prompt_ids_;
  std::string prompt_text_;
  size_t text_offset_ = 0;
  OutputDelta all_;
};

OrderedJson UsageJson(const TokenUsage& usage);
OrderedJson TraceJson(const Outcome& outcome);

}  // namespace tidepool
