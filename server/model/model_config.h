#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "base/block_layout.h"
#include "base/dtype.h"
#include "server/model/architecture.h"

namespace tidepool {

// ModelSpec: the shape of a decoder-only transformer, as config.json (and generation_config.json) state
// it. Plain, checked: every number is in the range given beside it, and the numbers agree with each other.
struct ModelSpec {
  const Architecture* architecture = nullptr;  // static storage
  uint32_t layers = 0;                         // [1, 1024]
  uint32_t hidden = 0;                         // [1, 2^20]
  uint32_t heads = 0;                          // [1, 4096]
  uint32_t kv_heads = 0;                       // [1, heads], divides heads
  uint32_t head_dim = 0;                       // [2, 1024], even; hidden / heads where not given
  uint32_t intermediate = 0;                   // [1, 2^22]
  uint32_t vocab = 0;                          // [1, 2^24]
  uint32_t max_positions = 0;                  // [1, 2^24]
  double rms_eps = 1e-6;                       // (0, 1)
  double rope_theta = 10000.0;                 // [1, 1e12]
  bool tie_embeddings = false;
  int32_t bos_id = -1;           // -1: none
  std::vector<int32_t> eos_ids;  // generation_config.json's list where it has one; may be empty
};

// Reads `dir`/config.json and, where there, `dir`/generation_config.json. NotFound: no config.json.
// InvalidArgument: malformed, missing or out of range; the message names file, field, value and range.
// Unimplemented: something we would compute wrongly (another architecture, scaled RoPE, biases, ...); the
// message names the field, its value and what is supported.
absl::StatusOr<ModelSpec> LoadModelSpec(const std::string& dir);

// The same from memory; `generation_json` may be empty. `where` stands for the directory in errors.
absl::StatusOr<ModelSpec> ParseModelSpec(std::string_view config_json, std::string_view generation_json,
                                         std::string_view where);

// Where the KV of this model lies in a block. block_tokens >= 1; kv_dtype kBF16 or kF32.
BlockLayout LayoutFor(const ModelSpec& spec, uint32_t block_tokens, DType kv_dtype);

}  // namespace tidepool
