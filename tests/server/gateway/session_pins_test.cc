#include "server/gateway/session_pins.h"

#include <gtest/gtest.h>

namespace tidepool {
namespace {

class SessionPinsTest : public testing::Test {
 protected:
  // Turns whose tool takes so long, often enough to be believed.
  void Learn(absl::Duration took) {
    for (size_t i = 0; i < 2 * ToolTtl::kEnough; ++i) Return(99, took, true);
  }
  // A turn ends, and the next one comes after `pause`.
  void Return(uint64_t session, absl::Duration pause, bool tool_result) {
    pins_.TurnEnded(session, now_);
    now_ += pause;
    pins_.TurnBegins(session, tool_result, now_);
  }

  SessionPins pins_;
  absl::Time now_ = absl::UnixEpoch();
};

TEST_F(SessionPinsTest, TurnIsPinnedBeforeAnythingIsKnownOfTools) {
  EXPECT_GT(pins_.TurnEnded(7, now_), absl::ZeroDuration());
}

TEST_F(SessionPinsTest, PinLastsAsLongAsToolsTake) {
  Learn(absl::Seconds(5));
  EXPECT_EQ(pins_.TurnEnded(7, now_), absl::Seconds(5));
}

TEST_F(SessionPinsTest, ToolsThatTakeLongerThanTheMemoryIsWorthAreNotWaitedFor) {
  Learn(absl::Minutes(5));
  EXPECT_EQ(pins_.TurnEnded(7, now_), absl::ZeroDuration());
}

TEST_F(SessionPinsTest, PauseOfAPersonIsNoToolsDuration) {
  Learn(absl::Seconds(5));
  for (int i = 0; i < 1000; ++i) Return(3, absl::Minutes(5), false);
  EXPECT_EQ(pins_.TurnEnded(7, now_), absl::Seconds(5));
}

TEST_F(SessionPinsTest, TurnThatNobodyWaitsForTellsNothing) {
  Learn(absl::Seconds(5));
  for (int i = 0; i < 1000; ++i) {
    now_ += absl::Minutes(5);
    pins_.TurnBegins(99, true, now_);
  }
  EXPECT_EQ(pins_.TurnEnded(7, now_), absl::Seconds(5));
}

TEST_F(SessionPinsTest, OldestSessionIsForgottenFirst) {
  Learn(absl::Seconds(5));
  for (int round = 0; round < 1000; ++round) pins_.TurnEnded(1000 + static_cast<uint64_t>(round), now_);
  for (uint64_t i = 0; i < SessionPins::kMaxSessions; ++i) pins_.TurnEnded(1'000'000 + i, now_);
  now_ += absl::Minutes(5);
  for (int round = 0; round < 1000; ++round)
    pins_.TurnBegins(1000 + static_cast<uint64_t>(round), true, now_);
  EXPECT_EQ(pins_.TurnEnded(7, now_), absl::Seconds(5));
}

}  // namespace
}  // namespace tidepool
