#include "server/bench/slo.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "base/status.h"
#include "server/bench/statistics.h"

namespace tidepool {

absl::StatusOr<absl::Duration> ParseDurationIn(std::string_view text, absl::Duration bare_unit) {
  const absl::string_view whole(text.data(), text.size());
  double number = 0;
  absl::Duration out;
  if (absl::SimpleAtod(whole, &number)) {
    if (!std::isfinite(number))
      out = absl::InfiniteDuration();
    else
      out = bare_unit * number;
  } else if (!absl::ParseDuration(whole, &out)) {
    return absl::InvalidArgumentError(
        absl::StrCat("'", whole, "' is not a duration; write for instance 200ms, 1.5s or 2m"));
  }
  if (out < absl::ZeroDuration() || out == absl::InfiniteDuration()) {
    return absl::InvalidArgumentError(absl::StrCat("'", whole, "' must be finite and not negative"));
  }
  return out;
}

std::optional<Slo::Metric> Slo::MetricNamed(std::string_view name) {
  if (name == "ttft") return Metric::kTtft;
  if (name == "tpot") return Metric::kTpot;
  if (name == "itl") return Metric::kItl;
  if (name == "itl_p99") return Metric::kItlP99;
  if (name == "itl_max") return Metric::kItlMax;
  if (name == "e2el") return Metric::kE2el;
  return std::nullopt;
}

absl::StatusOr<Slo> Slo::Parse(std::string_view text) {
  Slo slo;
  for (const auto part : absl::StrSplit(absl::string_view(text.data(), text.size()), absl::ByAnyChar(", "),
                                        absl::SkipEmpty())) {
    const size_t colon = part.find(':');
    if (colon == part.npos) {
      return absl::InvalidArgumentError(
          absl::StrCat("'", part, "' is not METRIC:BOUND; write for instance ttft:200ms,itl:50ms"));
    }
    const std::string_view name(part.data(), colon);
    const auto metric = MetricNamed(name);
    if (!metric) {
      return absl::InvalidArgumentError(
          absl::StrCat("'", std::string(name), "' is none of ttft, tpot, itl, itl_p99, itl_max, e2el"));
    }
    for (const Bound& bound : slo.bounds_) {
      if (bound.metric == *metric) {
        return absl::InvalidArgumentError(absl::StrCat("'", std::string(name), "' is given twice"));
      }
    }
    TP_ASSIGN_OR_RETURN(
        const absl::Duration bound,
        ParseDurationIn({part.data() + colon + 1, part.size() - colon - 1}, absl::Milliseconds(1)));
    slo.bounds_.push_back({*metric, absl::ToDoubleSeconds(bound)});
    absl::StrAppend(&slo.text_, slo.text_.empty() ? "" : ",", std::string(name), ":",
                    absl::FormatDuration(bound));
  }
  return slo;
}

double Slo::Measure(const RequestRecord& record, Metric metric) {
  switch (metric) {
    case Metric::kTtft:
      return record.TtftSeconds();
    case Metric::kTpot:
      return record.TpotSeconds();
    case Metric::kE2el:
      return record.LatencySeconds();
    case Metric::kItl:
      return Mean(record.gaps_seconds);
    case Metric::kItlMax:
      return record.gaps_seconds.empty()
                 ? 0
                 : *std::max_element(record.gaps_seconds.begin(), record.gaps_seconds.end());
    case Metric::kItlP99: {
      std::vector<double> gaps = record.gaps_seconds;
      std::sort(gaps.begin(), gaps.end());
      return Percentile(gaps, 99);
    }
  }
  return 0;
}

bool Slo::Good(const RequestRecord& record) const {
  return record.ok() && std::all_of(bounds_.begin(), bounds_.end(), [&](const Bound& bound) {
           return Measure(record, bound.metric) <= bound.seconds;
         });
}

}  // namespace tidepool
