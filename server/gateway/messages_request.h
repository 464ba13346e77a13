#pragma once

#include <string_view>

#include "server/gateway/openai_request.h"
#include "server/gateway/responses_conversion.h"

namespace tidepool {

// MessagesRequest: a body of POST /v1/messages, checked.
struct MessagesRequest {
  InferenceRequest request;
  FieldNames names;  // for errors that are found later
};

// Codec: Anthropic's Messages API, converted to a chat. Text, tools and thinking are served; pictures,
// documents, server tools and what needs a store are refused by name. Beside Anthropic's fields it takes the
// parameters that chat takes from vLLM (min_p, seed, priority, ...). Pure.
//
// Turns of one role that follow each other are one, as Anthropic says. A last turn of the assistant is gone
// on with. `thinking` switches the template's own thinking on (enabled, adaptive) or off (disabled; where it
// is absent the template decides): budget_tokens is checked, but it is max_tokens that bounds the answer. A
// tool_result with is_error begins with "Error: " for the model, as templates know no other sign.
// cache_control is accepted: prefixes are cached anyway.
OrError<MessagesRequest> ParseMessages(std::string_view body);
// The same of POST /v1/messages/count_tokens, where max_tokens need not be.
OrError<MessagesRequest> ParseCountTokens(std::string_view body);

}  // namespace tidepool
