#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

#include "base/rng.h"
#include "kvstore/policy/admission.h"
#include "kvstore/policy/session_ends.h"
#include "kvstore/policy/tool_ttl.h"
#include "kvstore/policy/tuner.h"

namespace tidepool {
namespace {

BlockKey Key(uint64_t n) {
  BlockKey key;
  const uint64_t mixed = Mix64(n);
  std::memcpy(key.bytes.data(), &mixed, 8);
  std::memcpy(key.bytes.data() + 8, &n, 8);
  return key;
}

// --- ToolTtl ---

TEST(ToolTtlTest, PinsUntilTheDurationAtWhichTheWorthIsHighest) {
  ToolTtl ttl({});
  for (int i = 1; i <= 9; ++i) ttl.Observe("search", absl::Seconds(2));
  ttl.Observe("search", absl::Seconds(100));
  EXPECT_DOUBLE_EQ(ttl.Cdf("search", absl::Seconds(1)), 0);
  EXPECT_DOUBLE_EQ(ttl.Cdf("search", absl::Seconds(2)), 0.9);
  EXPECT_DOUBLE_EQ(ttl.Cdf("search", absl::Minutes(5)), 1);
  // 0.9 * 5 - 2 * 0.1 = 4.3 at 2 s; 5 - 10 < 0 at 100 s.
  EXPECT_EQ(ttl.Choose("search", 5, 0.1), absl::Seconds(2));
  // Holding costs next to nothing: wait for the slow call, too.
  EXPECT_EQ(ttl.Choose("search", 5, 0.001), absl::Seconds(100));
  // Holding costs more than it can save.
  EXPECT_EQ(ttl.Choose("search", 5, 10), absl::ZeroDuration());
  EXPECT_EQ(ttl.Choose("search", 0, 0.1), absl::ZeroDuration());
}

TEST(ToolTtlTest, ChosenTtlIsTheBestOfAllByExhaustiveSearch) {
  Rng rng(7);
  for (int round = 0; round < 50; ++round) {
    ToolTtl ttl({.max_ttl = absl::Hours(1)});
    const size_t n = ToolTtl::kEnough + rng.Below(100);
    for (size_t i = 0; i < n; ++i) {
      // Log-normal-like with a heavy tail.
      ttl.Observe("t",
                  absl::Seconds(std::exp(3 * (rng.Uniform() + rng.Uniform() - 1)) / (1.02 - rng.Uniform())));
    }
    const double benefit = 10 * rng.Uniform(), cost = rng.Uniform();
    const auto worth = [&](absl::Duration t) {
      return ttl.Cdf("t", t) * benefit - absl::ToDoubleSeconds(t) * cost;
    };
    const double chosen = worth(ttl.Choose("t", benefit, cost));
    EXPECT_GE(chosen, -1e-9) << "never worse than not pinning";
    for (double s = 0; s < 200; s += 0.05) ASSERT_GE(chosen + 1e-9, worth(absl::Seconds(s)));
  }
}

TEST(ToolTtlTest, UnknownToolIsTakenToHaveExponentialDurations) {
  ToolTtl ttl({.first_mean = absl::Seconds(4)});
  EXPECT_EQ(ttl.Cdf("new", absl::Seconds(1)), -1);
  const double expect = 4 * std::log(10 / (4 * 0.5));
  EXPECT_NEAR(absl::ToDoubleSeconds(ttl.Choose("new", 10, 0.5)), expect, 1e-6);
  EXPECT_EQ(ttl.Choose("new", 1, 0.5), absl::ZeroDuration()) << "not worth it on average";
  EXPECT_EQ(ttl.Choose("new", 1, 0), absl::Minutes(10)) << "memory costs nothing: as long as is allowed";
}

TEST(ToolTtlTest, RemembersTheLatestDurationsOfTheToolsCalledLast) {
  ToolTtl ttl({.max_tools = 2, .samples = 16});
  for (int i = 0; i < 100; ++i) ttl.Observe("a", absl::Seconds(50));
  for (int i = 0; i < 16; ++i) ttl.Observe("a", absl::Seconds(1));
  EXPECT_DOUBLE_EQ(ttl.Cdf("a", absl::Seconds(1)), 1) << "the slow ones are forgotten";
  ttl.Observe("b", absl::Seconds(-3));
  EXPECT_DOUBLE_EQ(ttl.Cdf("b", absl::ZeroDuration()), 1);
  ttl.Observe("c", absl::Seconds(1));
  EXPECT_EQ(ttl.tools(), 2u);
  EXPECT_EQ(ttl.Cdf("a", absl::Seconds(1)), -1) << "called longest ago";
}

// --- admission ---

TEST(AdmissionTest, FactoryKnowsItsNames) {
  for (const std::string_view name : AdmissionNames()) {
    EXPECT_EQ((*CreateAdmissionFilter(name, 10))->name(), name);
  }
  EXPECT_THAT(std::string(CreateAdmissionFilter("never", 10).status().message()),
              testing::HasSubstr("tinylfu"));
}

TEST(AdmissionTest, FrequentWritesAtTheSecondUseAndForgets) {
  auto filter = *CreateAdmissionFilter("frequent", 256);
  filter->OnUse(Key(1));
  EXPECT_FALSE(filter->Admit(Key(1), nullptr));
  filter->OnUse(Key(1));
  EXPECT_TRUE(filter->Admit(Key(1), nullptr));
  EXPECT_FALSE(filter->Admit(Key(2), nullptr));
  for (uint64_t n = 100; n < 100 + 2 * 256; ++n) filter->OnUse(Key(n));
  EXPECT_FALSE(filter->Admit(Key(1), nullptr)) << "two rounds ago";
}

TEST(AdmissionTest, FrequentKeepsOutWhatIsUsedOnceOnASkewedLoad) {
  auto filter = *CreateAdmissionFilter("frequent", 1000);
  Rng rng(3);
  int once = 0, often = 0;
  for (uint64_t i = 0; i < 20000; ++i) {
    const bool hot = rng.Chance(0.3);
    const BlockKey key = Key(hot ? rng.Below(100) : 1000 + i);
    filter->OnUse(key);
    if (filter->Admit(key, nullptr)) ++(hot ? often : once);
  }
  EXPECT_EQ(once, 0);
  EXPECT_GT(often, 5000);
}

TEST(AdmissionTest, TinyLfuAdmitsWhatIsUsedMoreThanTheVictim) {
  auto filter = *CreateAdmissionFilter("tinylfu", 1000);
  for (int i = 0; i < 5; ++i) filter->OnUse(Key(1));
  for (int i = 0; i < 2; ++i) filter->OnUse(Key(2));
  const BlockKey one = Key(1), two = Key(2), three = Key(3);
  EXPECT_TRUE(filter->Admit(one, &two));
  EXPECT_FALSE(filter->Admit(two, &one));
  EXPECT_FALSE(filter->Admit(three, &two));
  EXPECT_FALSE(filter->Admit(one, &one)) << "a tie is not worth a write";
  EXPECT_TRUE(filter->Admit(three, nullptr)) << "there is room";
}

TEST(AdmissionTest, TinyLfuAgesItsCounts) {
  auto filter = *CreateAdmissionFilter("tinylfu", 64);
  for (int i = 0; i < 10; ++i) filter->OnUse(Key(1));
  Rng rng(4);
  for (int i = 0; i < 64 * 10 * 6; ++i) filter->OnUse(Key(1000 + rng.Below(1u << 30)));
  for (int i = 0; i < 12; ++i) filter->OnUse(Key(2));
  const BlockKey one = Key(1);
  EXPECT_TRUE(filter->Admit(Key(2), &one));
}

// --- what a pool remembers of conversations ---

TEST(SessionEndsTest, ForgetsTheOldestBeyondItsLimit) {
  SessionEnds ends(3);
  for (uint64_t n = 1; n <= 5; ++n) {
    ends.Remember(Key(n), 10 * n);
    ends.Expect(Key(n), {.request = n});
    EXPECT_EQ(ends.NextTurn(n, n), 0u);
  }
  EXPECT_EQ(ends.EndOf(Key(2)), 0u);
  EXPECT_EQ(ends.EndOf(Key(3)), 30u);
  EXPECT_EQ(ends.Expected(Key(2)), nullptr);
  ASSERT_NE(ends.Expected(Key(5)), nullptr);
  EXPECT_EQ(ends.Expected(Key(5))->request, 5u);
  EXPECT_EQ(ends.NextTurn(4, 9), 4u);
  EXPECT_EQ(ends.NextTurn(4, 12), 9u);
  EXPECT_EQ(ends.NextTurn(1, 13), 0u);
}

// --- tuner ---

TEST(PolicyTunerTest, SwitchesOnlyAfterTwoWindowsAndOnlyForMoreThanTheMargin) {
  // A loop that is a little longer than the cache: LRU finds nothing, S3-FIFO and LFU much.
  PolicyTuner tuner({.slots = 100, .ghost_slots = 100, .window = 2000, .policy = "lru"});
  int requests = 0, switched_at = 0;
  for (; requests < 20000 && switched_at == 0; ++requests) {
    const BlockKey key = Key(requests % 130);
    if (tuner.OnRequest(std::span(&key, 1), 0)) switched_at = requests;
  }
  ASSERT_GT(switched_at, 0);
  EXPECT_GE(switched_at, 2 * 2000 - 1);
  EXPECT_NE(tuner.policy(), "lru");

  // Where all do equally well, nothing happens.
  PolicyTuner calm({.slots = 100, .ghost_slots = 100, .window = 2000, .policy = "lru"});
  for (int i = 0; i < 20000; ++i) {
    const BlockKey key = Key(i % 50);
    EXPECT_EQ(calm.OnRequest(std::span(&key, 1), 0), std::nullopt);
  }
  EXPECT_EQ(calm.policy(), "lru");
}

TEST(PolicyTunerTest, SampleOfALargePoolScoresLikeTheWhole) {
  Rng rng(5);
  PolicyTuner whole({.slots = 20000, .ghost_slots = 20000, .window = 100000, .policy = "lru"});
  PolicyTuner sample({.slots = 20000, .ghost_slots = 2000, .window = 10000, .policy = "lru"});
  for (int i = 0; i < 210000; ++i) {
    // Something to keep (of which not all fits) among what comes once.
    const BlockKey key = Key(rng.Chance(0.7) ? rng.Below(25000) : 100000 + i);
    whole.OnRequest(std::span(&key, 1), 0);
    sample.OnRequest(std::span(&key, 1), 0);
  }
  ASSERT_FALSE(whole.scores().empty());
  ASSERT_FALSE(sample.scores().empty());
  for (size_t p = 0; p < whole.scores().size(); ++p) {
    EXPECT_NEAR(whole.scores()[p].hit_rate, sample.scores()[p].hit_rate, 0.03) << whole.scores()[p].policy;
  }
}

}  // namespace
}  // namespace tidepool
