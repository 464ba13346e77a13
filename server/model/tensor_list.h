#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "server/model/model_config.h"

namespace tidepool {

// What a tensor is for: how to draw random ones, and which decide the compute dtype.
enum class TensorKind : uint8_t { kEmbedding, kMatrix, kNorm, kBias };

// TensorSpec: one tensor that a checkpoint of a model has.
struct TensorSpec {
  std::string name;
  std::vector<int64_t> shape;  // kEmbedding [vocab, hidden], kMatrix [out, in], else [n]
  TensorKind kind = TensorKind::kMatrix;

  int64_t elements() const;
};

// The tensors of a checkpoint of `spec` in the order of the computation: exactly those, a tied head apart.
// `prefix` is one of the architecture's.
std::vector<TensorSpec> ExpectedTensors(const ModelSpec& spec, const TensorPrefix& prefix);
// With the prefix that we write.
std::vector<TensorSpec> ExpectedTensors(const ModelSpec& spec);

// Numbers in the checkpoint: all, and those that one token is multiplied with (experts that are not chosen
// apart). A tied head counts once.
struct ParameterCounts {
  uint64_t total = 0;
  uint64_t active = 0;
};
ParameterCounts CountParameters(const ModelSpec& spec);

// A name of the architecture's table with its layer, and where it has one its expert, filled in.
std::string TensorName(const TensorPrefix& prefix, std::string_view pattern, uint32_t layer = 0,
                       uint32_t expert = 0);
// The bias that belongs to a weight: "x.weight" -> "x.bias".
std::string BiasName(std::string_view weight_name);

}  // namespace tidepool
