#include "server/gateway/grpc_request.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "server/gateway/field_reader.h"

namespace tidepool {
namespace {

constexpr uint32_t kTokensMax = 1u << 24;
constexpr size_t kStopBytesMax = 1024;
constexpr size_t kRequestIdBytesMax = 128;
constexpr int32_t kPriorityAbsMax = 1000;
constexpr int kChoiceTextsMax = 1024;

bool InRange(double v, double min, double max) { return std::isfinite(v) && v >= min && v <= max; }

// Checks a number that the client has set. `open_below`: in (min, max].
struct Range {
  const char* field;
  bool set;
  double value, min, max;
  bool open_below = false;
};
absl::Status Check(const Range& r) {
  if (!r.set || (InRange(r.value, r.min, r.max) && !(r.open_below && r.value == r.min)))
    return absl::OkStatus();
  return FieldError(r.field, absl::StrCat("must be ", r.open_below ? "above " : "from ", r.min,
                                          r.open_below ? " and at most " : " to ", r.max));
}

template <typename Ids>
absl::Status ReadIds(const char* field, const Ids& from, size_t max, std::vector<int32_t>& into) {
  if (static_cast<size_t>(from.size()) > max)
    return FieldError(field, absl::StrCat("must have at most ", max, " ids"));
  for (int32_t id : from) {
    if (id < 0) return FieldError(field, "ids must not be negative");
    into.push_back(id);
  }
  return absl::OkStatus();
}

absl::Status ReadSampling(const v1::SamplingParams& s, InferenceRequest& out) {
  for (const Range& range : {Range{"sampling.temperature", s.has_temperature(), s.temperature(), 0, 2},
                             Range{"sampling.top_k", s.has_top_k(), double(s.top_k()), -1, 1 << 24},
                             Range{"sampling.top_p", s.has_top_p(), s.top_p(), 0, 1, true},
                             Range{"sampling.min_p", s.has_min_p(), s.min_p(), 0, 1},
                             Range{"sampling.typical_p", s.has_typical_p(), s.typical_p(), 0, 1, true},
                             Range{"sampling.repetition_penalty", s.has_repetition_penalty(),
                                   s.repetition_penalty(), 0, kRepetitionPenaltyMax, true},
                             Range{"sampling.presence_penalty", s.has_presence_penalty(),
                                   s.presence_penalty(), -kPenaltyMax, kPenaltyMax},
                             Range{"sampling.frequency_penalty", s.has_frequency_penalty(),
                                   s.frequency_penalty(), -kPenaltyMax, kPenaltyMax}}) {
    TP_RETURN_IF_ERROR(Check(range));
  }
  if (s.has_temperature()) out.temperature = s.temperature();
  if (s.has_top_k()) out.top_k = std::max(0, s.top_k());
  if (s.has_top_p()) out.top_p = s.top_p();
  if (s.has_min_p()) out.min_p = s.min_p();
  if (s.has_typical_p()) out.typical_p = s.typical_p();
  if (s.has_repetition_penalty()) out.repetition_penalty = s.repetition_penalty();
  if (s.has_presence_penalty()) out.presence_penalty = s.presence_penalty();
  if (s.has_frequency_penalty()) out.frequency_penalty = s.frequency_penalty();
  if (s.has_seed()) out.seed = s.seed();
  if (s.logit_bias().size() > kLogitBiasCountMax) {
    return FieldError("sampling.logit_bias",
                      absl::StrCat("must have at most ", kLogitBiasCountMax, " entries"));
  }
  for (const auto& [id, bias] : s.logit_bias()) {
    if (id < 0) return FieldError("sampling.logit_bias", "ids must not be negative");
    TP_RETURN_IF_ERROR(Check({"sampling.logit_bias", true, bias, -kLogitBiasAbsMax, kLogitBiasAbsMax}));
    out.logit_bias.emplace_back(id, bias);
  }
  TP_RETURN_IF_ERROR(ReadIds("sampling.allowed_token_ids", s.allowed_token_ids(), kAllowedTokenIdsMax,
                             out.allowed_token_ids));
  if (static_cast<size_t>(s.bad_words_size()) > kBadWordsCountMax) {
    return FieldError("sampling.bad_words", absl::StrCat("must have at most ", kBadWordsCountMax, " words"));
  }
  for (const std::string& word : s.bad_words()) {
    if (word.empty() || word.size() > kBadWordBytesMax) {
      return FieldError("sampling.bad_words",
                        absl::StrCat("each word must have 1 to ", kBadWordBytesMax, " bytes"));
    }
    out.bad_words.push_back(word);
  }
  return absl::OkStatus();
}

// JSON that travels as text.
absl::StatusOr<OrderedJson> ReadJson(const std::string& field, const std::string& text) {
  auto json = ParseJson(text);
  if (!json.ok()) return FieldError(field, "is not valid JSON: " + std::string(json.status().message()));
  return json;
}

absl::StatusOr<OrderedJson> ReadObject(const std::string& field, const std::string& text) {
  TP_ASSIGN_OR_RETURN(OrderedJson json, ReadJson(field, text));
  if (!json.is_object()) return FieldError(field, "must be a JSON object");
  return json;
}

template <typename Tools>
absl::Status ReadTools(const Tools& tools, OrderedJson& chat, FieldNames& names) {
  for (int i = 0; i < tools.size(); ++i) {
    const v1::Tool& tool = tools[i];
    const std::string where = absl::StrCat("tools[", i, "]");
    OrderedJson function = {{"name", tool.name()}, {"strict", tool.strict()}};
    if (!tool.description().empty()) function["description"] = tool.description();
    if (!tool.parameters().empty()) {
      TP_ASSIGN_OR_RETURN(function["parameters"], ReadObject(where + ".parameters", tool.parameters()));
    }
    names.Add(where + ".function", where);
    chat["tools"].push_back({{"type", "function"}, {"function", std::move(function)}});
  }
  return absl::OkStatus();
}

OrderedJson MessageJson(const v1::ChatMessage& from) {
  OrderedJson message = {{"role", from.role()}, {"content", from.content()}};
  for (const v1::ToolCall& call : from.tool_calls()) {
    message["tool_calls"].push_back({{"id", call.id()},
                                     {"type", "function"},
                                     {"function", {{"name", call.name()}, {"arguments", call.arguments()}}}});
  }
  if (from.tool_calls_size() > 0 && from.content().empty()) message["content"] = nullptr;
  if (!from.tool_call_id().empty()) message["tool_call_id"] = from.tool_call_id();
  if (!from.name().empty()) message["name"] = from.name();
  if (!from.reasoning().empty()) message["reasoning_content"] = from.reasoning();
  return message;
}

// The part of a chat's body that its messages make up.
absl::Status ReadMessages(const v1::ChatMessages& from, OrderedJson& chat, FieldNames& names) {
  if (from.messages().empty()) return FieldError("chat", "must have at least one message");
  chat["messages"] = OrderedJson::array();
  for (int i = 0; i < from.messages_size(); ++i) {
    for (int call = 0; call < from.messages(i).tool_calls_size(); ++call) {
      const std::string path = absl::StrCat("messages[", i, "].tool_calls[", call, "]");
      names.Add(path + ".function", "chat." + path);
    }
    chat["messages"].push_back(MessageJson(from.messages(i)));
  }
  if (!from.template_kwargs().empty()) {
    TP_ASSIGN_OR_RETURN(chat["chat_template_kwargs"],
                        ReadObject("chat.template_kwargs", from.template_kwargs()));
  }
  if (from.continue_final_message()) {
    chat["continue_final_message"] = true;
    chat["add_generation_prompt"] = false;
  }
  names.Add("messages", "chat.messages");
  names.Add("chat_template_kwargs", "chat.template_kwargs");
  names.Add("continue_final_message", "chat.continue_final_message");
  return absl::OkStatus();
}

absl::Status ReadChat(const v1::GenerateRequest& message, OrderedJson& chat, FieldNames& names) {
  TP_RETURN_IF_ERROR(ReadMessages(message.chat(), chat, names));
  TP_RETURN_IF_ERROR(ReadTools(message.tools(), chat, names));
  const v1::ToolChoice& choice = message.tool_choice();
  if (!choice.name().empty()) {
    if (!choice.mode().empty()) return FieldError("tool_choice", "give mode or name, not both");
    chat["tool_choice"] = {{"type", "function"}, {"function", {{"name", choice.name()}}}};
    names.Add("tool_choice.function", "tool_choice");
  } else if (!choice.mode().empty()) {
    chat["tool_choice"] = choice.mode();
  }
  if (message.has_parallel_tool_calls()) chat["parallel_tool_calls"] = message.parallel_tool_calls();
  if (!message.reasoning_effort().empty()) chat["reasoning_effort"] = message.reasoning_effort();
  if (message.has_include_reasoning()) chat["include_reasoning"] = message.include_reasoning();
  return absl::OkStatus();
}

// What only chats know.
absl::Status CheckNoChat(const v1::GenerateRequest& message) {
  const char* field = message.tools_size() > 0              ? "tools"
                      : message.has_tool_choice()           ? "tool_choice"
                      : message.has_parallel_tool_calls()   ? "parallel_tool_calls"
                      : !message.reasoning_effort().empty() ? "reasoning_effort"
                      : message.has_include_reasoning()     ? "include_reasoning"
                                                            : nullptr;
  return field == nullptr ? absl::OkStatus() : FieldError(field, "is for chats; give chat, or leave it out");
}

absl::Status ReadFormat(const v1::OutputFormat& format, InferenceRequest& out) {
  StructuredSpec spec;
  using Kind = StructuredSpec::Kind;
  switch (format.kind_case()) {
    case v1::OutputFormat::kJsonObject:
      if (!format.json_object()) return FieldError("output_format.json_object", "must be true, or left out");
      spec.kind = Kind::kJsonObject;
      spec.field = "output_format.json_object";
      break;
    case v1::OutputFormat::kJsonSchema: {
      spec.kind = Kind::kJsonSchema;
      spec.field = "output_format.json_schema";
      TP_ASSIGN_OR_RETURN(spec.schema, ReadJson(spec.field, format.json_schema()));
      if (!spec.schema.is_object() && !spec.schema.is_boolean()) {
        return FieldError(spec.field, "must be a JSON schema: an object or a boolean");
      }
      break;
    }
    case v1::OutputFormat::kRegex:
      spec.kind = Kind::kRegex;
      spec.field = "output_format.regex";
      spec.text = format.regex();
      break;
    case v1::OutputFormat::kGrammar:
      spec.kind = Kind::kGrammar;
      spec.field = "output_format.grammar";
      spec.text = format.grammar();
      break;
    case v1::OutputFormat::kChoice:
      spec.kind = Kind::kChoice;
      spec.field = "output_format.choice";
      if (format.choice().texts().empty() || format.choice().texts_size() > kChoiceTextsMax) {
        return FieldError(spec.field, absl::StrCat("must have from 1 to ", kChoiceTextsMax, " texts"));
      }
      for (const std::string& text : format.choice().texts()) {
        if (text.empty()) return FieldError(spec.field, "texts must not be empty");
        spec.choices.push_back(text);
      }
      break;
    case v1::OutputFormat::KIND_NOT_SET:
      return FieldError("output_format", "give one of json_object, json_schema, regex, choice, grammar");
  }
  const bool needs_text = spec.kind == Kind::kRegex || spec.kind == Kind::kGrammar;
  if (needs_text && spec.text.empty()) return FieldError(spec.field, "must not be empty");
  out.structured = std::move(spec);
  return absl::OkStatus();
}

absl::Status ReadStop(const v1::GenerateRequest& message, InferenceRequest& out) {
  if (static_cast<size_t>(message.stop_size()) > kStopStringsMax) {
    return FieldError("stop", absl::StrCat("must have at most ", kStopStringsMax, " strings"));
  }
  for (const std::string& stop : message.stop()) {
    if (stop.empty() || stop.size() > kStopBytesMax) {
      return FieldError("stop", absl::StrCat("each string must have 1 to ", kStopBytesMax, " bytes"));
    }
    out.stop.push_back(stop);
  }
  return ReadIds("stop_token_ids", message.stop_token_ids(), kStopTokenIdsMax, out.stop_token_ids);
}

absl::Status ReadLengths(const v1::GenerateRequest& message, InferenceRequest& out) {
  if (message.has_max_tokens()) {
    if (message.max_tokens() == 0 || message.max_tokens() > kTokensMax) {
      return FieldError("max_tokens", absl::StrCat("must be from 1 to ", kTokensMax));
    }
    out.max_tokens = message.max_tokens();
  } else if (!out.chat) {
    out.max_tokens = std::max(kCompletionTokensDefault, message.min_tokens());
  }
  const double tokens_max = out.max_tokens ? *out.max_tokens : kTokensMax;
  for (const Range& range :
       {Range{"min_tokens", true, double(message.min_tokens()), 0, tokens_max},
        Range{"n", true, double(message.n()), 0, kChoicesMax},
        Range{"logprobs", message.has_logprobs(), double(message.logprobs()), 0, kTopLogprobsMax},
        Range{"prompt_logprobs", message.has_prompt_logprobs(), double(message.prompt_logprobs()), 0,
              kTopLogprobsMax}}) {
    TP_RETURN_IF_ERROR(Check(range));
  }
  out.min_tokens = message.min_tokens();
  out.n = out.best_of = std::max(1u, message.n());
  if (message.has_logprobs()) out.top_logprobs = static_cast<int>(message.logprobs());
  if (message.has_prompt_logprobs()) out.prompt_logprobs = static_cast<int>(message.prompt_logprobs());
  return absl::OkStatus();
}

// Who asks, and in what order it is served.
absl::Status ReadOrder(const v1::GenerateRequest& message, InferenceRequest& out) {
  if (CountCodePoints(message.cache_salt()) > kCacheSaltCharsMax) {
    return FieldError("cache_salt", absl::StrCat("must have at most ", kCacheSaltCharsMax, " characters"));
  }
  out.cache_salt = message.cache_salt();
  if (message.request_id().size() > kRequestIdBytesMax) {
    return FieldError("request_id", absl::StrCat("must have at most ", kRequestIdBytesMax, " bytes"));
  }
  out.request_id = message.request_id();
  TP_RETURN_IF_ERROR(
      Check({"priority", true, double(message.priority()), -kPriorityAbsMax, kPriorityAbsMax}));
  out.priority = message.priority();
  if (message.request_class() == "batch") {
    out.request_class = RequestClass::kBatch;
  } else if (!message.request_class().empty() && message.request_class() != "online") {
    return FieldError("request_class", "must be one of online, batch");
  }
  if (static_cast<size_t>(message.metadata_size()) > kMetadataPairsMax) {
    return FieldError("metadata", absl::StrCat("must have at most ", kMetadataPairsMax, " entries"));
  }
  for (const auto& [key, value] : message.metadata()) {
    if (CountCodePoints(key) > kMetadataKeyChars || CountCodePoints(value) > kMetadataValueChars) {
      return FieldError("metadata", absl::StrCat("keys must have at most ", kMetadataKeyChars, ", values ",
                                                 kMetadataValueChars, " characters"));
    }
    out.metadata.emplace_back(key, value);
  }
  return absl::OkStatus();
}

absl::Status ReadPrompt(const v1::GenerateRequest& message, InferenceRequest& out, FieldNames& names) {
  if (message.has_text()) {
    if (message.text().empty()) return FieldError("text", "must not be empty");
    out.input = message.text();
    names.Add("prompt", "text");
    return absl::OkStatus();
  }
  if (!message.has_tokens()) return FieldError("input", "give one of text, tokens, chat");
  std::vector<int32_t> ids;
  if (message.tokens().ids().empty()) return FieldError("tokens", "must not be empty");
  TP_RETURN_IF_ERROR(ReadIds("tokens", message.tokens().ids(), kTokensMax, ids));
  out.input = std::move(ids);
  names.Add("prompt", "tokens");
  return absl::OkStatus();
}

// All but the prompt and what is said of it.
absl::Status ReadRest(const v1::GenerateRequest& message, InferenceRequest& out) {
  out.model = message.model();
  out.stream = true;
  TP_RETURN_IF_ERROR(ReadSampling(message.sampling(), out));
  TP_RETURN_IF_ERROR(ReadLengths(message, out));
  TP_RETURN_IF_ERROR(ReadStop(message, out));
  TP_RETURN_IF_ERROR(ReadOrder(message, out));
  if (message.has_output_format()) TP_RETURN_IF_ERROR(ReadFormat(message.output_format(), out));
  out.include_stop_str_in_output = message.include_stop_str_in_output();
  if (message.has_skip_special_tokens()) out.skip_special_tokens = message.skip_special_tokens();
  if (message.has_add_special_tokens()) out.add_special_tokens = message.add_special_tokens();
  out.ignore_eos = message.ignore_eos();
  out.return_trace = message.return_trace();
  return absl::OkStatus();
}

// The chat's body, read.
OrError<GrpcRequest> ReadAsChat(const OrderedJson& chat, FieldNames names) {
  auto read = ReadChatCompletion(chat);
  if (auto* error = std::get_if<ApiError>(&read)) return names.Own(std::move(*error));
  return GrpcRequest{std::get<InferenceRequest>(std::move(read)), std::move(names)};
}

}  // namespace

OrError<GrpcRequest> FromProto(const v1::GenerateRequest& message) {
  GrpcRequest out;
  if (message.has_chat()) {
    OrderedJson chat = OrderedJson::object();
    FieldNames names;
    if (auto status = ReadChat(message, chat, names); !status.ok()) return ConversionError(status);
    auto read = ReadAsChat(chat, std::move(names));
    if (auto* error = std::get_if<ApiError>(&read)) return std::move(*error);
    out = std::get<GrpcRequest>(std::move(read));
  } else {
    if (auto status = CheckNoChat(message); !status.ok()) return ConversionError(status);
    if (auto status = ReadPrompt(message, out.request, out.names); !status.ok()) {
      return ConversionError(status);
    }
  }
  if (auto status = ReadRest(message, out.request); !status.ok()) return ConversionError(status);
  for (const char* field : {"logit_bias", "allowed_token_ids", "bad_words"}) {
    out.names.Add(field, std::string("sampling.") + field);
  }
  return out;
}

OrError<GrpcRequest> FromProto(const v1::TokenizeRequest& message) {
  GrpcRequest out;
  if (message.has_chat()) {
    OrderedJson chat = OrderedJson::object();
    FieldNames names;
    if (auto status = ReadMessages(message.chat(), chat, names); !status.ok()) return ConversionError(status);
    if (auto status = ReadTools(message.tools(), chat, names); !status.ok()) return ConversionError(status);
    auto read = ReadAsChat(chat, std::move(names));
    if (auto* error = std::get_if<ApiError>(&read)) return std::move(*error);
    out = std::get<GrpcRequest>(std::move(read));
  } else if (message.has_text()) {
    if (message.tools_size() > 0) return ConversionError(FieldError("tools", "is for chats; give chat"));
    out.request.input = message.text();
  } else {
    return ConversionError(FieldError("input", "give one of text, chat"));
  }
  out.request.model = message.model();
  if (message.has_add_special_tokens()) out.request.add_special_tokens = message.add_special_tokens();
  return out;
}

OrError<EmbeddingRequest> FromProto(const v1::EmbedRequest& message) {
  const auto bad = [](std::string_view field, const std::string& what) {
    return ConversionError(FieldError(field, what));
  };
  EmbeddingRequest out;
  out.model = message.model();
  if (message.inputs().empty() || static_cast<size_t>(message.inputs_size()) > kEmbeddingInputsMax) {
    return bad("inputs", absl::StrCat("must have from 1 to ", kEmbeddingInputsMax, " elements"));
  }
  for (int i = 0; i < message.inputs_size(); ++i) {
    const v1::EmbedInput& input = message.inputs(i);
    const std::string field = absl::StrCat("inputs[", i, "]");
    if (input.has_text()) {
      out.inputs.emplace_back(input.text());
    } else if (input.has_tokens()) {
      std::vector<int32_t> ids;
      if (auto status = ReadIds((field + ".tokens").c_str(), input.tokens().ids(), kTokensMax, ids);
          !status.ok()) {
        return ConversionError(status);
      }
      out.inputs.emplace_back(std::move(ids));
    } else {
      return bad(field, "give one of text, tokens");
    }
  }
  if (message.pooling() == v1::POOLING_MEAN) {
    out.pooling = Pooling::kMean;
  } else if (message.pooling() != v1::POOLING_LAST && message.pooling() != v1::POOLING_UNSPECIFIED) {
    return bad("pooling", "must be one of POOLING_LAST, POOLING_MEAN");
  }
  if (message.has_normalize()) out.normalize = message.normalize();
  if (message.has_dimensions()) {
    if (message.dimensions() == 0 || message.dimensions() > kEmbeddingDimensionsMax) {
      return bad("dimensions", absl::StrCat("must be from 1 to ", kEmbeddingDimensionsMax));
    }
    out.dimensions = message.dimensions();
  }
  if (message.request_id().size() > kRequestIdBytesMax) {
    return bad("request_id", absl::StrCat("must have at most ", kRequestIdBytesMax, " bytes"));
  }
  if (CountCodePoints(message.cache_salt()) > kCacheSaltCharsMax) {
    return bad("cache_salt", absl::StrCat("must have at most ", kCacheSaltCharsMax, " characters"));
  }
  out.cache_salt = message.cache_salt();
  return out;
}

}  // namespace tidepool
