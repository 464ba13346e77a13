// A template, 0x1E, the JSON of the request's variables (a fixed conversation where that is no object):
// parsing and rendering end within their limits, the same again gives the same, and what a user wrote stays
// marked.
#include <algorithm>

#include "server/model/template/chat_template.h"
#include "tests/fuzz/fuzz_target.h"

namespace tidepool {
namespace {

using nlohmann::ordered_json;

constexpr char kConversation[] = R"({
  "messages": [
    {"role": "system", "content": "You are  terse.\n"},
    {"role": "user", "content": "Hi <|end|> {{ 1 }} \u0416\u0429 wörld"},
    {"role": "assistant", "content": null, "tool_calls": [
      {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"x": [1, 2.5, true, null]}}}]},
    {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "42"}]},
    {"role": "user", "content": ""}],
  "tools": [{"type": "function", "function": {"name": "f", "description": "d",
             "parameters": {"type": "object", "properties": {"x": {"type": "number"}}}}}],
  "documents": [{"title": "t", "text": "b"}],
  "add_generation_prompt": true, "n": -7, "big": 9223372036854775807
})";

ChatTemplate::Limits Small() {
  ChatTemplate::Limits limits;
  limits.steps_max = 20'000;
  limits.output_bytes_max = size_t{256} << 10;
  limits.alloc_bytes_max = uint64_t{4} << 20;
  limits.time_max = absl::InfiniteDuration();  // steps end it at the same place each time
  limits.now = absl::FromUnixSeconds(1'700'000'000);
  limits.zone = absl::UTCTimeZone();
  return limits;
}

// Two letters that nothing but the fixed conversation's user writes, unless the template spells or makes
// them.
constexpr std::string_view kUserWrote = "\xD0\x96\xD0\xA9";
bool CouldMakeThem(std::string_view source) {
  return source.find('\xD0') != source.npos || source.find('\\') != source.npos;
}

void CheckMarks(const MarkedText& text, bool every_user_byte_is_marked) {
  size_t at = 0;
  for (const ByteRange& range : text.data) {
    TP_CHECK(range.begin < range.end && range.end <= text.text.size());
    TP_CHECK(&range == text.data.data() || range.begin >= at);
    at = range.end;
  }
  if (!every_user_byte_is_marked) return;
  for (size_t found = text.text.find(kUserWrote); found != std::string::npos;
       found = text.text.find(kUserWrote, found + 1)) {
    for (size_t i = found; i < found + kUserWrote.size(); ++i) {
      TP_CHECK(std::any_of(text.data.begin(), text.data.end(),
                           [i](const ByteRange& range) { return range.begin <= i && i < range.end; }));
    }
  }
}

// Brackets outside and inside strings: more than the gateway lets through is not a template's business.
bool Deep(std::string_view json) {
  int depth = 0;
  for (const char c : json) {
    depth += c == '[' || c == '{' ? 1 : c == ']' || c == '}' ? -1 : 0;
    if (depth > 64) return true;
  }
  return false;
}

}  // namespace

TIDEPOOL_FUZZ_TARGET(chat_template) {
  const auto parts = fuzz::Split(input, 2);
  const auto parsed = ChatTemplate::Parse(std::string(parts[0]));
  if (!parsed.ok()) {
    TP_CHECK(!parsed.status().message().empty());
    return;
  }
  static const ordered_json conversation = ordered_json::parse(kConversation);
  static const ordered_json trusted = {{"bos_token", "<s>"}, {"eos_token", "</s>"}};
  ordered_json request;
  if (!Deep(parts[1])) request = ordered_json::parse(parts[1], nullptr, false);
  const bool fixed = !request.is_object();
  if (fixed) request = conversation;
  const ChatTemplate::Limits limits = Small();
  const auto text = parsed->Render(request, trusted, limits);
  const auto again = parsed->Render(request, trusted, limits);
  TP_CHECK(text.status() == again.status());
  if (!text.ok()) return;
  TP_CHECK(text->text == again->text && text->data == again->data);
  TP_CHECK(text->text.size() <= limits.output_bytes_max);
  CheckMarks(*text, fixed && !CouldMakeThem(parts[0]));
}

}  // namespace tidepool
