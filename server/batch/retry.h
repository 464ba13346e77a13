#pragma once

#include <optional>

#include "absl/time/time.h"
#include "server/batch/transport.h"

namespace tidepool {

// How often and for how long a line is tried. Plain data.
struct RetryPolicy {
  // Of what came to nothing and may again: 408, 500, 502, 504, broken answers, time-outs.
  int attempts_max = 3;
  // Since a line's first refusal (429, 503) or its first failure to connect: these are waited out.
  absl::Duration patience = absl::Minutes(10);
  absl::Duration backoff_min = absl::Milliseconds(250);
  absl::Duration backoff_max = absl::Seconds(30);
};

// Of one line, over its attempts.
struct RetryState {
  int failures = 0;  // that count against attempts_max
  int refusals = 0;
  absl::Time first_refusal = absl::InfiniteFuture();
};

enum class ReplyKind {
  kAnswer,   // final, good or bad
  kRefused,  // the server has no room now: 429, 503, no connection
  kFailed,   // may succeed if sent again
};
ReplyKind KindOf(const BatchReply& reply);

// When to send a line again, counting this reply; nullopt: its answer is final. `spread` in [0, 1).
std::optional<absl::Time> RetryAt(const BatchReply& reply, const RetryPolicy& policy, double spread,
                                  absl::Time now, RetryState& state);

}  // namespace tidepool
