#include "server/gateway/generation_defaults.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "server/gateway/field_reader.h"
#include "server/gateway/request.h"
#include "server/model/json_reader.h"

namespace tidepool {
namespace {

// A generation_config.json has a few hundred bytes.
constexpr uint64_t kFileBytesMax = 1 << 20;

absl::StatusOr<GenerationDefaults> Read(std::string_view text) {
  TP_ASSIGN_OR_RETURN(const OrderedJson json, ParseJson(text));
  if (!json.is_object()) return absl::InvalidArgumentError("must be a JSON object");
  const FieldReader fields(json);
  GenerationDefaults out;
  const auto number = [&](std::string_view field, double min, double max, bool open_below,
                          std::optional<float>& into) -> absl::Status {
    TP_ASSIGN_OR_RETURN(const auto value, fields.Number(field, min, max, open_below));
    if (value) into = static_cast<float>(*value);
    return absl::OkStatus();
  };
  TP_RETURN_IF_ERROR(number("temperature", 0, 2, false, out.temperature));
  TP_RETURN_IF_ERROR(number("top_p", 0, 1, true, out.top_p));
  TP_RETURN_IF_ERROR(number("min_p", 0, 1, false, out.min_p));
  TP_RETURN_IF_ERROR(number("repetition_penalty", 0, kRepetitionPenaltyMax, true, out.repetition_penalty));
  TP_ASSIGN_OR_RETURN(const auto top_k, fields.Int("top_k", -1, 1 << 24));
  if (top_k) out.top_k = static_cast<int32_t>(std::max<int64_t>(0, *top_k));
  TP_ASSIGN_OR_RETURN(const auto max_new_tokens, fields.Int("max_new_tokens", 1, 1 << 24));
  if (max_new_tokens) out.max_new_tokens = static_cast<uint32_t>(*max_new_tokens);
  return out;
}

}  // namespace

absl::StatusOr<GenerationDefaults> LoadGenerationDefaults(const ModelConfig& config) {
  if (config.generation_config == "off") return GenerationDefaults();
  const std::string path = config.path + "/generation_config.json";
  const auto text = ReadSmallFile(path, kFileBytesMax);
  if (absl::IsNotFound(text.status())) return GenerationDefaults();
  TP_RETURN_IF_ERROR(text.status());
  auto defaults = Read(*text);
  if (!defaults.ok()) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": ", std::string(defaults.status().message()),
                                                   "; mend it, or set model.generation_config to off"));
  }
  return defaults;
}

}  // namespace tidepool
