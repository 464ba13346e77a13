#include "server/model/tensor_list.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <set>

#include "tests/server/model/tiny_families.h"

namespace tidepool {
namespace {

using nlohmann::json;
using ::testing::Contains;
using ::testing::ElementsAre;
using ::testing::Not;

ModelSpec Spec(const json& config) {
  const auto spec = ParseModelSpec(config.dump(), "", "dir");
  EXPECT_TRUE(spec.ok()) << spec.status();
  return spec.ok() ? *spec : ModelSpec();
}

std::set<std::string> Names(const json& config) {
  std::set<std::string> out;
  for (const TensorSpec& t : ExpectedTensors(Spec(config))) EXPECT_TRUE(out.insert(t.name).second) << t.name;
  return out;
}

TEST(TensorList, NamesAreUniqueAndShapesPositiveInEveryFamily) {
  for (const auto& [family, config] : TinyFamilies()) {
    for (const TensorSpec& t : ExpectedTensors(Spec(config))) {
      EXPECT_GT(t.elements(), 0) << family << " " << t.name;
      EXPECT_EQ(t.name.find_first_of("{}[]"), std::string::npos) << family << " " << t.name;
    }
    EXPECT_FALSE(Names(config).empty());
  }
}

TEST(TensorList, BiasesFollowTheFamilyAndTheConfig) {
  const std::string q = "model.layers.0.self_attn.q_proj.bias", o = "model.layers.0.self_attn.o_proj.bias",
                    up = "model.layers.0.mlp.up_proj.bias";
  auto names = Names(FamilyConfig("LlamaForCausalLM"));
  EXPECT_FALSE(names.contains(q) || names.contains(o) || names.contains(up));
  names = Names(FamilyConfig("LlamaForCausalLM", {{"attention_bias", true}, {"mlp_bias", true}}));
  EXPECT_TRUE(names.contains(q) && names.contains(o) && names.contains(up));
  names = Names(FamilyConfig("Qwen2ForCausalLM"));
  EXPECT_TRUE(names.contains(q));
  EXPECT_FALSE(names.contains(o) || names.contains(up));
}

TEST(TensorList, ATiedHeadIsNotListed) {
  EXPECT_THAT(Names(FamilyConfig("LlamaForCausalLM")), Contains("lm_head.weight"));
  EXPECT_THAT(Names(FamilyConfig("LlamaForCausalLM", {{"tie_word_embeddings", true}})),
              Not(Contains("lm_head.weight")));
}

TEST(TensorList, FusedAndExpertTensorsHaveTheHubsNamesAndShapes) {
  const auto find = [](const json& config, const std::string& name) {
    for (const TensorSpec& t : ExpectedTensors(Spec(config))) {
      if (t.name == name) return t.shape;
    }
    return std::vector<int64_t>();
  };
  // 4 heads and twice 2 kv heads of 12.
  EXPECT_THAT(find(FamilyConfig("Phi3ForCausalLM"), "model.layers.2.self_attn.qkv_proj.weight"),
              ElementsAre(96, 48));
  EXPECT_THAT(find(FamilyConfig("Phi3ForCausalLM"), "model.layers.2.mlp.gate_up_proj.weight"),
              ElementsAre(80, 48));
  const json moe = FamilyConfig("MixtralForCausalLM", {{"num_local_experts", 4}});
  EXPECT_THAT(find(moe, "model.layers.1.block_sparse_moe.gate.weight"), ElementsAre(4, 48));
  EXPECT_THAT(find(moe, "model.layers.1.block_sparse_moe.experts.3.w2.weight"), ElementsAre(48, 40));
}

// Totals as the hub counts them for these shapes.
TEST(TensorList, ParameterCountsOfPublishedModelsAreRight) {
  struct Published {
    const char* name;
    json config;
    uint64_t total;
  };
  const auto with = [](const char* architecture, json fields) {
    fields["architectures"] = {architecture};
    fields["max_position_embeddings"] = 4096;
    return fields;
  };
  const Published models[] = {
      {"Llama-3.2-3B",
       with("LlamaForCausalLM", {{"hidden_size", 3072},
                                 {"intermediate_size", 8192},
                                 {"num_hidden_layers", 28},
                                 {"num_attention_heads", 24},
                                 {"num_key_value_heads", 8},
                                 {"vocab_size", 128256},
                                 {"tie_word_embeddings", true}}),
       3'212'749'824},
      {"Mistral-7B",
       with("MistralForCausalLM", {{"hidden_size", 4096},
                                   {"intermediate_size", 14336},
                                   {"num_hidden_layers", 32},
                                   {"num_attention_heads", 32},
                                   {"num_key_value_heads", 8},
                                   {"vocab_size", 32000}}),
       7'241'732'096},
      {"Qwen2.5-7B",
       with("Qwen2ForCausalLM", {{"hidden_size", 3584},
                                 {"intermediate_size", 18944},
                                 {"num_hidden_layers", 28},
                                 {"num_attention_heads", 28},
                                 {"num_key_value_heads", 4},
                                 {"vocab_size", 152064}}),
       7'615'616'512},
      {"Qwen3-4B",
       with("Qwen3ForCausalLM", {{"hidden_size", 2560},
                                 {"intermediate_size", 9728},
                                 {"num_hidden_layers", 36},
                                 {"num_attention_heads", 32},
                                 {"num_key_value_heads", 8},
                                 {"head_dim", 128},
                                 {"vocab_size", 151936},
                                 {"tie_word_embeddings", true}}),
       4'022'468'096},
      {"Phi-3-mini",
       with("Phi3ForCausalLM", {{"hidden_size", 3072},
                                {"intermediate_size", 8192},
                                {"num_hidden_layers", 32},
                                {"num_attention_heads", 32},
                                {"num_key_value_heads", 32},
                                {"vocab_size", 32064}}),
       3'821'079'552},
      {"Gemma-2-2B",
       with("Gemma2ForCausalLM", {{"hidden_size", 2304},
                                  {"intermediate_size", 9216},
                                  {"num_hidden_layers", 26},
                                  {"num_attention_heads", 8},
                                  {"num_key_value_heads", 4},
                                  {"vocab_size", 256000}}),
       2'614'341'888},
      {"Mixtral-8x7B",
       with("MixtralForCausalLM", {{"hidden_size", 4096},
                                   {"intermediate_size", 14336},
                                   {"num_hidden_layers", 32},
                                   {"num_attention_heads", 32},
                                   {"num_key_value_heads", 8},
                                   {"vocab_size", 32000},
                                   {"num_local_experts", 8}}),
       46'702'792'704},
      {"Qwen3-30B-A3B",
       with("Qwen3MoeForCausalLM", {{"hidden_size", 2048},
                                    {"intermediate_size", 6144},
                                    {"num_hidden_layers", 48},
                                    {"num_attention_heads", 32},
                                    {"num_key_value_heads", 4},
                                    {"head_dim", 128},
                                    {"vocab_size", 151936},
                                    {"num_experts", 128},
                                    {"moe_intermediate_size", 768}}),
       30'532'122'624},
  };
  for (const Published& m : models) {
    const ParameterCounts counts = CountParameters(Spec(m.config));
    EXPECT_EQ(counts.total, m.total) << m.name;
    EXPECT_LE(counts.active, counts.total) << m.name;
  }
  // "A3B": of 128 experts 8 are chosen.
  EXPECT_NEAR(static_cast<double>(CountParameters(Spec(models[7].config)).active), 3.35e9, 0.02e9);
}

}  // namespace
}  // namespace tidepool
