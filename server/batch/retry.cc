#include "server/batch/retry.h"

#include <algorithm>
#include <cmath>

namespace tidepool {

ReplyKind KindOf(const BatchReply& reply) {
  switch (reply.status.code()) {
    case absl::StatusCode::kOk:
      break;
    case absl::StatusCode::kUnavailable:
      return ReplyKind::kRefused;
    case absl::StatusCode::kDataLoss:
    case absl::StatusCode::kDeadlineExceeded:
      return ReplyKind::kFailed;
    default:
      return ReplyKind::kAnswer;
  }
  switch (reply.http_status) {
    case 429:
    case 503:
      return ReplyKind::kRefused;
    case 408:
    case 500:
    case 502:
    case 504:
      return ReplyKind::kFailed;
    default:
      return ReplyKind::kAnswer;
  }
}

std::optional<absl::Time> RetryAt(const BatchReply& reply, const RetryPolicy& policy, double spread,
                                  absl::Time now, RetryState& state) {
  const ReplyKind kind = KindOf(reply);
  if (kind == ReplyKind::kAnswer) return std::nullopt;
  int times = 0;
  if (kind == ReplyKind::kFailed) {
    if (++state.failures >= policy.attempts_max) return std::nullopt;
    times = state.failures;
  } else {
    state.first_refusal = std::min(state.first_refusal, now);
    if (now - state.first_refusal >= policy.patience) return std::nullopt;
    times = ++state.refusals;
  }
  absl::Duration wait = policy.backoff_min * std::exp2(std::min(times - 1, 16));
  wait = std::max(std::min(wait, policy.backoff_max), reply.retry_after);
  return now + wait * (1 + 0.2 * spread);  // those refused together do not come back together
}

}  // namespace tidepool
