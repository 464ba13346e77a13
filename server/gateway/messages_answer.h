#pragma once

#include <span>
#include <string>
#include <vector>

#include "server/gateway/answer_encoder.h"
#include "server/gateway/messages_request.h"

namespace tidepool {

// MessagesAnswer: Codec of the answer to one request to Anthropic's Messages API, whole or as its events:
//
//   message_start, ping, for each block: content_block_start, content_block_delta*, content_block_stop;
//   message_delta (stop_reason, usage), message_stop; or error
//
// Blocks are thinking (with an empty signature: nothing is signed here), text and tool_use. input_tokens are
// those that were computed; with cache_read_input_tokens they make up the prompt, as Anthropic counts. Not
// thread-safe.
//
// A call that max_tokens cut off is no JSON yet: the whole answer then leaves its block out, and the stop
// reason says why.
class MessagesAnswer final : public AnswerEncoder {
 public:
  // `request_id`: X-Request-Id, for errors.
  MessagesAnswer(const MessagesRequest& request, std::string model, std::string request_id);

  void Begin(const Admission& admission) override { id_ = "msg_" + admission.id; }
  void AddPromptLogprobs(std::vector<PromptScore>) override {}  // never asked for

  // Nothing: message_start waits for the first Delta or Finish, which knows what the cache held.
  void First(uint32_t, std::string&) override {}
  void Delta(uint32_t choice, const OutputDelta& delta, std::span<const MessageDelta> message,
             const TokenUsage& usage, std::string& out) override;
  void Finish(uint32_t choice, const ChoiceEnd& end, const TokenUsage& usage, std::string& out) override;
  void End(const Outcome& outcome, std::string& out) override;
  void Error(const ApiError& error, std::string& out) override;

  void Append(uint32_t choice, OutputDelta delta, std::span<const MessageDelta> message) override;
  void Clear(uint32_t choice) override;
  void Append(uint32_t choice, const ChoiceEnd& end) override;
  std::string Whole(const Outcome& outcome) override;

  HttpHeaders Headers() const override { return {{"request-id", request_id_}}; }
  std::string ErrorBody(const ApiError& error) const override;

 private:
  struct Block {
    MessageDelta::Kind kind = MessageDelta::Kind::kContent;
    std::string text, id, name;
    uint32_t call = 0;
  };

  // True: the piece goes on with the last block.
  bool GoesOn(const MessageDelta& piece) const;
  void Start(const TokenUsage& usage, std::string& out);
  void StopBlock(std::string& out);
  OrderedJson Head() const;

  const FieldNames names_;
  const std::string model_, request_id_;
  const bool trace_;
  std::string id_;
  bool started_ = false;
  bool open_ = false;          // the last block of the stream has not stopped
  std::vector<Block> blocks_;  // of a stream without their text
  OrderedJson stop_reason_, stop_sequence_;
};

// {"type":"error","error":{"type","message"},"request_id"}, with Anthropic's type of the status.
std::string MessagesErrorBody(const ApiError& error, const std::string& request_id);

}  // namespace tidepool
