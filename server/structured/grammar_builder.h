#pragma once

#include <cstdint>
#include <initializer_list>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "server/structured/compiled_grammar.h"
#include "server/structured/limits.h"

namespace tidepool {

namespace structured {
class ExpressionPool;  // expression.h
}  // namespace structured

// White space between the tokens of generated JSON (never inside strings).
enum class JsonWhitespace : uint8_t {
  // Nothing anywhere: {"a":1,"b":[1,2]}.
  kCompact,
  // What models write by themselves, bounded so that none can go on for ever: behind `{` `[` `,` `:` and
  // before
  // `}` `]` nothing, one space, or one line feed and up to 60 spaces or up to 20 tabs.
  kFlexible,
};

// GrammarBuilder: Codec from what a request asks for to a CompiledGrammar. An expression is made of nodes,
// bottom up; Build compiles the one that the whole output has to match. Owned by one thread, used once: the
// CPU budget runs from construction on.
//
// Errors: InvalidArgument (malformed or contradictory source: what and where), Unimplemented (well-formed,
// but with a construct that we do not have: its name and where; JSON schemas by JSON pointer),
// ResourceExhausted (a CompileLimits limit, by name). All three are the caller's fault: a 400. The functions
// without a status cannot fail by themselves; what is wrong with their arguments shows in Build's status.
class GrammarBuilder {
 public:
  // A node of this builder (View).
  struct Node {
    uint32_t index = 0;
  };

  explicit GrammarBuilder(const CompileLimits& limits = {});
  ~GrammarBuilder();
  GrammarBuilder(const GrammarBuilder&) = delete;
  GrammarBuilder& operator=(const GrammarBuilder&) = delete;

  // Exactly these bytes, in any tokenisation. May be empty.
  Node Literal(std::string_view bytes);
  // Exactly this vocabulary token, in no other spelling. id >= 0.
  Node SpecialToken(int32_t id);
  Node Sequence(std::span<const Node> parts);
  Node Sequence(std::initializer_list<Node> parts) {
    return Sequence(std::span(parts.begin(), parts.size()));
  }
  // One of them; none at all is an error of Build.
  Node Choice(std::span<const Node> options);
  Node Choice(std::initializer_list<Node> options) {
    return Choice(std::span(options.begin(), options.size()));
  }
  // One of these texts; the same as a Choice of Literals, and cheaper where there are many.
  Node OneOf(std::vector<std::string> texts);
  Node Repeat(Node node, uint32_t min, std::optional<uint32_t> max);
  Node Optional(Node node) { return Repeat(node, 0, 1); }
  // Any valid UTF-8 (the empty text too) in which none of `stops` occurs. It may end in the beginning of one:
  // TextWithout({"<call>"}), Literal("<call>") is text up to the first "<call>" and that. None of `stops` may
  // be empty; no stops is any text.
  Node TextWithout(std::vector<std::string> stops);

  struct RegexOptions {
    bool case_insensitive = false;  // as (?i)
  };
  // The whole text matches `pattern` (anchors at the ends are implied and may be written). Syntax of RE2 and
  // the regular part of ECMAScript's and Python's: see regex.h. Back references, look-around and word
  // boundaries are Unimplemented. Over code points; `.` is any character but a line feed, as everywhere.
  absl::StatusOr<Node> Regex(std::string_view pattern, const RegexOptions& options);
  absl::StatusOr<Node> Regex(std::string_view pattern) { return Regex(pattern, RegexOptions{}); }

  // GBNF as llama.cpp and vLLM take it; `root` is where it starts. See ebnf.h.
  absl::StatusOr<Node> Ebnf(std::string_view grammar);

  // A JSON document that is valid against `schema` (an object or a boolean). json_schema.h lists every
  // keyword and says what of it is supported. Properties come in the order of the schema.
  absl::StatusOr<Node> JsonSchema(const nlohmann::ordered_json& schema, JsonWhitespace whitespace);
  // The same from text; strict JSON without duplicate keys.
  absl::StatusOr<Node> JsonSchemaText(std::string_view schema, JsonWhitespace whitespace);
  // Any JSON object, any JSON value.
  Node JsonObject(JsonWhitespace whitespace);
  Node JsonValue(JsonWhitespace whitespace);

  // Call once. Errors beside those above: InvalidArgument where nothing at all matches `root`.
  absl::StatusOr<std::shared_ptr<const CompiledGrammar>> Build(Node root);

 private:
  std::unique_ptr<structured::ExpressionPool> pool_;
};

}  // namespace tidepool
