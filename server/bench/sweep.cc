#include "server/bench/sweep.h"

#include <algorithm>
#include <cmath>

namespace tidepool {

std::optional<double> SweepCore::Next() const {
  if (stop_reason_ != nullptr) return std::nullopt;
  return rate_;
}

void SweepCore::Report(double goodput, double good_share) {
  const bool passed = good_share >= options_.attainment;
  steps_.push_back({rate_, goodput, good_share, passed});
  if (passed) {
    passed_ = std::max(passed_.value_or(rate_), rate_);
  } else {
    failed_ = std::min(failed_.value_or(rate_), rate_);
  }
  if (passed_ && failed_ && *failed_ <= *passed_ * (1 + options_.tolerance)) {
    stop_reason_ = "tolerance";
  } else if (steps_.size() >= options_.steps_max) {
    stop_reason_ = "steps";
  } else if (passed && rate_ >= options_.rate_max) {
    stop_reason_ = "rate_max";
  } else if (!passed && rate_ <= options_.rate_min) {
    stop_reason_ = "rate_min";
  } else if (passed_ && failed_) {
    rate_ = std::sqrt(*passed_ * *failed_);
  } else if (passed) {
    rate_ = std::min(rate_ * 2, options_.rate_max);
  } else {
    rate_ = std::max(rate_ / 2, options_.rate_min);
  }
}

const SweepCore::Step* SweepCore::Best() const {
  const Step* best = nullptr;
  for (const Step& step : steps_) {
    if (step.passed && (best == nullptr || step.goodput > best->goodput)) best = &step;
  }
  return best;
}

}  // namespace tidepool
