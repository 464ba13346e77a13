#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"

namespace tidepool {

using OrderedJson = nlohmann::ordered_json;

inline constexpr int kJsonDepthMax = 64;

// Strict JSON from outside: valid UTF-8, at most kJsonDepthMax levels, no duplicate keys, numbers that a
// double or a 64-bit integer holds. Errors: InvalidArgument, with the position.
absl::StatusOr<OrderedJson> ParseJson(std::string_view text);

// One line. Invalid UTF-8 becomes U+FFFD: half-finished tokens produce it, and nlohmann's default throws.
std::string DumpJson(const OrderedJson& json);

// Appends `text` as a JSON string, quotes included. `text` is valid UTF-8.
void AppendJsonString(std::string_view text, std::string& out);

}  // namespace tidepool
