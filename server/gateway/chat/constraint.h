#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <variant>

#include "server/gateway/chat/chat_format.h"
#include "server/gateway/errors.h"
#include "server/gateway/request.h"
#include "server/structured/grammar_builder.h"

namespace tidepool {

// Where an answer stands when it begins.
enum class ThoughtState : uint8_t {
  kNone,   // the model does not think, or has finished
  kMay,    // it may begin with <think>
  kInside  // the prompt ends with an open <think>
};
ThoughtState FindThoughtState(const ChatFormat& format, const InferenceRequest& request,
                              std::string_view prompt);

// Whether the request's answer is held to anything.
bool IsConstrained(const InferenceRequest& request);

// The expression that the request's answer has to match: its structured output; with tool_choice required or
// named calls and nothing else; with auto and strict functions text with calls in it, of those functions with
// arguments by their schemas. Thoughts are free, and come first, unless a regex, choice or grammar spells
// </think> and so says what is thought.
//
// A function's arguments are held to its parameters, where these can be: a schema with what we do not support
// is an error of strict functions and structured outputs only; other functions' arguments are any object.
// Response formats hold the text, not the calls that may come in its place.
//
// Errors: 400, naming the field. Needs IsConstrained; `request` fits `format` (ChatFormat::Check).
std::variant<GrammarBuilder::Node, ApiError> BuildConstraint(const InferenceRequest& request,
                                                             const ChatFormat& format, ThoughtState thought,
                                                             GrammarBuilder& builder);

// `field: what`, of a builder's or a compiler's error.
ApiError GrammarError(std::string_view field, const absl::Status& status);

}  // namespace tidepool
