#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "server/gateway/json.h"

namespace tidepool {

inline constexpr size_t kStopStringsMax = 4;
inline constexpr size_t kStopTokenIdsMax = 128;
inline constexpr size_t kCacheSaltCharsMax = 1024;
inline constexpr int kTopLogprobsMax = 20;
inline constexpr uint32_t kCompletionTokensDefault = 16;  // OpenAI's, for /v1/completions

struct ChatInput {
  OrderedJson messages;  // [{role, content, ...}], content flattened to strings
  OrderedJson template_kwargs = OrderedJson::object();  // whitelisted scalars
  bool add_generation_prompt = true;
  bool continue_final_message = false;
};

// InferenceRequest: what one request asks for, whichever front door it came through. Plain and checked: every
// number is in the range that SURFACE gives it.
struct InferenceRequest {
  std::string model;  // "": the one that is served
  std::variant<std::string, std::vector<int32_t>, ChatInput> input;
  std::optional<bool> add_special_tokens;  // default: text true, chat false (the template writes them)

  std::optional<uint32_t> max_tokens;  // default: text 16, chat what the context leaves
  uint32_t min_tokens = 0;
  float temperature = 1.0f;  // [0, 2]
  int32_t top_k = 0;         // 0: all
  float top_p = 1.0f;        // (0, 1]
  float min_p = 0.0f;        // [0, 1]
  std::optional<uint64_t> seed;

  std::vector<std::string> stop;
  std::vector<int32_t> stop_token_ids;
  bool include_stop_str_in_output = false;
  bool ignore_eos = false;
  bool skip_special_tokens = true;
  int top_logprobs = -1;  // -1: none

  int32_t priority = 0;  // lower is served first, as in vLLM
  std::string cache_salt;

  // How to answer; the HTTP front's.
  bool chat = false;
  bool stream = false;
  bool include_usage = false;
  bool continuous_usage_stats = false;
  bool echo = false;
  bool return_token_ids = false;
  bool return_trace = false;
};

}  // namespace tidepool
