#pragma once

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "server/bench/random.h"
#include "server/bench/session.h"

namespace tidepool {

// Made-up workloads. None ends by itself.

// Every prompt is different from its first token on.
struct RandomWorkload {
  LengthSpec input, output;
};
// Each prompt is one of `groups` prefixes, drawn evenly, and a suffix of its own.
struct SharedPrefixWorkload {
  uint32_t groups = 1;
  uint32_t prefix_tokens = 0;
  LengthSpec suffix, output;
};
// Conversations; every turn adds `input` tokens and the answer.
struct MultiTurnWorkload {
  LengthSpec turns, input, output;
  absl::Duration think;
};

std::unique_ptr<SessionSource> MakeSource(const RandomWorkload& workload, uint64_t seed);
std::unique_ptr<SessionSource> MakeSource(const SharedPrefixWorkload& workload, uint64_t seed);
std::unique_ptr<SessionSource> MakeSource(const MultiTurnWorkload& workload, uint64_t seed);

}  // namespace tidepool
