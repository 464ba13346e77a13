#include "server/model/architecture.h"

namespace tidepool {
namespace {

// What every family computed by Transformer shares: anything else than these values would be computed
// wrongly without a word.
constexpr FieldRule kLlamaRules[] = {
    {"hidden_act", R"(["silu", "swish"])"},
    {"attention_bias", "[false]"},
    {"mlp_bias", "[false]"},
    {"sliding_window", "[]"},
    {"use_sliding_window", "[false]"},
    {"partial_rotary_factor", "[1, 1.0]"},
    {"attention_multiplier", "[]"},
    {"logits_scaling", "[1, 1.0]"},
    {"quantization_config", "[]"},
    {"num_local_experts", "[]"},
    {"is_encoder_decoder", "[false]"},
};

constexpr Architecture kArchitectures[] = {{
    // arXiv:2302.13971, as `transformers` stores it.
    .name = "LlamaForCausalLM",
    .embedding = "model.embed_tokens.weight",
    .final_norm = "model.norm.weight",
    .lm_head = "lm_head.weight",
    .attention_norm = "model.layers.{}.input_layernorm.weight",
    .q = "model.layers.{}.self_attn.q_proj.weight",
    .k = "model.layers.{}.self_attn.k_proj.weight",
    .v = "model.layers.{}.self_attn.v_proj.weight",
    .o = "model.layers.{}.self_attn.o_proj.weight",
    .mlp_norm = "model.layers.{}.post_attention_layernorm.weight",
    .gate = "model.layers.{}.mlp.gate_proj.weight",
    .up = "model.layers.{}.mlp.up_proj.weight",
    .down = "model.layers.{}.mlp.down_proj.weight",
    .rules = kLlamaRules,
}};

}  // namespace

std::span<const Architecture> Architectures() { return kArchitectures; }

const Architecture* FindArchitecture(std::string_view name) {
  for (const Architecture& a : kArchitectures) {
    if (a.name == name) return &a;
  }
  return nullptr;
}

}  // namespace tidepool
