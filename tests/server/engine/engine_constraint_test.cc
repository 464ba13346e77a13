// What a constraint does to sequences, to its own and to others (engine_fixture.h's model).
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>

#include "absl/strings/str_cat.h"
#include "server/engine/engine.h"
#include "server/engine/mask_worker.h"
#include "tests/server/engine/engine_fixture.h"

namespace tidepool {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

// Position by position the tokens that may come; after the last it must end.
struct Script {
  std::vector<std::vector<int32_t>> allowed;
  std::vector<bool> can_end;  // before position i; false beyond
  // Runs before mask i is given, on whichever thread asks for it.
  std::function<absl::Status(size_t i)> before_mask = [](size_t) { return absl::OkStatus(); };
};

class ScriptedConstraint final : public TokenConstraint {
 public:
  explicit ScriptedConstraint(Script script) : script_(std::move(script)) {}

  absl::Status FillMask(std::span<uint32_t> bits) override {
    std::fill(bits.begin(), bits.end(), 0);
    if (absl::Status s = script_.before_mask(at_); !s.ok()) return s;
    if (at_ == script_.allowed.size()) return absl::OkStatus();
    for (int32_t id : script_.allowed[at_]) bits[static_cast<size_t>(id) / 32] |= 1u << (id % 32);
    return absl::OkStatus();
  }
  absl::Status Accept(int32_t token) override {
    if (MustEnd() || std::ranges::find(script_.allowed[at_], token) == script_.allowed[at_].end()) {
      return absl::InvalidArgumentError(absl::StrCat("token ", token, " may not come here"));
    }
    ++at_;
    return absl::OkStatus();
  }
  bool CanEnd() const override { return MustEnd() || (at_ < script_.can_end.size() && script_.can_end[at_]); }
  bool MustEnd() const override { return at_ == script_.allowed.size(); }

 private:
  const Script script_;
  size_t at_ = 0;
};

// A door that masks wait at.
class Gate {
 public:
  // Whoever waits at it has left, so that it may stand in a test's frame.
  ~Gate() {
    Open();
    std::unique_lock lock(mu_);
    cv_.wait(lock, [&] { return inside_ == 0; });
  }
  void Open() {
    {
      std::lock_guard lock(mu_);
      open_ = true;
    }
    cv_.notify_all();
  }
  void Pass() {
    std::unique_lock lock(mu_);
    ++waiting_;
    ++inside_;
    cv_.notify_all();
    cv_.wait_for(lock, std::chrono::seconds(60), [&] { return open_; });
    --inside_;
    cv_.notify_all();
  }
  bool WaitReached() {
    std::unique_lock lock(mu_);
    return cv_.wait_for(lock, std::chrono::seconds(60), [&] { return waiting_ > 0; });
  }

 private:
  std::mutex mu_;
  std::condition_variable cv_;
  bool open_ = false;
  int waiting_ = 0, inside_ = 0;
};

class ConstraintTest : public EngineTest {
 protected:
  std::shared_ptr<RecordingSink> SubmitHeld(Script script, uint32_t max_tokens,
                                            const std::function<void(SequenceSpec&)>& change = nullptr,
                                            const std::string& id = "held") {
    SequenceSpec spec;
    auto sink = MakeSpec(spec, id, Prompt(5), max_tokens);
    spec.constraint = std::make_unique<ScriptedConstraint>(std::move(script));
    if (change) change(spec);
    const absl::Status s = engine_->Submit(std::move(spec));
    EXPECT_TRUE(s.ok()) << s;
    return sink;
  }
};

TEST_F(ConstraintTest, OnlyAllowedTokensAreDrawnAndTheAnswerEndsWhenItIsComplete) {
  Start();
  auto sink = SubmitHeld({.allowed = {{7}, {8, 9}, {931}}}, 20);
  ASSERT_TRUE(sink->WaitFinished());
  // Of tokens that the model likes alike, greedy takes the lowest id.
  EXPECT_THAT(sink->ids(), ElementsAre(7, 8, 931));
  EXPECT_EQ(sink->result.reason, FinishReason::kStop);
  EXPECT_EQ(sink->result.stop_token, -1) << "no token was drawn to end it";
  EXPECT_EQ(sink->result.output_tokens, 3u);
}

TEST_F(ConstraintTest, SampledTokensAreAllowedOnesToo) {
  Start();
  auto sink = SubmitHeld({.allowed = std::vector<std::vector<int32_t>>(30, {3, 64, 999})}, 40,
                         [](SequenceSpec& s) { s.sampling.temperature = 1; });
  ASSERT_TRUE(sink->WaitFinished());
  ASSERT_EQ(sink->tokens.size(), 30u);
  for (int32_t id : sink->ids()) EXPECT_THAT(id, ::testing::AnyOf(3, 64, 999));
}

TEST_F(ConstraintTest, LogprobsStayTheModelsOwn) {
  Start();
  auto free = Submit("free", Prompt(5), 1);
  ASSERT_TRUE(free->WaitFinished());
  auto sink = SubmitHeld({.allowed = {{7}}}, 5, [](SequenceSpec& s) { s.top_logprobs = 1; });
  ASSERT_TRUE(sink->WaitFinished());
  ASSERT_EQ(sink->tokens.size(), 1u);
  EXPECT_EQ(sink->tokens[0].top[0].id, free->tokens[0].id) << "the likeliest is one that was not allowed";
  EXPECT_LT(sink->tokens[0].logprob, sink->tokens[0].top[0].logprob);
}

TEST_F(ConstraintTest, StopTokensMayComeOnlyWhereTheAnswerIsComplete) {
  Start();
  const Script script{.allowed = {{7}, {8}, {9}, {10}}, .can_end = {true, false, true}};
  // Favoured wherever it may come.
  auto favour = [](SequenceSpec& s) {
    s.stop_token_ids = {500};
    s.sampling.logit_bias = {{500, 100}};
  };
  auto at_once = SubmitHeld(script, 20, favour, "at_once");
  ASSERT_TRUE(at_once->WaitFinished());
  EXPECT_THAT(at_once->ids(), ElementsAre());
  EXPECT_EQ(at_once->result.stop_token, 500);

  auto later = SubmitHeld(
      script, 20,
      [&](SequenceSpec& s) {
        favour(s);
        s.min_tokens = 1;
      },
      "later");
  ASSERT_TRUE(later->WaitFinished());
  EXPECT_THAT(later->ids(), ElementsAre(7, 8)) << "not after 7, where it is not complete";
  EXPECT_EQ(later->result.reason, FinishReason::kStop);
}

TEST_F(ConstraintTest, MinTokensDoesNotPadACompleteAnswer) {
  Start();
  auto sink = SubmitHeld({.allowed = {{7}, {8}}}, 20, [](SequenceSpec& s) {
    s.stop_token_ids = {500};
    s.min_tokens = 10;
  });
  ASSERT_TRUE(sink->WaitFinished());
  EXPECT_THAT(sink->ids(), ElementsAre(7, 8));
  EXPECT_EQ(sink->result.reason, FinishReason::kStop);
}

TEST_F(ConstraintTest, WithoutStopTokensItGoesOnToItsEndOrItsLength) {
  Start();
  const std::vector<std::vector<int32_t>> steps(6, {7});
  auto whole = SubmitHeld({.allowed = steps, .can_end = {true, true, true, true}}, 20, nullptr, "whole");
  ASSERT_TRUE(whole->WaitFinished());
  EXPECT_EQ(whole->tokens.size(), 6u);
  EXPECT_EQ(whole->result.reason, FinishReason::kStop);
  auto cut = SubmitHeld({.allowed = steps}, 4, nullptr, "cut");
  ASSERT_TRUE(cut->WaitFinished());
  EXPECT_EQ(cut->tokens.size(), 4u);
  EXPECT_EQ(cut->result.reason, FinishReason::kLength);
  auto both = SubmitHeld({.allowed = steps}, 6, nullptr, "both");
  ASSERT_TRUE(both->WaitFinished());
  EXPECT_EQ(both->result.reason, FinishReason::kStop) << "it is complete, whatever max_tokens is";
}

TEST_F(ConstraintTest, StopTokenThatIsPartOfTheGrammarEndsTheAnswerAsAStopStringWould) {
  Start();
  auto sink = SubmitHeld({.allowed = {{7}, {8}, {9}}}, 20, [](SequenceSpec& s) { s.stop_token_ids = {8}; });
  ASSERT_TRUE(sink->WaitFinished());
  EXPECT_THAT(sink->ids(), ElementsAre(7));
  EXPECT_EQ(sink->result.stop_token, 8);
}

TEST_F(ConstraintTest, NothingLeftToDrawEndsThatOneWithAnError) {
  Start();
  auto other = Submit("other", Prompt(6, 50), 12);
  for (const bool bad_word : {false, true}) {
    auto sink = SubmitHeld({.allowed = {{7}, {8}}}, 20, [&](SequenceSpec& s) {
      if (bad_word) {
        s.sampling.bad_words = {{7, 8}};
      } else {
        s.sampling.allowed_token_ids = {7, 9};
      }
    });
    ASSERT_TRUE(sink->WaitFinished());
    EXPECT_THAT(sink->ids(), ElementsAre(7));
    EXPECT_EQ(sink->result.reason, FinishReason::kError);
    EXPECT_EQ(sink->result.status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(sink->result.status.message()),
                HasSubstr("grammar, allowed_token_ids, bad_words"));
  }
  ASSERT_TRUE(other->WaitFinished());
  EXPECT_EQ(other->ids(), Continue(Prompt(6, 50), 12));
}

TEST_F(ConstraintTest, FailingGrammarEndsItsSequenceOnly) {
  Start();
  auto other = Submit("other", Prompt(6, 50), 12);
  auto sink = SubmitHeld(
      {.allowed = {{7}, {8}, {9}},
       .before_mask =
           [](size_t i) { return i < 2 ? absl::OkStatus() : absl::FailedPreconditionError("stuck"); }},
      20);
  ASSERT_TRUE(sink->WaitFinished());
  EXPECT_THAT(sink->ids(), ElementsAre(7, 8));
  EXPECT_EQ(sink->result.status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(sink->result.status.message()), HasSubstr("stuck"));
  ASSERT_TRUE(other->WaitFinished());
  EXPECT_EQ(other->ids(), Continue(Prompt(6, 50), 12));
  EXPECT_THAT(Metrics(), HasSubstr("tidepool_engine_mask_failures_total{role=\"both\"} 1"));
}

TEST_F(ConstraintTest, FirstTokenFromElsewhereIsReplayed) {
  Start();
  SequenceSpec spec;
  auto prefill = MakeSpec(spec, "prefill", Prompt(5), 1);
  spec.constraint = std::make_unique<ScriptedConstraint>(Script{.allowed = {{7}, {8}, {9}}});
  spec.prefill_only = true;
  ASSERT_TRUE(engine_->Submit(std::move(spec)).ok());
  ASSERT_TRUE(prefill->WaitFinished());
  EXPECT_EQ(prefill->result.reason, FinishReason::kPrefilled);
  ASSERT_THAT(prefill->ids(), ElementsAre(7)) << "drawn under the mask where the prompt is prefilled";

  auto decode = SubmitHeld({.allowed = {{7}, {8}, {9}}}, 20, [&](SequenceSpec& s) {
    s.blocks = std::move(prefill->result.blocks);
    s.computed_tokens = 5;
    s.first_token = prefill->tokens[0];
  });
  ASSERT_TRUE(decode->WaitFinished());
  EXPECT_THAT(decode->ids(), ElementsAre(7, 8, 9));
  EXPECT_EQ(decode->result.reason, FinishReason::kStop);
}

TEST_F(ConstraintTest, FirstTokenThatMayNotComeIsAnError) {
  Start();
  auto sink = SubmitHeld({.allowed = {{7}, {8}}}, 20, [](SequenceSpec& s) {
    s.computed_tokens = 5;
    s.first_token.emplace().id = 8;
  });
  ASSERT_TRUE(sink->WaitFinished());
  EXPECT_THAT(sink->ids(), ElementsAre());
  EXPECT_EQ(sink->result.status.code(), absl::StatusCode::kInvalidArgument);
}

TEST_F(ConstraintTest, CompleteBeforeTheFirstTokenIsAnEmptyAnswer) {
  Start();
  auto sink = SubmitHeld({}, 20);
  ASSERT_TRUE(sink->WaitFinished());
  EXPECT_THAT(sink->ids(), ElementsAre());
  EXPECT_EQ(sink->result.reason, FinishReason::kStop);
}

TEST_F(ConstraintTest, SlowMaskHoldsUpNobodyElseAndLosesNothing) {
  Start();
  Gate gate;
  auto held = SubmitHeld({.allowed = {{7}, {8}, {9}},
                          .before_mask =
                              [&](size_t i) {
                                if (i == 1) gate.Pass();
                                return absl::OkStatus();
                              }},
                         20);
  ASSERT_TRUE(gate.WaitReached());
  // The mask of its second token does not come: a whole other answer does.
  auto other = Submit("other", Prompt(6, 50), 30);
  ASSERT_TRUE(other->WaitFinished());
  EXPECT_EQ(other->ids(), Continue(Prompt(6, 50), 30));
  EXPECT_EQ(held->token_count(), 1u);
  gate.Open();
  ASSERT_TRUE(held->WaitFinished());
  EXPECT_THAT(held->ids(), ElementsAre(7, 8, 9));
  EXPECT_EQ(held->result.reason, FinishReason::kStop);
  EXPECT_GE(metrics_.AddCounter("tidepool_engine_masks_late_total", "", {{"role", "both"}}).value(), 1u);
}

TEST_F(ConstraintTest, MaskThatComesLateDrawsTheSameTokenAsOneInTime) {
  Start();
  const Counter& late = metrics_.AddCounter("tidepool_engine_masks_late_total", "", {{"role", "both"}});
  auto run = [&](const std::string& id, bool slow) {
    auto sink = SubmitHeld(
        {.allowed = std::vector<std::vector<int32_t>>(8, {3, 64, 500, 999}),
         .before_mask =
             [&, slow](size_t i) {
               // Until the engine has given up waiting for this one.
               while (slow && late.value() <= i) std::this_thread::yield();
               return absl::OkStatus();
             }},
        20,
        [](SequenceSpec& s) {
          s.sampling.temperature = 1;
          s.sampling.seed = 11;
        },
        id);
    EXPECT_TRUE(sink->WaitFinished());
    return sink->ids();
  };
  EXPECT_EQ(run("slow", true), run("fast", false));
}

TEST_F(ConstraintTest, OverdueMaskEndsItsSequence) {
  Start({.max_batch = 4, .max_step_tokens = 16, .max_waiting = 8}, 128, absl::Milliseconds(5));
  Gate gate;
  auto held = SubmitHeld({.allowed = {{7}},
                          .before_mask =
                              [&](size_t) {
                                gate.Pass();
                                return absl::OkStatus();
                              }},
                         20);
  ASSERT_TRUE(held->WaitFinished());
  EXPECT_EQ(held->result.status.code(), absl::StatusCode::kDeadlineExceeded);
  gate.Open();
  auto other = Submit("other", Prompt(6, 50), 3);
  ASSERT_TRUE(other->WaitFinished());
  EXPECT_EQ(other->result.reason, FinishReason::kLength);
}

TEST_F(ConstraintTest, CancelWhileTheMaskIsOutstandingFreesAtOnce) {
  Start();
  Gate gate;
  auto held = SubmitHeld({.allowed = {{7}},
                          .before_mask =
                              [&](size_t) {
                                gate.Pass();
                                return absl::OkStatus();
                              }},
                         20);
  ASSERT_TRUE(gate.WaitReached());
  ASSERT_TRUE(engine_->Cancel("held"));
  ASSERT_TRUE(held->WaitFinished());
  EXPECT_EQ(held->result.reason, FinishReason::kCancelled);
  held->result.blocks.clear();
  EXPECT_TRUE(engine_->WaitIdle(absl::Seconds(60)));
  EXPECT_EQ(pool_->stats().leased, 0u);
  gate.Open();
}

TEST_F(ConstraintTest, ManyConstrainedSequencesAnswerAsAlone) {
  Start({.max_batch = 3, .max_step_tokens = 7, .max_waiting = 64});
  auto script = [](int i) {
    Script s;
    for (int t = 0; t < 3 + i % 5; ++t) s.allowed.push_back({i, 100 + i, 900 + t});
    return s;
  };
  std::vector<std::shared_ptr<RecordingSink>> sinks;
  for (int i = 0; i < 30; ++i) sinks.push_back(SubmitHeld(script(i), 20, nullptr, absl::StrCat("r", i)));
  for (int i = 0; i < 30; ++i) {
    ASSERT_TRUE(sinks[i]->WaitFinished());
    EXPECT_EQ(sinks[i]->tokens.size(), 3u + i % 5) << i;
    for (int32_t id : sinks[i]->ids()) EXPECT_TRUE(id == i || id == 100 + i || id >= 900) << i << ": " << id;
    EXPECT_EQ(sinks[i]->finished, 1);
  }
}

TEST(MaskWorker, FullQueueGivesTheRunBack) {
  MetricRegistry metrics;
  Gate gate;
  MaskWorker worker(1, metrics.AddHistogram("tidepool_test_mask_seconds", "t", LatencyBuckets()), [] {});
  auto run = [&](Script script) {
    return std::make_shared<ConstraintRun>(std::make_unique<ScriptedConstraint>(std::move(script)),
                                           std::vector<int32_t>{}, kVocab);
  };
  auto slow = run({.allowed = {{7}}, .before_mask = [&](size_t) {
                     gate.Pass();
                     return absl::OkStatus();
                   }});
  ASSERT_TRUE(worker.Submit(slow));
  ASSERT_TRUE(gate.WaitReached());  // at hand, not in the queue any more
  auto waits = run({.allowed = {{7}}}), refused = run({.allowed = {{9}}});
  ASSERT_TRUE(worker.Submit(waits));
  EXPECT_FALSE(worker.Submit(refused));
  EXPECT_TRUE(worker.Ready(*refused)) << "still the caller's";
  EXPECT_FALSE(worker.Ready(*waits));
  EXPECT_FALSE(worker.WaitReady(*waits, std::chrono::steady_clock::now()));
  gate.Open();
  EXPECT_TRUE(worker.WaitReady(*waits, std::chrono::steady_clock::now() + std::chrono::seconds(60)));
  EXPECT_EQ(waits->mask()[0], 1u << 7);
}

TEST(MaskWorker, SlowMasksStandBackAndComeToo) {
  MetricRegistry metrics;
  MaskWorker worker(256, metrics.AddHistogram("tidepool_test_mask_seconds", "t", LatencyBuckets()), [] {});
  const auto run = [&](std::function<absl::Status(size_t)> before_mask) {
    return std::make_shared<ConstraintRun>(
        std::make_unique<ScriptedConstraint>(Script{.allowed = {{7}}, .before_mask = std::move(before_mask)}),
        std::vector<int32_t>{}, kVocab);
  };
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(60);
  std::vector<int> order;  // of the worker's thread until all are ready
  auto slow = run([&](size_t) {
    order.push_back(-1);
    const auto end = std::chrono::steady_clock::now() + 2 * MaskWorker::kSlow;
    while (std::chrono::steady_clock::now() < end) std::this_thread::yield();
    return absl::OkStatus();
  });
  ASSERT_TRUE(worker.Submit(slow));
  ASSERT_TRUE(worker.WaitReady(*slow, deadline));

  Gate gate;
  auto first = run([&](size_t) {
    gate.Pass();
    return absl::OkStatus();
  });
  ASSERT_TRUE(worker.Submit(first));
  ASSERT_TRUE(gate.WaitReached());
  EXPECT_GT(worker.Computing(*first).count(), 0);
  std::vector<std::shared_ptr<ConstraintRun>> quick;
  order.clear();
  ASSERT_TRUE(worker.Submit(slow));
  for (int i = 0; i < 2 * MaskWorker::kSlowEvery; ++i) {
    quick.push_back(run([&order, i](size_t) {
      order.push_back(i);
      return absl::OkStatus();
    }));
    ASSERT_TRUE(worker.Submit(quick.back()));
  }
  EXPECT_EQ(worker.Computing(*slow).count(), 0) << "it waits for its turn";
  gate.Open();
  ASSERT_TRUE(worker.WaitReady(*slow, deadline));
  for (const auto& q : quick) ASSERT_TRUE(worker.WaitReady(*q, deadline));
  const auto at = std::ranges::find(order, -1) - order.begin();
  EXPECT_GE(at, MaskWorker::kSlowEvery - 2) << "behind those that are quick";
  EXPECT_LE(at, MaskWorker::kSlowEvery) << "but not behind all of them";
  EXPECT_EQ(order.size(), quick.size() + 1);
}

TEST(MaskWorker, AbandonedRunsMakeRoom) {
  MetricRegistry metrics;
  Gate gate;
  MaskWorker worker(1, metrics.AddHistogram("tidepool_test_mask_seconds", "t", LatencyBuckets()), [] {});
  const auto run = [&](Script script) {
    return std::make_shared<ConstraintRun>(std::make_unique<ScriptedConstraint>(std::move(script)),
                                           std::vector<int32_t>{}, kVocab);
  };
  auto at_hand = run({.allowed = {{7}}, .before_mask = [&](size_t) {
                        gate.Pass();
                        return absl::OkStatus();
                      }});
  ASSERT_TRUE(worker.Submit(at_hand));
  ASSERT_TRUE(gate.WaitReached());
  ASSERT_TRUE(worker.Submit(run({.allowed = {{7}}})));
  auto next = run({.allowed = {{9}}});
  EXPECT_TRUE(worker.Submit(next)) << "nobody wants the one that waits";
  gate.Open();
  EXPECT_TRUE(worker.WaitReady(*next, std::chrono::steady_clock::now() + std::chrono::seconds(60)));
  EXPECT_EQ(next->mask()[0], 1u << 9);
}

TEST_F(ConstraintTest, MaskIsNotAskedForBeforeThereIsAPlaceInTheBatch) {
  Start({.max_batch = 1, .max_step_tokens = 16, .max_waiting = 8});
  controls_->Allow(0);
  auto running = Submit("running", Prompt(5), 2);
  ASSERT_TRUE(controls_->WaitHeld());
  std::atomic<int> masks = 0;
  const Script script{.allowed = {{7}, {8}}, .before_mask = [&](size_t) {
                        ++masks;
                        return absl::OkStatus();
                      }};
  auto waits = SubmitHeld(script, 20);
  auto handed_on = SubmitHeld(
      script, 20,
      [](SequenceSpec& s) {
        s.computed_tokens = 5;
        s.first_token = OutputToken{.id = 7};
      },
      "handed_on");
  controls_->Allow(1);
  ASSERT_TRUE(controls_->WaitHeld());  // in its second step: the others have been admitted
  EXPECT_EQ(masks, 0);
  controls_->Free();
  ASSERT_TRUE(running->WaitFinished() && waits->WaitFinished() && handed_on->WaitFinished());
  EXPECT_THAT(waits->ids(), ElementsAre(7, 8));
  EXPECT_THAT(handed_on->ids(), ElementsAre(7, 8));
}

TEST_F(ConstraintTest, WaitingBehindSomebodysMaskIsNotOverdue) {
  constexpr absl::Duration kDeadline = absl::Seconds(2);
  Start({.max_batch = 4, .max_step_tokens = 16, .max_waiting = 8}, 128, kDeadline);
  Gate gate;
  auto stuck = SubmitHeld({.allowed = {{7}},
                           .before_mask =
                               [&](size_t) {
                                 gate.Pass();
                                 return absl::OkStatus();
                               }},
                          20, nullptr, "stuck");
  ASSERT_TRUE(gate.WaitReached());
  auto behind = SubmitHeld({.allowed = {{7}, {8}}}, 20, nullptr, "behind");
  ASSERT_TRUE(stuck->WaitFinished());
  EXPECT_EQ(stuck->result.status.code(), absl::StatusCode::kDeadlineExceeded);
  gate.Open();
  ASSERT_TRUE(behind->WaitFinished());
  EXPECT_THAT(behind->ids(), ElementsAre(7, 8));
}

TEST_F(EngineTest, PooledPromptGivesTheLastHiddenStateAndNoToken) {
  Start();
  SequenceSpec spec;
  auto sink = MakeSpec(spec, "a", Prompt(21, 100), 0);
  spec.pooling = SequencePooling::kLast;
  ASSERT_TRUE(engine_->Submit(std::move(spec)).ok());
  ASSERT_TRUE(sink->WaitFinished());
  EXPECT_EQ(sink->result.reason, FinishReason::kPooled);
  EXPECT_THAT(sink->result.pooled, ElementsAre(20.0f, 120.0f)) << "position and token";
  EXPECT_THAT(sink->ids(), ElementsAre());
  EXPECT_EQ(sink->sealed.size(), 5u) << "its blocks serve others";
}

TEST_F(EngineTest, MeanIsOverTheWholePromptHoweverItIsChunked) {
  for (const uint32_t step : {4u, 7u, 64u}) {
    Start({.max_batch = 4, .max_step_tokens = step, .max_waiting = 8});
    auto busy = Submit("busy", Prompt(3, 500), 20);
    SequenceSpec spec;
    auto sink = MakeSpec(spec, "a", Prompt(21, 100), 0);
    spec.pooling = SequencePooling::kMean;
    ASSERT_TRUE(engine_->Submit(std::move(spec)).ok());
    SequenceSpec unit;
    auto normalised = MakeSpec(unit, "b", Prompt(3, 3), 0);
    unit.pooling = SequencePooling::kMean;
    unit.normalize = true;
    ASSERT_TRUE(engine_->Submit(std::move(unit)).ok());
    ASSERT_TRUE(sink->WaitFinished() && normalised->WaitFinished() && busy->WaitFinished());
    EXPECT_THAT(sink->result.pooled, ElementsAre(10.0f, 110.0f)) << step;
    const float length = std::sqrt(1.0f + 16.0f);
    EXPECT_THAT(normalised->result.pooled,
                ElementsAre(::testing::FloatEq(1 / length), ::testing::FloatEq(4 / length)));
    EXPECT_EQ(busy->ids(), Continue(Prompt(3, 500), 20)) << "nobody else's rows moved";
    engine_.reset();
  }
}

TEST_F(EngineTest, PooledPromptMayFillTheContextAndThatIsAll) {
  Start({.max_batch = 4, .max_step_tokens = 64, .max_waiting = 8}, 256);
  SequenceSpec spec;
  auto sink = MakeSpec(spec, "a", std::vector<int32_t>(256, 9), 0);
  spec.pooling = SequencePooling::kLast;
  ASSERT_TRUE(engine_->Submit(std::move(spec)).ok());
  ASSERT_TRUE(sink->WaitFinished());
  EXPECT_THAT(sink->result.pooled, ElementsAre(255.0f, 9.0f));
  SequenceSpec longer;
  MakeSpec(longer, "b", std::vector<int32_t>(257, 9), 0);
  longer.pooling = SequencePooling::kLast;
  EXPECT_EQ(engine_->Submit(std::move(longer)).code(), absl::StatusCode::kInvalidArgument);
}

TEST_F(EngineTest, PoolingGoesWithNothingThatDraws) {
  Start();
  const std::function<void(SequenceSpec&)> wrong[] = {
      [](SequenceSpec& s) { s.prefill_only = true; },
      [](SequenceSpec& s) { s.prompt_logprobs = 0; },
      [](SequenceSpec& s) { s.constraint = std::make_unique<ScriptedConstraint>(Script{}); },
      [](SequenceSpec& s) {
        s.pooling = SequencePooling::kMean;
        s.computed_tokens = 4;
      },
  };
  for (size_t i = 0; i < std::size(wrong); ++i) {
    SequenceSpec spec;
    MakeSpec(spec, "a", Prompt(9), 0);
    spec.pooling = SequencePooling::kLast;
    wrong[i](spec);
    EXPECT_EQ(engine_->Submit(std::move(spec)).code(), absl::StatusCode::kInvalidArgument) << i;
  }
}

TEST_F(EngineTest, FailedStepDoesNotSpoilWhatIsPooledBesideIt) {
  Start();
  controls_->Allow(0);
  auto first = Submit("first", Prompt(2, 700), 3);
  ASSERT_TRUE(controls_->WaitHeld());  // the next two come together
  auto bad = Submit("bad", {1, kFailToken, 2}, 3);
  SequenceSpec spec;
  auto sink = MakeSpec(spec, "a", Prompt(5, 100), 0);
  spec.pooling = SequencePooling::kMean;
  ASSERT_TRUE(engine_->Submit(std::move(spec)).ok());
  controls_->Free();
  ASSERT_TRUE(sink->WaitFinished() && bad->WaitFinished() && first->WaitFinished());
  EXPECT_EQ(bad->result.reason, FinishReason::kError);
  EXPECT_THAT(sink->result.pooled, ElementsAre(2.0f, 102.0f));
}

TEST_F(EngineTest, BatchSequenceGivesItsPlaceToAnOnlineOneAndGoesOnLater) {
  Start({.max_batch = 1, .max_step_tokens = 16, .max_waiting = 8});
  controls_->Allow(3);
  SequenceSpec spec;
  auto batch = MakeSpec(spec, "batch", Prompt(5), 20);
  spec.batch_class = true;
  ASSERT_TRUE(engine_->Submit(std::move(spec)).ok());
  ASSERT_TRUE(controls_->WaitHeld());
  auto online = Submit("online", Prompt(6, 50), 4);
  // One that may be under way, and the four that the online one takes.
  controls_->Allow(5);
  ASSERT_TRUE(online->WaitFinished());
  EXPECT_LE(batch->token_count(), 3u + 1 + 1) << "it stood back";
  controls_->Free();
  ASSERT_TRUE(batch->WaitFinished());
  EXPECT_EQ(batch->ids(), Continue(Prompt(5), 20)) << "nothing was lost or computed anew";
  EXPECT_EQ(online->ids(), Continue(Prompt(6, 50), 4));
}

TEST_F(EngineTest, BatchSequencesLeaveTheLastWaitingPlacesToOnlineOnes) {
  Start({.max_batch = 1, .max_step_tokens = 16, .max_waiting = 4});
  controls_->Allow(0);
  std::vector<std::shared_ptr<RecordingSink>> sinks = {Submit("running", Prompt(5), 2)};
  ASSERT_TRUE(controls_->WaitHeld());
  auto submit_batch = [&](const std::string& id) {
    SequenceSpec spec;
    sinks.push_back(MakeSpec(spec, id, Prompt(3), 2));
    spec.batch_class = true;
    return engine_->Submit(std::move(spec));
  };
  EXPECT_TRUE(submit_batch("b0").ok());
  EXPECT_TRUE(submit_batch("b1").ok());
  EXPECT_EQ(submit_batch("b2").code(), absl::StatusCode::kResourceExhausted);
  sinks.pop_back();
  for (int i = 0; i < 4; ++i) sinks.push_back(Submit(absl::StrCat("o", i), Prompt(3), 2));
  SequenceSpec fifth;
  MakeSpec(fifth, "o4", Prompt(3), 2);
  EXPECT_EQ(engine_->Submit(std::move(fifth)).code(), absl::StatusCode::kResourceExhausted);
  controls_->Free();
  for (const auto& sink : sinks) ASSERT_TRUE(sink->WaitFinished());
}

}  // namespace
}  // namespace tidepool
