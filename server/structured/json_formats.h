#pragma once

#include <optional>
#include <string_view>

namespace tidepool::structured {

// The values of `format` that are enforced, each as a regex (whole text) for texts that are surely valid.
// Some formats have more texts than that; what is left out is said with each in json_formats.cc. nullopt:
// unknown, or one that no finite automaton tells (regex).
std::optional<std::string_view> FormatPattern(std::string_view format);

}  // namespace tidepool::structured
