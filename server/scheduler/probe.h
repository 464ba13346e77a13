#pragma once

#include <string_view>
#include <vector>

#include "base/probe.h"
#include "scheduler/core.h"

namespace tidepool {

// SchedulerProbe: the scheduler's metrics. Label sets exist from the start, at zero. Thread-safe.
class SchedulerProbe {
 public:
  explicit SchedulerProbe(MetricRegistry& metrics);

  void OnDecision(const PlaceResult& result, absl::Duration took);
  void OnReport(const ReportResult& result);
  // Sets the gauges from the core's state.
  void Export(const std::vector<WorkerView>& workers, size_t inflight, uint64_t index_ignored);

 private:
  Counter& Decisions(std::string_view kind);
  Counter& Rejected(std::string_view reason);
  Gauge& Workers(Role role, WorkerState state);

  MetricRegistry& metrics_;
  Histogram& decision_seconds_;
  Counter& reports_ok_;
  Counter& reports_resync_;
  Counter& reports_refused_;
  Gauge& inflight_;
  Gauge& indexed_blocks_;
  Gauge& index_ignored_;
  Gauge& prefill_error_;
  Gauge& decode_error_;
  Gauge& fetch_error_;
};

}  // namespace tidepool
