#pragma once

#include <span>
#include <vector>

namespace tidepool {

// Exact figures over whole samples, as numpy computes them; 0 of an empty sample.
double Mean(std::span<const double> sample);
// Of the population: divided by n.
double StandardDeviation(std::span<const double> sample);
// `sorted` ascending, percent in [0, 100]. Between two values: linear (numpy's default; Hyndman and Fan's
// type 7).
double Percentile(std::span<const double> sorted, double percent);

}  // namespace tidepool
