#include "server/model/text/chat_template.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <string>

namespace tidepool {
namespace {

using nlohmann::ordered_json;

absl::StatusOr<std::string> Render(const std::string& source,
                                   const ordered_json& context = ordered_json::object(),
                                   const ChatTemplate::Limits& limits = {}) {
  const auto parsed = ChatTemplate::Parse(source);
  if (!parsed.ok()) return parsed.status();
  return parsed->Render(context, limits);
}

std::string Text(const std::string& source, const ordered_json& context = ordered_json::object()) {
  const auto text = Render(source, context);
  return text.ok() ? *text : "error: " + std::string(text.status().message());
}

TEST(ChatTemplate, RendersAConversation) {
  const std::string source =
      "{{ bos_token }}{% for m in messages %}\n"
      "    {%- if m.role == 'system' and not loop.first %}{{ raise_exception('late') }}{% endif %}\n"
      "<|{{ m['role'] }}|>{{ m.content | trim }}<|end|>{% endfor %}\n"
      "{% if add_generation_prompt %}<|assistant|>{% endif %}";
  const ordered_json context = {
      {"bos_token", "<s>"},
      {"add_generation_prompt", true},
      {"messages",
       {{{"role", "system"}, {"content", " Be brief. "}}, {{"role", "user"}, {"content", "Grüße"}}}}};
  EXPECT_EQ(Text(source, context), "<s><|system|>Be brief.<|end|><|user|>Grüße<|end|><|assistant|>");
}

TEST(ChatTemplate, BlocksTakeTheirLinesWithThem) {
  EXPECT_EQ(Text("a\n  {% if true %}\nb\n  {% endif %}\nc\n"), "a\nb\nc");
  EXPECT_EQ(Text("a\n  {{ 1 }}\nb"), "a\n  1\nb");
  EXPECT_EQ(Text("a \n {%- if true -%} \n b {%+ endif +%}\nc"), "ab \nc");
  EXPECT_EQ(Text("{# note #}\nx{% raw %}{{ y }}{% endraw %}"), "x{{ y }}");
}

TEST(ChatTemplate, LoopVariablesAreThere) {
  EXPECT_EQ(Text("{% for x in 'abc' %}{{ loop.index }}{{ loop.index0 }}{{ loop.revindex }}{{ x }}"
                 "{{ loop.previtem }}{{ loop.nextitem }}{{ ',' if not loop.last }}{% endfor %}"),
            "103ab,212bac,321cb");
  EXPECT_EQ(Text("{% for x in [] %}{% else %}none{% endfor %}"), "none");
}

TEST(ChatTemplate, SetInsideALoopStaysThere) {
  EXPECT_EQ(Text("{% set x = 1 %}{% for i in range(3) %}{% set x = x + 1 %}{{ x }}{% endfor %}{{ x }}"),
            "2221");
  EXPECT_EQ(Text("{% set ns = namespace(x=1) %}{% for i in range(3) %}{% set ns.x = ns.x + 1 %}{% endfor "
                 "%}{{ ns.x }}"),
            "4");
}

TEST(ChatTemplate, ToJsonWritesAsPythonDoes) {
  EXPECT_EQ(Text("{{ x | tojson }}", {{"x", {{"a", 1.0}, {"b", "<é\"\n>"}, {"c", {true, nullptr}}}}}),
            R"({"a": 1.0, "b": "<é\"\n>", "c": [true, null]})");
  EXPECT_EQ(Text("{{ x | tojson(indent=2) }}", {{"x", {{"a", ordered_json::array()}, {"b", {1}}}}}),
            "{\n  \"a\": [],\n  \"b\": [\n    1\n  ]\n}");
}

TEST(ChatTemplate, ValuesPrintAsPythonDoes) {
  EXPECT_EQ(Text("{{ [1, 1.5, true, none, 'it\\'s', \"q\", (1,), {'k': 'v'}] }}"),
            "[1, 1.5, True, None, \"it's\", 'q', (1,), {'k': 'v'}]");
  EXPECT_EQ(Text("{{ 1e16 }} {{ 0.1 + 0.2 }} {{ 7 // -2 }} {{ -7 % 3 }} {{ 2 ** 10 }} {{ 1 / 2 }}"),
            "1e+16 0.30000000000000004 -4 2 1024 0.5");
}

// Auto-escaping is off, but text marked safe escapes what is added to it (markupsafe's Markup).
TEST(ChatTemplate, AddingToSafeTextEscapes) {
  EXPECT_EQ(Text("{{ '<'|safe + '<' + '>'|safe }}|{{ '<' + '<'|safe }}|{{ '<'|safe ~ '<' }}|{{ '<&' | e }}"),
            "<&lt;>|&lt;<|<<|&lt;&amp;");
}

TEST(ChatTemplate, ErrorsNameTheLine) {
  EXPECT_EQ(Text("a\n{{ raise_exception('no system role') }}"),
            "error: chat template line 2: TemplateError: no system role");
  EXPECT_EQ(Text("\n\n{{ x.y }}"), "error: chat template line 3: UndefinedError: 'x' is undefined");
  EXPECT_EQ(Text("{{ 'a' + 1 }}"),
            "error: chat template line 1: TypeError: can only concatenate str (not \"int\") to str");
  EXPECT_EQ(
      Text("{{ [].append(1) }}"),
      "error: chat template line 1: SecurityError: access to attribute 'append' of 'list' object is unsafe.");
  EXPECT_EQ(Text("{{ ''.__class__ .x }}").find("error: chat template line 1: SecurityError"), 0u);
}

TEST(ChatTemplate, UnknownConstructsAreParseErrorsWithTheirLine) {
  const auto says = [](const std::string& source, const std::string& what) {
    const auto status = ChatTemplate::Parse(source).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << source;
    EXPECT_NE(status.message().find(what), std::string::npos) << status;
  };
  says("\n{% include 'x' %}", "line 2: tag 'include' is unknown or not supported");
  says("{% for x in y recursive %}{% endfor %}", "a recursive loop is not supported");
  says("\n{% if x %}", "line 2: 'if' without its 'endif'");
  says("{% endfor %}", "tag 'endfor'");
  says("{{ x", "tag without }}");
  says("{{ 'x }}", "string without an end");
  says("{{ (1 }}", "unexpected '}'");
  says("{# x", "comment without #}");
  says("{% break %}", "'break' outside of a loop");
  says("{{ 99999999999999999999 }}", "beyond 64 bits");
  says("{{ 1 $ 2 }}", "unexpected character '$'");
  says("{{ }}", "expected an expression");
}

// --- limits: whatever a template does, a rendering ends with a status ---

void ExpectLimited(const std::string& source, const ChatTemplate::Limits& limits = {}) {
  const auto text = Render(source, ordered_json::object(), limits);
  EXPECT_EQ(text.status().code(), absl::StatusCode::kResourceExhausted) << source << " " << text.status();
}

TEST(ChatTemplateLimits, EndlessWorkStops) {
  ChatTemplate::Limits limits;
  limits.steps_max = 100'000;
  ExpectLimited("{% for a in range(10000) %}{% for b in range(10000) %}{% endfor %}{% endfor %}", limits);
  ExpectLimited("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}");
  ExpectLimited("{% macro m(n) %}{% if n %}{{ m(n) }}{% endif %}{% endmacro %}{{ m([[1]]) }}");
}

TEST(ChatTemplateLimits, HugeValuesStop) {
  ExpectLimited("{{ 'x' * 2000000000 }}");
  ExpectLimited("{{ [1] * 2000000000 }}");
  ExpectLimited(
      "{% set ns = namespace(s='xxxxxxxxxxxxxxxx') %}{% for i in range(100) %}{% set ns.s = ns.s ~ ns.s %}"
      "{% endfor %}{{ ns.s | length }}");
  ExpectLimited(
      "{% set ns = namespace(s=[1]) %}{% for i in range(100) %}{% set ns.s = ns.s + ns.s %}{% endfor %}");
  ExpectLimited("{{ 'aaaaaaaaaaaaaaaaaaaa'.replace('', 'x' * 10000000) }}");
  ExpectLimited("{{ (['x' * 1000000] * 100) | join }}");
  ChatTemplate::Limits limits;
  limits.output_bytes_max = 1000;
  ExpectLimited("{% for i in range(1000) %}0123456789{% endfor %}", limits);
}

TEST(ChatTemplateLimits, DeepValuesStop) {
  ExpectLimited(
      "{% set ns = namespace(s=[]) %}{% for i in range(90000) %}{% set ns.s = [ns.s] %}{% endfor %}");
  ExpectLimited("{% set ns = namespace() %}{% set ns.me = ns %}{{ ns }}");
  ordered_json deep = 1;
  for (int i = 0; i < 500; ++i) deep = ordered_json::array({deep});
  EXPECT_EQ(Render("x", {{"deep", deep}}).status().code(), absl::StatusCode::kResourceExhausted);
}

// A chain of namespaces is as deep as it likes: it is taken apart without recursion.
TEST(ChatTemplateLimits, LongChainsOfNamespacesAreFreed) {
  EXPECT_EQ(Text("{% set ns = namespace(prev=none) %}{% for i in range(90000) %}"
                 "{% set ns.prev = namespace(prev=ns.prev) %}{% endfor %}ok"),
            "ok");
}

TEST(ChatTemplateLimits, DeepSourcesAreParseErrors) {
  const auto refused = [](const std::string& source) {
    EXPECT_EQ(ChatTemplate::Parse(source).status().code(), absl::StatusCode::kInvalidArgument);
  };
  const auto repeat = [](const std::string& s, int n) {
    std::string out;
    for (int i = 0; i < n; ++i) out += s;
    return out;
  };
  refused("{{ " + repeat("(", 50'000));
  refused("{{ " + repeat("[", 50'000));
  refused("{{ " + repeat("-", 50'000) + "1 }}");
  refused("{{ " + repeat("not ", 50'000) + "1 }}");
  refused("{{ 1" + repeat(" + 1", 50'000) + " }}");
  refused("{{ x" + repeat(".x", 50'000) + " }}");
  refused("{{ x" + repeat("|trim", 50'000) + " }}");
  refused("{{ x" + repeat(" if x else x", 50'000) + " }}");
  refused(repeat("{% if x %}", 50'000));
  refused(std::string(ChatTemplate::kSourceBytesMax + 1, 'x'));
}

TEST(ChatTemplateLimits, RangesAreBoundedAsInTheSandbox) {
  EXPECT_EQ(Text("{{ range(1000000000) | length }}")
                .find("error: chat template line 1: OverflowError: Range too big"),
            0u);
}

TEST(ChatTemplateLimits, IntegersDoNotWrap) {
  for (const char* source : {"{{ 9223372036854775807 + 1 }}", "{{ -9223372036854775807 - 2 }}",
                             "{{ 2 ** 64 }}", "{{ 9223372036854775807 * 2 }}",
                             "{{ -(-9223372036854775807 - 1) }}", "{{ (-9223372036854775807 - 1) // -1 }}"}) {
    EXPECT_NE(Text(source).find("OverflowError"), std::string::npos) << source << " " << Text(source);
  }
  EXPECT_EQ(Text("{{ (-9223372036854775807 - 1) % -1 }}"), "0");
  EXPECT_NE(Text("{{ 1 // 0 }}").find("ZeroDivisionError"), std::string::npos);
}

}  // namespace
}  // namespace tidepool
