#include "server/gateway/field_reader.h"

#include <cmath>
#include <limits>

#include "absl/strings/str_cat.h"
#include "server/gateway/errors.h"

namespace tidepool {
namespace {

// Token ids are non-negative int32 on the wire.
constexpr int64_t kTokenIdMax = std::numeric_limits<int32_t>::max();

std::optional<int64_t> AsInt(const OrderedJson& v) {
  if (v.is_number_unsigned()) {
    const auto u = v.get<uint64_t>();
    if (u > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) return std::nullopt;
    return static_cast<int64_t>(u);
  }
  if (v.is_number_integer()) return v.get<int64_t>();
  if (v.is_number_float()) {
    const double d = v.get<double>();
    // 2^53: beyond it a double does not say which integer was meant.
    if (std::isfinite(d) && d == std::floor(d) && std::fabs(d) <= 9007199254740992.0) {
      return static_cast<int64_t>(d);
    }
  }
  return std::nullopt;
}

}  // namespace

size_t CountCodePoints(std::string_view utf8) {
  size_t n = 0;
  for (char c : utf8) n += (static_cast<unsigned char>(c) & 0xc0) != 0x80;
  return n;
}

const OrderedJson* FieldReader::Find(std::string_view field) const {
  const auto it = object_.find(std::string(field));
  return it == object_.end() || it->is_null() ? nullptr : &*it;
}

absl::StatusOr<std::optional<bool>> FieldReader::Bool(std::string_view field) const {
  const OrderedJson* v = Find(field);
  if (v == nullptr) return std::optional<bool>();
  if (!v->is_boolean()) return FieldError(field, "must be true or false");
  return std::optional<bool>(v->get<bool>());
}

absl::StatusOr<std::optional<int64_t>> FieldReader::Int(std::string_view field, int64_t min,
                                                        int64_t max) const {
  const OrderedJson* v = Find(field);
  if (v == nullptr) return std::optional<int64_t>();
  const auto n = AsInt(*v);
  if (!n || *n < min || *n > max) {
    return FieldError(field, absl::StrCat("must be a whole number from ", min, " to ", max));
  }
  return std::optional<int64_t>(*n);
}

absl::StatusOr<std::optional<uint64_t>> FieldReader::Bits(std::string_view field) const {
  const OrderedJson* v = Find(field);
  if (v == nullptr) return std::optional<uint64_t>();
  if (v->is_number_unsigned()) return std::optional<uint64_t>(v->get<uint64_t>());
  if (v->is_number_integer()) return std::optional<uint64_t>(static_cast<uint64_t>(v->get<int64_t>()));
  return FieldError(field, "must be a 64-bit whole number");
}

absl::StatusOr<std::optional<double>> FieldReader::Number(std::string_view field, double min, double max,
                                                          bool open_below) const {
  const OrderedJson* v = Find(field);
  if (v == nullptr) return std::optional<double>();
  const double d = v->is_number() ? v->get<double>() : std::numeric_limits<double>::quiet_NaN();
  if (!std::isfinite(d) || d < min || d > max || (open_below && d == min)) {
    return FieldError(field, absl::StrCat("must be a number ", open_below ? "above " : "from ", min,
                                          open_below ? " and at most " : " to ", max));
  }
  return std::optional<double>(d);
}

absl::StatusOr<std::optional<std::string>> FieldReader::String(std::string_view field,
                                                               size_t max_chars) const {
  const OrderedJson* v = Find(field);
  if (v == nullptr) return std::optional<std::string>();
  if (!v->is_string()) return FieldError(field, "must be a string");
  const auto& s = v->get_ref<const std::string&>();
  if (CountCodePoints(s) > max_chars) {
    return FieldError(field, absl::StrCat("must have at most ", max_chars, " characters"));
  }
  return std::optional<std::string>(s);
}

absl::StatusOr<std::vector<int32_t>> ReadTokenIds(std::string_view field, const OrderedJson& list,
                                                  size_t max_count) {
  if (!list.is_array()) return FieldError(field, "must be a list of token ids");
  if (list.size() > max_count)
    return FieldError(field, absl::StrCat("must have at most ", max_count, " ids"));
  std::vector<int32_t> ids;
  ids.reserve(list.size());
  for (const OrderedJson& v : list) {
    const auto n = AsInt(v);
    if (!n || *n < 0 || *n > kTokenIdMax) {
      return FieldError(field, absl::StrCat("token ids must be whole numbers from 0 to ", kTokenIdMax));
    }
    ids.push_back(static_cast<int32_t>(*n));
  }
  return ids;
}

absl::StatusOr<std::optional<std::vector<int32_t>>> FieldReader::TokenIds(std::string_view field,
                                                                          size_t max_count) const {
  const OrderedJson* v = Find(field);
  if (v == nullptr) return std::optional<std::vector<int32_t>>();
  auto ids = ReadTokenIds(field, *v, max_count);
  if (!ids.ok()) return ids.status();
  return std::optional<std::vector<int32_t>>(std::move(ids).value());
}

}  // namespace tidepool
