#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace tidepool {

// WeightedHistogram: of durations in seconds, each with a weight; quantiles are at most 1% off. Buckets grow
// by 2% from 1 us on; what is shorter counts as that. Not thread-safe.
class WeightedHistogram {
 public:
  void Add(double seconds, double weight = 1) {
    if (weight <= 0) return;
    const size_t i = Bucket(seconds);
    if (i >= weights_.size()) weights_.resize(i + 1);
    weights_[i] += weight;
    weight_ += weight;
    sum_ += seconds * weight;
  }
  double weight() const { return weight_; }
  double mean() const { return weight_ > 0 ? sum_ / weight_ : 0; }
  // q in [0, 1]; 0 where nothing was added.
  double Quantile(double q) const {
    double left = q * weight_;
    for (size_t i = 0; i < weights_.size(); ++i) {
      if (weights_[i] > 0 && left <= weights_[i]) return Middle(i);
      left -= weights_[i];
    }
    for (size_t i = weights_.size(); i-- > 0;) {
      if (weights_[i] > 0) return Middle(i);
    }
    return 0;
  }
  struct Step {
    double seconds = 0;
    double share = 0;  // of the weight, up to here
  };
  std::vector<Step> Cdf() const {
    std::vector<Step> out;
    double below = 0;
    for (size_t i = 0; i < weights_.size(); ++i) {
      if (weights_[i] <= 0) continue;
      below += weights_[i];
      out.push_back({Middle(i), below / weight_});
    }
    return out;
  }

 private:
  static constexpr double kLeast = 1e-6;
  static constexpr double kGrowth = 1.02;

  static size_t Bucket(double seconds) {
    if (!(seconds > kLeast)) return 0;
    return 1 + static_cast<size_t>(std::log(seconds / kLeast) / std::log(kGrowth));
  }
  static double Middle(size_t i) {
    return i == 0 ? kLeast : kLeast * std::pow(kGrowth, static_cast<double>(i) - 0.5);
  }

  std::vector<double> weights_;
  double weight_ = 0, sum_ = 0;
};

}  // namespace tidepool
