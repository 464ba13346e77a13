#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"
#include "base/small_file.h"

namespace tidepool {

// Parses JSON from outside. `where` (a file name) starts every message. InvalidArgument: malformed, nested
// deeper than 64, or a key twice in one object (nlohmann would keep the last and say nothing).
absl::StatusOr<nlohmann::json> ParseJson(std::string_view text, std::string_view where);

// JsonFields: checked access to the fields of one object (View; borrows the object). Errors are
// InvalidArgument and name file, field, value and range.
class JsonFields {
 public:
  JsonFields(const nlohmann::json& object, std::string_view where) : object_(object), where_(where) {}

  // nullptr where absent or null.
  const nlohmann::json* Find(std::string_view field) const;

  // An integer in [lo, hi]; `fallback` where absent, an error where there is no fallback. 8.0 is refused:
  // a count is written as one.
  absl::StatusOr<int64_t> Int(std::string_view field, int64_t lo, int64_t hi,
                              std::optional<int64_t> fallback = std::nullopt) const;
  // A finite number in [lo, hi].
  absl::StatusOr<double> Number(std::string_view field, double lo, double hi,
                                std::optional<double> fallback = std::nullopt) const;
  absl::StatusOr<bool> Bool(std::string_view field, bool fallback) const;

  const std::string& where() const { return where_; }

 private:
  absl::Status Wrong(std::string_view field, const nlohmann::json& value, std::string_view expected) const;

  const nlohmann::json& object_;
  std::string where_;
};

// A value as one short line for an error message; never throws, whatever the bytes.
std::string JsonForMessage(const nlohmann::json& value);

}  // namespace tidepool
