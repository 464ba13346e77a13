#include "server/gateway/chat/message_parser.h"

#include <algorithm>
#include <utility>

#include "server/gateway/chat/tool_call_parser.h"

namespace tidepool {
namespace {

constexpr std::string_view kOpen = "<think>", kClose = "</think>";
constexpr std::string_view kBlank = " \n\r\t";

bool IsBlank(char c) { return kBlank.find(c) != std::string_view::npos; }

}  // namespace

bool BeginsInThought(const ParserPlan& plan, std::string_view prompt) {
  if (!plan.continued.empty()) {
    const size_t open = plan.continued.rfind(kOpen), close = plan.continued.rfind(kClose);
    return open != std::string::npos && (close == std::string::npos || close < open);
  }
  const size_t last = prompt.find_last_not_of(kBlank);
  return last != std::string_view::npos && prompt.substr(0, last + 1).ends_with(kOpen);
}

void Message::Add(const MessageDelta& delta) {
  switch (delta.kind) {
    case MessageDelta::Kind::kReasoning:
      reasoning += delta.text;
      return;
    case MessageDelta::Kind::kContent:
      content += delta.text;
      return;
    case MessageDelta::Kind::kToolCall:
      if (delta.begins_call()) tool_calls.push_back({delta.id, delta.name, {}});
      tool_calls.back().arguments += delta.text;
  }
}

MessageParser::MessageParser(const ParserPlan& plan, std::string_view prompt)
    : include_reasoning_(plan.include_reasoning), named_(plan.named), state_(State::kBody) {
  if (plan.syntax != ToolSyntax::kNone) calls_ = std::make_unique<ToolCallParser>(plan);
  if (!plan.reasoning) return;
  if (BeginsInThought(plan, prompt)) {
    state_ = State::kReasoning;
  } else if (plan.continued.empty()) {
    state_ = State::kStart;
  }
}
MessageParser::~MessageParser() = default;
MessageParser::MessageParser(MessageParser&&) noexcept = default;
MessageParser& MessageParser::operator=(MessageParser&&) noexcept = default;

void MessageParser::Push(std::string_view text, size_t tokens, std::vector<MessageDelta>& out) {
  if (state_ == State::kBody) return Body(text, out);
  size_t at = 0, thought = state_ == State::kReasoning ? text.size() : 0;
  while (at < text.size() && state_ != State::kBody) {
    const State before = state_;
    switch (state_) {
      case State::kStart:
        at = Start(text, at, out);
        break;
      case State::kReasoning:
        at = Reason(text, at, out);
        break;
      case State::kAfterReasoning:
        at = std::min(text.find_first_not_of(kBlank, at), text.size());
        if (at < text.size()) state_ = State::kBody;
        break;
      case State::kBody:
        break;
    }
    if (before == State::kReasoning) thought = at;
  }
  // Mostly one token came; of several that the end of the reasoning divides, those that its bytes stand for.
  if (thought > 0 || state_ == State::kReasoning) {
    const size_t bytes = std::max<size_t>(text.size(), 1);
    reasoning_tokens_ +=
        static_cast<uint32_t>(state_ == State::kReasoning ? tokens : (tokens * thought + bytes - 1) / bytes);
  }
  if (at < text.size()) Body(text.substr(at), out);
}

size_t MessageParser::Start(std::string_view text, size_t at, std::vector<MessageDelta>& out) {
  const char c = text[at];
  if (tag_.empty() && IsBlank(c)) {
    space_ += c;
    return at + 1;
  }
  if (c == kOpen[tag_.size()]) {
    tag_ += c;
    if (tag_ == kOpen) {
      state_ = State::kReasoning;
      space_.clear();
      tag_.clear();
    }
    return at + 1;
  }
  state_ = State::kBody;
  Body(std::exchange(space_, {}) + std::exchange(tag_, {}), out);
  return at;
}

size_t MessageParser::Reason(std::string_view text, size_t at, std::vector<MessageDelta>& out) {
  const char c = text[at];
  if (!tag_.empty() || c == kClose.front()) {
    if (c == kClose[tag_.size()]) {
      tag_ += c;
      if (tag_ == kClose) {
        // White space around the tags is markup: templates write and strip it.
        state_ = State::kAfterReasoning;
        space_.clear();
        tag_.clear();
      }
      return at + 1;
    }
    Think(std::exchange(tag_, {}), out);
    return at;
  }
  if (IsBlank(c)) {
    if (any_reasoning_) space_ += c;
    return at + 1;
  }
  size_t end = at;
  while (end < text.size() && text[end] != kClose.front() && !IsBlank(text[end])) ++end;
  Think(text.substr(at, end - at), out);
  return end;
}

void MessageParser::Think(std::string_view text, std::vector<MessageDelta>& out) {
  any_reasoning_ = true;
  if (include_reasoning_) {
    AppendDelta(MessageDelta::Kind::kReasoning, space_, out);
    AppendDelta(MessageDelta::Kind::kReasoning, text, out);
  }
  space_.clear();
}

void MessageParser::Body(std::string_view text, std::vector<MessageDelta>& out) {
  if (calls_ != nullptr) {
    const size_t before = out.size();
    calls_->Push(text, out);
    NoteCalls(out, before);
  } else {
    AppendDelta(MessageDelta::Kind::kContent, text, out);
  }
}

void MessageParser::Finish(std::vector<MessageDelta>& out) {
  if (state_ == State::kReasoning && !(space_.empty() && tag_.empty())) Think(std::exchange(tag_, {}), out);
  if (state_ == State::kStart) Body(std::exchange(space_, {}) + std::exchange(tag_, {}), out);
  if (calls_ == nullptr) return;
  const size_t before = out.size();
  calls_->Finish(out);
  NoteCalls(out, before);
}

void MessageParser::NoteCalls(const std::vector<MessageDelta>& out, size_t first) {
  for (size_t i = first; i < out.size(); ++i) {
    if (out[i].begins_call()) called_.push_back(out[i].name);
  }
}

std::optional<std::vector<std::string>> MessageParser::CalledTools() const {
  if (calls_ == nullptr) return std::nullopt;
  return called_;
}

std::string_view MessageParser::FinishReason(std::string_view reason) const {
  const bool calls = calls_ != nullptr && calls_->called();
  return calls && !named_ && reason == "stop" ? "tool_calls" : reason;
}

}  // namespace tidepool
