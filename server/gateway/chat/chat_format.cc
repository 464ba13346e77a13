#include "server/gateway/chat/chat_format.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "server/gateway/chat/tool_call_parser.h"

namespace tidepool {
namespace {

constexpr std::string_view kOffered = "probe_offered_fn", kCalled = "probe_called_fn";

OrderedJson Function(std::string_view name) {
  const OrderedJson schema = {
      {"type", "object"},
      {"properties", {{"probe_arg", {{"type", "string"}, {"description", "an argument"}}}}},
      {"required", {"probe_arg"}}};
  return {{"type", "function"},
          {"function", {{"name", name}, {"description", "a function"}, {"parameters", schema}}}};
}

OrderedJson Say(std::string_view role, std::string_view content) {
  return {{"role", role}, {"content", content}};
}

std::string Render(const ChatTemplate& chat_template, OrderedJson messages, bool generate) {
  const OrderedJson request = {{"messages", std::move(messages)},
                               {"tools", OrderedJson::array({Function(kOffered)})}};
  const OrderedJson trusted = {
      {"add_generation_prompt", generate}, {"bos_token", "<s>"}, {"eos_token", "</s>"}};
  auto text = chat_template.Render(request, trusted);
  return text.ok() ? std::move(text->text) : std::string();
}

// A turn with a call and its result, as templates expect it; "": it is refused.
std::string RenderCall(const ChatTemplate& chat_template, const OrderedJson& content) {
  // Nine letters and digits: Mistral's templates refuse others.
  const OrderedJson call = {{"id", "abcdef123"},
                            {"type", "function"},
                            {"function", {{"name", kCalled}, {"arguments", {{"probe_arg", "v"}}}}}};
  const OrderedJson assistant = {
      {"role", "assistant"}, {"content", content}, {"tool_calls", OrderedJson::array({call})}};
  OrderedJson result = Say("tool", "a result");
  result["tool_call_id"] = "abcdef123";
  result["name"] = kCalled;
  return Render(chat_template, OrderedJson::array({Say("user", "a question"), assistant, result}), false);
}

bool Reads(ToolSyntax syntax, std::string_view text) {
  ParserPlan plan;
  plan.syntax = syntax;
  plan.tools = {std::string(kCalled)};
  ToolCallParser parser(plan);
  std::vector<MessageDelta> pieces;
  parser.Push(text, pieces);
  parser.Finish(pieces);
  Message message;
  for (const MessageDelta& piece : pieces) message.Add(piece);
  return std::ranges::any_of(message.tool_calls, [](const ToolCall& call) {
    const auto arguments = ParseJson(call.arguments);
    return call.name == kCalled && arguments.ok() && *arguments == OrderedJson{{"probe_arg", "v"}};
  });
}

void FindSyntax(std::string_view text, bool python_tag, TemplateTraits& traits) {
  const size_t at = text.find(kCalled);
  const size_t open = text.substr(0, at).rfind('{');
  if (Reads(ToolSyntax::kHermes, text)) {
    traits.syntax = ToolSyntax::kHermes;
  } else if (Reads(ToolSyntax::kMistral, text)) {
    traits.syntax = ToolSyntax::kMistral;
    constexpr std::string_view kMarker = "[TOOL_CALLS]";
    const size_t marker = text.substr(0, at).rfind(kMarker);
    traits.names =
        marker != std::string_view::npos &&
        text.substr(0, at).find_first_not_of(' ', marker + kMarker.size()) == std::string_view::npos;
  } else if (python_tag && open != std::string_view::npos &&
             text.substr(open, at - open + 64).find("\"parameters\"") != std::string_view::npos &&
             Reads(ToolSyntax::kLlama3, text.substr(open))) {
    traits.syntax = ToolSyntax::kLlama3;
  }
}

}  // namespace

TemplateTraits ProbeTemplate(const ChatTemplate& chat_template, bool python_tag) {
  TemplateTraits traits;
  const OrderedJson user = Say("user", "a question");
  for (const OrderedJson& messages :
       {OrderedJson::array({user}), OrderedJson::array({Say("system", "a rule"), user})}) {
    if (Render(chat_template, messages, true).find(kOffered) != std::string::npos) traits.takes_tools = true;
  }
  // Some templates want a text beside the calls, others refuse one.
  for (const OrderedJson& content : {OrderedJson(""), OrderedJson(nullptr)}) {
    const std::string text = RenderCall(chat_template, content);
    if (text.empty()) continue;
    traits.shows_calls = text.find(kCalled) != std::string::npos;
    if (traits.shows_calls) FindSyntax(text, python_tag, traits);
    if (traits.syntax != ToolSyntax::kNone) break;
  }
  return traits;
}

absl::StatusOr<ChatFormat> ChatFormat::Detect(const ModelConfig& config, const Tokenizer& tokenizer,
                                              const ChatTemplate* chat_template) {
  ChatFormat format;
  if (chat_template != nullptr) {
    format.traits_ = ProbeTemplate(*chat_template, tokenizer.PieceToId("<|python_tag|>").has_value());
  }
  ToolSyntax& syntax = format.traits_.syntax;
  const std::string& parser = config.tool_parser;
  if (parser == "hermes") {
    syntax = ToolSyntax::kHermes;
  } else if (parser == "llama3") {
    syntax = ToolSyntax::kLlama3;
  } else if (parser == "mistral") {
    syntax = ToolSyntax::kMistral;
  } else if (parser == "none") {
    syntax = ToolSyntax::kNone;
  } else if (parser != "auto") {
    return absl::InvalidArgumentError(
        absl::StrCat("model.tool_parser: must be auto, hermes, llama3, mistral or none, not '", parser, "'"));
  }
  format.reasons_ = config.reasoning_parser == "think" ||
                    (config.reasoning_parser == "auto" &&
                     (tokenizer.chat_template().find("</think>") != std::string::npos ||
                      tokenizer.PieceToId("</think>").has_value()));
  std::vector<std::string_view> kept;
  if (syntax == ToolSyntax::kHermes) kept = {"<tool_call>", "</tool_call>"};
  if (syntax == ToolSyntax::kLlama3) kept = {"<|python_tag|>"};
  if (syntax == ToolSyntax::kMistral) kept = {"[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"};
  if (format.reasons_) kept.insert(kept.end(), {"<think>", "</think>"});
  for (std::string_view piece : kept) {
    // One that does not count as special is ordinary text to a decoder.
    const auto id = tokenizer.PieceToId(piece);
    if (!id || !tokenizer.is_special(*id)) continue;
    format.kept_.push_back(*id);
    format.kept_pieces_.push_back(piece);
  }
  return format;
}

std::optional<ApiError> ChatFormat::Check(const InferenceRequest& request) const {
  const auto* chat = std::get_if<ChatInput>(&request.input);
  if (chat == nullptr) return std::nullopt;
  if (request.tools.active()) {
    if (!traits_.takes_tools) {
      return MakeError(errors::kUnsupported,
                       "tools: the chat template of the served model does not take tools; leave them out",
                       "tools");
    }
    if (traits_.syntax == ToolSyntax::kNone) {
      return MakeError(
          errors::kUnsupported,
          "tools: how the served model writes tool calls is not known to this server; leave them "
          "out, or have model.tool_parser set",
          "tools");
    }
  }
  if (traits_.shows_calls) return std::nullopt;
  for (size_t i = 0; i < chat->messages.size(); ++i) {
    if (!chat->messages[i].contains("tool_calls")) continue;
    const std::string field = absl::StrCat("messages[", i, "].tool_calls");
    return MakeError(errors::kUnsupported,
                     absl::StrCat(field,
                                  ": the chat template of the served model does not show tool calls; "
                                  "leave them out"),
                     field);
  }
  return std::nullopt;
}

std::optional<int32_t> ChatFormat::SpecialId(std::string_view piece) const {
  const auto it = std::ranges::find(kept_pieces_, piece);
  if (it == kept_pieces_.end()) return std::nullopt;
  return kept_[static_cast<size_t>(it - kept_pieces_.begin())];
}

ParserPlan ChatFormat::Plan(const InferenceRequest& request) const {
  ParserPlan plan;
  if (request.tools.active()) {
    plan.syntax = traits_.syntax;
    for (const Tool& tool : request.tools.tools) plan.tools.push_back(tool.name);
    plan.parallel = request.tools.parallel;
    plan.named = request.tools.choice == ToolChoice::kNamed;
  }
  plan.reasoning = reasons_;
  plan.include_reasoning = request.reasoning.include;
  if (const auto* chat = std::get_if<ChatInput>(&request.input);
      chat != nullptr && chat->continue_final_message) {
    plan.continued = chat->messages.back()["content"].get<std::string>();
  }
  return plan;
}

}  // namespace tidepool
