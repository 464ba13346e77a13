#include "server/cli/output.h"

#include <algorithm>
#include <cstdio>

namespace tidepool {
namespace {

std::string Cell(const nlohmann::ordered_json& value) {
  if (value.is_string()) return value.get<std::string>();
  if (value.is_number_float()) {
    char text[32];
    std::snprintf(text, sizeof text, "%.4g", value.get<double>());
    return text;
  }
  return value.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
}

}  // namespace

std::string FormatTable(const std::vector<std::string>& header,
                        const std::vector<std::vector<std::string>>& rows) {
  std::vector<size_t> widths(header.size());
  for (size_t i = 0; i < header.size(); ++i) {
    widths[i] = header[i].size();
    for (const auto& row : rows) widths[i] = std::max(widths[i], row.at(i).size());
  }
  std::string out;
  const auto append = [&](const std::vector<std::string>& row) {
    for (size_t i = 0; i < row.size(); ++i) {
      out += row[i];
      if (i + 1 < row.size()) out.append(widths[i] - row[i].size() + 2, ' ');
    }
    out += '\n';
  };
  append(header);
  for (const auto& row : rows) append(row);
  return out;
}

std::string FormatTable(const nlohmann::ordered_json& rows) {
  if (rows.empty()) return "(none)\n";
  std::vector<std::string> header;
  for (const auto& [key, value] : rows[0].items()) header.push_back(key);
  std::vector<std::vector<std::string>> cells;
  for (const auto& row : rows) {
    std::vector<std::string> line;
    for (const std::string& key : header) line.push_back(Cell(row.value(key, nlohmann::ordered_json())));
    cells.push_back(std::move(line));
  }
  return FormatTable(header, cells);
}

void PrintJson(const nlohmann::ordered_json& value) {
  std::fputs((value.dump(2, ' ', false, nlohmann::ordered_json::error_handler_t::replace) + "\n").c_str(),
             stdout);
}

}  // namespace tidepool
