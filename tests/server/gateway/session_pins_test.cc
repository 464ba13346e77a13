#include "server/gateway/session_pins.h"

#include <gtest/gtest.h>

namespace tidepool {
namespace {

using Called = std::optional<std::vector<std::string>>;

class SessionPinsTest : public testing::Test {
 protected:
  // Turns whose tool takes so long, often enough to be believed.
  void Learn(absl::Duration took, const Called& called = Called({"search"}),
             const std::string& tenant = "a") {
    for (size_t i = 0; i < 2 * ToolTtl::kEnough; ++i) Return(99, took, true, called, tenant);
  }
  // A turn ends, and the next one comes after `pause`.
  void Return(uint64_t session, absl::Duration pause, bool tool_result,
              const Called& called = Called({"search"}), const std::string& tenant = "a") {
    Ended(session, called, tenant);
    now_ += pause;
    pins_.TurnBegins(session, tool_result, now_);
  }
  absl::Duration Ended(uint64_t session, const Called& called = Called({"search"}),
                       const std::string& tenant = "a") {
    return pins_.TurnEnded(session, tenant, called, now_);
  }

  SessionPins pins_;
  absl::Time now_ = absl::UnixEpoch();
};

TEST_F(SessionPinsTest, TurnIsPinnedBeforeAnythingIsKnownOfTools) {
  EXPECT_GT(Ended(7), absl::ZeroDuration());
}

TEST_F(SessionPinsTest, PinLastsAsLongAsTheToolTakes) {
  Learn(absl::Seconds(5));
  EXPECT_EQ(Ended(7), absl::Seconds(5));
}

TEST_F(SessionPinsTest, EachToolIsWaitedForAsLongAsItTakesItself) {
  Learn(absl::Seconds(2), Called({"search"}));
  Learn(absl::Seconds(30), Called({"compile"}));
  EXPECT_EQ(Ended(7, Called({"search"})), absl::Seconds(2));
  EXPECT_EQ(Ended(8, Called({"compile"})), absl::Seconds(30));
}

TEST_F(SessionPinsTest, CallsOfOneAnswerReturnTogetherAndAreOneToolInAnyOrder) {
  Learn(absl::Seconds(2), Called({"search"}));
  Learn(absl::Seconds(20), Called({"search", "compile"}));
  EXPECT_EQ(Ended(7, Called({"compile", "search", "search"})), absl::Seconds(20));
  EXPECT_EQ(Ended(8, Called({"search"})), absl::Seconds(2));
}

TEST_F(SessionPinsTest, AnswerWithoutACallPinsNothingAndIsNotWaitedFor) {
  Learn(absl::Seconds(5));
  EXPECT_EQ(Ended(7, std::vector<std::string>{}), absl::ZeroDuration());
  for (int i = 0; i < 1000; ++i) Return(3, absl::Minutes(5), true, std::vector<std::string>{});
  EXPECT_EQ(Ended(7), absl::Seconds(5));
}

TEST_F(SessionPinsTest, TurnsThatDoNotTellWhatTheyCalledAreCountedTogether) {
  Learn(absl::Seconds(2), Called({"search"}));
  Learn(absl::Seconds(9), std::nullopt);
  EXPECT_EQ(Ended(7, std::nullopt), absl::Seconds(9));
  const std::string long_name(SessionPins::kToolNameBytesMax + 1, 'x');
  EXPECT_EQ(Ended(8, Called({long_name})), absl::Seconds(9)) << "a name too long is no name";
}

TEST_F(SessionPinsTest, ToolSeenTooSeldomGoesByWhatTheTenantsToolsTake) {
  for (int i = 0; i < 200; ++i) Return(99, absl::Seconds(1), true, Called({"search"}));
  const absl::Duration fast = Ended(7, Called({"new"}));
  for (int i = 0; i < 200; ++i) Return(99, absl::Seconds(8), true, Called({"search"}));
  const absl::Duration slow = Ended(7, Called({"new"}));
  EXPECT_GT(fast, absl::ZeroDuration());
  EXPECT_GT(slow, 2 * fast);
}

TEST_F(SessionPinsTest, TenantsToolsOfOneNameAreApart) {
  Learn(absl::Seconds(2), Called({"search"}), "a");
  Learn(absl::Seconds(30), Called({"search"}), "b");
  EXPECT_EQ(Ended(7, Called({"search"}), "a"), absl::Seconds(2));
  EXPECT_EQ(Ended(8, Called({"search"}), "b"), absl::Seconds(30));
}

TEST_F(SessionPinsTest, ManyNamesOfOneTenantCostAnotherNothing) {
  Learn(absl::Seconds(2), Called({"search"}), "a");
  for (int i = 0; i < 2000; ++i) {
    Return(99, absl::Seconds(40), true, Called({"tool" + std::to_string(i)}), "flood");
  }
  EXPECT_EQ(Ended(7, Called({"search"}), "a"), absl::Seconds(2));
}

TEST_F(SessionPinsTest, TenantsAreBoundedAndThoseUsedLastStay) {
  for (size_t i = 0; i < SessionPins::kTenantsMax; ++i) {
    Ended(1000 + i, Called({"t"}), "tenant" + std::to_string(i));
  }
  Learn(absl::Seconds(2), Called({"search"}), "a");
  for (size_t i = 0; i + 1 < SessionPins::kTenantsMax; ++i) {
    Ended(5000 + i, Called({"t"}), "other" + std::to_string(i));
  }
  EXPECT_EQ(pins_.tenants(), SessionPins::kTenantsMax);
  EXPECT_EQ(Ended(7), absl::Seconds(2));
}

TEST_F(SessionPinsTest, ToolsThatTakeLongerThanTheMemoryIsWorthAreNotWaitedFor) {
  Learn(absl::Minutes(5));
  EXPECT_EQ(Ended(7), absl::ZeroDuration());
}

TEST_F(SessionPinsTest, PauseOfAPersonIsNoToolsDuration) {
  Learn(absl::Seconds(5));
  for (int i = 0; i < 1000; ++i) Return(3, absl::Minutes(5), false);
  EXPECT_EQ(Ended(7), absl::Seconds(5));
}

TEST_F(SessionPinsTest, TurnThatNobodyWaitsForTellsNothing) {
  Learn(absl::Seconds(5));
  for (int i = 0; i < 1000; ++i) {
    now_ += absl::Minutes(5);
    pins_.TurnBegins(99, true, now_);
  }
  EXPECT_EQ(Ended(7), absl::Seconds(5));
}

TEST_F(SessionPinsTest, OldestSessionIsForgottenFirst) {
  Learn(absl::Seconds(5));
  for (int round = 0; round < 1000; ++round) Ended(1000 + static_cast<uint64_t>(round));
  for (uint64_t i = 0; i < SessionPins::kMaxSessions; ++i) Ended(1'000'000 + i);
  now_ += absl::Minutes(5);
  for (int round = 0; round < 1000; ++round)
    pins_.TurnBegins(1000 + static_cast<uint64_t>(round), true, now_);
  EXPECT_EQ(Ended(7), absl::Seconds(5));
}

}  // namespace
}  // namespace tidepool
