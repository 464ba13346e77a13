#pragma once

#include <optional>

#include "absl/status/statusor.h"
#include "server/gateway/request.h"

namespace tidepool {

inline constexpr size_t kStructuredChoicesMax = 4096;

// Codec: what a request's answer is held to, in OpenAI's, vLLM's (present and former), SGLang's and
// llama.cpp's words: response_format, structured_outputs, guided_*, regex, ebnf, grammar, json_schema. At
// most one of them. Errors: InvalidArgument "field: ...". What a schema or a grammar says is looked at when
// it is compiled. Pure.
absl::StatusOr<std::optional<StructuredSpec>> ReadStructured(const OrderedJson& body);

}  // namespace tidepool
