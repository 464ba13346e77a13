#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>

namespace tidepool {

// The tokenizer of a synthesized checkpoint: byte-level, one token a byte, four control tokens at the end of
// the vocabulary, and made-up words between, so that every id that a random model picks decodes to text.
struct SynthesisTokenizer {
  static constexpr uint32_t kVocabMin = 260;

  nlohmann::ordered_json tokenizer;  // tokenizer.json
  nlohmann::ordered_json config;     // tokenizer_config.json, with a chat template
  uint32_t bos_id = 0, eos_id = 0;
};
// vocab >= kVocabMin.
SynthesisTokenizer MakeSynthesisTokenizer(uint32_t vocab);

}  // namespace tidepool
