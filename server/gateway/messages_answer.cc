#include "server/gateway/messages_answer.h"

#include <algorithm>
#include <tuple>
#include <utility>

#include "server/gateway/openai_response.h"

namespace tidepool {
namespace {

using Kind = MessageDelta::Kind;

// docs.anthropic.com/en/api/errors.
std::string_view TypeOf(int status) {
  switch (status) {
    case 401:
      return "authentication_error";
    case 403:
      return "permission_error";
    case 404:
      return "not_found_error";
    case 413:
      return "request_too_large";
    case 429:
      return "rate_limit_error";
    case 503:
      return "overloaded_error";
    case 504:
      return "timeout_error";
  }
  return status >= 500 ? "api_error" : "invalid_request_error";
}

OrderedJson MessagesUsage(const TokenUsage& usage) {
  return {{"input_tokens", usage.prompt_tokens - std::min(usage.prompt_tokens, usage.cached_tokens)},
          {"cache_creation_input_tokens", 0},
          {"cache_read_input_tokens", usage.cached_tokens},
          {"output_tokens", usage.completion_tokens},
          {"output_tokens_details", {{"thinking_tokens", usage.reasoning_tokens}}}};
}

// stop_reason and stop_sequence.
std::pair<OrderedJson, OrderedJson> StopOf(const ChoiceEnd& end, bool calls) {
  if (end.finish_reason == "length") return {"max_tokens", nullptr};
  // A call that was named ends with "stop" elsewhere; here it is a tool_use as all are.
  if (calls) return {"tool_use", nullptr};
  if (const auto* text = std::get_if<std::string>(&end.stop_reason)) return {"stop_sequence", *text};
  return {"end_turn", nullptr};
}

OrderedJson EmptyBlock(Kind kind, const std::string& id, const std::string& name) {
  switch (kind) {
    case Kind::kReasoning:
      return {{"type", "thinking"}, {"thinking", ""}, {"signature", ""}};
    case Kind::kContent:
      return {{"type", "text"}, {"text", ""}};
    case Kind::kToolCall:
      break;
  }
  return {{"type", "tool_use"}, {"id", id}, {"name", name}, {"input", OrderedJson::object()}};
}

void Emit(const OrderedJson& event, std::string& out) {
  AppendEvent(event["type"].get_ref<const std::string&>(), DumpJson(event), out);
}

}  // namespace

std::string MessagesErrorBody(const ApiError& error, const std::string& request_id) {
  return DumpJson(OrderedJson{{"type", "error"},
                              {"error", {{"type", TypeOf(error.status)}, {"message", error.message}}},
                              {"request_id", request_id}});
}

MessagesAnswer::MessagesAnswer(const MessagesRequest& request, std::string model, std::string request_id)
    : names_(request.names),
      model_(std::move(model)),
      request_id_(std::move(request_id)),
      trace_(request.request.return_trace) {}

OrderedJson MessagesAnswer::Head() const {
  return {{"id", id_},
          {"type", "message"},
          {"role", "assistant"},
          {"model", model_},
          {"content", OrderedJson::array()},
          {"stop_reason", stop_reason_},
          {"stop_sequence", stop_sequence_}};
}

bool MessagesAnswer::GoesOn(const MessageDelta& piece) const {
  if (blocks_.empty() || piece.begins_call() || blocks_.back().kind != piece.kind) return false;
  return piece.kind != Kind::kToolCall || blocks_.back().call == piece.call;
}

void MessagesAnswer::Start(const TokenUsage& usage, std::string& out) {
  if (started_) return;
  started_ = true;
  OrderedJson message = Head();
  message["usage"] = MessagesUsage(usage);
  Emit({{"type", "message_start"}, {"message", std::move(message)}}, out);
  Emit({{"type", "ping"}}, out);
}

void MessagesAnswer::StopBlock(std::string& out) {
  if (!open_) return;
  open_ = false;
  Emit({{"type", "content_block_stop"}, {"index", blocks_.size() - 1}}, out);
}

void MessagesAnswer::Delta(uint32_t, const OutputDelta&, std::span<const MessageDelta> message,
                           const TokenUsage& usage, std::string& out) {
  Start(usage, out);
  for (const MessageDelta& piece : message) {
    if (piece.text.empty() && !piece.begins_call()) continue;
    if (!GoesOn(piece)) {
      StopBlock(out);
      blocks_.push_back({piece.kind, {}, piece.id, piece.name, piece.call});
      open_ = true;
      Emit({{"type", "content_block_start"},
            {"index", blocks_.size() - 1},
            {"content_block", EmptyBlock(piece.kind, piece.id, piece.name)}},
           out);
    }
    if (piece.text.empty()) continue;
    OrderedJson delta;
    switch (piece.kind) {
      case Kind::kReasoning:
        delta = {{"type", "thinking_delta"}, {"thinking", piece.text}};
        break;
      case Kind::kContent:
        delta = {{"type", "text_delta"}, {"text", piece.text}};
        break;
      case Kind::kToolCall:
        delta = {{"type", "input_json_delta"}, {"partial_json", piece.text}};
        break;
    }
    Emit({{"type", "content_block_delta"}, {"index", blocks_.size() - 1}, {"delta", std::move(delta)}}, out);
  }
}

void MessagesAnswer::Finish(uint32_t choice, const ChoiceEnd& end, const TokenUsage& usage,
                            std::string& out) {
  Start(usage, out);
  StopBlock(out);
  Append(choice, end);
}

void MessagesAnswer::End(const Outcome& outcome, std::string& out) {
  OrderedJson event = {{"type", "message_delta"},
                       {"delta", {{"stop_reason", stop_reason_}, {"stop_sequence", stop_sequence_}}},
                       {"usage", MessagesUsage(outcome.usage)}};
  if (trace_) event["tidepool_trace"] = TraceJson(outcome.trace);
  Emit(event, out);
  Emit({{"type", "message_stop"}}, out);
}

void MessagesAnswer::Error(const ApiError& error, std::string& out) {
  AppendEvent("error", ErrorBody(error), out);
}

void MessagesAnswer::Append(uint32_t, OutputDelta, std::span<const MessageDelta> message) {
  for (const MessageDelta& piece : message) {
    if (piece.text.empty() && !piece.begins_call()) continue;
    if (!GoesOn(piece)) blocks_.push_back({piece.kind, {}, piece.id, piece.name, piece.call});
    blocks_.back().text += piece.text;
  }
}

void MessagesAnswer::Clear(uint32_t) { blocks_.clear(); }

void MessagesAnswer::Append(uint32_t, const ChoiceEnd& end) {
  bool calls = false;
  for (const Block& block : blocks_) calls = calls || block.kind == Kind::kToolCall;
  std::tie(stop_reason_, stop_sequence_) = StopOf(end, calls);
}

std::string MessagesAnswer::Whole(const Outcome& outcome) {
  OrderedJson json = Head();
  for (Block& from : blocks_) {
    OrderedJson block = EmptyBlock(from.kind, from.id, from.name);
    if (from.kind == Kind::kReasoning) {
      block["thinking"] = std::move(from.text);
    } else if (from.kind == Kind::kContent) {
      block["text"] = std::move(from.text);
    } else {
      auto input = ParseJson(from.text.empty() ? "{}" : from.text);
      if (input.ok() && input->is_object()) {
        block["input"] = *std::move(input);
      } else if (stop_reason_ == "max_tokens") {
        continue;
      } else {
        // The model's own mistake: shown as what it wrote.
        block = {{"type", "text"}, {"text", std::move(from.text)}};
      }
    }
    json["content"].push_back(std::move(block));
  }
  // Of calls that all became text there is none to answer.
  const bool calls =
      std::ranges::any_of(json["content"], [](const auto& b) { return b["type"] == "tool_use"; });
  if (stop_reason_ == "tool_use" && !calls) json["stop_reason"] = "end_turn";
  json["usage"] = MessagesUsage(outcome.usage);
  if (trace_) json["tidepool_trace"] = TraceJson(outcome.trace);
  return DumpJson(json);
}

std::string MessagesAnswer::ErrorBody(const ApiError& error) const {
  return MessagesErrorBody(names_.Own(error), request_id_);
}

}  // namespace tidepool
