// A tiny config of every family, and random checkpoints for them.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "base/rng.h"
#include "server/model/tensor_list.h"
#include "tests/server/model/tiny_model.h"

namespace tidepool {

inline nlohmann::json FamilyConfig(const std::string& architecture, const nlohmann::json& more = {}) {
  nlohmann::json c = {{"architectures", {architecture}},
                      {"hidden_size", 48},
                      {"intermediate_size", 40},
                      {"num_hidden_layers", 3},
                      {"num_attention_heads", 4},
                      {"num_key_value_heads", 2},
                      {"max_position_embeddings", 512},
                      {"vocab_size", 96},
                      {"rms_norm_eps", 1e-5},
                      {"rope_theta", 10000.0},
                      {"tie_word_embeddings", false},
                      {"bos_token_id", 1},
                      {"eos_token_id", 2}};
  if (!more.is_null()) c.update(more);
  return c;
}

// Every row of the table with what sets it apart switched on.
inline std::vector<std::pair<std::string, nlohmann::json>> TinyFamilies() {
  using nlohmann::json;
  const json gemma3 = {{"head_dim", 16},
                       {"sliding_window", 9},
                       {"query_pre_attn_scalar", 20},
                       {"tie_word_embeddings", true},
                       {"rope_scaling", {{"rope_type", "linear"}, {"factor", 8.0}}}};
  json multimodal = {{"architectures", {"Gemma3ForConditionalGeneration"}},
                     {"text_config", FamilyConfig("", gemma3)},
                     {"vision_config", {{"hidden_size", 8}}}};
  multimodal["text_config"].erase("architectures");
  return {
      {"llama", FamilyConfig("LlamaForCausalLM", {{"attention_bias", true}, {"mlp_bias", true}})},
      {"mistral", FamilyConfig("MistralForCausalLM", {{"head_dim", 16}, {"sliding_window", 11}})},
      {"qwen2",
       FamilyConfig("Qwen2ForCausalLM",
                    {{"use_sliding_window", true}, {"sliding_window", 7}, {"max_window_layers", 1}})},
      {"qwen3", FamilyConfig("Qwen3ForCausalLM", {{"head_dim", 16}})},
      {"qwen3_moe", FamilyConfig("Qwen3MoeForCausalLM", {{"head_dim", 16},
                                                         {"num_experts", 6},
                                                         {"num_experts_per_tok", 3},
                                                         {"moe_intermediate_size", 16},
                                                         {"mlp_only_layers", {1}}})},
      {"mixtral", FamilyConfig("MixtralForCausalLM", {{"num_local_experts", 4}, {"sliding_window", 20}})},
      {"phi3",
       FamilyConfig("Phi3ForCausalLM",
                    {{"original_max_position_embeddings", 64},
                     {"partial_rotary_factor", 0.5},
                     {"rope_scaling",
                      {{"type", "longrope"}, {"short_factor", {1, 1, 1.1}}, {"long_factor", {1, 2, 4}}}}})},
      {"gemma", FamilyConfig("GemmaForCausalLM", {{"head_dim", 16}, {"hidden_act", "gelu"}})},
      {"gemma2", FamilyConfig("Gemma2ForCausalLM", {{"head_dim", 16},
                                                    {"sliding_window", 10},
                                                    {"attn_logit_softcapping", 4.0},
                                                    {"final_logit_softcapping", 12.0},
                                                    {"query_pre_attn_scalar", 20}})},
      {"gemma3", FamilyConfig("Gemma3ForCausalLM", gemma3)},
      {"gemma3_multimodal", multimodal},
  };
}

// Random values for all tensors that a config implies. Multiples of 1/1024: exact in every dtype but bf16.
inline TestTensors RandomTensors(const nlohmann::json& config, uint64_t seed = 1) {
  const auto spec = ParseModelSpec(config.dump(), "", "tiny");
  TestTensors out;
  if (!spec.ok()) return out;
  Rng rng(seed);
  for (const TensorSpec& t : ExpectedTensors(*spec)) {
    TestTensor tensor{t.shape, {}};
    const float center = t.kind == TensorKind::kNorm && !spec->architecture->norm_plus_one ? 1.0f : 0.0f;
    const float range = t.kind == TensorKind::kEmbedding ? 0.8f : 0.3f;
    for (int64_t i = 0; i < t.elements(); ++i) {
      const float v = static_cast<float>(rng.Uniform() * 2 - 1) * range;
      tensor.values.push_back(center + std::round(v * 1024) / 1024);
    }
    out[t.name] = std::move(tensor);
  }
  return out;
}

inline void WriteRandomModel(const std::string& dir, const nlohmann::json& config,
                             const std::string& dtype = "F32") {
  WriteFile(dir + "/config.json", config.dump());
  WriteFile(dir + "/model.safetensors", EncodeTensors(RandomTensors(config), dtype));
}

}  // namespace tidepool
