#pragma once

#include <cstddef>
#include <optional>
#include <vector>

namespace tidepool {

// SweepCore: Core; looks for the highest request rate that a server sustains within its SLO. It doubles the
// rate until a step fails (or halves it until one passes), then bisects between the highest that passed and
// the lowest that failed, in the ratio's middle. A step passes if at least `attainment` of its requests were
// good. It stops when the two are within `tolerance` of each other (0.1: ten per cent), after `steps_max`
// steps, or at a bound of the rate.
class SweepCore {
 public:
  struct Options {
    double first_rate = 1;
    double rate_min = 0.01, rate_max = 100'000;
    double attainment = 0.9;
    double tolerance = 0.1;
    size_t steps_max = 16;
  };
  struct Step {
    double rate = 0;
    double goodput = 0;  // good requests a second
    double good_share = 0;
    bool passed = false;
  };

  explicit SweepCore(const Options& options) : options_(options), rate_(options.first_rate) {}

  // The rate to try next; nullopt: the search is over.
  std::optional<double> Next() const;
  // What came of the rate that Next gave.
  void Report(double goodput, double good_share);

  const std::vector<Step>& steps() const { return steps_; }
  // The passed step of the highest goodput; nullptr: none passed.
  const Step* Best() const;
  // Why the search is over.
  const char* StopReason() const { return stop_reason_; }

 private:
  const Options options_;
  double rate_;
  std::optional<double> passed_, failed_;  // the highest, the lowest
  std::vector<Step> steps_;
  const char* stop_reason_ = nullptr;
};

}  // namespace tidepool
