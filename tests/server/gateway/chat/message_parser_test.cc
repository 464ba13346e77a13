#include "server/gateway/chat/message_parser.h"

#include <gtest/gtest.h>
#include <time.h>

#include <cctype>
#include <set>

#include "base/rng.h"

namespace tidepool {
namespace {

using Kind = MessageDelta::Kind;

ParserPlan Plan(ToolSyntax syntax, bool reasoning = false) {
  ParserPlan plan;
  plan.syntax = syntax;
  plan.tools = {"get_weather", "add", "f"};
  plan.reasoning = reasoning;
  return plan;
}

// The message that `text` is, given in pieces that end at `cuts`, and how it ended.
struct Parsed {
  Message message;
  std::string finish;
  std::vector<MessageDelta> deltas;
};

Parsed Parse(const ParserPlan& plan, std::string_view text, const std::set<size_t>& cuts = {},
             std::string_view prompt = "") {
  MessageParser parser(plan, prompt);
  Parsed out;
  size_t from = 0;
  std::vector<MessageDelta> some;
  const auto take = [&] {
    for (const MessageDelta& delta : some) {
      // What every encoder leans on: a call's first piece has id and name, later ones only arguments.
      if (delta.kind == Kind::kToolCall) {
        EXPECT_EQ(delta.id.empty(), delta.name.empty());
        EXPECT_EQ(delta.call, out.message.tool_calls.size() - (delta.begins_call() ? 0 : 1));
      } else {
        EXPECT_FALSE(delta.text.empty());
      }
      out.message.Add(delta);
      out.deltas.push_back(delta);
    }
    some.clear();
  };
  for (size_t cut : cuts) {
    parser.Push(text.substr(from, cut - from), 1, some);
    from = cut;
    take();
  }
  parser.Push(text.substr(from), 1, some);
  take();
  parser.Finish(some);
  take();
  out.finish = parser.FinishReason("stop");
  std::vector<std::string> called;
  for (const ToolCall& call : out.message.tool_calls) called.push_back(call.name);
  EXPECT_EQ(parser.CalledTools(), plan.syntax == ToolSyntax::kNone ? std::nullopt : std::optional(called));
  return out;
}

// Ids are random.
Message WithoutIds(Message message) {
  for (ToolCall& call : message.tool_calls) call.id.clear();
  return message;
}

struct Case {
  const char* name;
  ToolSyntax syntax;
  std::string text;
  std::string content;
  std::vector<ToolCall> calls;  // without ids
  bool reasoning = false;
  std::string thoughts = {};
};

void PrintTo(const Case& c, std::ostream* os) { *os << c.name; }

const Case kCases[] = {
    {"plain text", ToolSyntax::kHermes, "Hello, <b>world</b> [x] {y}", "Hello, <b>world</b> [x] {y}", {}},
    {"nothing", ToolSyntax::kHermes, "", "", {}},
    {"blanks alone are an answer", ToolSyntax::kHermes, " \n ", " \n ", {}},
    {"hermes: one call",
     ToolSyntax::kHermes,
     "<tool_call>\n{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Oslo\"}}\n</tool_call>",
     "",
     {{"", "get_weather", "{\"city\": \"Oslo\"}"}}},
    {"hermes: text, then two calls",
     ToolSyntax::kHermes,
     "I look.\n<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\":[1,{\"b\":2}]}}\n</tool_call>\n"
     "<tool_call>\n{\"name\": \"add\", \"arguments\": {}}\n</tool_call>\n",
     "I look.\n",
     {{"", "f", "{\"a\":[1,{\"b\":2}]}"}, {"", "add", "{}"}}},
    {"hermes: text behind a call",
     ToolSyntax::kHermes,
     "<tool_call>{\"name\":\"f\",\"arguments\":{}}</tool_call> done",
     " done",
     {{"", "f", "{}"}}},
    {"hermes: the closing tag inside a string",
     ToolSyntax::kHermes,
     "<tool_call>{\"name\":\"f\",\"arguments\":{\"s\":\"a </tool_call> } \\\" ]\"}}</tool_call>",
     "",
     {{"", "f", "{\"s\":\"a </tool_call> } \\\" ]\"}"}}},
    {"hermes: arguments first",
     ToolSyntax::kHermes,
     "<tool_call>{\"arguments\": {\"x\": 1}, \"name\": \"f\"}</tool_call>",
     "",
     {{"", "f", "{\"x\": 1}"}}},
    {"hermes: further keys",
     ToolSyntax::kHermes,
     "<tool_call>{\"id\": 7, \"meta\": [{\"name\":\"no\"}], \"name\": \"f\", \"z\": \"}\", \"arguments\": {},"
     " \"last\": null}</tool_call>",
     "",
     {{"", "f", "{}"}}},
    {"hermes: no arguments",
     ToolSyntax::kHermes,
     "<tool_call>{\"name\": \"f\"}</tool_call>",
     "",
     {{"", "f", "{}"}}},
    {"hermes: null arguments",
     ToolSyntax::kHermes,
     "<tool_call>{\"name\": \"f\", \"arguments\": null}</tool_call>",
     "",
     {{"", "f", "{}"}}},
    {"hermes: arguments in a string",
     ToolSyntax::kHermes,
     "<tool_call>{\"name\": \"f\", \"arguments\": \"{\\\"a\\\": \\\"\\u00e9\\\"}\"}</tool_call>",
     "",
     {{"", "f", "{\"a\": \"\xc3\xa9\"}"}}},
    {"hermes: escapes in the name's key and value",
     ToolSyntax::kHermes,
     "<tool_call>{\"n\\u0061me\": \"\\u0066\", \"arguments\": {}}</tool_call>",
     "",
     {{"", "f", "{}"}}},
    {"hermes: no closing tag",
     ToolSyntax::kHermes,
     "<tool_call>\n{\"name\": \"f\", \"arguments\": {}}",
     "",
     {{"", "f", "{}"}}},
    {"hermes: the outer brace is missing",
     ToolSyntax::kHermes,
     "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": 1}\n</tool_call>\n"
     "<tool_call>{\"name\": \"add\", \"arguments\": {}}</tool_call>",
     "",
     {{"", "f", "{\"a\": 1}"}, {"", "add", "{}"}}},
    {"hermes: a brace too many",
     ToolSyntax::kHermes,
     "<tool_call>{\"name\": \"f\", \"arguments\": {}}}</tool_call>",
     "}</tool_call>",
     {{"", "f", "{}"}}},
    {"hermes: not JSON",
     ToolSyntax::kHermes,
     "<tool_call>get_weather(Oslo)</tool_call>",
     "<tool_call>get_weather(Oslo)</tool_call>",
     {}},
    {"hermes: broken before its arguments",
     ToolSyntax::kHermes,
     " <tool_call>{\"name\": f, \"arguments\": {}}</tool_call>",
     " <tool_call>{\"name\": f, \"arguments\": {}}</tool_call>",
     {}},
    {"hermes: an object without a name",
     ToolSyntax::kHermes,
     "<tool_call>{\"arguments\": {}}</tool_call>!",
     "<tool_call>{\"arguments\": {}}</tool_call>!",
     {}},
    {"hermes: arguments that are a list",
     ToolSyntax::kHermes,
     "<tool_call>{\"name\": \"f\", \"arguments\": [1]}</tool_call>",
     "<tool_call>{\"name\": \"f\", \"arguments\": [1]}</tool_call>",
     {}},
    {"hermes: a broken call before a good one",
     ToolSyntax::kHermes,
     "<tool_call>{\"name\": <tool_call>{\"name\": \"f\", \"arguments\": {}}</tool_call>",
     "<tool_call>{\"name\": ",
     {{"", "f", "{}"}}},
    {"hermes: cut inside the tag", ToolSyntax::kHermes, "so <tool_ca", "so <tool_ca", {}},
    {"hermes: cut before the name ends",
     ToolSyntax::kHermes,
     "<tool_call>{\"name\": \"ge",
     "<tool_call>{\"name\": \"ge",
     {}},
    {"hermes: cut inside the arguments",
     ToolSyntax::kHermes,
     "<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": \"x",
     "",
     {{"", "f", "{\"a\": \"x"}}},
    {"hermes: tags that nearly are",
     ToolSyntax::kHermes,
     "<tool_cal> <<tool_call >",
     "<tool_cal> <<tool_call >",
     {}},
    {"hermes: a tag right after its beginning",
     ToolSyntax::kHermes,
     "<tool<tool_call>{\"name\": \"f\", \"arguments\": {}}</tool_call>",
     "<tool",
     {{"", "f", "{}"}}},
    {"hermes: a call right after a cut closing tag",
     ToolSyntax::kHermes,
     "<tool_call>{\"name\": \"f\"}<tool_call>{\"name\": \"add\"}</tool_c",
     "</tool_c",
     {{"", "f", "{}"}, {"", "add", "{}"}}},
    {"hermes: raw control characters in a string",
     ToolSyntax::kHermes,
     "<tool_call>{\"name\": \"f\", \"arguments\": {\"code\": \"a\n\tb\"}}</tool_call>",
     "",
     {{"", "f", "{\"code\": \"a\n\tb\"}"}}},

    {"llama: bare object",
     ToolSyntax::kLlama3,
     "{\"name\": \"get_weather\", \"parameters\": {\"city\": \"Oslo\"}}",
     "",
     {{"", "get_weather", "{\"city\": \"Oslo\"}"}}},
    {"llama: tag, type and two calls",
     ToolSyntax::kLlama3,
     "<|python_tag|>{\"type\": \"function\", \"name\": \"f\", \"parameters\": {\"a\": 1}}; "
     "{\"name\": \"add\", \"parameters\": {}}",
     "",
     {{"", "f", "{\"a\": 1}"}, {"", "add", "{}"}}},
    {"llama: calls in lines",
     ToolSyntax::kLlama3,
     "\n\n{\"name\": \"f\", \"arguments\": {}}\n{\"name\": \"add\", \"arguments\": {}}\n",
     "",
     {{"", "f", "{}"}, {"", "add", "{}"}}},
    {"llama: text, then a tag",
     ToolSyntax::kLlama3,
     "Well.<|python_tag|>{\"name\": \"f\", \"parameters\": {}}",
     "Well.",
     {{"", "f", "{}"}}},
    {"llama: JSON that is no call",
     ToolSyntax::kLlama3,
     "{\"name\": \"Oslo\", \"parameters\": {\"area\": 454}}",
     "{\"name\": \"Oslo\", \"parameters\": {\"area\": 454}}",
     {}},
    {"llama: JSON with the parameters first that is no call",
     ToolSyntax::kLlama3,
     "{\"parameters\": {\"area\": 454}, \"name\": \"Oslo\"} ok",
     "{\"parameters\": {\"area\": 454}, \"name\": \"Oslo\"} ok",
     {}},
    {"llama: a brace in the middle",
     ToolSyntax::kLlama3,
     "see {\"name\": \"f\", \"parameters\": {}}",
     "see {\"name\": \"f\", \"parameters\": {}}",
     {}},
    {"llama: code behind the tag",
     ToolSyntax::kLlama3,
     "<|python_tag|>print(\"hi\")",
     "<|python_tag|>print(\"hi\")",
     {}},
    {"llama: text behind calls",
     ToolSyntax::kLlama3,
     "{\"name\": \"f\", \"parameters\": {}}; and now",
     "; and now",
     {{"", "f", "{}"}}},
    {"llama: something else behind a call",
     ToolSyntax::kLlama3,
     "{\"name\": \"f\", \"parameters\": {}} {\"answer\": 4}",
     " {\"answer\": 4}",
     {{"", "f", "{}"}}},

    {"mistral: a list",
     ToolSyntax::kMistral,
     "[TOOL_CALLS] [{\"name\": \"f\", \"arguments\": {\"a\": [\"]\"]}}, {\"name\": \"add\", \"arguments\": "
     "{}}]",
     "",
     {{"", "f", "{\"a\": [\"]\"]}"}, {"", "add", "{}"}}},
    {"mistral: a list with ids, text before",
     ToolSyntax::kMistral,
     "Hm.[TOOL_CALLS][{\"name\": \"f\", \"arguments\": {}, \"id\": \"abcdefghi\"}]",
     "Hm.",
     {{"", "f", "{}"}}},
    {"mistral: names",
     ToolSyntax::kMistral,
     "[TOOL_CALLS]get_weather[ARGS]{\"city\": \"Oslo\"}[TOOL_CALLS]add[ARGS] {}",
     "",
     {{"", "get_weather", "{\"city\": \"Oslo\"}"}, {"", "add", "{}"}}},
    {"mistral: names with ids",
     ToolSyntax::kMistral,
     "[TOOL_CALLS]f[CALL_ID]abc123def[ARGS]{\"x\": \"}\"}",
     "",
     {{"", "f", "{\"x\": \"}\"}"}}},
    {"mistral: names without a tag",
     ToolSyntax::kMistral,
     "[TOOL_CALLS]f{\"x\": 1}",
     "",
     {{"", "f", "{\"x\": 1}"}}},
    {"mistral: brackets in text", ToolSyntax::kMistral, "a[0] = [TOOL]", "a[0] = [TOOL]", {}},
    {"mistral: an empty list", ToolSyntax::kMistral, "[TOOL_CALLS][]", "[TOOL_CALLS][]", {}},
    {"mistral: a broken list",
     ToolSyntax::kMistral,
     "[TOOL_CALLS][{\"name\": \"f\", \"arguments\": {}}, oops]",
     ", oops]",
     {{"", "f", "{}"}}},
    {"mistral: a broken name",
     ToolSyntax::kMistral,
     "[TOOL_CALLS]f(x) [ARGS]",
     "[TOOL_CALLS]f(x) [ARGS]",
     {}},
    {"mistral: a broken mark", ToolSyntax::kMistral, "[TOOL_CALLS]f[ARG]{}", "[TOOL_CALLS]f[ARG]{}", {}},

    {"thoughts",
     ToolSyntax::kNone,
     "<think>\nLet me see.\n\n2 < 3</think>\n\nYes.",
     "Yes.",
     {},
     true,
     "Let me see.\n\n2 < 3"},
    {"thoughts that do not end",
     ToolSyntax::kNone,
     "<think>on and on </thin",
     "",
     {},
     true,
     "on and on </thin"},
    {"thoughts, then a call",
     ToolSyntax::kHermes,
     "<think>a <tool_call> {</think>\n<tool_call>{\"name\": \"f\", \"arguments\": {}}</tool_call>",
     "",
     {{"", "f", "{}"}},
     true,
     "a <tool_call> {"},
    {"thoughts alone", ToolSyntax::kNone, "<think>hm</think>\n", "", {}, true, "hm"},
    {"no thoughts", ToolSyntax::kNone, "1 </think> <think> 2", "1 </think> <think> 2", {}, true},
    {"nearly a thought", ToolSyntax::kNone, " <thin air", " <thin air", {}, true},
    {"empty thoughts", ToolSyntax::kNone, "<think>\n\n</think>\n\nok", "ok", {}, true, ""},
    {"tags inside thoughts",
     ToolSyntax::kNone,
     "<think>a</b></thinks><</think>b",
     "b",
     {},
     true,
     "a</b></thinks><"},
};

class Outputs : public ::testing::TestWithParam<Case> {};

TEST_P(Outputs, BecomeTheirMessage) {
  const Case& c = GetParam();
  const Parsed parsed = Parse(Plan(c.syntax, c.reasoning), c.text);
  EXPECT_EQ(parsed.message.content, c.content);
  EXPECT_EQ(parsed.message.reasoning, c.thoughts);
  EXPECT_EQ(WithoutIds(parsed.message).tool_calls, c.calls);
  EXPECT_EQ(parsed.finish, c.calls.empty() ? "stop" : "tool_calls");
}

TEST_P(Outputs, BecomeTheSameMessageHoweverTheyAreCut) {
  const Case& c = GetParam();
  const ParserPlan plan = Plan(c.syntax, c.reasoning);
  const Message whole = WithoutIds(Parse(plan, c.text).message);
  for (size_t a = 0; a <= c.text.size(); ++a) {
    for (size_t b = a; b <= c.text.size(); ++b) {
      ASSERT_EQ(WithoutIds(Parse(plan, c.text, {a, b}).message), whole) << a << ", " << b;
    }
  }
  std::set<size_t> all;
  for (size_t i = 1; i < c.text.size(); ++i) all.insert(i);
  EXPECT_EQ(WithoutIds(Parse(plan, c.text, all).message), whole);
}

INSTANTIATE_TEST_SUITE_P(MessageParser, Outputs, ::testing::ValuesIn(kCases), [](const auto& info) {
  std::string name;
  for (char c : std::string(info.param.name)) {
    if (std::isalnum(static_cast<unsigned char>(c)) != 0) {
      name += c;
    } else if (!name.empty() && name.back() != '_') {
      name += '_';
    }
  }
  return name;
});

// Random pieces of markup, JSON and text: whatever comes, cutting it changes nothing, and of what is no
// markup nothing is lost.
TEST(MessageParser, RandomTextDoesNotDependOnItsCuts) {
  const std::vector<std::string> pieces = {"<tool_call>",
                                           "</tool_call>",
                                           "<|python_tag|>",
                                           "[TOOL_CALLS]",
                                           "[ARGS]",
                                           "[CALL_ID]",
                                           "[",
                                           "]",
                                           "{",
                                           "}",
                                           "\"",
                                           "\\",
                                           ",",
                                           ":",
                                           ";",
                                           " ",
                                           "\n",
                                           "name",
                                           "\"name\"",
                                           "\"arguments\"",
                                           "\"f\"",
                                           "{\"name\": \"f\", ",
                                           "\"parameters\": {\"a\": 1}",
                                           "null",
                                           "1",
                                           "text",
                                           "\xc3\xa9",
                                           "<think>",
                                           "</think>",
                                           "<",
                                           "f"};
  Rng rng(7);
  const auto below = [&](size_t n) { return static_cast<size_t>(rng.Uniform() * static_cast<double>(n)); };
  for (int round = 0; round < 6000; ++round) {
    std::string text;
    for (size_t i = below(24); i > 0; --i) text += pieces[below(pieces.size())];
    const ParserPlan plan = Plan(static_cast<ToolSyntax>(round % 4), round % 3 == 0);
    const Message whole = WithoutIds(Parse(plan, text).message);
    for (int cut = 0; cut < 4; ++cut) {
      std::set<size_t> cuts;
      for (size_t i = below(8); i > 0; --i) cuts.insert(below(text.size() + 1));
      ASSERT_EQ(WithoutIds(Parse(plan, text, cuts).message), whole) << text;
    }
    if (whole.tool_calls.empty() && !plan.reasoning) {
      ASSERT_EQ(whole.content, text);
    }
  }
}

TEST(MessageParser, StreamsArgumentsAsTheyCome) {
  const ParserPlan plan = Plan(ToolSyntax::kHermes);
  MessageParser parser(plan, "");
  std::vector<MessageDelta> out;
  parser.Push("<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": \"be", 1, out);
  ASSERT_EQ(out.size(), 2u);
  EXPECT_TRUE(out[0].begins_call());
  EXPECT_EQ(out[0].name, "f");
  EXPECT_EQ(out[0].text, "");
  EXPECT_EQ(out[1].text, "{\"a\": \"be");
  out.clear();
  parser.Push("cause", 1, out);
  ASSERT_EQ(out.size(), 1u);
  EXPECT_EQ(out[0].text, "cause");
  EXPECT_FALSE(out[0].begins_call());
}

TEST(MessageParser, ContentIsNotHeldBackLongerThanATag) {
  MessageParser parser(Plan(ToolSyntax::kHermes), "");
  std::vector<MessageDelta> out;
  parser.Push("Hello", 1, out);
  ASSERT_EQ(out.size(), 1u);
  EXPECT_EQ(out[0].text, "Hello");
  out.clear();
  parser.Push(" <", 1, out);
  ASSERT_EQ(out.size(), 1u);
  EXPECT_EQ(out[0].text, " ");
  out.clear();
  parser.Push("b>", 1, out);
  ASSERT_EQ(out.size(), 1u);
  EXPECT_EQ(out[0].text, "<b>");
}

TEST(MessageParser, IdsAreTheSyntaxs) {
  const auto id = [](ToolSyntax syntax, const char* text) {
    const Parsed parsed = Parse(Plan(syntax), text);
    return parsed.message.tool_calls.empty() ? "" : parsed.message.tool_calls[0].id;
  };
  const std::string hermes = id(ToolSyntax::kHermes, "<tool_call>{\"name\": \"f\"}</tool_call>");
  EXPECT_EQ(hermes.size(), 29u);
  EXPECT_TRUE(hermes.starts_with("call_"));
  EXPECT_NE(hermes, id(ToolSyntax::kHermes, "<tool_call>{\"name\": \"f\"}</tool_call>"));
  const std::string mistral = id(ToolSyntax::kMistral, "[TOOL_CALLS]f[ARGS]{}");
  ASSERT_EQ(mistral.size(), 9u);
  for (char c : mistral) EXPECT_NE(std::isalnum(static_cast<unsigned char>(c)), 0);
}

TEST(MessageParser, WithoutParallelCallsOnlyTheFirstIsGiven) {
  ParserPlan plan = Plan(ToolSyntax::kHermes);
  plan.parallel = false;
  const Parsed parsed = Parse(plan,
                              "<tool_call>{\"name\": \"f\", \"arguments\": {\"a\":1}}</tool_call>"
                              "<tool_call>{\"name\": \"add\", \"arguments\": {\"b\":2}}</tool_call>");
  ASSERT_EQ(parsed.message.tool_calls.size(), 1u);
  EXPECT_EQ(parsed.message.tool_calls[0].name, "f");
  EXPECT_EQ(parsed.message.tool_calls[0].arguments, "{\"a\":1}");
  EXPECT_EQ(parsed.message.content, "");
}

TEST(MessageParser, FinishReasonOfANamedToolIsStop) {
  ParserPlan plan = Plan(ToolSyntax::kHermes);
  plan.named = true;
  EXPECT_EQ(Parse(plan, "<tool_call>{\"name\": \"f\"}</tool_call>").finish, "stop");
}

TEST(MessageParser, FinishReasonOfACutAnswerStaysLength) {
  MessageParser parser(Plan(ToolSyntax::kHermes), "");
  std::vector<MessageDelta> out;
  parser.Push("<tool_call>{\"name\": \"f\", \"arguments\": {\"a", 1, out);
  parser.Finish(out);
  EXPECT_EQ(parser.FinishReason("length"), "length");
}

TEST(MessageParser, ThoughtsThatThePromptBegan) {
  const ParserPlan plan = Plan(ToolSyntax::kNone, true);
  const Parsed parsed = Parse(plan, "so it is</think>4", {}, "<|assistant|><think>\n");
  EXPECT_EQ(parsed.message.reasoning, "so it is");
  EXPECT_EQ(parsed.message.content, "4");
  // Ended by the template: none are to come.
  EXPECT_EQ(Parse(plan, "4", {}, "<|assistant|><think>\n\n</think>\n\n").message.content, "4");
}

TEST(MessageParser, ThoughtsOfAContinuedMessage) {
  ParserPlan plan = Plan(ToolSyntax::kNone, true);
  plan.continued = "<think>I wonder";
  EXPECT_EQ(Parse(plan, " why</think>4").message.reasoning, "why");
  plan.continued = "<think>I wonder</think>It is";
  const Parsed parsed = Parse(plan, " 4");
  EXPECT_EQ(parsed.message.reasoning, "");
  EXPECT_EQ(parsed.message.content, " 4");
}

TEST(MessageParser, ThoughtsMayBeLeftOut) {
  ParserPlan plan = Plan(ToolSyntax::kNone, true);
  plan.include_reasoning = false;
  const Parsed parsed = Parse(plan, "<think>secret</think>4");
  EXPECT_EQ(parsed.message.reasoning, "");
  EXPECT_EQ(parsed.message.content, "4");
}

TEST(MessageParser, CountsTokensOfThoughts) {
  MessageParser parser(Plan(ToolSyntax::kNone, true), "");
  std::vector<MessageDelta> out;
  for (const char* token : {"<think>", "a", " b", "</think>", "\n\n", "4", "2"}) parser.Push(token, 1, out);
  parser.Finish(out);
  EXPECT_EQ(parser.reasoning_tokens(), 4u);
}

// Of this thread: the machine may be busy.
double CpuSeconds() {
  timespec now{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec) * 1e-9;
}

// RELIABILITY: a parser of what a stranger can make a model write is linear.
TEST(MessageParser, TimeIsLinearInTheText) {
  const auto seconds = [](const std::string& unit, size_t bytes, size_t piece) {
    std::string text;
    while (text.size() < bytes) text += unit;
    double best = 1e9;
    for (int round = 0; round < 5; ++round) {
      MessageParser parser(Plan(ToolSyntax::kHermes, true), "");
      std::vector<MessageDelta> out;
      const double start = CpuSeconds();
      for (size_t at = 0; at < text.size(); at += piece) {
        out.clear();
        parser.Push(std::string_view(text).substr(at, piece), 1, out);
      }
      parser.Finish(out);
      best = std::min(best, CpuSeconds() - start);
    }
    return best;
  };
  for (const char* unit : {"<tool_call>", "<tool_call>{\"a\":{", "<tool_call>{\"name\":", "\n", "<",
                           "<think>", "<tool_call>{\"name\":\"f\",\"arguments\":{"}) {
    // Eight times the text: a quadratic parser takes 64 times as long. The bound leaves room for noise.
    const double one = seconds(unit, 1 << 16, 4), eight = seconds(unit, 1 << 19, 4);
    EXPECT_LT(eight, std::max(0.002, 24 * one)) << unit;
  }
}

}  // namespace
}  // namespace tidepool
