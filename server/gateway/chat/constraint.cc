#include "server/gateway/chat/constraint.h"

#include <algorithm>
#include <optional>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/status.h"

namespace tidepool {
namespace {

using Node = GrammarBuilder::Node;
using Kind = StructuredSpec::Kind;

constexpr std::string_view kThink = "<think>", kThinkEnd = "</think>";

// The first error's field stays here while a status goes up.
class Builder {
 public:
  Builder(const InferenceRequest& request, const ChatFormat& format, GrammarBuilder& b)
      : request_(request), format_(format), b_(b) {}

  const std::string& field() const { return field_; }

  absl::StatusOr<Node> Answer(ThoughtState thought) {
    TP_ASSIGN_OR_RETURN(const Node body, Body());
    if (thought == ThoughtState::kNone) return body;
    const Node rest = b_.Sequence({b_.TextWithout({std::string(kThinkEnd)}), Mark(kThinkEnd),
                                   b_.Repeat(b_.Choice({b_.Literal("\n"), b_.Literal(" ")}), 0, 2)});
    if (thought == ThoughtState::kInside) return b_.Sequence({rest, body});
    return b_.Sequence({b_.Optional(b_.Sequence({Mark(kThink), rest})), body});
  }

 private:
  absl::StatusOr<Node> Body() {
    const ToolOptions& tools = request_.tools;
    field_ = "tools";
    if (tools.choice == ToolChoice::kNamed) return Calls(1);
    if (tools.choice == ToolChoice::kRequired) return Calls(MostCalls());
    if (!request_.structured) return TextWithCalls();
    TP_ASSIGN_OR_RETURN(const Node format, Structured(*request_.structured));
    const Kind kind = request_.structured->kind;
    if (!tools.active() || (kind != Kind::kJsonObject && kind != Kind::kJsonSchema)) return format;
    TP_ASSIGN_OR_RETURN(const Node calls, Calls(MostCalls()));
    return b_.Choice({format, calls});
  }

  absl::StatusOr<Node> Structured(const StructuredSpec& spec) {
    field_ = spec.field;
    const JsonWhitespace space = spec.compact ? JsonWhitespace::kCompact : JsonWhitespace::kFlexible;
    switch (spec.kind) {
      case Kind::kJsonObject:
        return b_.JsonObject(space);
      case Kind::kJsonSchema:
        return b_.JsonSchema(spec.schema, space);
      case Kind::kRegex:
        return b_.Regex(spec.text);
      case Kind::kGrammar:
        return b_.Ebnf(spec.text);
      case Kind::kChoice:
        break;
    }
    std::vector<Node> options;
    for (const std::string& one : spec.choices) options.push_back(b_.Literal(one));
    return b_.Choice(options);
  }

  // A tag: the token where it is one that no text spells.
  Node Mark(std::string_view tag) {
    const auto id = format_.SpecialId(tag);
    return id ? b_.SpecialToken(*id) : b_.Literal(tag);
  }

  absl::StatusOr<Node> Arguments(const Tool& tool) {
    field_ = tool.field;
    const Node any = b_.JsonObject(JsonWhitespace::kFlexible);
    if (tool.parameters.is_null()) return any;
    OrderedJson schema = tool.parameters;
    schema["type"] = "object";
    auto node = b_.JsonSchema(schema, JsonWhitespace::kFlexible);
    if (absl::IsUnimplemented(node.status()) && !tool.strict) return any;
    return node;
  }

  // {"name": "f", "arguments": {...}}, of any tool.
  absl::StatusOr<Node> Object(std::string_view arguments_key) {
    std::vector<Node> options;
    for (const Tool& tool : request_.tools.tools) {
      TP_ASSIGN_OR_RETURN(const Node arguments, Arguments(tool));
      const std::string head =
          absl::StrCat("{\"name\": \"", tool.name, "\", \"", std::string(arguments_key), "\": ");
      options.push_back(b_.Sequence({b_.Literal(head), arguments, b_.Literal("}")}));
    }
    return b_.Choice(options);
  }

  // Nullopt: as many as the model likes. A bound would be written out, call by call, and cost as much to
  // compile; max_tokens ends a model that does not stop.
  std::optional<uint32_t> MostCalls() const {
    if (request_.tools.parallel) return std::nullopt;
    return 1;
  }

  // One to `max` calls, as the model's format puts them one after another.
  absl::StatusOr<Node> Calls(std::optional<uint32_t> max) {
    switch (format_.tool_syntax()) {
      case ToolSyntax::kHermes: {
        TP_ASSIGN_OR_RETURN(const Node object, Object("arguments"));
        return List(b_.Sequence({Mark("<tool_call>"), b_.Literal("\n"), object, b_.Literal("\n"),
                                 Mark("</tool_call>")}),
                    "\n", max);
      }
      case ToolSyntax::kLlama3: {
        TP_ASSIGN_OR_RETURN(const Node object, Object("parameters"));
        return List(object, "; ", max);
      }
      case ToolSyntax::kMistral:
        break;
      case ToolSyntax::kNone:
        return absl::InternalError("tools without a syntax");
    }
    if (format_.traits().names) {
      std::vector<Node> options;
      for (const Tool& tool : request_.tools.tools) {
        TP_ASSIGN_OR_RETURN(const Node arguments, Arguments(tool));
        options.push_back(
            b_.Sequence({Mark("[TOOL_CALLS]"), b_.Literal(tool.name), Mark("[ARGS]"), arguments}));
      }
      return b_.Repeat(b_.Choice(options), 1, max);
    }
    TP_ASSIGN_OR_RETURN(const Node object, Object("arguments"));
    return b_.Sequence({Mark("[TOOL_CALLS]"), b_.Optional(b_.Literal(" ")), b_.Literal("["),
                        List(object, ", ", max), b_.Literal("]")});
  }

  Node List(Node one, std::string_view separator, std::optional<uint32_t> max) {
    if (max == 1) return one;
    if (max) --*max;
    return b_.Sequence({one, b_.Repeat(b_.Sequence({b_.Literal(separator), one}), 0, max)});
  }

  // Text in which a call that begins is one of ours.
  absl::StatusOr<Node> TextWithCalls() {
    TP_ASSIGN_OR_RETURN(const Node calls, Calls(MostCalls()));
    if (format_.tool_syntax() == ToolSyntax::kLlama3) {
      // A brace at the beginning is a call, and so is its tag anywhere.
      TP_ASSIGN_OR_RETURN(const Node first, b_.Regex("[^{<\\s]"));
      const Node text = b_.Choice({b_.Sequence({first, b_.TextWithout({"<|python_tag|>"})}),
                                   b_.Sequence({b_.Literal("<"), b_.TextWithout({"|python_tag|>"})})});
      return b_.Choice({calls, b_.Optional(text)});
    }
    const std::string marker(format_.tool_syntax() == ToolSyntax::kHermes ? "<tool_call>" : "[TOOL_CALLS]");
    const Node text = b_.TextWithout({marker});
    return b_.Sequence({text, b_.Optional(b_.Sequence({calls, text}))});
  }

  const InferenceRequest& request_;
  const ChatFormat& format_;
  GrammarBuilder& b_;
  std::string field_;
};

// Whether the constraint itself says what is thought: then it holds from the first token on.
bool WritesThoughts(const StructuredSpec& spec) {
  const auto has = [](const std::string& text) { return text.find(kThinkEnd) != std::string::npos; };
  return has(spec.text) || std::ranges::any_of(spec.choices, has);
}

bool Forced(const InferenceRequest& request) {
  return request.tools.choice == ToolChoice::kRequired || request.tools.choice == ToolChoice::kNamed;
}

}  // namespace

ThoughtState FindThoughtState(const ChatFormat& format, const InferenceRequest& request,
                              std::string_view prompt) {
  const auto* chat = std::get_if<ChatInput>(&request.input);
  if (chat == nullptr || !format.reasons()) return ThoughtState::kNone;
  if (request.structured && WritesThoughts(*request.structured)) return ThoughtState::kNone;
  const ParserPlan plan = format.Plan(request);
  if (BeginsInThought(plan, prompt)) return ThoughtState::kInside;
  // Templates that end the thoughts at once, and continuations that have done so.
  const size_t last = prompt.find_last_not_of(" \n\r\t");
  if (!plan.continued.empty()) return ThoughtState::kNone;
  if (last != std::string_view::npos && prompt.substr(0, last + 1).ends_with(kThinkEnd)) {
    return ThoughtState::kNone;
  }
  for (const char* name : {"enable_thinking", "thinking"}) {
    const auto it = chat->template_kwargs.find(name);
    if (it != chat->template_kwargs.end() && *it == false) return ThoughtState::kNone;
  }
  return ThoughtState::kMay;
}

bool IsConstrained(const InferenceRequest& request) {
  const bool strict = std::ranges::any_of(request.tools.tools, [](const Tool& tool) { return tool.strict; });
  return request.structured || Forced(request) || (request.tools.active() && strict);
}

std::variant<Node, ApiError> BuildConstraint(const InferenceRequest& request, const ChatFormat& format,
                                             ThoughtState thought, GrammarBuilder& builder) {
  if (Forced(request) && request.structured && request.structured->kind != Kind::kJsonObject &&
      request.structured->kind != Kind::kJsonSchema) {
    return MakeError(
        errors::kInvalidRequest,
        absl::StrCat(request.structured->field,
                     ": cannot be combined with a tool_choice that leaves no text to hold to it"),
        request.structured->field);
  }
  Builder build(request, format, builder);
  auto node = build.Answer(thought);
  if (!node.ok()) return GrammarError(build.field(), node.status());
  return *node;
}

ApiError GrammarError(std::string_view field, const absl::Status& status) {
  const ErrorKind& kind = absl::IsUnimplemented(status) ? errors::kUnsupported
                          : absl::IsInvalidArgument(status) || absl::IsResourceExhausted(status)
                              ? errors::kInvalidRequest
                              : errors::kInternal;
  return MakeError(kind, absl::StrCat(std::string(field), ": ", std::string(status.message())),
                   std::string(field));
}

}  // namespace tidepool
