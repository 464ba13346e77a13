#pragma once

#include <optional>

#include "absl/time/time.h"
#include "scheduler/cluster_view.h"
#include "scheduler/options.h"
#include "scheduler/placement.h"
#include "scheduler/types.h"

namespace tidepool {

// Early rejection: refusing at arrival what could not be served in time, so that no work is done for nothing
// (Mooncake, arXiv:2407.00079, section 7, with prediction). Monotone: what is refused under some load is
// refused under more, and what is refused with an SLO is refused with a tighter one.

// Too many requests placed and unfinished; judged before anything is predicted.
std::optional<Rejection> JudgeInflight(const ClusterView& view, const SchedulerOptions& options,
                                       const PlaceRequest& request);
// The best plan there is would miss an SLO that options.admission looks at, or be refused by its worker for
// lack of memory, or is no gap for a batch request. retry_after: when the load has drained enough for it, 1
// to 60 s.
std::optional<Rejection> JudgePlan(const ClusterView& view, const SchedulerOptions& options,
                                   const PlaceRequest& request, const Plan& plan, absl::Time now);

}  // namespace tidepool
