#include "server/worker/source_speeds.h"

#include <gtest/gtest.h>

namespace tidepool {
namespace {

const absl::Time kStart = absl::UnixEpoch() + absl::Hours(1);
constexpr uint64_t kMiB = 1 << 20;

TEST(SourceSpeeds, LearnsLatencyAndBandwidth) {
  SourceSpeeds speeds;
  const SourceId source{"w", Tier::kHost};
  absl::Time now = kStart;
  for (int i = 0; i < 40; ++i) {
    const uint64_t bytes = (1 + i % 8) * kMiB;
    const auto ticket = speeds.Begin(source, bytes, now);
    now += absl::Seconds(0.005 + 0.01 * static_cast<double>(bytes / kMiB));
    speeds.End(ticket, bytes, now);
  }
  const SourceSpeeds::Speed speed = speeds.Of(source, now);
  EXPECT_NEAR(speed.latency_seconds, 0.005, 0.001);
  EXPECT_NEAR(speed.seconds_per_byte * kMiB, 0.01, 0.001);
  EXPECT_EQ(speed.queued_seconds, 0);
}

TEST(SourceSpeeds, AFullWindowDoesNotMakeASourceLookSlow) {
  // 16 reads at a time at a source that does one a millisecond: each takes 16 ms, and yet.
  SourceSpeeds speeds;
  const SourceId disk{"", Tier::kDisk};
  std::vector<SourceSpeeds::Ticket> window;
  absl::Time now = kStart;
  for (int i = 0; i < 16; ++i) window.push_back(speeds.Begin(disk, kMiB, now));
  for (int i = 0; i < 200; ++i) {
    now += absl::Milliseconds(1);
    speeds.End(window.front(), kMiB, now);
    window.erase(window.begin());
    window.push_back(speeds.Begin(disk, kMiB, now));
  }
  EXPECT_NEAR(speeds.Of(disk, now).seconds_per_byte * kMiB, 1e-3, 2e-4);
  EXPECT_NEAR(speeds.Of(disk, now).queued_seconds, 16e-3, 4e-3);
}

TEST(SourceSpeeds, WhatWasGivenUpCountsAsAtLeastThatSlow) {
  SourceSpeeds speeds;
  const SourceId disk{"", Tier::kDisk};
  const double before = speeds.Of(disk, kStart).latency_seconds;
  absl::Time now = kStart;
  for (int i = 0; i < 9; ++i) {
    const auto ticket = speeds.Begin(disk, kMiB, now);
    now += absl::Seconds(1);
    speeds.GiveUp(ticket, now);
  }
  const auto slow = speeds.Of(disk, now);
  EXPECT_GT(slow.latency_seconds + slow.seconds_per_byte * kMiB, 0.3);
  // A quick refusal says nothing.
  speeds.GiveUp(speeds.Begin(disk, kMiB, now), now);
  EXPECT_GT(speeds.Of(disk, now).latency_seconds + speeds.Of(disk, now).seconds_per_byte * kMiB, 0.3);
  // And it is tried again, in time.
  const auto later = speeds.Of(disk, now + absl::Minutes(10));
  EXPECT_NEAR(later.latency_seconds, before, before * 0.1);
}

TEST(SourceSpeeds, AFastSourceStaysFast) {
  SourceSpeeds speeds;
  const SourceId source{"w", Tier::kHost};
  absl::Time now = kStart;
  for (int i = 0; i < 20; ++i) {
    const auto ticket = speeds.Begin(source, kMiB, now);
    now += absl::Microseconds(50);
    speeds.End(ticket, kMiB, now);
  }
  const auto fresh = speeds.Of(source, now), stale = speeds.Of(source, now + absl::Minutes(10));
  EXPECT_EQ(fresh.seconds_per_byte, stale.seconds_per_byte);
}

TEST(SourceSpeeds, RemembersNoMoreThanItsLimit) {
  SourceSpeeds speeds;
  absl::Time now = kStart;
  const auto learn = [&](const std::string& worker) {
    for (int i = 0; i < 20; ++i) {
      const auto ticket = speeds.Begin({worker, Tier::kHost}, kMiB, now);
      now += absl::Milliseconds(100);
      speeds.End(ticket, kMiB, now);
    }
  };
  learn("first");
  const double learnt = speeds.Of({"first", Tier::kHost}, now).seconds_per_byte;
  for (int i = 0; i < 300; ++i) speeds.End(speeds.Begin({std::to_string(i), Tier::kHost}, 1, now), 1, now);
  const double forgotten = speeds.Of({"first", Tier::kHost}, now).seconds_per_byte;
  EXPECT_LT(forgotten, learnt / 2) << "the one asked longest ago has gone";
}

}  // namespace
}  // namespace tidepool
