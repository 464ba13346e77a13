#pragma once

#include <gtest/gtest.h>

#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "server/structured/grammar_builder.h"
#include "server/structured/matcher.h"

namespace tidepool {

// Enough for sanitizers and busy machines; the budget has a test of its own.
inline CompileLimits Patient() {
  CompileLimits limits;
  limits.cpu_time_max = absl::Seconds(20);
  return limits;
}

using Grammar = std::shared_ptr<const CompiledGrammar>;
using MakeNode = std::function<absl::StatusOr<GrammarBuilder::Node>(GrammarBuilder&)>;

inline absl::StatusOr<Grammar> Compile(const MakeNode& make, const CompileLimits& limits = Patient()) {
  GrammarBuilder builder(limits);
  const auto node = make(builder);
  if (!node.ok()) return node.status();
  return builder.Build(*node);
}
inline absl::StatusOr<Grammar> CompileRegex(std::string_view pattern,
                                            const CompileLimits& limits = Patient()) {
  return Compile([&](GrammarBuilder& b) { return b.Regex(pattern); }, limits);
}
inline absl::StatusOr<Grammar> CompileEbnf(std::string_view grammar,
                                           const CompileLimits& limits = Patient()) {
  return Compile([&](GrammarBuilder& b) { return b.Ebnf(grammar); }, limits);
}
inline absl::StatusOr<Grammar> CompileSchema(std::string_view schema, const CompileLimits& limits = Patient(),
                                             JsonWhitespace whitespace = JsonWhitespace::kFlexible) {
  return Compile([&](GrammarBuilder& b) { return b.JsonSchemaText(schema, whitespace); }, limits);
}

// All bytes, and some tokens that span what grammars tell apart. The last id is special (no text).
inline std::shared_ptr<const TokenTable> SmallTable() {
  static const auto table = [] {
    std::vector<std::string> tokens;
    for (int byte = 0; byte < 256; ++byte) tokens.emplace_back(1, static_cast<char>(byte));
    for (const char* longer :
         {"{\"",     "\":",   "\": \"", "\",",         "\", \"", "\"}",      "\"}\n",     "true",
          "false",   "null",  "[]",     "{}",          "],",     "},",       "]}",        "}}",
          ", ",      ": ",    "foo",    "fo",          "food",   "bar",      "12",        "100",
          "0.5",     "e\"",   "e\": ",  "\n  ",        "\n    ", "é",        "日本",      "\xE6\x97",
          "a\",\"b", "\\n",   "\\u00",  "\\\"",        "aaaa",   "aaaaaaaa", "the quick", "(((",
          "))",      "<tool", "_call>", "<tool_call>", "ab",     "abc",      "bc",        "1,",
          "-1",      "\":1",  "a\":",   "name\":\"",   "  ",     "    "}) {
      tokens.emplace_back(longer);
    }
    tokens.emplace_back();
    return *TokenTable::FromBytes(std::move(tokens));
  }();
  return table;
}
inline int32_t SpecialId() { return SmallTable()->vocab_size() - 1; }

// Whether the whole text matches.
inline bool Matches(const Grammar& grammar, std::string_view text) {
  Matcher matcher(grammar, SmallTable(), nullptr, "");
  return matcher.AcceptBytes(text).ok() && matcher.CanEnd();
}

}  // namespace tidepool
