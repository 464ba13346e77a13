#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "base/dtype.h"
#include "kernels/linear.h"
#include "server/model/model_config.h"
#include "server/model/safetensors.h"

namespace tidepool {

// How far loading is, in bytes of the checkpoint. Called on the loading thread after every tensor; the
// last call has done == total.
using LoadProgress = std::function<void(uint64_t bytes_done, uint64_t bytes_total)>;

// A gated feed-forward block: down(f(gate(x)) * up(x)).
struct MlpWeights {
  Linear gate_up;  // [2 * intermediate, hidden], gate rows, up rows
  Linear down;     // [hidden, intermediate]
};

// The weights of one transformer layer, packed. Norms and biases are float32 exactly as stored, whatever the
// compute dtype: they are small, and rounding them would only lose accuracy. A norm that multiplies by
// 1 + weight holds the sum. A norm that the architecture does not have is empty.
struct LayerWeights {
  std::vector<float> attention_norm;       // [hidden]
  Linear qkv;                              // [(heads + 2 kv_heads) * head_dim, hidden], q, k, v rows
  std::vector<float> q_norm, k_norm;       // [head_dim]
  Linear o;                                // [hidden, heads * head_dim]
  std::vector<float> post_attention_norm;  // [hidden]
  std::vector<float> mlp_norm;             // [hidden]
  std::optional<Linear> router;            // [experts, hidden]; of a sparse layer
  std::vector<MlpWeights> mlps;            // one, or one for each expert
  std::vector<float> post_mlp_norm;        // [hidden]
};

// All weights of a model (Handle; move-only).
struct Weights {
  DType dtype = DType::kBF16;           // of matrices and embedding: kBF16 or kF32
  std::vector<uint16_t> embedding_b16;  // [vocab, hidden] where dtype is kBF16
  std::vector<float> embedding_f32;     // [vocab, hidden] where dtype is kF32
  std::vector<LayerWeights> layers;
  std::vector<float> final_norm;  // [hidden]
  std::vector<Linear> lm_head;    // exactly one: [vocab, hidden]

  const void* embedding() const {
    return dtype == DType::kBF16 ? static_cast<const void*>(embedding_b16.data()) : embedding_f32.data();
  }
  // Memory held.
  uint64_t bytes() const;
};

// What `model.dtype` asks of this checkpoint: "auto" is kBF16 where every matrix of the model is stored as
// BF16, else kF32 (F16 is widened exactly: rounding it to bf16 would lose 3 bits); "bfloat16" and
// "float32" are what they say (rounding to nearest even, or widening). InvalidArgument for other words.
absl::StatusOr<DType> ComputeDType(std::string_view config_dtype, const ModelSpec& spec,
                                   const Checkpoint& checkpoint);

// Whether LoadWeights would find what it needs, from the headers alone: its errors, without its work.
absl::Status CheckTensors(const Checkpoint& checkpoint, const ModelSpec& spec);

// Reads, converts, fuses and packs. Errors name file and tensor: NotFound (missing), InvalidArgument
// (another shape than the config implies, or a tensor of the decoder that the config does not imply:
// computing without it would give another model's output), Unimplemented (a dtype that we do not read).
// Tensors of other parts (a vision tower) and precomputed rotary frequencies are left alone. Where the
// embeddings are tied and the checkpoint has a head too, that head is used if it differs, as transformers 5
// does.
absl::StatusOr<Weights> LoadWeights(const Checkpoint& checkpoint, const ModelSpec& spec, DType dtype,
                                    const LoadProgress& progress);

}  // namespace tidepool
