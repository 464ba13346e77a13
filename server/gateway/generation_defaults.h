#pragma once

#include <cstdint>
#include <optional>

#include "absl/status/statusor.h"
#include "config/config.h"

namespace tidepool {

// GenerationDefaults: what the model's makers recommend for requests that leave a parameter out, from
// generation_config.json: the same fields that vLLM takes over with its default --generation-config auto.
// The ranges are those of a request's fields.
struct GenerationDefaults {
  std::optional<float> temperature;
  std::optional<int32_t> top_k;  // 0: all
  std::optional<float> top_p;
  std::optional<float> min_p;
  std::optional<float> repetition_penalty;
  std::optional<uint32_t> max_new_tokens;  // of chats; a completion's default stays OpenAI's
};

// Of `config.path`, unless config.generation_config is "off". Empty where there is no such file. Errors:
// InvalidArgument names the file, the field and what it must be.
absl::StatusOr<GenerationDefaults> LoadGenerationDefaults(const ModelConfig& config);

}  // namespace tidepool
