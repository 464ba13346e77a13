#include "server/bench/sweep.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <string>

namespace tidepool {
namespace {

// A server that holds any rate up to `capacity`; above it all requests are late.
SweepCore Search(SweepCore::Options options, double capacity) {
  SweepCore core(options);
  while (const auto rate = core.Next()) core.Report(std::min(*rate, capacity), *rate <= capacity ? 1.0 : 0.0);
  return core;
}

TEST(SweepTest, FindsTheCapacityWithinItsTolerance) {
  for (const double capacity : {0.3, 1.0, 7.7, 1234.5}) {
    for (const double first : {0.1, 1.0, 5000.0}) {
      const SweepCore core = Search({.first_rate = first, .tolerance = 0.05, .steps_max = 100}, capacity);
      ASSERT_NE(core.Best(), nullptr);
      EXPECT_LE(core.Best()->rate, capacity);
      EXPECT_GE(core.Best()->rate * 1.05, capacity) << capacity << " from " << first;
      EXPECT_EQ(std::string(core.StopReason()), "tolerance");
    }
  }
}

TEST(SweepTest, StopsAtItsSteps) {
  const SweepCore core = Search({.first_rate = 1, .steps_max = 3}, 1000);
  EXPECT_EQ(core.steps().size(), 3u);
  EXPECT_EQ(core.Best()->rate, 4);
  EXPECT_EQ(std::string(core.StopReason()), "steps");
}

TEST(SweepTest, StopsAtTheBoundsOfTheRate) {
  EXPECT_EQ(std::string(Search({.first_rate = 1, .rate_max = 8}, 1e9).StopReason()), "rate_max");
  const SweepCore none = Search({.first_rate = 1, .rate_min = 0.1}, 0);
  EXPECT_EQ(std::string(none.StopReason()), "rate_min");
  EXPECT_EQ(none.Best(), nullptr);
}

TEST(SweepTest, JudgesByTheShareOfGoodRequests) {
  SweepCore core({.first_rate = 10, .attainment = 0.9});
  core.Report(9, 0.9);
  EXPECT_EQ(core.Next(), 20);
  core.Report(17.8, 0.89);
  EXPECT_FALSE(core.steps().back().passed);
  // More goodput at a rate that does not hold is not the answer.
  EXPECT_EQ(core.Best()->rate, 10);
}

}  // namespace
}  // namespace tidepool
