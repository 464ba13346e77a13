#include "server/batch/retry.h"

#include <gtest/gtest.h>

namespace tidepool {
namespace {

const absl::Time kNow = absl::UnixEpoch();

BatchReply Http(int status, absl::Duration retry_after = absl::ZeroDuration()) {
  BatchReply reply;
  reply.http_status = status;
  reply.retry_after = retry_after;
  return reply;
}
BatchReply Broken(absl::Status status) {
  BatchReply reply;
  reply.status = std::move(status);
  return reply;
}

TEST(Retry, AnswersAreFinal) {
  for (int status : {200, 400, 401, 404, 413, 422, 501}) {
    RetryState state;
    EXPECT_EQ(RetryAt(Http(status), {}, 0, kNow, state), std::nullopt) << status;
  }
  RetryState state;
  EXPECT_EQ(RetryAt(Broken(absl::ResourceExhaustedError("large")), {}, 0, kNow, state), std::nullopt);
}

TEST(Retry, RefusalsWaitAsLongAsTheServerSays) {
  RetryState state;
  EXPECT_EQ(RetryAt(Http(429, absl::Seconds(7)), {}, 0, kNow, state), kNow + absl::Seconds(7));
  EXPECT_GT(RetryAt(Http(503), {}, 0, kNow, state), kNow);
}

TEST(Retry, RefusalsAreWaitedOutUntilPatienceEnds) {
  const RetryPolicy policy{.patience = absl::Minutes(10)};
  RetryState state;
  absl::Time now = kNow;
  int tries = 0;
  while (const auto at = RetryAt(Http(429), policy, 0, now, state)) {
    EXPECT_LE(*at - now, policy.backoff_max);
    now = *at;
    ++tries;
  }
  EXPECT_GE(now - kNow, policy.patience);
  EXPECT_GT(tries, 10);
}

TEST(Retry, FailuresAreTriedAFewTimes) {
  RetryState state;
  EXPECT_TRUE(RetryAt(Http(502), {}, 0, kNow, state));
  EXPECT_TRUE(RetryAt(Broken(absl::DataLossError("cut")), {}, 0, kNow, state));
  EXPECT_FALSE(RetryAt(Http(500), {}, 0, kNow, state));
}

TEST(Retry, NoConnectionIsWaitedOut) {
  RetryState state;
  for (int i = 0; i < 10; ++i) {
    EXPECT_TRUE(RetryAt(Broken(absl::UnavailableError("refused")), {}, 0, kNow, state));
  }
}

}  // namespace
}  // namespace tidepool
