#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "base/block_layout.h"
#include "base/dtype.h"
#include "server/model/architecture.h"
#include "server/model/rope_scaling.h"

namespace tidepool {

// LayerSpec: one decoder layer.
struct LayerSpec {
  uint32_t window = 0;               // keys that a query sees, its own included; 0: all before it
  uint32_t rope = 0;                 // index in ModelSpec::ropes
  uint32_t intermediate = 0;         // [1, 2^22]; of the feed-forward block, or of each expert
  uint32_t experts = 0;              // [0, 4096]; 0: one dense feed-forward block
  uint32_t experts_per_token = 0;    // [1, min(experts, 64)] where experts > 0
  bool renormalise_experts = false;  // the chosen experts' weights are made to sum to 1

  bool operator==(const LayerSpec&) const = default;
};

// ModelSpec: the shape of a decoder-only transformer, as config.json (and generation_config.json) state
// it. Plain, checked: every number is in the range given beside it, and the numbers agree with each other.
struct ModelSpec {
  const Architecture* architecture = nullptr;  // static storage
  uint32_t layers = 0;                         // [1, 1024]
  uint32_t hidden = 0;                         // [1, 2^20]
  uint32_t heads = 0;                          // [1, 4096]
  uint32_t kv_heads = 0;                       // [1, heads], divides heads
  uint32_t head_dim = 0;                       // [2, 1024], even; hidden / heads where not given
  uint32_t intermediate = 0;                   // [1, 2^22]; of dense layers
  uint32_t vocab = 0;                          // [1, 2^24]
  uint32_t max_positions = 0;                  // [1, 2^24]
  // The longest that max_model_len may be: max_positions, or more where scaled rotary positions reach
  // further; [max_positions, 2^24].
  uint32_t max_positions_scaled = 0;
  double rms_eps = 1e-6;  // (0, 1)
  bool tie_embeddings = false;
  bool qkv_bias = false, o_bias = false, mlp_bias = false;
  double attention_scale = 0;          // of q·k: head_dim^-1/2, or query_pre_attn_scalar^-1/2
  double attention_softcap = 0;        // scores become cap * tanh(score / cap); 0: none
  double final_softcap = 0;            // the same for logits
  std::vector<RopeSpec> ropes;         // 1 or 2
  std::vector<LayerSpec> layer_specs;  // `layers` of them
  std::string stored_dtype;            // `dtype` or `torch_dtype` of the config; "" where it has none
  int32_t bos_id = -1;                 // -1: none
  std::vector<int32_t> eos_ids;        // generation_config.json's list where it has one; may be empty
};

// Reads `dir`/config.json and, where there, `dir`/generation_config.json. NotFound: no config.json.
// InvalidArgument: malformed, missing or out of range; the message names file, field, value and range.
// Unimplemented: something we would compute wrongly (another architecture, an unknown RoPE scaling, ...);
// the message names the field, its value and what is supported.
absl::StatusOr<ModelSpec> LoadModelSpec(const std::string& dir);

// The same from memory; `generation_json` may be empty. `where` stands for the directory in errors.
absl::StatusOr<ModelSpec> ParseModelSpec(std::string_view config_json, std::string_view generation_json,
                                         std::string_view where);

// All that is wrong or unsupported in a config, not only the first: ParseModelSpec's errors, one line each.
// Empty where it succeeds.
std::vector<absl::Status> ModelSpecProblems(std::string_view config_json, std::string_view generation_json,
                                            std::string_view where);
std::vector<absl::Status> LoadModelSpecProblems(const std::string& dir);

// Where the KV of this model lies in a block. block_tokens >= 1; kv_dtype kBF16 or kF32.
BlockLayout LayoutFor(const ModelSpec& spec, uint32_t block_tokens, DType kv_dtype);

}  // namespace tidepool
