#include "server/gateway/openai_request.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "server/gateway/chat/read_messages.h"
#include "server/gateway/chat/read_structured.h"
#include "server/gateway/chat/read_tools.h"
#include "server/gateway/field_reader.h"
#include "server/gateway/openai_fields.h"

namespace tidepool {
namespace {

constexpr size_t kNameChars = 256;
constexpr size_t kRequestIdChars = 128;
// Bounded by the body's size anyway; this is for the count of numbers.
constexpr size_t kPromptIdsMax = 4u << 20;
constexpr size_t kAnyChars = std::numeric_limits<size_t>::max();
constexpr int64_t kTokensMax = 1 << 24;

// `tools`: what the request's are, where the caller wants to know.
absl::StatusOr<ChatInput> ReadChatInput(const OrderedJson& body, ToolOptions* tools = nullptr) {
  ChatInput chat;
  ToolOptions unused;
  TP_RETURN_IF_ERROR(ReadTools(body, tools == nullptr ? unused : *tools, chat));
  const FieldReader fields(body);
  TP_ASSIGN_OR_RETURN(chat.messages, ReadMessages(body));
  TP_ASSIGN_OR_RETURN(const auto generation, fields.Bool("add_generation_prompt"));
  TP_ASSIGN_OR_RETURN(const auto go_on, fields.Bool("continue_final_message"));
  chat.continue_final_message = go_on.value_or(false);
  chat.add_generation_prompt = generation.value_or(!chat.continue_final_message);
  if (chat.continue_final_message) {
    if (chat.add_generation_prompt) {
      return FieldError("continue_final_message",
                        "cannot be combined with add_generation_prompt; set that to false");
    }
    const OrderedJson& last = chat.messages.back();
    if (last["role"] != "assistant" || !last["content"].is_string()) {
      return FieldError("continue_final_message",
                        "needs a last message with role assistant and text content");
    }
  }
  if (const OrderedJson* kwargs = fields.Find("chat_template_kwargs")) {
    if (!kwargs->is_object()) return FieldError("chat_template_kwargs", "must be an object");
    if (kwargs->size() > 32) return FieldError("chat_template_kwargs", "must have at most 32 entries");
    for (const auto& [key, value] : kwargs->items()) {
      // Scalars only, and nothing that the server itself puts into the template's context.
      static constexpr std::string_view kReserved[] = {
          "messages",  "tools",     "documents",    "add_generation_prompt",
          "bos_token", "eos_token", "chat_template"};
      for (std::string_view reserved : kReserved) {
        if (key == reserved) return FieldError("chat_template_kwargs", "'" + key + "' is set by the server");
      }
      if (!value.is_primitive()) {
        return FieldError("chat_template_kwargs",
                          "'" + key.substr(0, kNameChars) + "' must be a string, number, boolean or null");
      }
      chat.template_kwargs[key] = value;
    }
  }
  return chat;
}

using Prompt = std::variant<std::string, std::vector<int32_t>>;

absl::StatusOr<Prompt> ReadOnePrompt(const std::string& field, const OrderedJson& prompt) {
  // An empty text is a prompt where the tokenizer begins every text with a token; else it is refused later.
  if (prompt.is_string()) return prompt.get<std::string>();
  if (!prompt.is_array()) return FieldError(field, "must be a string or a list of token ids");
  if (prompt.empty()) return FieldError(field, "must not be empty");
  TP_ASSIGN_OR_RETURN(auto ids, ReadTokenIds(field, prompt, kPromptIdsMax));
  return Prompt(std::move(ids));
}

absl::Status ReadPrompt(const OrderedJson& body, InferenceRequest& out) {
  const auto it = body.find("prompt");
  if (it == body.end() || it->is_null()) {
    return FieldError("prompt", "must be a string, a list of token ids, or a list of those");
  }
  const OrderedJson& prompt = *it;
  const bool list = prompt.is_array() && !prompt.empty() && !prompt[0].is_number();
  if (!list) {
    TP_ASSIGN_OR_RETURN(Prompt one, ReadOnePrompt("prompt", prompt));
    std::visit([&](auto& text) { out.input = std::move(text); }, one);
    return absl::OkStatus();
  }
  if (prompt.size() > kChoicesMax) {
    return FieldError("prompt", absl::StrCat("must be at most ", kChoicesMax, " prompts"));
  }
  for (size_t i = 0; i < prompt.size(); ++i) {
    TP_ASSIGN_OR_RETURN(Prompt one, ReadOnePrompt("prompt", prompt[i]));
    if (i > 0) {
      out.more_prompts.push_back(std::move(one));
    } else {
      std::visit([&](auto& text) { out.input = std::move(text); }, one);
    }
  }
  return absl::OkStatus();
}

absl::Status ReadStop(const FieldReader& fields, InferenceRequest& out) {
  if (const OrderedJson* stop = fields.Find("stop")) {
    const std::string what = absl::StrCat("must be a string or a list of at most ", kStopStringsMax,
                                          " non-empty strings of at most 1024 bytes");
    OrderedJson one = OrderedJson::array();
    const OrderedJson* list = stop;
    if (stop->is_string()) {
      if (stop->get_ref<const std::string&>().empty()) return absl::OkStatus();
      one.push_back(*stop);
      list = &one;
    }
    if (!list->is_array() || list->size() > kStopStringsMax) return FieldError("stop", what);
    for (const OrderedJson& s : *list) {
      if (!s.is_string() || s.get_ref<const std::string&>().empty() ||
          s.get_ref<const std::string&>().size() > 1024) {
        return FieldError("stop", what);
      }
      out.stop.push_back(s.get<std::string>());
    }
  }
  TP_ASSIGN_OR_RETURN(auto ids, fields.TokenIds("stop_token_ids", kStopTokenIdsMax));
  if (ids) out.stop_token_ids = std::move(*ids);
  return absl::OkStatus();
}

// The same as a float; the range holds for the float, too.
absl::StatusOr<std::optional<float>> ReadFloat(const FieldReader& fields, std::string_view field, double min,
                                               double max, bool open_below = false) {
  TP_ASSIGN_OR_RETURN(const auto number, fields.Number(field, min, max, open_below));
  if (!number) return std::optional<float>();
  const auto value = static_cast<float>(*number);
  // A double above 0 may round to a float 0.
  if (open_below && value <= static_cast<float>(min)) {
    return FieldError(field, absl::StrCat("must be a number above ", min, " and at most ", max));
  }
  return std::optional<float>(value);
}

// {"token id": bias}, as OpenAI writes it.
absl::Status ReadLogitBias(const FieldReader& fields, InferenceRequest& out) {
  const OrderedJson* map = fields.Find("logit_bias");
  if (map == nullptr) return absl::OkStatus();
  const std::string what =
      absl::StrCat("must be an object of at most ", kLogitBiasCountMax,
                   " entries, token id to a number from -", kLogitBiasAbsMax, " to ", kLogitBiasAbsMax);
  if (!map->is_object() || map->size() > kLogitBiasCountMax) return FieldError("logit_bias", what);
  for (const auto& [key, bias] : map->items()) {
    int32_t id = 0;
    // Digits only: SimpleAtoi takes signs and spaces, by which an id could come twice.
    const bool digits = !key.empty() && std::ranges::all_of(key, [](char c) { return c >= '0' && c <= '9'; });
    if (!digits || (key.size() > 1 && key[0] == '0') || !absl::SimpleAtoi(key, &id) || !bias.is_number()) {
      return FieldError("logit_bias", what);
    }
    const double value = bias.get<double>();
    if (!std::isfinite(value) || std::abs(value) > kLogitBiasAbsMax) return FieldError("logit_bias", what);
    out.logit_bias.emplace_back(id, static_cast<float>(value));
  }
  return absl::OkStatus();
}

absl::Status ReadBadWords(const FieldReader& fields, InferenceRequest& out) {
  const OrderedJson* list = fields.Find("bad_words");
  if (list == nullptr) return absl::OkStatus();
  const std::string what = absl::StrCat("must be a list of at most ", kBadWordsCountMax,
                                        " non-empty strings of at most ", kBadWordBytesMax, " bytes");
  if (!list->is_array() || list->size() > kBadWordsCountMax) return FieldError("bad_words", what);
  for (const OrderedJson& word : *list) {
    if (!word.is_string() || word.get_ref<const std::string&>().empty() ||
        word.get_ref<const std::string&>().size() > kBadWordBytesMax) {
      return FieldError("bad_words", what);
    }
    out.bad_words.push_back(word.get<std::string>());
  }
  return absl::OkStatus();
}

absl::Status ReadSampling(const FieldReader& fields, InferenceRequest& out) {
  TP_ASSIGN_OR_RETURN(out.temperature, ReadFloat(fields, "temperature", 0, 2));
  TP_ASSIGN_OR_RETURN(out.top_p, ReadFloat(fields, "top_p", 0, 1, /*open_below=*/true));
  TP_ASSIGN_OR_RETURN(out.min_p, ReadFloat(fields, "min_p", 0, 1));
  TP_ASSIGN_OR_RETURN(const auto typical_p, ReadFloat(fields, "typical_p", 0, 1, /*open_below=*/true));
  out.typical_p = typical_p.value_or(1.0f);
  TP_ASSIGN_OR_RETURN(const auto top_k, fields.Int("top_k", -1, kTokensMax));
  if (top_k) out.top_k = static_cast<int32_t>(std::max<int64_t>(0, *top_k));
  TP_ASSIGN_OR_RETURN(out.seed, fields.Bits("seed"));
  TP_ASSIGN_OR_RETURN(out.repetition_penalty,
                      ReadFloat(fields, "repetition_penalty", 0, kRepetitionPenaltyMax, /*open_below=*/true));
  TP_ASSIGN_OR_RETURN(const auto presence, ReadFloat(fields, "presence_penalty", -kPenaltyMax, kPenaltyMax));
  TP_ASSIGN_OR_RETURN(const auto frequency,
                      ReadFloat(fields, "frequency_penalty", -kPenaltyMax, kPenaltyMax));
  out.presence_penalty = presence.value_or(0.0f);
  out.frequency_penalty = frequency.value_or(0.0f);
  TP_RETURN_IF_ERROR(ReadLogitBias(fields, out));
  TP_RETURN_IF_ERROR(ReadBadWords(fields, out));
  TP_ASSIGN_OR_RETURN(auto allowed, fields.TokenIds("allowed_token_ids", kAllowedTokenIdsMax));
  if (allowed) {
    // vLLM refuses it, too: nothing could be drawn.
    if (allowed->empty()) return FieldError("allowed_token_ids", "must not be empty; or leave it out");
    out.allowed_token_ids = std::move(*allowed);
  }
  return absl::OkStatus();
}

absl::Status ReadChoices(const FieldReader& fields, InferenceRequest& out) {
  TP_ASSIGN_OR_RETURN(const auto n, fields.Int("n", 1, kChoicesMax));
  TP_ASSIGN_OR_RETURN(const auto best_of, fields.Int("best_of", 1, kChoicesMax));
  out.n = static_cast<uint32_t>(n.value_or(1));
  out.best_of = static_cast<uint32_t>(best_of.value_or(out.n));
  if (const size_t prompts = 1 + out.more_prompts.size(); prompts * out.best_of > kChoicesMax) {
    return FieldError(out.best_of > out.n ? "best_of" : "n",
                      absl::StrCat("times ", prompts, " prompts must be at most ", kChoicesMax));
  }
  if (out.best_of < out.n) return FieldError("best_of", absl::StrCat("must be at least n, ", out.n));
  if (out.best_of > out.n && out.chat) {
    return FieldError("best_of", "is supported on /v1/completions only; leave it out");
  }
  if (out.best_of > out.n && out.stream) {
    return FieldError("best_of", "cannot be streamed: which answers are best is known at the end");
  }
  return absl::OkStatus();
}

absl::Status ReadStreaming(const FieldReader& fields, InferenceRequest& out) {
  TP_ASSIGN_OR_RETURN(const auto stream, fields.Bool("stream"));
  out.stream = stream.value_or(false);
  if (const OrderedJson* options = fields.Find("stream_options")) {
    if (!options->is_object()) return FieldError("stream_options", "must be an object");
    if (!out.stream) return FieldError("stream_options", "is allowed only with stream: true");
    const FieldReader inner(*options);
    for (const auto& [field, into] : {std::pair{"include_usage", &out.include_usage},
                                      std::pair{"continuous_usage_stats", &out.continuous_usage_stats}}) {
      const auto v = inner.Bool(field);
      if (!v.ok()) return FieldError(std::string("stream_options.") + field, "must be true or false");
      *into = v->value_or(false);
    }
    const auto obfuscation = inner.Bool("include_obfuscation");
    if (!obfuscation.ok()) return FieldError("stream_options.include_obfuscation", "must be true or false");
    if (obfuscation->value_or(false)) {
      return FieldError("stream_options.include_obfuscation", "is not supported; leave it out");
    }
  }
  return absl::OkStatus();
}

// OpenAI's: at most 16 pairs of strings.
absl::Status ReadMetadata(const FieldReader& fields, InferenceRequest& out) {
  const OrderedJson* metadata = fields.Find("metadata");
  if (metadata == nullptr) return absl::OkStatus();
  const std::string what =
      absl::StrCat("must be an object of at most ", kMetadataPairsMax, " strings, keys of at most ",
                   kMetadataKeyChars, " and values of at most ", kMetadataValueChars, " characters");
  if (!metadata->is_object() || metadata->size() > kMetadataPairsMax) return FieldError("metadata", what);
  for (const auto& [key, value] : metadata->items()) {
    if (CountCodePoints(key) > kMetadataKeyChars || !value.is_string() ||
        CountCodePoints(value.get_ref<const std::string&>()) > kMetadataValueChars) {
      return FieldError("metadata", what);
    }
    out.metadata.emplace_back(key, value.get<std::string>());
  }
  return absl::OkStatus();
}

// What a client calls its request by, and what it wants it done as.
absl::Status ReadLabels(const FieldReader& fields, InferenceRequest& out) {
  TP_RETURN_IF_ERROR(ReadMetadata(fields, out));
  TP_RETURN_IF_ERROR(fields.String("user", 4096).status());
  TP_RETURN_IF_ERROR(fields.String("safety_identifier", 64).status());
  TP_ASSIGN_OR_RETURN(auto session, fields.String("prompt_cache_key", 4096));
  out.session = std::move(session).value_or("");
  TP_ASSIGN_OR_RETURN(auto id, fields.String("request_id", kRequestIdChars));
  if (id) {
    // It becomes a header.
    const bool usable = std::ranges::all_of(*id, [](char c) { return c > 0x20 && c < 0x7f; });
    if (!usable || id->empty()) {
      return FieldError("request_id", absl::StrCat("must be 1 to ", kRequestIdChars,
                                                   " printable ASCII characters without spaces"));
    }
    out.request_id = *std::move(id);
  }
  TP_ASSIGN_OR_RETURN(auto tier, fields.String("service_tier", 32));
  if (tier && !tier->empty() && *tier != "auto" && *tier != "default") {
    return FieldError("service_tier", "must be auto or default: this server has no others");
  }
  out.service_tier = tier.value_or("");
  return absl::OkStatus();
}

absl::Status ReadCommon(const OrderedJson& body, InferenceRequest& out) {
  const FieldReader fields(body);
  TP_ASSIGN_OR_RETURN(auto model, fields.String("model", kNameChars));
  out.model = model.value_or("");
  TP_ASSIGN_OR_RETURN(const auto echo, fields.Bool("echo"));
  out.echo = echo.value_or(false);
  // 0 with echo asks for the prompt alone: how its logprobs are got from OpenAI's API.
  const bool prompt_only = out.echo && !out.chat;
  TP_ASSIGN_OR_RETURN(const auto max_tokens, fields.Int("max_tokens", prompt_only ? 0 : 1, kTokensMax));
  TP_ASSIGN_OR_RETURN(const auto completion_tokens, fields.Int("max_completion_tokens", 1, kTokensMax));
  if (completion_tokens) {
    out.max_tokens = static_cast<uint32_t>(*completion_tokens);
  } else if (max_tokens) {
    out.max_tokens = static_cast<uint32_t>(*max_tokens);
    if (*max_tokens == 0) {
      out.prompt_only = true;
      out.max_tokens = 1;
    }
  }
  TP_ASSIGN_OR_RETURN(const auto min_tokens, fields.Int("min_tokens", 0, kTokensMax));
  out.min_tokens = static_cast<uint32_t>(min_tokens.value_or(0));
  if (out.max_tokens && out.min_tokens > *out.max_tokens) {
    return FieldError("min_tokens", absl::StrCat("must not exceed max_tokens, ", *out.max_tokens));
  }
  TP_RETURN_IF_ERROR(ReadSampling(fields, out));
  TP_RETURN_IF_ERROR(ReadStop(fields, out));
  TP_RETURN_IF_ERROR(ReadStreaming(fields, out));
  TP_RETURN_IF_ERROR(ReadChoices(fields, out));
  if (out.prompt_only && out.best_of > 1) {
    return FieldError("n",
                      "is more than 1 (or best_of is) where max_tokens is 0; the prompt alone has one form");
  }
  TP_ASSIGN_OR_RETURN(const auto prompt_logprobs, fields.Int("prompt_logprobs", 0, kTopLogprobsMax));
  if (prompt_logprobs) {
    if (out.stream) return FieldError("prompt_logprobs", "is not available with stream: true, as in vLLM");
    out.prompt_logprobs = static_cast<int>(*prompt_logprobs);
  }
  struct Flag {
    const char* field;
    bool* into;
  };
  for (const Flag& flag :
       {Flag{"include_stop_str_in_output", &out.include_stop_str_in_output},
        Flag{"ignore_eos", &out.ignore_eos}, Flag{"skip_special_tokens", &out.skip_special_tokens},
        Flag{"return_token_ids", &out.return_token_ids}, Flag{"return_trace", &out.return_trace},
        Flag{"return_tokens_as_token_ids", &out.tokens_as_ids}}) {
    TP_ASSIGN_OR_RETURN(const auto v, fields.Bool(flag.field));
    if (v) *flag.into = *v;
  }
  TP_ASSIGN_OR_RETURN(out.add_special_tokens, fields.Bool("add_special_tokens"));
  TP_ASSIGN_OR_RETURN(const auto priority, fields.Int("priority", -1000, 1000));
  out.priority = static_cast<int32_t>(priority.value_or(0));
  TP_ASSIGN_OR_RETURN(auto salt, fields.String("cache_salt", kCacheSaltCharsMax));
  if (salt && salt->empty())
    return FieldError("cache_salt", "must have at least 1 character; or leave it out");
  out.cache_salt = salt.value_or("");
  TP_ASSIGN_OR_RETURN(out.structured, ReadStructured(body));
  TP_ASSIGN_OR_RETURN(const auto truncate, fields.Int("truncate_prompt_tokens", -1, kTokensMax));
  if (truncate) {
    if (*truncate == 0) return FieldError("truncate_prompt_tokens", "must be -1 or at least 1");
    out.truncate_prompt_tokens = static_cast<int32_t>(*truncate);
  }
  return ReadLabels(fields, out);
}

absl::Status ReadChatLogprobs(const FieldReader& fields, InferenceRequest& out) {
  TP_ASSIGN_OR_RETURN(const auto logprobs, fields.Bool("logprobs"));
  TP_ASSIGN_OR_RETURN(const auto top, fields.Int("top_logprobs", 0, kTopLogprobsMax));
  if (top.value_or(0) > 0 && !logprobs.value_or(false)) {
    return FieldError("top_logprobs", "needs logprobs: true");
  }
  if (logprobs.value_or(false)) out.top_logprobs = static_cast<int>(top.value_or(0));
  return absl::OkStatus();
}

// The body as an object, or the error.
OrError<OrderedJson> ReadObject(std::string_view body) {
  auto json = ParseJson(body);
  if (!json.ok()) {
    return MakeError(errors::kInvalidJson,
                     "the body is not valid JSON: " + std::string(json.status().message()));
  }
  if (!json->is_object()) return MakeError(errors::kInvalidJson, "the body must be a JSON object");
  return std::move(json).value();
}

// Templates know reasoning_effort (gpt-oss, Mistral), enable_thinking (Qwen, GLM) or thinking (DeepSeek).
absl::Status ReadReasoning(const FieldReader& fields, InferenceRequest& out) {
  static constexpr std::string_view kEfforts[] = {"none", "minimal", "low", "medium", "high", "xhigh", "max"};
  OrderedJson& kwargs = std::get<ChatInput>(out.input).template_kwargs;
  TP_ASSIGN_OR_RETURN(auto effort, fields.String("reasoning_effort", 16));
  if (effort) {
    if (std::ranges::find(kEfforts, *effort) == std::end(kEfforts)) {
      return FieldError("reasoning_effort", "must be one of none, minimal, low, medium, high, xhigh, max");
    }
    if (!kwargs.contains("reasoning_effort")) kwargs["reasoning_effort"] = *effort;
    for (const char* name : {"enable_thinking", "thinking"}) {
      if (*effort == "none" && !kwargs.contains(name)) kwargs[name] = false;
    }
    out.reasoning.effort = *std::move(effort);
  }
  TP_ASSIGN_OR_RETURN(const auto include, fields.Bool("include_reasoning"));
  out.reasoning.include = include.value_or(true);
  return absl::OkStatus();
}

absl::StatusOr<InferenceRequest> ReadChat(const OrderedJson& body) {
  InferenceRequest out;
  out.chat = true;
  TP_RETURN_IF_ERROR(ReadCommon(body, out));
  TP_ASSIGN_OR_RETURN(out.input, ReadChatInput(body, &out.tools));
  TP_RETURN_IF_ERROR(ReadReasoning(FieldReader(body), out));
  TP_RETURN_IF_ERROR(ReadChatLogprobs(FieldReader(body), out));
  return out;
}

absl::StatusOr<InferenceRequest> ReadText(const OrderedJson& body) {
  InferenceRequest out;
  TP_RETURN_IF_ERROR(ReadPrompt(body, out));
  TP_RETURN_IF_ERROR(ReadCommon(body, out));
  TP_ASSIGN_OR_RETURN(const auto logprobs, FieldReader(body).Int("logprobs", 0, kTopLogprobsMax));
  if (logprobs) out.top_logprobs = static_cast<int>(*logprobs);
  if (!out.max_tokens) out.max_tokens = std::max(kCompletionTokensDefault, out.min_tokens);
  return out;
}

template <typename T, typename Read>
OrError<T> RunOn(const OrderedJson& json, std::optional<Endpoint> endpoint, Read read) {
  if (endpoint) {
    if (auto error = CheckFields(json, *endpoint)) return std::move(*error);
  }
  absl::StatusOr<T> out = read(json);
  if (!out.ok()) return FromFieldError(errors::kInvalidRequest, out.status());
  return std::move(out).value();
}

template <typename T, typename Read>
OrError<T> Run(std::string_view text, std::optional<Endpoint> endpoint, Read read) {
  auto body = ReadObject(text);
  if (auto* error = std::get_if<ApiError>(&body)) return std::move(*error);
  return RunOn<T>(std::get<OrderedJson>(body), endpoint, read);
}

}  // namespace

OrError<InferenceRequest> ParseChatCompletion(std::string_view body) {
  return Run<InferenceRequest>(body, Endpoint::kChat, ReadChat);
}

OrError<InferenceRequest> ReadChatCompletion(const OrderedJson& body) {
  return RunOn<InferenceRequest>(body, Endpoint::kChat, ReadChat);
}

OrError<InferenceRequest> ParseCompletion(std::string_view body) {
  return Run<InferenceRequest>(body, Endpoint::kText, ReadText);
}

OrError<TokenizeRequest> ParseTokenize(std::string_view body) {
  return Run<TokenizeRequest>(body, std::nullopt,
                              [](const OrderedJson& json) -> absl::StatusOr<TokenizeRequest> {
                                TokenizeRequest out;
                                const FieldReader fields(json);
                                TP_ASSIGN_OR_RETURN(auto model, fields.String("model", kNameChars));
                                out.model = model.value_or("");
                                const bool chat = fields.Find("messages") != nullptr;
                                if (chat == (fields.Find("prompt") != nullptr)) {
                                  return FieldError("prompt", "give either prompt or messages");
                                }
                                if (chat) {
                                  TP_ASSIGN_OR_RETURN(out.input, ReadChatInput(json));
                                } else {
                                  TP_ASSIGN_OR_RETURN(auto prompt, fields.String("prompt", kAnyChars));
                                  out.input = std::move(*prompt);
                                }
                                TP_ASSIGN_OR_RETURN(const auto special, fields.Bool("add_special_tokens"));
                                out.add_special_tokens = special.value_or(!chat);
                                TP_ASSIGN_OR_RETURN(const auto strings, fields.Bool("return_token_strs"));
                                out.return_token_strs = strings.value_or(false);
                                return out;
                              });
}

OrError<DetokenizeRequest> ParseDetokenize(std::string_view body) {
  return Run<DetokenizeRequest>(body, std::nullopt,
                                [](const OrderedJson& json) -> absl::StatusOr<DetokenizeRequest> {
                                  DetokenizeRequest out;
                                  const FieldReader fields(json);
                                  TP_ASSIGN_OR_RETURN(auto model, fields.String("model", kNameChars));
                                  out.model = model.value_or("");
                                  TP_ASSIGN_OR_RETURN(auto tokens, fields.TokenIds("tokens", kPromptIdsMax));
                                  if (!tokens) return FieldError("tokens", "must be a list of token ids");
                                  out.tokens = std::move(*tokens);
                                  return out;
                                });
}

OrError<ChatInput> ParseApplyTemplate(std::string_view body) {
  return Run<ChatInput>(body, std::nullopt, [](const OrderedJson& json) { return ReadChatInput(json); });
}

}  // namespace tidepool
