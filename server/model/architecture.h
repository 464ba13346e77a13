#pragma once

#include <cstdint>
#include <span>
#include <string_view>

namespace tidepool {

// A field of config.json whose value changes the computation in a way that we implement for some values
// only. `allowed` is a JSON array of the values that mean what we compute; an absent field is one of them.
struct FieldRule {
  std::string_view field;
  std::string_view allowed;
};

// What stands before a checkpoint's tensor names. Families saved by different tools have several; the one
// in use is that under which the embedding is found.
struct TensorPrefix {
  std::string_view body;  // of everything but the head: "model."
  std::string_view head;  // "" or "language_model."
};

// The gate of a feed-forward block; silu(x) * up or gelu_tanh(x) * up.
enum class Activation : uint8_t { kSilu, kGeluTanh };

// Which biases a family's attention has.
enum class AttentionBias : uint8_t {
  kNone,
  kQkv,          // q, k and v always
  kConfigField,  // q, k, v and o where `attention_bias` is true
};

// How a config says which layers see a sliding window only, and of what width (`sliding_window`, null: no
// window).
enum class WindowRule : uint8_t {
  kNone,
  kEveryLayer,    // sliding_window alone decides
  kIfUsed,        // use_sliding_window: every layer
  kIfUsedBeyond,  // use_sliding_window: layer_types, else the layers from max_window_layers on
  kPattern,       // layer_types, else all but every `sliding_window_pattern`-th layer
};

// Architecture: what tells one family of models from another, as data: how its checkpoints name their
// tensors ("{}" stands for the layer, "[]" for the expert; "": this family has no such tensor), where its
// norms stand, and which settings of its config we compute. A new family that shares the computation is a
// new row of the table (CONTRIBUTING.md shows one).
struct Architecture {
  std::string_view name;    // in config.json's `architectures`
  std::string_view family;  // as `tidepool model synthesize --like` calls it
  // Where the decoder's fields are: "" for the top level, else the name of a nested object.
  std::string_view text_config;
  // A JSON object: what a field means where config.json does not have it (null is a value: "none"). Sizes
  // that are not listed must be there.
  std::string_view defaults = "{}";

  std::span<const TensorPrefix> prefixes;  // the first is the one that we write
  std::string_view embedding = "embed_tokens.weight";
  std::string_view final_norm = "norm.weight";
  std::string_view lm_head = "lm_head.weight";  // absent from the checkpoint where the embeddings are tied

  std::string_view attention_norm = "layers.{}.input_layernorm.weight";
  std::string_view q = "layers.{}.self_attn.q_proj.weight";
  std::string_view k = "layers.{}.self_attn.k_proj.weight";
  std::string_view v = "layers.{}.self_attn.v_proj.weight";
  std::string_view fused_qkv;  // instead of q, k, v: their rows one after the other
  std::string_view q_norm;     // RMSNorm of each head of q and k before the rotation
  std::string_view k_norm;
  std::string_view o = "layers.{}.self_attn.o_proj.weight";
  std::string_view post_attention_norm;  // of the attention's output, before it is added

  std::string_view mlp_norm = "layers.{}.post_attention_layernorm.weight";
  std::string_view gate = "layers.{}.mlp.gate_proj.weight";
  std::string_view up = "layers.{}.mlp.up_proj.weight";
  std::string_view fused_gate_up;  // instead of gate, up
  std::string_view down = "layers.{}.mlp.down_proj.weight";
  std::string_view post_mlp_norm;  // of the feed-forward's output, before it is added

  std::string_view router;  // of a layer with experts; "": a dense family
  std::string_view expert_gate, expert_up, expert_down;

  Activation activation = Activation::kSilu;
  AttentionBias attention_bias = AttentionBias::kNone;
  bool mlp_bias = false;             // where `mlp_bias` is true
  bool norm_plus_one = false;        // RMSNorm multiplies by 1 + weight
  bool scale_embeddings = false;     // by sqrt(hidden)
  bool query_scalar = false;         // scores are scaled by query_pre_attn_scalar^-1/2, not head_dim^-1/2
  bool attention_softcap = false;    // attn_logit_softcapping is computed
  bool local_rope = false;           // window layers rotate by rope_local_base_freq, unscaled
  bool partial_rotary = false;       // partial_rotary_factor is computed
  bool renormalise_experts = false;  // always; else where norm_topk_prob is true
  WindowRule window = WindowRule::kNone;
  // Values of rope_type that this family computes, space-separated; "default" is always one.
  std::string_view rope_types = "linear dynamic yarn llama3 longrope";
  std::span<const FieldRule> rules;
};

// All that we support.
std::span<const Architecture> Architectures();
// Rules that hold for every one of them, beside its own.
std::span<const FieldRule> CommonRules();
// nullptr: not supported.
const Architecture* FindArchitecture(std::string_view name);

}  // namespace tidepool
