#include "server/structured/matcher.h"

#include <gmock/gmock.h>

#include <bit>
#include <string>
#include <vector>

#include "base/rng.h"
#include "tests/server/structured/grammar_testing.h"

namespace tidepool {
namespace {

std::vector<int32_t> Ids(const std::vector<uint32_t>& mask) {
  std::vector<int32_t> out;
  for (size_t w = 0; w < mask.size(); ++w) {
    for (uint32_t rest = mask[w]; rest != 0; rest &= rest - 1) {
      out.push_back(static_cast<int32_t>(w * 32 + static_cast<size_t>(std::countr_zero(rest))));
    }
  }
  return out;
}

// A vocabulary of many short texts from the letters that the grammars below use, so that tokens cross all of
// their borders.
std::shared_ptr<const TokenTable> RandomTable(uint64_t seed) {
  static constexpr const char* kPieces[] = {
      "{", "}", "[", "]",  "\"",    ":", ",", " ",  "\n", "a",    "b", "name", "x", "0",    "1",   "27",
      ".", "-", "e", "\\", "u00e9", "n", "é", "日", "<",  "tool", ">", "(",    ")", "true", "null"};
  Rng rng(seed);
  std::vector<std::string> tokens;
  for (int byte = 0; byte < 256; ++byte) tokens.emplace_back(1, static_cast<char>(byte));
  for (int i = 0; i < 3000; ++i) {
    std::string text;
    const uint64_t pieces = 1 + rng.Below(i % 10 == 0 ? 30 : 5);
    for (uint64_t p = 0; p < pieces; ++p)
      text += kPieces[rng.Below(rng.Chance(0.3) ? 12 : std::size(kPieces))];
    if (rng.Chance(0.05)) text.pop_back();  // half a character, sometimes
    tokens.push_back(std::move(text));
  }
  tokens.emplace_back();
  return *TokenTable::FromBytes(std::move(tokens));
}

std::vector<Grammar> Grammars() {
  const MakeNode makes[] = {
      [](GrammarBuilder& b) { return b.JsonValue(JsonWhitespace::kFlexible); },
      [](GrammarBuilder& b) { return b.JsonObject(JsonWhitespace::kCompact); },
      [](GrammarBuilder& b) {
        return b.JsonSchemaText(
            R"({"type": "object", "properties": {"name": {"type": "string", "minLength": 2,
          "maxLength": 9}, "n": {"type": "number", "minimum": -1.5}, "x": {"enum": ["a", "ab", 12, null]},
          "b": {"type": "array", "items": {"$ref": "#"}, "maxItems": 3}}, "required": ["name"]})",
            JsonWhitespace::kFlexible);
      },
      [](GrammarBuilder& b) {
        return b.JsonSchemaText(R"({"type": "string", "pattern": "^[a-z\\d ]{5,40}$"})",
                                JsonWhitespace::kCompact);
      },
      [](GrammarBuilder& b) {
        return b.JsonSchemaText(R"({"anyOf": [{"type": "string", "maxLength": 30}, {"type": "array"}]})",
                                JsonWhitespace::kFlexible);
      },
      [](GrammarBuilder& b) { return b.Regex("(?i)[a-z ]*(true|null)[^x]+"); },
      [](GrammarBuilder& b) { return b.Ebnf("root ::= [^()]* (\"(\" root \")\" [^()]*)*"); },
      [](GrammarBuilder& b) { return b.Ebnf("root ::= [^x] root \"x\" | \"a\" root \"b\" | \"ab\""); },
      [](GrammarBuilder& b) -> absl::StatusOr<GrammarBuilder::Node> {
        const auto call = b.Sequence({b.Literal("<tool>"), b.JsonObject(JsonWhitespace::kFlexible)});
        return b.Sequence({b.TextWithout({"<tool>", "name"}), b.Choice({call, b.Literal("")})});
      },
  };
  std::vector<Grammar> out;
  for (const MakeNode& make : makes) {
    auto grammar = Compile(make);
    EXPECT_TRUE(grammar.ok()) << grammar.status();
    if (grammar.ok()) out.push_back(*grammar);
  }
  return out;
}

TEST(Matcher, MaskIsExactlyWhatIsAccepted) {
  // Masks come from token classes, overlays, suffix tries and caches; Allows steps byte by byte.
  for (const uint64_t seed : {1, 2}) {
    const auto table = RandomTable(seed);
    MaskCache own(size_t{1} << 20);
    size_t number = 0;
    for (const Grammar& grammar : Grammars()) {
      ++number;
      Rng rng(seed * 100 + number);
      for (int walk = 0; walk < 6; ++walk) {
        MaskCache* which = walk % 3 == 0 ? nullptr : &own;
        Matcher matcher(grammar, table, which, "t");
        Matcher probe(grammar, table, nullptr, "");
        std::vector<uint32_t> mask(table->mask_words());
        std::string text;
        for (int step = 0; step < 25 && !matcher.MustEnd(); ++step) {
          ASSERT_TRUE(matcher.FillMask(mask).ok());
          for (int32_t id = 0; id < table->vocab_size(); ++id) {
            const bool bit = (mask[static_cast<size_t>(id) / 32] >> (id % 32) & 1) != 0;
            ASSERT_EQ(bit, probe.Allows(id)) << "grammar " << number << ", seed " << seed << ", after '"
                                             << text << "', token '" << table->TokenBytes(id) << "'";
          }
          const std::vector<int32_t> ids = Ids(mask);
          ASSERT_FALSE(ids.empty());
          // Long tokens are rare and interesting.
          int32_t id = ids[rng.Below(ids.size())];
          for (int i = 0; i < 3; ++i) {
            const int32_t other = ids[rng.Below(ids.size())];
            if (table->TokenBytes(other).size() > table->TokenBytes(id).size()) id = other;
          }
          text += table->TokenBytes(id);
          ASSERT_TRUE(matcher.Accept(id).ok());
          ASSERT_TRUE(probe.Accept(id).ok());
          ASSERT_EQ(matcher.CanEnd(), probe.CanEnd());
        }
      }
    }
  }
}

TEST(Matcher, SpecialTokensAreNeverSpelledOut) {
  const int32_t special = SpecialId();
  const auto grammar = Compile([&](GrammarBuilder& b) -> absl::StatusOr<GrammarBuilder::Node> {
    return b.Sequence({b.TextWithout({}), b.SpecialToken(special), b.Literal("ab")});
  });
  ASSERT_TRUE(grammar.ok()) << grammar.status();
  Matcher matcher(*grammar, SmallTable(), nullptr, "");
  std::vector<uint32_t> mask(SmallTable()->mask_words());
  ASSERT_TRUE(matcher.AcceptBytes("any text").ok());
  EXPECT_FALSE(matcher.CanEnd());
  ASSERT_TRUE(matcher.FillMask(mask).ok());
  EXPECT_TRUE(mask[static_cast<size_t>(special) / 32] >> (special % 32) & 1);
  ASSERT_TRUE(matcher.Accept(special).ok());
  ASSERT_TRUE(matcher.FillMask(mask).ok());
  EXPECT_EQ(Ids(mask).size(), 2u) << "a and ab";
  EXPECT_FALSE(matcher.Accept(special).ok());
  ASSERT_TRUE(matcher.AcceptBytes("ab").ok());
  EXPECT_TRUE(matcher.MustEnd());
  ASSERT_TRUE(matcher.FillMask(mask).ok());
  EXPECT_TRUE(Ids(mask).empty());
}

TEST(Matcher, ATokenMayBeMeantByItsBytesAndByItsId) {
  // An added token that is not special: both ways lead on.
  int32_t call = 0;
  while (SmallTable()->TokenBytes(call) != "<tool_call>") ++call;
  const auto grammar = Compile([&](GrammarBuilder& b) -> absl::StatusOr<GrammarBuilder::Node> {
    return b.Choice({b.Sequence({b.SpecialToken(call), b.Literal("1")}), b.Literal("<tool_call>2")});
  });
  ASSERT_TRUE(grammar.ok()) << grammar.status();
  Matcher matcher(*grammar, SmallTable(), nullptr, "");
  ASSERT_TRUE(matcher.Accept(call).ok());
  EXPECT_TRUE(matcher.Allows('1'));
  EXPECT_TRUE(matcher.Allows('2'));
  matcher.Reset();
  ASSERT_TRUE(matcher.AcceptBytes("<tool_call>").ok());
  EXPECT_FALSE(matcher.Allows('1'));
  EXPECT_TRUE(matcher.Allows('2'));
}

TEST(Matcher, TextWithoutStopsBeforeThem) {
  const auto grammar = Compile([](GrammarBuilder& b) -> absl::StatusOr<GrammarBuilder::Node> {
    return b.Sequence({b.TextWithout({"abab", "<x>"}), b.Literal("<x>")});
  });
  ASSERT_TRUE(grammar.ok()) << grammar.status();
  EXPECT_TRUE(Matches(*grammar, "aba日aba<<x>"));
  EXPECT_TRUE(Matches(*grammar, "<x>"));
  EXPECT_FALSE(Matches(*grammar, "ababab<x>"));
  EXPECT_FALSE(Matches(*grammar, "a<x>b<x>"));
  EXPECT_FALSE(Matches(*grammar, "\xFF<x>"));
}

TEST(Matcher, ARefusedTokenChangesNothing) {
  const auto grammar = CompileSchema(R"({"type": "integer"})");
  ASSERT_TRUE(grammar.ok());
  Matcher matcher(*grammar, SmallTable(), nullptr, "");
  ASSERT_TRUE(matcher.Accept('1').ok());
  for (const int32_t id : {-1, SmallTable()->vocab_size(), int32_t{'a'}, SpecialId()}) {
    EXPECT_EQ(matcher.Accept(id).code(), absl::StatusCode::kInvalidArgument);
    EXPECT_FALSE(matcher.Allows(id));
  }
  EXPECT_FALSE(matcher.AcceptBytes("23x").ok());
  EXPECT_TRUE(matcher.CanEnd());
  EXPECT_TRUE(matcher.Accept('2').ok());
}

TEST(Matcher, AVocabularyThatCannotSpellIsAnError) {
  const auto table = *TokenTable::FromBytes({"a", "b"});
  EXPECT_FALSE(table->covers_all_bytes());
  EXPECT_TRUE(SmallTable()->covers_all_bytes());
  const auto grammar = CompileRegex("ac|b");
  Matcher matcher(*grammar, table, nullptr, "");
  std::vector<uint32_t> mask(table->mask_words());
  ASSERT_TRUE(matcher.FillMask(mask).ok());
  ASSERT_TRUE(matcher.Accept(0).ok());
  EXPECT_EQ(matcher.FillMask(mask).code(), absl::StatusCode::kFailedPrecondition);
}

TEST(Matcher, LongOutputsStayWithinTheirMemory) {
  const auto grammar =
      CompileSchema(R"({"type": "array", "items": {"type": "string", "maxLength": 100000}})");
  ASSERT_TRUE(grammar.ok());
  Matcher matcher(*grammar, SmallTable(), nullptr, "");
  std::vector<uint32_t> mask(SmallTable()->mask_words());
  ASSERT_TRUE(matcher.AcceptBytes("[\"").ok());
  for (int i = 0; i < 40'000; ++i) {
    ASSERT_TRUE(matcher.AcceptBytes("ab").ok()) << i;
    if (i % 1000 != 0) continue;
    ASSERT_TRUE(matcher.FillMask(mask).ok());
  }
  EXPECT_GT(matcher.stats().arena_resets, 0u);
  EXPECT_TRUE(matcher.AcceptBytes(std::string(20'000, 'x')).ok());
  EXPECT_FALSE(matcher.AcceptBytes("y").ok()) << "100000 characters are all";
  EXPECT_TRUE(matcher.AcceptBytes("\",\"z\"]").ok());
  EXPECT_TRUE(matcher.MustEnd());
}

TEST(Matcher, AmbiguousGrammarsStayPolynomial) {
  const auto grammar = CompileEbnf(
      "root ::= s\ns ::= p s \"b\" | q s \"c\" | \"\"\np ::= \"a\" | \"aa\"\nq ::= \"a\" | \"aa\"");
  ASSERT_TRUE(grammar.ok()) << grammar.status();
  Matcher matcher(*grammar, SmallTable(), nullptr, "");
  ASSERT_TRUE(matcher.AcceptBytes(std::string(200, 'a')).ok());
  ASSERT_TRUE(matcher.AcceptBytes(std::string(150, 'c')).ok());
  EXPECT_TRUE(matcher.CanEnd());
}

// n alternatives that all begin with the same rule, `tail` behind it.
std::string CommonBeginning(int n, std::string_view before) {
  std::string out = "root ::= " + std::string(before) + " (x \"0\"";
  for (int i = 1; i < n; ++i) absl::StrAppend(&out, " | x \"", i, "\"");
  return out + ")\nx ::= \"(\" x \")\" | \"b\"";
}

TEST(Matcher, TooManyWaysFromTheBeginningAreAnErrorAndNotASecond) {
  const auto grammar = CompileEbnf(CommonBeginning(15'000, ""));
  ASSERT_TRUE(grammar.ok()) << grammar.status();
  Matcher matcher(*grammar, SmallTable(), nullptr, "");
  EXPECT_EQ(matcher.status().code(), absl::StatusCode::kResourceExhausted);
  std::vector<uint32_t> mask(SmallTable()->mask_words(), 1);
  EXPECT_EQ(matcher.FillMask(mask).code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(mask, ::testing::Each(0u));
  EXPECT_EQ(matcher.Accept('b').code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(matcher.AcceptBytes("b").code(), absl::StatusCode::kResourceExhausted);
  EXPECT_FALSE(matcher.Allows('b'));
  EXPECT_FALSE(matcher.CanEnd());
  EXPECT_FALSE(matcher.MustEnd());
  matcher.Reset();
  EXPECT_EQ(matcher.status().code(), absl::StatusCode::kResourceExhausted);
}

TEST(Matcher, WhatWasGivenUpIsNotRemembered) {
  const auto grammar = CompileEbnf(CommonBeginning(800, "\"a\""));
  ASSERT_TRUE(grammar.ok()) << grammar.status();
  Matcher matcher(*grammar, SmallTable(), nullptr, "");
  std::vector<uint32_t> mask(SmallTable()->mask_words());
  ASSERT_TRUE(matcher.status().ok());
  // A token that a batch waits for may take less than one's mask.
  for (int i = 0; i < 2; ++i) {
    const absl::Status accepted = matcher.Accept('a');
    EXPECT_EQ(accepted.code(), absl::StatusCode::kResourceExhausted) << accepted;
  }
  EXPECT_TRUE(matcher.Allows('a')) << "within a mask's limit";
  EXPECT_TRUE(matcher.FillMask(mask).ok());
  EXPECT_TRUE(matcher.Accept('a').ok()) << "computed by now";
  EXPECT_TRUE(matcher.AcceptBytes("b799").ok());
  EXPECT_TRUE(matcher.MustEnd());
}

}  // namespace
}  // namespace tidepool
