#include <string>

#include "tests/server/structured/grammar_testing.h"

namespace tidepool {
namespace {

TEST(Ebnf, ReadsWhatLlamaCppReads) {
  const auto grammar = CompileEbnf(R"gbnf(
# a comment
root   ::= (expr "=" ws term "\n")+
expr   ::= term ([-+*/] term)*   # another
term   ::= ident | num | "(" ws expr ")" ws
ident  ::= [a-z] [a-z0-9_]* ws
num    ::= [0-9]{1,3} ws
ws     ::= [ \t\n]{0,2}
)gbnf");
  ASSERT_TRUE(grammar.ok()) << grammar.status();
  EXPECT_TRUE(Matches(*grammar, "(a+12)*b=7\n"));
  EXPECT_TRUE(Matches(*grammar, "((((1))))= x\ny=z\n"));
  EXPECT_FALSE(Matches(*grammar, "(a+12*b=7\n"));
  EXPECT_FALSE(Matches(*grammar, "1234=7\n"));
}

TEST(Ebnf, LiteralsClassesAndEscapes) {
  const auto grammar =
      CompileEbnf("root ::= \"\\x41\\u00e9\\\"\\\\\" [^a-c\\]\\n] . cont?\ncont ::=\n  \"x\"\n  | \"y\"");
  ASSERT_TRUE(grammar.ok()) << grammar.status();
  EXPECT_TRUE(Matches(*grammar, "Aé\"\\d日"));
  EXPECT_TRUE(Matches(*grammar, "Aé\"\\日\ny"));
  EXPECT_FALSE(Matches(*grammar, "Aé\"\\ad"));
  EXPECT_FALSE(Matches(*grammar, "Aé\"\\]d"));
}

TEST(Ebnf, RecursionCountsBrackets) {
  const auto grammar = CompileEbnf("root ::= \"a\" root \"b\" | \"a\" root \"c\" | \"\"");
  ASSERT_TRUE(grammar.ok()) << grammar.status();
  EXPECT_TRUE(Matches(*grammar, "aaabcb"));
  EXPECT_FALSE(Matches(*grammar, "aaabc"));
  EXPECT_FALSE(Matches(*grammar, "abb"));
  const std::string deep(300, 'a');
  std::string closed = deep;
  for (int i = 0; i < 300; ++i) closed += i % 2 == 0 ? 'b' : 'c';
  EXPECT_TRUE(Matches(*grammar, closed));
}

TEST(Ebnf, DeepNestingEndsBeforeADeadEnd) {
  // Beyond the deepest stack the grammar does not open what it could not close.
  const auto grammar = CompileEbnf("root ::= \"(\" \" \" root \")\" | \"x\"");
  ASSERT_TRUE(grammar.ok()) << grammar.status();
  Matcher matcher(*grammar, SmallTable(), nullptr, "");
  int depth = 0;
  while (matcher.AcceptBytes("( ").ok()) ++depth;
  EXPECT_GT(depth, 400);
  EXPECT_LT(depth, 600);
  ASSERT_TRUE(matcher.AcceptBytes("x").ok());
  ASSERT_TRUE(matcher.AcceptBytes(std::string(static_cast<size_t>(depth), ')')).ok());
  EXPECT_TRUE(matcher.MustEnd());
}

TEST(Ebnf, RefusesWithLineAndColumn) {
  const std::pair<const char*, const char*> cases[] = {
      {"root ::= \"a\" (", "line 1, column 15"},
      {"root ::= \"a\nb\"", "unclosed literal"},
      {"root ::= foo", "'foo' is not defined"},
      {"x ::= \"a\"", "no rule 'root'"},
      {"root ::= \"a\"\nroot ::= \"b\"", "defined twice"},
      {"root ::= root \"a\" | \"b\"", "left recursive"},
      {"root ::= x root\nx ::= \"y\"?", "left recursive"},
      {"root ::= [b-a]", "range"},
      {"root ::= \"a\"{3,2}", "m > n"},
      {"root ::= \"a\"{1,99999}", "limit"},
      {"root ::= \"\\q\"", "unknown escape"},
      {"root = \"a\"", "'::='"},
      {"root ::= \"a\" root", "nothing at all"},
  };
  for (const auto& [source, message] : cases) {
    const auto grammar = CompileEbnf(source);
    EXPECT_EQ(grammar.status().code(), absl::StatusCode::kInvalidArgument) << source;
    EXPECT_NE(grammar.status().message().find(message), absl::string_view::npos) << grammar.status();
  }
  EXPECT_EQ(CompileEbnf("root ::= <think>").status().code(), absl::StatusCode::kUnimplemented);
}

}  // namespace
}  // namespace tidepool
