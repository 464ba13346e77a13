#include "server/gateway/messages_request.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace tidepool {
namespace {

using ::testing::HasSubstr;

std::string Body(const std::string& more,
                 const std::string& messages = R"([{"role":"user","content":"hi"}])") {
  return R"({"max_tokens":100,"messages":)" + messages + (more.empty() ? "" : "," + more) + "}";
}

MessagesRequest Good(const std::string& body) {
  auto parsed = ParseMessages(body);
  if (const auto* error = std::get_if<ApiError>(&parsed)) {
    ADD_FAILURE() << body << ": " << error->message;
    return {};
  }
  return std::get<MessagesRequest>(std::move(parsed));
}

ApiError Bad(const std::string& body) {
  auto parsed = ParseMessages(body);
  if (const auto* error = std::get_if<ApiError>(&parsed)) return *error;
  ADD_FAILURE() << body << " was taken";
  return {};
}

const ChatInput& ChatOf(const MessagesRequest& request) { return std::get<ChatInput>(request.request.input); }

// Anthropic's fields (the parameters of the `anthropic` client's messages.create).
struct Field {
  const char* name;
  const char* served;   // null: none but what asks for nothing
  const char* refused;  // null: none of a right type
  const char* param = nullptr;
};
constexpr Field kFields[] = {
    {"model", "\"m\"", nullptr},
    {"cache_control", R"({"type":"ephemeral","ttl":"5m"})", nullptr},
    {"container", nullptr, R"("c")"},
    {"context_management", nullptr, R"({"edits":[1]})"},
    {"mcp_servers", nullptr, R"([{"name":"x"}])"},
    {"diagnostics", nullptr, R"({"x":1})"},
    {"inference_geo", nullptr, "\"us\""},
    {"metadata", R"({"user_id":"u"})", nullptr},
    {"output_config", R"({"effort":"max","format":{"type":"json_schema","schema":{"type":"object"}}})",
     nullptr},
    {"output_format", R"({"type":"json_schema","schema":{"type":"object"}})", nullptr},
    {"service_tier", "\"auto\"", nullptr},
    {"speed", "\"standard\"", "\"fast\""},
    {"stop_sequences", R"(["END"])", nullptr},
    {"stream", "true", nullptr},
    {"system", R"([{"type":"text","text":"be kind","cache_control":{"type":"ephemeral"}}])",
     R"([{"type":"image"}])", "system[0].type"},
    {"temperature", "0.5", nullptr},
    {"thinking", R"({"type":"enabled","budget_tokens":50})", R"({"type":"between_tools"})", "thinking.type"},
    {"tool_choice", R"({"type":"auto"})", nullptr},
    {"tools", R"([{"name":"f","description":"d","input_schema":{"type":"object"}}])",
     R"([{"type":"bash_20250124","name":"bash"}])", "tools[0].type"},
    {"top_k", "5", nullptr},
    {"top_p", "0.5", nullptr},
    {"user_profile_id", nullptr, "\"u\""},
    {"workspace_id", nullptr, "\"w\""},
};

TEST(MessagesRequest, EveryFieldIsServedOrRefusedByName) {
  for (const Field& field : kFields) {
    const std::string name = field.name;
    // A choice wants something to choose from.
    const std::string tools =
        name == "tool_choice" ? R"("tools":[{"name":"f","input_schema":{"type":"object"}}],)" : "";
    if (field.served != nullptr) Good(Body(tools + "\"" + name + "\":" + field.served));
    Good(Body("\"" + name + "\":null"));
    if (field.refused == nullptr) continue;
    const ApiError error = Bad(Body("\"" + name + "\":" + field.refused));
    EXPECT_EQ(error.status, 400) << name;
    EXPECT_EQ(error.code, errors::kUnsupported.code) << name << ": " << error.message;
    EXPECT_EQ(error.param, field.param == nullptr ? name : field.param);
    EXPECT_THAT(error.message, HasSubstr(error.param));
  }
}

struct Wrong {
  const char* json;
  const char* param;
};
class MessagesRequestRefuses : public ::testing::TestWithParam<Wrong> {};

TEST_P(MessagesRequestRefuses, AndNamesTheFieldAsTheClientKnowsIt) {
  const ApiError error = Bad(GetParam().json);
  EXPECT_EQ(error.status, 400);
  EXPECT_EQ(error.param, GetParam().param) << error.message;
  EXPECT_EQ(error.message.rfind(GetParam().param, 0), 0u) << error.message;
}

#define USER R"("messages":[{"role":"user","content":"x"}])"
INSTANTIATE_TEST_SUITE_P(
    Fields, MessagesRequestRefuses,
    ::testing::Values(
        Wrong{"{" USER "}", "max_tokens"}, Wrong{R"({"max_tokens":0,)" USER "}", "max_tokens"},
        Wrong{R"({"max_tokens":9})", "messages"}, Wrong{R"({"max_tokens":9,"messages":[]})", "messages"},
        Wrong{R"({"max_tokens":9,"messages":[7]})", "messages[0]"},
        Wrong{R"({"max_tokens":9,"messages":[{"role":"robot","content":"x"}]})", "messages[0].role"},
        Wrong{R"({"max_tokens":9,"messages":[{"role":"user"}]})", "messages[0].content"},
        Wrong{R"({"max_tokens":9,"messages":[{"role":"user","content":""}]})", "messages[0].content"},
        Wrong{R"({"max_tokens":9,"messages":[{"role":"user","content":[{"type":"image","source":{}}]}]})",
              "messages[0].content[0].type"},
        Wrong{R"({"max_tokens":9,"messages":[{"role":"user","content":[{"type":"text"}]}]})",
              "messages[0].content[0].text"},
        Wrong{R"({"max_tokens":9,"messages":[{"role":"user","content":[{"type":"tool_result"}]}]})",
              "messages[0].content[0].tool_use_id"},
        Wrong{
            R"({"max_tokens":9,"messages":[{"role":"user","content":[{"type":"tool_result","tool_use_id":"t",
                 "content":[{"type":"image"}]}]}]})",
            "messages[0].content[0].content[0].type"},
        Wrong{
            R"({"max_tokens":9,"messages":[{"role":"assistant","content":[{"type":"tool_use","id":"t","name":"f",
                 "input":"x"}]}]})",
            "messages[0].content[0].input"},
        Wrong{R"({"max_tokens":9,"messages":[{"role":"user","content":"x"},{"role":"assistant","content":
                 [{"type":"tool_use","id":"t","name":"f","input":{}}]}]})",
              "messages"},
        Wrong{R"({"max_tokens":9,"system":7,)" USER "}", "system"},
        Wrong{R"({"max_tokens":9,"stop_sequences":"x",)" USER "}", "stop_sequences"},
        Wrong{R"({"max_tokens":9,"stop_sequences":[""],)" USER "}", "stop_sequences"},
        Wrong{R"({"max_tokens":9,"temperature":5,)" USER "}", "temperature"},
        Wrong{R"({"max_tokens":9,"thinking":{"type":"enabled"},)" USER "}", "thinking.budget_tokens"},
        Wrong{R"({"max_tokens":9,"thinking":{"type":"enabled","budget_tokens":9},)" USER "}",
              "thinking.budget_tokens"},
        Wrong{R"({"max_tokens":9,"tool_choice":{"type":"some"},)" USER "}", "tool_choice.type"},
        Wrong{R"({"max_tokens":9,"tools":[{"name":"f"}],)" USER "}", "tools[0].input_schema"},
        Wrong{R"({"max_tokens":9,"tools":[{"name":"a b","input_schema":{}}],)" USER "}", "tools[0].name"},
        Wrong{R"({"max_tokens":9,"metadata":{"user_id":7},)" USER "}", "metadata.user_id"},
        Wrong{R"({"max_tokens":9,"output_config":{"effort":"enormous"},)" USER "}", "output_config.effort"},
        Wrong{R"({"max_tokens":9,"output_config":{"format":{"type":"xml"}},)" USER "}",
              "output_config.format.type"},
        Wrong{R"({"max_tokens":9,"cache_control":"x",)" USER "}", "cache_control"},
        Wrong{R"({"max_tokens":9,"stop":["x"],)" USER "}", "stop"},
        Wrong{R"({"max_tokens":9,"n":2,)" USER "}", "n"}));
#undef USER

TEST(MessagesRequest, ToolCallsAndTheirResultsAreMessagesOfAChat) {
  const auto request = Good(Body(R"("system":"be kind")", R"([
    {"role":"user","content":[{"type":"text","text":"weather"},{"type":"text","text":"here?"}]},
    {"role":"assistant","content":[{"type":"thinking","thinking":"ask","signature":""},{"type":"text","text":"wait"},
      {"type":"tool_use","id":"t1","name":"f","input":{"a":1}},{"type":"tool_use","id":"t2","name":"g","input":{}}]},
    {"role":"user","content":[{"type":"tool_result","tool_use_id":"t1","content":"sun"},
      {"type":"tool_result","tool_use_id":"t2","is_error":true,"content":[{"type":"text","text":"no such place"}]},
      {"type":"text","text":"go on"}]}])"));
  const OrderedJson& messages = ChatOf(request).messages;
  ASSERT_EQ(messages.size(), 6u);
  EXPECT_EQ(messages[0]["role"], "system");
  EXPECT_EQ(messages[0]["content"], "be kind");
  EXPECT_EQ(messages[1]["content"], "weather\nhere?");
  EXPECT_EQ(messages[2]["role"], "assistant");
  EXPECT_EQ(messages[2]["content"], "wait");
  EXPECT_EQ(messages[2]["reasoning_content"], "ask");
  ASSERT_EQ(messages[2]["tool_calls"].size(), 2u);
  EXPECT_EQ(messages[2]["tool_calls"][0]["id"], "t1");
  EXPECT_EQ(messages[3]["role"], "tool");
  EXPECT_EQ(messages[3]["tool_call_id"], "t1");
  EXPECT_EQ(messages[3]["content"], "sun");
  EXPECT_EQ(messages[4]["content"], "Error: no such place");
  EXPECT_EQ(messages[5]["role"], "user");
  EXPECT_EQ(messages[5]["content"], "go on");
  EXPECT_EQ(request.request.max_tokens, 100u);
}

TEST(MessagesRequest, TurnsOfOneRoleAreOne) {
  const auto request = Good(Body("", R"([{"role":"user","content":"a"},{"role":"user","content":"b"},
                                         {"role":"assistant","content":"c"},{"role":"user","content":"d"}])"));
  EXPECT_EQ(ChatOf(request).messages,
            OrderedJson::parse(R"([{"role":"user","content":"a\nb"},{"role":"assistant","content":"c"},
                                   {"role":"user","content":"d"}])"));
}

TEST(MessagesRequest, ALastTurnOfTheAssistantIsGoneOnWith) {
  const auto request =
      Good(Body("", R"([{"role":"user","content":"a"},{"role":"assistant","content":"I say"}])"));
  EXPECT_TRUE(ChatOf(request).continue_final_message);
  EXPECT_FALSE(ChatOf(request).add_generation_prompt);
  const auto empty = Good(Body("", R"([{"role":"user","content":"a"},{"role":"assistant","content":[]}])"));
  EXPECT_FALSE(ChatOf(empty).continue_final_message);
  EXPECT_EQ(ChatOf(empty).messages.size(), 1u);
}

TEST(MessagesRequest, ToolChoicesAreChats) {
  const std::string tools =
      R"("tools":[{"name":"f","input_schema":{"type":"object"}},{"name":"g","input_schema":{"type":"object"},"strict":true}])";
  EXPECT_EQ(Good(Body(tools)).request.tools.choice, ToolChoice::kAuto);
  EXPECT_EQ(Good(Body(tools + R"(,"tool_choice":{"type":"none"})")).request.tools.choice, ToolChoice::kNone);
  EXPECT_EQ(Good(Body(tools + R"(,"tool_choice":{"type":"any"})")).request.tools.choice,
            ToolChoice::kRequired);
  const auto named = Good(Body(tools + R"(,"tool_choice":{"type":"tool","name":"g"})")).request.tools;
  EXPECT_EQ(named.choice, ToolChoice::kNamed);
  EXPECT_EQ(named.tools[0].name, "g");
  EXPECT_TRUE(named.tools[0].strict);
  EXPECT_FALSE(Good(Body(tools + R"(,"tool_choice":{"type":"auto","disable_parallel_tool_use":true})"))
                   .request.tools.parallel);
}

TEST(MessagesRequest, ThinkingIsTheTemplatesSwitch) {
  EXPECT_TRUE(ChatOf(Good(Body(""))).template_kwargs.empty()) << "the template decides";
  EXPECT_EQ(ChatOf(Good(Body(R"("thinking":{"type":"disabled"})"))).template_kwargs["enable_thinking"],
            false);
  EXPECT_EQ(ChatOf(Good(Body(R"("thinking":{"type":"adaptive"})"))).template_kwargs["enable_thinking"], true);
  const auto request = Good(Body(
      R"("thinking":{"type":"enabled","budget_tokens":50,"display":"omitted"},"chat_template_kwargs":{"thinking":false})"));
  EXPECT_EQ(ChatOf(request).template_kwargs["enable_thinking"], true);
  EXPECT_EQ(ChatOf(request).template_kwargs["thinking"], false) << "the client's own word counts";
  EXPECT_FALSE(request.request.reasoning.include);
}

TEST(MessagesRequest, StopsSamplingAndFormatAreChats) {
  const auto request =
      Good(Body(R"("stop_sequences":["END"],"top_k":5,"temperature":0.5,"seed":7,"output_config":
      {"effort":"low","format":{"type":"json_schema","schema":{"type":"object"}}})"))
          .request;
  EXPECT_THAT(request.stop, ::testing::ElementsAre("END"));
  EXPECT_EQ(request.top_k, 5);
  EXPECT_EQ(request.seed, 7u);
  EXPECT_EQ(request.reasoning.effort, "low");
  ASSERT_TRUE(request.structured.has_value());
  EXPECT_EQ(request.structured->kind, StructuredSpec::Kind::kJsonSchema);
}

TEST(MessagesRequest, CountingNeedsNoMaxTokens) {
  const auto parsed = ParseCountTokens(R"({"model":"m","messages":[{"role":"user","content":"hi"}]})");
  ASSERT_TRUE(std::holds_alternative<MessagesRequest>(parsed));
  EXPECT_EQ(ChatOf(std::get<MessagesRequest>(parsed)).messages.size(), 1u);
}

}  // namespace
}  // namespace tidepool
