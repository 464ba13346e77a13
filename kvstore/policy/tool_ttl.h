#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "absl/time/time.h"

namespace tidepool {

// ToolTtl: how long to pin a conversation's KV while the tool that it called runs. Continuum's rule: the ttl
// that maximises
//
//     P(D <= ttl) * benefit - ttl * cost_per_second
//
// where D is the tool's duration (P: the empirical distribution of its last durations), benefit is what
// finding the KV saves (seconds of prefill or reload, and of waiting for room), and cost is what holding it
// costs others (seconds of theirs per second held). The maximum is at one of the durations seen, or at 0: do
// not pin. A tool seen fewer than kEnough times is taken to have exponential durations, for which the maximum
// is known: mean * ln(benefit / (mean * cost)), with the mean of what was seen of it and, weighing as much as
// one call, of all tools. Source: the CacheTTL paper's rule as stated in its abstract and documentation; the
// split of cost is ours.
//
// Core: no clock. At most max_tools tools are kept (the one called longest ago goes) with the last `samples`
// durations of each. Not thread-safe.
class ToolTtl {
 public:
  struct Options {
    size_t max_tools = 1024;
    size_t samples = 256;
    absl::Duration max_ttl = absl::Minutes(10);
    absl::Duration first_mean = absl::Seconds(3);  // before any tool has been seen to return
  };
  static constexpr size_t kEnough = 8;

  explicit ToolTtl(const Options& options);

  // A call of `tool` took this long. Negative durations (a clock that was set) count as 0.
  void Observe(std::string_view tool, absl::Duration took);

  // 0: not worth pinning. benefit and cost_per_second are in the same unit of worth; cost_per_second 0
  // (memory to spare) gives max_ttl.
  absl::Duration Choose(std::string_view tool, double benefit, double cost_per_second) const;

  // P(D <= t) from the samples; -1 for a tool never seen.
  double Cdf(std::string_view tool, absl::Duration t) const;
  size_t tools() const { return tools_.size(); }

 private:
  struct Tool {
    std::vector<double> recent;  // seconds; a ring
    size_t next = 0;
    std::vector<double> sorted;  // the same
    uint64_t last_call = 0;
  };

  double Mean(const Tool* tool) const;

  const Options options_;
  std::map<std::string, Tool, std::less<>> tools_;
  uint64_t calls_ = 0;
  double mean_;  // over all tools, exponentially weighted
};

}  // namespace tidepool
