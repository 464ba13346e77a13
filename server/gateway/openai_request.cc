#include "server/gateway/openai_request.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "server/gateway/field_reader.h"

namespace tidepool {
namespace {

constexpr size_t kMessagesMax = 4096;
constexpr size_t kPartsMax = 1024;
constexpr size_t kNameChars = 256;
// Bounded by the body's size anyway; this is for the count of numbers.
constexpr size_t kPromptIdsMax = 4u << 20;
constexpr size_t kAnyChars = std::numeric_limits<size_t>::max();
constexpr int64_t kTokensMax = 1 << 24;

// Fields of OpenAI's and vLLM's that we know and do not serve. Each value that asks for nothing passes.
struct Unsupported {
  std::string_view field;
  // The harmless value beside null, empty string, empty list and empty object.
  double harmless_number;
  bool harmless_false;
  std::string_view harmless_string;
};
constexpr Unsupported kUnsupportedFields[] = {
    {"use_beam_search", 0, true, ""},
    {"length_penalty", 1, false, ""},
    {"suffix", 0, false, ""},
    {"tools", 0, false, ""},
    {"tool_choice", 0, false, "none"},
    {"functions", 0, false, ""},
    {"function_call", 0, false, "none"},
    {"guided_json", 0, false, ""},
    {"guided_regex", 0, false, ""},
    {"guided_choice", 0, false, ""},
    {"guided_grammar", 0, false, ""},
    {"structured_outputs", 0, false, ""},
    {"regex", 0, false, ""},
    {"ebnf", 0, false, ""},
    {"grammar", 0, false, ""},
    {"json_schema", 0, false, ""},
    {"logits_processors", 0, false, ""},
    {"truncate_prompt_tokens", 0, false, ""},
    {"documents", 0, false, ""},
    {"chat_template", 0, false, ""},
    {"audio", 0, false, ""},
    {"prediction", 0, false, ""},
    {"web_search_options", 0, false, ""},
    {"kv_transfer_params", 0, false, ""},
    {"prompt_embeds", 0, false, ""},
    {"store", 0, true, ""},
};

bool Harmless(const Unsupported& known, const OrderedJson& v) {
  if (v.is_null()) return true;
  if (v.is_boolean()) return known.harmless_false && !v.get<bool>();
  if (v.is_number()) return v.get<double>() == known.harmless_number;
  if (v.is_string()) {
    const auto& s = v.get_ref<const std::string&>();
    return s.empty() || s == known.harmless_string;
  }
  return v.empty();
}

std::optional<ApiError> CheckUnsupported(const OrderedJson& body) {
  for (const Unsupported& known : kUnsupportedFields) {
    const auto it = body.find(std::string(known.field));
    if (it == body.end() || Harmless(known, *it)) continue;
    return MakeError(errors::kUnsupported,
                     absl::StrCat(std::string(known.field),
                                  ": this server does not support it with that value; leave it out"),
                     std::string(known.field));
  }
  if (const auto it = body.find("response_format"); it != body.end() && !it->is_null()) {
    const bool text = it->is_object() && it->contains("type") && (*it)["type"] == "text";
    if (!text) {
      return MakeError(errors::kUnsupported,
                       "response_format: only {\"type\":\"text\"} is supported; leave it out",
                       "response_format");
    }
  }
  if (const auto it = body.find("modalities"); it != body.end() && !it->is_null()) {
    if (*it != OrderedJson::array({"text"})) {
      return MakeError(errors::kUnsupported, "modalities: only [\"text\"] is supported; leave it out",
                       "modalities");
    }
  }
  return std::nullopt;
}

// Content as OpenAI allows it, a string or a list of text parts, to one string.
absl::StatusOr<OrderedJson> ReadContent(const std::string& where, const OrderedJson& content) {
  if (content.is_string() || content.is_null()) return content;
  if (!content.is_array()) return FieldError(where, "must be a string or a list of text parts");
  if (content.size() > kPartsMax)
    return FieldError(where, absl::StrCat("must have at most ", kPartsMax, " parts"));
  std::string text;
  for (const OrderedJson& part : content) {
    if (!part.is_object() || !part.contains("type") || !part["type"].is_string()) {
      return FieldError(where, "each part must be an object with a type");
    }
    if (part["type"] != "text") return FieldError(where, "only parts of type 'text' are supported");
    if (!part.contains("text") || !part["text"].is_string()) {
      return FieldError(where, "a text part needs a string 'text'");
    }
    // One part a line, as vLLM's "string" content format joins them.
    if (!text.empty()) text += '\n';
    text += part["text"].get_ref<const std::string&>();
  }
  return OrderedJson(std::move(text));
}

absl::StatusOr<OrderedJson> ReadMessages(const OrderedJson& body) {
  const auto it = body.find("messages");
  if (it == body.end() || !it->is_array() || it->empty()) {
    return FieldError("messages", "must be a list of at least one message");
  }
  if (it->size() > kMessagesMax) {
    return FieldError("messages", absl::StrCat("must have at most ", kMessagesMax, " messages"));
  }
  OrderedJson messages = OrderedJson::array();
  for (size_t i = 0; i < it->size(); ++i) {
    const OrderedJson& message = (*it)[i];
    const std::string where = absl::StrCat("messages[", i, "]");
    if (!message.is_object()) return FieldError(where, "must be an object with role and content");
    const auto role = message.find("role");
    if (role == message.end() || !role->is_string() || role->get_ref<const std::string&>().empty()) {
      return FieldError(where + ".role", "must be a string such as 'user'");
    }
    const auto& name = role->get_ref<const std::string&>();
    if (name != "system" && name != "developer" && name != "user" && name != "assistant" && name != "tool") {
      return FieldError(where + ".role", "must be one of system, developer, user, assistant, tool");
    }
    for (const char* field : {"tool_calls", "function_call", "audio"}) {
      if (const auto call = message.find(field);
          call != message.end() && !call->is_null() && !call->empty()) {
        return FieldError(where + "." + field, "is not supported; leave it out");
      }
    }
    OrderedJson clean;
    // Templates know system; developer is OpenAI's later name for it.
    clean["role"] = name == "developer" ? "system" : name;
    const auto content = message.find("content");
    if (content == message.end() || (content->is_null() && name != "assistant")) {
      return FieldError(where + ".content", "must be a string or a list of text parts");
    }
    TP_ASSIGN_OR_RETURN(clean["content"], ReadContent(where + ".content", *content));
    for (const char* field : {"name", "reasoning_content", "tool_call_id"}) {
      if (const auto extra = message.find(field); extra != message.end() && !extra->is_null()) {
        if (!extra->is_string()) return FieldError(where + "." + field, "must be a string");
        clean[field] = *extra;
      }
    }
    messages.push_back(std::move(clean));
  }
  return messages;
}

absl::StatusOr<ChatInput> ReadChatInput(const OrderedJson& body) {
  ChatInput chat;
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

absl::Status ReadPrompt(const OrderedJson& body, InferenceRequest& out) {
  const auto it = body.find("prompt");
  if (it == body.end() || it->is_null()) {
    return FieldError("prompt", "must be a string or a list of token ids");
  }
  const OrderedJson* prompt = &*it;
  // [x] with one prompt in it stands for x.
  if (prompt->is_array() && !prompt->empty() && !(*prompt)[0].is_number()) {
    if (prompt->size() > 1)
      return FieldError("prompt", "only one prompt a request is supported; send one request for each");
    prompt = &(*prompt)[0];
  }
  if (prompt->is_string()) {
    // An empty text is a prompt where the tokenizer begins every text with a token; else it is refused later.
    out.input = prompt->get<std::string>();
    return absl::OkStatus();
  }
  if (!prompt->is_array()) return FieldError("prompt", "must be a string or a list of token ids");
  if (prompt->empty()) return FieldError("prompt", "must not be empty");
  TP_ASSIGN_OR_RETURN(out.input, ReadTokenIds("prompt", *prompt, kPromptIdsMax));
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
  }
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
        Flag{"return_token_ids", &out.return_token_ids}, Flag{"return_trace", &out.return_trace}}) {
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
  // Taken for the client's own bookkeeping: checked, then dropped.
  TP_RETURN_IF_ERROR(fields.String("user", 4096).status());
  TP_RETURN_IF_ERROR(fields.String("request_id", kNameChars).status());
  if (const OrderedJson* metadata = fields.Find("metadata"); metadata != nullptr && !metadata->is_object()) {
    return FieldError("metadata", "must be an object");
  }
  return absl::OkStatus();
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

absl::StatusOr<InferenceRequest> ReadChat(const OrderedJson& body) {
  InferenceRequest out;
  out.chat = true;
  TP_RETURN_IF_ERROR(ReadCommon(body, out));
  if (out.echo) return FieldError("echo", "is supported on /v1/completions only; leave it out");
  TP_ASSIGN_OR_RETURN(out.input, ReadChatInput(body));
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
OrError<T> Run(std::string_view text, bool check_unsupported, Read read) {
  auto body = ReadObject(text);
  if (auto* error = std::get_if<ApiError>(&body)) return std::move(*error);
  const auto& json = std::get<OrderedJson>(body);
  if (check_unsupported) {
    if (auto error = CheckUnsupported(json)) return std::move(*error);
  }
  absl::StatusOr<T> out = read(json);
  if (!out.ok()) return FromFieldError(errors::kInvalidRequest, out.status());
  return std::move(out).value();
}

}  // namespace

OrError<InferenceRequest> ParseChatCompletion(std::string_view body) {
  return Run<InferenceRequest>(body, true, ReadChat);
}

OrError<InferenceRequest> ParseCompletion(std::string_view body) {
  return Run<InferenceRequest>(body, true, ReadText);
}

OrError<TokenizeRequest> ParseTokenize(std::string_view body) {
  return Run<TokenizeRequest>(body, false, [](const OrderedJson& json) -> absl::StatusOr<TokenizeRequest> {
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
  return Run<DetokenizeRequest>(body, false,
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
  return Run<ChatInput>(body, false, ReadChatInput);
}

}  // namespace tidepool
