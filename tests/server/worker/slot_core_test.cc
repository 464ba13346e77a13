#include "server/worker/slot_core.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>

#include "base/rng.h"

namespace tidepool {
namespace {

using testing::ElementsAre;
using testing::IsEmpty;

const absl::Time kStart = absl::UnixEpoch() + absl::Hours(1);

class SlotCoreTest : public testing::Test {
 protected:
  void Push(uint64_t id, bool batch_class = false, int32_t priority = 0, const std::string& tenant = "t",
            uint32_t prompt = 100) {
    core_.Push({.id = id,
                .tenant = tenant,
                .batch_class = batch_class,
                .priority = priority,
                .prompt_tokens = prompt,
                .preemptible = true},
               now_);
  }
  // It waits no more.
  void Run(uint64_t id, size_t slots, bool batch_class = false, int32_t priority = 0) {
    Push(id, batch_class, priority);
    core_.Granted(id, slots, now_);
  }
  // Grants all that wait; their order.
  std::vector<uint64_t> GrantAll() {
    std::vector<uint64_t> order;
    while (const auto next = core_.Next(now_)) {
      order.push_back(*next);
      core_.Granted(*next, 1, now_);
    }
    return order;
  }

  SlotCore core_{{.max_waiting = 3}};
  absl::Time now_ = kStart;
};

TEST_F(SlotCoreTest, ClassThenPriorityThenArrivalSayWhoIsNext) {
  Push(1, true);
  Push(2, false, 5);
  Push(3);
  Push(4, false, -5);
  Push(5);
  EXPECT_THAT(GrantAll(), ElementsAre(4, 3, 5, 2, 1));
}

TEST_F(SlotCoreTest, TenantWithOneRequestDoesNotWaitBehindAnothersTen) {
  for (uint64_t id = 1; id <= 5; ++id) Push(id, false, 0, "a");
  core_.Granted(1, 1, now_);
  Push(11, false, 0, "b");
  EXPECT_EQ(core_.Next(now_), 11u);
}

TEST_F(SlotCoreTest, AnswersCountAgainstTheirTenant) {
  Push(1, false, 0, "a", 10);
  Push(2, false, 0, "b", 50);
  core_.Granted(1, 1, now_);
  core_.Granted(2, 1, now_);
  core_.Output(1, 100);  // twice each
  Push(3, false, 0, "a");
  Push(4, false, 0, "b");
  EXPECT_EQ(core_.Next(now_), 4u);
}

TEST_F(SlotCoreTest, WhoHasWaitedForLongGoesBeforeHigherPrioritiesOfItsClass) {
  Push(1, false, 5);
  Push(2, true);
  now_ += absl::Seconds(31);
  Push(3, false, -5);
  EXPECT_THAT(GrantAll(), ElementsAre(1, 3, 2)) << "but no class above its own";
}

TEST_F(SlotCoreTest, BatchesMayTakeHalfTheWaitingPlaces) {
  EXPECT_FALSE(core_.Full(true));
  Push(1, true);
  Push(2, true);
  EXPECT_TRUE(core_.Full(true));
  EXPECT_FALSE(core_.Full(false));
  for (uint64_t id = 3; id <= 5; ++id) Push(id);
  EXPECT_TRUE(core_.Full(false)) << "all places are theirs";
  core_.Remove(4, now_);
  EXPECT_FALSE(core_.Full(false));
}

TEST_F(SlotCoreTest, OnlyLowerRanksGiveTheirSlotsUp) {
  Run(1, 4, false, 0);
  Run(2, 4, false, 3);
  Run(3, 4, true, 9);
  Run(4, 4, true, -9);
  Push(5, true, 0);
  EXPECT_THAT(core_.Victims(5, 1), ElementsAre(3));
  Push(6, false, 0);
  EXPECT_THAT(core_.Victims(6, 9), ElementsAre(3, 4, 2)) << "the last in rank first";
  EXPECT_THAT(core_.Victims(6, 5), ElementsAre(3, 4)) << "and no more than are needed";
  Push(7, false, 3);
  EXPECT_THAT(core_.Victims(7, 8), ElementsAre(3, 4)) << "not its equals";
}

TEST_F(SlotCoreTest, NobodyIsPreemptedWhereThatWouldNotDo) {
  Run(1, 4, true);
  Push(2);
  EXPECT_THAT(core_.Victims(2, 5), IsEmpty());
  EXPECT_THAT(core_.Victims(2, 4), ElementsAre(1));
}

TEST_F(SlotCoreTest, WhoMayNotBeAskedNowDoesNotCount) {
  Run(1, 4, true);
  Run(2, 4, true);
  Push(3);
  const auto not_two = [](uint64_t id) { return id != 2; };
  EXPECT_THAT(core_.Victims(3, 4, not_two), ElementsAre(1));
  EXPECT_THAT(core_.Victims(3, 5, not_two), IsEmpty()) << "one alone would not do";
  EXPECT_THAT(core_.Victims(3, 5), ElementsAre(2, 1));
}

TEST_F(SlotCoreTest, TheLatestOfEqualsGoesFirst) {
  Run(1, 4, true);
  Run(2, 4, true);
  Push(3);
  EXPECT_THAT(core_.Victims(3, 1), ElementsAre(2));
}

TEST_F(SlotCoreTest, NobodyElseIsAskedUntilThoseThatWereHaveAnswered) {
  Run(1, 4, true);
  Run(2, 4, true);
  Push(3);
  core_.Asked(2);
  EXPECT_THAT(core_.Victims(3, 1), IsEmpty());
  EXPECT_TRUE(core_.Preempted(2, now_));
  EXPECT_THAT(core_.Victims(3, 1), ElementsAre(1));
  core_.Asked(1);
  core_.Remove(1, now_);  // it ended instead
  Run(4, 4, true);
  EXPECT_THAT(core_.Victims(3, 1), ElementsAre(4));
}

TEST_F(SlotCoreTest, OneThatCannotBeIsNeverPreempted) {
  core_.Push({.id = 1, .tenant = "t", .batch_class = true}, now_);
  core_.Granted(1, 4, now_);
  Push(2);
  EXPECT_THAT(core_.Victims(2, 1), IsEmpty());
}

TEST_F(SlotCoreTest, ThePreemptedGoBeforeTheirEqualsAndNoHigher) {
  Run(1, 4, true);
  core_.Granted((Push(2, false, 5), 2), 4, now_);
  Push(3, true);
  Push(4, false, 5);
  Push(5, false, 0);
  EXPECT_TRUE(core_.Preempted(1, now_));
  EXPECT_TRUE(core_.Preempted(2, now_));
  EXPECT_FALSE(core_.Preempted(2, now_)) << "it waits already";
  EXPECT_THAT(GrantAll(), ElementsAre(5, 2, 4, 1, 3));
}

TEST_F(SlotCoreTest, WhoCameBackIsLeftInPeaceUntilItHasGotOnTwiceAsFarEachTime) {
  Run(1, 4, true);
  Push(2);
  uint32_t outputs = 0;
  for (const uint32_t more : {0u, 16u, 32u, 64u}) {
    if (more > 0) {
      outputs += more - 1;
      core_.Output(1, outputs);
      EXPECT_THAT(core_.Victims(2, 1), IsEmpty()) << outputs;
      ++outputs;
    }
    core_.Output(1, outputs);
    ASSERT_THAT(core_.Victims(2, 1), ElementsAre(1)) << outputs;
    ASSERT_TRUE(core_.Preempted(1, now_));
    core_.Granted(1, 4, now_);
  }
}

TEST_F(SlotCoreTest, SwapTrafficCountsAgainstItsTenant) {
  Push(1, false, 0, "a", 10);
  Push(2, false, 0, "b", 10);
  core_.Granted(1, 1, now_);
  core_.Granted(2, 1, now_);
  core_.Charge(1, 5, now_);
  Push(3, false, 0, "a");
  Push(4, false, 0, "b");
  EXPECT_EQ(core_.Next(now_), 4u);
}

// Random arrivals in a small pool: slots are never overdrawn, nobody makes an equal give way, everybody ends,
// and is preempted as often as its progress allows and no more.
TEST(SlotCore, RandomLivesEndAndArePreemptedBoundedly) {
  for (uint64_t seed = 1; seed <= 60; ++seed) {
    Rng rng(seed);
    constexpr size_t kSlots = 12;
    SlotCore core({.max_waiting = 100, .order = static_cast<FairQueue::Order>(seed % kQueueOrders)});
    struct Life {
      bool batch_class;
      int32_t priority;
      size_t slots;
      uint32_t outputs, drawn = 0, preempted = 0;
      bool running = false, asked = false;
    };
    std::map<uint64_t, Life> lives;
    absl::Time now = kStart;
    uint64_t next = 1, preemptions = 0;
    for (int step = 0; next <= 40 || !lives.empty(); ++step) {
      ASSERT_LT(step, 100000) << "seed " << seed << ": not all have ended";
      now += absl::Milliseconds(100);
      if (next <= 40 && rng.Chance(0.1)) {
        Life life{.batch_class = rng.Chance(0.5),
                  .priority = static_cast<int32_t>(rng.Below(3)),
                  .slots = 1 + rng.Below(kSlots),
                  .outputs = 1 + static_cast<uint32_t>(rng.Below(300))};
        core.Push({.id = next,
                   .tenant = std::string(1, static_cast<char>('a' + rng.Below(3))),
                   .batch_class = life.batch_class,
                   .priority = life.priority,
                   .prompt_tokens = 10,
                   .preemptible = rng.Chance(0.9)},
                  now);
        lives.emplace(next++, life);
      }
      while (const auto id = core.Next(now)) {
        Life& life = lives.at(*id);
        size_t used = 0;
        for (const auto& [other, l] : lives) used += l.running ? l.slots : 0;
        ASSERT_LE(used, kSlots);
        if (used + life.slots <= kSlots) {
          core.Granted(*id, life.slots, now);
          life.running = true;
          continue;
        }
        for (const uint64_t victim : core.Victims(*id, used + life.slots - kSlots)) {
          Life& v = lives.at(victim);
          ASSERT_GT(std::pair(v.batch_class, v.priority), std::pair(life.batch_class, life.priority));
          core.Asked(victim);
          v.asked = true;
        }
        break;
      }
      for (auto it = lives.begin(); it != lives.end();) {
        Life& life = it->second;
        if (life.running && life.asked && rng.Chance(0.5)) {
          ASSERT_TRUE(core.Preempted(it->first, now));
          life.running = life.asked = false;
          ++life.preempted;
          ++preemptions;
          ASSERT_LE(life.preempted, 2 + 6u) << "300 tokens are 16 + 32 + 64 + 128 and some";
        }
        if (life.running) core.Output(it->first, ++life.drawn);
        if (life.drawn == life.outputs) {
          core.Remove(it->first, now);
          it = lives.erase(it);
        } else {
          ++it;
        }
      }
    }
    EXPECT_EQ(core.waiting() + core.running(), 0u);
    EXPECT_GT(preemptions, 0u) << "seed " << seed;
  }
}

}  // namespace
}  // namespace tidepool
