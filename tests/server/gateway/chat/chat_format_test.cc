#include "server/gateway/chat/chat_format.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <sstream>

#include "base/digest.h"
#include "tests/server/gateway/byte_model.h"

namespace tidepool {
namespace {

constexpr ToolSyntax kNone = ToolSyntax::kNone, kHermes = ToolSyntax::kHermes, kLlama3 = ToolSyntax::kLlama3,
                     kMistral = ToolSyntax::kMistral;

struct Known {
  const char* path;
  bool takes_tools;
  ToolSyntax syntax;
  bool names = false;
};

// Read by eye from the templates: who shows `tools`, and how each writes a call.
constexpr Known kKnown[] = {
    {"chujiezheng/chatml", false, kNone},
    {"chujiezheng/llama-3-instruct", false, kNone},
    {"chujiezheng/qwen2.5-instruct", true, kHermes},
    {"from_tokenizer_config/gemma", false, kNone},
    {"from_tokenizer_config/llama3.2", true, kLlama3},
    {"from_tokenizer_config/mistral-v0.2-instruct", false, kNone},
    {"from_tokenizer_config/phi-4-mini", false, kNone},  // takes them inside a message
    {"from_tokenizer_config/qwen2.5", true, kHermes},
    {"from_tokenizer_config/qwen3", true, kHermes},
    {"from_tokenizer_config/qwen3.5", true, kNone},  // <function=name><parameter=...>
    {"llama.cpp/GLM-4.6", true, kNone},              // <tool_call>name<arg_key>
    {"llama.cpp/HuggingFaceTB-SmolLM3-3B", false, kNone},
    {"llama.cpp/Kimi-K2-Instruct", true, kNone},
    {"llama.cpp/Mistral-Small-3.2-24B-Instruct-2506", true, kMistral, true},
    {"llama.cpp/NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use", true, kHermes},
    {"llama.cpp/NousResearch-Hermes-3-Llama-3.1-8B-tool_use", true, kHermes},
    {"llama.cpp/Qwen-QwQ-32B", true, kHermes},
    {"llama.cpp/Qwen-Qwen2.5-7B-Instruct", true, kHermes},
    {"llama.cpp/Qwen-Qwen3-0.6B", true, kHermes},
    {"llama.cpp/Qwen3-Coder", true, kNone},
    {"llama.cpp/deepseek-ai-DeepSeek-R1-Distill-Llama-8B", false, kNone},
    {"llama.cpp/deepseek-ai-DeepSeek-V3.1", false, kNone},
    {"llama.cpp/fireworks-ai-llama-3-firefunction-v2", false, kNone},  // functions, not tools
    {"llama.cpp/google-gemma-2-2b-it", false, kNone},
    {"llama.cpp/meta-llama-Llama-3.1-8B-Instruct", true, kLlama3},
    {"llama.cpp/meta-llama-Llama-3.2-3B-Instruct", true, kLlama3},
    {"llama.cpp/meta-llama-Llama-3.3-70B-Instruct", true, kLlama3},
    {"llama.cpp/microsoft-Phi-3.5-mini-instruct", false, kNone},
    {"llama.cpp/mistralai-Ministral-3-14B-Reasoning-2512", true, kMistral, true},
    {"llama.cpp/mistralai-Mistral-Nemo-Instruct-2407", true, kMistral},
    {"llama.cpp/openai-gpt-oss-120b", true, kNone},
    {"llama.cpp/unsloth-mistral-Devstral-Small-2507", true, kMistral, true},
    {"vllm/template_chatml", false, kNone},
    {"vllm/tool_chat_template_granite", true, kNone},
    {"vllm/tool_chat_template_hermes", true, kHermes},
    {"vllm/tool_chat_template_internlm2_tool", true, kNone},
    {"vllm/tool_chat_template_llama3.1_json", true, kLlama3},
    {"vllm/tool_chat_template_llama3.2_json", true, kLlama3},
    {"vllm/tool_chat_template_llama3.2_pythonic", true, kNone},
    {"vllm/tool_chat_template_llama4_pythonic", true, kNone},
    {"vllm/tool_chat_template_mistral", true, kMistral},
    {"vllm/tool_chat_template_mistral3", true, kMistral},
    {"vllm/tool_chat_template_mistral_parallel", true, kMistral},
    {"vllm/tool_chat_template_qwen3coder", true, kNone},
    {"vllm/tool_chat_template_xlam_qwen", true, kNone},
};

TEST(ChatFormatTest, FindsOutWhatTemplatesDoWithTools) {
  const std::filesystem::path dir = "../shared/data/chat_templates";
  if (!std::filesystem::exists(dir)) GTEST_SKIP() << "no ../shared/data/chat_templates";
  for (const Known& known : kKnown) {
    std::ifstream in(dir / (std::string(known.path) + ".jinja"));
    ASSERT_TRUE(in) << known.path;
    std::stringstream text;
    text << in.rdbuf();
    const auto parsed = ChatTemplate::Parse(text.str());
    ASSERT_TRUE(parsed.ok()) << known.path << parsed.status();
    const TemplateTraits traits = ProbeTemplate(*parsed, /*python_tag=*/true);
    EXPECT_EQ(traits.takes_tools, known.takes_tools) << known.path;
    EXPECT_EQ(static_cast<int>(traits.syntax), static_cast<int>(known.syntax)) << known.path;
    EXPECT_EQ(traits.names, known.names) << known.path;
  }
}

constexpr const char* kHermesTemplate =
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{{ m.role }}:{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}|{% endfor "
    "%}";
constexpr const char* kPlainTemplate = "{% for m in messages %}{{ m.role }}:{{ m.content }}|{% endfor %}";

class ByteFormatTest : public ::testing::Test {
 protected:
  ByteFormatTest() : dir_(std::filesystem::temp_directory_path() / ("tidepool-format-" + RandomHexId())) {
    WriteByteModel(dir_);
    tokenizer_ = *Tokenizer::Load(dir_.string());
  }
  ~ByteFormatTest() override { std::filesystem::remove_all(dir_); }

  absl::StatusOr<ChatFormat> Detect(const char* source, const std::string& tools = "auto",
                                    const std::string& reasoning = "auto") {
    ModelConfig config;
    config.tool_parser = tools;
    config.reasoning_parser = reasoning;
    const auto parsed = ChatTemplate::Parse(source);
    EXPECT_TRUE(parsed.ok()) << parsed.status();
    return ChatFormat::Detect(config, *tokenizer_, &*parsed);
  }
  static InferenceRequest Request() {
    InferenceRequest request;
    request.chat = true;
    ChatInput chat;
    chat.messages = OrderedJson::array({{{"role", "user"}, {"content", "hi"}}});
    request.input = std::move(chat);
    request.tools.tools.push_back({.name = "f"});
    request.tools.choice = ToolChoice::kAuto;
    return request;
  }

  const std::filesystem::path dir_;
  std::shared_ptr<const Tokenizer> tokenizer_;
};

TEST_F(ByteFormatTest, ToolsThatATemplateDoesNotShowAreRefused) {
  InferenceRequest request = Request();
  EXPECT_FALSE(Detect(kHermesTemplate)->Check(request));
  const auto error = Detect(kPlainTemplate)->Check(request);
  ASSERT_TRUE(error.has_value());
  EXPECT_EQ(error->status, 400);
  EXPECT_EQ(error->param, "tools");
  // Whatever the configuration says: the model would not know of them.
  EXPECT_TRUE(Detect(kPlainTemplate, "hermes")->Check(request));
  request.tools.choice = ToolChoice::kNone;
  EXPECT_FALSE(Detect(kPlainTemplate)->Check(request));
}

TEST_F(ByteFormatTest, ToolsWhoseCallsCouldNotBeReadAreRefused) {
  const auto error = Detect(kHermesTemplate, "none")->Check(Request());
  ASSERT_TRUE(error.has_value());
  EXPECT_NE(error->message.find("model.tool_parser"), std::string::npos);
}

TEST_F(ByteFormatTest, CallsThatATemplateWouldDropAreRefused) {
  InferenceRequest request = Request();
  request.tools = {};
  auto& messages = std::get<ChatInput>(request.input).messages;
  messages.push_back({{"role", "assistant"}, {"content", ""}, {"tool_calls", OrderedJson::array({1})}});
  EXPECT_FALSE(Detect(kHermesTemplate)->Check(request));
  const auto error = Detect(kPlainTemplate)->Check(request);
  ASSERT_TRUE(error.has_value());
  EXPECT_EQ(error->param, "messages[1].tool_calls");
}

TEST_F(ByteFormatTest, TheConfigurationCounts) {
  EXPECT_EQ(Detect(kHermesTemplate)->tool_syntax(), kHermes);
  EXPECT_EQ(Detect(kHermesTemplate, "mistral")->tool_syntax(), kMistral);
  EXPECT_FALSE(Detect(kHermesTemplate)->reasons());
  EXPECT_TRUE(Detect(kHermesTemplate, "auto", "think")->reasons());
  EXPECT_EQ(Detect(kHermesTemplate, "pythonic").status().code(), absl::StatusCode::kInvalidArgument);
}

TEST_F(ByteFormatTest, APlanHasWhatTheRequestSays) {
  InferenceRequest request = Request();
  request.tools.choice = ToolChoice::kNamed;
  request.tools.parallel = false;
  request.reasoning.include = false;
  auto& chat = std::get<ChatInput>(request.input);
  chat.messages.push_back({{"role", "assistant"}, {"content", "so"}});
  chat.continue_final_message = true;
  const ParserPlan plan = Detect(kHermesTemplate, "auto", "think")->Plan(request);
  EXPECT_EQ(plan.syntax, kHermes);
  EXPECT_EQ(plan.tools, std::vector<std::string>{"f"});
  EXPECT_TRUE(plan.named && plan.reasoning);
  EXPECT_FALSE(plan.parallel || plan.include_reasoning);
  EXPECT_EQ(plan.continued, "so");
  request.tools.choice = ToolChoice::kNone;
  EXPECT_EQ(Detect(kHermesTemplate)->Plan(request).syntax, kNone);
}

}  // namespace
}  // namespace tidepool
