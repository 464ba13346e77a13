#include "server/batch/admission_core.h"

#include <gtest/gtest.h>

namespace tidepool {
namespace {

const absl::Time kNow = absl::UnixEpoch();
constexpr AdmissionCore::Options kOptions{.inflight_max = 16};

TEST(AdmissionCore, TakesWhatOnlineTrafficLeaves) {
  AdmissionCore core(kOptions);
  EXPECT_EQ(core.Allowed({}, kNow), 16u);
  EXPECT_EQ(core.Allowed({.inflight = 6}, kNow), 10u);
  EXPECT_EQ(core.Allowed({.inflight = 60}, kNow), 0u);
}

TEST(AdmissionCore, StopsWhileAnOnlineRequestWaits) {
  AdmissionCore core(kOptions);
  EXPECT_EQ(core.Allowed({.inflight = 1, .waiting = 1}, kNow), 0u);
  // And a moment longer: the next one is seldom far.
  EXPECT_EQ(core.Allowed({}, kNow + absl::Milliseconds(100)), 0u);
  EXPECT_EQ(core.Allowed({}, kNow + absl::Milliseconds(200)), 16u);
}

TEST(AdmissionCore, StopsWhileAnswersAreLate) {
  AdmissionCore core(kOptions);
  EXPECT_EQ(core.Allowed({.slo_short = true}, kNow), 0u);
  EXPECT_EQ(core.Allowed({}, kNow), 16u);
}

TEST(AdmissionCore, GivesBackForAnOnlineRequestThatWaitsLong) {
  AdmissionCore core(kOptions);
  EXPECT_EQ(core.GiveBack({.inflight = 1, .waiting = 1, .oldest_wait = absl::Seconds(1)}, 8, kNow), 0u);
  const OnlineLoad starved{.inflight = 1, .waiting = 1, .oldest_wait = absl::Seconds(3)};
  EXPECT_EQ(core.GiveBack(starved, 8, kNow), 2u);
  EXPECT_EQ(core.GiveBack(starved, 6, kNow + absl::Milliseconds(500)), 0u);  // let it take effect
  EXPECT_EQ(core.GiveBack(starved, 6, kNow + absl::Seconds(1)), 2u);
  EXPECT_EQ(core.GiveBack(starved, 0, kNow + absl::Seconds(9)), 0u);
}

TEST(AdmissionCore, HalvesOnRefusalsOnceARound) {
  AdmissionCore core(kOptions);
  core.Refused(kNow, absl::Seconds(2), kNow + absl::Seconds(1));
  EXPECT_EQ(core.Allowed({}, kNow + absl::Seconds(2)), 0u);  // Retry-After
  EXPECT_EQ(core.Allowed({}, kNow + absl::Seconds(3)), 8u);
  // Under way at the same time: nothing new.
  core.Refused(kNow, absl::ZeroDuration(), kNow + absl::Seconds(3));
  EXPECT_EQ(core.Allowed({}, kNow + absl::Seconds(4)), 8u);
  core.Refused(kNow + absl::Seconds(3), absl::ZeroDuration(), kNow + absl::Seconds(4));
  EXPECT_EQ(core.Allowed({}, kNow + absl::Seconds(5)), 4u);
}

TEST(AdmissionCore, GrowsBackWithAnswers) {
  AdmissionCore core(kOptions);
  for (int i = 0; i < 10; ++i) {
    const absl::Time now = kNow + absl::Seconds(i);
    core.Refused(now, absl::ZeroDuration(), now);
  }
  const absl::Time later = kNow + absl::Minutes(1);
  EXPECT_EQ(core.Allowed({}, later), 1u);  // never less: somebody has to ask
  for (int i = 0; i < 300; ++i) core.Answered();
  EXPECT_EQ(core.Allowed({}, later), 16u);
}

TEST(AdmissionCore, ARefusalCannotPauseForHours) {
  AdmissionCore core(kOptions);
  core.Refused(kNow, absl::Hours(5), kNow);
  EXPECT_GT(core.Allowed({}, kNow + absl::Minutes(1)), 0u);
}

}  // namespace
}  // namespace tidepool
