#pragma once

#include <span>
#include <string_view>

namespace tidepool {

// A field of config.json whose value changes the computation in a way that we implement for some values
// only. `allowed` is a JSON array of the values that mean what we compute; an absent field is one of them.
struct FieldRule {
  std::string_view field;
  std::string_view allowed;
};

// Architecture: what tells one family of models from another, as data: how its checkpoints name their
// tensors ("{}" stands for the layer), and which settings of its config we compute. A new family that
// shares the computation is a new row of the table.
struct Architecture {
  std::string_view name;  // in config.json's `architectures`

  std::string_view embedding;
  std::string_view final_norm;
  std::string_view lm_head;  // absent from the checkpoint where the embeddings are tied
  std::string_view attention_norm;
  std::string_view q, k, v, o;
  std::string_view mlp_norm;
  std::string_view gate, up, down;

  bool tie_embeddings_default = false;
  double rms_eps_default = 1e-6;
  double rope_theta_default = 10000.0;
  std::span<const FieldRule> rules;
};

// All that we support.
std::span<const Architecture> Architectures();
// nullptr: not supported.
const Architecture* FindArchitecture(std::string_view name);

}  // namespace tidepool
