// Sequences that give their blocks up and go on later, on engine_fixture.h's model: its tokens follow from
// the KV, so what is lost, doubled or stale on the way shows as another answer.
#include "server/engine/preemption.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <optional>

#include "tests/server/engine/engine_fixture.h"

namespace tidepool {
namespace {

using testing::HasSubstr;

// ---- the choice

constexpr PreemptionCost kCost{.sealed_tokens = 64,
                               .tail_tokens = 10,
                               .tail_bytes = 1 << 20,
                               .copy_bytes_per_second = 1e9,
                               .prefill_token_seconds = 1e-3};

TEST(ChoosePreemption, KeepsWhatWouldTakeLongerToCompute) {
  const PreemptionChoice choice = ChoosePreemption(PreemptionMode::kAuto, kCost);
  EXPECT_EQ(choice.how, Preemption::kSwap);
  EXPECT_TRUE(choice.save_tail);
  EXPECT_NEAR(choice.seconds, 2 * 1048576 / 1e9, 1e-9) << "out and in";
}

TEST(ChoosePreemption, TailIsComputedAgainWhereCopyingItTakesLonger) {
  PreemptionCost cost = kCost;
  cost.copy_bytes_per_second = 1e8;
  const PreemptionChoice choice = ChoosePreemption(PreemptionMode::kAuto, cost);
  EXPECT_EQ(choice.how, Preemption::kSwap) << "what is sealed stays for nothing";
  EXPECT_FALSE(choice.save_tail);
  EXPECT_NEAR(choice.seconds, 10e-3, 1e-9);
  EXPECT_TRUE(ChoosePreemption(PreemptionMode::kSwap, cost).save_tail) << "as it was told";
}

TEST(ChoosePreemption, NothingIsKeptWhereComputingItIsNoSlower) {
  PreemptionCost cost = kCost;
  cost.sealed_tokens = 0;
  cost.copy_bytes_per_second = 1e8;
  EXPECT_EQ(ChoosePreemption(PreemptionMode::kAuto, cost).how, Preemption::kRecompute);
  cost.tail_tokens = 0;
  EXPECT_EQ(ChoosePreemption(PreemptionMode::kAuto, cost).how, Preemption::kRecompute);
}

TEST(ChoosePreemption, WhatIsNotKnownIsTakenForDear) {
  PreemptionCost cost = kCost;
  cost.prefill_token_seconds = 0;
  EXPECT_TRUE(ChoosePreemption(PreemptionMode::kAuto, cost).save_tail);
}

TEST(ChoosePreemption, RecomputeKeepsNothing) {
  const PreemptionChoice choice = ChoosePreemption(PreemptionMode::kRecompute, kCost);
  EXPECT_EQ(choice.how, Preemption::kRecompute);
  EXPECT_FALSE(choice.save_tail);
  EXPECT_NEAR(choice.seconds, 74e-3, 1e-9);
}

// ---- in the engine

class PreemptionTest : public EngineTest {
 protected:
  void StartWith(const std::string& preemption, uint32_t slots = 128) {
    Start({.max_batch = 4, .max_step_tokens = 16, .max_waiting = 64, .preemption = preemption}, slots);
  }
  std::shared_ptr<RecordingSink> SubmitPreemptible(const std::string& id, std::vector<int32_t> tokens,
                                                   uint32_t max_tokens, int32_t priority = 0) {
    SequenceSpec spec;
    auto sink = MakeSpec(spec, id, std::move(tokens), max_tokens);
    spec.preemptible = true;
    spec.priority = priority;
    const absl::Status s = engine_->Submit(std::move(spec));
    EXPECT_TRUE(s.ok()) << s;
    return sink;
  }
  // Preempts it while it runs; what its sink was given.
  std::unique_ptr<PreemptedSequence> Preempt(RecordingSink& sink, const std::string& id) {
    EXPECT_TRUE(engine_->Preempt(id));
    controls_->Free();
    EXPECT_TRUE(sink.WaitPaused());
    auto preempted = sink.TakePreempted();
    EXPECT_NE(preempted, nullptr);
    return preempted;
  }
  // What a worker would give it: leases on what is there, `room` tokens in all. nullopt: there is no room.
  std::optional<Engine::ResumeWith> Gather(PreemptedSequence& preempted, size_t room = 0) {
    const std::vector<int32_t>& tokens = preempted.tokens();
    const std::vector<BlockKey> keys = BlockKeys(BlockKey{}, tokens, kBlock);
    Engine::ResumeWith with;
    with.blocks = pool_->LeasePrefix(std::span(keys).first(ReusableBlocks(tokens.size(), kBlock)));
    with.published_blocks = static_cast<uint32_t>(with.blocks.size());
    with.computed_tokens = with.published_blocks * kBlock;
    auto rest = pool_->Reserve((std::max(room, tokens.size()) + kBlock - 1) / kBlock - with.blocks.size());
    if (!rest.ok()) return std::nullopt;
    std::ranges::move(*rest, std::back_inserter(with.blocks));
    preempted.DropKept();
    const uint32_t sealed = preempted.computed() / kBlock;
    if (preempted.has_tail() && with.published_blocks == sealed) {
      preempted.RestoreTail(with.blocks[sealed].data());
      with.computed_tokens = preempted.computed();
    }
    return with;
  }
  // False: no room yet.
  bool Resume(std::unique_ptr<PreemptedSequence>& preempted, uint32_t keep_until = 0, size_t room = 0) {
    std::optional<Engine::ResumeWith> with = Gather(*preempted, room);
    if (!with) return false;
    with->keep_until_outputs = keep_until;
    const absl::Status s = engine_->Resume(std::move(preempted), *std::move(with));
    EXPECT_TRUE(s.ok()) << s;
    return true;
  }
  uint64_t Counted(const std::string& name, Labels labels = {}) {
    labels["role"] = "both";
    return metrics_.AddCounter(name, "", labels).value();
  }
};

TEST_F(PreemptionTest, HoldsNothingWhileItIsAwayAndGoesOnWhereItWas) {
  for (const char* mode : {"auto", "swap", "recompute"}) {
    for (const int steps : {1, 2, 3, 4, 5, 9}) {
      SCOPED_TRACE(std::string(mode) + " after " + std::to_string(steps));
      controls_->Allow(steps);
      StartWith(mode);
      auto sink = SubmitPreemptible("it", Prompt(10), 20);
      ASSERT_TRUE(controls_->WaitHeld());
      auto preempted = Preempt(*sink, "it");
      ASSERT_NE(preempted, nullptr);
      EXPECT_FALSE(engine_->Preempt("it")) << "it is not here";
      EXPECT_TRUE(engine_->WaitIdle(absl::Seconds(60)));
      preempted->SaveTail();
      EXPECT_EQ(pool_->stats().leased, 0u);
      const uint32_t sealed = preempted->computed() / kBlock;
      const bool swap = preempted->how() == Preemption::kSwap;
      EXPECT_EQ(swap, std::string_view(mode) != "recompute");
      EXPECT_EQ(pool_->stats().leases[static_cast<size_t>(LeaseKind::kSwapped)], swap ? sealed : 0);
      if (std::string_view(mode) == "swap") {
        EXPECT_EQ(preempted->has_tail(), preempted->computed() % kBlock > 0);
      }
      if (!swap) {
        EXPECT_FALSE(preempted->has_tail());
      }
      const uint64_t computed = Counted("tidepool_engine_recomputed_tokens_total");
      const bool saved = preempted->has_tail();
      const uint32_t tail = preempted->computed() % kBlock;
      ASSERT_TRUE(Resume(preempted));
      ASSERT_TRUE(sink->WaitFinished());
      EXPECT_EQ(sink->ids(), Continue(Prompt(10), 20));
      EXPECT_EQ(sink->result.reason, FinishReason::kLength);
      EXPECT_EQ(Counted("tidepool_engine_recomputed_tokens_total") - computed, saved ? 0 : tail);
      sink->result.blocks.clear();
      EXPECT_EQ(pool_->stats().leased, 0u);
      EXPECT_EQ(pool_->stats().leases[static_cast<size_t>(LeaseKind::kSwapped)], 0u);
      engine_.reset();
    }
  }
}

TEST_F(PreemptionTest, WhatOthersEvictMeanwhileIsComputedAgain) {
  controls_->Allow(5);
  StartWith("swap", 16);
  auto sink = SubmitPreemptible("it", Prompt(20), 20);
  ASSERT_TRUE(controls_->WaitHeld());
  auto preempted = Preempt(*sink, "it");
  preempted->SaveTail();
  // Its blocks are the last to go; the chain goes from its end.
  { EXPECT_TRUE(pool_->Reserve(14).ok()); }
  const auto keys = BlockKeys(BlockKey{}, preempted->tokens(), kBlock);
  EXPECT_EQ(pool_->MatchPrefix(keys), 2u);
  { EXPECT_TRUE(pool_->Reserve(16).ok()); }
  EXPECT_EQ(pool_->MatchPrefix(keys), 0u);
  ASSERT_TRUE(Resume(preempted));
  ASSERT_TRUE(sink->WaitFinished());
  EXPECT_EQ(sink->ids(), Continue(Prompt(20), 20));
}

TEST_F(PreemptionTest, OrdinaryEntriesAreEvictedBeforeWhatWasSwappedOut) {
  controls_->Allow(4);
  StartWith("swap", 16);
  auto sink = SubmitPreemptible("it", Prompt(12), 20);
  ASSERT_TRUE(controls_->WaitHeld());
  auto preempted = Preempt(*sink, "it");
  preempted->SaveTail();
  controls_->Free();
  auto later = Submit("later", Prompt(24, 500), 4);  // used after it
  ASSERT_TRUE(later->WaitFinished());
  later->result.blocks.clear();
  const auto its = BlockKeys(BlockKey{}, preempted->tokens(), kBlock);
  const auto others = BlockKeys(BlockKey{}, Prompt(24, 500), kBlock);
  const size_t kept = pool_->MatchPrefix(its);
  EXPECT_EQ(kept, preempted->computed() / kBlock);
  EXPECT_EQ(pool_->MatchPrefix(others), 6u);
  { EXPECT_TRUE(pool_->Reserve(16 - kept).ok()); }
  EXPECT_EQ(pool_->MatchPrefix(its), kept);
  EXPECT_EQ(pool_->MatchPrefix(others), 0u);
  ASSERT_TRUE(Resume(preempted));
  ASSERT_TRUE(sink->WaitFinished());
  EXPECT_EQ(sink->ids(), Continue(Prompt(12), 20));
}

TEST_F(PreemptionTest, DrawsPenaltiesAndLogprobsAreThoseOfAnUndisturbedRun) {
  StartWith("auto");
  const auto spec_of = [&](const std::string& id, std::shared_ptr<RecordingSink>& sink) {
    SequenceSpec spec;
    sink = MakeSpec(spec, id, Prompt(10), 30);
    spec.sampling = {.temperature = 1.5f,
                     .repetition_penalty = 1.3f,
                     .presence_penalty = 0.5f,
                     .frequency_penalty = 0.7f,
                     .seed = 42};
    spec.min_tokens = 5;
    spec.top_logprobs = 3;
    spec.preemptible = true;
    return spec;
  };
  std::shared_ptr<RecordingSink> calm, sink;
  ASSERT_TRUE(engine_->Submit(spec_of("calm", calm)).ok());
  ASSERT_TRUE(calm->WaitFinished());
  controls_->Allow(7);
  ASSERT_TRUE(engine_->Submit(spec_of("it", sink)).ok());
  for (int i = 0; i < 3; ++i) {
    ASSERT_TRUE(controls_->WaitHeld());
    EXPECT_TRUE(engine_->Preempt("it"));
    controls_->Allow(1);  // the step at hand
    ASSERT_TRUE(sink->WaitPaused());
    auto preempted = sink->TakePreempted();
    ASSERT_NE(preempted, nullptr);
    preempted->SaveTail();
    controls_->Allow(4);
    ASSERT_TRUE(Resume(preempted));
  }
  controls_->Free();
  ASSERT_TRUE(sink->WaitFinished());
  ASSERT_EQ(sink->ids(), calm->ids());
  for (size_t i = 0; i < 30; ++i) {
    EXPECT_EQ(sink->tokens[i].index, i);
    EXPECT_EQ(sink->tokens[i].logprob, calm->tokens[i].logprob);
    EXPECT_EQ(sink->tokens[i].top, calm->tokens[i].top);
  }
}

TEST_F(PreemptionTest, AnAnswerThatOutgrowsAFullPoolMakesTheLastInRankGiveWay) {
  StartWith("swap", 12);
  controls_->Allow(2);
  auto first = SubmitPreemptible("first", Prompt(16), 16, 1);
  auto last = SubmitPreemptible("last", Prompt(16, 100), 16, 0);
  controls_->Free();
  // Eight blocks each in the end, of twelve: the one of lower priority waits, and gets all it needs then.
  ASSERT_TRUE(first->WaitFinished());
  EXPECT_EQ(first->preemptions, 0);
  first->result.blocks.clear();
  while (last->WaitPaused() && last->finished == 0) {
    auto preempted = last->TakePreempted();
    ASSERT_NE(preempted, nullptr);
    preempted->SaveTail();
    EXPECT_FALSE(preempted->has_tail()) << "its slot was wanted at once";
    ASSERT_TRUE(Resume(preempted));
  }
  EXPECT_EQ(last->preemptions, 1);
  EXPECT_EQ(first->ids(), Continue(Prompt(16), 16));
  EXPECT_EQ(last->ids(), Continue(Prompt(16, 100), 16));
}

TEST_F(PreemptionTest, NobodyGivesWayWhereSomebodyGivesBlocksUpForNothing) {
  std::vector<BlockLease> stores;
  std::atomic<int> asked{0};
  on_short_ = [&] {
    ++asked;
    BlockLease::DropAll(std::exchange(stores, {}));
  };
  StartWith("auto", 16);
  stores = *pool_->Reserve(9);
  auto sink = SubmitPreemptible("it", Prompt(16), 20);
  ASSERT_TRUE(sink->WaitFinished());
  EXPECT_EQ(sink->preemptions, 0);
  EXPECT_EQ(asked, 1);
  EXPECT_EQ(sink->ids(), Continue(Prompt(16), 20));
}

TEST_F(PreemptionTest, BlocksThatAreReadInPlaceAreNotCountedAsKept) {
  controls_->Allow(2);
  StartWith("swap");
  PeerMemory peer(Prompt(18));
  SequenceSpec spec;
  auto sink = MakeSpec(spec, "it", Prompt(18), 20);
  for (uint32_t i = 0; i < 3; ++i) spec.blocks[i] = BlockLease();
  spec.in_place.push_back({0, peer.Run(0, 3)});
  spec.computed_tokens = 3 * kBlock;
  spec.preemptible = true;
  ASSERT_TRUE(engine_->Submit(std::move(spec)).ok());
  ASSERT_TRUE(controls_->WaitHeld());
  auto preempted = Preempt(*sink, "it");
  ASSERT_NE(preempted, nullptr);
  EXPECT_EQ(peer.leases, 0);
  const uint32_t kept = preempted->computed() / kBlock - 3;
  EXPECT_GT(kept, 0u);
  EXPECT_EQ(Counted("tidepool_engine_swapped_blocks_total"), kept);
  preempted->SaveTail();
  ASSERT_TRUE(Resume(preempted));
  ASSERT_TRUE(sink->WaitFinished());
  EXPECT_EQ(sink->ids(), Continue(Prompt(18), 20));
}

TEST_F(PreemptionTest, WithoutPreemptionAnAnswerThatOutgrowsThePoolEnds) {
  StartWith("off", 6);
  auto sink = SubmitPreemptible("it", Prompt(16), 100);
  ASSERT_TRUE(sink->WaitFinished());
  EXPECT_EQ(sink->result.reason, FinishReason::kError);
  EXPECT_EQ(sink->result.status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(sink->preemptions, 0);
}

TEST_F(PreemptionTest, OneThatCameBackIsNotTakenForOthersGrowthUntilItHasGotOn) {
  StartWith("auto", 10);
  controls_->Allow(3);
  auto low = SubmitPreemptible("low", Prompt(8), 20, 0);
  ASSERT_TRUE(controls_->WaitHeld());
  auto preempted = Preempt(*low, "low");
  preempted->SaveTail();
  controls_->Allow(1);
  ASSERT_TRUE(Resume(preempted, /*keep_until=*/20, /*room=*/28));
  auto high = SubmitPreemptible("high", Prompt(12, 100), 24, 5);  // which leaves no block
  controls_->Free();
  ASSERT_TRUE(high->WaitPaused());
  ASSERT_TRUE(low->WaitFinished());
  EXPECT_EQ(low->preemptions, 1) << "the other one, though above it, waited for its end";
  low->result.blocks.clear();
  while (high->WaitPaused() && high->finished == 0) {
    preempted = high->TakePreempted();
    ASSERT_NE(preempted, nullptr);
    preempted->SaveTail();
    ASSERT_TRUE(Resume(preempted));
  }
  EXPECT_EQ(low->ids(), Continue(Prompt(8), 20));
  EXPECT_EQ(high->ids(), Continue(Prompt(12, 100), 24));
}

TEST_F(PreemptionTest, OneThatMayNotBeIsNotPreempted) {
  controls_->Allow(1);
  StartWith("auto");
  auto sink = Submit("it", Prompt(10), 5);
  ASSERT_TRUE(controls_->WaitHeld());
  EXPECT_FALSE(engine_->Preempt("it"));
  EXPECT_FALSE(engine_->Preempt("nobody"));
  SequenceSpec spec;
  MakeSpec(spec, "pooled", Prompt(10), 5);
  spec.preemptible = true;
  spec.prefill_only = true;
  EXPECT_THAT(std::string(engine_->Submit(std::move(spec)).message()), HasSubstr("preemptible"));
  controls_->Free();
  ASSERT_TRUE(sink->WaitFinished());
}

TEST_F(PreemptionTest, DrainingEngineTakesItBack) {
  controls_->Allow(3);
  StartWith("auto");
  auto sink = SubmitPreemptible("it", Prompt(10), 10);
  ASSERT_TRUE(controls_->WaitHeld());
  auto preempted = Preempt(*sink, "it");
  preempted->SaveTail();
  engine_->Drain();
  ASSERT_TRUE(Resume(preempted));
  ASSERT_TRUE(sink->WaitFinished());
  EXPECT_EQ(sink->ids(), Continue(Prompt(10), 10));
}

TEST_F(PreemptionTest, StoppedEngineDoesNot) {
  controls_->Allow(3);
  StartWith("auto");
  auto sink = SubmitPreemptible("it", Prompt(10), 10);
  ASSERT_TRUE(controls_->WaitHeld());
  auto preempted = Preempt(*sink, "it");
  preempted->SaveTail();
  engine_->Stop();
  auto with = Gather(*preempted);
  ASSERT_TRUE(with.has_value());
  EXPECT_EQ(engine_->Resume(std::move(preempted), *std::move(with)).code(), absl::StatusCode::kUnavailable);
  with.reset();
  EXPECT_EQ(pool_->stats().leased, 0u);
}

TEST_F(PreemptionTest, DroppedWhileItIsAwayItEndsAndLeavesNothing) {
  controls_->Allow(3);
  StartWith("swap");
  auto sink = SubmitPreemptible("it", Prompt(10), 10);
  ASSERT_TRUE(controls_->WaitHeld());
  Preempt(*sink, "it").reset();
  EXPECT_EQ(sink->finished, 0);
  EXPECT_EQ(pool_->stats().leased, 0u);
  EXPECT_EQ(pool_->stats().leases[static_cast<size_t>(LeaseKind::kSwapped)], 0u);
}

// Sequences of random ranks and lengths in a pool that holds a few of them, resumed in random order: all end,
// and with their own answers.
TEST_F(PreemptionTest, RandomLivesInATinyPoolAnswerAsAlone) {
  for (uint64_t seed = 1; seed <= 12; ++seed) {
    SCOPED_TRACE(seed);
    Rng rng(seed);
    const char* const modes[] = {"auto", "swap", "recompute"};
    StartWith(modes[seed % 3], 24);
    struct Life {
      std::vector<int32_t> prompt;
      uint32_t length;
      int32_t priority;
      std::shared_ptr<RecordingSink> sink;
      std::unique_ptr<PreemptedSequence> away;
    };
    std::vector<Life> lives(16);
    for (size_t i = 0; i < lives.size(); ++i) {
      lives[i].prompt = Prompt(1 + rng.Below(30), static_cast<int32_t>(rng.Below(3) * 100));
      lives[i].length = 1 + static_cast<uint32_t>(rng.Below(40));
      lives[i].priority = static_cast<int32_t>(rng.Below(3));
    }
    size_t begun = 0, ended = 0;
    const absl::Time limit = absl::Now() + absl::Seconds(120);
    while (ended < lives.size()) {
      ASSERT_LT(absl::Now(), limit) << ended << " have ended";
      if (begun < lives.size()) {
        Life& life = lives[begun];
        auto blocks = pool_->Reserve((life.prompt.size() + kBlock - 1) / kBlock);
        if (blocks.ok()) {
          life.sink = std::make_shared<RecordingSink>();
          SequenceSpec spec;
          spec.request_id = std::to_string(begun++);
          spec.tokens = life.prompt;
          spec.blocks = *std::move(blocks);
          spec.sampling.temperature = 0;
          spec.max_tokens = life.length;
          spec.priority = life.priority;
          spec.preemptible = true;
          spec.sink = life.sink;
          const absl::Status s = engine_->Submit(std::move(spec));
          ASSERT_TRUE(s.ok()) << s;
        }
      }
      ended = 0;
      for (size_t i = 0; i < begun; ++i) {
        Life& life = lives[i];
        if (life.away == nullptr) life.away = life.sink->TakePreempted();
        if (life.away != nullptr) {
          life.away->SaveTail();
          if (rng.Chance(0.3)) Resume(life.away, life.away->outputs() + 8);
        } else if (life.sink->WaitFinished(absl::ZeroDuration())) {
          ++ended;
          life.sink->result.blocks.clear();
        } else if (rng.Chance(0.02)) {
          engine_->Preempt(std::to_string(i));
        }
      }
    }
    for (const Life& life : lives) {
      EXPECT_EQ(life.sink->ids(), Continue(life.prompt, life.length));
      EXPECT_EQ(life.sink->result.status, absl::OkStatus());
    }
    EXPECT_EQ(pool_->stats().leased, 0u);
    EXPECT_EQ(pool_->stats().leases[static_cast<size_t>(LeaseKind::kSwapped)], 0u);
    engine_.reset();
  }
}

}  // namespace
}  // namespace tidepool
