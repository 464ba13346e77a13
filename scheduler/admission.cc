#include "scheduler/admission.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <string>

namespace tidepool {

namespace {

uint32_t RetryAfter(double seconds) {
  if (!(seconds > 1)) return 1;
  return static_cast<uint32_t>(std::min(std::ceil(seconds), 60.0));
}

std::string Format(const char* format, double a, double b) {
  char buf[160];
  std::snprintf(buf, sizeof buf, format, a, b);
  return buf;
}

// When the next of worker i's requests is expected to leave its batch.
double SecondsToNextEnd(const ClusterView& view, WorkerIndex i, absl::Time now) {
  double soonest = view.decode_seconds_mean();
  for (const BookingSlot slot : view.worker(i)->decoding) {
    const Booking& b = view.booking(slot);
    if (!b.decode_began_at) continue;
    const double ran = absl::ToDoubleSeconds(now - *b.decode_began_at);
    soonest = std::min(soonest, std::max(0.0, view.decode_seconds_mean() - ran));
  }
  return soonest;
}

}  // namespace

std::optional<Rejection> JudgeInflight(const ClusterView& view, const SchedulerOptions& options,
                                       const PlaceRequest& request) {
  if (view.inflight() < options.max_inflight || view.FindBooking(request.request_id) != nullptr)
    return std::nullopt;
  // Requests leave at about this rate; one place is enough.
  const double per_second = static_cast<double>(view.inflight()) / std::max(view.decode_seconds_mean(), 1e-3);
  return Rejection{.reason = std::to_string(view.inflight()) +
                             " requests are in flight, the limit (scheduler.max_inflight) is " +
                             std::to_string(options.max_inflight),
                   .kind = "inflight",
                   .retry_after_seconds = RetryAfter(1 / std::max(per_second, 1e-3))};
}

std::optional<Rejection> JudgePlan(const ClusterView& view, const SchedulerOptions& options,
                                   const PlaceRequest& request, const Plan& plan, absl::Time now) {
  const double ttft_slo = absl::ToDoubleSeconds(EffectiveTtftSlo(options, request));
  const double itl_slo = absl::ToDoubleSeconds(EffectiveItlSlo(options, request));
  const double ttft = plan.judged_ttft_seconds;
  const double itl = plan.decode.judged_itl_seconds;
  const bool early = options.admission == AdmissionPolicy::kEarly;
  Rejection r{.ttft_seconds = plan.ttft_seconds(), .itl_seconds = early ? itl : plan.decode.itl_seconds};
  if (ttft > ttft_slo && options.admission != AdmissionPolicy::kNone) {
    r.kind = "ttft";
    r.reason =
        Format(r.ttft_seconds > ttft_slo
                   ? "the first token would take %.2f s, more than the objective of %.2f s"
                   : "the first token would take %.2f s of the objective of %.2f s; what is left is kept "
                     "for requests that need less",
               r.ttft_seconds, ttft_slo);
    // A queue drains in real time. What the request needs by itself no waiting shortens.
    r.retry_after_seconds = RetryAfter(std::min(ttft - ttft_slo, plan.prefill.queue_seconds));
    if (plan.prefill.queue_seconds == 0) r.reason += " even on an idle worker";
    return r;
  }
  if (itl > itl_slo && (early || options.admission == AdmissionPolicy::kPredicted)) {
    r.kind = "itl";
    r.reason =
        Format(r.itl_seconds > itl_slo
                   ? "tokens would come %.1f ms apart, more than the objective of %.1f ms"
                   : "tokens would come %.1f ms apart, the objective is %.1f ms; what is left is kept for "
                     "requests that need less",
               r.itl_seconds * 1e3, itl_slo * 1e3);
    r.retry_after_seconds = RetryAfter(SecondsToNextEnd(view, plan.decode.worker, now));
    return r;
  }
  if (plan.full) {
    r.kind = "memory";
    r.reason = "no worker has free memory for the prompt's " + std::to_string(plan.prefill.blocks_needed) +
               " KV blocks now";
    r.retry_after_seconds = RetryAfter(SecondsToNextEnd(view, plan.decode.worker, now));
    return r;
  }
  if (!plan.decode.gap) {
    r.kind = "batch";
    r.reason = "no worker has room for batch work beside its other requests now";
    r.retry_after_seconds =
        RetryAfter(std::max(plan.prefill.queue_seconds, SecondsToNextEnd(view, plan.decode.worker, now)));
    return r;
  }
  return std::nullopt;
}

}  // namespace tidepool
