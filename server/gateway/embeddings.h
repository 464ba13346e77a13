#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "server/gateway/errors.h"
#include "server/gateway/request.h"
#include "server/model/text/tokenizer.h"

namespace tidepool {

// Embeddings for decoder models (/v1/embeddings, gRPC Embed). An input's vector is made of the hidden states
// after the model's final norm, float32:
//
//   last (default)  that of the input's last token
//   mean            the mean over all of its tokens, special ones included
//
// divided by its Euclidean length unless `normalize` is false: vLLM's defaults for decoder models. Inputs are
// tokenised as prompts are, with what the tokenizer's post-processor adds (add_special_tokens).
//
// `dimensions` must be the model's hidden size: a decoder's vector is not made to be cut off (Matryoshka
// training, which would allow it, is nowhere declared in a checkpoint that we load).

inline constexpr size_t kEmbeddingInputsMax = 2048;         // OpenAI's
inline constexpr uint32_t kEmbeddingTokensMax = 300'000;    // of all inputs; OpenAI's
inline constexpr uint64_t kEmbeddingNumbersMax = 4u << 20;  // of all vectors: 16 MiB, some 50 MiB of JSON
inline constexpr size_t kEmbeddingDimensionsMax = 1u << 20;

// Plain and checked.
struct EmbeddingRequest {
  std::string model;                                                    // "": the one that is served
  std::vector<std::variant<std::string, std::vector<int32_t>>> inputs;  // [1, kEmbeddingInputsMax]
  std::optional<bool> add_special_tokens;                               // of texts; default true
  Pooling pooling = Pooling::kLast;                                     // not kNone
  bool normalize = true;
  std::optional<uint32_t> dimensions;
  RequestClass request_class = RequestClass::kOnline;
  bool metered = true;  // as InferenceRequest::metered
  int32_t priority = 0;
  std::string cache_salt;
  TraceContext trace;
  std::shared_ptr<AccessRecord> record;

  bool base64 = false;  // the HTTP front's: little-endian float32 instead of a list of numbers
};

struct EmbeddingsOutcome {
  std::optional<ApiError> error;
  std::vector<std::vector<float>> vectors;  // in the order of the inputs; without an error all of them
  uint32_t prompt_tokens = 0;               // of all inputs
  uint32_t cached_tokens = 0;
};
using EmbeddingsDone = std::function<void(EmbeddingsOutcome)>;

// OpenAI's body: {model, input, encoding_format, dimensions, user} and, as extensions, {pooling, normalize,
// add_special_tokens, priority, cache_salt}. Pure.
std::variant<EmbeddingRequest, ApiError> ParseEmbeddings(std::string_view body);
// OpenAI's answer. `outcome` has no error.
std::string EmbeddingsBody(const EmbeddingsOutcome& outcome, std::string_view model, bool base64);

using TokenLists = std::vector<std::vector<int32_t>>;
struct EmbeddingModel {
  uint32_t max_model_len = 0;
  uint32_t vocab_size = 0;
  uint32_t hidden_size = 0;  // 0: a worker of an older build, which gives no embeddings
};
// The tokens of each input; an error names the input that is wrong, and its limit.
std::variant<TokenLists, ApiError> TokeniseInputs(const EmbeddingRequest& request, const Tokenizer& tokenizer,
                                                  const EmbeddingModel& model);

}  // namespace tidepool
