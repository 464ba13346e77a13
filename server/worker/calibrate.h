#pragma once

#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "base/clock.h"
#include "server/engine/model_runner.h"
#include "server/engine/types.h"

namespace tidepool {

// MeasurePrefills: what prefills of a few lengths take on a runner that nobody uses yet, so that the first
// decision between loading and computing is not a guess; it also touches the weights before the first request
// does. Steps of 16 tokens, then of twice as many and so on, up to `max_tokens`, until `budget` is spent; two
// of each length, of which the faster counts. Uses memory of its own for KV. Errors: those of Forward.
absl::StatusOr<std::vector<PrefillObservation>> MeasurePrefills(ModelRunner& runner, uint32_t max_tokens,
                                                                absl::Duration budget,
                                                                const Clock& clock = Clock::Real());

}  // namespace tidepool
