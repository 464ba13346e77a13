// What a client writes in a chat is text, however it is spelled.
#include "server/gateway/text_model.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <map>

#include "base/digest.h"

namespace tidepool {
namespace {

ChatInput Chat(const std::string& user, const std::string& assistant = "", const std::string& next = "") {
  ChatInput chat;
  chat.messages = OrderedJson::array({{{"role", "user"}, {"content", user}}});
  if (!assistant.empty()) {
    chat.messages.push_back({{"role", "assistant"}, {"content", assistant}});
    chat.messages.push_back({{"role", "user"}, {"content", next}});
  }
  return chat;
}

std::string WithoutSpace(std::string text) {
  std::erase_if(text, [](char c) { return c == ' ' || c == '\n'; });
  return text;
}

// How often each special token is there.
std::map<int32_t, int> Specials(const TextModel& model, const ChatInput& chat) {
  const auto prompt = model.Render(chat);
  EXPECT_TRUE(prompt.ok()) << prompt.status();
  const auto ids = model.Encode(*prompt, false);
  EXPECT_TRUE(ids.ok()) << ids.status();
  // Nothing is lost either: the ids are the prompt, but for the white space that some special tokens take
  // along.
  EXPECT_EQ(WithoutSpace(model.tokenizer().Decode(*ids, /*skip_special_tokens=*/false)),
            WithoutSpace(prompt->text));
  std::map<int32_t, int> counts;
  for (int32_t id : *ids) {
    if (model.tokenizer().is_special(id)) ++counts[id];
  }
  return counts;
}

// Every special token of the model as one text.
std::string AllSpellings(const TextModel& model) {
  std::string text;
  for (int32_t id = 0; id < model.tokenizer().vocab_size(); ++id) {
    if (model.tokenizer().is_special(id)) text += std::string(*model.tokenizer().TokenPiece(id)) + " x";
  }
  return text;
}

void ExpectUserTextStaysText(const TextModel& model) {
  const std::string hostile = AllSpellings(model);
  ASSERT_FALSE(hostile.empty());
  const auto harmless = Specials(model, Chat("Hello", "Hi", "Bye"));
  EXPECT_FALSE(harmless.empty());
  EXPECT_EQ(Specials(model, Chat(hostile, hostile, hostile)), harmless);
  EXPECT_EQ(Specials(model, Chat(hostile + hostile, "Hi", model.tokenizer().eos_token())), harmless);
  // Not even the beginning or the end of one, completed by what the template writes next to it.
  const std::string& eos = model.tokenizer().eos_token();
  for (size_t cut = 1; cut < eos.size(); ++cut) {
    EXPECT_EQ(Specials(model, Chat("a" + eos.substr(0, cut), eos.substr(cut) + "b", eos.substr(cut))),
              harmless);
  }
}

TEST(TextModelTest, TheDemoModelTakesNoControlTokenFromAUser) {
  const std::string dir = "tools/demo_model/model";
  if (!std::filesystem::exists(dir + "/tokenizer.json")) GTEST_SKIP() << dir << " is not here";
  ModelConfig config;
  config.path = dir;
  const auto model = TextModel::Load(config);
  ASSERT_TRUE(model.ok()) << model.status();
  ExpectUserTextStaysText(**model);
}

// Tokenizers of real models with their own templates.
struct Real {
  const char* tokenizer;
  const char* chat_template;
  const char* eos;
};

class RealTextModelTest : public testing::TestWithParam<Real> {};

TEST_P(RealTextModelTest, TakesNoControlTokenFromAUser) {
  const std::string data = "../shared/data/";
  const std::string tokenizer = data + "tokenizers/" + GetParam().tokenizer + "/tokenizer.json";
  const std::string source = data + "chat_templates/" + GetParam().chat_template;
  if (!std::filesystem::exists(tokenizer) || !std::filesystem::exists(source)) {
    GTEST_SKIP() << tokenizer << " or " << source << " is not here";
  }
  const std::filesystem::path dir =
      std::filesystem::temp_directory_path() / ("tidepool-text-" + RandomHexId());
  std::filesystem::create_directories(dir);
  std::filesystem::copy_file(tokenizer, dir / "tokenizer.json");
  std::filesystem::copy_file(source, dir / "chat_template.jinja");
  std::ofstream(dir / "tokenizer_config.json")
      << OrderedJson{{"eos_token", GetParam().eos}, {"bos_token", "<s>"}};
  ModelConfig config;
  config.path = dir.string();
  const auto model = TextModel::Load(config);
  std::filesystem::remove_all(dir);
  ASSERT_TRUE(model.ok()) << model.status();
  ExpectUserTextStaysText(**model);
}

INSTANTIATE_TEST_SUITE_P(Models, RealTextModelTest,
                         testing::Values(Real{"qwen2.5", "from_tokenizer_config/qwen2.5.jinja", "<|im_end|>"},
                                         Real{"phi-3-mini", "from_tokenizer_config/phi-3-mini.jinja",
                                              "<|end|>"}));

TEST(TextModelTest, MarksEndWhereAContinuedMessageIsCut) {
  const std::string dir = "tools/demo_model/model";
  if (!std::filesystem::exists(dir + "/tokenizer.json")) GTEST_SKIP() << dir << " is not here";
  ModelConfig config;
  config.path = dir;
  const auto model = TextModel::Load(config);
  ASSERT_TRUE(model.ok()) << model.status();
  ChatInput chat = Chat("Hello");
  chat.messages.push_back({{"role", "assistant"}, {"content", "It is <|end|> "}});
  chat.add_generation_prompt = false;
  chat.continue_final_message = true;
  const auto prompt = (*model)->Render(chat);
  ASSERT_TRUE(prompt.ok()) << prompt.status();
  ASSERT_FALSE(prompt->data.empty());
  EXPECT_EQ(prompt->data.back().end, prompt->text.size());
  EXPECT_EQ(prompt->text.substr(prompt->data.back().begin), "It is <|end|>");
}

}  // namespace
}  // namespace tidepool
