#include "kvstore/policy/tool_ttl.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "base/status.h"

namespace tidepool {

namespace {
constexpr double kMeanWeight = 0.05;  // of one more call, in the mean over all tools
}  // namespace

ToolTtl::ToolTtl(const Options& options)
    : options_(options), mean_(absl::ToDoubleSeconds(options.first_mean)) {
  TP_CHECK(options.max_tools > 0 && options.samples >= kEnough && options.first_mean > absl::ZeroDuration());
}

void ToolTtl::Observe(std::string_view name, absl::Duration took) {
  const double seconds = std::max(0.0, absl::ToDoubleSeconds(took));
  auto it = tools_.find(name);
  if (it == tools_.end()) {
    if (tools_.size() >= options_.max_tools) {
      tools_.erase(std::min_element(tools_.begin(), tools_.end(), [](const auto& a, const auto& b) {
        return a.second.last_call < b.second.last_call;
      }));
    }
    it = tools_.emplace(std::string(name), Tool()).first;
  }
  Tool& tool = it->second;
  tool.last_call = ++calls_;
  mean_ += kMeanWeight * (seconds - mean_);
  if (tool.recent.size() < options_.samples) {
    tool.recent.push_back(seconds);
  } else {
    double& oldest = tool.recent[tool.next];
    tool.sorted.erase(std::lower_bound(tool.sorted.begin(), tool.sorted.end(), oldest));
    oldest = seconds;
    tool.next = (tool.next + 1) % options_.samples;
  }
  tool.sorted.insert(std::upper_bound(tool.sorted.begin(), tool.sorted.end(), seconds), seconds);
}

double ToolTtl::Mean(const Tool* tool) const {
  if (tool == nullptr) return mean_;
  const double sum = std::accumulate(tool->sorted.begin(), tool->sorted.end(), mean_);
  return sum / static_cast<double>(tool->sorted.size() + 1);
}

absl::Duration ToolTtl::Choose(std::string_view name, double benefit, double cost_per_second) const {
  const double longest = absl::ToDoubleSeconds(options_.max_ttl);
  if (!(benefit > 0)) return absl::ZeroDuration();
  if (!(cost_per_second > 0)) return options_.max_ttl;
  const auto it = tools_.find(name);
  const Tool* tool = it == tools_.end() ? nullptr : &it->second;
  if (tool == nullptr || tool->sorted.size() < kEnough) {
    const double mean = Mean(tool);
    const double worth = benefit / (mean * cost_per_second);
    if (!(worth > 1)) return absl::ZeroDuration();
    return absl::Seconds(std::min(longest, mean * std::log(worth)));
  }
  double best = 0, best_worth = 0;
  const auto n = static_cast<double>(tool->sorted.size());
  for (size_t i = 0; i < tool->sorted.size() && tool->sorted[i] <= longest; ++i) {
    const double worth = static_cast<double>(i + 1) / n * benefit - tool->sorted[i] * cost_per_second;
    if (worth > best_worth) {
      best = tool->sorted[i];
      best_worth = worth;
    }
  }
  return absl::Seconds(best);
}

double ToolTtl::Cdf(std::string_view name, absl::Duration t) const {
  const auto it = tools_.find(name);
  if (it == tools_.end()) return -1;
  const std::vector<double>& sorted = it->second.sorted;
  const auto below =
      std::upper_bound(sorted.begin(), sorted.end(), absl::ToDoubleSeconds(t)) - sorted.begin();
  return static_cast<double>(below) / static_cast<double>(sorted.size());
}

}  // namespace tidepool
