#pragma once

#include <cstddef>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

// Checked access to JSON that strangers wrote (tokenizer files). Nothing here throws; every error names the
// file and the field by the `where` that the caller passes (`tokenizer.json: decoder.decoders[2]`).
namespace tidepool::json_reader {

inline constexpr int kDepthMax = 64;

// Errors: InvalidArgument with the byte where the text stops being JSON, or for nesting deeper than
// kDepthMax.
absl::StatusOr<nlohmann::json> Parse(std::string_view text, std::string_view where);

// The member, or nullptr where it is absent or null.
const nlohmann::json* Member(const nlohmann::json& object, std::string_view key);

absl::StatusOr<std::string> GetString(const nlohmann::json& object, std::string_view key,
                                      std::string_view where);
// `fallback` where the member is absent or null.
absl::StatusOr<std::string> GetString(const nlohmann::json& object, std::string_view key,
                                      std::string_view where, std::string_view fallback);
absl::StatusOr<bool> GetBool(const nlohmann::json& object, std::string_view key, std::string_view where,
                             bool fallback);
// An integer within [low, high].
absl::StatusOr<int64_t> GetInt(const nlohmann::json& object, std::string_view key, std::string_view where,
                               int64_t low, int64_t high);
// The same of a value itself; `where` names it in full.
absl::StatusOr<int64_t> AsInt(const nlohmann::json& value, std::string_view where, int64_t low, int64_t high);

// InvalidArgument unless `value` is an object (array).
absl::Status RequireObject(const nlohmann::json& value, std::string_view where);
absl::Status RequireArray(const nlohmann::json& value, std::string_view where);

}  // namespace tidepool::json_reader
