#pragma once

#include <string_view>

#include "server/gateway/openai_request.h"
#include "server/gateway/responses_conversion.h"

namespace tidepool {

// ResponsesRequest: a body of POST /v1/responses, checked.
struct ResponsesRequest {
  InferenceRequest request;
  OrderedJson repeated;  // the fields of the answer that repeat the request's, with their defaults
  FieldNames names;      // for errors that are found later
};

// Codec: OpenAI's Responses API, its stateless half, converted to a chat. Nothing is kept between requests:
// `store` is taken as false where it is absent, and what needs a store (store: true, previous_response_id,
// conversation, background, prompt, item references) is refused by name, as are the built-in tools, pictures
// and files. Beside OpenAI's fields it takes the parameters that chat takes from vLLM (top_k, seed, ...).
//
// Of `input`, what the assistant said in items that follow each other (reasoning, message, function_call) is
// one message of the chat. Pure.
OrError<ResponsesRequest> ParseResponses(std::string_view body);

}  // namespace tidepool
