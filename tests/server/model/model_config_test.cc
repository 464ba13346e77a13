#include "server/model/model_config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>

#include "tests/server/model/tiny_model.h"

namespace tidepool {
namespace {

using nlohmann::json;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

absl::StatusOr<ModelSpec> Parse(const json& config, const std::string& generation = "") {
  return ParseModelSpec(config.dump(), generation, "dir");
}

json With(const std::string& field, const json& value) {
  json c = TinyModel().Config();
  c[field] = value;
  return c;
}

std::string ErrorOf(const json& config) { return std::string(Parse(config).status().message()); }

TEST(ModelConfig, ReadsEveryFieldOfALlama) {
  const auto spec = Parse(TinyModel().Config());
  ASSERT_TRUE(spec.ok()) << spec.status();
  EXPECT_EQ(spec->architecture->name, "LlamaForCausalLM");
  EXPECT_EQ(spec->layers, 2u);
  EXPECT_EQ(spec->hidden, 32u);
  EXPECT_EQ(spec->heads, 4u);
  EXPECT_EQ(spec->kv_heads, 2u);
  EXPECT_EQ(spec->head_dim, 8u);
  EXPECT_EQ(spec->intermediate, 48u);
  EXPECT_EQ(spec->vocab, 96u);
  EXPECT_EQ(spec->max_positions, 512u);
  EXPECT_DOUBLE_EQ(spec->rms_eps, 1e-5);
  EXPECT_FALSE(spec->tie_embeddings);
  EXPECT_EQ(spec->bos_id, 1);
  EXPECT_THAT(spec->eos_ids, ElementsAre(2));
  EXPECT_EQ(LayoutFor(*spec, 32, DType::kBF16).ToString(), "l2 h2 d8 b32 bfloat16");
}

TEST(ModelConfig, HeadDimDefaultsToHiddenByHeadsAndKvHeadsToHeads) {
  json c = TinyModel().Config();
  c.erase("head_dim");
  c.erase("num_key_value_heads");
  const auto spec = Parse(c);
  ASSERT_TRUE(spec.ok()) << spec.status();
  EXPECT_EQ(spec->head_dim, 8u);
  EXPECT_EQ(spec->kv_heads, 4u);
}

TEST(ModelConfig, GenerationConfigsEosListOverrides) {
  const auto spec = Parse(With("eos_token_id", json::array({2, 3})), R"({"eos_token_id": [7, 8, 9]})");
  ASSERT_TRUE(spec.ok());
  EXPECT_THAT(spec->eos_ids, ElementsAre(7, 8, 9));
  const auto without = Parse(With("eos_token_id", json::array({2, 3})), "{}");
  ASSERT_TRUE(without.ok());
  EXPECT_THAT(without->eos_ids, ElementsAre(2, 3));
}

TEST(ModelConfig, RopeParametersOfNewerConfigsGiveTheta) {
  json c = With("rope_parameters", {{"rope_type", "default"}, {"rope_theta", 500000.0}});
  c.erase("rope_theta");
  const auto spec = Parse(c);
  ASSERT_TRUE(spec.ok()) << spec.status();
  EXPECT_DOUBLE_EQ(spec->rope_theta, 500000.0);
}

TEST(ModelConfig, WhatIsNotComputedIsRefusedByNameAndValue) {
  const std::pair<json, std::string> cases[] = {
      {With("architectures", {"MistralForCausalLM"}), "MistralForCausalLM"},
      {With("rope_scaling", {{"rope_type", "llama3"}, {"factor", 8.0}}),
       "rope_scaling.rope_type is \"llama3\""},
      {With("rope_scaling", {{"type", "linear"}, {"factor", 2.0}}), "rope_scaling.type is \"linear\""},
      {With("attention_bias", true), "attention_bias is true"},
      {With("mlp_bias", true), "mlp_bias is true"},
      {With("hidden_act", "gelu"), "hidden_act is \"gelu\""},
      {With("sliding_window", 4096), "sliding_window is 4096"},
      {With("quantization_config", {{"bits", 4}}), "quantization_config is {\"bits\":4}"},
      {With("partial_rotary_factor", 0.5), "partial_rotary_factor is 0.5"},
  };
  for (const auto& [config, text] : cases) {
    const auto spec = Parse(config);
    EXPECT_EQ(spec.status().code(), absl::StatusCode::kUnimplemented) << text;
    EXPECT_THAT(std::string(spec.status().message()), HasSubstr(text));
    EXPECT_THAT(std::string(spec.status().message()), HasSubstr("supported"));
  }
}

TEST(ModelConfig, NumbersOutOfRangeAreRefusedByNameValueAndRange) {
  EXPECT_THAT(ErrorOf(With("num_hidden_layers", -1)),
              HasSubstr("num_hidden_layers is -1; it must be an integer in [1, 1024]"));
  EXPECT_THAT(ErrorOf(With("hidden_size", 1e30)), HasSubstr("hidden_size is 1e+30"));
  EXPECT_THAT(ErrorOf(With("vocab_size", 0)), HasSubstr("vocab_size is 0"));
  EXPECT_THAT(ErrorOf(With("vocab_size", "96")), HasSubstr("vocab_size is \"96\""));
  EXPECT_THAT(ErrorOf(With("intermediate_size", 18446744073709551615ULL)), HasSubstr("intermediate_size"));
  EXPECT_THAT(ErrorOf(With("head_dim", 7)), HasSubstr("head_dim is 7; it must be even"));
  EXPECT_THAT(ErrorOf(With("num_key_value_heads", 3)), HasSubstr("must divide num_attention_heads (4)"));
  EXPECT_THAT(ErrorOf(With("num_key_value_heads", 8)), HasSubstr("[1, 4]"));
  EXPECT_THAT(ErrorOf(With("rms_norm_eps", 1.5)), HasSubstr("rms_norm_eps is 1.5"));
  EXPECT_THAT(ErrorOf(With("rope_theta", 0)), HasSubstr("rope_theta is 0"));
  EXPECT_THAT(ErrorOf(With("tie_word_embeddings", 1)),
              HasSubstr("tie_word_embeddings is 1; it must be true or false"));
  EXPECT_THAT(ErrorOf(With("eos_token_id", "x")), HasSubstr("eos_token_id is \"x\""));
  json missing = TinyModel().Config();
  missing.erase("vocab_size");
  EXPECT_THAT(ErrorOf(missing), HasSubstr("vocab_size is missing"));
}

TEST(ModelConfig, MalformedJsonIsAnErrorThatNamesTheFile) {
  EXPECT_THAT(std::string(ParseModelSpec("{", "", "dir").status().message()), HasSubstr("dir/config.json"));
  EXPECT_THAT(std::string(ParseModelSpec("[]", "", "dir").status().message()),
              HasSubstr("not a JSON object"));
  const std::string deep(100000, '[');
  EXPECT_THAT(std::string(ParseModelSpec(deep, "", "dir").status().message()), HasSubstr("nested deeper"));
  EXPECT_THAT(std::string(ParseModelSpec(R"({"a":1,"a":2})", "", "dir").status().message()),
              HasSubstr("\"a\" twice"));
  EXPECT_THAT(std::string(ParseModelSpec("{\"hidden_act\":\"\xff\"}", "", "dir").status().message()),
              HasSubstr("dir/config.json"));
}

TEST(ModelConfig, NoConfigIsNotFoundAndNamesThePath) {
  const auto spec = LoadModelSpec("/nonexistent/model");
  EXPECT_EQ(spec.status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(spec.status().message()), HasSubstr("/nonexistent/model/config.json"));
}

// Configs as published: each is either computed or refused with a reason, never misread.
TEST(ModelConfig, PublishedConfigsAreReadOrRefusedWithTheirReason) {
  const std::string dir = "../shared/data/hf_configs";
  if (!std::filesystem::exists(dir)) GTEST_SKIP() << dir << " is not there";
  int read = 0, refused = 0;
  for (const auto& entry : std::filesystem::directory_iterator(dir)) {
    if (entry.path().extension() != ".json") continue;
    std::ifstream in(entry.path());
    const std::string text((std::istreambuf_iterator<char>(in)), {});
    const auto spec = ParseModelSpec(text, "", entry.path().string());
    if (spec.ok()) {
      ++read;
      EXPECT_EQ(spec->architecture->name, "LlamaForCausalLM");
    } else {
      ++refused;
      EXPECT_THAT(std::string(spec.status().message()), HasSubstr(entry.path().string()));
    }
  }
  EXPECT_GE(read, 2);  // Llama 2 is plain; Llama 3.x scales its RoPE
  EXPECT_GE(refused, 20);
}

}  // namespace
}  // namespace tidepool
