#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "config/config.h"
#include "server/gateway/chat/message_parser.h"
#include "server/gateway/errors.h"
#include "server/gateway/request.h"
#include "server/model/template/chat_template.h"
#include "server/model/text/tokenizer.h"

namespace tidepool {

// TemplateTraits: what a chat template does with tools, found out by rendering a conversation that has some.
struct TemplateTraits {
  bool takes_tools = false;  // the model is shown what tools there are
  bool shows_calls = true;   // and what an earlier turn called; true as well where it cannot be told
  ToolSyntax syntax = ToolSyntax::kNone;
  bool names = false;  // of kMistral: [TOOL_CALLS]name[ARGS]{...} rather than a list of objects
};
// `python_tag`: the vocabulary has Llama 3's <|python_tag|>; a bare object alone does not tell its syntax.
TemplateTraits ProbeTemplate(const ChatTemplate& chat_template, bool python_tag);

// ChatFormat: how the served model writes what is more than text: tool calls and reasoning. Immutable,
// thread-safe. Found by the chat template and the vocabulary, unless the configuration says
// (model.tool_parser, model.reasoning_parser).
class ChatFormat {
 public:
  // A model that has neither.
  ChatFormat() = default;
  // `chat_template`: null where the model has none. Errors: InvalidArgument "model.tool_parser: ...".
  static absl::StatusOr<ChatFormat> Detect(const ModelConfig& config, const Tokenizer& tokenizer,
                                           const ChatTemplate* chat_template);

  ToolSyntax tool_syntax() const { return traits_.syntax; }
  const TemplateTraits& traits() const { return traits_; }
  // <think>...</think> is split off.
  bool reasons() const { return reasons_; }

  // Why this model cannot do what is asked: tools or calls that its template does not show, or calls that we
  // could not read.
  std::optional<ApiError> Check(const InferenceRequest& request) const;

  // What the parsers of the request's choices need to know; for chats.
  ParserPlan Plan(const InferenceRequest& request) const;

  // Special tokens that a parser has to see in the text although others are skipped; for chats.
  const std::vector<int32_t>& KeptTokens() const { return kept_; }
  // The id of one of those by its spelling; nullopt: the vocabulary lacks it, or it is ordinary text.
  std::optional<int32_t> SpecialId(std::string_view piece) const;

 private:
  TemplateTraits traits_;
  bool reasons_ = false;
  std::vector<int32_t> kept_;
  std::vector<std::string_view> kept_pieces_;  // of the same indices; static storage
};

}  // namespace tidepool
