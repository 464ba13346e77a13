#include "server/gateway/openai_request.h"

#include <gtest/gtest.h>

namespace tidepool {
namespace {

std::string Chat(const std::string& more) {
  return R"({"messages":[{"role":"user","content":"hi"}])" + (more.empty() ? "" : "," + more) + "}";
}
std::string Text(const std::string& more) {
  return R"({"prompt":"hi")" + (more.empty() ? "" : "," + more) + "}";
}

InferenceRequest Good(OrError<InferenceRequest> parsed) {
  if (const auto* error = std::get_if<ApiError>(&parsed)) {
    ADD_FAILURE() << error->message;
    return {};
  }
  return std::get<InferenceRequest>(std::move(parsed));
}

struct BadField {
  const char* json;
  const char* param;
};

class EveryEndpointRefuses : public ::testing::TestWithParam<BadField> {};

TEST_P(EveryEndpointRefuses, AndNamesTheField) {
  for (const auto& parsed :
       {ParseChatCompletion(Chat(GetParam().json)), ParseCompletion(Text(GetParam().json))}) {
    const auto* error = std::get_if<ApiError>(&parsed);
    ASSERT_NE(error, nullptr) << GetParam().json;
    EXPECT_EQ(error->status, 400);
    EXPECT_EQ(error->param, GetParam().param) << error->message;
    EXPECT_NE(error->message.find(GetParam().param), std::string::npos) << error->message;
  }
}

INSTANTIATE_TEST_SUITE_P(
    Fields, EveryEndpointRefuses,
    ::testing::Values(
        BadField{R"("model":1)", "model"}, BadField{R"("max_tokens":0)", "max_tokens"},
        BadField{R"("max_tokens":-1)", "max_tokens"}, BadField{R"("max_tokens":1e30)", "max_tokens"},
        BadField{R"("max_tokens":1.5)", "max_tokens"}, BadField{R"("max_tokens":"5")", "max_tokens"},
        BadField{R"("max_tokens":18446744073709551615)", "max_tokens"},
        BadField{R"("max_completion_tokens":0)", "max_completion_tokens"},
        BadField{R"("min_tokens":-1)", "min_tokens"},
        BadField{R"("max_tokens":2,"min_tokens":3)", "min_tokens"},
        BadField{R"("temperature":2.1)", "temperature"}, BadField{R"("temperature":-0.1)", "temperature"},
        BadField{R"("temperature":"1")", "temperature"}, BadField{R"("temperature":true)", "temperature"},
        BadField{R"("top_p":0)", "top_p"}, BadField{R"("top_p":1e-300)", "top_p"},
        BadField{R"("top_p":1.1)", "top_p"}, BadField{R"("min_p":1.1)", "min_p"},
        BadField{R"("top_k":-2)", "top_k"}, BadField{R"("top_k":1e18)", "top_k"},
        BadField{R"("seed":1.5)", "seed"}, BadField{R"("seed":"7")", "seed"}, BadField{R"("stop":7)", "stop"},
        BadField{R"("stop":["a","b","c","d","e"])", "stop"}, BadField{R"("stop":[""])", "stop"},
        BadField{R"("stop":[1])", "stop"}, BadField{R"("stop_token_ids":[-1])", "stop_token_ids"},
        BadField{R"("stop_token_ids":[2147483648])", "stop_token_ids"},
        BadField{R"("stop_token_ids":7)", "stop_token_ids"}, BadField{R"("stream":"yes")", "stream"},
        BadField{R"("stream_options":{"include_usage":true})", "stream_options"},
        BadField{R"("stream":true,"stream_options":{"include_usage":1})", "stream_options.include_usage"},
        BadField{R"("ignore_eos":1)", "ignore_eos"}, BadField{R"("return_trace":"x")", "return_trace"},
        BadField{R"("priority":5000)", "priority"}, BadField{R"("cache_salt":"")", "cache_salt"},
        BadField{R"("cache_salt":5)", "cache_salt"}, BadField{R"("user":{})", "user"},
        BadField{R"("metadata":[])", "metadata"}, BadField{R"("n":0)", "n"}, BadField{R"("n":17)", "n"},
        BadField{R"("n":1.5)", "n"}, BadField{R"("n":1e30)", "n"}, BadField{R"("n":true)", "n"},
        BadField{R"("best_of":0)", "best_of"}, BadField{R"("best_of":17)", "best_of"},
        BadField{R"("n":3,"best_of":2)", "best_of"},
        BadField{R"("n":1,"best_of":2,"stream":true)", "best_of"},
        BadField{R"("logit_bias":[])", "logit_bias"}, BadField{R"("logit_bias":{"5":101})", "logit_bias"},
        BadField{R"("logit_bias":{"5":-100.5})", "logit_bias"},
        BadField{R"("logit_bias":{"5":"1"})", "logit_bias"},
        BadField{R"("logit_bias":{"-5":1})", "logit_bias"},
        BadField{R"("logit_bias":{"five":1})", "logit_bias"},
        BadField{R"("logit_bias":{"":1})", "logit_bias"}, BadField{R"("logit_bias":{" 5":1})", "logit_bias"},
        BadField{R"("logit_bias":{"05":1})", "logit_bias"},
        BadField{R"("logit_bias":{"99999999999":1})", "logit_bias"},
        BadField{R"("presence_penalty":2.5)", "presence_penalty"},
        BadField{R"("presence_penalty":"1")", "presence_penalty"},
        BadField{R"("frequency_penalty":-2.01)", "frequency_penalty"},
        BadField{R"("repetition_penalty":0)", "repetition_penalty"},
        BadField{R"("repetition_penalty":-1)", "repetition_penalty"},
        BadField{R"("repetition_penalty":1e-300)", "repetition_penalty"},
        BadField{R"("repetition_penalty":101)", "repetition_penalty"},
        BadField{R"("typical_p":0)", "typical_p"}, BadField{R"("typical_p":1.01)", "typical_p"},
        BadField{R"("bad_words":"x")", "bad_words"}, BadField{R"("bad_words":[""])", "bad_words"},
        BadField{R"("bad_words":[5])", "bad_words"},
        BadField{R"("allowed_token_ids":[])", "allowed_token_ids"},
        BadField{R"("allowed_token_ids":[-1])", "allowed_token_ids"},
        BadField{R"("allowed_token_ids":7)", "allowed_token_ids"},
        BadField{R"("prompt_logprobs":21)", "prompt_logprobs"},
        BadField{R"("prompt_logprobs":-1)", "prompt_logprobs"},
        BadField{R"("prompt_logprobs":1,"stream":true)", "prompt_logprobs"},
        BadField{R"("use_beam_search":true)", "use_beam_search"},
        BadField{R"("tools":[{"type":"function"}])", "tools"},
        BadField{R"("tool_choice":"auto")", "tool_choice"},
        BadField{R"("response_format":{"type":"json_object"})", "response_format"},
        BadField{R"("response_format":"text")", "response_format"},
        BadField{R"("guided_json":{"type":"object"})", "guided_json"},
        BadField{R"("modalities":["text","audio"])", "modalities"}, BadField{R"("store":true)", "store"}));

TEST(OpenAiRequestTest, LongCacheSaltsAreRefused) {
  const std::string salt(1025, 's');
  EXPECT_EQ(std::get<ApiError>(ParseCompletion(Text("\"cache_salt\":\"" + salt + "\""))).param, "cache_salt");
  EXPECT_EQ(Good(ParseCompletion(Text("\"cache_salt\":\"" + salt.substr(1) + "\""))).cache_salt.size(),
            1024u);
}

TEST(OpenAiRequestTest, ValuesThatAskForNothingPass) {
  const char* nothing =
      R"("n":1,"best_of":null,"logit_bias":{},"presence_penalty":0,"frequency_penalty":0.0,"tools":[],)"
      R"("tool_choice":"none","response_format":{"type":"text"},"user":"u","metadata":{"a":"b"},"stop":null,)"
      R"("suffix":"","repetition_penalty":1.0,"store":false,"some_future_field":{"deep":[1]},"request_id":"r")";
  Good(ParseChatCompletion(Chat(nothing)));
  Good(ParseCompletion(Text(nothing)));
}

TEST(OpenAiRequestTest, ReadsEveryField) {
  const InferenceRequest r = Good(ParseChatCompletion(Chat(
      R"("model":"m","max_tokens":5,"max_completion_tokens":7,"min_tokens":2,"temperature":0.5,"top_p":0.25,)"
      R"("top_k":-1,"min_p":0.125,"seed":-1,"stop":"x","stop_token_ids":[3,4],"ignore_eos":true,)"
      R"("include_stop_str_in_output":true,"skip_special_tokens":false,"stream":true,)"
      R"("stream_options":{"include_usage":true,"continuous_usage_stats":true},"logprobs":true,"top_logprobs":3,)"
      R"("return_token_ids":true,"return_trace":true,"priority":-2,"cache_salt":"s","add_special_tokens":true,)"
      R"("chat_template_kwargs":{"enable_thinking":false})")));
  EXPECT_EQ(r.model, "m");
  EXPECT_EQ(r.max_tokens, 7u);
  EXPECT_EQ(r.min_tokens, 2u);
  EXPECT_EQ(r.temperature, 0.5f);
  EXPECT_EQ(r.top_p, 0.25f);
  EXPECT_EQ(r.top_k, 0) << "-1 asks for all, whatever the model's default";
  EXPECT_EQ(r.min_p, 0.125f);
  EXPECT_EQ(r.seed, ~uint64_t{0});
  EXPECT_EQ(r.stop, std::vector<std::string>{"x"});
  EXPECT_EQ(r.stop_token_ids, (std::vector<int32_t>{3, 4}));
  EXPECT_TRUE(r.ignore_eos && r.include_stop_str_in_output && r.stream && r.include_usage &&
              r.continuous_usage_stats && r.return_token_ids && r.return_trace);
  EXPECT_FALSE(r.skip_special_tokens);
  EXPECT_EQ(r.top_logprobs, 3);
  EXPECT_EQ(r.priority, -2);
  EXPECT_EQ(r.add_special_tokens, true);
  EXPECT_EQ(std::get<ChatInput>(r.input).template_kwargs["enable_thinking"], false);
}

TEST(OpenAiRequestTest, ReadsWhatDecidesTheDraw) {
  const InferenceRequest r = Good(ParseCompletion(
      Text(R"("n":2,"best_of":5,"typical_p":0.5,"repetition_penalty":1.5,"presence_penalty":-2,)"
           R"("frequency_penalty":2,"logit_bias":{"7":-100,"0":0.5},"bad_words":["no"," way"],)"
           R"("allowed_token_ids":[3,1],"prompt_logprobs":4,"logprobs":2,"echo":true)")));
  EXPECT_EQ(r.n, 2u);
  EXPECT_EQ(r.best_of, 5u);
  EXPECT_EQ(r.typical_p, 0.5f);
  EXPECT_EQ(r.repetition_penalty, 1.5f);
  EXPECT_EQ(r.presence_penalty, -2.0f);
  EXPECT_EQ(r.frequency_penalty, 2.0f);
  EXPECT_EQ(r.logit_bias, (std::vector<std::pair<int32_t, float>>{{7, -100.0f}, {0, 0.5f}}));
  EXPECT_EQ(r.bad_words, (std::vector<std::string>{"no", " way"}));
  EXPECT_EQ(r.allowed_token_ids, (std::vector<int32_t>{3, 1}));
  EXPECT_EQ(r.prompt_logprobs, 4);
  EXPECT_EQ(r.scored(), 4);
  EXPECT_EQ(Good(ParseCompletion(Text(R"("logprobs":2,"echo":true)"))).scored(), 2);
  EXPECT_EQ(Good(ParseCompletion(Text(R"("logprobs":2)"))).scored(), -1);
}

TEST(OpenAiRequestTest, WhatIsLeftOutIsKnownToBe) {
  const InferenceRequest r = Good(ParseChatCompletion(Chat(R"("temperature":null)")));
  EXPECT_FALSE(r.temperature || r.top_p || r.top_k || r.min_p || r.repetition_penalty || r.max_tokens);
  EXPECT_EQ(r.n, 1u);
  EXPECT_EQ(r.best_of, 1u);
}

TEST(OpenAiRequestTest, NoTokensButTheEchoedPrompt) {
  const InferenceRequest r = Good(ParseCompletion(Text(R"("max_tokens":0,"echo":true,"logprobs":1)")));
  EXPECT_TRUE(r.prompt_only);
  EXPECT_EQ(r.max_tokens, 1u);
  EXPECT_EQ(std::get<ApiError>(ParseCompletion(Text(R"("max_tokens":0)"))).param, "max_tokens");
  EXPECT_EQ(std::get<ApiError>(ParseCompletion(Text(R"("max_tokens":0,"echo":true,"n":2)"))).param, "n");
}

TEST(OpenAiRequestTest, BestOfIsForCompletions) {
  EXPECT_EQ(std::get<ApiError>(ParseChatCompletion(Chat(R"("best_of":2)"))).param, "best_of");
  EXPECT_EQ(Good(ParseChatCompletion(Chat(R"("n":2,"best_of":2)"))).n, 2u);
}

TEST(OpenAiRequestTest, PromptsComeInThreeShapes) {
  EXPECT_EQ(std::get<std::string>(Good(ParseCompletion(R"({"prompt":["abc"]})")).input), "abc");
  const std::vector<int32_t> ids = {1, 2};
  EXPECT_EQ(std::get<std::vector<int32_t>>(Good(ParseCompletion(R"({"prompt":[1,2]})")).input), ids);
  EXPECT_EQ(std::get<std::vector<int32_t>>(Good(ParseCompletion(R"({"prompt":[[1,2]]})")).input), ids);
  EXPECT_EQ(std::get<std::string>(Good(ParseCompletion(R"({"prompt":""})")).input), "") << "a BOS may follow";
  EXPECT_EQ(Good(ParseCompletion(R"({"prompt":"a"})")).max_tokens, kCompletionTokensDefault);
  for (const char* bad : {R"({})", R"({"prompt":null})", R"({"prompt":[]})", R"({"prompt":[[]]})",
                          R"({"prompt":["a","b"]})", R"({"prompt":[1,"a"]})", R"({"prompt":[-1]})",
                          R"({"prompt":[1.5]})", R"({"prompt":{}})", R"({"prompt":[[1],[2]]})"}) {
    const auto parsed = ParseCompletion(bad);
    const auto* error = std::get_if<ApiError>(&parsed);
    ASSERT_NE(error, nullptr) << bad;
    EXPECT_EQ(error->param, "prompt") << bad;
  }
}

TEST(OpenAiRequestTest, MessagesAreFlattenedAndChecked) {
  const InferenceRequest r = Good(ParseChatCompletion(
      R"({"messages":[{"role":"developer","content":"be brief"},)"
      R"({"role":"user","content":[{"type":"text","text":"a"},{"type":"text","text":"b"}]}]})"));
  const auto& messages = std::get<ChatInput>(r.input).messages;
  EXPECT_EQ(messages[0]["role"], "system");
  EXPECT_EQ(messages[1]["content"], "a\nb");
  const BadField cases[] = {
      {R"({"messages":[]})", "messages"},
      {R"({})", "messages"},
      {R"({"messages":[5]})", "messages[0]"},
      {R"({"messages":[{"content":"a"}]})", "messages[0].role"},
      {R"({"messages":[{"role":"alien","content":"a"}]})", "messages[0].role"},
      {R"({"messages":[{"role":"user"}]})", "messages[0].content"},
      {R"({"messages":[{"role":"user","content":5}]})", "messages[0].content"},
      {R"({"messages":[{"role":"user","content":[{"type":"image_url","image_url":{}}]}]})",
       "messages[0].content"},
      {R"({"messages":[{"role":"assistant","content":"","tool_calls":[{}]}]})", "messages[0].tool_calls"},
      {R"({"messages":[{"role":"user","content":"a"}],"logprobs":3})", "logprobs"},
      {R"({"messages":[{"role":"user","content":"a"}],"top_logprobs":3})", "top_logprobs"},
      {R"({"messages":[{"role":"user","content":"a"}],"logprobs":true,"top_logprobs":21})", "top_logprobs"},
      {R"({"messages":[{"role":"user","content":"a"}],"echo":true})", "echo"},
      {R"({"messages":[{"role":"user","content":"a"}],"continue_final_message":true})",
       "continue_final_message"},
      {R"({"messages":[{"role":"user","content":"a"}],"chat_template_kwargs":{"messages":"x"}})",
       "chat_template_kwargs"},
      {R"({"messages":[{"role":"user","content":"a"}],"chat_template_kwargs":{"a":[1]}})",
       "chat_template_kwargs"},
  };
  for (const BadField& bad : cases) {
    const auto parsed = ParseChatCompletion(bad.json);
    const auto* error = std::get_if<ApiError>(&parsed);
    ASSERT_NE(error, nullptr) << bad.json;
    EXPECT_EQ(error->param, bad.param) << error->message;
  }
}

TEST(OpenAiRequestTest, BodiesThatAreNoObjectAreInvalidJson) {
  for (const char* bad :
       {"", "[]", "null", "\"x\"", "{", R"({"prompt":"a","prompt":"b"})", "{\"prompt\":\"\xff\"}"}) {
    const auto parsed = ParseCompletion(bad);
    const auto* error = std::get_if<ApiError>(&parsed);
    ASSERT_NE(error, nullptr) << bad;
    EXPECT_EQ(error->code, "invalid_json") << bad;
  }
}

TEST(OpenAiRequestTest, TokenizeTakesEitherPromptOrMessages) {
  EXPECT_TRUE(std::holds_alternative<TokenizeRequest>(ParseTokenize(R"({"prompt":""})")));
  EXPECT_TRUE(std::holds_alternative<ApiError>(ParseTokenize(R"({})")));
  EXPECT_TRUE(std::holds_alternative<ApiError>(
      ParseTokenize(R"({"prompt":"a","messages":[{"role":"user","content":"a"}]})")));
  EXPECT_FALSE(std::get<TokenizeRequest>(ParseTokenize(R"({"messages":[{"role":"user","content":"a"}]})"))
                   .add_special_tokens);
  EXPECT_EQ(std::get<ApiError>(ParseDetokenize(R"({"tokens":["a"]})")).param, "tokens");
}

}  // namespace
}  // namespace tidepool
