#pragma once

#include <string>
#include <string_view>
#include <variant>

#include "absl/status/statusor.h"
#include "server/gateway/errors.h"
#include "server/gateway/request.h"

namespace tidepool {

// Codec: OpenAI's request bodies to plain structs. A known field with a wrong type or out of its range is
// refused with an error that names field, limit and fix; a known field that is not served is refused where it
// asks for something; unknown fields are ignored, as peers do. Pure.

template <typename T>
using OrError = std::variant<T, ApiError>;

OrError<InferenceRequest> ParseChatCompletion(std::string_view body);
// The same of an object; what other APIs' requests are converted to.
OrError<InferenceRequest> ReadChatCompletion(const OrderedJson& body);
OrError<InferenceRequest> ParseCompletion(std::string_view body);

// /tokenize (vLLM): {model, prompt | messages, add_special_tokens, return_token_strs}.
struct TokenizeRequest {
  std::string model;
  std::variant<std::string, ChatInput> input;
  bool add_special_tokens = true;  // for messages the default is false
  bool return_token_strs = false;
};
OrError<TokenizeRequest> ParseTokenize(std::string_view body);

// /detokenize (vLLM): {model, tokens}.
struct DetokenizeRequest {
  std::string model;
  std::vector<int32_t> tokens;
};
OrError<DetokenizeRequest> ParseDetokenize(std::string_view body);

// /apply-template (llama.cpp): {messages, add_generation_prompt, chat_template_kwargs}.
OrError<ChatInput> ParseApplyTemplate(std::string_view body);

}  // namespace tidepool
