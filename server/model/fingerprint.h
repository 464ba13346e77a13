#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "base/dtype.h"
#include "server/model/model_config.h"
#include "server/model/safetensors.h"

namespace tidepool {

// A checkpoint up to this size is hashed whole.
inline constexpr uint64_t kFingerprintWholeBytesMax = 64ULL << 20;
// Of a larger one, this many runs of this many bytes are hashed per tensor, spread evenly from its first
// byte to its last (the whole tensor where it is no longer than that).
inline constexpr uint64_t kFingerprintSamples = 16;
inline constexpr uint64_t kFingerprintSampleBytes = 4096;

// The model's identity, 64 hex digits: SHA-256 over, each length-prefixed,
//   a version tag; the config fields that enter the computation (architecture, sizes, eps, tying, biases,
//   scales, every layer's window, rotation and experts); the rotary frequencies as they are for
//   `max_model_len` (see RopeFrequencies): two servers of one checkpoint that rotate differently must not
//   exchange KV;
//   the tokenizer's digest; the compute dtype;
//   the weights' manifest in order of name: name, dtype, shape, and the contents (see above).
// How the tensors are spread over files does not matter, nor do fields that leave KV alone (eos ids,
// max_position_embeddings). Sampling detects another training run, not an adversary who edits a few bytes
// of a large checkpoint.
std::string ModelFingerprint(const ModelSpec& spec, std::string_view tokenizer_digest, DType compute_dtype,
                             const Checkpoint& checkpoint, uint32_t max_model_len);

}  // namespace tidepool
