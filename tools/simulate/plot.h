#pragma once

#include <string>
#include <utility>
#include <vector>

#include "tools/simulate/result.h"

namespace tidepool {

// One line of a chart.
struct Series {
  std::string name;
  std::vector<std::pair<double, double>> points;  // x ascending
  bool marks = false;                             // a dot at each point
};

struct Chart {
  std::string title;
  std::string x_label, y_label;
  std::vector<Series> series;
  bool log_x = false;  // all x above 0
  double y_max = 0;    // 0: as high as the data
  std::string x_note;  // a dashed vertical line with this name at x_mark
  double x_mark = 0;
};

// Charts below each other in one SVG 1.1 document that names no font file and no script.
std::string RenderSvg(const std::vector<Chart>& charts);

// Load over time, and the distributions of TTFT and of gaps between tokens.
std::vector<Chart> ChartsOf(const SimResult& result);
// What a sweep shows: goodput, mean TTFT, rejections and hit rate over the key that was varied last that is a
// number; a line for each combination of the others. Of keys that are words only: distributions and load.
std::vector<Chart> ChartsOf(const std::vector<SimResult>& results, const std::vector<std::string>& keys);

}  // namespace tidepool
