// The template engine against Jinja2 on the chat templates of real models.
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "server/model/template/chat_template.h"
#include "server/model/text/tokenizer.h"

namespace tidepool {
namespace {

using nlohmann::ordered_json;

const std::string kData = "../shared/data/chat_templates/";

std::string ReadText(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

std::vector<ordered_json> ReadLines(const std::string& path) {
  std::vector<ordered_json> rows;
  std::ifstream in(path);
  for (std::string line; std::getline(in, line);) rows.push_back(ordered_json::parse(line));
  return rows;
}

ChatTemplate::Limits FixedClock(const std::string& iso) {
  ChatTemplate::Limits limits;
  limits.zone = absl::UTCTimeZone();
  absl::Time now;
  std::string error;
  EXPECT_TRUE(absl::ParseTime("%Y-%m-%dT%H:%M:%S", iso, &now, &error)) << error;
  limits.now = now;
  return limits;
}

struct Outcome {
  bool ok;
  std::string text;  // the output, or the error without its line
};

Outcome Render(const std::string& source, const ordered_json& context, const ChatTemplate::Limits& limits) {
  const auto parsed = ChatTemplate::Parse(source);
  if (!parsed.ok()) return {false, std::string(parsed.status().message())};
  const auto text = parsed->Render(context, ordered_json::object(), limits);
  if (text.ok()) return {true, text->text};
  const std::string message(text.status().message());
  const size_t colon = message.find(": ");
  return {false, message.substr(colon + 2)};
}

// Every template of the collection with every conversation: where Jinja2 renders we give the same bytes,
// where it raises we fail.
TEST(ChatTemplateGolden, EveryTemplateAndConversationEqualsJinja2) {
  if (!std::filesystem::exists(kData)) GTEST_SKIP() << kData << " is not here";
  const auto cases = ordered_json::parse(ReadText(kData + "golden/cases_dev.json"));
  const auto limits = FixedClock(cases["strftime_now"].get<std::string>());
  int equal = 0, total = 0, errors = 0, errors_worded_alike = 0;
  std::map<std::string, int> wrong;
  for (const auto& row : ReadLines(kData + "golden/golden_dev.jsonl")) {
    ordered_json context = cases["cases"][row["case"].get<std::string>()];
    context["bos_token"] = cases["bos_token"];
    context["eos_token"] = cases["eos_token"];
    const std::string name = row["template"];
    const Outcome got = Render(ReadText(kData + name), context, limits);
    const bool want_ok = row["ok"];
    const bool same = got.ok == want_ok && (!want_ok || got.text == row["text"].get<std::string>());
    ++total;
    equal += same;
    if (!want_ok) {
      ++errors;
      const bool alike = got.text == row["error"].get<std::string>();
      errors_worded_alike += alike;
    }
    if (!same && ++wrong[name] <= 2) {
      ADD_FAILURE() << name << " " << row["case"] << "\nwant " << (want_ok ? row["text"] : row["error"])
                    << "\ngot  " << ordered_json(got.text);
    }
  }
  std::cout << equal << " of " << total << " pairs equal; of " << errors << " errors " << errors_worded_alike
            << " are worded alike\n";
  for (const auto& [name, n] : wrong) std::cout << "wrong " << n << " " << name << "\n";
  EXPECT_GT(total, 0);
}

class ExpectationsTest : public testing::TestWithParam<const char*> {};

TEST_P(ExpectationsTest, EqualsJinja2) {
  const std::string path = kData + "expectations/" + GetParam();
  if (!std::filesystem::exists(path)) GTEST_SKIP() << path << " is not here";
  int equal = 0, total = 0;
  for (const auto& row : ReadLines(path)) {
    const Outcome got = Render(row["template"], row["context"], FixedClock("2025-07-10T12:00:00"));
    const bool want_ok = row.contains("expected");
    const bool same = got.ok == want_ok && (!want_ok || got.text == row["expected"].get<std::string>());
    EXPECT_TRUE(same) << row["name"] << " " << row["template"] << "\nwant "
                      << row.value("expected", row.value("error", "")) << "\ngot  " << got.text;
    equal += same;
    ++total;
  }
  std::cout << GetParam() << ": " << equal << " of " << total << " equal\n";
}

INSTANTIATE_TEST_SUITE_P(Files, ExpectationsTest, testing::Values("jinja_features.jsonl", "chat_e2e.jsonl"),
                         [](const auto& info) { return std::string(info.param).substr(0, 5); });

TEST(DemoModel, TemplateEqualsItsGolden) {
  const std::string dir = "tools/demo_model/";
  if (!std::filesystem::exists(dir + "model/tokenizer.json") ||
      !std::filesystem::exists(dir + "golden/demo_template.jsonl")) {
    GTEST_SKIP() << dir << "model or its golden file is not here";
  }
  const auto tokenizer = Tokenizer::Load(dir + "model");
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  const auto parsed = ChatTemplate::Parse((*tokenizer)->chat_template());
  ASSERT_TRUE(parsed.ok()) << parsed.status();
  int rows = 0;
  for (const auto& row : ReadLines(dir + "golden/demo_template.jsonl")) {
    const ordered_json context = {{"messages", row["messages"]},
                                  {"tools", row.value("tools", ordered_json())},
                                  {"add_generation_prompt", row["add_generation_prompt"]}};
    const ordered_json trusted = {{"bos_token", (*tokenizer)->bos_token()},
                                  {"eos_token", (*tokenizer)->eos_token()}};
    const auto text = parsed->Render(context, trusted);
    ASSERT_TRUE(text.ok()) << text.status();
    EXPECT_EQ(text->text, row["rendered"].get<std::string>());
    const auto ids = (*tokenizer)->Encode(text->text, {.add_special_tokens = false});
    ASSERT_TRUE(ids.ok());
    EXPECT_EQ(*ids, row["ids"].get<std::vector<int32_t>>());
    // The reference takes a special token that a user spells out for the token; marks make the difference.
    const auto safe = (*tokenizer)->Encode(text->text, {.add_special_tokens = false, .data = text->data});
    ASSERT_TRUE(safe.ok());
    const bool spelled = row["messages"].dump().find("<|") != std::string::npos;
    EXPECT_EQ(*safe == *ids, !spelled) << row["messages"];
    EXPECT_EQ((*tokenizer)->Decode(*safe, false), text->text);
    ++rows;
  }
  EXPECT_GT(rows, 0);
}

}  // namespace
}  // namespace tidepool
