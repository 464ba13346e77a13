#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "server/bench/request_record.h"

namespace tidepool {

// Slo: bounds that make a request good. Written "ttft:200ms,itl:50ms" or, as vLLM has it, "ttft:200 tpot:50":
// a bare number is milliseconds. Metrics: ttft, tpot, itl (the mean of the request's gaps between events, as
// the daemon's own SLO counts), itl_p99, itl_max, e2el.
class Slo {
 public:
  static absl::StatusOr<Slo> Parse(std::string_view text);

  bool empty() const { return bounds_.empty(); }
  // Successful, and within every bound; bounds are inclusive.
  bool Good(const RequestRecord& record) const;
  const std::string& text() const { return text_; }

 private:
  enum class Metric { kTtft, kTpot, kItl, kItlP99, kItlMax, kE2el };
  struct Bound {
    Metric metric;
    double seconds;
  };
  static std::optional<Metric> MetricNamed(std::string_view name);
  static double Measure(const RequestRecord& record, Metric metric);

  std::vector<Bound> bounds_;
  std::string text_;
};

// "200ms", "1.5s", "2m", "250us"; a bare number is in `bare_unit`. InvalidArgument: no number, no unit that
// is known, negative, or infinite.
absl::StatusOr<absl::Duration> ParseDurationIn(std::string_view text, absl::Duration bare_unit);

}  // namespace tidepool
