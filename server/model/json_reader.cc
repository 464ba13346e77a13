#include "server/model/json_reader.h"

#include <cmath>
#include <set>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/log.h"
#include "base/status.h"

namespace tidepool {
namespace {

constexpr int kDepthMax = 64;

// Counted on the text, before the parser has built anything.
bool TooDeep(std::string_view text) {
  int depth = 0;
  bool in_string = false;
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (in_string) {
      if (c == '\\') {
        ++i;
      } else if (c == '"') {
        in_string = false;
      }
    } else if (c == '"') {
      in_string = true;
    } else if (c == '{' || c == '[') {
      if (++depth > kDepthMax) return true;
    } else if (c == '}' || c == ']') {
      --depth;
    }
  }
  return false;
}

}  // namespace

absl::StatusOr<nlohmann::json> ParseJson(std::string_view text, std::string_view where) {
  using nlohmann::json;
  if (TooDeep(text)) {
    return absl::InvalidArgumentError(
        absl::StrFormat("%s: JSON is nested deeper than %d", std::string(where), kDepthMax));
  }
  std::vector<std::set<std::string>> keys;
  std::string duplicate;
  auto watch = [&](int, json::parse_event_t event, json& parsed) {
    if (event == json::parse_event_t::object_start) {
      keys.emplace_back();
    } else if (event == json::parse_event_t::object_end) {
      keys.pop_back();
    } else if (event == json::parse_event_t::key && duplicate.empty()) {
      const auto& key = parsed.get_ref<const std::string&>();
      if (!keys.back().insert(key).second) duplicate = key;
    }
    return true;
  };
  try {
    json out = json::parse(text.begin(), text.end(), watch);
    if (!duplicate.empty()) {
      return absl::InvalidArgumentError(
          absl::StrCat(std::string(where), ": key \"", Printable(duplicate), "\" twice in one object"));
    }
    return out;
  } catch (const json::exception& e) {
    return absl::InvalidArgumentError(absl::StrCat(std::string(where), ": ", e.what()));
  }
}

std::string JsonForMessage(const nlohmann::json& value) {
  std::string out = value.dump(-1, ' ', true, nlohmann::json::error_handler_t::replace);
  if (out.size() > 120) out = out.substr(0, 117) + "...";
  return out;
}

const nlohmann::json* JsonFields::Find(std::string_view field) const {
  const auto it = object_.find(std::string(field));
  return it == object_.end() || it->is_null() ? nullptr : &*it;
}

absl::Status JsonFields::Wrong(std::string_view field, const nlohmann::json& value,
                               std::string_view expected) const {
  return absl::InvalidArgumentError(absl::StrCat(where_, ": ", std::string(field), " is ",
                                                 JsonForMessage(value), "; it must be ",
                                                 std::string(expected)));
}

absl::StatusOr<int64_t> JsonFields::Int(std::string_view field, int64_t lo, int64_t hi,
                                        std::optional<int64_t> fallback) const {
  const std::string expected = absl::StrCat("an integer in [", lo, ", ", hi, "]");
  const nlohmann::json* v = Find(field);
  if (v == nullptr) {
    if (fallback) return *fallback;
    return absl::InvalidArgumentError(
        absl::StrCat(where_, ": ", std::string(field), " is missing; it must be ", expected));
  }
  // get<> on another type or range converts without a word: decide by the stored type first.
  if (v->is_number_unsigned()) {
    const uint64_t u = v->get<uint64_t>();
    if (hi >= 0 && u <= static_cast<uint64_t>(hi) && static_cast<int64_t>(u) >= lo) {
      return static_cast<int64_t>(u);
    }
  } else if (v->is_number_integer()) {
    const int64_t i = v->get<int64_t>();
    if (i >= lo && i <= hi) return i;
  }
  return Wrong(field, *v, expected);
}

absl::StatusOr<double> JsonFields::Number(std::string_view field, double lo, double hi,
                                          std::optional<double> fallback) const {
  const std::string expected = absl::StrFormat("a number in [%g, %g]", lo, hi);
  const nlohmann::json* v = Find(field);
  if (v == nullptr) {
    if (fallback) return *fallback;
    return absl::InvalidArgumentError(
        absl::StrCat(where_, ": ", std::string(field), " is missing; it must be ", expected));
  }
  if (v->is_number()) {
    const double d = v->get<double>();
    if (std::isfinite(d) && d >= lo && d <= hi) return d;
  }
  return Wrong(field, *v, expected);
}

absl::StatusOr<bool> JsonFields::Bool(std::string_view field, bool fallback) const {
  const nlohmann::json* v = Find(field);
  if (v == nullptr) return fallback;
  if (!v->is_boolean()) return Wrong(field, *v, "true or false");
  return v->get<bool>();
}

}  // namespace tidepool
