#include "server/gateway/text_model.h"

#include <algorithm>

#include "base/log.h"
#include "base/status.h"
#include "server/model/model_config.h"

namespace tidepool {

namespace {

void Truncate(size_t bytes, MarkedText& marked) {
  marked.text.resize(bytes);
  while (!marked.data.empty() && marked.data.back().begin >= bytes) marked.data.pop_back();
  if (!marked.data.empty()) marked.data.back().end = std::min(marked.data.back().end, bytes);
}

}  // namespace

absl::StatusOr<std::shared_ptr<const TextModel>> TextModel::Load(const ModelConfig& config) {
  auto model = std::make_shared<TextModel>();
  const std::string dir = config.tokenizer.empty() ? config.path : config.tokenizer;
  if (dir.empty()) return absl::InvalidArgumentError("model.path: the gateway needs the model's directory");
  TP_ASSIGN_OR_RETURN(model->tokenizer_, Tokenizer::Load(dir));
  if (const std::string& source = model->tokenizer_->chat_template(); !source.empty()) {
    auto parsed = ChatTemplate::Parse(source);
    if (!parsed.ok()) return Annotate(parsed.status(), dir);
    model->template_ = *std::move(parsed);
  }
  TP_ASSIGN_OR_RETURN(model->format_, ChatFormat::Detect(config, *model->tokenizer_,
                                                         model->template_ ? &*model->template_ : nullptr));
  if (const auto eos = model->tokenizer_->eos_id()) model->eos_ids_.push_back(*eos);
  // A directory with only a tokeniser serves too: the workers judge the model itself.
  if (const auto spec = LoadModelSpec(config.path); spec.ok()) {
    for (int32_t id : spec->eos_ids) {
      if (std::ranges::find(model->eos_ids_, id) == model->eos_ids_.end()) model->eos_ids_.push_back(id);
    }
  } else {
    spdlog::warn("end-of-sequence ids come from the tokeniser alone: {}",
                 std::string(spec.status().message()));
  }
  if (model->eos_ids_.empty())
    spdlog::warn("the model names no end-of-sequence token: answers end by length");
  return std::shared_ptr<const TextModel>(std::move(model));
}

absl::StatusOr<MarkedText> TextModel::Render(const ChatInput& chat) const {
  if (!template_) {
    return absl::FailedPreconditionError("the model has no chat template; use /v1/completions");
  }
  OrderedJson request = chat.template_kwargs;
  request["messages"] = chat.messages;
  if (!chat.tools.is_null()) {
    if (!format_.traits().takes_tools) {
      return absl::InvalidArgumentError(
          "tools: the model's chat template does not take them; leave them out");
    }
    request["tools"] = chat.tools;
  }
  const OrderedJson trusted = {{"add_generation_prompt", chat.add_generation_prompt},
                               {"bos_token", tokenizer_->bos_token()},
                               {"eos_token", tokenizer_->eos_token()}};
  TP_ASSIGN_OR_RETURN(MarkedText prompt, template_->Render(request, trusted));
  if (chat.continue_final_message) {
    // Cut what the template puts after the last message, so that the model goes on writing it.
    const std::string text = chat.messages.back()["content"].get<std::string>();
    size_t at = prompt.text.rfind(text);
    size_t length = text.size();
    if (at == std::string::npos) {
      // Templates often strip messages.
      const size_t end = text.find_last_not_of(" \t\r\n");
      const size_t begin = text.find_first_not_of(" \t\r\n");
      if (begin != std::string::npos) {
        length = end - begin + 1;
        at = prompt.text.rfind(text.substr(begin, length));
      }
    }
    if (at == std::string::npos) {
      return absl::InvalidArgumentError(
          "continue_final_message: the chat template does not show the last message as it is");
    }
    Truncate(at + length, prompt);
  }
  return prompt;
}

absl::StatusOr<std::vector<int32_t>> TextModel::Encode(const MarkedText& prompt,
                                                       bool add_special_tokens) const {
  Tokenizer::EncodeOptions options;
  options.add_special_tokens = add_special_tokens;
  options.data = prompt.data;
  return tokenizer_->Encode(prompt.text, options);
}

}  // namespace tidepool
