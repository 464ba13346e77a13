#include "scheduler/placement_policy.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <set>

#include "scheduler/core.h"
#include "tests/scheduler/cluster_builder.h"

namespace tidepool {
namespace {

TEST(PlacementPolicy, NamesAreReadBack) {
  for (size_t i = 0; i < kPlacementPolicies; ++i) {
    const auto policy = static_cast<PlacementPolicy>(i);
    EXPECT_EQ(ParsePlacementPolicy(PlacementPolicyName(policy)), policy);
  }
  for (size_t i = 0; i < kAdmissionPolicies; ++i) {
    const auto policy = static_cast<AdmissionPolicy>(i);
    EXPECT_EQ(ParseAdmissionPolicy(AdmissionPolicyName(policy)), policy);
  }
  EXPECT_EQ(ParsePlacementPolicy("best"), std::nullopt);
  EXPECT_EQ(ParseFairnessPolicy("d2lpm"), FairnessPolicy::kD2lpm);
}

std::vector<PolicySeat> Loads(std::vector<uint64_t> loads) {
  std::vector<PolicySeat> out;
  for (const uint64_t l : loads) out.push_back({.name = out.size() + 1, .load = l});
  return out;
}

size_t First(PlacementPolicy policy, const std::vector<PolicySeat>& seats, uint32_t prompt_blocks = 10) {
  PolicyState state(1);
  return *ChooseByPolicy(policy, state, seats, Loads({0}), prompt_blocks).first;
}

TEST(PlacementPolicy, PrefixOnlyFollowsThePrefixIntoTheLongestQueue) {
  auto seats = Loads({0, 1000, 3});
  seats[1].held_blocks = 1;
  EXPECT_EQ(First(PlacementPolicy::kPrefixOnly, seats), 1u);
  EXPECT_EQ(First(PlacementPolicy::kLeastLoaded, seats), 0u);
}

TEST(PlacementPolicy, CacheAwareBalancesByQueueOnlyWhereBothLimitsArePassed) {
  auto seats = Loads({0, 64, 3});
  seats[1].held_blocks = 9;
  EXPECT_EQ(First(PlacementPolicy::kCacheAware, seats), 1u) << "64 more are not more than 64";
  seats[1].load = 65;
  EXPECT_EQ(First(PlacementPolicy::kCacheAware, seats), 0u);
  seats[0].load = 200;
  seats[2].load = 200;
  seats[1].load = 280;
  EXPECT_EQ(First(PlacementPolicy::kCacheAware, seats), 1u) << "80 more, but not 1.5 times";
}

TEST(PlacementPolicy, CacheAwareSendsWhatMatchesLittleToTheEmptiestCache) {
  auto seats = Loads({5, 5, 5});
  seats[0].held_blocks = 2;
  seats[0].cached_blocks = 100;
  seats[1].cached_blocks = 50;
  seats[2].cached_blocks = 70;
  EXPECT_EQ(First(PlacementPolicy::kCacheAware, seats, 10), 1u);
  EXPECT_EQ(First(PlacementPolicy::kCacheAware, seats, 6), 0u) << "2 of 6 are a third";
}

TEST(PlacementPolicy, DynamoWeighsCachedBlocksAgainstQueuedAndActiveOnes) {
  auto seats = Loads({0, 0, 0});
  seats[0].near_blocks = seats[0].held_blocks = 8;
  seats[0].queued_blocks = 7;
  EXPECT_EQ(First(PlacementPolicy::kDynamo, seats), 0u) << "9 blocks to compute against 10";
  seats[0].active_blocks = 2;
  EXPECT_EQ(First(PlacementPolicy::kDynamo, seats), 1u);
  seats[2].held_blocks = 8;  // on disk
  EXPECT_EQ(First(PlacementPolicy::kDynamo, seats), 2u);
}

TEST(PlacementPolicy, PowerOfTwoTakesTheLessLoadedOfTwoDifferentOnes) {
  PolicyState state(3);
  const auto seats = Loads({9, 1});
  for (int i = 0; i < 50; ++i)
    EXPECT_EQ(ChooseByPolicy(PlacementPolicy::kPowerOfTwo, state, seats, seats, 1).first, 1u);
}

// ---- through the core

class PolicyCore : public testing::Test {
 protected:
  void Start(PlacementPolicy policy, bool aggregated = false, uint64_t seed = 1) {
    SchedulerOptions options;
    options.placement = policy;
    options.seed = seed;
    core_.emplace(options);
    for (int i = 0; i < 4; ++i) {
      if (aggregated) {
        Report(TestReport("w" + std::to_string(i), Role::kBoth));
        continue;
      }
      Report(TestReport("p" + std::to_string(i), Role::kPrefill));
      Report(TestReport("d" + std::to_string(i), Role::kDecode));
    }
  }
  void Report(WorkerReport r) { ASSERT_TRUE(core_->Report(std::move(r), kStart).status.ok()); }
  Placement Place(int i, uint32_t tokens = 640, std::string_view chain = "x") {
    const auto result = core_->Place(TestRequest("r" + std::to_string(i), tokens, chain), kStart);
    EXPECT_TRUE(result.placement.has_value()) << result.status;
    return result.placement.value_or(Placement{});
  }
  std::vector<std::string> Prefills(int n) {
    std::vector<std::string> out;
    for (int i = 0; i < n; ++i) {
      const Placement p = Place(i);
      out.push_back(p.prefill ? p.prefill->worker_id : p.decode.worker_id);
    }
    return out;
  }
  std::optional<SchedulerCore> core_;
};

TEST_F(PolicyCore, EveryPolicyServesEveryKindOfCluster) {
  for (size_t i = 0; i < kPlacementPolicies; ++i) {
    const auto policy = static_cast<PlacementPolicy>(i);
    SCOPED_TRACE(PlacementPolicyName(policy));
    Start(policy);
    for (int k = 0; k < 20; ++k) {
      const Placement p = Place(k);
      EXPECT_EQ(p.decode.worker_id[0], 'd');
      ASSERT_TRUE(p.prefill.has_value());
      EXPECT_EQ(p.prefill->worker_id[0], 'p');
      EXPECT_GT(p.ttft_seconds, 0);
    }
    Start(policy, /*aggregated=*/true);
    for (int k = 0; k < 20; ++k) EXPECT_FALSE(Place(k).prefill.has_value());
    // Full, draining and absent workers are treated alike by all.
    EXPECT_EQ(core_->Place(TestRequest("long", 60'000), kStart).status.ok(), true);
    SchedulerOptions options;
    options.placement = policy;
    core_.emplace(options);
    EXPECT_EQ(core_->Place(TestRequest("r", 64), kStart).status.code(), absl::StatusCode::kUnavailable);
    auto small = TestReport("d", Role::kDecode);
    small.load.slots_total = small.load.slots_free = 4;
    Report(small);
    EXPECT_EQ(core_->Place(TestRequest("r", 640), kStart).status.code(), absl::StatusCode::kInvalidArgument);
  }
}

TEST_F(PolicyCore, RoundRobinTakesTurns) {
  Start(PlacementPolicy::kRoundRobin);
  EXPECT_EQ(Prefills(5), (std::vector<std::string>{"p0", "p1", "p2", "p3", "p0"}));
}

TEST_F(PolicyCore, EqualSeedsDrawAlikeAndAQuestionUsesNothingUp) {
  Start(PlacementPolicy::kRandom, false, 7);
  const auto first = Prefills(30);
  Start(PlacementPolicy::kRandom, false, 7);
  core_->Explain(TestRequest("q", 640), kStart);
  EXPECT_EQ(Prefills(30), first);
  Start(PlacementPolicy::kRandom, false, 8);
  EXPECT_NE(Prefills(30), first);
  EXPECT_EQ(std::set<std::string>(first.begin(), first.end()).size(), 4u);
}

TEST_F(PolicyCore, LeastLoadedAndPowerOfTwoSpreadABurst) {
  for (const auto policy : {PlacementPolicy::kLeastLoaded, PlacementPolicy::kPowerOfTwo}) {
    Start(policy);
    std::map<std::string, int> count;
    for (const auto& id : Prefills(80)) ++count[id];
    for (const auto& [id, n] : count) EXPECT_NEAR(n, 20, 6) << PlacementPolicyName(policy) << " " << id;
  }
}

TEST_F(PolicyCore, PrefixOnlySendsAllThatShareABlockToOneWorker) {
  Start(PlacementPolicy::kPrefixOnly);
  auto p2 = TestReport("p2", Role::kPrefill, 2);
  Report(Holding(p2, "x", 1));
  for (const auto& id : Prefills(30)) EXPECT_EQ(id, "p2");
}

TEST_F(PolicyCore, MooncakeFetchesOnlyPastItsThreshold) {
  for (const uint32_t here : {40u, 60u}) {
    Start(PlacementPolicy::kMooncake);
    auto p1 = TestReport("p1", Role::kPrefill, 2);
    p1.load.waiting = 20;
    p1.load.queued_prefill_tokens = 200'000;
    Report(Holding(p1, "x", 100));
    for (const char* id : {"p0", "p2", "p3"}) {
      auto p = TestReport(id, Role::kPrefill, 2);
      Report(Holding(p, "x", here));
    }
    const Placement p = Place(0, 100 * 32 + 5);
    EXPECT_EQ(p.prefill->worker_id, "p0");
    EXPECT_EQ(p.expected_cached_tokens, here == 40 ? 3200u : 60 * 32u)
        << "twice as long is past the threshold";
    EXPECT_EQ(p.holders.size(), here == 40 ? 1u : 0u);
  }
}

}  // namespace
}  // namespace tidepool
