#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace tidepool {

// How a model stretches its rotary positions beyond the length that it was trained on.
enum class RopeType : uint8_t { kDefault, kLinear, kDynamic, kYarn, kLongrope, kLlama3 };

std::string_view RopeTypeName(RopeType type);

// RopeSpec: one set of rotary frequencies as config.json describes it. Only the fields of its type count.
struct RopeSpec {
  RopeType type = RopeType::kDefault;
  double theta = 10000.0;                            // [1, 1e12]
  uint32_t rotary_dim = 0;                           // even, [2, head_dim]; the rest of a head is not rotated
  uint32_t original_max_positions = 0;               // of kDynamic: max_position_embeddings
  double factor = 1.0;                               // [1, 1e6]
  double attention_factor = 1.0;                     // (0, 1000]; multiplies cos and sin (kYarn, kLongrope)
  double beta_fast = 32, beta_slow = 1;              // kYarn
  bool truncate = true;                              // kYarn
  double low_freq_factor = 1, high_freq_factor = 4;  // kLlama3
  std::vector<double> short_factor, long_factor;     // kLongrope, rotary_dim / 2 each
};

// The frequencies that rotate position p by p * inv_freq[i], rotary_dim / 2 of them, in float32, with the
// roundings of `transformers` (modeling_rope_utils.py): its angles at long positions feel them.
//
// Two types depend on the sequence's length there. KV blocks are shared between sequences of all lengths,
// so here a frequency depends on `max_model_len` (>= 1), the longest sequence served, and on no sequence:
//   kLongrope  long_factor where max_model_len > original_max_positions, else short_factor (as vLLM)
//   kDynamic   the base for a sequence of max_model_len; unscaled up to original_max_positions
std::vector<float> RopeFrequencies(const RopeSpec& rope, uint32_t max_model_len);

// "default", or the type with what matters: "llama3, factor 32".
std::string RopeSummary(const RopeSpec& rope);

}  // namespace tidepool
