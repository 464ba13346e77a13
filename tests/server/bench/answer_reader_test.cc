#include "server/bench/answer_reader.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace tidepool {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

const absl::Time kStart = absl::UnixEpoch() + absl::Hours(3);

class AnswerReaderTest : public testing::Test {
 protected:
  void Head(int status = 200, const std::string& type = "text/event-stream; charset=utf-8") {
    reader_.Head(status, {{"content-type", type}});
  }
  void At(int ms, const std::string& json) {
    reader_.Bytes("data: " + json + "\n\n", kStart + absl::Milliseconds(ms));
  }
  void End(int ms, absl::Status status = absl::OkStatus()) {
    reader_.End(status, kStart + absl::Milliseconds(ms));
  }

  RequestRecord record_;
  AnswerReader reader_{record_, kStart, true};
};

TEST_F(AnswerReaderTest, TimesTheTokensOfAChat) {
  Head();
  At(10, R"({"choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]})");
  At(20, R"({"choices":[{"index":0,"delta":{"content":"Hel"},"finish_reason":null}],"usage":null})");
  At(25, R"({"choices":[{"index":0,"delta":{"content":"lo"},"finish_reason":null}]})");
  At(35, R"({"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]})");
  At(36,
     R"({"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":2,"prompt_tokens_details":{"cached_tokens":0}}})");
  At(37, "[DONE]");
  End(38);
  EXPECT_TRUE(record_.ok()) << record_.error;
  EXPECT_EQ(record_.first, absl::Milliseconds(20));  // the role's event carries no token
  EXPECT_EQ(record_.last, absl::Milliseconds(25));
  EXPECT_EQ(record_.end, absl::Milliseconds(38));
  EXPECT_THAT(record_.gaps_seconds, ElementsAre(testing::DoubleNear(0.005, 1e-9)));
  EXPECT_EQ(record_.input_tokens, 7u);
  EXPECT_EQ(record_.output_tokens, 2u);
  EXPECT_EQ(record_.cached_tokens, 0u);
  EXPECT_EQ(record_.finish_reason, "stop");
  EXPECT_EQ(record_.text, "Hello");
}

TEST_F(AnswerReaderTest, CountsEventsWhereTheServerDoesNotCount) {
  Head();
  for (int i = 0; i < 5; ++i) At(i, R"({"choices":[{"index":0,"text":"x"}]})");
  At(9, "[DONE]");
  End(9);
  EXPECT_TRUE(record_.ok());
  EXPECT_EQ(record_.output_tokens, 5u);
  EXPECT_FALSE(record_.usage_from_server);
  EXPECT_FALSE(record_.cached_tokens.has_value());
}

TEST_F(AnswerReaderTest, TakesThoughtsAndToolCallsForTokens) {
  Head();
  At(1, R"({"choices":[{"delta":{"reasoning_content":"hm"}}]})");
  At(2, R"({"choices":[{"delta":{"reasoning":"so"}}]})");
  At(3, R"({"choices":[{"delta":{"tool_calls":[{"index":0,"function":{"arguments":"{"}}]}}]})");
  At(4, "[DONE]");
  End(4);
  EXPECT_EQ(record_.first, absl::Milliseconds(1));
  EXPECT_EQ(record_.gaps_seconds.size(), 2u);
}

TEST_F(AnswerReaderTest, ReadsTheTraceOfTidepool) {
  Head();
  At(1,
     R"({"choices":[{"text":"x","finish_reason":"length"}],"tidepool_trace":{"prefill_worker":"p","decode_worker":"d",)"
     R"("queue_ms":1.5,"prefill_ms":20,"transfer_ms":3,"fetched_bytes":4096}})");
  At(2, "[DONE]");
  End(2);
  ASSERT_TRUE(record_.path.has_value());
  EXPECT_EQ(record_.path->prefill_worker, "p");
  EXPECT_DOUBLE_EQ(record_.path->transfer_seconds, 0.003);
  EXPECT_EQ(record_.path->fetched_bytes, 4096u);
}

TEST_F(AnswerReaderTest, AnErrorEventFailsTheRequest) {
  Head();
  At(1, R"({"choices":[{"text":"x"}]})");
  At(2, R"({"error":{"message":"worker lost","code":"unavailable"}})");
  End(3);
  EXPECT_EQ(record_.error, "unavailable: worker lost");
}

TEST_F(AnswerReaderTest, AStreamWithoutItsEndFails) {
  Head();
  At(1, R"({"choices":[{"text":"x","finish_reason":"length"}]})");
  End(2);
  EXPECT_THAT(record_.error, HasSubstr("without [DONE]"));
}

TEST_F(AnswerReaderTest, ABrokenConnectionFails) {
  Head();
  At(1, R"({"choices":[{"text":"x"}]})");
  End(2, absl::DataLossError("cut"));
  EXPECT_EQ(record_.error, "DATA_LOSS: cut");
}

TEST_F(AnswerReaderTest, KeepsWhatARefusalSays) {
  Head(429, "application/json");
  reader_.Bytes(R"({"error":{"message":"too many",)", kStart);
  reader_.Bytes(R"("code":"queue_full"}})", kStart);
  End(5);
  EXPECT_EQ(record_.error, "HTTP 429: queue_full: too many");
  EXPECT_TRUE(record_.rejected());
}

TEST_F(AnswerReaderTest, AnAnswerThatIsNoStreamFails) {
  Head(200, "application/json");
  reader_.Bytes("{}", kStart);
  End(1);
  EXPECT_THAT(record_.error, HasSubstr("text/event-stream"));
}

TEST_F(AnswerReaderTest, AnAnswerWithoutTextIsTimedByItsEnd) {
  Head();
  At(4, R"({"choices":[{"text":"","finish_reason":"stop"}]})");
  At(5, "[DONE]");
  End(6);
  EXPECT_TRUE(record_.ok());
  EXPECT_EQ(record_.first, absl::Milliseconds(6));
}

TEST_F(AnswerReaderTest, GarbageFailsAndDoesNoMore) {
  Head();
  for (const char* event : {"{", "[]", "null", R"({"choices":{}})", R"({"choices":[1,null,{"delta":3}]})",
                            R"({"usage":[],"error":null})", "\xff\xfe"}) {
    At(1, event);
  }
  At(2, "[DONE]");
  End(2);
  EXPECT_FALSE(record_.ok());
}

TEST(ErrorMessageTest, ReadsTheCommonShapes) {
  EXPECT_EQ(ErrorMessageOf(R"({"error":{"message":"m","code":"c"}})"), "c: m");
  EXPECT_EQ(ErrorMessageOf(R"({"object":"error","message":"flat","code":400})"), "flat");
  EXPECT_EQ(ErrorMessageOf(R"({"detail":"fastapi"})"), "fastapi");
  EXPECT_EQ(ErrorMessageOf("<html>\nno</html>"), "<html> no</html>");
  EXPECT_EQ(ErrorMessageOf(""), "");
}

}  // namespace
}  // namespace tidepool
