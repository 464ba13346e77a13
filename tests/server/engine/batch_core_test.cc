#include "server/engine/batch_core.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/rng.h"

namespace tidepool {
namespace {

using testing::ElementsAre;

// "1:d1! 2:p7": sequence 1 decodes one token and draws, sequence 2 prefills seven and does not.
std::string Show(const std::vector<PlanItem>& plan) {
  std::string out;
  for (const PlanItem& i : plan) {
    absl::StrAppend(&out, out.empty() ? "" : " ", i.id, ":", i.decode ? "d" : "p", i.tokens,
                    i.last ? "!" : "");
  }
  return out;
}

const absl::Time kStart = absl::UnixEpoch() + absl::Hours(1);

// A BatchCore at a time that stands still unless moved.
class Core : public BatchCore {
 public:
  using BatchCore::BatchCore;
  void Add(uint64_t id, uint32_t context, uint32_t pending, bool prefilled, int32_t priority,
           bool batch_class = false, std::string_view tenant = "t") {
    BatchCore::Add({.id = id,
                    .context = context,
                    .pending = pending,
                    .prefilled = prefilled,
                    .tenant = tenant,
                    .priority = priority,
                    .batch_class = batch_class},
                   now);
  }
  const std::vector<PlanItem>& Step() { return BatchCore::Step(now); }
  absl::Time now = kStart;
};

// Runs a step, and lets every sequence that drew a token go on.
std::string StepAndContinue(Core& core) {
  const std::vector<PlanItem> plan = core.Step();
  for (const PlanItem& i : plan) {
    if (i.last) core.Continue(i.id);
  }
  return Show(plan);
}

TEST(BatchCore, NothingToDoIsAnEmptyPlan) {
  Core core({.max_batch = 4, .max_step_tokens = 8});
  EXPECT_EQ(Show(core.Step()), "");
}

TEST(BatchCore, PromptIsPrefilledInChunksAndThenDecoded) {
  Core core({.max_batch = 4, .max_step_tokens = 8});
  core.Add(1, 0, 20, false, 0);
  EXPECT_EQ(core.queued_prefill_tokens(), 20u);
  EXPECT_EQ(core.waiting(), 1u);
  EXPECT_EQ(StepAndContinue(core), "1:p8");
  EXPECT_EQ(core.running(), 1u);
  EXPECT_EQ(core.queued_prefill_tokens(), 12u);
  EXPECT_EQ(StepAndContinue(core), "1:p8");
  EXPECT_EQ(StepAndContinue(core), "1:p4!");
  EXPECT_EQ(StepAndContinue(core), "1:d1!");
  EXPECT_EQ(core.running_context_tokens(), 21u);
  core.Remove(1);
  EXPECT_EQ(Show(core.Step()), "");
  EXPECT_EQ(core.running(), 0u);
  EXPECT_EQ(core.running_context_tokens(), 0u);
}

TEST(BatchCore, DecodesGoFirstAndPrefillsTakeWhatIsLeft) {
  Core core({.max_batch = 4, .max_step_tokens = 8});
  core.Add(1, 0, 3, false, 0);
  core.Add(2, 0, 4, false, 0);
  EXPECT_EQ(StepAndContinue(core), "1:p3! 2:p4!");
  core.Add(3, 0, 10, false, 0);
  EXPECT_EQ(StepAndContinue(core), "1:d1! 2:d1! 3:p6");
  EXPECT_EQ(StepAndContinue(core), "1:d1! 2:d1! 3:p4!");
  EXPECT_EQ(StepAndContinue(core), "1:d1! 2:d1! 3:d1!");
}

TEST(BatchCore, BatchLimitMakesLaterOnesWait) {
  Core core({.max_batch = 2, .max_step_tokens = 8});
  core.Add(1, 0, 2, false, 0);
  core.Add(2, 0, 2, false, 0);
  core.Add(3, 0, 2, false, 0);
  EXPECT_EQ(StepAndContinue(core), "1:p2! 2:p2!");
  EXPECT_EQ(core.waiting(), 1u);
  EXPECT_EQ(StepAndContinue(core), "1:d1! 2:d1!");
  core.Remove(1);
  EXPECT_EQ(StepAndContinue(core), "2:d1! 3:p2!");
}

TEST(BatchCore, HigherPriorityOvertakesThenArrival) {
  Core core({.max_batch = 4, .max_step_tokens = 4});
  core.Add(1, 0, 6, false, 0);
  core.Add(2, 0, 6, false, 0);
  core.Add(3, 0, 6, false, 5);
  EXPECT_EQ(StepAndContinue(core), "3:p4");
  EXPECT_EQ(StepAndContinue(core), "3:p2! 1:p2");
  EXPECT_EQ(StepAndContinue(core), "3:d1! 1:p3");
  EXPECT_EQ(StepAndContinue(core), "3:d1! 1:p1! 2:p2");
}

// A place is never taken back: the one that has begun goes on though better ones cannot start.
TEST(BatchCore, RunningPrefillGoesOnWhileABetterOneWaitsForAPlace) {
  Core core({.max_batch = 1, .max_step_tokens = 4});
  core.Add(1, 0, 8, false, 0);
  EXPECT_EQ(StepAndContinue(core), "1:p4");
  core.Add(2, 0, 4, false, 9);
  EXPECT_EQ(StepAndContinue(core), "1:p4!");
  core.Remove(1);
  EXPECT_EQ(StepAndContinue(core), "2:p4!");
}

TEST(BatchCore, HandoffsJoinAsDecodes) {
  Core core({.max_batch = 2, .max_step_tokens = 4});
  core.Add(1, 100, 1, true, 0);
  EXPECT_EQ(core.queued_prefill_tokens(), 0u);
  core.Add(2, 32, 10, false, 0);  // a prefix of 32 is there
  EXPECT_EQ(StepAndContinue(core), "1:d1! 2:p3");
  EXPECT_EQ(core.running_context_tokens(), 101u + 35u);
  EXPECT_EQ(StepAndContinue(core), "1:d1! 2:p3");
}

TEST(BatchCore, RemovedSequencesLeaveNoTrace) {
  Core core({.max_batch = 2, .max_step_tokens = 4});
  core.Add(1, 0, 8, false, 0);
  core.Add(2, 0, 8, false, 0);
  core.Step();
  core.Remove(1);
  core.Remove(1);
  core.Remove(99);
  EXPECT_EQ(core.queued_prefill_tokens(), 8u);
  EXPECT_EQ(StepAndContinue(core), "2:p4");
  core.Remove(2);
  EXPECT_EQ(core.queued_prefill_tokens(), 0u);
  EXPECT_EQ(core.running() + core.waiting(), 0u);
}

TEST(BatchCore, BatchClassGetsWhatOnlineOnesLeaveOfAStep) {
  Core core({.max_batch = 4, .max_step_tokens = 8});
  core.Add(1, 0, 3, false, 9, /*batch_class=*/true);  // no priority of its class outdoes an online one
  core.Add(2, 0, 10, false, -9);
  EXPECT_EQ(StepAndContinue(core), "2:p8");
  EXPECT_EQ(StepAndContinue(core), "2:p2! 1:p3!");
  EXPECT_EQ(StepAndContinue(core), "2:d1! 1:d1!");
  core.Add(3, 0, 20, false, 0);
  EXPECT_EQ(StepAndContinue(core), "2:d1! 3:p7");
  EXPECT_EQ(core.waiting(), 0u) << "it keeps its place while nobody else wants it";
}

TEST(BatchCore, OnlineSequenceTakesThePlaceOfTheLatestOfTheBatchClass) {
  Core core({.max_batch = 2, .max_step_tokens = 8});
  core.Add(1, 0, 2, false, 0, true);
  core.Add(2, 0, 2, false, 0, true);
  EXPECT_EQ(StepAndContinue(core), "1:p2! 2:p2!");
  core.Add(3, 0, 2, false, 0);
  EXPECT_EQ(StepAndContinue(core), "3:p2! 1:d1!");
  EXPECT_EQ(core.waiting(), 1u);
  EXPECT_EQ(core.waiting_batch_class(), 1u);
  EXPECT_EQ(core.running_context_tokens(), 2u + 3u);
  core.Add(4, 0, 2, false, 0);
  EXPECT_EQ(StepAndContinue(core), "3:d1! 4:p2!");
  EXPECT_EQ(core.waiting_batch_class(), 2u);
  // There is no place for a third, and an online one loses none.
  core.Add(5, 0, 2, false, 9);
  EXPECT_EQ(StepAndContinue(core), "3:d1! 4:d1!");
  core.Remove(3);
  core.Remove(5);
  EXPECT_EQ(StepAndContinue(core), "4:d1! 1:d1!") << "it goes on where it was";
  core.Remove(4);
  EXPECT_EQ(StepAndContinue(core), "1:d1! 2:d1!");
  EXPECT_EQ(core.waiting_batch_class(), 0u);
}

TEST(BatchCore, HalfPrefilledBatchSequenceYieldsBeforeOneThatAnswers) {
  Core core({.max_batch = 2, .max_step_tokens = 4});
  core.Add(1, 0, 2, false, 0, true);
  core.Add(2, 0, 9, false, 0, true);
  EXPECT_EQ(StepAndContinue(core), "1:p2! 2:p2");
  core.Add(3, 0, 2, false, 0);
  EXPECT_EQ(StepAndContinue(core), "3:p2! 1:d1!");
  core.Remove(3);
  EXPECT_EQ(StepAndContinue(core), "1:d1! 2:p3") << "from its third token on";
}

TEST(BatchCore, SequenceWhoseTokenIsBeingDrawnKeepsItsPlace) {
  Core core({.max_batch = 1, .max_step_tokens = 4});
  core.Add(1, 0, 2, false, 0, true);
  EXPECT_EQ(Show(core.Step()), "1:p2!");
  core.Continue(1);
  EXPECT_EQ(Show(core.Step()), "1:d1!");
  core.Add(2, 0, 2, false, 0);
  EXPECT_EQ(Show(core.Step()), "") << "its token is not there yet";
  core.Continue(1);
  EXPECT_EQ(Show(core.Step()), "2:p2!");
}

TEST(BatchCore, HigherPriorityTakesALowerOnesPlaceOnceWhereItMay) {
  Core core({.max_batch = 2, .max_step_tokens = 8, .yield_places = true});
  core.Add(1, 0, 2, false, 3);
  core.Add(2, 0, 2, false, 0);
  EXPECT_EQ(StepAndContinue(core), "1:p2! 2:p2!");
  core.Add(3, 0, 2, false, 0);
  EXPECT_EQ(StepAndContinue(core), "1:d1! 2:d1!") << "not an equal's";
  core.Add(4, 0, 2, false, 1);
  EXPECT_EQ(StepAndContinue(core), "1:d1! 4:p2!");
  EXPECT_EQ(core.waiting(), 2u);
  core.Add(5, 0, 2, false, 2);
  EXPECT_EQ(StepAndContinue(core), "1:d1! 5:p2!") << "4 gives way in its turn";
  core.Remove(1);
  EXPECT_EQ(StepAndContinue(core), "5:d1! 4:d1!");
  core.Add(6, 0, 2, false, 9);
  EXPECT_EQ(StepAndContinue(core), "4:d1! 6:p2!") << "who has lost its place once keeps it";
  core.Remove(6);
  core.Remove(4);
  EXPECT_EQ(StepAndContinue(core), "5:d1! 2:d1!") << "it goes on where it was, before what waits";
}

TEST(BatchCore, WhoLostItsPlaceIsNotWithoutOneForEver) {
  Core core({.max_batch = 1, .max_step_tokens = 8, .yield_places = true});
  core.Add(1, 0, 9, false, 0);
  EXPECT_EQ(StepAndContinue(core), "1:p8");
  for (uint64_t id = 2; id <= 5; ++id) core.Add(id, 0, 2, false, 5);
  EXPECT_EQ(StepAndContinue(core), "2:p2!");
  core.Remove(2);
  EXPECT_EQ(StepAndContinue(core), "3:p2!");
  core.now += absl::Seconds(31);
  EXPECT_EQ(StepAndContinue(core), "3:d1!");
  core.Remove(3);
  EXPECT_EQ(StepAndContinue(core), "1:p1!");
}

// Against the rules, over random lives: budget and batch are kept, decodes are never left out, every
// token is computed once, and nobody starves.
TEST(BatchCore, RandomLivesKeepTheRules) {
  for (uint64_t seed = 1; seed <= 50; ++seed) {
    Rng rng(seed);
    const uint32_t max_batch = 1 + static_cast<uint32_t>(rng.Below(6));
    const uint32_t budget = max_batch + static_cast<uint32_t>(rng.Below(20));
    const std::string_view tenants[] = {"a", "b", "c"};
    Core core({.max_batch = max_batch,
               .max_step_tokens = budget,
               .order = static_cast<FairQueue::Order>(seed % kQueueOrders),
               .yield_places = seed % 2 == 0});
    struct Life {
      uint32_t prompt_left, outputs_left;
      bool decoding;
      bool batch_class;
    };
    std::map<uint64_t, Life> lives;
    uint64_t next = 1;
    int steps = 0;
    while (next <= 40 || !lives.empty()) {
      if (next <= 40 && rng.Chance(0.4)) {
        const bool handoff = rng.Chance(0.2);
        const uint32_t prompt = handoff ? 1 : 1 + static_cast<uint32_t>(rng.Below(60));
        const bool batch_class = rng.Chance(0.4);
        lives[next] = {prompt, 1 + static_cast<uint32_t>(rng.Below(10)), handoff, batch_class};
        core.Add(next, 0, prompt, handoff, static_cast<int32_t>(rng.Below(3)), batch_class,
                 tenants[rng.Below(3)]);
        ++next;
      }
      core.now += absl::Seconds(1);
      const std::vector<PlanItem> plan = core.Step();
      uint32_t tokens = 0, online = 0, batch_class = 0;
      for (const auto& [id, life] : lives) (life.batch_class ? batch_class : online) += 1;
      ASSERT_LE(plan.size(), max_batch);
      // An online sequence is left out only where online ones fill the batch or the budget.
      uint32_t planned_online = 0, planned_tokens = 0;
      for (const PlanItem& i : plan) {
        if (!lives.at(i.id).batch_class) ++planned_online;
        planned_tokens += i.tokens;
      }
      ASSERT_TRUE(planned_online == online || planned_online == max_batch || planned_tokens == budget)
          << seed;
      for (const PlanItem& i : plan) {
        Life& life = lives.at(i.id);
        tokens += i.tokens;
        ASSERT_EQ(i.decode, life.decoding);
        ASSERT_LE(i.tokens, life.prompt_left);
        life.prompt_left -= i.tokens;
        ASSERT_EQ(i.last, life.prompt_left == 0);
        if (!i.last) continue;
        if (--life.outputs_left == 0) {
          core.Remove(i.id);
          lives.erase(i.id);
        } else {
          life.prompt_left = 1;
          life.decoding = true;
          core.Continue(i.id);
        }
      }
      ASSERT_LE(tokens, budget);
      ASSERT_LE(core.running(), max_batch);
      ASSERT_EQ(core.running() + core.waiting(), lives.size());
      ASSERT_LE(core.waiting_batch_class(), batch_class);
      if (!lives.empty() && plan.empty()) {
        FAIL() << "seed " << seed << ": an empty plan with " << lives.size() << " sequences";
      }
      ASSERT_LT(++steps, 10000) << "seed " << seed;
    }
    EXPECT_EQ(core.queued_prefill_tokens(), 0u);
    EXPECT_EQ(core.running_context_tokens(), 0u);
  }
}

// ---- between tenants

// The ids in the order in which they begin, one at a time; each draws `outputs` tokens and ends.
std::vector<uint64_t> BeginOrder(Core& core, int outputs = 1) {
  std::vector<uint64_t> order;
  for (int left = 0;;) {
    const std::vector<PlanItem> plan = core.Step();
    if (plan.empty()) return order;
    EXPECT_EQ(plan.size(), 1u);
    const PlanItem item = plan[0];
    if (order.empty() || order.back() != item.id) {
      order.push_back(item.id);
      left = outputs;
    }
    if (!item.last) continue;
    if (--left > 0) {
      core.Continue(item.id);
    } else {
      core.Remove(item.id);
    }
  }
}

TEST(BatchCoreTenants, APreemptedSequenceBeginsBeforeItsEqualsAndIsNotChargedAgain) {
  Core core({.max_batch = 1, .max_step_tokens = 100});
  core.Add(1, 0, 50, false, 0, false, "a");
  EXPECT_EQ(StepAndContinue(core), "1:p50!");
  core.Add(2, 0, 10, false, 0, false, "a");
  core.Add(3, 0, 55, false, 0, false, "c");
  core.Add(4, 0, 55, false, 0, false, "c");
  core.Add(5, 0, 10, false, 1, false, "c");
  core.Remove(1);
  core.BatchCore::Add({.id = 6, .context = 40, .pending = 11, .tenant = "a", .resumed = true}, core.now);
  // c came when a had been given 52, and takes 10 more; had a been charged again, it would wait behind c.
  EXPECT_THAT(BeginOrder(core), ElementsAre(5, 6, 2, 3, 4)) << "a higher priority goes before it";
}

// One at a time, ten of tenant a and then one of tenant b.
std::vector<uint64_t> TenAndThenOne(FairQueue::Order order) {
  Core core({.max_batch = 1, .max_step_tokens = 100, .order = order});
  for (uint64_t id = 1; id <= 10; ++id) core.Add(id, 0, 100, false, 0, false, "a");
  core.Step();
  core.Add(11, 0, 100, false, 0, false, "b");
  core.Remove(1);
  return BeginOrder(core);
}

TEST(BatchCoreTenants, TenantWithOneRequestDoesNotQueueBehindAnotherTenantsTen) {
  EXPECT_THAT(TenAndThenOne(FairQueue::Order::kVtc), ElementsAre(11, 2, 3, 4, 5, 6, 7, 8, 9, 10));
  EXPECT_THAT(TenAndThenOne(FairQueue::Order::kFcfs), ElementsAre(2, 3, 4, 5, 6, 7, 8, 9, 10, 11));
}

TEST(BatchCoreTenants, ArrivalDecidesWhereThereIsOneTenant) {
  for (const auto order : {FairQueue::Order::kVtc, FairQueue::Order::kFcfs}) {
    Core core({.max_batch = 1, .max_step_tokens = 8, .order = order});
    for (uint64_t id = 1; id <= 6; ++id) core.Add(id, 32 * (id % 3), static_cast<uint32_t>(7 * id), false, 0);
    EXPECT_THAT(BeginOrder(core, 3), ElementsAre(1, 2, 3, 4, 5, 6));
  }
}

TEST(BatchCoreTenants, LongAnswersCountAgainstTheirTenant) {
  Core core({.max_batch = 1, .max_step_tokens = 100});
  core.Add(1, 0, 10, false, 0, false, "a");
  core.Add(2, 0, 25, false, 0, false, "b");
  core.Add(3, 0, 10, false, 0, false, "a");
  core.Add(4, 0, 25, false, 0, false, "b");
  // a: 10 of its prompt and 2 for each of ten tokens; b: 25.
  for (int i = 0; i < 10; ++i) {
    EXPECT_EQ(Show(core.Step()), i == 0 ? "1:p10!" : "1:d1!");
    core.Continue(1);
  }
  core.Remove(1);
  core.Step();
  core.Remove(2);
  EXPECT_EQ(Show(core.Step()), "4:p25!") << "a was given 30, b 25";
}

TEST(BatchCoreTenants, WhatDriversDrawInOneGoIsCharged) {
  Core core({.max_batch = 1, .max_step_tokens = 100});
  core.Add(1, 0, 10, false, 0, false, "a");
  core.Add(2, 0, 25, false, 0, false, "b");
  core.Add(3, 0, 10, false, 0, false, "a");
  core.Add(4, 0, 25, false, 0, false, "b");
  core.Step();
  core.CountOutput(1, 10);
  core.Remove(1);
  core.Step();
  core.Remove(2);
  EXPECT_EQ(Show(core.Step()), "4:p25!");
}

TEST(BatchCoreTenants, CancelledPromptIsChargedForWhatWasComputedOnly) {
  for (const bool cancelled : {true, false}) {
    Core core({.max_batch = 1, .max_step_tokens = 10});
    core.Add(1, 0, 1000, false, 0, false, "a");
    core.Add(2, 0, 20, false, 0, false, "b");
    core.Add(3, 0, 20, false, 0, false, "a");
    core.Add(4, 0, 20, false, 0, false, "b");
    for (int i = 0; i < (cancelled ? 1 : 100); ++i) core.Step();
    core.Remove(1);  // a was given 10, or 1000
    EXPECT_EQ(Show(core.Step()), "2:p10");
    core.Step();
    core.Remove(2);
    EXPECT_EQ(Show(core.Step()), cancelled ? "3:p10" : "4:p10");
  }
}

TEST(BatchCoreTenants, HandoffIsNotChargedForAPromptThatOthersComputed) {
  Core core({.max_batch = 1, .max_step_tokens = 100});
  core.Add(1, 5000, 1, true, 0, false, "a");
  core.Add(2, 0, 20, false, 0, false, "b");
  core.Add(3, 5000, 1, true, 0, false, "a");
  core.Add(4, 0, 20, false, 0, false, "b");
  EXPECT_THAT(BeginOrder(core), ElementsAre(1, 2, 3, 4));
}

TEST(BatchCoreTenants, LongestPrefixGoesFirstUnderDlpmUntilTheShareIsUsedUp) {
  Core core({.max_batch = 1, .max_step_tokens = 50000, .order = FairQueue::Order::kDlpm});
  core.Add(1, 0, 100, false, 0, false, "b");
  for (uint64_t id = 2; id <= 5; ++id) core.Add(id, 64, 20000, false, 0, false, "a");
  // Two take more than the quantum of 32768.
  EXPECT_THAT(BeginOrder(core), ElementsAre(2, 3, 1, 4, 5));
}

TEST(BatchCoreTenants, TenantAtItsCapLeavesItsPlacesToOthers) {
  Core core({.max_batch = 4, .max_step_tokens = 100, .max_running_per_tenant = 2});
  for (uint64_t id = 1; id <= 4; ++id) core.Add(id, 0, 5, false, 0, false, "a");
  core.Add(5, 0, 5, false, 0, false, "b");
  EXPECT_EQ(StepAndContinue(core), "5:p5! 1:p5! 2:p5!");
  EXPECT_EQ(core.waiting(), 2u);
  EXPECT_EQ(StepAndContinue(core), "5:d1! 1:d1! 2:d1!") << "there is room, and it is not a's";
  core.Remove(1);
  EXPECT_EQ(StepAndContinue(core), "5:d1! 2:d1! 3:p5!");
}

TEST(BatchCoreTenants, BatchSequencesOfATenantDoNotUseUpItsCapForOnlineOnes) {
  Core core({.max_batch = 1, .max_step_tokens = 100, .max_running_per_tenant = 1});
  core.Add(1, 0, 5, false, 0, true, "a");
  EXPECT_EQ(StepAndContinue(core), "1:p5!");
  core.Add(2, 0, 5, false, 0, false, "a");
  EXPECT_EQ(StepAndContinue(core), "2:p5!");
}

TEST(BatchCoreTenants, LowPriorityIsHeldUpForTheAgingTimeOnly) {
  Core core({.max_batch = 1, .max_step_tokens = 10, .aging = absl::Seconds(30)});
  core.Add(1, 0, 10, false, 0);
  core.now += absl::Seconds(29);
  core.Add(2, 0, 10, false, 5);
  core.Add(3, 0, 10, false, 5);
  EXPECT_EQ(Show(core.Step()), "2:p10!");
  core.Remove(2);
  core.now += absl::Seconds(1);
  EXPECT_EQ(Show(core.Step()), "1:p10!");
}

TEST(BatchCoreTenants, LongQueueOfOneTenantDoesNotPassAnothersNewRequestByAging) {
  Core core({.max_batch = 1, .max_step_tokens = 10, .aging = absl::Seconds(30)});
  for (uint64_t id = 1; id <= 5; ++id) core.Add(id, 0, 10, false, 0, false, "a");
  core.Step();
  core.now += absl::Minutes(10);
  core.Add(6, 0, 10, false, 0, false, "b");
  core.Remove(1);
  EXPECT_EQ(Show(core.Step()), "6:p10!");
}

TEST(BatchCoreTenants, TimeTakesNobodyOutOfTheBatchClass) {
  Core core({.max_batch = 1, .max_step_tokens = 10});
  core.Add(1, 0, 10, false, 0, true);
  core.now += absl::Hours(2);
  core.Add(2, 0, 10, false, -9);
  EXPECT_EQ(Show(core.Step()), "2:p10!");
}

TEST(BatchCoreTenants, WaitingOneOfHigherPriorityGoesBeforeAPromptThatHasBegun) {
  Core core({.max_batch = 3, .max_step_tokens = 4});
  core.Add(1, 0, 8, false, 0, false, "a");
  EXPECT_EQ(Show(core.Step()), "1:p4");
  core.Add(2, 0, 3, false, 0, false, "b");
  EXPECT_EQ(Show(core.Step()), "1:p4!") << "of equal priority it waits";
  core.Continue(1);
  core.Add(3, 0, 6, false, 0, false, "c");
  core.Add(4, 0, 2, false, 1, false, "a");
  EXPECT_EQ(Show(core.Step()), "1:d1! 4:p2! 2:p1");
}

TEST(BatchCoreTenants, BackloggedTenantsAreGivenTheSameUnderVtc) {
  Core core({.max_batch = 4, .max_step_tokens = 64});
  Rng rng(5);
  std::map<uint64_t, std::pair<std::string, int>> lives;  // tenant, tokens to come
  std::map<std::string, double> given;
  std::map<std::string, int> waiting;
  uint64_t next = 1;
  for (int step = 0; step < 20000; ++step) {
    // c's requests are ten times as long as a's, and b has ten times as many waiting.
    for (const auto& [tenant, depth] : {std::pair("a", 4), {"b", 40}, {"c", 4}}) {
      for (; waiting[tenant] < depth; ++waiting[tenant]) {
        const uint32_t prompt = (tenant[0] == 'c' ? 200 : 20) + static_cast<uint32_t>(rng.Below(10));
        lives[next] = {tenant, 1 + static_cast<int>(rng.Below(20))};
        core.Add(next++, 0, prompt, false, 0, false, tenant);
      }
    }
    const std::vector<PlanItem> plan = core.Step();
    for (const PlanItem& i : plan) {
      auto& [tenant, left] = lives.at(i.id);
      given[tenant] += i.decode ? 2 : i.tokens;
      if (!i.last) continue;
      if (--left > 0) {
        core.Continue(i.id);
        continue;
      }
      --waiting[tenant];
      core.Remove(i.id);
      lives.erase(i.id);
    }
  }
  const auto [least, most] = std::minmax({given["a"], given["b"], given["c"]});
  EXPECT_GT(least, 100000);
  // Bounded by what a batch of the largest requests is charged, however long it lasts.
  EXPECT_LT(most - least, 2 * 4 * (210 + 2 * 20));
}

TEST(BatchCoreTenants, EqualCallsGiveEqualPlansInEveryOrder) {
  for (size_t order = 0; order < kQueueOrders; ++order) {
    const auto run = [&] {
      Core core({.max_batch = 3, .max_step_tokens = 20, .order = static_cast<FairQueue::Order>(order)});
      Rng rng(order);
      std::string all;
      for (uint64_t id = 1; id <= 300; ++id) {
        const uint32_t context = 16 * static_cast<uint32_t>(rng.Below(4));
        core.Add(id, context, 1 + static_cast<uint32_t>(rng.Below(40)), false,
                 static_cast<int32_t>(rng.Below(2)), rng.Chance(0.2), absl::StrCat("t", rng.Below(5)));
        core.now += absl::Seconds(3);
        const std::vector<PlanItem> plan = core.Step();
        absl::StrAppend(&all, Show(plan), "\n");
        for (const PlanItem& i : plan) {
          if (!i.last) continue;
          if (rng.Chance(0.7)) {
            core.Continue(i.id);
          } else {
            core.Remove(i.id);
          }
        }
      }
      return all;
    };
    EXPECT_EQ(run(), run()) << QueueOrderName(static_cast<FairQueue::Order>(order));
  }
}

}  // namespace
}  // namespace tidepool
