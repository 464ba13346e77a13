#include "server/batch/dispatch_core.h"

#include <gtest/gtest.h>

namespace tidepool {
namespace {

const absl::Time kNow = absl::UnixEpoch();

std::vector<uint32_t> StartAll(DispatchCore& core, absl::Time now = kNow) {
  std::vector<uint32_t> out;
  while (const auto line = core.Next(now)) out.push_back(*line);
  return out;
}
using Lines = std::vector<uint32_t>;

TEST(DispatchCore, SiblingsWaitForTheirPrefix) {
  DispatchCore core({});
  core.Add(std::vector<DispatchCore::Line>{{10, -1}, {11, 0}, {12, 0}, {20, -1}, {21, 3}});
  EXPECT_EQ(StartAll(core), (Lines{10, 20}));
  core.Ahead(10);
  EXPECT_EQ(StartAll(core), (Lines{11, 12}));
  core.Finished(20);
  EXPECT_EQ(StartAll(core), (Lines{21}));
  EXPECT_EQ(core.waiting(), 0u);
  EXPECT_EQ(core.running(), 4u);
}

TEST(DispatchCore, AStuckPrefixHoldsNobodyForEver) {
  DispatchCore core({.lookahead = 8, .gate_max = absl::Seconds(10)});
  core.Add(std::vector<DispatchCore::Line>{{1, -1}, {2, 0}});
  EXPECT_EQ(StartAll(core), (Lines{1}));
  EXPECT_TRUE(StartAll(core, kNow + absl::Seconds(9)).empty());
  EXPECT_EQ(StartAll(core, kNow + absl::Seconds(10)), (Lines{2}));
}

TEST(DispatchCore, LooksAheadNoFurtherThanAsked) {
  DispatchCore core({.lookahead = 3});
  std::vector<DispatchCore::Line> lines{{0, -1}};
  for (uint32_t i = 1; i < 6; ++i) lines.push_back({i, 0});
  lines.push_back({6, -1});
  core.Add(lines);
  EXPECT_EQ(StartAll(core), (Lines{0}));  // 6 is beyond 1, 2, 3
  core.Finished(0);
  EXPECT_EQ(StartAll(core), (Lines{1, 2, 3, 4, 5, 6}));
}

TEST(DispatchCore, RetriesComeFirstAndInTime) {
  DispatchCore core({});
  core.Add(std::vector<DispatchCore::Line>{{1, -1}, {2, -1}, {3, -1}});
  EXPECT_EQ(core.Next(kNow), 1u);
  core.Again(1, kNow + absl::Seconds(5));
  EXPECT_EQ(core.waiting(), 3u);
  EXPECT_EQ(core.Next(kNow), 2u);
  EXPECT_EQ(core.Next(kNow + absl::Seconds(5)), 1u);
  EXPECT_EQ(core.Next(kNow + absl::Seconds(5)), 3u);
  EXPECT_EQ(core.Next(kNow + absl::Seconds(5)), std::nullopt);
}

TEST(DispatchCore, SiblingsWaitWhileTheirPrefixIsTriedAgain) {
  DispatchCore core({.gate_max = absl::Seconds(10)});
  core.Add(std::vector<DispatchCore::Line>{{1, -1}, {2, 0}});
  EXPECT_EQ(StartAll(core), (Lines{1}));
  core.Again(1, kNow + absl::Seconds(5));
  EXPECT_TRUE(StartAll(core, kNow + absl::Seconds(4)).empty());
  EXPECT_EQ(StartAll(core, kNow + absl::Seconds(5)), (Lines{1}));
  core.Finished(1);
  EXPECT_EQ(StartAll(core, kNow + absl::Seconds(5)), (Lines{2}));
}

TEST(DispatchCore, LaterWindowsFollowEarlierOnes) {
  DispatchCore core({});
  core.Add(std::vector<DispatchCore::Line>{{1, -1}, {2, 0}});
  EXPECT_EQ(StartAll(core), (Lines{1}));
  core.Finished(1);
  EXPECT_EQ(StartAll(core), (Lines{2}));
  core.Finished(2);  // everything so far is forgotten
  core.Add(std::vector<DispatchCore::Line>{{5, -1}, {6, 0}});
  EXPECT_EQ(StartAll(core), (Lines{5}));
  core.Ahead(5);
  EXPECT_EQ(StartAll(core), (Lines{6}));
}

TEST(DispatchCore, EveryLineRunsOnceInAnyOrderOfEnds) {
  DispatchCore core({.lookahead = 16});
  std::vector<DispatchCore::Line> lines;
  for (uint32_t i = 0; i < 500; ++i) lines.push_back({i, i % 7 == 0 ? -1 : static_cast<int32_t>(i - i % 7)});
  core.Add(lines);
  std::vector<int> seen(500, 0);
  std::vector<uint32_t> running;
  absl::Time now = kNow;
  while (core.waiting() + core.running() > 0) {
    now += absl::Milliseconds(1);
    if (running.size() < 20) {
      if (const auto line = core.Next(now)) {
        ++seen[*line];
        running.push_back(*line);
        continue;
      }
    }
    ASSERT_FALSE(running.empty());
    const size_t at = static_cast<size_t>(absl::ToUnixMillis(now)) % running.size();
    core.Finished(running[at]);
    running.erase(running.begin() + static_cast<std::ptrdiff_t>(at));
  }
  EXPECT_EQ(seen, std::vector<int>(500, 1));
}

}  // namespace
}  // namespace tidepool
