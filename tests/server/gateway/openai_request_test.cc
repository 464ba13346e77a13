#include "server/gateway/openai_request.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <fstream>
#include <functional>

#include "server/gateway/openai_fields.h"

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
        BadField{R"("tool_choice":"auto")", "tool_choice"},
        BadField{R"("response_format":"text")", "response_format"},
        BadField{R"("response_format":{"type":"xml"})", "response_format.type"},
        BadField{R"("response_format":{"type":"json_schema"})", "response_format.json_schema"},
        BadField{R"("response_format":{"type":"json_schema","json_schema":{"name":"n"}})",
                 "response_format.json_schema.schema"},
        BadField{R"("response_format":{"type":"json_schema","json_schema":{"schema":[]}})",
                 "response_format.json_schema.schema"},
        BadField{R"("response_format":{"type":"json_schema","json_schema":{"schema":{},"strict":"yes"}})",
                 "response_format.json_schema.strict"},
        BadField{R"("guided_json":7)", "guided_json"}, BadField{R"("guided_json":"{")", "guided_json"},
        BadField{R"("guided_regex":7)", "guided_regex"},
        BadField{R"("guided_choice":["a",1])", "guided_choice"},
        BadField{R"("guided_grammar":["a"])", "guided_grammar"}, BadField{R"("grammar":7)", "grammar"},
        BadField{R"("json_schema":[1])", "json_schema"}, BadField{R"("regex":7)", "regex"},
        BadField{R"("ebnf":7)", "ebnf"}, BadField{R"("structured_outputs":{})", "structured_outputs"},
        BadField{R"("structured_outputs":{"regex":""})", "structured_outputs.regex"},
        BadField{R"("structured_outputs":{"choice":[]})", "structured_outputs.choice"},
        BadField{R"("structured_outputs":{"json":{},"regex":"a"})", "structured_outputs.regex"},
        BadField{R"("structured_outputs":{"structural_tag":"x"})", "structured_outputs.structural_tag"},
        BadField{R"("structured_outputs":{"whitespace_pattern":" "})",
                 "structured_outputs.whitespace_pattern"},
        BadField{R"("guided_regex":"a","response_format":{"type":"json_object"})", "guided_regex"},
        BadField{R"("regex":"a","structured_outputs":{"regex":"a"})", "regex"},
        BadField{R"("truncate_prompt_tokens":0)", "truncate_prompt_tokens"},
        BadField{R"("truncate_prompt_tokens":-2)", "truncate_prompt_tokens"},
        BadField{R"("metadata":[])", "metadata"}, BadField{R"("metadata":{"a":1})", "metadata"},
        BadField{R"("service_tier":"flex")", "service_tier"}, BadField{R"("request_id":"a b")", "request_id"},
        BadField{R"("request_id":"")", "request_id"}, BadField{R"("user":7)", "user"},
        BadField{R"("safety_identifier":7)", "safety_identifier"},
        BadField{R"("stream":true,"stream_options":{"include_obfuscation":true})",
                 "stream_options.include_obfuscation"},
        BadField{R"("stop_regex":"a+")", "stop_regex"},
        BadField{R"("logprob_token_ids":[1])", "logprob_token_ids"}, BadField{R"("n_probs":3)", "n_probs"},
        BadField{R"("cache_prompt":false)", "cache_prompt"},
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
                          R"({"prompt":["a",1]})", R"({"prompt":[1,"a"]})", R"({"prompt":[-1]})",
                          R"({"prompt":[1.5]})", R"({"prompt":{}})", R"({"prompt":[[1],[]]})"}) {
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
       "messages[0].content[0].type"},
      {R"({"messages":[{"role":"assistant","content":"","tool_calls":[{}]}]})",
       "messages[0].tool_calls[0].id"},
      {R"({"messages":[{"role":"assistant","content":"","function_call":{"name":"f"}}]})",
       "messages[0].function_call"},
      {R"({"messages":[{"role":"assistant","refusal":"no","content":""}]})", "messages[0].refusal"},
      {R"({"messages":[{"role":"tool","content":"4"}]})", "messages[0].tool_call_id"},
      {R"({"messages":[{"role":"user","content":"4","tool_calls":[{"id":"a"}]}]})", "messages[0].tool_calls"},
      {R"({"messages":[{"role":"assistant"}]})", "messages[0].content"},
      {R"({"messages":[{"role":"function","name":"f","content":"4"}]})", "messages[0].role"},
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

TEST(OpenAiRequestTest, SeveralPromptsAreSixteenChoicesAtMost) {
  const InferenceRequest r = Good(ParseCompletion(R"({"prompt":["a",[1,2],"c"],"n":2})"));
  EXPECT_EQ(std::get<std::string>(r.input), "a");
  ASSERT_EQ(r.more_prompts.size(), 2u);
  EXPECT_EQ(std::get<std::vector<int32_t>>(r.more_prompts[0]), (std::vector<int32_t>{1, 2}));
  EXPECT_EQ(r.choices(), 6u);
  EXPECT_EQ(std::get<ApiError>(ParseCompletion(R"({"prompt":["a","b","c"],"n":6})")).param, "n");
  EXPECT_EQ(std::get<ApiError>(ParseCompletion(R"({"prompt":["a","b","c"],"best_of":6})")).param, "best_of");
  std::string many = "{\"prompt\":[\"a\"";
  for (int i = 0; i < 16; ++i) many += ",\"a\"";
  EXPECT_EQ(std::get<ApiError>(ParseCompletion(many + "]}")).param, "prompt");
}

constexpr const char* kAdd =
    R"({"type":"function","function":{"name":"add","description":"adds","strict":true,"parameters":)"
    R"({"type":"object","properties":{"a":{"type":"number"}}}}})";
constexpr const char* kNow = R"({"type":"function","function":{"name":"now"}})";

std::string Tools(const std::string& more) {
  return Chat(R"("tools":[)" + std::string(kAdd) + "," + kNow + "]" + (more.empty() ? "" : "," + more));
}

TEST(OpenAiRequestTest, ReadsTools) {
  const InferenceRequest r = Good(ParseChatCompletion(Tools("")));
  EXPECT_EQ(r.tools.choice, ToolChoice::kAuto);
  EXPECT_TRUE(r.tools.parallel);
  ASSERT_EQ(r.tools.tools.size(), 2u);
  EXPECT_EQ(r.tools.tools[0].name, "add");
  EXPECT_EQ(r.tools.tools[0].description, "adds");
  EXPECT_TRUE(r.tools.tools[0].strict);
  EXPECT_EQ(r.tools.tools[0].parameters["type"], "object");
  EXPECT_EQ(r.tools.tools[1].parameters, nullptr);
  const auto& shown = std::get<ChatInput>(r.input).tools;
  ASSERT_EQ(shown.size(), 2u);
  EXPECT_EQ(DumpJson(shown[0]),
            R"({"type":"function","function":{"name":"add","description":"adds","parameters":)"
            R"({"type":"object","properties":{"a":{"type":"number"}}}}})");
}

TEST(OpenAiRequestTest, ToolChoiceDecidesWhatIsCalledAndShown) {
  const auto choice = [](const std::string& json) {
    return Good(ParseChatCompletion(Tools("\"tool_choice\":" + json)));
  };
  EXPECT_EQ(choice("\"auto\"").tools.choice, ToolChoice::kAuto);
  EXPECT_EQ(choice("\"required\"").tools.choice, ToolChoice::kRequired);
  const InferenceRequest none = choice("\"none\"");
  EXPECT_FALSE(none.tools.active());
  EXPECT_EQ(std::get<ChatInput>(none.input).tools, nullptr);
  const InferenceRequest named = choice(R"({"type":"function","function":{"name":"now"}})");
  EXPECT_EQ(named.tools.choice, ToolChoice::kNamed);
  ASSERT_EQ(named.tools.tools.size(), 1u);
  EXPECT_EQ(named.tools.tools[0].name, "now");
  EXPECT_EQ(std::get<ChatInput>(named.input).tools.size(), 2u);
  const InferenceRequest allowed =
      choice(R"({"type":"allowed_tools","allowed_tools":{"mode":"required","tools":)"
             R"([{"type":"function","function":{"name":"now"}}]}})");
  EXPECT_EQ(allowed.tools.choice, ToolChoice::kRequired);
  ASSERT_EQ(allowed.tools.tools.size(), 1u);
  EXPECT_EQ(std::get<ChatInput>(allowed.input).tools.size(), 1u);
  EXPECT_FALSE(Good(ParseChatCompletion(Tools(R"("parallel_tool_calls":false)"))).tools.parallel);
}

TEST(OpenAiRequestTest, BadToolsAreRefusedByTheirPlace) {
  std::string list;
  for (int i = 0; i < 129; ++i) {
    list += (i > 0 ? "," : "") + std::string(R"({"type":"function","function":{"name":"f)") +
            std::to_string(i) + "\"}}";
  }
  const std::pair<std::string, const char*> cases[] = {
      {R"("tools":{})", "tools"},
      {"\"tools\":[" + list + "]", "tools"},
      {R"("tools":[5])", "tools[0]"},
      {R"("tools":[{"type":"custom","custom":{"name":"f"}}])", "tools[0].type"},
      {R"("tools":[{"type":"function"}])", "tools[0].function"},
      {R"("tools":[{"type":"function","function":{"name":""}}])", "tools[0].function.name"},
      {R"("tools":[{"type":"function","function":{"name":"a b"}}])", "tools[0].function.name"},
      {"\"tools\":[" + std::string(kNow) + "," + kNow + "]", "tools[1].function.name"},
      {R"("tools":[{"type":"function","function":{"name":"f","parameters":[]}}])",
       "tools[0].function.parameters"},
      {R"("tools":[{"type":"function","function":{"name":"f","parameters":{"type":"string"}}}])",
       "tools[0].function.parameters"},
      {R"("tools":[{"type":"function","function":{"name":"f","strict":1}}])", "tools[0].function.strict"},
      {R"("tools":[{"type":"function","function":{"name":"f","description":1}}])",
       "tools[0].function.description"},
      {R"("tool_choice":"required")", "tool_choice"},
      {"\"tool_choice\":\"maybe\",\"tools\":[" + std::string(kNow) + "]", "tool_choice"},
      {"\"tool_choice\":{\"type\":7},\"tools\":[" + std::string(kNow) + "]", "tool_choice"},
      {R"("tool_choice":{"type":"function","function":{"name":"g"}},"tools":[)" + std::string(kNow) + "]",
       "tool_choice"},
      {"\"parallel_tool_calls\":1,\"tools\":[" + std::string(kNow) + "]", "parallel_tool_calls"},
      {R"("functions":[{"name":"f"}])", "functions"},
      {R"("function_call":"auto")", "function_call"},
  };
  for (const auto& [json, param] : cases) {
    const auto parsed = ParseChatCompletion(Chat(json));
    const auto* error = std::get_if<ApiError>(&parsed);
    ASSERT_NE(error, nullptr) << json;
    EXPECT_EQ(error->status, 400);
    EXPECT_EQ(error->param, param) << error->message;
  }
  EXPECT_EQ(std::get<ApiError>(ParseCompletion(Text("\"tools\":[" + std::string(kNow) + "]"))).param,
            "tools");
}

TEST(OpenAiRequestTest, CallsAndTheirResultsGoToTheTemplateAsItExpectsThem) {
  const InferenceRequest r = Good(ParseChatCompletion(
      R"({"messages":[{"role":"user","content":"2+2?"},{"role":"assistant","content":null,"refusal":null,)"
      R"("function_call":null,"audio":null,"reasoning":"add","tool_calls":[{"id":"c1","type":"function",)"
      R"("function":{"name":"add","arguments":"{\"b\": 2, \"a\": [2]}"}},)"
      R"({"id":"c2","function":{"name":"now","arguments":""}}]},)"
      R"({"role":"tool","tool_call_id":"c1","content":[{"type":"text","text":"4"}]}]})"));
  const auto& messages = std::get<ChatInput>(r.input).messages;
  EXPECT_EQ(messages[1]["content"], nullptr);
  EXPECT_EQ(messages[1]["reasoning_content"], "add");
  EXPECT_EQ(DumpJson(messages[1]["tool_calls"][0]["function"]["arguments"]), R"({"b":2,"a":[2]})");
  EXPECT_EQ(messages[1]["tool_calls"][1]["function"]["arguments"], OrderedJson::object());
  EXPECT_EQ(messages[2]["content"], "4");
  EXPECT_EQ(messages[2]["tool_call_id"], "c1");
  for (const char* arguments : {"\"{\"", "\"[1]\"", "7"}) {
    const auto bad = ParseChatCompletion(
        R"({"messages":[{"role":"assistant","tool_calls":[{"id":"c","function":{"name":"f","arguments":)" +
        std::string(arguments) + "}}]}]}");
    ASSERT_TRUE(std::holds_alternative<ApiError>(bad)) << arguments;
    EXPECT_EQ(std::get<ApiError>(bad).param, "messages[0].tool_calls[0].function.arguments");
  }
}

TEST(OpenAiRequestTest, ReadsStructuredOutputsInAllTheirWords) {
  using Kind = StructuredSpec::Kind;
  struct Word {
    const char* json;
    Kind kind;
    const char* field;
  };
  for (
      const Word& word :
      {Word{R"("response_format":{"type":"json_object"})", Kind::kJsonObject, "response_format"},
       Word{R"("response_format":{"type":"json_object","schema":{"type":"object"}})", Kind::kJsonSchema,
            "response_format.schema"},
       Word{
           R"("response_format":{"type":"json_schema","json_schema":{"name":"n","strict":true,"schema":{}}})",
           Kind::kJsonSchema, "response_format.json_schema.schema"},
       Word{R"("structured_outputs":{"json":{"type":"object"}})", Kind::kJsonSchema,
            "structured_outputs.json"},
       Word{R"("structured_outputs":{"json":"{}"})", Kind::kJsonSchema, "structured_outputs.json"},
       Word{R"("structured_outputs":{"regex":"a+"})", Kind::kRegex, "structured_outputs.regex"},
       Word{R"("structured_outputs":{"choice":["a","b"]})", Kind::kChoice, "structured_outputs.choice"},
       Word{R"("structured_outputs":{"grammar":"root ::= \"a\""})", Kind::kGrammar,
            "structured_outputs.grammar"},
       Word{R"("structured_outputs":{"json_object":true})", Kind::kJsonObject,
            "structured_outputs.json_object"},
       Word{R"("guided_json":{"type":"object"})", Kind::kJsonSchema, "guided_json"},
       Word{R"("guided_regex":"a+")", Kind::kRegex, "guided_regex"},
       Word{R"("guided_choice":["a"])", Kind::kChoice, "guided_choice"},
       Word{R"("guided_grammar":"root ::= \"a\"")", Kind::kGrammar, "guided_grammar"},
       Word{R"("grammar":"root ::= \"a\"")", Kind::kGrammar, "grammar"},
       Word{R"("json_schema":{"type":"object"})", Kind::kJsonSchema, "json_schema"},
       Word{R"("regex":"a+")", Kind::kRegex, "regex"},
       Word{R"("ebnf":"root ::= \"a\"")", Kind::kGrammar, "ebnf"}}) {
    for (const auto& r :
         {Good(ParseChatCompletion(Chat(word.json))), Good(ParseCompletion(Text(word.json)))}) {
      ASSERT_TRUE(r.structured.has_value()) << word.json;
      EXPECT_EQ(r.structured->kind, word.kind) << word.json;
      EXPECT_EQ(r.structured->field, word.field);
    }
  }
  EXPECT_FALSE(Good(ParseCompletion(Text(R"("response_format":{"type":"text"},"grammar":"")"))).structured);
  EXPECT_TRUE(Good(ParseCompletion(Text(R"("structured_outputs":{"json":{},"disable_any_whitespace":true})")))
                  .structured->compact);
}

TEST(OpenAiRequestTest, ReasoningOptionsReachTheTemplate) {
  const InferenceRequest r = Good(ParseChatCompletion(Chat(
      R"("reasoning_effort":"none","include_reasoning":false,"chat_template_kwargs":{"thinking":true})")));
  const auto& kwargs = std::get<ChatInput>(r.input).template_kwargs;
  EXPECT_EQ(kwargs["reasoning_effort"], "none");
  EXPECT_EQ(kwargs["enable_thinking"], false);
  EXPECT_EQ(kwargs["thinking"], true) << "the client's own word counts";
  EXPECT_FALSE(r.reasoning.include);
  EXPECT_EQ(std::get<ApiError>(ParseChatCompletion(Chat(R"("reasoning_effort":"huge")"))).param,
            "reasoning_effort");
}

TEST(OpenAiRequestTest, MetadataHasOpenAisLimits) {
  const auto metadata = [](const std::string& json) { return ParseCompletion(Text("\"metadata\":" + json)); };
  EXPECT_EQ(Good(metadata(R"({"a":"b"})")).metadata[0].second, "b");
  std::string seventeen = "{";
  for (int i = 0; i < 17; ++i) seventeen += (i > 0 ? ",\"" : "\"") + std::to_string(i) + "\":\"\"";
  for (const std::string& bad : {seventeen + "}", "{\"" + std::string(65, 'k') + "\":\"\"}",
                                 "{\"k\":\"" + std::string(513, 'v') + "\"}"}) {
    EXPECT_EQ(std::get<ApiError>(metadata(bad)).param, "metadata");
  }
}

// Each field of OpenAI's own description of its API is served, taken, or refused by its name: none is
// unknown.
TEST(OpenAiRequestTest, EveryFieldOfOpenAisSpecificationIsKnown) {
  std::ifstream file("../shared/data/openapi/openai_inference_subset.json");
  if (!file) GTEST_SKIP() << "no ../shared/data/openapi";
  const nlohmann::json spec = nlohmann::json::parse(file);
  const nlohmann::json& schemas = spec["components"]["schemas"];
  const std::function<void(const nlohmann::json&, std::vector<std::string>&)> collect =
      [&](const nlohmann::json& schema, std::vector<std::string>& names) {
        if (const auto ref = schema.find("$ref"); ref != schema.end()) {
          const auto path = ref->get<std::string>();
          return collect(schemas[path.substr(path.rfind('/') + 1)], names);
        }
        if (schema.contains("allOf")) {
          for (const auto& part : schema["allOf"]) collect(part, names);
        }
        if (schema.contains("properties")) {
          for (const auto& [name, value] : schema["properties"].items()) names.push_back(name);
        }
      };
  for (const auto& [name, endpoint] : {std::pair{"CreateChatCompletionRequest", Endpoint::kChat},
                                       std::pair{"CreateCompletionRequest", Endpoint::kText}}) {
    std::vector<std::string> fields;
    collect(schemas[name], fields);
    EXPECT_GT(fields.size(), 15u);
    for (const std::string& field : fields) {
      const auto known = std::ranges::find(KnownFields(), field, &KnownField::name);
      ASSERT_NE(known, KnownFields().end()) << name << "." << field;
      EXPECT_NE(static_cast<int>(known->endpoint) & static_cast<int>(endpoint), 0) << name << "." << field;
    }
  }
}

// What the table says is refused is refused, with a value that asks for something; what asks for nothing is
// not.
TEST(OpenAiRequestTest, RefusedFieldsAreRefusedByName) {
  for (const KnownField& field : KnownFields()) {
    const std::string name(field.name);
    for (const Endpoint endpoint : {Endpoint::kChat, Endpoint::kText}) {
      const bool here = (static_cast<int>(field.endpoint) & static_cast<int>(endpoint)) != 0;
      if (here && field.use != FieldUse::kRefused) continue;
      const auto error = CheckFields(OrderedJson{{name, {{"something", 1}}}}, endpoint);
      ASSERT_TRUE(error.has_value()) << name;
      EXPECT_EQ(error->code, errors::kUnsupported.code);
      EXPECT_EQ(error->param, name);
      std::vector<std::string> nothing = {"null", "\"\"", "[]", "{}"};
      if (!field.harmless.empty()) nothing.emplace_back(field.harmless);
      // An empty object is how a search is asked for.
      if (name == "web_search_options") nothing = {"null"};
      for (const std::string& value : nothing) {
        EXPECT_FALSE(CheckFields(OrderedJson{{name, OrderedJson::parse(value)}}, endpoint)) << name << value;
      }
    }
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
