#include "kvstore/policy/policy.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <map>
#include <set>

#include "base/rng.h"
#include "kvstore/policy/reuse_gap.h"

namespace tidepool {
namespace {

using testing::HasSubstr;

BlockKey Key(uint64_t n) {
  BlockKey key;
  std::memcpy(key.bytes.data(), &n, 8);
  return key;
}

std::unique_ptr<EvictionPolicy> Make(std::string name, uint32_t capacity, NextUse next_use = nullptr,
                                     uint64_t turn_bonus = 0) {
  auto policy = CreatePolicy({.name = std::move(name),
                              .capacity = capacity,
                              .next_use = std::move(next_use),
                              .turn_bonus = turn_bonus});
  EXPECT_TRUE(policy.ok()) << policy.status();
  return std::move(*policy);
}

// Drives one policy as a cache of single blocks would.
class Cache {
 public:
  Cache(std::unique_ptr<EvictionPolicy> policy, uint32_t capacity) : policy_(std::move(policy)) {
    for (uint32_t i = capacity; i-- > 0;) free_.push_back(i);
  }
  // True: a hit.
  bool Use(uint64_t n, PolicyUse use = {}, PolicyEntry entry = {}) {
    if (use.request == 0) use.request = ++requests_;
    if (const auto it = ids_.find(n); it != ids_.end()) {
      policy_->OnUse(std::span(&it->second, 1), use);
      policy_->OnRelease(std::span(&it->second, 1), use.request);
      return true;
    }
    if (free_.empty()) {
      const auto victim = policy_->Victim(EvictionPolicy::kAnyGroup);
      EXPECT_TRUE(victim.has_value());
      Drop(*victim, true);
    }
    const uint32_t id = free_.back();
    free_.pop_back();
    ids_[n] = id;
    keys_[id] = n;
    entry.key = Key(n);
    policy_->OnInsert(id, entry, use);
    policy_->OnRelease(std::span(&id, 1), use.request);
    policy_->SetCandidate(id, EvictionBand::kNormal);
    return false;
  }
  void Drop(uint32_t id, bool evicted) {
    policy_->OnErase(id, evicted);
    ids_.erase(keys_.at(id));
    keys_.erase(id);
    free_.push_back(id);
  }
  bool Has(uint64_t n) const { return ids_.contains(n); }
  EvictionPolicy& policy() { return *policy_; }
  uint32_t id(uint64_t n) const { return ids_.at(n); }

 private:
  std::unique_ptr<EvictionPolicy> policy_;
  std::vector<uint32_t> free_;
  std::map<uint64_t, uint32_t> ids_;
  std::map<uint32_t, uint64_t> keys_;
  uint64_t requests_ = 0;
};

TEST(PolicyTest, FactoryKnowsItsNamesAndListsThemOtherwise) {
  for (const std::string_view name : PolicyNames()) {
    EXPECT_EQ(Make(std::string(name), 4)->name(), name);
  }
  const auto bad = CreatePolicy({"mru", 4});
  EXPECT_EQ(bad.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(bad.status().message()), HasSubstr("'mru'"));
  EXPECT_THAT(std::string(bad.status().message()), HasSubstr("turn-aware"));
  EXPECT_EQ(CreatePolicy({"lru", 0}).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(CreatePolicy({"belady", 4}).status().message()), HasSubstr("future"));
}

TEST(PolicyTest, LruTakesTheLeastRecentlyUsed) {
  Cache cache(Make("lru", 3), 3);
  for (uint64_t n : {1, 2, 3}) cache.Use(n);
  EXPECT_TRUE(cache.Use(1));
  cache.Use(4);
  EXPECT_FALSE(cache.Has(2));
  cache.Use(5);
  EXPECT_FALSE(cache.Has(3));
  EXPECT_TRUE(cache.Has(1));
}

TEST(PolicyTest, LfuTakesTheLeastOftenUsedAndAmongThoseTheOldest) {
  Cache cache(Make("lfu", 3), 3);
  for (uint64_t n : {1, 1, 1, 2, 2, 3}) cache.Use(n);
  cache.Use(4);
  EXPECT_FALSE(cache.Has(3));
  cache.Use(4);
  cache.Use(5);  // 2 and 4 have two uses each, 2's are older
  EXPECT_FALSE(cache.Has(2));
  EXPECT_TRUE(cache.Has(1));
}

TEST(PolicyTest, GdsfForgetsWhatWasPopularOnce) {
  Cache cache(Make("gdsf", 2), 2);
  for (int i = 0; i < 5; ++i) cache.Use(1);
  // Each victim raises the clock by one, so after five of them a newcomer weighs as much as 1 does.
  for (uint64_t n = 2; n <= 6; ++n) {
    EXPECT_TRUE(cache.Has(1)) << n;
    cache.Use(n);
  }
  cache.Use(7);
  cache.Use(8);
  EXPECT_FALSE(cache.Has(1));
}

TEST(PolicyTest, PgdsfKeepsWhatIsExpensiveToRecompute) {
  for (const bool costs : {false, true}) {
    Cache cache(Make(costs ? "pgdsf" : "gdsf", 3), 3);
    cache.Use(1, {}, {.compute_seconds = 0.5f});
    cache.Use(2, {}, {.compute_seconds = 0.001f});
    cache.Use(3, {}, {.compute_seconds = 0.2f});
    cache.Use(4, {}, {.compute_seconds = 0.2f});
    EXPECT_EQ(cache.Has(1), costs);
    EXPECT_EQ(cache.Has(2), !costs);
  }
}

TEST(PolicyTest, GdsfPrefersSmallEntries) {
  Cache cache(Make("gdsf", 2), 2);
  cache.Use(1, {}, {.bytes = 10});
  cache.Use(2, {}, {.bytes = 1000});
  cache.Use(3, {}, {.bytes = 10});
  EXPECT_TRUE(cache.Has(1));
  EXPECT_FALSE(cache.Has(2));
}

TEST(PolicyTest, S3FifoLetsOneTimersPassWithoutTouchingTheMainQueue) {
  constexpr uint32_t kCapacity = 50;
  Cache cache(Make("s3-fifo", kCapacity), kCapacity);
  for (uint64_t n = 0; n < 40; ++n) cache.Use(n);
  for (uint64_t n = 0; n < 40; ++n)
    cache.Use(n);  // used again: they move to the main queue when room is needed
  for (uint64_t n = 1000; n < 1500; ++n) cache.Use(n);
  int kept = 0;
  for (uint64_t n = 0; n < 40; ++n) kept += cache.Has(n) ? 1 : 0;
  EXPECT_EQ(kept, 40);

  Cache lru(Make("lru", kCapacity), kCapacity);
  for (uint64_t n = 0; n < 40; ++n) lru.Use(n);
  for (uint64_t n = 0; n < 40; ++n) lru.Use(n);
  for (uint64_t n = 1000; n < 1500; ++n) lru.Use(n);
  EXPECT_FALSE(lru.Has(0)) << "which the least recently used order does not";
}

TEST(PolicyTest, S3FifoRemembersWhatItEvictedFromTheSmallQueue) {
  constexpr uint32_t kCapacity = 20;
  Cache cache(Make("s3-fifo", kCapacity), kCapacity);
  for (uint64_t n = 0; n < 30; ++n) cache.Use(n);
  ASSERT_FALSE(cache.Has(5));
  cache.Use(5);  // a ghost: straight into the main queue
  for (uint64_t n = 100; n < 115; ++n) cache.Use(n);
  EXPECT_TRUE(cache.Has(5));
}

TEST(PolicyTest, TurnAwareKeepsConversationsThatCameBackOnePauseLonger) {
  Cache cache(Make("turn-aware", 2, nullptr, /*turn_bonus=*/5), 2);
  cache.Use(1, {.request = 10, .extends_session = true});
  cache.Use(2, {.request = 12});
  cache.Use(3, {.request = 13});
  EXPECT_TRUE(cache.Has(1)) << "counts as used at 15";
  EXPECT_FALSE(cache.Has(2));
  cache.Use(4, {.request = 16});
  EXPECT_FALSE(cache.Has(3));
  cache.Use(5, {.request = 17});
  EXPECT_FALSE(cache.Has(1)) << "its next turn did not come in time";
}

TEST(PolicyTest, ReuseGapFollowsTheMedianPause) {
  ReuseGap gap;
  EXPECT_EQ(gap.Bonus(), ReuseGap::kDefault);
  Rng rng(1);
  for (int i = 0; i < 5000; ++i) gap.Observe(50 + rng.Below(100));  // median 100
  EXPECT_NEAR(static_cast<double>(gap.Bonus()), 100, 20);
  for (int i = 0; i < 20000; ++i) gap.Observe(3000 + rng.Below(2000));
  EXPECT_NEAR(static_cast<double>(gap.Bonus()), 4000, 800);
  gap.Observe(0);
  gap.Observe(~uint64_t{0});
}

TEST(PolicyTest, BeladyTakesWhatIsUsedAgainLast) {
  const std::vector<uint64_t> uses = {1, 2, 3, 4, 1, 2, 5, 1, 2, 3, 4, 5};
  const NextUse next = [&](const BlockKey& key, uint64_t request) -> uint64_t {
    for (size_t i = request; i < uses.size(); ++i) {
      if (Key(uses[i]) == key) return i + 1;
    }
    return kNever;
  };
  Cache belady(Make("belady", 3, next), 3), lru(Make("lru", 3), 3);
  int belady_hits = 0, lru_hits = 0;
  for (const uint64_t n : uses) {
    belady_hits += belady.Use(n) ? 1 : 0;
    lru_hits += lru.Use(n) ? 1 : 0;
  }
  EXPECT_EQ(belady_hits, 5);  // the textbook example: 7 faults
  EXPECT_EQ(lru_hits, 2);     // 10 faults
}

class EveryPolicyTest : public testing::TestWithParam<std::string> {};

TEST_P(EveryPolicyTest, OnlyCandidatesAreVictimsAndTheLateBandGoesLast) {
  auto policy = Make(GetParam(), 8, [](const BlockKey&, uint64_t) { return kNever; });
  for (uint32_t id = 0; id < 6; ++id) policy->OnInsert(id, {.key = Key(id)}, {.request = id + 1});
  EXPECT_EQ(policy->Victim(EvictionPolicy::kAnyGroup), std::nullopt);
  policy->SetCandidate(0, EvictionBand::kLate);
  policy->SetCandidate(4, EvictionBand::kNormal);
  policy->SetCandidate(5, EvictionBand::kNormal);
  std::set<uint32_t> normal;
  for (int i = 0; i < 2; ++i) {
    const auto victim = policy->Victim(EvictionPolicy::kAnyGroup);
    ASSERT_TRUE(victim.has_value());
    EXPECT_EQ(policy->Victim(EvictionPolicy::kAnyGroup), victim) << "it stays the victim until it is gone";
    normal.insert(*victim);
    policy->OnErase(*victim, true);
  }
  EXPECT_EQ(normal, (std::set<uint32_t>{4, 5}));
  EXPECT_EQ(policy->Victim(EvictionPolicy::kAnyGroup), 0u);
  policy->SetCandidate(0, EvictionBand::kNormal);
  EXPECT_EQ(policy->Victim(EvictionPolicy::kAnyGroup), 0u);
  policy->ClearCandidate(0);
  EXPECT_EQ(policy->Victim(EvictionPolicy::kAnyGroup), std::nullopt);
}

TEST_P(EveryPolicyTest, VictimsOfAGroupAreItsOwn) {
  auto policy = Make(GetParam(), 30, [](const BlockKey&, uint64_t) { return kNever; });
  for (uint32_t id = 0; id < 30; ++id) {
    policy->OnInsert(id, {.key = Key(id), .group = id % 3}, {.request = id + 1});
    policy->SetCandidate(id, id % 2 == 0 ? EvictionBand::kNormal : EvictionBand::kLate);
  }
  for (int i = 0; i < 10; ++i) {
    const auto victim = policy->Victim(1);
    ASSERT_TRUE(victim.has_value());
    EXPECT_EQ(*victim % 3, 1u);
    policy->OnErase(*victim, true);
  }
  EXPECT_EQ(policy->Victim(1), std::nullopt);
  EXPECT_EQ(policy->Victim(7), std::nullopt) << "a group that was never seen";
  EXPECT_TRUE(policy->Victim(EvictionPolicy::kAnyGroup).has_value());
}

// Whatever happens, the victims are candidates, each exists once, and all candidates come up in the end.
TEST_P(EveryPolicyTest, NeverLosesNorInventsCandidatesOverRandomOperations) {
  constexpr uint32_t kCapacity = 40;
  for (uint64_t seed = 1; seed <= 5; ++seed) {
    Rng rng(seed);
    auto policy = Make(GetParam(), kCapacity,
                       [](const BlockKey& key, uint64_t request) { return request + 1 + key.bytes[0] % 7; });
    std::set<uint32_t> in, candidates;
    uint64_t request = 0;
    for (int step = 0; step < 5000; ++step) {
      const auto id = static_cast<uint32_t>(rng.Below(kCapacity));
      const PolicyUse use{
          .request = ++request, .extends_session = rng.Chance(0.3), .session_gap = rng.Below(50)};
      switch (rng.Below(6)) {
        case 0:
          if (in.insert(id).second) policy->OnInsert(id, {.key = Key(rng.Below(100)), .group = id % 2}, use);
          break;
        case 1:
          if (in.contains(id)) policy->OnUse(std::span(&id, 1), use);
          break;
        case 2:
          if (in.contains(id)) policy->OnRelease(std::span(&id, 1), request);
          break;
        case 3:
          if (!in.contains(id)) break;
          policy->SetCandidate(id, rng.Chance(0.5) ? EvictionBand::kNormal : EvictionBand::kLate);
          candidates.insert(id);
          break;
        case 4:
          if (!in.contains(id)) break;
          policy->ClearCandidate(id);
          candidates.erase(id);
          break;
        case 5: {
          const auto victim = policy->Victim(EvictionPolicy::kAnyGroup);
          ASSERT_EQ(victim.has_value(), !candidates.empty());
          if (!victim) break;
          ASSERT_TRUE(candidates.contains(*victim));
          policy->OnErase(*victim, rng.Chance(0.8));
          candidates.erase(*victim);
          in.erase(*victim);
          break;
        }
      }
    }
    while (!candidates.empty()) {
      const auto victim = policy->Victim(EvictionPolicy::kAnyGroup);
      ASSERT_TRUE(victim.has_value());
      ASSERT_EQ(candidates.erase(*victim), 1u);
      policy->OnErase(*victim, true);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(All, EveryPolicyTest,
                         testing::Values("lru", "lfu", "s3-fifo", "gdsf", "pgdsf", "turn-aware", "belady"),
                         [](const auto& info) {
                           std::string name = info.param;
                           std::replace(name.begin(), name.end(), '-', '_');
                           return name;
                         });

}  // namespace
}  // namespace tidepool
