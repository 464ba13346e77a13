#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "server/gateway/json.h"

namespace tidepool {

inline constexpr uint32_t kChoicesMax = 16;  // n and best_of: each is a sequence of its own
inline constexpr float kRepetitionPenaltyMax = 100;
inline constexpr float kPenaltyMax = 2;         // of presence and frequency, as OpenAI's
inline constexpr float kLogitBiasAbsMax = 100;  // as OpenAI's
inline constexpr size_t kLogitBiasCountMax = 1024;
inline constexpr size_t kAllowedTokenIdsMax = 8192;
inline constexpr size_t kBadWordsCountMax = 128;
inline constexpr size_t kBadWordBytesMax = 256;
// Prompt tokens times (prompt_logprobs + 1): what an answer with the prompt's logprobs may hold.
inline constexpr size_t kPromptLogprobEntriesMax = 1 << 18;
// The same for an echo that is streamed: it is one event, and must fit a client's buffer.
inline constexpr size_t kEchoedLogprobEntriesMax = 1 << 12;
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

  std::optional<uint32_t> max_tokens;  // default: text 16, chat the model's or what the context leaves
  uint32_t min_tokens = 0;
  // What is absent takes the model's default (GenerationDefaults), else what stands here.
  std::optional<float> temperature;         // [0, 2]; 1
  std::optional<int32_t> top_k;             // 0: all
  std::optional<float> top_p;               // (0, 1]; 1
  std::optional<float> min_p;               // [0, 1]; 0
  std::optional<float> repetition_penalty;  // (0, kRepetitionPenaltyMax]; 1
  float typical_p = 1.0f;                   // (0, 1]
  float presence_penalty = 0.0f;            // [-kPenaltyMax, kPenaltyMax]
  float frequency_penalty = 0.0f;           // the same
  std::optional<uint64_t> seed;             // of choice 0; choice i draws with seed + i
  std::vector<std::pair<int32_t, float>> logit_bias;
  std::vector<int32_t> allowed_token_ids;
  std::vector<std::string> bad_words;

  uint32_t n = 1;        // [1, kChoicesMax]
  uint32_t best_of = 1;  // [n, kChoicesMax]: so many are drawn, the n likeliest are given

  std::vector<std::string> stop;
  std::vector<int32_t> stop_token_ids;
  bool include_stop_str_in_output = false;
  bool ignore_eos = false;
  bool skip_special_tokens = true;
  int top_logprobs = -1;     // -1: none
  int prompt_logprobs = -1;  // the same, for the prompt's tokens

  int32_t priority = 0;  // lower is served first, as in vLLM
  std::string cache_salt;

  // How to answer; the HTTP front's.
  bool chat = false;
  bool stream = false;
  bool include_usage = false;
  bool continuous_usage_stats = false;
  bool echo = false;
  bool prompt_only = false;  // max_tokens 0 with echo: nothing of the answer is given
  uint32_t shown = 1;        // choices that each repeat the prompt and what is scored of it
  bool return_token_ids = false;
  bool return_trace = false;

  // What is computed of the prompt's logprobs: echo shows as many as the answer's tokens have.
  int scored() const { return echo ? std::max(prompt_logprobs, top_logprobs) : prompt_logprobs; }
};

}  // namespace tidepool
