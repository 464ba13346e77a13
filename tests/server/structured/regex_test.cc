#include <string>
#include <vector>

#include "tests/server/structured/grammar_testing.h"

namespace tidepool {
namespace {

struct Case {
  const char* pattern;
  std::vector<std::string> yes, no;
};

TEST(StructuredRegex, MatchesWholeTextsAsRe2Does) {
  const std::vector<Case> cases = {
      {"abc", {"abc"}, {"", "ab", "abcd", "xabc"}},
      {"^abc$", {"abc"}, {"abcd", "xabc"}},
      {"a|bc|", {"a", "bc", ""}, {"b", "abc"}},
      {"a*b+c?", {"b", "aabbc", "bc"}, {"", "ac", "abcc"}},
      {"(ab){2,3}", {"abab", "ababab"}, {"ab", "abababab"}},
      {"a{3}", {"aaa"}, {"aa", "aaaa"}},
      {"a{2,}", {"aa", "aaaaaa"}, {"a"}},
      {"a{,2}b", {"b", "ab", "aab"}, {"aaab"}},
      {"a{x}", {"a{x}"}, {"a"}},
      {"[a-c]+[^x-z]", {"aq", "abcé"}, {"ax", "a"}},
      {"[]a]+", {"]a]"}, {"b"}},
      {"[a\\-z-]+", {"a-z"}, {"b"}},
      {"[[:alpha:]_]+", {"ab_"}, {"a1"}},
      {"\\d+\\.\\d", {"12.5"}, {"12", "12.", "١.1"}},
      {"\\w\\W\\s\\S", {"a- b", "_é\tx"}, {"éé b", "a-bb"}},
      {".", {"a", "é", "日", "\xF0\x9F\x98\x80"}, {"\n", "ab", "\xFF", "\xC3"}},
      {"(?s).", {"\n"}, {""}},
      {"(?i)Straße", {"straße", "STRAßE"}, {"strasse"}},
      {"a(?i:b)c", {"abc", "aBc"}, {"Abc", "abC"}},
      {"(?P<year>\\d{4})-(?<month>\\d\\d)", {"2024-05"}, {"2024-5"}},
      {"\\x41\\u0042\\x{43}\\cA\\t", {"ABC\x01\t"}, {"ABC"}},
      {"\\p{Lu}\\p{Ll}+\\pN", {"Éa1", "Az²"}, {"az1", "A1"}},
      {"\\p{Greek}+", {"αβ"}, {"ab"}},
      {"[^\\p{L}]", {"1"}, {"é"}},
      {"a.*?b", {"ab", "aXb", "abb"}, {"a"}},
      {"(a|aa)*", {"", "aaaaa"}, {"b"}},
      {"x(^|y)z|^q", {"xyz", "q"}, {"xz"}},
  };
  for (const Case& c : cases) {
    const auto grammar = CompileRegex(c.pattern);
    ASSERT_TRUE(grammar.ok()) << c.pattern << ": " << grammar.status();
    for (const std::string& text : c.yes) EXPECT_TRUE(Matches(*grammar, text)) << c.pattern << " ~ " << text;
    for (const std::string& text : c.no) EXPECT_FALSE(Matches(*grammar, text)) << c.pattern << " !~ " << text;
  }
}

TEST(StructuredRegex, RefusesWhatIsNotRegularByName) {
  const std::pair<const char*, const char*> cases[] = {
      {"(a)\\1", "back reference"},
      {"(?=a)", "look-around"},
      {"(?<!a)b", "look-around"},
      {"\\bfoo", "word boundary"},
      {"(?>a)", "atomic group"},
      {"a++", "possessive"},
      {"(?m)a", "(?m"},
      {"\\p{Klingon}", "Klingon"},
      {"\\k<x>", "back reference"},
      {"(?P=x)", "reference to a"},
      {"(?(1)a|b)", "conditional"},
  };
  for (const auto& [pattern, name] : cases) {
    const auto grammar = CompileRegex(pattern);
    EXPECT_EQ(grammar.status().code(), absl::StatusCode::kUnimplemented) << pattern;
    EXPECT_NE(grammar.status().message().find(name), absl::string_view::npos) << grammar.status();
  }
}

TEST(StructuredRegex, MalformedPatternsNameTheByte) {
  for (const char* pattern :
       {"(", "a)", "[a", "[z-a]", "*a", "a{3,2}", "\\", "\\x4", "a**", "(?", "\\q", "\xFF", "^*"}) {
    const auto grammar = CompileRegex(pattern);
    EXPECT_EQ(grammar.status().code(), absl::StatusCode::kInvalidArgument) << pattern;
    EXPECT_NE(grammar.status().message().find("pattern"), absl::string_view::npos) << grammar.status();
  }
  EXPECT_EQ(CompileRegex("a[^\\s\\S]").status().code(), absl::StatusCode::kInvalidArgument)
      << "matches nothing";
}

}  // namespace
}  // namespace tidepool
