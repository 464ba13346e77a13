#include "server/gateway/responses_answer.h"

#include <algorithm>
#include <iterator>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "server/gateway/openai_response.h"

namespace tidepool {
namespace {

using Kind = MessageDelta::Kind;

// What OpenAI has for `response.error.code`.
std::string_view FailureCode(const ApiError& error) {
  if (error.status == 429) return "rate_limit_exceeded";
  return error.status < 500 ? "invalid_prompt" : "server_error";
}

OrderedJson ResponsesUsage(const TokenUsage& usage) {
  return {{"input_tokens", usage.prompt_tokens},
          {"input_tokens_details", {{"cached_tokens", usage.cached_tokens}, {"cache_write_tokens", 0}}},
          {"output_tokens", usage.completion_tokens},
          {"output_tokens_details", {{"reasoning_tokens", usage.reasoning_tokens}}},
          {"total_tokens", uint64_t{usage.prompt_tokens} + usage.completion_tokens}};
}

}  // namespace

ResponsesAnswer::ResponsesAnswer(const ResponsesRequest& request, std::string model, int64_t created,
                                 const Tokenizer& tokenizer)
    : repeated_(request.repeated),
      names_(request.names),
      model_(std::move(model)),
      created_(created),
      tokenizer_(tokenizer),
      logprobs_(request.request.top_logprobs >= 0),
      trace_(request.request.return_trace) {}

OrderedJson ResponsesAnswer::PartJson(const Item& item) const {
  if (item.kind == Kind::kReasoning) return {{"type", "reasoning_text"}, {"text", item.text}};
  return {{"type", "output_text"},
          {"text", item.text},
          {"annotations", OrderedJson::array()},
          {"logprobs", item.logprobs}};
}

OrderedJson ResponsesAnswer::ItemJson(const Item& item) const {
  OrderedJson json;
  json["id"] = item.id;
  switch (item.kind) {
    case Kind::kReasoning:
      json["type"] = "reasoning";
      json["summary"] = OrderedJson::array();
      break;
    case Kind::kContent:
      json["type"] = "message";
      json["role"] = "assistant";
      break;
    case Kind::kToolCall:
      json["type"] = "function_call";
      json["call_id"] = item.call_id;
      json["name"] = item.name;
      json["arguments"] = item.text;
      break;
  }
  json["status"] = item.status;
  if (item.kind != Kind::kToolCall) {
    json["content"] = OrderedJson::array();
    // A part begins after its item: response.content_part.added brings it.
    if (item.status != "in_progress") json["content"].push_back(PartJson(item));
  }
  return json;
}

OrderedJson ResponsesAnswer::ResponseJson(std::string_view status, const TokenUsage* usage,
                                          const ApiError* error) const {
  OrderedJson json;
  json["id"] = "resp_" + id_;
  json["object"] = "response";
  json["created_at"] = created_;
  json["status"] = status;
  json["background"] = false;
  json["completed_at"] =
      status == "completed" ? OrderedJson(absl::ToUnixSeconds(absl::Now())) : OrderedJson(nullptr);
  json["error"] = nullptr;
  if (error != nullptr) json["error"] = {{"code", FailureCode(*error)}, {"message", error->message}};
  json["incomplete_details"] = nullptr;
  if (status == "incomplete") json["incomplete_details"] = {{"reason", "max_output_tokens"}};
  json["model"] = model_;
  json["output"] = OrderedJson::array();
  for (const Item& item : items_) json["output"].push_back(ItemJson(item));
  json.update(repeated_);
  json["usage"] = usage == nullptr ? OrderedJson(nullptr) : ResponsesUsage(*usage);
  return json;
}

OrderedJson ResponsesAnswer::EventOf(std::string_view name) {
  return {{"type", name}, {"sequence_number", sequence_++}};
}

OrderedJson ResponsesAnswer::ItemEvent(std::string_view name) {
  OrderedJson event = EventOf(name);
  event["output_index"] = items_.size() - 1;
  return event;
}

OrderedJson ResponsesAnswer::PartEvent(std::string_view name) {
  OrderedJson event = ItemEvent(name);
  event["item_id"] = items_.back().id;
  if (items_.back().kind != Kind::kToolCall) event["content_index"] = 0;
  return event;
}

void ResponsesAnswer::Emit(const OrderedJson& event, std::string& out) const {
  AppendEvent(event["type"].get_ref<const std::string&>(), DumpJson(event), out);
}

void ResponsesAnswer::First(uint32_t, std::string& out) {
  begun_ = true;
  for (const char* name : {"response.created", "response.in_progress"}) {
    OrderedJson event = EventOf(name);
    event["response"] = ResponseJson("in_progress", nullptr, nullptr);
    Emit(event, out);
  }
}

void ResponsesAnswer::Open(const MessageDelta& delta, std::string* out) {
  Item& item = items_.emplace_back();
  item.kind = delta.kind;
  const char* prefix = delta.kind == Kind::kReasoning ? "rs_" : delta.kind == Kind::kContent ? "msg_" : "fc_";
  item.id = absl::StrCat(prefix, id_, "_", items_.size() - 1);
  item.call = delta.call;
  item.call_id = delta.id;
  item.name = delta.name;
  if (out == nullptr) return;
  OrderedJson event = ItemEvent("response.output_item.added");
  event["item"] = ItemJson(item);
  Emit(event, *out);
  if (item.kind == Kind::kToolCall) return;
  OrderedJson part = PartEvent("response.content_part.added");
  part["part"] = PartJson(item);
  Emit(part, *out);
}

void ResponsesAnswer::Close(std::string_view status, std::string* out) {
  if (items_.empty() || items_.back().status != "in_progress") return;
  Item& item = items_.back();
  item.status = status;
  if (out == nullptr) return;
  if (item.kind == Kind::kToolCall) {
    OrderedJson done = PartEvent("response.function_call_arguments.done");
    done["name"] = item.name;
    done["arguments"] = item.text;
    Emit(done, *out);
  } else {
    const bool message = item.kind == Kind::kContent;
    OrderedJson done = PartEvent(message ? "response.output_text.done" : "response.reasoning_text.done");
    done["text"] = item.text;
    if (message) done["logprobs"] = item.logprobs;
    Emit(done, *out);
    OrderedJson part = PartEvent("response.content_part.done");
    part["part"] = PartJson(item);
    Emit(part, *out);
  }
  OrderedJson event = ItemEvent("response.output_item.done");
  event["item"] = ItemJson(item);
  Emit(event, *out);
}

void ResponsesAnswer::Take(const OutputDelta& delta, std::span<const MessageDelta> message,
                           std::string* out) {
  if (logprobs_) waiting_.insert(waiting_.end(), delta.tokens.begin(), delta.tokens.end());
  for (size_t i = 0; i < message.size(); ++i) {
    const MessageDelta& piece = message[i];
    if (piece.text.empty() && !piece.begins_call()) continue;
    const bool goes_on = !items_.empty() && items_.back().kind == piece.kind && !piece.begins_call() &&
                         (piece.kind != Kind::kToolCall || items_.back().call == piece.call);
    if (!goes_on) {
      Close("completed", out);
      Open(piece, out);
    }
    Item& item = items_.back();
    item.text += piece.text;
    // Logprobs are the message's: those of thoughts and calls are nobody's.
    OrderedJson logprobs = OrderedJson::array();
    if (piece.kind == Kind::kContent && logprobs_) {
      logprobs = LogprobEntries(tokenizer_, waiting_);
      item.logprobs.insert(item.logprobs.end(), logprobs.begin(), logprobs.end());
    }
    // Where thoughts end and the message begins in one delta, which tokens are whose is not known: the
    // message has them all.
    const auto later = message.subspan(i + 1);
    const bool message_comes =
        piece.kind != Kind::kContent && std::ranges::any_of(later, [](const auto& next) {
          return next.kind == Kind::kContent && !next.text.empty();
        });
    if (!message_comes) waiting_.clear();
    if (out == nullptr || piece.text.empty()) continue;
    OrderedJson event =
        PartEvent(piece.kind == Kind::kContent     ? "response.output_text.delta"
                  : piece.kind == Kind::kReasoning ? "response.reasoning_text.delta"
                                                   : "response.function_call_arguments.delta");
    event["delta"] = piece.text;
    if (piece.kind == Kind::kContent) event["logprobs"] = std::move(logprobs);
    Emit(event, *out);
  }
}

void ResponsesAnswer::TakeEnd(const ChoiceEnd& end, std::string* out) {
  incomplete_ = end.finish_reason == "length";
  if (items_.empty()) Open(MessageDelta{}, out);
  Close(incomplete_ ? "incomplete" : "completed", out);
}

void ResponsesAnswer::Delta(uint32_t, const OutputDelta& delta, std::span<const MessageDelta> message,
                            const TokenUsage&, std::string& out) {
  Take(delta, message, &out);
}

void ResponsesAnswer::Finish(uint32_t, const ChoiceEnd& end, const TokenUsage&, std::string& out) {
  TakeEnd(end, &out);
}

void ResponsesAnswer::End(const Outcome& outcome, std::string& out) {
  const char* status = incomplete_ ? "incomplete" : "completed";
  OrderedJson event = EventOf(absl::StrCat("response.", status));
  event["response"] = ResponseJson(status, &outcome.usage, nullptr);
  if (trace_) event["response"]["tidepool_trace"] = TraceJson(outcome.trace);
  Emit(event, out);
}

void ResponsesAnswer::Error(const ApiError& why, std::string& out) {
  const ApiError error = names_.Own(why);
  // Pings may have opened a stream that has nothing in it.
  if (!begun_) First(0, out);
  const OrderedJson body = OrderedJson::parse(tidepool::ErrorBody(error))["error"];
  OrderedJson event = EventOf("error");
  event["code"] = body["code"];
  event["message"] = body["message"];
  event["param"] = body["param"];
  // OpenAI's client raises for this member, whatever the event's type.
  event["error"] = body;
  Emit(event, out);
  for (Item& item : items_) {
    if (item.status == "in_progress") item.status = "incomplete";
  }
  OrderedJson failed = EventOf("response.failed");
  failed["response"] = ResponseJson("failed", nullptr, &error);
  Emit(failed, out);
}

void ResponsesAnswer::Append(uint32_t, OutputDelta delta, std::span<const MessageDelta> message) {
  Take(delta, message, nullptr);
}

void ResponsesAnswer::Clear(uint32_t) {
  items_.clear();
  waiting_.clear();
}

void ResponsesAnswer::Append(uint32_t, const ChoiceEnd& end) { TakeEnd(end, nullptr); }

std::string ResponsesAnswer::Whole(const Outcome& outcome) {
  OrderedJson json = ResponseJson(incomplete_ ? "incomplete" : "completed", &outcome.usage, nullptr);
  if (trace_) json["tidepool_trace"] = TraceJson(outcome.trace);
  return DumpJson(json);
}

std::string ResponsesAnswer::ErrorBody(const ApiError& error) const {
  return tidepool::ErrorBody(names_.Own(error));
}

}  // namespace tidepool
