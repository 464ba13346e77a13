#include "server/model/template/chat_template.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <string>

namespace tidepool {
namespace {

using nlohmann::ordered_json;

// The default limits, but for the time: sanitizers are slow.
ChatTemplate::Limits Patient() {
  ChatTemplate::Limits limits;
  limits.time_max = absl::Seconds(5);
  return limits;
}

absl::StatusOr<std::string> Render(const std::string& source,
                                   const ordered_json& context = ordered_json::object(),
                                   const ChatTemplate::Limits& limits = Patient()) {
  const auto parsed = ChatTemplate::Parse(source);
  if (!parsed.ok()) return parsed.status();
  auto text = parsed->Render(context, ordered_json::object(), limits);
  if (!text.ok()) return text.status();
  return std::move(text->text);
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
TEST(ChatTemplate, RangesPrintAsPythonDoes) {
  EXPECT_EQ(Text("{{ range(3) }}{{ range(0, 10, 3) }}{{ range(5, 2) }}"),
            "range(0, 3)range(0, 10, 3)range(5, 2)");
  EXPECT_EQ(Text("{{ range(3)[1:] }}{{ range(1, 9)[::2] }}"), "range(1, 3)range(1, 9, 2)");
  EXPECT_EQ(Text("{{ range(-9223372036854775807, 9223372036854775807, 9223372036854775800)[1:] }}"),
            "range(-7, 18446744073709551593, 9223372036854775800)");
}

TEST(ChatTemplate, AddingToSafeTextEscapes) {
  EXPECT_EQ(Text("{{ '<'|safe + '<' + '>'|safe }}|{{ '<' + '<'|safe }}|{{ '<'|safe ~ '<' }}|{{ '<&' | e }}"),
            "<&lt;>|&lt;<|<<|&lt;&amp;");
}

TEST(ChatTemplate, FormatsAsPrintfDoes) {
  EXPECT_EQ(Text("{{ '%5s|%-5s|%.2s|%r|%05.1f|%x|%+d|%%' % ('é', 'ab', 'abc', 'q', 2.25, 255, 3) }}"),
            "    é|ab   |ab|'q'|002.2|ff|+3|%");
  EXPECT_EQ(Text("{{ '%600d' % 1 }}").size(), 600u);
  EXPECT_EQ(Text("{{ '%s' % (1, 2) }}"),
            "error: chat template line 1: TypeError: not all arguments converted during string formatting");
  EXPECT_EQ(Text("{{ '%9999999d' % 1 }}"),
            "error: chat template line 1: ValueError: width or precision too big");
  EXPECT_EQ(Text("{{ 'a'.center(5, 'xy') }}"),
            "error: chat template line 1: TypeError: The fill character must be exactly one character long");
}

// 1, 1.0 and true are one key in Python.
TEST(ChatTemplate, ANulByteIsNoFormatCharacter) {
  using namespace std::string_literals;
  EXPECT_NE(Text("{{ '%1\0d' % 1 }}"s).find("unsupported format character"), std::string::npos);
  EXPECT_EQ(Text("{{ 'a\0b' | title }}"s), "A\0b"s);
}

TEST(ChatTemplate, KeysMeetAsInPython) {
  EXPECT_EQ(
      Text("{% set d = {1: 'a', 2.5: 'b', (1, 'x'): 'c', none: 'd'} %}{{ d[1.0] }}{{ d[true] }}{{ d[2.5] }}"
           "{{ d[(1.0, 'x')] }}{{ d[none] }}{{ d | length }}{{ {1: 'a', true: 'b', 1.0: 'c'} }}{{ '1' in d "
           "}}"),
      "aabcd4{1: 'c'}False");
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

TEST(ChatTemplateLimits, ProcessorTimeStopsWhatStepsDoNot) {
  ChatTemplate::Limits limits;
  limits.steps_max = UINT64_MAX;
  limits.alloc_bytes_max = UINT64_MAX;
  limits.time_max = absl::Milliseconds(20);
  for (const char* source :
       {"{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% set s = 'ab' * 1000000 %}{% for a in range(99999) %}{{ s | length }}{% endfor %}",
        "{% set s = 'a' * 1000000 %}{% for a in range(99999) %}{{ 'ab' in s }}{% endfor %}",
        "{% set t = (1,) * 99999 %}{% for a in range(99999) %}{% set d = {t: 1} %}{% endfor %}"}) {
    const auto text = Render(source, ordered_json::object(), limits);
    EXPECT_EQ(text.status().code(), absl::StatusCode::kResourceExhausted) << source;
    EXPECT_NE(text.status().message().find("more than 20ms of processor time"), std::string::npos)
        << text.status();
  }
}

// Work that grows with the square of a text or of a list is work that a client can make the gateway do.
TEST(ChatTemplateLimits, LongTextsTakeLinearTime) {
  const std::string words = [] {
    std::string text;
    for (int i = 0; i < 100'000; ++i) text += "ab ";
    return text;
  }();
  const std::string repeated(1'000'000, 'a');
  const auto fast = [](const std::string& source, const ordered_json& context) {
    const auto text = Render(source, context);  // within the time limit
    EXPECT_TRUE(text.ok()) << source << text.status();
  };
  fast("{{ x.rsplit() | length }}", {{"x", words}});
  fast("{{ x.split('b') | length }}", {{"x", words}});
  fast("{{ x.rsplit(y) | length }}{{ x.strip(z) | length }}",
       {{"x", repeated}, {"y", std::string(500'000, 'a') + 'b'}, {"z", std::string(50'000, 'b') + 'a'}});
  fast("{{ y in x }}{{ x.find(y) }}{{ x.rfind(y) }}{{ x.count(y) }}{{ x.replace(y, '') | length }}",
       {{"x", repeated}, {"y", std::string(500'000, 'a') + 'b'}});
  fast("{% set d = dict(items) %}{{ d | length }}", {{"items", [] {
                                                        ordered_json items = ordered_json::array();
                                                        for (int i = 0; i < 50'000; ++i)
                                                          items.push_back(ordered_json::array({i, i}));
                                                        return items;
                                                      }()}});
}

TEST(ChatTemplateLimits, HugeValuesStop) {
  ExpectLimited("{{ 'x' * 2000000000 }}");
  ExpectLimited("{{ [1] * 2000000000 }}");
  ExpectLimited(
      "{% set ns = namespace(s='xxxxxxxxxxxxxxxx') %}{% for i in range(100) %}{% set ns.s = ns.s ~ ns.s %}"
      "{% endfor %}{{ ns.s | length }}");
  ExpectLimited(
      "{% set ns = namespace(s=[1]) %}{% for i in range(100) %}{% set ns.s = ns.s + ns.s %}{% endfor %}");
  ExpectLimited("{{ ('a,' * 9000000).split(',') | length }}");
  ExpectLimited("{{ ('a ' * 9000000).split() | length }}");
  ExpectLimited("{{ ('a\n' * 9000000).splitlines() | length }}");
  ExpectLimited("{{ 'a'.center(9223372036854775807) }}{{ 'a'.zfill(9223372036854775807) }}");
  ExpectLimited("{{ [[[[1]]]] | tojson(indent='x' * 30000000) }}");
  ExpectLimited("{% for c in 'a' * 30000000 %}{% endfor %}");
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
TEST(ChatTemplateLimits, MethodsAndLoopsCountAsNesting) {
  ExpectLimited(
      "{% set ns = namespace(x=0) %}{% for i in range(60000) %}{% set ns.x = [ns.x].count %}{% endfor %}");
  ExpectLimited(
      "{% set ns = namespace(x=[1]) %}{% for i in range(60000) %}{% for y in ns.x %}{% set ns.x = [loop] %}"
      "{% endfor %}{% endfor %}");
  // A loop that remembers itself: the leak checker's case.
  EXPECT_EQ(Text("{% for i in [1] %}{{ loop.changed(loop) }}{% endfor %}"), "True");
}

TEST(ChatTemplateLimits, KeysAreCharged) {
  ExpectLimited(
      "{% set s = 'a' * 8000000 %}{% set ns = namespace(l=[]) %}{% for i in range(100) %}"
      "{% set ns.l = ns.l + [{s: i}] %}{% endfor %}");
}

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
