#include "server/gateway/responses_request.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <map>
#include <set>
#include <sstream>

namespace tidepool {
namespace {

using ::testing::HasSubstr;

std::string Body(const std::string& more, const std::string& input = "\"hi\"") {
  return "{\"input\":" + input + (more.empty() ? "" : "," + more) + "}";
}

ResponsesRequest Good(const std::string& body) {
  auto parsed = ParseResponses(body);
  if (const auto* error = std::get_if<ApiError>(&parsed)) {
    ADD_FAILURE() << body << ": " << error->message;
    return {};
  }
  return std::get<ResponsesRequest>(std::move(parsed));
}

ApiError Bad(const std::string& body) {
  auto parsed = ParseResponses(body);
  if (const auto* error = std::get_if<ApiError>(&parsed)) return *error;
  ADD_FAILURE() << body << " was taken";
  return {};
}

OrderedJson MessagesOf(const ResponsesRequest& request) {
  return std::get<ChatInput>(request.request.input).messages;
}

// What becomes of each field of OpenAI's createResponse: a value that is served, and one that is refused by
// name.
struct Field {
  const char* served;           // null: none but what asks for nothing
  const char* refused;          // null: none of a right type
  const char* param = nullptr;  // that the refusal names; default: the field
};
const std::map<std::string, Field> kFields = {
    {"metadata", {R"({"a":"b"})", nullptr}},
    {"top_logprobs", {"3", nullptr}},
    {"temperature", {"0.5", nullptr}},
    {"top_p", {"0.5", nullptr}},
    {"user", {"\"me\"", nullptr}},
    {"safety_identifier", {"\"me\"", nullptr}},
    {"prompt_cache_key", {"\"key\"", nullptr}},
    {"prompt_cache_retention", {"\"in_memory\"", "\"24h\""}},
    {"prompt_cache_options", {nullptr, R"({"mode":"explicit"})"}},
    {"previous_response_id", {nullptr, "\"resp_1\""}},
    {"model", {"\"m\"", nullptr}},
    {"background", {"false", "true"}},
    {"max_tool_calls", {nullptr, "3"}},
    {"text",
     {R"({"format":{"type":"text"},"verbosity":"medium"})", R"({"verbosity":"low"})", "text.verbosity"}},
    {"tools",
     {R"([{"type":"function","name":"f","parameters":{"type":"object"},"strict":false}])",
      R"([{"type":"web_search"}])", "tools[0].type"}},
    {"tool_choice", {"\"auto\"", R"({"type":"file_search"})", "tool_choice.type"}},
    {"prompt", {nullptr, R"({"id":"p"})"}},
    {"service_tier", {"\"auto\"", "\"flex\""}},
    {"truncation", {"\"disabled\"", "\"auto\""}},
    {"reasoning", {R"({"effort":"low"})", R"({"summary":"auto"})", "reasoning.summary"}},
    {"input", {"\"hi\"", R"([{"type":"item_reference","id":"x"}])", "input[0].type"}},
    {"include", {R"(["message.output_text.logprobs"])", R"(["file_search_call.results"])", "include[0]"}},
    {"parallel_tool_calls", {"true", nullptr}},
    {"store", {"false", "true"}},
    {"instructions", {"\"be kind\"", nullptr}},
    {"moderation", {nullptr, R"({"model":"m"})"}},
    {"stream", {"true", nullptr}},
    {"stream_options",
     {R"({"include_obfuscation":false})", R"({"include_obfuscation":true})",
      "stream_options.include_obfuscation"}},
    {"conversation", {nullptr, "\"conv_1\""}},
    {"context_management", {nullptr, R"([{"type":"compaction"}])"}},
    {"max_output_tokens", {"16", nullptr}},
};

std::string With(const std::string& field, const std::string& value) {
  return field == "input" ? Body("", value) : Body("\"" + field + "\":" + value);
}

TEST(ResponsesRequest, EveryFieldIsServedOrRefusedByName) {
  for (const auto& [name, field] : kFields) {
    if (field.served != nullptr) Good(With(name, field.served));
    if (name != "input") Good(With(name, "null"));
    if (field.refused == nullptr) continue;
    const ApiError error = Bad(With(name, field.refused));
    EXPECT_EQ(error.status, 400) << name;
    EXPECT_EQ(error.code, errors::kUnsupported.code) << name << ": " << error.message;
    EXPECT_EQ(error.param, field.param == nullptr ? name : field.param);
    EXPECT_THAT(error.message, HasSubstr(error.param));
  }
}

TEST(ResponsesRequest, TheTableHoldsEveryFieldOfOpenAIsDescription) {
  std::ifstream file("../shared/data/openapi/openai_inference_subset.json");
  if (!file) GTEST_SKIP() << "../shared/data/openapi is absent";
  const auto spec = nlohmann::json::parse(file);
  const auto& schemas = spec["components"]["schemas"];
  std::set<std::string> fields;
  const std::function<void(const nlohmann::json&)> collect = [&](const nlohmann::json& schema) {
    if (schema.contains("$ref")) {
      const std::string ref = schema["$ref"];
      collect(schemas[ref.substr(ref.rfind('/') + 1)]);
    }
    if (schema.contains("allOf")) {
      for (const auto& part : schema["allOf"]) collect(part);
    }
    if (schema.contains("properties")) {
      for (const auto& [name, unused] : schema["properties"].items()) fields.insert(name);
    }
  };
  collect(schemas["CreateResponse"]);
  EXPECT_GT(fields.size(), 25u);
  for (const std::string& name : fields) EXPECT_EQ(kFields.count(name), 1u) << name;
}

struct WrongType {
  const char* json;
  const char* param;
};
class ResponsesRequestRefuses : public ::testing::TestWithParam<WrongType> {};

TEST_P(ResponsesRequestRefuses, AndNamesTheFieldAsTheClientKnowsIt) {
  const ApiError error = Bad(GetParam().json);
  EXPECT_EQ(error.status, 400);
  EXPECT_EQ(error.param, GetParam().param) << error.message;
  EXPECT_EQ(error.message.rfind(GetParam().param, 0), 0u) << error.message;
}

INSTANTIATE_TEST_SUITE_P(
    Fields, ResponsesRequestRefuses,
    ::testing::Values(
        WrongType{R"({})", "input"}, WrongType{R"({"input":7})", "input"},
        WrongType{R"({"input":[]})", "input"}, WrongType{R"({"input":["x"]})", "input[0]"},
        WrongType{R"({"input":[{"role":"robot","content":"x"}]})", "input[0].role"},
        WrongType{R"({"input":[{"role":"user"}]})", "input[0].content"},
        WrongType{R"({"input":[{"role":"user","content":[{"type":"input_text"}]}]})",
                  "input[0].content[0].text"},
        WrongType{R"({"input":[{"role":"user","content":[{"type":"input_image","image_url":"x"}]}]})",
                  "input[0].content[0].type"},
        WrongType{R"({"input":[{"type":"function_call","name":"f","arguments":"{}"}]})", "input[0].call_id"},
        WrongType{R"({"input":[{"type":"function_call_output","call_id":"c"}]})", "input[0].output"},
        WrongType{R"({"input":[{"type":"reasoning","encrypted_content":"x"}]})",
                  "input[0].encrypted_content"},
        WrongType{R"({"input":[{"type":"reasoning","content":"x"}]})", "input[0].content"},
        WrongType{R"({"input":[{"type":"web_search_call"}]})", "input[0].type"},
        WrongType{R"({"input":"x","max_output_tokens":0})", "max_output_tokens"},
        WrongType{R"({"input":"x","max_output_tokens":"many"})", "max_output_tokens"},
        WrongType{R"({"input":"x","temperature":3})", "temperature"},
        WrongType{R"({"input":"x","instructions":7})", "instructions"},
        WrongType{R"({"input":"x","top_logprobs":21})", "top_logprobs"},
        WrongType{R"({"input":"x","include":["what"]})", "include[0]"},
        WrongType{R"({"input":"x","text":{"format":{"type":"xml"}}})", "text.format.type"},
        WrongType{R"({"input":"x","text":"x"})", "text"},
        WrongType{R"({"input":"x","reasoning":{"effort":"enormous"}})", "reasoning.effort"},
        WrongType{R"({"input":"x","tools":[{"type":"function","name":"a b"}]})", "tools[0].name"},
        WrongType{R"({"input":"x","tools":[{"type":"function","name":"f","parameters":7}]})",
                  "tools[0].parameters"},
        WrongType{R"({"input":"x","metadata":[1]})", "metadata"},
        WrongType{R"({"input":"x","user":7})", "user"},
        WrongType{R"({"input":"x","messages":[{"role":"user","content":"x"}]})", "messages"},
        WrongType{R"({"input":"x","max_tokens":5})", "max_tokens"}, WrongType{R"({"input":"x","n":2})", "n"},
        WrongType{R"({"input":"x","seed":"x"})", "seed"}));

TEST(ResponsesRequest, ATextIsAUsersMessageAfterTheInstructions) {
  const auto request = Good(Body(R"("instructions":"be kind")"));
  EXPECT_EQ(MessagesOf(request),
            OrderedJson::parse(R"([{"role":"system","content":"be kind"},{"role":"user","content":"hi"}])"));
  EXPECT_TRUE(request.request.chat);
  EXPECT_EQ(request.repeated["instructions"], "be kind");
  EXPECT_EQ(request.repeated["store"], false);
  EXPECT_EQ(request.repeated["tool_choice"], "auto");
  EXPECT_EQ(request.repeated["text"]["format"]["type"], "text");
}

TEST(ResponsesRequest, WhatTheAssistantSaidInSeveralItemsIsOneMessage) {
  const auto request = Good(Body("", R"([
    {"role":"user","content":[{"type":"input_text","text":"weather?"}]},
    {"type":"reasoning","id":"rs_1","summary":[],"content":[{"type":"reasoning_text","text":"ask"}]},
    {"type":"message","id":"msg_1","role":"assistant","status":"completed",
     "content":[{"type":"output_text","text":"wait","annotations":[]}]},
    {"type":"function_call","id":"fc_1","call_id":"c1","name":"f","arguments":"{\"a\":1}","status":"completed"},
    {"type":"function_call","call_id":"c2","name":"g","arguments":"{}"},
    {"type":"function_call_output","call_id":"c1","output":"sun"},
    {"type":"function_call_output","call_id":"c2","output":[{"type":"input_text","text":"rain"}]},
    {"type":"message","role":"developer","content":"be brief"}])"));
  const OrderedJson messages = MessagesOf(request);
  ASSERT_EQ(messages.size(), 5u);
  EXPECT_EQ(messages[0]["content"], "weather?");
  EXPECT_EQ(messages[1]["role"], "assistant");
  EXPECT_EQ(messages[1]["content"], "wait");
  EXPECT_EQ(messages[1]["reasoning_content"], "ask");
  ASSERT_EQ(messages[1]["tool_calls"].size(), 2u);
  EXPECT_EQ(messages[1]["tool_calls"][0]["id"], "c1");
  EXPECT_EQ(messages[1]["tool_calls"][0]["function"]["name"], "f");
  EXPECT_EQ(messages[2]["role"], "tool");
  EXPECT_EQ(messages[2]["tool_call_id"], "c1");
  EXPECT_EQ(messages[2]["content"], "sun");
  EXPECT_EQ(messages[3]["content"], "rain");
  EXPECT_EQ(messages[4]["role"], "system");
}

TEST(ResponsesRequest, ASecondMessageOfTheAssistantStandsByItself) {
  const auto request =
      Good(Body("", R"([{"role":"assistant","content":"a"},{"role":"assistant","content":"b"},
                                         {"role":"user","content":"c"}])"));
  EXPECT_EQ(MessagesOf(request).size(), 3u);
}

TEST(ResponsesRequest, ToolsAndTheirChoiceAreChats) {
  const char* tool =
      R"("tools":[{"type":"function","name":"f","description":"d","parameters":{"type":"object"},"strict":true},
                  {"type":"function","name":"g","parameters":null}])";
  auto request = Good(Body(tool));
  EXPECT_EQ(request.request.tools.choice, ToolChoice::kAuto);
  ASSERT_EQ(request.request.tools.tools.size(), 2u);
  EXPECT_EQ(request.request.tools.tools[0].name, "f");
  EXPECT_TRUE(request.request.tools.tools[0].strict);
  EXPECT_FALSE(request.request.tools.tools[1].strict);
  EXPECT_EQ(request.repeated["tools"][0]["name"], "f");
  EXPECT_EQ(request.repeated["tools"][1]["strict"], nullptr);

  request = Good(Body(std::string(tool) + R"(,"tool_choice":{"type":"function","name":"g"})"));
  EXPECT_EQ(request.request.tools.choice, ToolChoice::kNamed);
  EXPECT_EQ(request.repeated["tool_choice"]["name"], "g");

  request = Good(Body(std::string(tool) + R"(,"tool_choice":"required","parallel_tool_calls":false)"));
  EXPECT_EQ(request.request.tools.choice, ToolChoice::kRequired);
  EXPECT_FALSE(request.request.tools.parallel);
  EXPECT_EQ(request.repeated["parallel_tool_calls"], false);

  request = Good(Body(
      std::string(tool) +
      R"(,"tool_choice":{"type":"allowed_tools","mode":"required","tools":[{"type":"function","name":"g"}]})"));
  EXPECT_EQ(request.request.tools.choice, ToolChoice::kRequired);
  ASSERT_EQ(request.request.tools.tools.size(), 1u);
  EXPECT_EQ(request.request.tools.tools[0].name, "g");

  const ApiError error = Bad(Body(std::string(tool) + R"(,"tool_choice":{"type":"function","name":"h"})"));
  EXPECT_EQ(error.param.rfind("tool_choice", 0), 0u) << error.message;
}

TEST(ResponsesRequest, FormatEffortLogprobsAndLengthAreChats) {
  const auto request = Good(Body(
      R"("text":{"format":{"type":"json_schema","name":"n","strict":true,"schema":{"type":"object"}}},
         "reasoning":{"effort":"high"},"top_logprobs":2,"max_output_tokens":7,"temperature":0.5,"seed":3)"));
  ASSERT_TRUE(request.request.structured.has_value());
  EXPECT_EQ(request.request.structured->kind, StructuredSpec::Kind::kJsonSchema);
  EXPECT_EQ(request.request.reasoning.effort, "high");
  EXPECT_EQ(request.request.top_logprobs, 2);
  EXPECT_EQ(request.request.max_tokens, 7u);
  EXPECT_EQ(request.request.seed, 3u);
  EXPECT_EQ(request.repeated["reasoning"]["effort"], "high");
  EXPECT_EQ(request.repeated["max_output_tokens"], 7);
  EXPECT_EQ(request.repeated["text"]["format"]["name"], "n");
}

TEST(ResponsesRequest, WhatChatDoesNotServeIsRefusedHereToo) {
  for (const char* field : {"chat_template", "documents", "stop_regex", "kv_transfer_params"}) {
    const ApiError error = Bad(Body("\"" + std::string(field) + "\":\"x\""));
    EXPECT_EQ(error.code, errors::kUnsupported.code) << field;
    EXPECT_EQ(error.param, field);
  }
}

TEST(ResponsesRequest, ErrorsOfLaterStepsAreRenamed) {
  const auto request = Good(Body(""));
  const ApiError error = request.names.Own(
      MakeError(errors::kContextLength, "max_tokens: 9 with a prompt of 3 tokens is too much", "max_tokens"));
  EXPECT_EQ(error.param, "max_output_tokens");
  EXPECT_EQ(error.message, "max_output_tokens: 9 with a prompt of 3 tokens is too much");
  EXPECT_EQ(request.names.Own(MakeError(errors::kInvalidRequest, "messages: x", "messages")).message,
            "input: x");
  EXPECT_EQ(request.names.Own(MakeError(errors::kInvalidRequest, "maximum: x", "max_tokensX")).param,
            "max_tokensX");
}

TEST(ResponsesRequest, BrokenJsonIsSaidToBeThat) {
  EXPECT_EQ(Bad("{").code, errors::kInvalidJson.code);
  EXPECT_EQ(Bad("[]").code, errors::kInvalidJson.code);
}

}  // namespace
}  // namespace tidepool
