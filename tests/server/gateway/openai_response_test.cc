#include "server/gateway/openai_response.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "base/digest.h"
#include "server/gateway/openai_request.h"
#include "tests/server/gateway/byte_model.h"

namespace tidepool {
namespace {

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
Outcome Done() {
  Outcome outcome;
  outcome.usage = {10, 7, 4, 2};
  return outcome;
}

class OpenAiAnswerTest : public ::testing::Test {
 protected:
  OpenAiAnswerTest() : dir_(std::filesystem::temp_directory_path() / ("tidepool-openai-" + RandomHexId())) {
    WriteByteModel(dir_);
    tokenizer_ = *Tokenizer::Load(dir_.string());
  }
  ~OpenAiAnswerTest() override { std::filesystem::remove_all(dir_); }

  std::unique_ptr<OpenAiAnswer> Make(const std::string& more, bool chat = true) {
    const std::string body =
        (chat ? R"({"messages":[{"role":"user","content":"hi"}])" : R"({"prompt":"hi")") + more + "}";
    auto parsed = chat ? ParseChatCompletion(body) : ParseCompletion(body);
    const auto* error = std::get_if<ApiError>(&parsed);
    EXPECT_EQ(error, nullptr) << error->message;
    const auto& request = std::get<InferenceRequest>(parsed);
    auto answer = std::make_unique<OpenAiAnswer>(request, "toy \"1\"", "0123456789abcdef", 1700, *tokenizer_);
    Admission admission;
    admission.id = "abc";
    admission.prompt_ids = {104, 105};
    admission.prompt_text = "hi";
    for (size_t i = 0; i < request.more_prompts.size(); ++i) {
      admission.more.push_back({{static_cast<int32_t>(97 + i)}, std::string(1, static_cast<char>('a' + i))});
    }
    answer->Begin(admission);
    return answer;
  }
  // The JSON of each event; all chunks agree in what stands outside the choices.
  static std::vector<OrderedJson> Chunks(const std::string& stream, bool done = true) {
    std::vector<OrderedJson> chunks;
    size_t at = 0;
    while (at < stream.size()) {
      const size_t end = stream.find("\n\n", at);
      EXPECT_NE(end, std::string::npos);
      const std::string event = stream.substr(at, end - at);
      at = end + 2;
      EXPECT_EQ(event.rfind("data: ", 0), 0u) << event;
      if (event == "data: [DONE]") {
        EXPECT_TRUE(done && at == stream.size());
        return chunks;
      }
      chunks.push_back(OrderedJson::parse(event.substr(6)));
      if (chunks.back().contains("error")) continue;
      EXPECT_EQ(chunks.back()["id"], chunks[0]["id"]);
      EXPECT_EQ(chunks.back()["created"], 1700);
      EXPECT_EQ(chunks.back()["model"], "toy \"1\"");
      EXPECT_EQ(chunks.back()["object"], chunks[0]["object"]);
    }
    EXPECT_FALSE(done);
    return chunks;
  }

  const std::filesystem::path dir_;
  std::shared_ptr<const Tokenizer> tokenizer_;
};

TEST_F(OpenAiAnswerTest, StreamsARoleThenDeltasThenTheReasonThenTheUsage) {
  auto answer = Make(R"(,"stream":true,"stream_options":{"include_usage":true})");
  std::string out;
  answer->First(0, out);
  const MessageDelta pieces[] = {Thought("h\nm"), Text("a\"\\\x01\xc3\xa9")};
  answer->Delta(0, {"", {{1, -1, {}}}}, pieces, {}, out);
  answer->Delta(0, {"", {{2, -1, {}}}}, {}, {}, out);
  answer->Finish(0, Ends("stop"), {}, out);
  answer->End(Done(), out);
  const auto chunks = Chunks(out);
  ASSERT_EQ(chunks.size(), 5u) << "a token whose text is held back is no event";
  EXPECT_EQ(chunks[0]["id"], "chatcmpl-abc");
  EXPECT_EQ(chunks[0]["object"], "chat.completion.chunk");
  EXPECT_EQ(
      DumpJson(chunks[0]["choices"]),
      R"([{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}])");
  EXPECT_EQ(DumpJson(chunks[1]["choices"][0]["delta"]), R"({"reasoning":"h\nm","reasoning_content":"h\nm"})");
  EXPECT_EQ(chunks[2]["choices"][0]["delta"]["content"], "a\"\\\x01\xc3\xa9");
  EXPECT_EQ(chunks[2]["usage"], nullptr);
  EXPECT_EQ(DumpJson(chunks[3]["choices"]),
            R"([{"index":0,"delta":{},"logprobs":null,"finish_reason":"stop","stop_reason":null}])");
  EXPECT_EQ(chunks[4]["choices"], OrderedJson::array());
  EXPECT_EQ(DumpJson(chunks[4]["usage"]),
            R"({"prompt_tokens":10,"completion_tokens":7,"total_tokens":17,"prompt_tokens_details":)"
            R"({"cached_tokens":4},"completion_tokens_details":{"reasoning_tokens":2}})");
}

TEST_F(OpenAiAnswerTest, StreamsCallsByIndexIdAndPieces) {
  auto answer = Make(R"(,"stream":true)");
  std::string out;
  answer->First(0, out);
  const MessageDelta pieces[] = {Call(0, "", "call_1", "add"), Call(0, "{\"a\":"), Call(0, "1}"),
                                 Call(1, "", "call_2", "now")};
  answer->Delta(0, {}, pieces, {}, out);
  answer->Finish(0, Ends("tool_calls"), {}, out);
  answer->End(Done(), out);
  const auto chunks = Chunks(out);
  ASSERT_EQ(chunks.size(), 6u);
  EXPECT_FALSE(chunks[0].contains("usage"));
  EXPECT_EQ(
      DumpJson(chunks[1]["choices"][0]["delta"]),
      R"({"tool_calls":[{"index":0,"id":"call_1","type":"function","function":{"name":"add","arguments":""}}]})");
  EXPECT_EQ(DumpJson(chunks[2]["choices"][0]["delta"]),
            R"({"tool_calls":[{"index":0,"function":{"arguments":"{\"a\":"}}]})");
  EXPECT_EQ(chunks[4]["choices"][0]["delta"]["tool_calls"][0]["index"], 1);
  EXPECT_EQ(chunks[5]["choices"][0]["finish_reason"], "tool_calls");
}

TEST_F(OpenAiAnswerTest, LogprobsComeWithTheFirstPieceOrAlone) {
  auto answer = Make(R"(,"stream":true,"logprobs":true,"top_logprobs":1,"return_token_ids":true)");
  std::string out;
  answer->First(0, out);
  const MessageDelta pieces[] = {Text("h"), Call(0, "", "c", "f")};
  answer->Delta(0, {"h", {{104, -0.5f, {{104, -0.5f}}}}}, pieces, {}, out);
  answer->Delta(0, {"", {{105, -1.5f, {}}}}, {}, {}, out);
  const auto chunks = Chunks(out, /*done=*/false);
  ASSERT_EQ(chunks.size(), 4u);
  EXPECT_EQ(chunks[0]["prompt_token_ids"], OrderedJson::array({104, 105}));
  EXPECT_EQ(DumpJson(chunks[1]["choices"][0]["logprobs"]),
            R"({"content":[{"token":"h","logprob":-0.5,"bytes":[104],"top_logprobs":)"
            R"([{"token":"h","logprob":-0.5,"bytes":[104]}]}],"refusal":null})");
  EXPECT_EQ(chunks[1]["choices"][0]["token_ids"], OrderedJson::array({104}));
  EXPECT_EQ(chunks[2]["choices"][0]["logprobs"]["content"], OrderedJson::array());
  EXPECT_EQ(chunks[3]["choices"][0]["delta"], OrderedJson::object());
  EXPECT_EQ(chunks[3]["choices"][0]["logprobs"]["content"][0]["token"], "i");
}

TEST_F(OpenAiAnswerTest, LogprobsMayNameTokensByTheirIds) {
  auto answer = Make(R"(,"logprobs":true,"top_logprobs":1,"return_tokens_as_token_ids":true)");
  answer->Append(0, OutputDelta{"h", {{104, -0.5f, {{105, -2}}}}}, {});
  answer->Append(0, Ends("stop"));
  const auto whole = OrderedJson::parse(answer->Whole(Done()));
  const auto& token = whole["choices"][0]["logprobs"]["content"][0];
  EXPECT_EQ(token["token"], "token_id:104");
  EXPECT_EQ(token["top_logprobs"][0]["token"], "token_id:105");
}

TEST_F(OpenAiAnswerTest, ContinuousUsageIsInEveryDelta) {
  auto answer =
      Make(R"(,"stream":true,"stream_options":{"include_usage":true,"continuous_usage_stats":true})");
  std::string out;
  const MessageDelta piece = Text("h");
  answer->Delta(0, {}, {&piece, 1}, {10, 1, 4, 0}, out);
  EXPECT_EQ(Chunks(out, false)[0]["usage"]["completion_tokens"], 1);
}

TEST_F(OpenAiAnswerTest, AWholeMessageHasItsCallsAndThoughts) {
  auto answer = Make(R"(,"metadata":{"k":"v"},"service_tier":"auto")");
  const MessageDelta pieces[] = {Thought("hm"), Call(0, "", "c1", "add"), Call(0, "{}"),
                                 Call(1, "", "c2", "now")};
  answer->Append(0, OutputDelta{}, pieces);
  answer->Append(0, Ends("tool_calls"));
  const auto whole = OrderedJson::parse(answer->Whole(Done()));
  EXPECT_EQ(DumpJson(whole["choices"][0]["message"]),
            R"({"role":"assistant","content":null,"refusal":null,"reasoning":"hm","reasoning_content":"hm",)"
            R"("tool_calls":[{"id":"c1","type":"function","function":{"name":"add","arguments":"{}"}},)"
            R"({"id":"c2","type":"function","function":{"name":"now","arguments":""}}]})");
  EXPECT_EQ(whole["choices"][0]["finish_reason"], "tool_calls");
  EXPECT_EQ(whole["metadata"]["k"], "v");
  EXPECT_EQ(whole["service_tier"], "default");
  EXPECT_EQ(whole["object"], "chat.completion");
}

TEST_F(OpenAiAnswerTest, ARestartedChoiceBeginsAnew) {
  auto answer = Make("");
  const MessageDelta lost = Text("lost"), kept = Text("kept");
  answer->Append(0, OutputDelta{}, {&lost, 1});
  answer->Clear(0);
  answer->Append(0, OutputDelta{}, {&kept, 1});
  answer->Append(0, Ends("stop"));
  EXPECT_EQ(OrderedJson::parse(answer->Whole(Done()))["choices"][0]["message"]["content"], "kept");
}

TEST_F(OpenAiAnswerTest, AnErrorInAStreamHasNoDone) {
  auto answer = Make(R"(,"stream":true)");
  std::string out;
  answer->First(0, out);
  answer->Error(MakeError(errors::kUnavailable, "gone"), out);
  const auto chunks = Chunks(out, /*done=*/false);
  EXPECT_EQ(chunks[1]["error"]["code"], "no_worker");
}

TEST_F(OpenAiAnswerTest, EachOfSeveralPromptsIsEchoedWithItsChoices) {
  const std::string two = R"(,"echo":true,"n":2,"return_token_ids":true)";
  auto parsed = ParseCompletion(R"({"prompt":["hi","a"])" + two + "}");
  ASSERT_TRUE(std::holds_alternative<InferenceRequest>(parsed));
  const auto& request = std::get<InferenceRequest>(parsed);
  OpenAiAnswer answer(request, "toy", "0123456789abcdef", 1700, *tokenizer_);
  Admission admission;
  admission.id = "abc";
  admission.prompt_ids = {104, 105};
  admission.prompt_text = "hi";
  admission.more = {{{97}, ""}};  // given as ids
  answer.Begin(admission);
  for (uint32_t i = 0; i < 4; ++i) {
    answer.Append(i, OutputDelta{std::to_string(i), {{48, -1, {}}}}, {});
    answer.Append(i, Ends("stop"));
  }
  const auto whole = OrderedJson::parse(answer.Whole(Done()));
  ASSERT_EQ(whole["choices"].size(), 4u);
  EXPECT_EQ(whole["choices"][1]["text"], "hi1");
  EXPECT_EQ(whole["choices"][2]["text"], tokenizer_->Decode(std::vector<int32_t>{97}, true) + "2");
  EXPECT_EQ(whole["choices"][3]["prompt_token_ids"], OrderedJson::array({97}));
  EXPECT_EQ(whole["choices"][3]["index"], 3);
}

TEST_F(OpenAiAnswerTest, AppendedStringsAreJson) {
  std::string all;
  for (int c = 0; c < 128; ++c) all += static_cast<char>(c);
  all += "\xf0\x9f\x98\x80";
  std::string out;
  AppendJsonString(all, out);
  EXPECT_EQ(OrderedJson::parse(out), all);
}

}  // namespace
}  // namespace tidepool
