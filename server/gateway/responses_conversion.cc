#include "server/gateway/responses_conversion.h"

#include <algorithm>

#include "server/gateway/field_reader.h"
#include "server/gateway/openai_fields.h"

namespace tidepool {
namespace {

bool AsksForNothing(const OrderedJson& value, std::string_view harmless) {
  if (value.is_null()) return true;
  if ((value.is_string() || value.is_structured()) && (value.empty() || value == "")) return true;
  return !harmless.empty() && value == OrderedJson::parse(harmless);
}

// `path` begins with `prefix`, at the border of a name.
bool IsUnder(std::string_view path, std::string_view prefix) {
  if (!path.starts_with(prefix)) return false;
  return path.size() == prefix.size() || path[prefix.size()] == '.' || path[prefix.size()] == '[';
}

}  // namespace

absl::Status UnsupportedField(std::string_view field, std::string_view what) {
  return absl::UnimplementedError(std::string(field) + ": " + std::string(what));
}

ApiError ConversionError(const absl::Status& status) {
  return FromFieldError(
      status.code() == absl::StatusCode::kUnimplemented ? errors::kUnsupported : errors::kInvalidRequest,
      status);
}

absl::Status RefuseFields(const OrderedJson& object, std::string_view where,
                          std::span<const RefusedField> fields) {
  for (const RefusedField& refused : fields) {
    const auto it = object.find(std::string(refused.field));
    if (it == object.end() || AsksForNothing(*it, refused.harmless)) continue;
    return UnsupportedField(
        std::string(where) + std::string(refused.field),
        "this server does not support it with that value; " +
            std::string(refused.instead.empty() ? std::string_view("leave it out") : refused.instead));
  }
  return absl::OkStatus();
}

void CopyShared(const OrderedJson& body, std::span<const std::string_view> except, OrderedJson& chat) {
  for (const KnownField& field : KnownFields()) {
    if (std::ranges::find(except, field.name) != except.end()) continue;
    const OrderedJson* value = FieldReader(body).Find(field.name);
    if (value != nullptr) chat[std::string(field.name)] = *value;
  }
}

ApiError FieldNames::Own(ApiError error) const {
  const std::pair<std::string, std::string>* best = nullptr;
  for (const auto& name : names_) {
    if (IsUnder(error.param, name.first) && (best == nullptr || name.first.size() > best->first.size())) {
      best = &name;
    }
  }
  if (best == nullptr) return error;
  const auto& [chat, own] = *best;
  if (error.message.starts_with(chat)) error.message.replace(0, chat.size(), own);
  error.param.replace(0, chat.size(), own);
  return error;
}

}  // namespace tidepool
