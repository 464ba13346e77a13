#include "server/batch/line.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "server/batch/prompt_path.h"

namespace tidepool {
namespace {

using ::testing::HasSubstr;

std::string CodeOf(std::string_view text) {
  const BatchLine line = ParseBatchLine(text, 7);
  return line.error ? line.error->code : "";
}

TEST(BatchLine, ReadsWhatOpenAiDocuments) {
  const BatchLine line = ParseBatchLine(
      R"({"custom_id":"a-1","method":"POST","url":"/v1/chat/completions","body":{"model":"m","n":1}})", 1);
  ASSERT_FALSE(line.error);
  EXPECT_EQ(line.custom_id, "a-1");
  EXPECT_EQ(line.url, "/v1/chat/completions");
  EXPECT_EQ(DumpJson(line.body), R"({"model":"m","n":1})");
}

TEST(BatchLine, NamesWhatIsWrongAndWhere) {
  EXPECT_EQ(CodeOf("{"), "invalid_json_line");
  EXPECT_EQ(CodeOf("[]"), "invalid_json_line");
  EXPECT_EQ(CodeOf(R"({"method":"POST"})"), "invalid_custom_id");
  EXPECT_EQ(CodeOf(R"({"custom_id":"","method":"POST"})"), "invalid_custom_id");
  EXPECT_EQ(CodeOf(R"({"custom_id":3,"method":"POST"})"), "invalid_custom_id");
  EXPECT_EQ(CodeOf(R"({"custom_id":")" + std::string(513, 'x') + R"("})"), "invalid_custom_id");
  EXPECT_EQ(CodeOf(R"({"custom_id":"a","method":"GET","url":"/v1/completions","body":{}})"), "invalid_line");
  EXPECT_EQ(CodeOf(R"({"custom_id":"a","method":"POST","url":"/v1/files","body":{}})"), "invalid_url");
  EXPECT_EQ(CodeOf(R"({"custom_id":"a","method":"POST","url":"/v1/completions","body":[]})"), "invalid_line");
  EXPECT_EQ(CodeOf(R"({"custom_id":"a","method":"POST","url":"/v1/completions"})"), "invalid_line");
  const BatchLine line = ParseBatchLine(
      R"({"custom_id":"a","method":"POST","url":"/v1/completions","body":{"stream":true}})", 7);
  ASSERT_TRUE(line.error);
  EXPECT_EQ(line.error->line, 7u);
  EXPECT_EQ(line.error->param, "body.stream");
  EXPECT_EQ(line.custom_id, "a");
}

TEST(BatchLine, OutputReadsBackAsWhatItAnswers) {
  const std::string answer = FormatAnswer("id \"1\"\n", 200, "req", R"({"x":[1,2]})");
  EXPECT_EQ(answer.back(), '\n');
  EXPECT_EQ(std::count(answer.begin(), answer.end(), '\n'), 1);
  const auto done = ParseDoneLine(answer);
  ASSERT_TRUE(done.ok()) << done.status();
  EXPECT_EQ(done->custom_id, "id \"1\"\n");
  EXPECT_TRUE(done->ok);
  EXPECT_FALSE(ParseDoneLine(FormatAnswer("a", 400, "", "{}"))->ok);
  EXPECT_FALSE(ParseDoneLine(FormatFailure("a", {"request_timeout", "late"}))->ok);
  const auto nameless = ParseDoneLine(FormatFailure("", {"invalid_json_line", "bad", "", 12}));
  ASSERT_TRUE(nameless.ok());
  EXPECT_EQ(nameless->custom_id, "");
  EXPECT_EQ(nameless->line, 12u);
}

TEST(BatchLine, OutputHasTheNamesOfOpenAi) {
  const auto json = ParseJson(FormatAnswer("a", 200, "req", "{}"));
  ASSERT_TRUE(json.ok());
  EXPECT_THAT((*json)["id"].get<std::string>(), HasSubstr("batch_req_"));
  EXPECT_EQ((*json)["response"]["status_code"], 200);
  EXPECT_EQ((*json)["response"]["request_id"], "req");
  EXPECT_TRUE((*json)["response"]["body"].is_object());
  EXPECT_TRUE((*json)["error"].is_null());
  const auto failure = ParseJson(FormatFailure("a", {"batch_expired", "late"}));
  EXPECT_TRUE((*failure)["response"].is_null());
  EXPECT_EQ((*failure)["error"]["code"], "batch_expired");
}

TEST(BatchLine, ForeignLinesAreNoOutput) {
  EXPECT_FALSE(ParseDoneLine("hello").ok());
  EXPECT_FALSE(ParseDoneLine(R"({"custom_id":"a"})").ok());
  EXPECT_FALSE(ParseDoneLine(R"({"custom_id":null,"response":null,"error":{"code":"x"}})").ok());
  EXPECT_FALSE(ParseDoneLine("[1]").ok());
}

PromptPath Chat(const std::string& system, const std::string& user, const char* more = "") {
  const auto body = ParseJson(R"({"model":"m","messages":[{"role":"system","content":")" + system +
                              R"("},{"role":"user","content":")" + user + R"("}])" + more + "}");
  EXPECT_TRUE(body.ok()) << body.status();
  return PathOf("/v1/chat/completions", *body);
}

size_t SharedUnits(const PromptPath& a, const PromptPath& b) {
  size_t n = 0;
  while (n < a.units.size() && n < b.units.size() && a.units[n] == b.units[n]) ++n;
  return n;
}

TEST(PromptPath, ChatsShareTheirCommonBeginning) {
  const std::string system(1000, 's'), user(500, 'u');
  const PromptPath a = Chat(system, user + "1"), b = Chat(system, user + "2"), c = Chat("x" + system, user);
  EXPECT_GE(SharedUnits(a, b), 1500 / kPathUnitBytes);
  EXPECT_LE(SharedUnits(a, c), 1u);
}

TEST(PromptPath, ToolsStandBeforeMessages) {
  const std::string system(640, 's');
  const PromptPath without = Chat(system, "u");
  const PromptPath with = Chat(system, "u", R"(,"tools":[{"type":"function","function":{"name":"f"}}])");
  EXPECT_LE(SharedUnits(without, with), 1u);
}

TEST(PromptPath, FieldsAreKeptApart) {
  const std::string long_text(200, 'a');
  EXPECT_LT(SharedUnits(Chat(long_text + "b", long_text), Chat(long_text, "b" + long_text)),
            2 * long_text.size() / kPathUnitBytes);
}

TEST(PromptPath, SamplingDoesNotSplitAPrefix) {
  const std::string system(640, 's');
  const PromptPath a = Chat(system, "u", R"(,"temperature":0.5,"max_tokens":7)");
  const PromptPath b = Chat(system, "u", R"(,"temperature":1)");
  EXPECT_EQ(a.units, b.units);
  EXPECT_EQ(a.decode_tokens, 7u);
  EXPECT_EQ(b.decode_tokens, 256u);
}

TEST(PromptPath, TokenIdsCountAsTheyStand) {
  std::string ids = "[1";
  for (int i = 2; i < 200; ++i) ids += "," + std::to_string(i);
  const auto a = ParseJson(R"({"prompt":)" + ids + ",7]}"), b = ParseJson(R"({"prompt":)" + ids + ",8]}");
  const PromptPath pa = PathOf("/v1/completions", *a), pb = PathOf("/v1/completions", *b);
  EXPECT_GE(SharedUnits(pa, pb) + 1, pa.units.size());
  EXPECT_EQ(pa.decode_tokens, 16u);
}

}  // namespace
}  // namespace tidepool
