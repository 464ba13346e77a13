#pragma once

#include <cstdint>
#include <functional>
#include <nlohmann/json.hpp>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/dtype.h"

namespace tidepool {

// SynthesisShape: a model whose shape is known, for `--like`. Static storage.
struct SynthesisShape {
  std::string_view name;    // "llama-3.2-1b"
  std::string_view config;  // its config.json
};
// All, smallest members of a family first.
std::span<const SynthesisShape> SynthesisShapes();

// What to change in a shape. A changed hidden size takes along what is not given: heads and feed-forward in
// proportion, KV heads as far as they divide the heads.
struct ShapeChanges {
  std::optional<uint32_t> layers, hidden, heads, kv_heads, head_dim, intermediate, vocab, max_positions,
      experts;
  // As many layers as bring the parameters nearest to this; not together with `layers`.
  std::optional<uint64_t> parameters;
};

// The config.json of `like` (a shape's name, or a family's: its first shape) with `changes`. Errors:
// NotFound (the names there are), InvalidArgument (the result is no model, or no number of layers comes
// near).
absl::StatusOr<nlohmann::ordered_json> SynthesisConfig(std::string_view like, const ShapeChanges& changes);
// The same for a config.json of the caller's.
absl::StatusOr<nlohmann::ordered_json> ChangeShape(nlohmann::ordered_json config,
                                                   const ShapeChanges& changes);

struct SynthesisOptions {
  std::string out;  // the directory to make
  uint64_t seed = 0;
  DType dtype = DType::kBF16;
  // Where the tokenizer's files are copied from; "": a byte-level one is written whose every id below the
  // model's vocabulary decodes to letters, with a chat template.
  std::string tokenizer;
  uint64_t shard_bytes_max = uint64_t{5} << 30;  // as transformers cuts
  unsigned threads = 0;                          // 0: as many as there are cores, at most 8
  // After every few MB, from one of the threads at a time; may be empty.
  std::function<void(uint64_t bytes_done, uint64_t bytes_total)> progress;
  // True ends the work with Cancelled; asked by every thread; may be empty.
  std::function<bool()> stop;
};

struct SynthesisResult {
  uint64_t parameters = 0;
  uint64_t weight_bytes = 0;
  uint32_t shards = 0;
};

// Writes a random checkpoint that `config` describes, ready to be served: config.json,
// generation_config.json, safetensors (sharded with an index where larger than a shard), tokenizer.
// Deterministic in (config, seed, dtype), whatever the threads and shards. Matrices are normal with the
// deviation 0.8 / sqrt(inputs), those that end a block smaller by sqrt(2 * layers) (as GPT-2 is initialised),
// embeddings 0.02, norms near what leaves the scale alone: logits are finite and differ.
//
// All is written beside `out` and moved there when complete; nothing is left behind otherwise. Errors: those
// of ParseModelSpec; AlreadyExists (`out` is there and not empty), ResourceExhausted (too little room on the
// disk: both figures), InvalidArgument (vocabulary smaller than the tokenizer's), Cancelled, Unavailable.
absl::StatusOr<SynthesisResult> Synthesize(nlohmann::ordered_json config, const SynthesisOptions& options);

}  // namespace tidepool
