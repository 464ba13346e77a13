#pragma once

#include <string>
#include <vector>

#include "nlohmann/json.hpp"

namespace tidepool {

// Rows under a header, columns padded to their widest cell.
std::string FormatTable(const std::vector<std::string>& header,
                        const std::vector<std::vector<std::string>>& rows);

// An array of flat objects as a table with the keys of the first, in order.
std::string FormatTable(const nlohmann::ordered_json& rows);

// Prints `value` to stdout; bytes that are not UTF-8 are replaced rather than thrown on.
void PrintJson(const nlohmann::ordered_json& value);

}  // namespace tidepool
