#include "server/gateway/chat/constraint.h"

#include <gtest/gtest.h>

#include <filesystem>

#include "base/digest.h"
#include "base/probe.h"
#include "base/rng.h"
#include "server/gateway/openai_request.h"
#include "server/gateway/structured_output.h"
#include "server/structured/matcher.h"
#include "server/structured/token_table.h"
#include "tests/server/gateway/byte_model.h"

namespace tidepool {
namespace {

constexpr const char* kTools =
    R"("tools":[{"type":"function","function":{"name":"lamp","strict":true,"parameters":{"type":"object",)"
    R"("properties":{"on":{"type":"boolean"},"room":{"enum":["hall","attic"]}},"required":["on","room"],)"
    R"("additionalProperties":false}}},{"type":"function","function":{"name":"bell"}}])";

class ConstraintTest : public ::testing::Test {
 protected:
  ConstraintTest()
      : dir_(std::filesystem::temp_directory_path() / ("tidepool-constraint-" + RandomHexId())),
        probe_(registry_, SloConfig{}) {
    WriteByteModel(dir_);
  }
  ~ConstraintTest() override { std::filesystem::remove_all(dir_); }

  // With these as further special tokens, from id 258 on.
  void Load(const std::string& parser, const std::vector<std::string>& specials = {}, bool thinks = false) {
    const auto path = dir_ / "tokenizer.json";
    std::ifstream in(path);
    OrderedJson json = OrderedJson::parse(in);
    in.close();
    int id = 258;
    for (const std::string& piece : specials) {
      OrderedJson one = json["added_tokens"][0];
      one["id"] = id++;
      one["content"] = piece;
      json["added_tokens"].push_back(one);
    }
    std::ofstream(path) << json.dump();
    tokenizer_ = *Tokenizer::Load(dir_.string());
    table_ = *TokenTable::Build(*tokenizer_, id);
    ModelConfig config;
    config.tool_parser = parser;
    config.reasoning_parser = thinks ? "think" : "none";
    auto format = ChatFormat::Detect(config, *tokenizer_, nullptr);
    ASSERT_TRUE(format.ok()) << format.status();
    format_ = *std::move(format);
    compiler_ = std::make_unique<GrammarCompiler>(format_, 1 << 20, probe_);
  }

  static InferenceRequest Request(const std::string& more) {
    auto parsed = ParseChatCompletion(R"({"messages":[{"role":"user","content":"hi"}])" +
                                      (more.empty() ? "" : "," + more) + "}");
    if (auto* error = std::get_if<ApiError>(&parsed)) {
      ADD_FAILURE() << error->message;
      return {};
    }
    return std::get<InferenceRequest>(std::move(parsed));
  }

  std::shared_ptr<const CompiledGrammar> Compile(const InferenceRequest& request,
                                                 const std::string& prompt = "",
                                                 const std::string& salt = "salt") {
    auto compiled = compiler_->Compile(request, prompt, salt);
    if (auto* error = std::get_if<ApiError>(&compiled)) {
      ADD_FAILURE() << error->message;
      return nullptr;
    }
    return std::get<GrammarCompiler::Grammar>(compiled);
  }
  ApiError Error(const std::string& more) {
    auto compiled = compiler_->Compile(Request(more), "", "salt");
    auto* error = std::get_if<ApiError>(&compiled);
    EXPECT_NE(error, nullptr) << more;
    return error == nullptr ? ApiError{} : *error;
  }
  Matcher Match(const std::string& more, const std::string& prompt = "") {
    return Matcher(Compile(Request(more), prompt), table_, nullptr, "");
  }
  // Whether it is an answer.
  bool Takes(const std::string& more, const std::string& text, const std::string& prompt = "") {
    Matcher matcher = Match(more, prompt);
    return matcher.AcceptBytes(text).ok() && matcher.CanEnd();
  }
  Message Parsed(const InferenceRequest& request, const std::string& text) const {
    MessageParser parser(format_.Plan(request), "");
    std::vector<MessageDelta> deltas;
    parser.Push(text, 1, deltas);
    parser.Finish(deltas);
    Message message;
    for (const MessageDelta& delta : deltas) message.Add(delta);
    return message;
  }

  const std::filesystem::path dir_;
  MetricRegistry registry_;
  GatewayProbe probe_;
  std::shared_ptr<const Tokenizer> tokenizer_;
  std::shared_ptr<const TokenTable> table_;
  ChatFormat format_;
  std::unique_ptr<GrammarCompiler> compiler_;
};

TEST_F(ConstraintTest, AnAnswerWithoutAnyIsFree) {
  Load("hermes");
  EXPECT_EQ(Compile(Request("")), nullptr);
  EXPECT_EQ(Compile(Request(R"("tools":[{"type":"function","function":{"name":"f"}}])")), nullptr);
}

TEST_F(ConstraintTest, EachKindOfStructuredOutputHoldsTheText) {
  Load("none");
  EXPECT_TRUE(Takes(R"("guided_regex":"a+b")", "aab"));
  EXPECT_FALSE(Takes(R"("guided_regex":"a+b")", "aabb"));
  EXPECT_TRUE(Takes(R"("guided_choice":["yes","no"])", "no"));
  EXPECT_FALSE(Takes(R"("guided_choice":["yes","no"])", "n"));
  EXPECT_TRUE(Takes(R"("grammar":"root ::= \"x\" [0-9]+")", "x12"));
  EXPECT_TRUE(Takes(R"("response_format":{"type":"json_object"})", R"({"a": [1]})"));
  EXPECT_FALSE(Takes(R"("response_format":{"type":"json_object"})", "[1]"));
  const char* schema =
      R"("guided_json":{"type":"object","properties":{"a":{"type":"integer"}},"required":["a"]})";
  EXPECT_TRUE(Takes(schema, R"({"a": 1})"));
  EXPECT_FALSE(Takes(schema, R"({"a": "1"})"));
  EXPECT_FALSE(
      Takes(R"("structured_outputs":{"json":{"type":"array"},"disable_any_whitespace":true})", "[ ]"));
}

TEST_F(ConstraintTest, ForcedCallsAreReadBackInEverySyntax) {
  for (const char* syntax : {"hermes", "llama3", "mistral"}) {
    Load(syntax);
    for (const char* choice : {R"("required")", R"({"type":"function","function":{"name":"lamp"}})"}) {
      const std::string lamp =
          R"("tools":[{"type":"function","function":{"name":"lamp","parameters":{"type":"object",)"
          R"("properties":{"on":{"type":"boolean"},"room":{"enum":["hall","attic"]}},)"
          R"("required":["on","room"],"additionalProperties":false}}}])";
      const InferenceRequest request = Request(lamp + ",\"tool_choice\":" + choice);
      const auto grammar = Compile(request);
      ASSERT_NE(grammar, nullptr);
      Rng rng(3);
      for (int round = 0; round < 20; ++round) {
        // A model that draws any byte that is allowed, and ends as soon as it may.
        Matcher matcher(grammar, table_, nullptr, "");
        std::string text;
        std::vector<uint32_t> bits(table_->mask_words());
        while (!matcher.CanEnd() && text.size() < 4000) {
          ASSERT_TRUE(matcher.FillMask(bits).ok());
          std::vector<int32_t> allowed;
          for (int32_t id = 0; id < 256; ++id) {
            if ((bits[static_cast<size_t>(id) / 32] >> (id % 32) & 1) != 0) allowed.push_back(id);
          }
          ASSERT_FALSE(allowed.empty()) << text;
          const int32_t id =
              allowed[static_cast<size_t>(rng.Uniform() * static_cast<double>(allowed.size()))];
          ASSERT_TRUE(matcher.Accept(id).ok());
          text += static_cast<char>(id);
        }
        const Message message = Parsed(request, text);
        EXPECT_EQ(message.content, "") << text;
        ASSERT_GE(message.tool_calls.size(), 1u) << text;
        for (const ToolCall& call : message.tool_calls) {
          EXPECT_EQ(call.name, "lamp");
          const auto arguments = ParseJson(call.arguments);
          ASSERT_TRUE(arguments.ok()) << call.arguments;
          EXPECT_TRUE((*arguments)["on"].is_boolean());
          EXPECT_TRUE((*arguments)["room"] == "hall" || (*arguments)["room"] == "attic");
        }
      }
    }
  }
}

TEST_F(ConstraintTest, OnlyOneCallWhereParallelOnesAreOff) {
  Load("hermes");
  const std::string call = "<tool_call>\n{\"name\": \"bell\", \"arguments\": {}}\n</tool_call>";
  const std::string required = std::string(kTools) + R"(,"tool_choice":"required")";
  EXPECT_TRUE(Takes(required, call));
  EXPECT_TRUE(Takes(required, call + "\n" + call));
  EXPECT_FALSE(Takes(required, "text"));
  EXPECT_FALSE(Takes(required + R"(,"parallel_tool_calls":false)", call + "\n" + call));
}

TEST_F(ConstraintTest, StrictFunctionsHoldTheirCallsAndLeaveTheTextFree) {
  Load("hermes");
  const std::string good =
      "<tool_call>\n{\"name\": \"lamp\", \"arguments\": {\"on\": true, \"room\": \"hall\"}}\n</tool_call>";
  EXPECT_TRUE(Takes(kTools, ""));
  EXPECT_TRUE(Takes(kTools, "Any text, <b> and {} too."));
  EXPECT_TRUE(Takes(kTools, "I will.\n" + good));
  EXPECT_FALSE(Takes(kTools, "<tool_call>\n{\"name\": \"lamp\", \"arguments\": {\"on\": 1}}\n</tool_call>"));
  EXPECT_FALSE(Takes(kTools, "<tool_call>\n{\"name\": \"other\", \"arguments\": {}}\n</tool_call>"));
  Load("llama3");
  EXPECT_TRUE(Takes(kTools, "Hello {name}"));
  EXPECT_TRUE(Takes(kTools, "<b>Hello</b>"));
  EXPECT_FALSE(Takes(kTools, "<|python_tag|>print(1)"));
  EXPECT_TRUE(Takes(kTools, R"({"name": "bell", "parameters": {"any": 1}})"));
  EXPECT_FALSE(Takes(kTools, R"({"city": "Oslo"})"));
}

TEST_F(ConstraintTest, AResponseFormatHoldsTheTextAndNotTheCalls) {
  Load("hermes");
  const std::string both = std::string(kTools) + R"(,"response_format":{"type":"json_object"})";
  EXPECT_TRUE(Takes(both, "{}"));
  EXPECT_TRUE(Takes(both, "<tool_call>\n{\"name\": \"bell\", \"arguments\": {}}\n</tool_call>"));
  EXPECT_FALSE(Takes(both, "text"));
  EXPECT_TRUE(Takes(std::string(kTools) + R"(,"guided_regex":"ab?")", "a"));
  EXPECT_EQ(Error(std::string(kTools) + R"(,"guided_regex":"ab?","tool_choice":"required")").param,
            "guided_regex");
}

TEST_F(ConstraintTest, ThoughtsAreFreeAndComeFirst) {
  Load("none", {}, /*thinks=*/true);
  const char* regex = R"("guided_regex":"[0-9]+")";
  EXPECT_TRUE(Takes(regex, "42"));
  EXPECT_TRUE(Takes(regex, "<think>\nhm, < 3?</think>\n\n42"));
  EXPECT_FALSE(Takes(regex, "<think>hm</think>\n\nno"));
  EXPECT_TRUE(Takes(regex, "hm</think>42", "<|assistant|><think>\n"));
  EXPECT_FALSE(Takes(regex, "42", "<|assistant|><think>\n"));
  EXPECT_FALSE(Takes(regex, "<think>hm</think>42", "<think>\n\n</think>\n\n"));
  EXPECT_FALSE(Takes(R"("guided_regex":"[0-9]+","reasoning_effort":"none")", "<think>hm</think>42"));
  const char* spelled = R"("guided_choice":["<think>hm</think>42"])";
  EXPECT_TRUE(Takes(spelled, "<think>hm</think>42"));
  EXPECT_FALSE(Takes(spelled, "<think>so</think>42"));
}

TEST_F(ConstraintTest, MarkupThatIsOneTokenIsThatToken) {
  Load("mistral", {"[TOOL_CALLS]"});
  Matcher matcher = Match(std::string(kTools) + R"(,"tool_choice":"required")");
  EXPECT_FALSE(matcher.Allows('['));
  ASSERT_TRUE(matcher.Accept(258).ok());
  EXPECT_TRUE(matcher.AcceptBytes(R"([{"name": "bell", "arguments": {}}])").ok());
  EXPECT_TRUE(matcher.CanEnd());
}

TEST_F(ConstraintTest, ErrorsNameTheFieldAndThePlace) {
  Load("hermes");
  const ApiError regex = Error(R"("guided_regex":"(a")");
  EXPECT_EQ(regex.status, 400);
  EXPECT_EQ(regex.param, "guided_regex");
  EXPECT_EQ(Error(R"("grammar":"root ::= (\"a\"")").param, "grammar");
  const std::string bad =
      R"({"type":"object","properties":{"a":{"type":"string","contentSchema":{"type":"x"},"$dynamicRef":"#x"}}})";
  const ApiError schema =
      Error(R"("response_format":{"type":"json_schema","json_schema":{"name":"n","schema":)" + bad + "}}");
  EXPECT_EQ(schema.status, 400);
  EXPECT_EQ(schema.param, "response_format.json_schema.schema");
  EXPECT_NE(schema.message.find("/properties/a"), std::string::npos) << schema.message;
  const std::string tool = R"("tools":[{"type":"function","function":{"name":"f","parameters":)" + bad;
  EXPECT_EQ(Error(tool + R"(,"strict":true}}])").param, "tools[0].function.parameters");
}

TEST_F(ConstraintTest, GrammarsAreKeptForTheTenantThatAskedForThem) {
  Load("none");
  const InferenceRequest request = Request(R"("guided_regex":"a+")");
  const auto first = Compile(request, "", "one");
  EXPECT_EQ(Compile(request, "", "one"), first);
  EXPECT_NE(Compile(request, "", "two"), first);
  EXPECT_NE(Compile(Request(R"("guided_regex":"a*")"), "", "one"), first);
  EXPECT_EQ(compiler_->cache_stats().entries, 3u);
}

}  // namespace
}  // namespace tidepool
