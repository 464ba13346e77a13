#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "config/config.h"
#include "server/gateway/chat/chat_format.h"
#include "server/gateway/request.h"
#include "server/model/strings/marked_text.h"
#include "server/model/template/chat_template.h"
#include "server/model/text/tokenizer.h"

namespace tidepool {

// TextModel: the text half of the served model: tokeniser, chat template, end-of-sequence ids. Immutable,
// thread-safe.
class TextModel {
 public:
  // Errors: as Tokenizer::Load and ChatTemplate::Parse.
  static absl::StatusOr<std::shared_ptr<const TextModel>> Load(const ModelConfig& config);

  const Tokenizer& tokenizer() const { return *tokenizer_; }
  // Of generation_config.json, config.json and the tokeniser, without repetition.
  const std::vector<int32_t>& eos_ids() const { return eos_ids_; }
  const ChatFormat& format() const { return format_; }

  // The prompt that a chat renders to, and which of its bytes are the client's. Errors: InvalidArgument (the
  // template refused), FailedPrecondition (the model has no chat template), ResourceExhausted.
  absl::StatusOr<MarkedText> Render(const ChatInput& chat) const;

  // The ids of a rendered chat. What the client wrote never becomes a special token, however it is spelled.
  absl::StatusOr<std::vector<int32_t>> Encode(const MarkedText& prompt, bool add_special_tokens) const;

 private:
  std::shared_ptr<const Tokenizer> tokenizer_;
  std::optional<ChatTemplate> template_;
  ChatFormat format_;
  std::vector<int32_t> eos_ids_;
};

}  // namespace tidepool
