#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"
#include "config/config.h"
#include "server/model/transformer.h"
#include "server/model/weights.h"

namespace tidepool {

// Model: everything that an engine needs of a loaded model. Immutable, thread-safe, shared.
struct Model {
  std::string name;         // as clients call it
  std::string fingerprint;  // see fingerprint.h
  ModelSpec spec;
  DType kv_dtype = DType::kBF16;  // equals the weights' dtype
  uint32_t max_model_len = 0;     // tokens of prompt and answer
  Transformer transformer;

  BlockLayout Layout(uint32_t block_tokens) const { return LayoutFor(spec, block_tokens, kv_dtype); }
};

// The name under which a model is served: config.name, else the last component of config.path.
std::string ServedModelName(const ModelConfig& config);

// config.max_model_len checked against the model's limit, which is spec.max_positions_scaled. 0 stands for
// spec.max_positions: whether a scaled RoPE was meant to reach further, and is any good there, configs do
// not say reliably; who wants more asks for it.
absl::StatusOr<uint32_t> EffectiveMaxModelLen(const ModelConfig& config, const ModelSpec& spec);

// What is known of a model without its weights in memory.
struct ModelDescription {
  std::string name;
  std::string fingerprint;
  ModelSpec spec;
  DType kv_dtype = DType::kBF16;
  uint32_t max_model_len = 0;

  BlockLayout Layout(uint32_t block_tokens) const { return LayoutFor(spec, block_tokens, kv_dtype); }
};
// As LoadModel, but reads of the weights only what the fingerprint is made of. Same errors.
absl::StatusOr<ModelDescription> DescribeModel(const ModelConfig& config, std::string_view tokenizer_digest);

// What LoadModel would refuse, as far as config files and the weights' headers tell: takes milliseconds.
absl::Status CheckModel(const ModelConfig& config);

// Loads config.path: spec, weights, fingerprint. `tokenizer_digest` is Tokenizer::Digest() (see
// fingerprint.h). `progress` may be empty. Takes as long as reading the checkpoint; errors are those of
// LoadModelSpec, Checkpoint::Open and LoadWeights, prefixed with the path.
absl::StatusOr<std::shared_ptr<const Model>> LoadModel(const ModelConfig& config,
                                                       std::string_view tokenizer_digest,
                                                       const LoadProgress& progress);

}  // namespace tidepool
