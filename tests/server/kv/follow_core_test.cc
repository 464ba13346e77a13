#include "server/kv/follow_core.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace tidepool {
namespace {

using testing::ElementsAre;
using testing::IsEmpty;

const absl::Time kStart = absl::UnixEpoch() + absl::Hours(1);

BlockKey Key(int n) {
  BlockKey key;
  key.bytes[0] = static_cast<uint8_t>(n >> 8);
  key.bytes[1] = static_cast<uint8_t>(n);
  return key;
}

// Blocks [begin, end) of one chain, stored by `worker` at `now`.
void Store(FollowCore& core, const std::string& worker, int begin, int end, absl::Time now = kStart) {
  for (int i = begin; i < end; ++i)
    core.OnStored(worker, Key(i), i == 0 ? std::nullopt : std::optional(Key(i - 1)), now);
}

TEST(FollowCore, ChainOfOneRequestIsLeftAlone) {
  FollowCore core({});
  Store(core, "w", 0, 5);
  // Its answer, block by block: the same request going on.
  for (int i = 5; i < 9; ++i) Store(core, "w", i, i + 1, kStart + absl::Seconds(i));
  EXPECT_THAT(core.Take(100).keys, IsEmpty());
}

TEST(FollowCore, ChainThatALaterRequestCarriesOnIsTakenFromItsHead) {
  FollowCore core({});
  Store(core, "w", 0, 3);
  Store(core, "w", 3, 4, kStart + absl::Minutes(1));
  const auto wanted = core.Take(100);
  EXPECT_EQ(wanted.worker_id, "w");
  EXPECT_THAT(wanted.keys, ElementsAre(Key(0), Key(1), Key(2), Key(3)));
  // And from now on what is added to it.
  Store(core, "w", 4, 5, kStart + absl::Minutes(1) + absl::Seconds(1));
  EXPECT_THAT(core.Take(100).keys, ElementsAre(Key(4)));
}

TEST(FollowCore, PrefixThatTwoRequestsShareIsTakenWithoutTheirTails) {
  FollowCore core({});
  Store(core, "w", 0, 3);
  core.OnStored("w", Key(100), Key(1), kStart + absl::Seconds(1));
  EXPECT_THAT(core.Take(100).keys, ElementsAre(Key(0), Key(1)));
}

TEST(FollowCore, WhatAllIsAskedForIsTakenOnce) {
  FollowCore core({.all = true});
  Store(core, "w", 0, 2);
  Store(core, "w", 0, 2, kStart + absl::Minutes(5));
  EXPECT_THAT(core.Take(100).keys, ElementsAre(Key(0), Key(1)));
  EXPECT_THAT(core.Take(100).keys, IsEmpty());
}

TEST(FollowCore, BlocksThatAreGoneBeforeTheirTurnAreNotAskedFor) {
  FollowCore core({.all = true});
  Store(core, "w", 0, 3);
  core.OnRemoved("w", Key(1));
  core.OnRemoved("other", Key(2));  // that is not who has it
  EXPECT_THAT(core.Take(100).keys, ElementsAre(Key(0), Key(2)));
  Store(core, "w", 10, 12);
  core.OnGone("w");
  EXPECT_THAT(core.Take(100).keys, IsEmpty());
}

TEST(FollowCore, AsksOneWorkerATime) {
  FollowCore core({.all = true});
  Store(core, "a", 0, 2);
  core.OnStored("b", Key(50), std::nullopt, kStart);
  auto wanted = core.Take(1);
  EXPECT_THAT(wanted.keys, ElementsAre(Key(0)));
  wanted = core.Take(100);
  EXPECT_EQ(wanted.worker_id, "a");
  EXPECT_THAT(wanted.keys, ElementsAre(Key(1)));
  wanted = core.Take(100);
  EXPECT_EQ(wanted.worker_id, "b");
  EXPECT_THAT(wanted.keys, ElementsAre(Key(50)));
}

TEST(FollowCore, TheLastWorkerToStoreABlockIsAsked) {
  FollowCore core({.all = true});
  core.OnStored("a", Key(0), std::nullopt, kStart);
  core.OnStored("b", Key(0), std::nullopt, kStart);
  EXPECT_EQ(core.Take(1).worker_id, "b");
}

TEST(FollowCore, MemoryAndQueueAreBounded) {
  FollowCore core({.all = true, .max_blocks = 100, .max_wanted = 10});
  for (int i = 0; i < 1000; ++i) core.OnStored("w", Key(i), std::nullopt, kStart);
  EXPECT_EQ(core.wanted(), 10u);
  EXPECT_EQ(core.dropped(), 990u);
  EXPECT_EQ(core.Take(100).keys.size(), 10u);
}

TEST(FollowCore, WhatWasThereLongAgoCountsAsAnEarlierRequest) {
  FollowCore core({});
  for (int i = 0; i < 3; ++i)
    core.OnStored("w", Key(i), i == 0 ? std::nullopt : std::optional(Key(i - 1)), absl::InfinitePast());
  EXPECT_THAT(core.Take(100).keys, IsEmpty());
  Store(core, "w", 3, 4);
  EXPECT_THAT(core.Take(100).keys, ElementsAre(Key(0), Key(1), Key(2), Key(3)));
}

}  // namespace
}  // namespace tidepool
