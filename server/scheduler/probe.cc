#include "server/scheduler/probe.h"

#include <string>

namespace tidepool {

namespace {

Counter& Reports(MetricRegistry& m, const char* result) {
  return m.AddCounter("tidepool_scheduler_reports_total", "Worker reports by outcome.", {{"result", result}});
}
Gauge& ModelError(MetricRegistry& m, const char* stage) {
  return m.AddGauge("tidepool_scheduler_latency_error_ratio",
                    "Mean relative error of the latency model's recent predictions, over live workers.",
                    {{"stage", stage}});
}

}  // namespace

SchedulerProbe::SchedulerProbe(MetricRegistry& m)
    : metrics_(m),
      decision_seconds_(m.AddHistogram("tidepool_scheduler_decision_seconds",
                                       "Time to decide one placement, lock included.", LatencyBuckets())),
      reports_ok_(Reports(m, "ok")),
      reports_resync_(Reports(m, "resync")),
      reports_refused_(Reports(m, "refused")),
      inflight_(m.AddGauge("tidepool_scheduler_inflight_requests", "Requests placed and not finished.")),
      indexed_blocks_(m.AddGauge("tidepool_scheduler_indexed_blocks",
                                 "Blocks that live workers say they hold, counted once a worker.")),
      index_ignored_(m.AddGauge("tidepool_scheduler_index_ignored_blocks",
                                "Block events dropped since start because the prefix index was full.")),
      prefill_error_(ModelError(m, "prefill")),
      decode_error_(ModelError(m, "decode")),
      fetch_error_(ModelError(m, "fetch")) {
  for (const char* kind : {"remote", "local", "rejected", "unavailable", "invalid"}) Decisions(kind);
  for (const char* reason : {"ttft", "itl", "inflight", "memory", "batch"}) Rejected(reason);
  Export({}, 0, 0);
}

Counter& SchedulerProbe::Decisions(std::string_view kind) {
  return metrics_.AddCounter("tidepool_scheduler_decisions_total", "Placements decided, by kind.",
                             {{"kind", std::string(kind)}});
}
Counter& SchedulerProbe::Rejected(std::string_view reason) {
  return metrics_.AddCounter("tidepool_requests_rejected_total", "Requests refused at arrival.",
                             {{"reason", std::string(reason)}});
}
Gauge& SchedulerProbe::Workers(Role role, WorkerState state) {
  return metrics_.AddGauge(
      "tidepool_workers", "Workers known to the scheduler.",
      {{"role", std::string(RoleName(role))}, {"state", std::string(WorkerStateName(state))}});
}

void SchedulerProbe::OnDecision(const PlaceResult& result, absl::Duration took) {
  decision_seconds_.Observe(absl::ToDoubleSeconds(took));
  if (result.placement) {
    Decisions(result.placement->prefill ? "remote" : "local").Add();
  } else if (result.rejection) {
    Decisions("rejected").Add();
    Rejected(result.rejection->kind).Add();
  } else {
    Decisions(absl::IsUnavailable(result.status) ? "unavailable" : "invalid").Add();
  }
}

void SchedulerProbe::OnReport(const ReportResult& result) {
  if (!result.status.ok()) {
    reports_refused_.Add();
  } else {
    (result.resync ? reports_resync_ : reports_ok_).Add();
  }
}

void SchedulerProbe::Export(const std::vector<WorkerView>& workers, size_t inflight, uint64_t index_ignored) {
  double blocks = 0, prefill = 0, decode = 0, fetch = 0;
  double live = 0;
  for (Role role : {Role::kPrefill, Role::kDecode, Role::kBoth, Role::kStore}) {
    for (WorkerState state : {WorkerState::kReady, WorkerState::kDraining, WorkerState::kLost}) {
      double n = 0;
      for (const WorkerView& w : workers) n += w.role == role && w.state == state ? 1 : 0;
      Workers(role, state).Set(n);
    }
  }
  for (const WorkerView& w : workers) {
    if (w.state == WorkerState::kLost) continue;
    blocks += static_cast<double>(w.indexed_blocks);
    prefill += w.prefill_error;
    decode += w.decode_error;
    fetch += w.fetch_error;
    ++live;
  }
  const double n = live > 0 ? live : 1;
  prefill_error_.Set(prefill / n);
  decode_error_.Set(decode / n);
  fetch_error_.Set(fetch / n);
  indexed_blocks_.Set(blocks);
  inflight_.Set(static_cast<double>(inflight));
  index_ignored_.Set(static_cast<double>(index_ignored));
}

}  // namespace tidepool
