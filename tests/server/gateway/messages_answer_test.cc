#include "server/gateway/messages_answer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

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

MessagesAnswer Make() {
  auto parsed = ParseMessages(R"({"max_tokens":9,"messages":[{"role":"user","content":"hi"}]})");
  MessagesAnswer answer(std::get<MessagesRequest>(parsed), "toy", "req-1");
  Admission admission;
  admission.id = "abc";
  answer.Begin(admission);
  return answer;
}

std::vector<OrderedJson> Events(const std::string& stream) {
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
  }
  return events;
}

std::vector<std::string> Types(const std::vector<OrderedJson>& events) {
  std::vector<std::string> types;
  for (const OrderedJson& event : events) types.push_back(event["type"]);
  return types;
}

Outcome Done() {
  Outcome outcome;
  outcome.usage = {10, 7, 4, 2};
  return outcome;
}

std::vector<OrderedJson> Stream(const std::vector<MessageDelta>& pieces, const ChoiceEnd& end) {
  auto answer = Make();
  std::string out;
  answer.First(0, out);
  for (const MessageDelta& piece : pieces) answer.Delta(0, {}, std::span(&piece, 1), {10, 1, 4, 0}, out);
  answer.Finish(0, end, {10, 7, 4, 0}, out);
  answer.End(Done(), out);
  return Events(out);
}

OrderedJson Whole(const std::vector<MessageDelta>& pieces, const ChoiceEnd& end) {
  auto answer = Make();
  answer.Append(0, OutputDelta{}, pieces);
  answer.Append(0, end);
  return OrderedJson::parse(answer.Whole(Done()));
}

TEST(MessagesAnswer, StreamsTextInAnthropicsOrder) {
  const auto events = Stream({Text("Hel"), Text("lo")}, Ends("stop"));
  EXPECT_THAT(Types(events),
              ElementsAre("message_start", "ping", "content_block_start", "content_block_delta",
                          "content_block_delta", "content_block_stop", "message_delta", "message_stop"));
  EXPECT_EQ(
      events[0]["message"],
      OrderedJson::parse(R"({"id":"msg_abc","type":"message","role":"assistant","model":"toy","content":[],
              "stop_reason":null,"stop_sequence":null,"usage":{"input_tokens":6,"cache_creation_input_tokens":0,
              "cache_read_input_tokens":4,"output_tokens":1,"output_tokens_details":{"thinking_tokens":0}}})"));
  EXPECT_EQ(events[2],
            OrderedJson::parse(
                R"({"type":"content_block_start","index":0,"content_block":{"type":"text","text":""}})"));
  EXPECT_EQ(events[3]["delta"], OrderedJson::parse(R"({"type":"text_delta","text":"Hel"})"));
  EXPECT_EQ(events[6]["delta"], OrderedJson::parse(R"({"stop_reason":"end_turn","stop_sequence":null})"));
  EXPECT_EQ(events[6]["usage"]["output_tokens"], 7);
  EXPECT_EQ(events[6]["usage"]["output_tokens_details"]["thinking_tokens"], 2);
}

TEST(MessagesAnswer, ThoughtsTextAndCallsAreBlocksOfTheirOwn) {
  const std::vector<MessageDelta> pieces = {Thought("hm"),      Text("so"),    Call(0, "", "t1", "f"),
                                            Call(0, "{\"a\":"), Call(0, "1}"), Call(1, "{}", "t2", "g")};
  const auto events = Stream(pieces, Ends("tool_calls"));
  std::vector<std::string> said;
  for (const OrderedJson& event : events) {
    if (event.contains("content_block")) said.push_back(event["content_block"]["type"]);
    if (event["type"] == "content_block_delta") said.push_back(event["delta"]["type"]);
    if (event["type"] == "content_block_stop") said.push_back("stop " + event["index"].dump());
  }
  EXPECT_THAT(said, ElementsAre("thinking", "thinking_delta", "stop 0", "text", "text_delta", "stop 1",
                                "tool_use", "input_json_delta", "input_json_delta", "stop 2", "tool_use",
                                "input_json_delta", "stop 3"));
  EXPECT_EQ(events[events.size() - 2]["delta"]["stop_reason"], "tool_use");

  const OrderedJson whole = Whole(pieces, Ends("tool_calls"));
  EXPECT_EQ(
      whole["content"],
      OrderedJson::parse(R"([{"type":"thinking","thinking":"hm","signature":""},{"type":"text","text":"so"},
              {"type":"tool_use","id":"t1","name":"f","input":{"a":1}},
              {"type":"tool_use","id":"t2","name":"g","input":{}}])"));
  EXPECT_EQ(whole["stop_reason"], "tool_use");
  EXPECT_EQ(whole["usage"]["input_tokens"], 6);
}

TEST(MessagesAnswer, SaysWhyItStopped) {
  EXPECT_EQ(Whole({Text("x")}, Ends("stop"))["stop_reason"], "end_turn");
  EXPECT_EQ(Whole({Text("x")}, Ends("length"))["stop_reason"], "max_tokens");
  ChoiceEnd end = Ends("stop");
  end.stop_reason = std::string("END");
  EXPECT_EQ(Whole({Text("x")}, end)["stop_reason"], "stop_sequence");
  EXPECT_EQ(Whole({Text("x")}, end)["stop_sequence"], "END");
  // The end of a call that was asked for by name.
  EXPECT_EQ(Whole({Call(0, "{}", "t1", "f")}, Ends("stop"))["stop_reason"], "tool_use");
}

TEST(MessagesAnswer, ACallThatIsCutOffIsNoToolUse) {
  const OrderedJson whole = Whole({Text("so"), Call(0, "{\"a\":", "t1", "f")}, Ends("length"));
  EXPECT_EQ(whole["stop_reason"], "max_tokens");
  ASSERT_EQ(whole["content"].size(), 1u);
  EXPECT_EQ(whole["content"][0]["type"], "text");
}

TEST(MessagesAnswer, ACallThatIsShownAsTextStopsTheTurn) {
  const OrderedJson whole = Whole({Call(0, "{broken", "c1", "f")}, Ends("tool_calls"));
  EXPECT_EQ(whole["content"], OrderedJson::parse(R"([{"type":"text","text":"{broken"}])"));
  EXPECT_EQ(whole["stop_reason"], "end_turn");
  const OrderedJson two =
      Whole({Call(0, "{broken", "c1", "f"), Call(1, "{}", "c2", "f")}, Ends("tool_calls"));
  EXPECT_EQ(two["stop_reason"], "tool_use");
}

TEST(MessagesAnswer, AnEmptyAnswerStillBeginsAndEnds) {
  EXPECT_THAT(Types(Stream({}, Ends("stop"))),
              ElementsAre("message_start", "ping", "message_delta", "message_stop"));
  EXPECT_EQ(Whole({}, Ends("stop"))["content"], OrderedJson::array());
}

TEST(MessagesAnswer, AnErrorAfterTheFirstEventIsItsLast) {
  auto answer = Make();
  std::string out;
  const MessageDelta piece = Text("Hel");
  answer.Delta(0, {}, std::span(&piece, 1), {}, out);
  answer.Error(MakeError(errors::kUnavailable, "its worker failed"), out);
  const auto events = Events(out);
  EXPECT_EQ(
      events.back(),
      OrderedJson::parse(
          R"({"type":"error","error":{"type":"overloaded_error","message":"its worker failed"},"request_id":"req-1"})"));
  EXPECT_THAT(out, Not(HasSubstr("message_stop")));
}

TEST(MessagesAnswer, ErrorsHaveAnthropicsTypes) {
  const auto type = [](const ErrorKind& kind) {
    return OrderedJson::parse(MessagesErrorBody(MakeError(kind, "x"), "r"))["error"]["type"]
        .get<std::string>();
  };
  EXPECT_EQ(type(errors::kInvalidRequest), "invalid_request_error");
  EXPECT_EQ(type(errors::kUnauthorized), "authentication_error");
  EXPECT_EQ(type({"forbidden", 403}), "permission_error");
  EXPECT_EQ(type({"too_large", 413}), "request_too_large");
  EXPECT_EQ(type(errors::kModelNotFound), "not_found_error");
  EXPECT_EQ(type(errors::kRateLimited), "rate_limit_error");
  EXPECT_EQ(type(errors::kInternal), "api_error");
  EXPECT_EQ(type(errors::kNotReady), "overloaded_error");
  EXPECT_EQ(type(errors::kTimeout), "timeout_error");
}

TEST(MessagesAnswer, ARestartForgetsWhatTheFirstAttemptSaid) {
  auto answer = Make();
  const MessageDelta first = Text("no"), second = Text("yes");
  answer.Append(0, OutputDelta{}, std::span(&first, 1));
  answer.Clear(0);
  answer.Append(0, OutputDelta{}, std::span(&second, 1));
  answer.Append(0, Ends("stop"));
  const OrderedJson whole = OrderedJson::parse(answer.Whole(Done()));
  ASSERT_EQ(whole["content"].size(), 1u);
  EXPECT_EQ(whole["content"][0]["text"], "yes");
}

}  // namespace
}  // namespace tidepool
