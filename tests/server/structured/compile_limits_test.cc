#include <time.h>

#include <string>

#include "absl/strings/str_cat.h"
#include "tests/server/structured/grammar_testing.h"

namespace tidepool {
namespace {

double CpuMillis() {
  timespec now{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) * 1e3 + static_cast<double>(now.tv_nsec) * 1e-6;
}

// The default budget is 50 ms; what one allocation or destructor takes comes on top, and sanitizers are slow.
constexpr double kMillisMax = 400;

template <typename Make>
void ExpectEndsInTime(std::string_view what, const Make& make) {
  const double begin = CpuMillis();
  const absl::StatusOr<Grammar> grammar = make();
  const double spent = CpuMillis() - begin;
  EXPECT_LT(spent, kMillisMax) << what;
  if (grammar.ok()) return;
  EXPECT_TRUE(grammar.status().code() == absl::StatusCode::kResourceExhausted ||
              grammar.status().code() == absl::StatusCode::kInvalidArgument ||
              grammar.status().code() == absl::StatusCode::kUnimplemented)
      << what << grammar.status();
  EXPECT_NE(grammar.status().message().find("limit"), absl::string_view::npos) << what << grammar.status();
}

TEST(CompileLimits, BlowUpsEndWithinTheBudget) {
  const CompileLimits limits;
  const auto nested = [](std::string_view open, std::string_view close, int n) {
    std::string out;
    for (int i = 0; i < n; ++i) out += open;
    out += "a";
    for (int i = 0; i < n; ++i) out += close;
    return out;
  };
  for (const std::string& pattern :
       {std::string("((a|aa)*){1000}"), std::string("(.{0,9999}){0,9999}"), std::string("(.{0,999}){0,999}"),
        std::string("(a|b)*a(a|b){30}"), std::string("(((a{1,100}){1,100}){1,100}){1,100}"),
        std::string("(\\p{L}{1,300}x){1,300}"), std::string("(.*a){20}.*(b.*){20}|(.*c){20}"),
        nested("(", ")", 100'000), nested("(?:", ")*", 60), std::string(600'000, 'a'),
        "[" + std::string(200'000, 'a') + "]"}) {
    ExpectEndsInTime(pattern.substr(0, 60), [&] { return CompileRegex(pattern, limits); });
  }
  ExpectEndsInTime("deep groups",
                   [&] { return CompileEbnf("root ::= " + nested("(", ")", 100'000), limits); });
  ExpectEndsInTime("nested repetitions", [&] {
    return CompileEbnf("root ::= a{2000}\na ::= b{2000}\nb ::= \"x\" c{2000}\nc ::= [a-z]", limits);
  });
  std::string chain = "root ::= r0\n";
  for (int i = 0; i < 20'000; ++i) absl::StrAppend(&chain, "r", i, " ::= \"a\" r", i + 1, "\n");
  absl::StrAppend(&chain, "r20000 ::= \"b\"");
  ExpectEndsInTime("a chain of rules", [&] { return CompileEbnf(chain, limits); });
}

TEST(CompileLimits, SchemasEndWithinTheBudget) {
  const CompileLimits limits;
  std::string many = R"({"enum": [)";
  for (int i = 0; i < 40'000; ++i) absl::StrAppend(&many, i == 0 ? "" : ",", "\"v", i, "\"");
  many += "]}";
  ExpectEndsInTime("many values", [&] { return CompileSchema(many, limits); });

  // 10^6 values are beyond the length of a schema, also of one that is parsed already.
  nlohmann::ordered_json million;
  million["enum"] = nlohmann::ordered_json::array();
  for (int i = 0; i < 1'000'000; ++i) million["enum"].push_back(i);
  ExpectEndsInTime("a million values", [&] {
    return Compile([&](GrammarBuilder& b) { return b.JsonSchema(million, JsonWhitespace::kFlexible); },
                   limits);
  });

  std::string refs = R"({"$ref": "#/$defs/d0", "$defs": {)";
  for (int i = 0; i < 5'000; ++i)
    absl::StrAppend(&refs, "\"d", i, "\": {\"$ref\": \"#/$defs/d", i + 1, "\"},");
  refs += "\"d5000\": {\"type\": \"null\"}}}";
  ExpectEndsInTime("a chain of references", [&] { return CompileSchema(refs, limits); });

  std::string doubling = R"({"$ref": "#/$defs/d0", "$defs": {)";
  for (int i = 0; i < 40; ++i) {
    absl::StrAppend(&doubling, "\"d", i, "\": {\"anyOf\": [{\"$ref\": \"#/$defs/d", i + 1,
                    "\"}, {\"allOf\": [{\"$ref\": \"#/$defs/d", i + 1, "\"}], \"minLength\": ", i, "}]},");
  }
  doubling += "\"d40\": {\"type\": \"string\"}}}";
  ExpectEndsInTime("alternatives that double", [&] { return CompileSchema(doubling, limits); });

  // Objects whose properties come in the opposite order, each compared with each.
  std::string forwards, backwards;
  for (int i = 0; i < 8'000; ++i) {
    absl::StrAppend(&forwards, i == 0 ? "" : ",", "\"k", i, "\":", i);
    absl::StrAppend(&backwards, i == 0 ? "" : ",", "\"k", 7'999 - i, "\":", 7'999 - i);
  }
  ExpectEndsInTime("large constants", [&] {
    return CompileSchema("{\"const\": {" + forwards + "}, \"enum\": [{" + backwards + "}]}", limits);
  });

  std::string anchors = "{\"anyOf\": [{\"$ref\": \"#a0\"}";
  for (int i = 1; i < 5'000; ++i) absl::StrAppend(&anchors, ",{\"$ref\": \"#a", i, "\"}");
  anchors += "], \"$defs\": {\"\": true";
  for (int i = 0; i < 5'000; ++i) absl::StrAppend(&anchors, ",\"", i, "\":{\"$anchor\":\"a", i, "\"}");
  anchors += "}}";
  ExpectEndsInTime("many anchors", [&] { return CompileSchema(anchors, limits); });

  std::string names = "{\"properties\": {\"" + std::string(200'000, 'n') + "\": {\"properties\": {\"\": true";
  for (int i = 0; i < 10'000; ++i) absl::StrAppend(&names, ",\"", i, "\":{}");
  names += "}}}}";
  ExpectEndsInTime("a long name above many", [&] { return CompileSchema(names, limits); });

  std::string deep;
  for (int i = 0; i < 60; ++i) deep += R"({"type":"array","items":)";
  deep += "true" + std::string(60, '}');
  ExpectEndsInTime("nested arrays", [&] { return CompileSchema(deep, limits); });
  std::string deeper;
  for (int i = 0; i < 50'000; ++i) deeper += R"({"items":)";
  deeper += "true" + std::string(50'000, '}');
  ExpectEndsInTime("very nested arrays", [&] { return CompileSchema(deeper, limits); });

  for (
      const char* schema :
      {R"({"type": "string", "minLength": 100000, "pattern": "^(ab|c)*$"})",
       R"({"type": "string", "maxLength": 100000, "format": "uri"})",
       R"({"type": "array", "minItems": 2000, "items": {"type": "array", "minItems": 2000, "items": {"type": "integer"}}})",
       R"({"type": "string", "maxLength": 4294967295})", R"({"type": "array", "maxItems": 1e300})",
       R"({"type": "integer", "multipleOf": 997, "minimum": 1000})",
       R"({"type": "object", "patternProperties": {"a": {}, "b": {}, "c": {}, "d": {}, "e.*a": {}, "f.*b": {}, "g": {}}})"}) {
    ExpectEndsInTime(schema, [&] { return CompileSchema(schema, limits); });
  }
}

TEST(CompileLimits, EachLimitIsNamed) {
  CompileLimits limits = Patient();
  limits.states_max = 100;
  auto grammar = CompileRegex("(abcdefghij){60}", limits);
  EXPECT_EQ(grammar.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_NE(grammar.status().message().find("limit of 100 automaton states"), absl::string_view::npos)
      << grammar.status();
  limits = Patient();
  limits.bytes_max = 200;
  grammar = CompileRegex("abcdefghij", limits);
  EXPECT_EQ(grammar.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_NE(grammar.status().message().find("limit of 200"), absl::string_view::npos) << grammar.status();
  limits = Patient();
  limits.cpu_time_max = absl::ZeroDuration();
  grammar = CompileRegex("abc", limits);
  EXPECT_EQ(grammar.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_NE(grammar.status().message().find("limit of 0 ms"), absl::string_view::npos) << grammar.status();
  limits = Patient();
  limits.nesting_max = 3;
  grammar = CompileRegex("((((a))))", limits);
  EXPECT_EQ(grammar.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(grammar.status().message().find("limit of 3"), absl::string_view::npos) << grammar.status();
  limits = Patient();
  limits.source_bytes_max = 4;
  EXPECT_NE(CompileRegex("abcde", limits).status().message().find("limit of 4 bytes"),
            absl::string_view::npos);
  // The length of a schema counts however it comes.
  const nlohmann::ordered_json parsed = {{"title", "abcdefgh"}};
  limits.source_bytes_max = 20;
  const auto schema = [&] {
    return Compile([&](GrammarBuilder& b) { return b.JsonSchema(parsed, JsonWhitespace::kFlexible); },
                   limits);
  };
  ASSERT_EQ(parsed.dump().size(), 20u);
  EXPECT_TRUE(schema().ok()) << schema().status();
  limits.source_bytes_max = 19;
  EXPECT_EQ(schema().status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(schema().status().message().find("limit of 19 bytes"), absl::string_view::npos);
}

}  // namespace
}  // namespace tidepool
