#pragma once

#include <algorithm>
#include <cstddef>
#include <string>
#include <utility>
#include <vector>

namespace tidepool {

// BenchRow: one line of a benchmark's table. A figure alone means little on a machine that nobody else has:
// where there is something to measure beside it, it was measured in the same run, in turns.
struct BenchRow {
  std::string name;
  double value = 0;
  std::string unit;            // GB/s (10^9 bytes), us, ms, s, bytes, share
  std::string reference_name;  // what stands beside it; empty: nothing
  double reference = 0;        // in `unit`
  double ratio = 0;            // value / reference: where both came in rounds, the median of the rounds' own
};

// Of at least one value; of an even number the upper of the two in the middle.
inline double MedianOf(std::vector<double> values) {
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

// The row of rounds that measured value and reference in turns: values[i] stands beside references[i].
inline BenchRow RowOfRounds(std::string name, const std::vector<double>& values, std::string unit,
                            std::string reference_name, const std::vector<double>& references) {
  std::vector<double> ratios(values.size());
  for (size_t i = 0; i < values.size(); ++i) ratios[i] = values[i] / references[i];
  return {std::move(name),           MedianOf(values),     std::move(unit),
          std::move(reference_name), MedianOf(references), MedianOf(std::move(ratios))};
}

}  // namespace tidepool
