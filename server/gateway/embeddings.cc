#include "server/gateway/embeddings.h"

#include <bit>
#include <charconv>
#include <limits>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "server/gateway/field_reader.h"
#include "server/gateway/json.h"

namespace tidepool {
namespace {

constexpr size_t kNameChars = 256;
constexpr size_t kUserChars = 512;

// Of other servers' embeddings, and of chat embeddings. Null and empty ask for nothing.
constexpr std::string_view kUnsupportedFields[] = {"messages", "truncate_prompt_tokens", "embd_normalize",
                                                   "task_type", "input_type"};

std::string At(size_t i) { return absl::StrCat("input[", i, "]"); }

absl::Status ReadInputs(const OrderedJson& input, EmbeddingRequest& out) {
  constexpr char kShape[] =
      "must be a string, a list of strings, a list of token ids or a list of such lists";
  if (input.is_string()) {
    out.inputs.emplace_back(input.get<std::string>());
  } else if (!input.is_array()) {
    return FieldError("input", kShape);
  } else if (input.empty()) {
    return FieldError("input", "must not be empty");
  } else if (input.front().is_number()) {
    TP_ASSIGN_OR_RETURN(auto ids, ReadTokenIds("input", input, kEmbeddingTokensMax));
    out.inputs.emplace_back(std::move(ids));
  } else if (input.size() > kEmbeddingInputsMax) {
    return FieldError("input", absl::StrCat("has ", input.size(), " entries; at most ", kEmbeddingInputsMax,
                                            " are taken at once"));
  } else {
    for (size_t i = 0; i < input.size(); ++i) {
      if (input[i].is_string()) {
        out.inputs.emplace_back(input[i].get<std::string>());
      } else if (input[i].is_array()) {
        TP_ASSIGN_OR_RETURN(auto ids, ReadTokenIds(At(i), input[i], kEmbeddingTokensMax));
        out.inputs.emplace_back(std::move(ids));
      } else {
        return FieldError(At(i), "must be a string or a list of token ids");
      }
    }
  }
  for (size_t i = 0; i < out.inputs.size(); ++i) {
    const bool empty = std::visit([](const auto& v) { return v.empty(); }, out.inputs[i]);
    if (empty)
      return FieldError(out.inputs.size() == 1 && !input.is_array() ? "input" : At(i), "must not be empty");
  }
  return absl::OkStatus();
}

absl::StatusOr<EmbeddingRequest> Read(const OrderedJson& body) {
  EmbeddingRequest out;
  const FieldReader fields(body);
  TP_ASSIGN_OR_RETURN(auto model, fields.String("model", kNameChars));
  out.model = model.value_or("");
  const OrderedJson* input = fields.Find("input");
  if (input == nullptr) return FieldError("input", "is required");
  TP_RETURN_IF_ERROR(ReadInputs(*input, out));
  TP_ASSIGN_OR_RETURN(const auto format, fields.String("encoding_format", kNameChars));
  if (format && *format != "float" && *format != "base64") {
    return FieldError("encoding_format", "must be 'float' or 'base64'");
  }
  out.base64 = format == "base64";
  TP_ASSIGN_OR_RETURN(const auto dimensions, fields.Int("dimensions", 1, kEmbeddingDimensionsMax));
  if (dimensions) out.dimensions = static_cast<uint32_t>(*dimensions);
  TP_ASSIGN_OR_RETURN(const auto pooling, fields.String("pooling", kNameChars));
  if (pooling && *pooling != "last" && *pooling != "mean") {
    return FieldError("pooling", "must be 'last' or 'mean'");
  }
  if (pooling == "mean") out.pooling = Pooling::kMean;
  TP_ASSIGN_OR_RETURN(const auto normalize, fields.Bool("normalize"));
  out.normalize = normalize.value_or(true);
  TP_ASSIGN_OR_RETURN(out.add_special_tokens, fields.Bool("add_special_tokens"));
  TP_ASSIGN_OR_RETURN(const auto priority, fields.Int("priority", -1000, 1000));
  out.priority = static_cast<int32_t>(priority.value_or(0));
  TP_ASSIGN_OR_RETURN(auto salt, fields.String("cache_salt", kCacheSaltCharsMax));
  out.cache_salt = std::move(salt).value_or("");
  // Checked, and of no use here: tenants are told apart by their keys.
  TP_RETURN_IF_ERROR(fields.String("user", kUserChars).status());
  return out;
}

void AppendNumbers(const std::vector<float>& numbers, std::string& out) {
  out += '[';
  char text[32];
  for (size_t i = 0; i < numbers.size(); ++i) {
    if (i > 0) out += ',';
    // The fewest digits that read back as the same float32.
    const auto end = std::to_chars(text, text + sizeof text, numbers[i]).ptr;
    out.append(text, static_cast<size_t>(end - text));
  }
  out += ']';
}

void AppendBase64(const std::vector<float>& numbers, std::string& out) {
  std::string bytes;
  bytes.reserve(numbers.size() * sizeof(float));
  for (const float x : numbers) {
    const auto bits = std::bit_cast<uint32_t>(x);
    for (int shift = 0; shift < 32; shift += 8) bytes += static_cast<char>(bits >> shift & 0xff);
  }
  out += '"';
  out += absl::Base64Escape(bytes);
  out += '"';
}

}  // namespace

std::variant<EmbeddingRequest, ApiError> ParseEmbeddings(std::string_view body) {
  auto json = ParseJson(body);
  if (!json.ok()) return MakeError(errors::kInvalidJson, std::string(json.status().message()));
  if (!json->is_object()) return MakeError(errors::kInvalidJson, "the body must be a JSON object");
  for (const std::string_view field : kUnsupportedFields) {
    const auto it = json->find(std::string(field));
    if (it == json->end() || it->is_null() || (it->is_structured() && it->empty())) continue;
    return MakeError(errors::kUnsupported,
                     absl::StrCat(std::string(field), ": /v1/embeddings does not support it; leave it out"),
                     std::string(field));
  }
  auto request = Read(*json);
  if (!request.ok()) return FromFieldError(errors::kInvalidRequest, request.status());
  return *std::move(request);
}

std::string EmbeddingsBody(const EmbeddingsOutcome& outcome, std::string_view model, bool base64) {
  std::string out = R"({"object":"list","data":[)";
  for (size_t i = 0; i < outcome.vectors.size(); ++i) {
    absl::StrAppend(&out, i > 0 ? "," : "", R"({"object":"embedding","index":)", i, R"(,"embedding":)");
    (base64 ? AppendBase64 : AppendNumbers)(outcome.vectors[i], out);
    out += '}';
  }
  out += R"(],"model":)";
  AppendJsonString(model, out);
  absl::StrAppend(&out, R"(,"usage":{"prompt_tokens":)", outcome.prompt_tokens, R"(,"total_tokens":)",
                  outcome.prompt_tokens, "}}");
  return out;
}

std::variant<TokenLists, ApiError> TokeniseInputs(const EmbeddingRequest& request, const Tokenizer& tokenizer,
                                                  const EmbeddingModel& model) {
  const auto wrong = [](std::string field, std::string what) {
    return MakeError(errors::kInvalidRequest, absl::StrCat(field, ": ", what), field);
  };
  if (model.hidden_size == 0) {
    return MakeError(errors::kUnsupported, "input: the workers that serve this model give no embeddings",
                     "input");
  }
  if (request.dimensions && *request.dimensions != model.hidden_size) {
    return wrong("dimensions", absl::StrCat("must be ", model.hidden_size,
                                            ", the model's own: its vectors are not made to be cut off"));
  }
  if (uint64_t{request.inputs.size()} * model.hidden_size > kEmbeddingNumbersMax) {
    return wrong("input", absl::StrCat(request.inputs.size(), " vectors of ", model.hidden_size,
                                       " numbers are more than ", kEmbeddingNumbersMax,
                                       "; send fewer inputs at once"));
  }
  TokenLists lists;
  size_t total = 0;
  for (size_t i = 0; i < request.inputs.size(); ++i) {
    const std::string field = request.inputs.size() == 1 ? "input" : At(i);
    if (const auto* ids = std::get_if<std::vector<int32_t>>(&request.inputs[i])) {
      lists.push_back(*ids);
    } else {
      // As a raw prompt: whoever writes it decides what its special tokens are.
      Tokenizer::EncodeOptions options;
      options.add_special_tokens = request.add_special_tokens.value_or(true);
      auto ids_of_text = tokenizer.Encode(std::get<std::string>(request.inputs[i]), options);
      if (!ids_of_text.ok()) return wrong(field, std::string(ids_of_text.status().message()));
      lists.push_back(*std::move(ids_of_text));
    }
    const std::vector<int32_t>& list = lists.back();
    if (list.empty()) return wrong(field, "must hold at least one token");
    for (const int32_t id : list) {
      if (id >= 0 && static_cast<uint32_t>(id) < model.vocab_size) continue;
      return wrong(field,
                   absl::StrCat("token id ", id, " is not below the vocabulary's size, ", model.vocab_size));
    }
    if (list.size() > model.max_model_len) {
      return MakeError(
          errors::kContextLength,
          absl::StrCat(field, ": has ", list.size(), " tokens; this model's maximum context length is ",
                       model.max_model_len, " tokens; shorten it"),
          field);
    }
    total += list.size();
    if (total > kEmbeddingTokensMax) {
      return wrong("input", absl::StrCat("has more than ", kEmbeddingTokensMax,
                                         " tokens in all; send fewer inputs at once"));
    }
  }
  return lists;
}

}  // namespace tidepool
