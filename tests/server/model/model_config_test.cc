#include "server/model/model_config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <set>

#include "tests/server/model/tiny_families.h"

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
  EXPECT_DOUBLE_EQ(spec->ropes[0].theta, 500000.0);
}

TEST(ModelConfig, WhatIsNotComputedIsRefusedByNameAndValue) {
  const std::pair<json, std::string> cases[] = {
      {With("architectures", {"FalconForCausalLM"}), "FalconForCausalLM"},
      {With("rope_scaling", {{"rope_type", "mrope"}}), "rope_scaling.rope_type is \"mrope\""},
      {With("rope_scaling", {{"type", "linear"}, {"factor", 2.0}, {"magic", 1}}), "rope_scaling.magic is 1"},
      {With("rope_scaling", {{"rope_type", "default"}, {"partial_rotary_factor", 0.5}}),
       "rope_scaling.partial_rotary_factor is 0.5"},
      {With("hidden_act", "gelu"), "hidden_act is \"gelu\""},
      {With("sliding_window", 4096), "sliding_window is 4096"},
      {With("quantization_config", {{"bits", 4}}), "quantization_config is {\"bits\":4}"},
      {With("partial_rotary_factor", 0.5), "partial_rotary_factor is 0.5"},
      {FamilyConfig("Gemma3ForCausalLM", {{"attn_logit_softcapping", 50.0}}),
       "attn_logit_softcapping is 50.0"},
      {FamilyConfig("Gemma2ForCausalLM", {{"use_bidirectional_attention", true}}),
       "use_bidirectional_attention is true"},
      {FamilyConfig("Phi3ForCausalLM", {{"rope_scaling", {{"type", "linear"}, {"factor", 2.0}}}}),
       "rope_scaling.type is \"linear\""},
      {FamilyConfig("Qwen2ForCausalLM",
                    {{"layer_types", {"full_attention", "linear_attention", "full_attention"}}}),
       "layer_types[1] is \"linear_attention\""},
      {FamilyConfig("Qwen3MoeForCausalLM", {{"shared_expert_intermediate_size", 64}}),
       "shared_expert_intermediate_size is 64"},
  };
  for (const auto& [config, text] : cases) {
    const auto spec = Parse(config);
    EXPECT_EQ(spec.status().code(), absl::StatusCode::kUnimplemented) << text;
    EXPECT_THAT(std::string(spec.status().message()), HasSubstr(text));
    EXPECT_THAT(std::string(spec.status().message()), HasSubstr("supported"));
  }
}

TEST(ModelConfig, AllProblemsAreListedNotOnlyTheFirst) {
  json c = FamilyConfig("LlamaForCausalLM", {{"hidden_act", "gelu"},
                                             {"quantization_config", {{"bits", 4}}},
                                             {"rope_scaling", {{"rope_type", "mrope"}}},
                                             {"num_hidden_layers", 0}});
  c.erase("vocab_size");
  std::string all;
  const auto problems = ModelSpecProblems(c.dump(), R"({"eos_token_id": "x"})", "dir");
  for (const absl::Status& p : problems) {
    EXPECT_EQ(std::string(p.message()).find('\n'), std::string::npos);
    all += std::string(p.message()) + "\n";
  }
  for (const char* text : {"hidden_act is", "quantization_config is", "rope_scaling.rope_type is",
                           "num_hidden_layers is 0", "vocab_size is missing", "eos_token_id is \"x\""}) {
    EXPECT_THAT(all, HasSubstr(text));
  }
  EXPECT_EQ(problems.size(), 6u) << all;
  EXPECT_TRUE(ModelSpecProblems(FamilyConfig("LlamaForCausalLM").dump(), "", "dir").empty());
}

TEST(ModelConfig, EveryFamilyIsRead) {
  std::set<std::string_view> seen;
  for (const auto& [family, config] : TinyFamilies()) {
    const auto spec = Parse(config);
    ASSERT_TRUE(spec.ok()) << family << ": " << spec.status();
    EXPECT_EQ(spec->architecture->family, family);
    EXPECT_EQ(spec->layer_specs.size(), 3u);
    seen.insert(spec->architecture->name);
  }
  EXPECT_EQ(seen.size(), Architectures().size());
}

std::vector<uint32_t> Windows(const json& config) {
  const auto spec = Parse(config);
  EXPECT_TRUE(spec.ok()) << spec.status();
  std::vector<uint32_t> out;
  if (spec.ok()) {
    for (const LayerSpec& l : spec->layer_specs) out.push_back(l.window);
  }
  return out;
}

TEST(ModelConfig, WindowsFollowEachFamilysRule) {
  const json used = {{"use_sliding_window", true}, {"sliding_window", 8}, {"max_window_layers", 1}};
  json unused = used;
  unused["use_sliding_window"] = false;
  const json listed = {{"use_sliding_window", true},
                       {"sliding_window", 8},
                       {"layer_types", {"sliding_attention", "full_attention", "sliding_attention"}}};
  EXPECT_THAT(Windows(FamilyConfig("MistralForCausalLM", {{"sliding_window", 8}})), ElementsAre(8, 8, 8));
  EXPECT_THAT(Windows(FamilyConfig("MistralForCausalLM", {{"sliding_window", nullptr}})),
              ElementsAre(0, 0, 0));
  // Without the field: the family's default.
  EXPECT_THAT(Windows(FamilyConfig("MistralForCausalLM")), ElementsAre(4096, 4096, 4096));
  EXPECT_THAT(Windows(FamilyConfig("MixtralForCausalLM")), ElementsAre(0, 0, 0));
  EXPECT_THAT(Windows(FamilyConfig("Qwen2ForCausalLM", used)), ElementsAre(0, 8, 8));
  EXPECT_THAT(Windows(FamilyConfig("Qwen2ForCausalLM", unused)), ElementsAre(0, 0, 0));
  EXPECT_THAT(Windows(FamilyConfig("Qwen3ForCausalLM", listed)), ElementsAre(8, 0, 8));
  EXPECT_THAT(Windows(FamilyConfig("Qwen3MoeForCausalLM", used)), ElementsAre(8, 8, 8));
  EXPECT_THAT(Windows(FamilyConfig("Gemma2ForCausalLM")), ElementsAre(4096, 0, 4096));
  EXPECT_THAT(
      Windows(FamilyConfig("Gemma3ForCausalLM", {{"sliding_window_pattern", 3}, {"sliding_window", 8}})),
      ElementsAre(8, 8, 0));
  json bad = listed;
  bad["use_sliding_window"] = false;
  EXPECT_THAT(ErrorOf(FamilyConfig("Qwen2ForCausalLM", bad)), HasSubstr("sliding_window is null or unused"));
  EXPECT_THAT(ErrorOf(FamilyConfig("Qwen2ForCausalLM", {{"layer_types", {"full_attention"}}})),
              HasSubstr("must be a list of 3 names"));
}

TEST(ModelConfig, Gemma3RotatesWindowLayersByABaseOfTheirOwn) {
  const json scaling = {{"rope_type", "linear"}, {"factor", 8.0}};
  const json old_spelling = FamilyConfig("Gemma3ForCausalLM", {{"sliding_window_pattern", 3},
                                                               {"rope_theta", 5e5},
                                                               {"rope_local_base_freq", 1e3},
                                                               {"rope_scaling", scaling}});
  json new_spelling =
      FamilyConfig("Gemma3ForCausalLM",
                   {{"layer_types", {"sliding_attention", "sliding_attention", "full_attention"}},
                    {"rope_parameters",
                     {{"full_attention", {{"rope_type", "linear"}, {"factor", 8.0}, {"rope_theta", 5e5}}},
                      {"sliding_attention", {{"rope_type", "default"}, {"rope_theta", 1e3}}}}}});
  new_spelling.erase("rope_theta");
  for (const json& c : {old_spelling, new_spelling}) {
    const auto spec = Parse(c);
    ASSERT_TRUE(spec.ok()) << spec.status();
    ASSERT_EQ(spec->ropes.size(), 2u);
    EXPECT_EQ(spec->ropes[0].type, RopeType::kLinear);
    EXPECT_EQ(spec->ropes[0].theta, 5e5);
    EXPECT_EQ(spec->ropes[0].factor, 8);
    EXPECT_EQ(spec->ropes[1].type, RopeType::kDefault);
    EXPECT_EQ(spec->ropes[1].theta, 1e3);
    EXPECT_EQ(spec->layer_specs[0].rope, 1u);
    EXPECT_EQ(spec->layer_specs[2].rope, 0u);
    // max_position_embeddings counts the factor already.
    EXPECT_EQ(spec->max_positions_scaled, 512u);
  }
  EXPECT_THAT(ErrorOf(FamilyConfig("Gemma3ForCausalLM", {{"rope_parameters", {{"rope_theta", 1e4}}}})),
              HasSubstr("rope_parameters.rope_theta"));
}

TEST(ModelConfig, AMultimodalConfigsDecoderIsInTextConfig) {
  const json c = {
      {"architectures", {"Gemma3ForConditionalGeneration"}},
      {"eos_token_id", {1, 106}},
      {"torch_dtype", "bfloat16"},
      {"text_config", {{"hidden_size", 2560}, {"num_hidden_layers", 34}, {"sliding_window", 1024}}}};
  const auto spec = Parse(c);
  ASSERT_TRUE(spec.ok()) << spec.status();
  EXPECT_EQ(spec->hidden, 2560u);
  EXPECT_EQ(spec->heads, 8u);  // from here on: defaults of the family
  EXPECT_EQ(spec->head_dim, 256u);
  EXPECT_EQ(spec->vocab, 262208u);
  EXPECT_TRUE(spec->tie_embeddings);
  EXPECT_EQ(spec->stored_dtype, "bfloat16");
  EXPECT_THAT(spec->eos_ids, ElementsAre(1, 106));
  EXPECT_EQ(ExpectedTensors(*spec)[0].name, "language_model.model.embed_tokens.weight");
  EXPECT_THAT(ErrorOf({{"architectures", {"Gemma3ForConditionalGeneration"}}}),
              HasSubstr("text_config is missing"));
}

TEST(ModelConfig, RopeScalingIsReadInBothSpellings) {
  const json llama3 = {{"rope_type", "llama3"},
                       {"factor", 8.0},
                       {"low_freq_factor", 1.0},
                       {"high_freq_factor", 4.0},
                       {"original_max_position_embeddings", 64}};
  json flat = llama3;
  flat["rope_theta"] = 10000.0;
  json new_spelling = FamilyConfig("LlamaForCausalLM", {{"rope_parameters", flat}});
  new_spelling.erase("rope_theta");
  for (const json& c : {FamilyConfig("LlamaForCausalLM", {{"rope_scaling", llama3}}), new_spelling}) {
    const auto spec = Parse(c);
    ASSERT_TRUE(spec.ok()) << spec.status();
    EXPECT_EQ(spec->ropes[0].type, RopeType::kLlama3);
    EXPECT_EQ(spec->ropes[0].original_max_positions, 64u);
    EXPECT_EQ(spec->ropes[0].theta, 10000);
    EXPECT_EQ(spec->max_positions_scaled, 512u);
  }
}

TEST(ModelConfig, AScaledRotationReachesAsFarAsItsFactorSays) {
  const auto reach = [](const json& scaling) {
    const auto spec = Parse(FamilyConfig("LlamaForCausalLM", {{"rope_scaling", scaling}}));
    EXPECT_TRUE(spec.ok()) << spec.status();
    return spec.ok() ? spec->max_positions_scaled : 0;
  };
  EXPECT_EQ(reach({{"type", "linear"}, {"factor", 4}}), 2048u);
  EXPECT_EQ(reach({{"type", "dynamic"}, {"factor", 2.5}}), 1280u);
  EXPECT_EQ(reach({{"type", "yarn"}, {"factor", 4.0}, {"original_max_position_embeddings", 512}}), 2048u);
  // Already counted.
  EXPECT_EQ(reach({{"type", "yarn"}, {"factor", 4.0}, {"original_max_position_embeddings", 128}}), 512u);
}

TEST(ModelConfig, LongropeTakesItsMagnitudeFromTheLengths) {
  const json factors = {
      {"type", "su"}, {"short_factor", {1, 1, 1, 1, 1, 1}}, {"long_factor", {1, 2, 3, 4, 5, 6}}};
  const auto spec = Parse(
      FamilyConfig("Phi3ForCausalLM", {{"original_max_position_embeddings", 64}, {"rope_scaling", factors}}));
  ASSERT_TRUE(spec.ok()) << spec.status();
  EXPECT_EQ(spec->ropes[0].type, RopeType::kLongrope);
  EXPECT_NEAR(spec->ropes[0].attention_factor, std::sqrt(1 + std::log(8.0) / std::log(64.0)), 1e-12);
  json bad = factors;
  bad["long_factor"] = {1, 2};
  EXPECT_THAT(ErrorOf(FamilyConfig("Phi3ForCausalLM", {{"rope_scaling", bad}})),
              HasSubstr("rope_scaling: long_factor is a list of 2: [1,2]; it must be a list of 6 numbers"));
}

TEST(ModelConfig, BadScalingsAreRefusedByFieldAndRange) {
  const auto error = [](json scaling) {
    return ErrorOf(FamilyConfig("LlamaForCausalLM", {{"rope_scaling", std::move(scaling)}}));
  };
  EXPECT_THAT(error({{"type", "linear"}}), HasSubstr("rope_scaling: factor is missing"));
  EXPECT_THAT(error({{"type", "linear"}, {"factor", 0.5}}), HasSubstr("factor is 0.5"));
  EXPECT_THAT(error({{"type", "llama3"}, {"factor", 8}, {"low_freq_factor", 4}, {"high_freq_factor", 1}}),
              HasSubstr("high_freq_factor is 1; it must be above low_freq_factor (4)"));
  EXPECT_THAT(error({{"type", "yarn"}, {"factor", "4"}}), HasSubstr("factor is \"4\""));
  EXPECT_THAT(error(json::array({1})), HasSubstr("rope_scaling is [1]; it must be an object"));
  EXPECT_THAT(error({{"type", 7}}), HasSubstr("rope_scaling.type is 7"));
}

TEST(ModelConfig, SparseLayersFollowStepAndList) {
  const auto experts = [](const json& more) {
    const auto spec = Parse(FamilyConfig("Qwen3MoeForCausalLM", more));
    EXPECT_TRUE(spec.ok()) << spec.status();
    std::vector<uint32_t> out;
    if (spec.ok()) {
      for (const LayerSpec& l : spec->layer_specs) out.push_back(l.experts);
    }
    return out;
  };
  EXPECT_THAT(experts({{"num_experts", 16}}), ElementsAre(16, 16, 16));
  EXPECT_THAT(experts({{"num_local_experts", 16}}), ElementsAre(16, 16, 16));
  EXPECT_THAT(experts({{"num_experts", 16}, {"mlp_only_layers", {0, 2}}}), ElementsAre(0, 16, 0));
  EXPECT_THAT(experts({{"num_experts", 16}, {"decoder_sparse_step", 2}}), ElementsAre(0, 16, 0));
  EXPECT_THAT(experts({{"num_experts", 0}}), ElementsAre(0, 0, 0));
  EXPECT_THAT(ErrorOf(FamilyConfig("Qwen3MoeForCausalLM", {{"num_experts", 4}, {"num_experts_per_tok", 5}})),
              HasSubstr("num_experts_per_tok is 5; it must be an integer in [1, 4]"));
  EXPECT_THAT(
      ErrorOf(FamilyConfig("MixtralForCausalLM", {{"num_local_experts", 4096}, {"num_hidden_layers", 60}})),
      HasSubstr("num_local_experts is 4096 in 60 layers"));
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
    const json config = json::parse(text, nullptr, false);  // one holds `Infinity`, which is not JSON
    const std::string name = config.is_discarded() ? "" : config.at("architectures").at(0).get<std::string>();
    // A family that we compute has no published config here that we would refuse.
    EXPECT_EQ(spec.ok(), FindArchitecture(name) != nullptr) << entry.path() << ": " << spec.status();
    if (spec.ok()) {
      ++read;
      EXPECT_EQ(spec->architecture->name, name);
      EXPECT_GT(CountParameters(*spec).total, 100'000'000u) << entry.path();
    } else {
      ++refused;
      EXPECT_THAT(std::string(spec.status().message()), HasSubstr(entry.path().string()));
      EXPECT_THAT(std::string(spec.status().message()), HasSubstr(name));
    }
  }
  EXPECT_GE(read, 17);
  EXPECT_GE(refused, 20);
}

}  // namespace
}  // namespace tidepool
