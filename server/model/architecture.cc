#include "server/model/architecture.h"

namespace tidepool {
namespace {

constexpr TensorPrefix kPlain[] = {{"model.", ""}};
// As the hub stores it, and as the module tree of transformers >= 4.52 names it.
constexpr TensorPrefix kInsideMultimodal[] = {{"language_model.model.", "language_model."},
                                              {"model.language_model.", ""}};

constexpr FieldRule kCommonRules[] = {
    {"quantization_config", "[]"},  {"is_encoder_decoder", "[false]"}, {"is_causal", "[true]"},
    {"logits_scaling", "[1, 1.0]"}, {"attention_multiplier", "[]"},
};

constexpr std::string_view kSiluOnly = R"(["silu", "swish"])";
constexpr std::string_view kTanhGeluOnly = R"(["gelu_pytorch_tanh"])";

constexpr std::string_view kNoField = "[]";
constexpr std::string_view kFalseOnly = "[false]";
constexpr FieldRule kWholeHeadsRotate = {"partial_rotary_factor", "[1, 1.0]"};

constexpr FieldRule kLlamaRules[] = {
    {"hidden_act", kSiluOnly}, {"sliding_window", kNoField},    {"use_sliding_window", kFalseOnly},
    {"layer_types", kNoField}, {"num_local_experts", kNoField}, kWholeHeadsRotate,
};
constexpr FieldRule kMistralRules[] = {
    {"hidden_act", kSiluOnly}, {"attention_bias", kFalseOnly},
    {"mlp_bias", kFalseOnly},  {"layer_types", kNoField},
    kWholeHeadsRotate,
};
constexpr FieldRule kQwenRules[] = {
    {"hidden_act", kSiluOnly},
    {"mlp_bias", kFalseOnly},
    {"use_mrope", kFalseOnly},
    kWholeHeadsRotate,
};
constexpr FieldRule kQwen3MoeRules[] = {
    {"hidden_act", kSiluOnly},
    {"layer_types", kNoField},
    {"shared_expert_intermediate_size", kNoField},
    kWholeHeadsRotate,
};
constexpr FieldRule kMixtralRules[] = {
    {"hidden_act", kSiluOnly},
    {"attention_bias", kFalseOnly},
    {"layer_types", kNoField},
    kWholeHeadsRotate,
};
constexpr FieldRule kPhi3Rules[] = {
    {"hidden_act", kSiluOnly},     {"attention_bias", kFalseOnly}, {"mlp_bias", kFalseOnly},
    {"lm_head_bias", kFalseOnly},  {"layer_types", kNoField},      {"full_attn_mod", "[1]"},
    {"interpolate_factor", "[1]"},
};
// "gelu" in the oldest Gemma configs means the tanh form, as transformers reads it too.
constexpr FieldRule kGemmaRules[] = {
    {"hidden_act", R"(["gelu", "gelu_pytorch_tanh"])"},
    {"hidden_activation", kTanhGeluOnly},
    {"mlp_bias", kFalseOnly},
    {"sliding_window", kNoField},
    {"layer_types", kNoField},
    {"use_bidirectional_attention", kFalseOnly},
    kWholeHeadsRotate,
};
constexpr FieldRule kGemma2Rules[] = {
    {"hidden_activation", kTanhGeluOnly},        {"mlp_bias", kFalseOnly}, {"sliding_window_pattern", "[2]"},
    {"use_bidirectional_attention", kFalseOnly}, kWholeHeadsRotate,
};
constexpr FieldRule kGemma3Rules[] = {
    {"hidden_activation", kTanhGeluOnly},
    {"mlp_bias", kFalseOnly},
    {"attn_logit_softcapping", kNoField},
    {"use_bidirectional_attention", kFalseOnly},
    kWholeHeadsRotate,
};

// arXiv:2302.13971, as transformers stores it; also SmolLM2, Yi and others of the name. The other rows name
// what differs. The formulas of all are those of transformers' models/*/modeling_*.py.
constexpr Architecture kLlama = {
    .name = "LlamaForCausalLM",
    .family = "llama",
    .prefixes = kPlain,
    .attention_bias = AttentionBias::kConfigField,
    .mlp_bias = true,
    .rules = kLlamaRules,
};

// arXiv:2310.06825
constexpr Architecture Mistral() {
  Architecture a = kLlama;
  a.name = "MistralForCausalLM";
  a.family = "mistral";
  a.defaults = R"({"sliding_window": 4096, "num_key_value_heads": 8})";
  a.attention_bias = AttentionBias::kNone;
  a.mlp_bias = false;
  a.window = WindowRule::kEveryLayer;
  a.rules = kMistralRules;
  return a;
}

// arXiv:2407.10671
constexpr Architecture Qwen2() {
  Architecture a = kLlama;
  a.name = "Qwen2ForCausalLM";
  a.family = "qwen2";
  a.defaults = R"({"sliding_window": 4096, "max_window_layers": 28})";
  a.attention_bias = AttentionBias::kQkv;
  a.mlp_bias = false;
  a.window = WindowRule::kIfUsedBeyond;
  a.rules = kQwenRules;
  return a;
}

// arXiv:2505.09388
constexpr Architecture Qwen3() {
  Architecture a = Qwen2();
  a.name = "Qwen3ForCausalLM";
  a.family = "qwen3";
  a.defaults = R"({"sliding_window": 4096, "max_window_layers": 28, "head_dim": 128})";
  a.attention_bias = AttentionBias::kConfigField;
  a.q_norm = "layers.{}.self_attn.q_norm.weight";
  a.k_norm = "layers.{}.self_attn.k_norm.weight";
  return a;
}

constexpr Architecture Qwen3Moe() {
  Architecture a = Qwen3();
  a.name = "Qwen3MoeForCausalLM";
  a.family = "qwen3_moe";
  a.defaults = R"({"sliding_window": 4096, "num_experts": 128, "num_experts_per_tok": 8,
                   "moe_intermediate_size": 768})";
  a.window = WindowRule::kIfUsed;
  a.router = "layers.{}.mlp.gate.weight";
  a.expert_gate = "layers.{}.mlp.experts.[].gate_proj.weight";
  a.expert_up = "layers.{}.mlp.experts.[].up_proj.weight";
  a.expert_down = "layers.{}.mlp.experts.[].down_proj.weight";
  a.rules = kQwen3MoeRules;
  return a;
}

// arXiv:2401.04088
constexpr Architecture Mixtral() {
  Architecture a = Mistral();
  a.name = "MixtralForCausalLM";
  a.family = "mixtral";
  a.defaults = R"({"num_key_value_heads": 8, "num_experts": 8, "num_experts_per_tok": 2,
                   "rms_norm_eps": 1e-5, "rope_theta": 1000000.0})";
  a.router = "layers.{}.block_sparse_moe.gate.weight";
  a.expert_gate = "layers.{}.block_sparse_moe.experts.[].w1.weight";
  a.expert_up = "layers.{}.block_sparse_moe.experts.[].w3.weight";
  a.expert_down = "layers.{}.block_sparse_moe.experts.[].w2.weight";
  a.renormalise_experts = true;
  a.rules = kMixtralRules;
  return a;
}

// arXiv:2404.14219; longrope: arXiv:2402.13753
constexpr Architecture Phi3() {
  Architecture a = Mistral();
  a.name = "Phi3ForCausalLM";
  a.family = "phi3";
  a.defaults = R"({"original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5})";
  a.q = a.k = a.v = a.gate = a.up = "";
  a.fused_qkv = "layers.{}.self_attn.qkv_proj.weight";
  a.fused_gate_up = "layers.{}.mlp.gate_up_proj.weight";
  a.partial_rotary = true;
  a.rope_types = "longrope";
  a.rules = kPhi3Rules;
  return a;
}

// arXiv:2403.08295
constexpr Architecture Gemma() {
  Architecture a = kLlama;
  a.name = "GemmaForCausalLM";
  a.family = "gemma";
  a.defaults = R"({"head_dim": 256, "tie_word_embeddings": true})";
  a.activation = Activation::kGeluTanh;
  a.mlp_bias = false;
  a.norm_plus_one = true;
  a.scale_embeddings = true;
  a.rules = kGemmaRules;
  return a;
}

// arXiv:2408.00118
constexpr Architecture Gemma2() {
  Architecture a = Gemma();
  a.name = "Gemma2ForCausalLM";
  a.family = "gemma2";
  a.defaults = R"({"num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": true,
                   "sliding_window": 4096, "sliding_window_pattern": 2, "query_pre_attn_scalar": 256,
                   "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0})";
  a.post_attention_norm = "layers.{}.post_attention_layernorm.weight";
  a.mlp_norm = "layers.{}.pre_feedforward_layernorm.weight";
  a.post_mlp_norm = "layers.{}.post_feedforward_layernorm.weight";
  a.query_scalar = true;
  a.attention_softcap = true;
  a.window = WindowRule::kPattern;
  a.rules = kGemma2Rules;
  return a;
}

// arXiv:2503.19786
constexpr Architecture Gemma3() {
  Architecture a = Gemma2();
  a.name = "Gemma3ForCausalLM";
  a.family = "gemma3";
  a.defaults = R"({"vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216,
                   "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4,
                   "head_dim": 256, "max_position_embeddings": 131072, "tie_word_embeddings": true,
                   "sliding_window": 4096, "sliding_window_pattern": 6, "query_pre_attn_scalar": 256,
                   "rope_theta": 1000000.0, "rope_local_base_freq": 10000.0})";
  a.q_norm = "layers.{}.self_attn.q_norm.weight";
  a.k_norm = "layers.{}.self_attn.k_norm.weight";
  a.attention_softcap = false;
  a.local_rope = true;
  a.rules = kGemma3Rules;
  return a;
}

// The text half of the multimodal checkpoints; images are not read.
constexpr Architecture Gemma3Multimodal() {
  Architecture a = Gemma3();
  a.name = "Gemma3ForConditionalGeneration";
  a.family = "gemma3_multimodal";
  a.text_config = "text_config";
  a.prefixes = kInsideMultimodal;
  return a;
}

constexpr Architecture kArchitectures[] = {
    kLlama, Mistral(), Qwen2(),  Qwen3(),  Qwen3Moe(),         Mixtral(),
    Phi3(), Gemma(),   Gemma2(), Gemma3(), Gemma3Multimodal(),
};

}  // namespace

std::span<const Architecture> Architectures() { return kArchitectures; }

std::span<const FieldRule> CommonRules() { return kCommonRules; }

const Architecture* FindArchitecture(std::string_view name) {
  for (const Architecture& a : kArchitectures) {
    if (a.name == name) return &a;
  }
  return nullptr;
}

}  // namespace tidepool
