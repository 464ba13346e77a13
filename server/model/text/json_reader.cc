#include "server/model/text/json_reader.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "base/status.h"

namespace tidepool::json_reader {

using nlohmann::json;

namespace {

// absl::StrCat takes absl::string_view, which this Abseil build keeps apart from std's.
absl::string_view Sv(std::string_view s) { return {s.data(), s.size()}; }

std::string Path(std::string_view where, std::string_view key) {
  return absl::StrCat(Sv(where), where.empty() || where.back() == ':' ? " " : ".", Sv(key));
}

absl::Status Wrong(const std::string& path, const json& value, std::string_view wanted) {
  return absl::InvalidArgumentError(absl::StrCat(path, " is ", value.type_name(), ", must be ", Sv(wanted)));
}

// Nesting of brackets outside strings. nlohmann parses without recursion but destroys and dumps with it.
int Depth(std::string_view text) {
  int depth = 0, deepest = 0;
  bool in_string = false;
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (in_string) {
      if (c == '\\') ++i;
      if (c == '"') in_string = false;
    } else if (c == '"') {
      in_string = true;
    } else if (c == '{' || c == '[') {
      deepest = std::max(deepest, ++depth);
    } else if (c == '}' || c == ']') {
      --depth;
    }
  }
  return deepest;
}

}  // namespace

absl::StatusOr<json> Parse(std::string_view text, std::string_view where) {
  if (const int depth = Depth(text); depth > kDepthMax) {
    return absl::InvalidArgumentError(
        absl::StrCat(Sv(where), ": nested ", depth, " deep; at most ", kDepthMax, " is read"));
  }
  try {
    return json::parse(text.begin(), text.end());
  } catch (const json::parse_error& e) {
    return absl::InvalidArgumentError(absl::StrCat(Sv(where), ": not JSON at byte ", e.byte));
  } catch (const std::exception& e) {
    return absl::InvalidArgumentError(absl::StrCat(Sv(where), ": not JSON: ", e.what()));
  }
}

const json* Member(const json& object, std::string_view key) {
  if (!object.is_object()) return nullptr;
  const auto it = object.find(std::string(key));
  return it == object.end() || it->is_null() ? nullptr : &*it;
}

absl::StatusOr<std::string> GetString(const json& object, std::string_view key, std::string_view where) {
  const json* value = Member(object, key);
  if (value == nullptr) return absl::InvalidArgumentError(absl::StrCat(Path(where, key), " is missing"));
  if (!value->is_string()) return Wrong(Path(where, key), *value, "a string");
  return value->get<std::string>();
}

absl::StatusOr<std::string> GetString(const json& object, std::string_view key, std::string_view where,
                                      std::string_view fallback) {
  if (Member(object, key) == nullptr) return std::string(fallback);
  return GetString(object, key, where);
}

absl::StatusOr<bool> GetBool(const json& object, std::string_view key, std::string_view where,
                             bool fallback) {
  const json* value = Member(object, key);
  if (value == nullptr) return fallback;
  if (!value->is_boolean()) return Wrong(Path(where, key), *value, "true or false");
  return value->get<bool>();
}

absl::StatusOr<int64_t> AsInt(const json& value, std::string_view where, int64_t low, int64_t high) {
  bool ok = value.is_number_integer();
  int64_t n = 0;
  if (ok && value.is_number_unsigned()) {
    const uint64_t u = value.get<uint64_t>();
    ok = u <= static_cast<uint64_t>(INT64_MAX);
    n = static_cast<int64_t>(u);
  } else if (ok) {
    n = value.get<int64_t>();
  }
  if (!ok || n < low || n > high) {
    return absl::InvalidArgumentError(
        absl::StrCat(Sv(where), " must be a whole number from ", low, " to ", high));
  }
  return n;
}

absl::StatusOr<int64_t> GetInt(const json& object, std::string_view key, std::string_view where, int64_t low,
                               int64_t high) {
  const json* value = Member(object, key);
  if (value == nullptr) return absl::InvalidArgumentError(absl::StrCat(Path(where, key), " is missing"));
  return AsInt(*value, Path(where, key), low, high);
}

absl::Status RequireObject(const json& value, std::string_view where) {
  return value.is_object() ? absl::OkStatus() : Wrong(std::string(where), value, "an object");
}

absl::Status RequireArray(const json& value, std::string_view where) {
  return value.is_array() ? absl::OkStatus() : Wrong(std::string(where), value, "an array");
}

}  // namespace tidepool::json_reader
