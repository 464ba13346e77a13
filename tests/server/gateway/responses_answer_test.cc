#include "server/gateway/responses_answer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "base/digest.h"
#include "tests/server/gateway/fake_cluster.h"

namespace tidepool {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;
using Kind = MessageDelta::Kind;

MessageDelta Text(std::string text) { return {Kind::kContent, std::move(text), 0, {}, {}}; }
MessageDelta Thought(std::string text) { return {Kind::kReasoning, std::move(text), 0, {}, {}}; }
MessageDelta Call(uint32_t call, std::string text, std::string id = {}, std::string name = {}) {
  return {Kind::kToolCall, std::move(text), call, std::move(id), std::move(name)};
}
ChoiceEnd Ends(std::string reason) {
  ChoiceEnd end;
  end.finish_reason = std::move(reason);
  return end;
}

class ResponsesAnswerTest : public ::testing::Test {
 protected:
  ResponsesAnswerTest()
      : dir_(std::filesystem::temp_directory_path() / ("tidepool-responses-" + RandomHexId())) {
    WriteByteModel(dir_);
    tokenizer_ = *Tokenizer::Load(dir_.string());
  }
  ~ResponsesAnswerTest() override { std::filesystem::remove_all(dir_); }

  std::unique_ptr<ResponsesAnswer> Make(const std::string& more = "") {
    auto parsed = ParseResponses(R"({"input":"hi")" + more + "}");
    const auto* error = std::get_if<ApiError>(&parsed);
    EXPECT_EQ(error, nullptr) << error->message;
    auto answer =
        std::make_unique<ResponsesAnswer>(std::get<ResponsesRequest>(parsed), "toy", 1700, *tokenizer_);
    Admission admission;
    admission.id = "abc";
    answer->Begin(admission);
    return answer;
  }
  // The events of a stream; each has the name that its data says.
  static std::vector<OrderedJson> Events(const std::string& stream) {
    std::vector<OrderedJson> events;
    size_t at = 0;
    while (at < stream.size()) {
      const size_t end = stream.find("\n\n", at);
      const std::string event = stream.substr(at, end - at);
      at = end + 2;
      const size_t data = event.find("\ndata: ");
      EXPECT_EQ(event.rfind("event: ", 0), 0u) << event;
      events.push_back(OrderedJson::parse(event.substr(data + 7)));
      EXPECT_EQ(events.back()["type"], event.substr(7, data - 7));
      EXPECT_EQ(events.back()["sequence_number"], events.size() - 1);
    }
    return events;
  }
  static std::vector<std::string> Types(const std::vector<OrderedJson>& events) {
    std::vector<std::string> types;
    for (const OrderedJson& event : events) types.push_back(event["type"]);
    return types;
  }
  static Outcome Done() {
    Outcome outcome;
    outcome.usage = {10, 7, 4, 2};
    return outcome;
  }
  // All pieces as one stream, and at once; both must say the same in the end.
  std::vector<OrderedJson> Both(const std::vector<MessageDelta>& pieces, const std::string& reason,
                                OrderedJson* whole) {
    auto streamed = Make();
    std::string out;
    streamed->First(0, out);
    for (const MessageDelta& piece : pieces) streamed->Delta(0, {}, std::span(&piece, 1), {}, out);
    streamed->Finish(0, Ends(reason), {}, out);
    streamed->End(Done(), out);
    auto events = Events(out);

    auto collected = Make();
    collected->Append(0, OutputDelta{}, pieces);
    collected->Append(0, Ends(reason));
    *whole = OrderedJson::parse(collected->Whole(Done()));
    OrderedJson last = events.back()["response"];
    // The one thing that depends on the clock.
    last.erase("completed_at");
    OrderedJson same = *whole;
    same.erase("completed_at");
    EXPECT_EQ(last, same);
    return events;
  }

  const std::filesystem::path dir_;
  std::shared_ptr<const Tokenizer> tokenizer_;
};

TEST_F(ResponsesAnswerTest, StreamsAMessageInOpenAIsOrder) {
  OrderedJson whole;
  const auto events = Both({Text("Hel"), Text("lo")}, "stop", &whole);
  EXPECT_THAT(Types(events),
              ElementsAre("response.created", "response.in_progress", "response.output_item.added",
                          "response.content_part.added", "response.output_text.delta",
                          "response.output_text.delta", "response.output_text.done",
                          "response.content_part.done", "response.output_item.done", "response.completed"));
  EXPECT_EQ(events[0]["response"]["status"], "in_progress");
  EXPECT_EQ(events[0]["response"]["output"], OrderedJson::array());
  EXPECT_EQ(events[0]["response"]["usage"], nullptr);
  EXPECT_EQ(events[2]["item"]["content"], OrderedJson::array());
  EXPECT_EQ(events[3]["part"]["text"], "");
  EXPECT_EQ(events[4]["delta"], "Hel");
  EXPECT_EQ(events[4]["item_id"], events[2]["item"]["id"]);
  EXPECT_EQ(events[4]["logprobs"], OrderedJson::array());
  EXPECT_EQ(events[6]["text"], "Hello");

  EXPECT_EQ(whole["id"], "resp_abc");
  EXPECT_EQ(whole["object"], "response");
  EXPECT_EQ(whole["created_at"], 1700);
  EXPECT_EQ(whole["status"], "completed");
  EXPECT_EQ(whole["error"], nullptr);
  EXPECT_EQ(whole["incomplete_details"], nullptr);
  EXPECT_EQ(whole["model"], "toy");
  EXPECT_EQ(whole["store"], false);
  EXPECT_EQ(whole["metadata"], OrderedJson::object());
  ASSERT_EQ(whole["output"].size(), 1u);
  EXPECT_EQ(whole["output"][0]["type"], "message");
  EXPECT_EQ(whole["output"][0]["status"], "completed");
  EXPECT_EQ(whole["output"][0]["content"],
            OrderedJson::parse(R"([{"type":"output_text","text":"Hello","annotations":[],"logprobs":[]}])"));
  EXPECT_EQ(whole["usage"],
            OrderedJson::parse(
                R"({"input_tokens":10,"input_tokens_details":{"cached_tokens":4,"cache_write_tokens":0},
                                    "output_tokens":7,"output_tokens_details":{"reasoning_tokens":2},"total_tokens":17})"));
}

TEST_F(ResponsesAnswerTest, HasEveryMemberThatOpenAIsDescriptionRequires) {
  std::ifstream file("../shared/data/openapi/openai_inference_subset.json");
  if (!file) GTEST_SKIP() << "../shared/data/openapi is absent";
  const auto schemas = nlohmann::json::parse(file)["components"]["schemas"];
  OrderedJson whole;
  const auto events = Both({Thought("t"), Text("m"), Call(0, "{}", "c1", "f")}, "tool_calls", &whole);
  for (const auto& part : schemas["Response"]["allOf"]) {
    if (!part.contains("required")) continue;
    for (const auto& name : part["required"]) EXPECT_TRUE(whole.contains(name.get<std::string>())) << name;
  }
  size_t checked = 0;
  for (const auto& [name, schema] : schemas.items()) {
    if (!schema.contains("properties") || !schema["properties"].contains("type") ||
        !schema.contains("required"))
      continue;
    const auto& type = schema["properties"]["type"];
    if (!type.contains("enum") || type["enum"].size() != 1) continue;
    for (const OrderedJson& event : events) {
      if (event["type"] != type["enum"][0].get<std::string>()) continue;
      ++checked;
      for (const auto& member : schema["required"]) {
        EXPECT_TRUE(event.contains(member.get<std::string>())) << event["type"] << " lacks " << member;
      }
    }
  }
  EXPECT_GE(checked, events.size());
}

TEST_F(ResponsesAnswerTest, ThoughtsAMessageAndCallsAreItemsOfTheirOwn) {
  OrderedJson whole;
  const auto events = Both({Thought("hm"), Text("so"), Call(0, "", "c1", "f"), Call(0, "{\"a\":"),
                            Call(0, "1}"), Call(1, "{}", "c2", "g")},
                           "tool_calls", &whole);
  EXPECT_THAT(Types(events),
              ElementsAre("response.created", "response.in_progress",                              //
                          "response.output_item.added", "response.content_part.added",             //
                          "response.reasoning_text.delta", "response.reasoning_text.done",         //
                          "response.content_part.done", "response.output_item.done",               //
                          "response.output_item.added", "response.content_part.added",             //
                          "response.output_text.delta", "response.output_text.done",               //
                          "response.content_part.done", "response.output_item.done",               //
                          "response.output_item.added", "response.function_call_arguments.delta",  //
                          "response.function_call_arguments.delta",                                //
                          "response.function_call_arguments.done", "response.output_item.done",    //
                          "response.output_item.added", "response.function_call_arguments.delta",  //
                          "response.function_call_arguments.done", "response.output_item.done",    //
                          "response.completed"));
  ASSERT_EQ(whole["output"].size(), 4u);
  EXPECT_EQ(whole["output"][0]["type"], "reasoning");
  EXPECT_EQ(whole["output"][0]["summary"], OrderedJson::array());
  EXPECT_EQ(whole["output"][0]["content"][0]["text"], "hm");
  EXPECT_EQ(whole["output"][2]["type"], "function_call");
  EXPECT_EQ(whole["output"][2]["call_id"], "c1");
  EXPECT_EQ(whole["output"][2]["name"], "f");
  EXPECT_EQ(whole["output"][2]["arguments"], "{\"a\":1}");
  EXPECT_EQ(whole["output"][3]["arguments"], "{}");
  // One id from the first event to the last, another for each item.
  EXPECT_EQ(events[14]["item"]["id"], whole["output"][2]["id"]);
  EXPECT_NE(whole["output"][2]["id"], whole["output"][3]["id"]);
  EXPECT_EQ(events[14]["output_index"], 2);
}

TEST_F(ResponsesAnswerTest, AnAnswerCutByItsLengthIsIncomplete) {
  OrderedJson whole;
  const auto events = Both({Text("Hel")}, "length", &whole);
  EXPECT_EQ(events.back()["type"], "response.incomplete");
  EXPECT_EQ(whole["status"], "incomplete");
  EXPECT_EQ(whole["incomplete_details"]["reason"], "max_output_tokens");
  EXPECT_EQ(whole["completed_at"], nullptr);
  EXPECT_EQ(whole["output"][0]["status"], "incomplete");
}

TEST_F(ResponsesAnswerTest, AnEmptyAnswerHasAnEmptyMessage) {
  OrderedJson whole;
  Both({}, "stop", &whole);
  ASSERT_EQ(whole["output"].size(), 1u);
  EXPECT_EQ(whole["output"][0]["content"][0]["text"], "");
}

TEST_F(ResponsesAnswerTest, AnErrorAfterTheFirstEventIsAnErrorAndAFailedResponse) {
  auto answer = Make();
  std::string out;
  answer->First(0, out);
  const MessageDelta piece = Text("Hel");
  answer->Delta(0, {}, std::span(&piece, 1), {}, out);
  answer->Error(MakeError(errors::kUnavailable, "its worker failed"), out);
  const auto events = Events(out);
  const OrderedJson& error = events[events.size() - 2];
  EXPECT_EQ(error["type"], "error");
  EXPECT_EQ(error["code"], "no_worker");
  EXPECT_EQ(error["message"], "its worker failed");
  EXPECT_EQ(error["param"], nullptr);
  EXPECT_EQ(error["error"]["message"], "its worker failed") << "what OpenAI's client raises for";
  EXPECT_EQ(events.back()["type"], "response.failed");
  EXPECT_EQ(events.back()["response"]["status"], "failed");
  EXPECT_EQ(events.back()["response"]["error"]["code"], "server_error");
  EXPECT_EQ(events.back()["response"]["output"][0]["status"], "incomplete");
  EXPECT_THAT(out, Not(HasSubstr("[DONE]")));
  EXPECT_THAT(out, Not(HasSubstr("response.completed")));
}

TEST_F(ResponsesAnswerTest, AnErrorBeforeTheFirstEventStillBeginsTheStream) {
  auto answer = Make();
  std::string out;
  answer->Error(MakeError(errors::kTimeout, "too late"), out);
  EXPECT_THAT(Types(Events(out)),
              ElementsAre("response.created", "response.in_progress", "error", "response.failed"));
}

TEST_F(ResponsesAnswerTest, LogprobsAreTheMessagesAlone) {
  auto answer = Make(R"(,"top_logprobs":1)");
  std::string out;
  answer->First(0, out);
  const auto delta = [&](int32_t id, std::vector<MessageDelta> pieces) {
    OutputDelta tokens;
    tokens.tokens = {{id, -0.5f, {{id, -0.5f}}}};
    answer->Delta(0, tokens, pieces, {}, out);
  };
  delta('t', {Thought("t")});
  delta('a', {});  // held back: its text comes with the next
  delta('b', {Text("ab")});
  answer->Finish(0, Ends("stop"), {}, out);
  answer->End(Done(), out);
  const OrderedJson last = Events(out).back()["response"];
  EXPECT_EQ(last["top_logprobs"], 1);
  const OrderedJson& logprobs = last["output"][1]["content"][0]["logprobs"];
  ASSERT_EQ(logprobs.size(), 2u);
  EXPECT_EQ(logprobs[0]["token"], "a");
  EXPECT_EQ(logprobs[1]["token"], "b");
  EXPECT_EQ(logprobs[1]["top_logprobs"].size(), 1u);
  EXPECT_FLOAT_EQ(logprobs[1]["logprob"].get<float>(), -0.5f);
}

TEST_F(ResponsesAnswerTest, ADeltaThatEndsThoughtsAndBeginsTheMessageKeepsItsLogprobs) {
  auto answer = Make(R"(,"top_logprobs":1)");
  OutputDelta tokens;
  tokens.tokens = {{'b', -0.5f, {{'b', -0.5f}}}};
  const std::vector<MessageDelta> pieces = {Thought("t"), Text("b")};
  answer->Append(0, tokens, pieces);
  answer->Append(0, Ends("stop"));
  const OrderedJson whole = OrderedJson::parse(answer->Whole(Done()));
  ASSERT_EQ(whole["output"].size(), 2u);
  EXPECT_EQ(whole["output"][1]["content"][0]["logprobs"].size(), 1u);
}

TEST_F(ResponsesAnswerTest, ARestartForgetsWhatTheFirstAttemptSaid) {
  auto answer = Make();
  const MessageDelta first = Text("no"), second = Text("yes");
  answer->Append(0, OutputDelta{}, std::span(&first, 1));
  answer->Clear(0);
  answer->Append(0, OutputDelta{}, std::span(&second, 1));
  answer->Append(0, Ends("stop"));
  const OrderedJson whole = OrderedJson::parse(answer->Whole(Done()));
  ASSERT_EQ(whole["output"].size(), 1u);
  EXPECT_EQ(whole["output"][0]["content"][0]["text"], "yes");
}

TEST_F(ResponsesAnswerTest, TheBodyOfAnErrorNamesTheFieldOfThisApi) {
  const auto body = OrderedJson::parse(
      Make()->ErrorBody(MakeError(errors::kContextLength, "messages: has 900 tokens", "messages")));
  EXPECT_EQ(body["error"]["param"], "input");
  EXPECT_EQ(body["error"]["message"], "input: has 900 tokens");
  EXPECT_EQ(body["error"]["code"], "context_length_exceeded");
}

}  // namespace
}  // namespace tidepool
