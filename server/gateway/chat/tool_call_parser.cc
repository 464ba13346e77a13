#include "server/gateway/chat/tool_call_parser.h"

#include <algorithm>
#include <array>
#include <optional>
#include <utility>

#include "base/digest.h"
#include "server/gateway/json.h"

namespace tidepool {
namespace {

constexpr std::string_view kHermesClose = "</tool_call>";
constexpr std::string_view kArgsMark = "[ARGS]";
constexpr std::string_view kCallIdMark = "[CALL_ID]";

std::string_view MarkerOf(ToolSyntax syntax) {
  switch (syntax) {
    case ToolSyntax::kHermes:
      return "<tool_call>";
    case ToolSyntax::kLlama3:
      return "<|python_tag|>";
    case ToolSyntax::kMistral:
      return "[TOOL_CALLS]";
    case ToolSyntax::kNone:
      break;
  }
  return {};
}

bool IsBlank(char c) { return c == ' ' || c == '\n' || c == '\r' || c == '\t'; }
bool IsAlnum(char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9'); }
bool IsNameByte(char c) { return IsAlnum(c) || c == '_' || c == '-' || c == '.'; }

// Mistral's templates refuse ids that are not nine letters and digits.
std::string NewCallId(ToolSyntax syntax) {
  const std::string random = RandomHexId();
  return syntax == ToolSyntax::kMistral ? random.substr(0, 9) : "call_" + random.substr(0, 24);
}

// The text of a JSON string, quotes included; nullopt: it is none.
std::optional<std::string> Unquote(std::string_view quoted) {
  const auto json = ParseJson(quoted);
  if (!json.ok() || !json->is_string()) return std::nullopt;
  return json->get<std::string>();
}

}  // namespace

void AppendDelta(MessageDelta::Kind kind, std::string_view text, std::vector<MessageDelta>& out) {
  if (text.empty()) return;
  if (out.empty() || out.back().kind != kind) out.emplace_back().kind = kind;
  out.back().text += text;
}

ToolCallParser::ToolCallParser(const ParserPlan& plan)
    : syntax_(plan.syntax), parallel_(plan.parallel), tools_(plan.tools), marker_(MarkerOf(plan.syntax)) {}

void ToolCallParser::Push(std::string_view text, std::vector<MessageDelta>& out) {
  for (size_t at = 0; at < text.size();) at = Step(text, at, out);
}

size_t ToolCallParser::Step(std::string_view text, size_t at, std::vector<MessageDelta>& out) {
  switch (state_) {
    case State::kContent:
      return Content(text, at, out);
    case State::kMarker:
      return Marker(text, at, out);
    case State::kBegin:
      return Begin(text, at, out);
    case State::kName:
    case State::kNameMark:
    case State::kCallId:
    case State::kNamedArgs:
      return Named(text, at, out);
    case State::kObject:
      return Object(text, at, out);
    case State::kNextItem:
    case State::kAfter:
    case State::kCloseMark:
      return After(text, at, out);
  }
  return text.size();
}

size_t ToolCallParser::Content(std::string_view text, size_t at, std::vector<MessageDelta>& out) {
  const char c = text[at];
  if (c == marker_.front()) {
    held_ = c;
    state_ = State::kMarker;
    return at + 1;
  }
  if (IsBlank(c) && (!any_content_ || after_call_)) {
    space_ += c;
    return at + 1;
  }
  if (syntax_ == ToolSyntax::kLlama3 && c == '{' && !any_content_ && calls_ == 0) {
    held_.clear();
    BeginObject(/*bare=*/true);
    return at;
  }
  const size_t end = std::min(text.find(marker_.front(), at), text.size());
  GiveHeld(out);
  Give(text.substr(at, end - at), out);
  return end;
}

size_t ToolCallParser::Marker(std::string_view text, size_t at, std::vector<MessageDelta>& out) {
  // Its first byte is nowhere else in it: what does not go on as it does may only begin it anew.
  if (text[at] != marker_[held_.size()]) {
    GiveHeld(out);
    state_ = State::kContent;
    return at;
  }
  held_ += text[at];
  if (held_.size() == marker_.size()) {
    state_ = State::kBegin;
    list_ = named_ = false;
  }
  return at + 1;
}

size_t ToolCallParser::Begin(std::string_view text, size_t at, std::vector<MessageDelta>& out) {
  const char c = text[at];
  if (IsBlank(c)) {
    held_ += c;
    return at + 1;
  }
  if (c == '{') {
    // Mistral's list has been begun by now, or its model forgot to.
    BeginObject(/*bare=*/false);
    return at;
  }
  if (syntax_ == ToolSyntax::kMistral && !list_) {
    if (c == '[') {
      list_ = true;
      held_ += c;
      return at + 1;
    }
    if (IsNameByte(c)) {
      named_ = true;
      name_.clear();
      state_ = State::kName;
      return at;
    }
  }
  Broken(out);
  return at;
}

size_t ToolCallParser::Named(std::string_view text, size_t at, std::vector<MessageDelta>& out) {
  const char c = text[at];
  const auto broken = [&] {
    Broken(out);
    return at;
  };
  if (state_ == State::kNameMark) {
    const bool fits = std::ranges::any_of(std::array{kArgsMark, kCallIdMark}, [&](std::string_view mark) {
      return mark.size() > token_.size() && mark.starts_with(token_) && mark[token_.size()] == c;
    });
    if (!fits) return broken();
    held_ += c;
    token_ += c;
    if (token_ == kArgsMark) state_ = State::kNamedArgs;
    if (token_ == kCallIdMark) state_ = State::kCallId;
    return at + 1;
  }
  if (c == '{' && state_ != State::kCallId) {
    BeginObject(/*bare=*/false);
    BeginArguments(out);
    return at;
  }
  const bool goes_on = state_ == State::kName     ? IsNameByte(c)
                       : state_ == State::kCallId ? IsAlnum(c)
                                                  : IsBlank(c);
  if (goes_on) {
    if (state_ == State::kName) name_ += c;
  } else if (c == '[' && state_ != State::kNamedArgs) {
    token_ = c;
    state_ = State::kNameMark;
  } else {
    return broken();
  }
  held_ += c;
  return at + 1;
}

size_t ToolCallParser::After(std::string_view text, size_t at, std::vector<MessageDelta>& out) {
  const char c = text[at];
  if (state_ == State::kCloseMark) {
    if (c == kHermesClose[token_.size()]) {
      token_ += c;
      if (token_.size() == kHermesClose.size()) state_ = State::kContent;
      return at + 1;
    }
    held_ = token_;
    if (held_.size() == 1) {
      // Only that byte may begin the next call, too.
      state_ = State::kMarker;
      return at;
    }
    GiveHeld(out);
    state_ = State::kContent;
    return at;
  }
  if (IsBlank(c) || (c == ';' && syntax_ == ToolSyntax::kLlama3)) {
    space_ += c;
    return at + 1;
  }
  if (state_ == State::kNextItem) {
    if (c == ',' || c == ']') {
      held_ = std::exchange(space_, {}) + c;
      state_ = c == ',' ? State::kBegin : State::kContent;
      if (c == ']') held_.clear();
      return at + 1;
    }
  } else if (syntax_ == ToolSyntax::kHermes && c == kHermesClose.front()) {
    token_ = c;
    state_ = State::kCloseMark;
    return at + 1;
  } else if (syntax_ == ToolSyntax::kLlama3 && c == '{') {
    BeginObject(/*bare=*/true);
    return at;
  }
  state_ = State::kContent;
  return at;
}

void ToolCallParser::BeginObject(bool bare) {
  state_ = State::kObject;
  part_ = Part::kOpen;
  bare_ = bare;
  if (!named_) name_.clear();
  arguments_.clear();
  has_arguments_ = begun_ = false;
}

size_t ToolCallParser::Object(std::string_view text, size_t at, std::vector<MessageDelta>& out) {
  if (part_ == Part::kArguments) return Arguments(text, at, out);
  const char c = text[at];
  bool fits = true, taken = true;
  switch (part_) {
    case Part::kOpen:
      part_ = Part::kKeyOrEnd;
      break;
    case Part::kKeyOrEnd:
      if (c == '"') {
        token_ = c;
        field_ = Field::kKey;
        part_ = Part::kString;
        escaped_ = false;
      } else if (c == '}') {
        Hold(c);
        if (!EndObject(out)) Broken(out);
        return at + 1;
      } else {
        fits = IsBlank(c);
      }
      break;
    case Part::kString:
      token_ += c;
      if (escaped_) {
        escaped_ = false;
      } else if (c == '\\') {
        escaped_ = true;
      } else if (c == '"') {
        Hold(c);
        if (!EndString(out)) Broken(out);
        return at + 1;
      }
      break;
    case Part::kColon:
      if (c == ':') {
        part_ = Part::kValue;
      } else {
        fits = IsBlank(c);
      }
      break;
    case Part::kValue:
      if (IsBlank(c)) break;
      fits = Value(c, out);
      if (part_ == Part::kArguments) return at;
      break;
    case Part::kScalar:
      if (IsAlnum(c) || c == '+' || c == '-' || c == '.') {
        token_ += c;
      } else {
        fits = EndScalar(out);
        taken = false;
      }
      break;
    case Part::kNested:
      if (Closes(c)) part_ = Part::kComma;
      break;
    case Part::kComma:
      if (c == ',') {
        part_ = Part::kKeyOrEnd;
      } else if (c == '}') {
        Hold(c);
        if (!EndObject(out)) Broken(out);
        return at + 1;
      } else {
        fits = IsBlank(c);
      }
      break;
    case Part::kArguments:
      break;
  }
  if (!fits) {
    Broken(out);
    return at;
  }
  if (!taken) return at;
  Hold(c);
  return at + 1;
}

bool ToolCallParser::Value(char c, std::vector<MessageDelta>& out) {
  if (c == '"') {
    token_ = c;
    part_ = Part::kString;
    escaped_ = false;
    return true;
  }
  if (field_ == Field::kName) return false;
  if (field_ == Field::kArguments && c == '{') {
    BeginArguments(out);
    return true;
  }
  if (field_ == Field::kOther && (c == '{' || c == '[')) {
    part_ = Part::kNested;
    depth_ = 1;
    in_string_ = escaped_ = false;
    return true;
  }
  if (!IsAlnum(c) && c != '-') return false;
  token_ = c;
  part_ = Part::kScalar;
  return true;
}

bool ToolCallParser::EndString(std::vector<MessageDelta>& out) {
  auto text = Unquote(token_);
  if (!text) return false;
  part_ = Part::kComma;
  switch (field_) {
    case Field::kKey:
      part_ = Part::kColon;
      field_ = Field::kOther;
      if (*text == "name" && name_.empty()) field_ = Field::kName;
      if ((*text == "arguments" || *text == "parameters") && !has_arguments_) field_ = Field::kArguments;
      return true;
    case Field::kName:
      if (text->empty()) return false;
      // JSON that an answer happens to be is no call.
      if (bare_ && std::ranges::find(tools_, *text) == tools_.end()) return false;
      name_ = *std::move(text);
      if (has_arguments_) BeginCall(out);
      return true;
    case Field::kArguments:
      return TakeArguments(*std::move(text), out);
    case Field::kOther:
      return true;
  }
  return false;
}

bool ToolCallParser::EndScalar(std::vector<MessageDelta>& out) {
  part_ = Part::kComma;
  if (field_ == Field::kArguments) return token_ == "null" && TakeArguments("{}", out);
  return true;
}

bool ToolCallParser::TakeArguments(std::string text, std::vector<MessageDelta>& out) {
  const size_t begin = text.find_first_not_of(" \n\r\t");
  if (begin == std::string::npos) text = "{}";
  if (begin != std::string::npos && text[begin] != '{') return false;
  has_arguments_ = true;
  arguments_ = std::move(text);
  if (!name_.empty()) BeginCall(out);
  return true;
}

void ToolCallParser::BeginArguments(std::vector<MessageDelta>& out) {
  has_arguments_ = true;
  part_ = Part::kArguments;
  depth_ = 0;
  in_string_ = escaped_ = false;
  if (!name_.empty()) BeginCall(out);
}

bool ToolCallParser::Closes(char c) {
  if (in_string_) {
    if (escaped_) {
      escaped_ = false;
    } else if (c == '\\') {
      escaped_ = true;
    } else if (c == '"') {
      in_string_ = false;
    }
  } else if (c == '"') {
    in_string_ = true;
  } else if (c == '{' || c == '[') {
    ++depth_;
  } else if (c == '}' || c == ']') {
    return --depth_ == 0;
  }
  return false;
}

size_t ToolCallParser::Arguments(std::string_view text, size_t at, std::vector<MessageDelta>& out) {
  size_t end = at;
  bool closed = false;
  while (end < text.size() && !closed) closed = Closes(text[end++]);
  GiveArguments(text.substr(at, end - at), out);
  if (!closed) return end;
  part_ = Part::kComma;
  if (named_) {
    EndCall();
    state_ = State::kContent;
  }
  return end;
}

bool ToolCallParser::EndObject(std::vector<MessageDelta>& out) {
  if (name_.empty()) return false;
  if (!begun_) {
    if (!has_arguments_) arguments_ = "{}";
    BeginCall(out);
  }
  EndCall();
  state_ = list_ ? State::kNextItem : State::kAfter;
  if (syntax_ == ToolSyntax::kMistral && !list_) state_ = State::kContent;
  return true;
}

void ToolCallParser::Broken(std::vector<MessageDelta>& out) {
  if (begun_) {
    EndCall();
    state_ = list_ ? State::kNextItem : State::kAfter;
    return;
  }
  GiveHeld(out);
  state_ = State::kContent;
}

MessageDelta& ToolCallParser::NewPiece(std::vector<MessageDelta>& out) const {
  MessageDelta& piece = out.emplace_back();
  piece.kind = MessageDelta::Kind::kToolCall;
  piece.call = calls_;
  return piece;
}

void ToolCallParser::BeginCall(std::vector<MessageDelta>& out) {
  begun_ = true;
  space_.clear();
  held_.clear();
  if (parallel_ || calls_ == 0) {
    MessageDelta& first = NewPiece(out);
    first.id = NewCallId(syntax_);
    first.name = name_;
  }
  if (!arguments_.empty()) GiveArguments(std::exchange(arguments_, {}), out);
}

void ToolCallParser::GiveArguments(std::string_view piece, std::vector<MessageDelta>& out) {
  if (!begun_) {
    arguments_ += piece;
    held_ += piece;
    return;
  }
  if (!parallel_ && calls_ > 0) return;
  if (out.empty() || out.back().kind != MessageDelta::Kind::kToolCall || out.back().call != calls_ ||
      out.back().begins_call()) {
    NewPiece(out);
  }
  out.back().text += piece;
}

void ToolCallParser::EndCall() {
  ++calls_;
  begun_ = false;
  after_call_ = true;
  held_.clear();
}

void ToolCallParser::GiveHeld(std::vector<MessageDelta>& out) {
  Give(space_, out);
  Give(held_, out);
  space_.clear();
  held_.clear();
}

void ToolCallParser::Give(std::string_view content, std::vector<MessageDelta>& out) {
  if (content.empty()) return;
  AppendDelta(MessageDelta::Kind::kContent, content, out);
  any_content_ = true;
  after_call_ = false;
}

void ToolCallParser::Finish(std::vector<MessageDelta>& out) {
  if (state_ == State::kCloseMark) held_ = token_;
  // White space at the end goes with the call before it; alone it is an answer, too.
  if (held_.empty() && after_call_) return;
  GiveHeld(out);
}

}  // namespace tidepool
