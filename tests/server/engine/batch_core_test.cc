#include "server/engine/batch_core.h"

#include <gtest/gtest.h>

#include <map>
#include <string>

#include "absl/strings/str_cat.h"
#include "base/rng.h"

namespace tidepool {
namespace {

// "1:d1! 2:p7": sequence 1 decodes one token and draws, sequence 2 prefills seven and does not.
std::string Show(const std::vector<PlanItem>& plan) {
  std::string out;
  for (const PlanItem& i : plan) {
    absl::StrAppend(&out, out.empty() ? "" : " ", i.id, ":", i.decode ? "d" : "p", i.tokens,
                    i.last ? "!" : "");
  }
  return out;
}

// Runs a step, and lets every sequence that drew a token go on.
std::string StepAndContinue(BatchCore& core) {
  const std::vector<PlanItem> plan = core.Step();
  for (const PlanItem& i : plan) {
    if (i.last) core.Continue(i.id);
  }
  return Show(plan);
}

TEST(BatchCore, NothingToDoIsAnEmptyPlan) {
  BatchCore core({.max_batch = 4, .max_step_tokens = 8});
  EXPECT_EQ(Show(core.Step()), "");
}

TEST(BatchCore, PromptIsPrefilledInChunksAndThenDecoded) {
  BatchCore core({.max_batch = 4, .max_step_tokens = 8});
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
  BatchCore core({.max_batch = 4, .max_step_tokens = 8});
  core.Add(1, 0, 3, false, 0);
  core.Add(2, 0, 4, false, 0);
  EXPECT_EQ(StepAndContinue(core), "1:p3! 2:p4!");
  core.Add(3, 0, 10, false, 0);
  EXPECT_EQ(StepAndContinue(core), "1:d1! 2:d1! 3:p6");
  EXPECT_EQ(StepAndContinue(core), "1:d1! 2:d1! 3:p4!");
  EXPECT_EQ(StepAndContinue(core), "1:d1! 2:d1! 3:d1!");
}

TEST(BatchCore, BatchLimitMakesLaterOnesWait) {
  BatchCore core({.max_batch = 2, .max_step_tokens = 8});
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
  BatchCore core({.max_batch = 4, .max_step_tokens = 4});
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
  BatchCore core({.max_batch = 1, .max_step_tokens = 4});
  core.Add(1, 0, 8, false, 0);
  EXPECT_EQ(StepAndContinue(core), "1:p4");
  core.Add(2, 0, 4, false, 9);
  EXPECT_EQ(StepAndContinue(core), "1:p4!");
  core.Remove(1);
  EXPECT_EQ(StepAndContinue(core), "2:p4!");
}

TEST(BatchCore, HandoffsJoinAsDecodes) {
  BatchCore core({.max_batch = 2, .max_step_tokens = 4});
  core.Add(1, 100, 1, true, 0);
  EXPECT_EQ(core.queued_prefill_tokens(), 0u);
  core.Add(2, 32, 10, false, 0);  // a prefix of 32 is there
  EXPECT_EQ(StepAndContinue(core), "1:d1! 2:p3");
  EXPECT_EQ(core.running_context_tokens(), 101u + 35u);
  EXPECT_EQ(StepAndContinue(core), "1:d1! 2:p3");
}

TEST(BatchCore, RemovedSequencesLeaveNoTrace) {
  BatchCore core({.max_batch = 2, .max_step_tokens = 4});
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
  BatchCore core({.max_batch = 4, .max_step_tokens = 8});
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
  BatchCore core({.max_batch = 2, .max_step_tokens = 8});
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
  BatchCore core({.max_batch = 2, .max_step_tokens = 4});
  core.Add(1, 0, 2, false, 0, true);
  core.Add(2, 0, 9, false, 0, true);
  EXPECT_EQ(StepAndContinue(core), "1:p2! 2:p2");
  core.Add(3, 0, 2, false, 0);
  EXPECT_EQ(StepAndContinue(core), "3:p2! 1:d1!");
  core.Remove(3);
  EXPECT_EQ(StepAndContinue(core), "1:d1! 2:p3") << "from its third token on";
}

TEST(BatchCore, SequenceWhoseTokenIsBeingDrawnKeepsItsPlace) {
  BatchCore core({.max_batch = 1, .max_step_tokens = 4});
  core.Add(1, 0, 2, false, 0, true);
  EXPECT_EQ(Show(core.Step()), "1:p2!");
  core.Continue(1);
  EXPECT_EQ(Show(core.Step()), "1:d1!");
  core.Add(2, 0, 2, false, 0);
  EXPECT_EQ(Show(core.Step()), "") << "its token is not there yet";
  core.Continue(1);
  EXPECT_EQ(Show(core.Step()), "2:p2!");
}

// Against the rules, over random lives: budget and batch are kept, decodes are never left out, every
// token is computed once, and nobody starves.
TEST(BatchCore, RandomLivesKeepTheRules) {
  for (uint64_t seed = 1; seed <= 50; ++seed) {
    Rng rng(seed);
    const uint32_t max_batch = 1 + static_cast<uint32_t>(rng.Below(6));
    const uint32_t budget = max_batch + static_cast<uint32_t>(rng.Below(20));
    BatchCore core({.max_batch = max_batch, .max_step_tokens = budget});
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
        core.Add(next, 0, prompt, handoff, static_cast<int32_t>(rng.Below(3)), batch_class);
        ++next;
      }
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

}  // namespace
}  // namespace tidepool
