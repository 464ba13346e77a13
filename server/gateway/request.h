#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "base/trace.h"
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
inline constexpr size_t kToolsMax = 128;                  // OpenAI's
inline constexpr size_t kToolNameBytesMax = 64;           // of [a-zA-Z0-9_-]; OpenAI's
inline constexpr size_t kMetadataPairsMax = 16, kMetadataKeyChars = 64,
                        kMetadataValueChars = 512;  // OpenAI's

class AccessRecord;

struct ChatInput {
  OrderedJson messages;  // [{role, content, ...}], content flattened to strings, calls' arguments parsed
  // [{type: function, function: {name, description, parameters}}], as templates expect them; null: none.
  OrderedJson tools;
  OrderedJson template_kwargs = OrderedJson::object();  // whitelisted scalars
  bool add_generation_prompt = true;
  bool continue_final_message = false;
};

// Tool: a function that the model may call.
struct Tool {
  std::string name;  // kToolNameBytesMax of [a-zA-Z0-9_-]
  std::string description;
  OrderedJson parameters;  // a JSON schema, an object; null: whatever the model likes
  bool strict = false;     // arguments are held to the schema
  std::string field = {};  // of the request, that errors in the schema name
};

enum class ToolChoice : uint8_t {
  kNone,      // no call is looked for
  kAuto,      // the model decides
  kRequired,  // at least one call, and nothing else
  kNamed,     // one call of the only tool
};

struct ToolOptions {
  std::vector<Tool> tools;  // names differ; kNamed and allowed_tools leave those that may be called
  ToolChoice choice = ToolChoice::kNone;
  bool parallel = true;  // several calls in one answer

  bool active() const { return choice != ToolChoice::kNone; }
};

// StructuredSpec: what the answer is held to.
struct StructuredSpec {
  enum class Kind : uint8_t { kJsonObject, kJsonSchema, kRegex, kChoice, kGrammar };
  Kind kind = Kind::kJsonObject;
  std::string field;                 // of the request, that errors name
  OrderedJson schema;                // kJsonSchema: an object or a boolean
  std::string text;                  // kRegex: the whole answer matches; kGrammar: GBNF
  std::vector<std::string> choices;  // kChoice
  std::string name;                  // of the schema, as the client calls it
  bool compact = false;              // JSON without white space between its tokens
};

struct ReasoningOptions {
  std::string effort;   // none, minimal, low, medium, high, xhigh; "" where the client says nothing
  bool include = true;  // false: the answer comes without
};

// What yields to what: batch requests run in the room that online ones leave, at every stage.
enum class RequestClass : uint8_t { kOnline, kBatch };

// What of the prompt is wanted instead of an answer; embeddings.h says how each is computed.
enum class Pooling : uint8_t { kNone, kLast, kMean };

// InferenceRequest: what one request asks for, whichever front door it came through. Plain and checked: every
// number is in the range that SURFACE gives it.
struct InferenceRequest {
  std::string model;  // "": the one that is served
  std::variant<std::string, std::vector<int32_t>, ChatInput> input;
  // Further prompts of /v1/completions: prompt p's choices are p * n to p * n + n - 1.
  std::vector<std::variant<std::string, std::vector<int32_t>>> more_prompts;
  // Keep the prompt's last so many tokens; -1: what the context takes with max_tokens.
  std::optional<int32_t> truncate_prompt_tokens;
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

  ToolOptions tools;
  std::optional<StructuredSpec> structured;
  ReasoningOptions reasoning;

  Pooling pooling = Pooling::kNone;  // set by StartEmbeddings; then nothing is drawn
  bool normalize = true;             // the pooled vector to length 1

  RequestClass request_class = RequestClass::kOnline;
  bool metered = true;   // against its tenant's limits; a batch's lines are not: their batch has its own
  int32_t priority = 0;  // lower is served first, as in vLLM; inside the class
  TraceContext trace;    // the client's; the default one where it sent none
  std::string cache_salt;
  std::string session;     // what the client calls the conversation by; "": nothing. A hint of what to keep
  std::string request_id;  // the client's own, where it gave one; takes X-Request-Id's place
  std::vector<std::pair<std::string, std::string>> metadata;
  std::string service_tier;  // auto, default; "": not asked for

  // Where what is logged of the request is collected; null: nowhere.
  std::shared_ptr<AccessRecord> record;

  // How to answer; the HTTP front's.
  bool chat = false;
  bool stream = false;
  bool include_usage = false;
  bool continuous_usage_stats = false;
  bool echo = false;
  bool prompt_only = false;  // max_tokens 0 with echo: nothing of the answer is given
  uint32_t shown = 1;        // choices that each repeat the prompt and what is scored of it
  bool return_token_ids = false;
  bool tokens_as_ids = false;  // logprobs name tokens token_id:N
  bool return_trace = false;

  // Of all prompts.
  uint32_t choices() const { return n * static_cast<uint32_t>(1 + more_prompts.size()); }
  // What is computed of the prompt's logprobs: echo shows as many as the answer's tokens have.
  int scored() const { return echo ? std::max(prompt_logprobs, top_logprobs) : prompt_logprobs; }
};

}  // namespace tidepool
