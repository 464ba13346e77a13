#pragma once

#include <span>
#include <string>
#include <vector>

#include "server/gateway/answer_encoder.h"
#include "server/gateway/responses_request.h"

namespace tidepool {

// ResponsesAnswer: Codec of the answer to one request to OpenAI's Responses API, whole or as its events
// (named, numbered from 0, without [DONE]):
//
//   response.created, response.in_progress,
//   for each item: response.output_item.added,
//     a message:    content_part.added, output_text.delta*, output_text.done, content_part.done
//     reasoning:    content_part.added, reasoning_text.delta*, reasoning_text.done, content_part.done
//     a call:       function_call_arguments.delta*, function_call_arguments.done
//   response.output_item.done;
//   response.completed or response.incomplete, with the whole answer; or error, response.failed
//
// An answer that says nothing has one empty message. Not thread-safe.
class ResponsesAnswer final : public AnswerEncoder {
 public:
  // `tokenizer` is borrowed. `created`: Unix seconds.
  ResponsesAnswer(const ResponsesRequest& request, std::string model, int64_t created,
                  const Tokenizer& tokenizer);

  void Begin(const Admission& admission) override { id_ = admission.id; }
  void AddPromptLogprobs(std::vector<PromptScore>) override {}  // never asked for

  void First(uint32_t choice, std::string& out) override;
  void Delta(uint32_t choice, const OutputDelta& delta, std::span<const MessageDelta> message,
             const TokenUsage& usage, std::string& out) override;
  void Finish(uint32_t choice, const ChoiceEnd& end, const TokenUsage& usage, std::string& out) override;
  void End(const Outcome& outcome, std::string& out) override;
  void Error(const ApiError& error, std::string& out) override;

  void Append(uint32_t choice, OutputDelta delta, std::span<const MessageDelta> message) override;
  void Clear(uint32_t choice) override;
  void Append(uint32_t choice, const ChoiceEnd& end) override;
  std::string Whole(const Outcome& outcome) override;

  std::string ErrorBody(const ApiError& error) const override;

 private:
  struct Item {
    MessageDelta::Kind kind = MessageDelta::Kind::kContent;
    std::string id;
    std::string status = "in_progress";
    std::string text;           // of a call: its arguments
    std::string call_id, name;  // of a call
    uint32_t call = 0;
    OrderedJson logprobs = OrderedJson::array();  // of a message
  };

  // `out`: where the events go; null: none are wanted.
  void Take(const OutputDelta& delta, std::span<const MessageDelta> message, std::string* out);
  void TakeEnd(const ChoiceEnd& end, std::string* out);
  void Open(const MessageDelta& delta, std::string* out);
  void Close(std::string_view status, std::string* out);
  OrderedJson ItemJson(const Item& item) const;
  OrderedJson PartJson(const Item& item) const;
  // `usage`: null while it is not known.
  OrderedJson ResponseJson(std::string_view status, const TokenUsage* usage, const ApiError* error) const;
  OrderedJson EventOf(std::string_view name);
  // The same, of the last item, and of its only part.
  OrderedJson ItemEvent(std::string_view name);
  OrderedJson PartEvent(std::string_view name);
  void Emit(const OrderedJson& event, std::string& out) const;

  const OrderedJson repeated_;
  const FieldNames names_;
  const std::string model_;
  const int64_t created_;
  const Tokenizer& tokenizer_;
  const bool logprobs_, trace_;

  std::string id_;
  uint64_t sequence_ = 0;
  bool begun_ = false;  // response.created is out
  bool incomplete_ = false;
  std::vector<Item> items_;
  std::vector<DeliveredToken> waiting_;  // tokens whose text is still held back
};

}  // namespace tidepool
