// The engine's rules over a model double (engine_fixture.h).
#include "server/engine/engine.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>

#include "absl/strings/str_cat.h"
#include "base/rng.h"
#include "kvstore/keys.h"
#include "tests/server/engine/engine_fixture.h"

namespace tidepool {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

TEST_F(EngineTest, AnswersOneRequestToItsLength) {
  Start();
  auto sink = Submit("a", Prompt(10), 9);
  ASSERT_TRUE(sink->WaitFinished());
  EXPECT_EQ(sink->ids(), Continue(Prompt(10), 9));
  EXPECT_EQ(sink->result.reason, FinishReason::kLength);
  EXPECT_EQ(sink->result.output_tokens, 9u);
  EXPECT_EQ(sink->result.computed_tokens, 18u);  // the last token drawn is never computed
  for (uint32_t i = 0; i < 9; ++i) EXPECT_EQ(sink->tokens[i].index, i);
  EXPECT_GT(sink->result.prefill_time, absl::ZeroDuration());
}

TEST_F(EngineTest, ManyRequestsAtOnceAnswerAsAlone) {
  Start({.max_batch = 3, .max_step_tokens = 7, .max_waiting = 64});
  std::vector<std::shared_ptr<RecordingSink>> sinks;
  for (int i = 0; i < 30; ++i) {
    sinks.push_back(Submit(absl::StrCat("r", i), Prompt(1 + i % 11, i * 7 + 1), 1 + i % 13));
  }
  for (int i = 0; i < 30; ++i) {
    ASSERT_TRUE(sinks[i]->WaitFinished());
    EXPECT_EQ(sinks[i]->ids(), Continue(Prompt(1 + i % 11, i * 7 + 1), 1 + i % 13)) << i;
    EXPECT_EQ(sinks[i]->finished, 1);
  }
}

TEST_F(EngineTest, StopTokenEndsTheAnswerAndIsNotGivenAsOutput) {
  Start();
  const auto want = Continue(Prompt(5), 6);
  SequenceSpec spec;
  auto sink = MakeSpec(spec, "a", Prompt(5), 20);
  spec.stop_token_ids = {want[3]};
  ASSERT_TRUE(engine_->Submit(std::move(spec)).ok());
  ASSERT_TRUE(sink->WaitFinished());
  EXPECT_EQ(sink->ids(), std::vector<int32_t>(want.begin(), want.begin() + 3));
  EXPECT_EQ(sink->result.reason, FinishReason::kStop);
  EXPECT_EQ(sink->result.stop_token, want[3]);
}

TEST_F(EngineTest, MinTokensHoldsStopTokensBack) {
  Start();
  const auto want = Continue(Prompt(5), 2);
  SequenceSpec spec;
  auto sink = MakeSpec(spec, "a", Prompt(5), 6);
  spec.stop_token_ids = {want[0]};
  spec.min_tokens = 3;
  ASSERT_TRUE(engine_->Submit(std::move(spec)).ok());
  ASSERT_TRUE(sink->WaitFinished());
  EXPECT_GE(sink->tokens.size(), 3u);
  EXPECT_EQ(sink->tokens[0].id, (want[0] + 1) % 900);  // the second best
}

TEST_F(EngineTest, FullBlocksArePublishedUnderTheirKeysBeforeTheFirstToken) {
  Start();
  auto sink = Submit("a", Prompt(10), 7);
  ASSERT_TRUE(sink->WaitFinished());
  std::vector<int32_t> all = Prompt(10);
  for (int32_t t : Continue(Prompt(10), 7)) all.push_back(t);
  all.pop_back();  // never computed
  const auto keys = BlockKeys(BlockKey{}, all, kBlock);
  ASSERT_EQ(sink->sealed.size(), 4u);
  for (uint32_t i = 0; i < 4; ++i) {
    EXPECT_EQ(sink->sealed[i].first, i);
    EXPECT_EQ(sink->sealed[i].second, keys[i]);
  }
  EXPECT_EQ(pool_->MatchPrefix(keys), 4u);
  EXPECT_EQ(sink->order.substr(0, 3), "bbt");
  EXPECT_EQ(sink->order.back(), 'f');
}

TEST_F(EngineTest, PrefixBlocksAreReusedWithoutComputingOrWritingThem) {
  Start();
  auto first = Submit("a", Prompt(13), 4);
  ASSERT_TRUE(first->WaitFinished());
  first->result.blocks.clear();

  const auto keys = BlockKeys(BlockKey{}, Prompt(13), kBlock);
  SequenceSpec spec;
  auto sink = MakeSpec(spec, "b", Prompt(13), 4);
  auto prefix = pool_->LeasePrefix(std::span(keys).first(ReusableBlocks(13, kBlock)));
  ASSERT_EQ(prefix.size(), 3u);
  for (size_t i = 0; i < 3; ++i) spec.blocks[i] = std::move(prefix[i]);
  spec.published_blocks = 3;
  spec.computed_tokens = 12;
  controls_->steps.clear();
  ASSERT_TRUE(engine_->Submit(std::move(spec)).ok());
  ASSERT_TRUE(sink->WaitFinished());
  EXPECT_EQ(sink->ids(), Continue(Prompt(13), 4));
  ASSERT_FALSE(controls_->steps.empty());
  EXPECT_THAT(controls_->steps[0], ElementsAre(1));  // one token of thirteen
  const auto observed = engine_->DrainObservations();
  ASSERT_EQ(observed.prefills.size(), 2u);
  EXPECT_EQ(observed.prefills[1].new_tokens, 1u);
  EXPECT_EQ(observed.prefills[1].cached_tokens, 12u);
}

TEST_F(EngineTest, ReusableBlocksAlwaysLeaveATokenToCompute) {
  EXPECT_EQ(ReusableBlocks(0, 4), 0u);
  EXPECT_EQ(ReusableBlocks(4, 4), 0u);
  EXPECT_EQ(ReusableBlocks(5, 4), 1u);
  EXPECT_EQ(ReusableBlocks(8, 4), 1u);
  EXPECT_EQ(ReusableBlocks(9, 4), 2u);
}

TEST_F(EngineTest, TwoRequestsWithOnePromptShareTheBlockPublishedFirst) {
  Start();
  controls_->Allow(0);
  auto a = Submit("a", Prompt(8), 3);
  auto b = Submit("b", Prompt(8), 3);
  controls_->Free();
  ASSERT_TRUE(a->WaitFinished());
  ASSERT_TRUE(b->WaitFinished());
  EXPECT_EQ(a->ids(), b->ids());
  EXPECT_EQ(a->lease_bases[0], b->lease_bases[0]);
  EXPECT_EQ(a->lease_bases[1], b->lease_bases[1]);
}

// Prefill here, copy the blocks to another pool, decode there: the same answer as at one place, whether
// the prompt leaves an unsealed tail or not.
TEST_F(EngineTest, HandoffContinuesTheAnswerOnAnotherEngine) {
  Start();
  auto pool_b = *BlockPool::Create({.layout = kLayout, .slots = 64, .metrics = &metrics_});
  auto engine_b = *Engine::Start({.config = {.max_batch = 2, .max_step_tokens = 4},
                                  .runner = std::make_unique<KvRunner>(controls_),
                                  .pool = pool_b.get(),
                                  .role = "decode",
                                  .metrics = &metrics_});
  for (const size_t n : {1u, 7u, 8u, 9u}) {
    SequenceSpec spec;
    auto prefill = MakeSpec(spec, "p", Prompt(n), 12);
    spec.prefill_only = true;
    spec.top_logprobs = 1;
    ASSERT_TRUE(engine_->Submit(std::move(spec)).ok());
    ASSERT_TRUE(prefill->WaitFinished());
    EXPECT_EQ(prefill->result.reason, FinishReason::kPrefilled);
    EXPECT_EQ(prefill->result.computed_tokens, n);
    ASSERT_EQ(prefill->tokens.size(), 1u);

    SequenceSpec next;
    auto decode = MakeSpec(next, "d", Prompt(n), 12);
    next.blocks = *pool_b->Reserve((n + kBlock - 1) / kBlock);
    for (size_t i = 0; i < next.blocks.size(); ++i) {
      std::ranges::copy(prefill->result.blocks[i].data(), next.blocks[i].data().begin());
    }
    next.computed_tokens = static_cast<uint32_t>(n);
    next.first_token = prefill->tokens[0];
    ASSERT_TRUE(engine_b->Submit(std::move(next)).ok());
    ASSERT_TRUE(decode->WaitFinished());
    EXPECT_EQ(decode->ids(), Continue(Prompt(n), 12)) << n;
    EXPECT_EQ(decode->tokens[0].top, prefill->tokens[0].top);
    // Fetched blocks are readable at their new place too.
    EXPECT_EQ(pool_b->MatchPrefix(BlockKeys(BlockKey{}, Prompt(n), kBlock)), n / kBlock);
  }
}

TEST_F(EngineTest, HandedOffFirstTokenIsJudgedWhereItIsDecoded) {
  Start();
  const int32_t first = Next(Prompt(4));
  SequenceSpec spec;
  auto sink = MakeSpec(spec, "p", Prompt(4), 5);
  spec.prefill_only = true;
  spec.stop_token_ids = {first};
  ASSERT_TRUE(engine_->Submit(std::move(spec)).ok());
  ASSERT_TRUE(sink->WaitFinished());
  EXPECT_EQ(sink->result.reason, FinishReason::kPrefilled);
  ASSERT_EQ(sink->ids(), std::vector<int32_t>{first});

  SequenceSpec stop;
  auto stopped = MakeSpec(stop, "d", Prompt(4), 5);
  stop.computed_tokens = 4;
  stop.first_token = sink->tokens[0];
  stop.stop_token_ids = {first};
  ASSERT_TRUE(engine_->Submit(std::move(stop)).ok());
  ASSERT_TRUE(stopped->WaitFinished());
  EXPECT_EQ(stopped->result.reason, FinishReason::kStop);
  EXPECT_TRUE(stopped->tokens.empty());

  SequenceSpec one;
  auto length = MakeSpec(one, "e", Prompt(4), 1);
  one.computed_tokens = 4;
  one.first_token = sink->tokens[0];
  ASSERT_TRUE(engine_->Submit(std::move(one)).ok());
  ASSERT_TRUE(length->WaitFinished());
  EXPECT_EQ(length->result.reason, FinishReason::kLength);
  EXPECT_EQ(length->ids(), std::vector<int32_t>{first});
}

TEST_F(EngineTest, AnswerGoesOnBehindTokensThatWereEmittedElsewhere) {
  Start();
  const std::vector<int32_t> prompt = {5, 6, 7, 8, 9};
  const std::vector<int32_t> whole = Continue(prompt, 12);
  for (uint32_t emitted = 1; emitted <= 12; ++emitted) {
    std::vector<int32_t> tokens = prompt;
    tokens.insert(tokens.end(), whole.begin(), whole.begin() + emitted);
    SequenceSpec spec;
    auto sink = MakeSpec(spec, "r" + std::to_string(emitted), tokens, 12);
    spec.emitted_tokens = emitted;
    ASSERT_TRUE(engine_->Submit(std::move(spec)).ok());
    ASSERT_TRUE(sink->WaitFinished());
    EXPECT_EQ(sink->result.reason, FinishReason::kLength);
    EXPECT_EQ(sink->result.output_tokens, 12u);
    EXPECT_EQ(sink->ids(), std::vector<int32_t>(whole.begin() + emitted, whole.end())) << emitted;
    if (emitted < 12) {
      EXPECT_EQ(sink->tokens.front().index, emitted);
    }
  }
}

TEST_F(EngineTest, CancelFreesBlocksAndPlaceWithinOneStep) {
  Start({.max_batch = 1, .max_step_tokens = 8, .max_waiting = 8});
  controls_->Allow(3);
  auto a = Submit("a", Prompt(6), 200);
  ASSERT_TRUE(a->WaitTokens(3));
  ASSERT_TRUE(controls_->WaitHeld());  // inside the fourth step
  auto b = Submit("b", Prompt(6, 100), 2);
  EXPECT_TRUE(engine_->Cancel("a"));
  EXPECT_TRUE(engine_->Cancel("a"));
  controls_->Allow(2);  // the fourth ends; the fifth is b's already
  ASSERT_TRUE(a->WaitFinished());
  EXPECT_EQ(a->result.reason, FinishReason::kCancelled);
  EXPECT_EQ(a->result.status.code(), absl::StatusCode::kCancelled);
  EXPECT_EQ(a->tokens.size(), 4u);
  ASSERT_TRUE(b->WaitTokens(1));
  controls_->Free();
  ASSERT_TRUE(b->WaitFinished());
  EXPECT_FALSE(engine_->Cancel("a"));
  ASSERT_TRUE(engine_->WaitIdle(absl::Seconds(60)));
  a->result.blocks.clear();
  b->result.blocks.clear();
  EXPECT_EQ(pool_->stats().leased, 0u);
}

TEST_F(EngineTest, WaitingRequestsCanBeCancelled) {
  Start({.max_batch = 1, .max_step_tokens = 8, .max_waiting = 8});
  controls_->Allow(0);
  auto a = Submit("a", Prompt(6), 3);
  ASSERT_TRUE(controls_->WaitHeld());
  auto b = Submit("b", Prompt(6), 3);
  EXPECT_TRUE(engine_->Cancel("b"));
  controls_->Free();
  ASSERT_TRUE(b->WaitFinished());
  EXPECT_TRUE(b->tokens.empty());
  ASSERT_TRUE(a->WaitFinished());
  EXPECT_EQ(a->ids(), Continue(Prompt(6), 3));
}

TEST_F(EngineTest, QueueLimitRefusesAndCounts) {
  Start({.max_batch = 1, .max_step_tokens = 8, .max_waiting = 2});
  controls_->Allow(0);
  auto a = Submit("a", Prompt(6), 2);
  ASSERT_TRUE(controls_->WaitHeld());
  auto b = Submit("b", Prompt(6), 2);
  auto c = Submit("c", Prompt(6), 2);
  EXPECT_EQ(engine_->stats().running, 1u);
  EXPECT_EQ(engine_->stats().waiting, 2u);
  SequenceSpec d;
  auto refused = MakeSpec(d, "d", Prompt(6), 2);
  const absl::Status s = engine_->Submit(std::move(d));
  EXPECT_EQ(s.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(s.message()), HasSubstr("engine.max_waiting is 2"));
  controls_->Free();
  ASSERT_TRUE(c->WaitFinished());
  EXPECT_EQ(refused->finished, 0);
  EXPECT_THAT(Metrics(),
              HasSubstr("tidepool_engine_rejections_total{reason=\"queue_full\",role=\"both\"} 1"));
}

TEST_F(EngineTest, TenantAtItsWaitingLimitIsRefusedUntilOneOfItsRequestsBegins) {
  Start({.max_batch = 1, .max_step_tokens = 8, .max_waiting = 8, .max_waiting_per_tenant = 2});
  controls_->Allow(0);
  const auto submit = [&](const std::string& id, const std::string& tenant, absl::Status& status) {
    SequenceSpec spec;
    auto sink = MakeSpec(spec, id, Prompt(6), 2);
    spec.tenant = tenant;
    status = engine_->Submit(std::move(spec));
    return sink;
  };
  absl::Status status;
  auto a = submit("a", "one", status);
  ASSERT_TRUE(controls_->WaitHeld());  // it has begun
  auto b = submit("b", "one", status);
  auto c = submit("c", "one", status);
  ASSERT_TRUE(status.ok()) << status;
  auto refused = submit("d", "one", status);
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(status.message()), HasSubstr("engine.max_waiting_per_tenant is 2"));
  EXPECT_THAT(std::string(status.message()), HasSubstr("tenant one"));
  EXPECT_THAT(Metrics(),
              HasSubstr("tidepool_engine_rejections_total{reason=\"tenant_queue_full\",role=\"both\"} 1"));
  auto other = submit("e", "two", status);
  EXPECT_TRUE(status.ok()) << status;
  // Who waits no more leaves its place in the queue: cancelled, or begun.
  EXPECT_TRUE(engine_->Cancel("c"));
  controls_->Free();
  ASSERT_TRUE(c->WaitFinished());
  for (const auto& sink : {a, b, other}) {
    ASSERT_TRUE(sink->WaitFinished());
    EXPECT_EQ(sink->ids(), Continue(Prompt(6), 2));
  }
  ASSERT_TRUE(engine_->WaitIdle(absl::Seconds(60)));
  controls_->Allow(0);
  auto f = submit("f", "one", status);
  ASSERT_TRUE(controls_->WaitHeld());
  auto g = submit("g", "one", status);
  auto h = submit("h", "one", status);
  EXPECT_TRUE(status.ok()) << status;
  auto again = submit("i", "one", status);
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(refused->finished + again->finished, 0);
}

TEST_F(EngineTest, TenantWithOneRequestBeginsBeforeTheLongQueueOfAnother) {
  for (const std::string order : {"vtc", "fcfs"}) {
    Start({.max_batch = 1, .max_step_tokens = 8, .max_waiting = 8, .order = order});
    controls_->Allow(0);
    std::vector<std::shared_ptr<RecordingSink>> sinks;
    std::vector<SequenceSpec> specs(5);
    for (int i = 0; i < 5; ++i) {
      sinks.push_back(MakeSpec(specs[i], absl::StrCat("r", i), Prompt(2 + i), 1));
      specs[i].tenant = i < 4 ? "many" : "one";
      ASSERT_TRUE(engine_->Submit(std::move(specs[i])).ok());
      if (i == 0) {
        ASSERT_TRUE(controls_->WaitHeld());
      }
    }
    controls_->steps.clear();  // its thread is held
    controls_->Free();
    for (const auto& sink : sinks) ASSERT_TRUE(sink->WaitFinished());
    const std::vector<std::vector<int32_t>> expected =
        order == "vtc" ? std::vector<std::vector<int32_t>>{{2}, {6}, {3}, {4}, {5}}
                       : std::vector<std::vector<int32_t>>{{2}, {3}, {4}, {5}, {6}};
    EXPECT_EQ(controls_->steps, expected) << order;
    sinks.clear();
    engine_.reset();
    controls_->steps.clear();
  }
}

TEST_F(EngineTest, UnknownOrderIsRefusedByName) {
  auto pool = BlockPool::Create({.layout = kLayout, .slots = 8, .metrics = &metrics_});
  ASSERT_TRUE(pool.ok());
  const auto engine = Engine::Start({.config = {.order = "lifo"},
                                     .runner = std::make_unique<KvRunner>(controls_),
                                     .pool = pool->get(),
                                     .role = "both",
                                     .metrics = &metrics_});
  EXPECT_EQ(engine.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(engine.status().message()), HasSubstr("engine.order is 'lifo'"));
}

TEST_F(EngineTest, NanLogitsEndThatSequenceOnly) {
  Start();
  controls_->Allow(0);
  auto first = Submit("first", Prompt(3, 300), 3);
  ASSERT_TRUE(controls_->WaitHeld());
  auto bad = Submit("bad", {5, 6, kNanToken}, 5);  // in one step with the next
  auto good = Submit("good", Prompt(6), 5);
  controls_->Free();
  ASSERT_TRUE(bad->WaitFinished());
  ASSERT_TRUE(good->WaitFinished());
  ASSERT_TRUE(first->WaitFinished());
  EXPECT_EQ(bad->result.reason, FinishReason::kError);
  EXPECT_THAT(std::string(bad->result.status.message()), HasSubstr("nan"));
  EXPECT_EQ(first->ids(), Continue(Prompt(3, 300), 3));
  EXPECT_EQ(good->ids(), Continue(Prompt(6), 5));
}

TEST_F(EngineTest, SequenceThatCannotBeComputedDoesNotTakeTheBatchDown) {
  Start();
  controls_->Allow(0);
  auto a = Submit("a", Prompt(5, 200), 4);
  ASSERT_TRUE(controls_->WaitHeld());
  auto bad = Submit("bad", {5, kFailToken, 6}, 5);
  auto b = Submit("b", Prompt(6), 5);
  controls_->Free();
  ASSERT_TRUE(bad->WaitFinished());
  EXPECT_EQ(bad->result.reason, FinishReason::kError);
  EXPECT_THAT(std::string(bad->result.status.message()), HasSubstr("cannot compute this token"));
  ASSERT_TRUE(a->WaitFinished());
  ASSERT_TRUE(b->WaitFinished());
  EXPECT_EQ(a->ids(), Continue(Prompt(5, 200), 4));
  EXPECT_EQ(b->ids(), Continue(Prompt(6), 5));
}

TEST_F(EngineTest, AnswerThatFindsNoBlockEndsAlone) {
  Start({.max_batch = 4, .max_step_tokens = 16, .max_waiting = 8}, /*slots=*/5);
  auto a = Submit("a", Prompt(8), 100);  // outgrows five blocks of four
  ASSERT_TRUE(a->WaitFinished());
  EXPECT_EQ(a->result.reason, FinishReason::kError);
  EXPECT_EQ(a->result.status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(a->ids(), Continue(Prompt(8), 13));  // 20 computed, and one more drawn
  a->result.blocks.clear();
  auto b = Submit("b", Prompt(5), 3);
  ASSERT_TRUE(b->WaitFinished());
  EXPECT_EQ(b->ids(), Continue(Prompt(5), 3));
}

// Published blocks without a lease make room for new sequences, and are computed again when needed.
TEST_F(EngineTest, EvictedPrefixIsAMissAndTheAnswerTheSame) {
  Start({.max_batch = 1, .max_step_tokens = 16, .max_waiting = 8}, /*slots=*/4);
  for (int round = 0; round < 3; ++round) {
    for (const int32_t from : {1, 100, 200}) {
      auto s = Submit("r", Prompt(9, from), 4);
      ASSERT_TRUE(s->WaitFinished());
      EXPECT_EQ(s->ids(), Continue(Prompt(9, from), 4));
      s->result.blocks.clear();
      ASSERT_TRUE(engine_->WaitIdle(absl::Seconds(60)));
    }
  }
}

TEST_F(EngineTest, BadRequestsAreRefusedByFieldValueAndLimit) {
  Start();
  auto error = [&](auto edit) {
    SequenceSpec spec;
    auto sink = MakeSpec(spec, "x", Prompt(6), 4);
    edit(spec);
    const absl::Status s = engine_->Submit(std::move(spec));
    EXPECT_EQ(s.code(), absl::StatusCode::kInvalidArgument);
    return std::string(s.message());
  };
  EXPECT_THAT(error([](SequenceSpec& s) { s.tokens.clear(); }), HasSubstr("prompt is empty"));
  EXPECT_THAT(error([](SequenceSpec& s) { s.tokens[2] = 1000; }),
              HasSubstr("prompt[2] is 1000; the vocabulary is [0, 1000)"));
  EXPECT_THAT(error([](SequenceSpec& s) { s.tokens[0] = -1; }), HasSubstr("prompt[0] is -1"));
  EXPECT_THAT(error([](SequenceSpec& s) { s.max_tokens = 0; }), HasSubstr("max_tokens is 0"));
  EXPECT_THAT(error([](SequenceSpec& s) { s.max_tokens = 251; }), HasSubstr("max_model_len 256"));
  EXPECT_THAT(error([](SequenceSpec& s) { s.max_tokens = 0xffffffff; }), HasSubstr("max_model_len 256"));
  EXPECT_THAT(error([](SequenceSpec& s) { s.blocks.pop_back(); }), HasSubstr("blocks holds 1"));
  EXPECT_THAT(error([](SequenceSpec& s) { s.blocks[0] = BlockLease(); }), HasSubstr("empty"));
  EXPECT_THAT(error([](SequenceSpec& s) { s.computed_tokens = 6; }), HasSubstr("computed_tokens is 6"));
  EXPECT_THAT(error([](SequenceSpec& s) { s.published_blocks = 1; }), HasSubstr("in [4, 5]"));
  EXPECT_THAT(error([](SequenceSpec& s) { s.first_token.emplace().id = 3; }),
              HasSubstr("as first_token is given"));
  EXPECT_THAT(error([](SequenceSpec& s) { s.sampling.temperature = -1; }), HasSubstr("temperature is -1"));
  EXPECT_THAT(error([](SequenceSpec& s) { s.sampling.temperature = std::nanf(""); }),
              HasSubstr("temperature"));
  EXPECT_THAT(error([](SequenceSpec& s) { s.sampling.top_p = 0; }), HasSubstr("top_p is 0"));
  EXPECT_THAT(error([](SequenceSpec& s) { s.sampling.min_p = 2; }), HasSubstr("min_p is 2"));
  EXPECT_THAT(error([](SequenceSpec& s) { s.sampling.top_k = -1; }), HasSubstr("top_k is -1"));
  EXPECT_THAT(error([](SequenceSpec& s) { s.top_logprobs = 21; }), HasSubstr("top_logprobs is 21"));
  EXPECT_THAT(error([](SequenceSpec& s) { s.stop_token_ids.resize(257); }),
              HasSubstr("stop_token_ids holds 257"));
  EXPECT_THAT(error([](SequenceSpec& s) { s.request_id.clear(); }), HasSubstr("request_id"));
  EXPECT_THAT(error([](SequenceSpec& s) { s.sink = nullptr; }), HasSubstr("sink"));
  EXPECT_EQ(pool_->stats().leased, 0u);
}

// A stop token outside the vocabulary is never drawn, and must not be written as a ban either.
TEST_F(EngineTest, StopTokensOutsideTheVocabularyAreHarmless) {
  Start();
  SequenceSpec spec;
  auto sink = MakeSpec(spec, "a", Prompt(5), 4);
  spec.stop_token_ids = {-5, 1000, 2000000000};
  spec.min_tokens = 2;
  ASSERT_TRUE(engine_->Submit(std::move(spec)).ok());
  ASSERT_TRUE(sink->WaitFinished());
  EXPECT_EQ(sink->ids(), Continue(Prompt(5), 4));
}

TEST_F(EngineTest, RequestIdsAreUniqueWhileTheyLive) {
  Start();
  controls_->Allow(0);
  auto a = Submit("a", Prompt(5), 2);
  SequenceSpec again;
  auto sink = MakeSpec(again, "a", Prompt(5), 2);
  EXPECT_EQ(engine_->Submit(std::move(again)).code(), absl::StatusCode::kAlreadyExists);
  controls_->Free();
  ASSERT_TRUE(a->WaitFinished());
  ASSERT_TRUE(engine_->WaitIdle(absl::Seconds(60)));
  auto later = Submit("a", Prompt(5), 2);
  ASSERT_TRUE(later->WaitFinished());
}

TEST_F(EngineTest, DrainFinishesWhatRunsAndRefusesTheRest) {
  Start();
  controls_->Allow(0);
  auto a = Submit("a", Prompt(5), 4);
  engine_->Drain();
  SequenceSpec late;
  auto sink = MakeSpec(late, "b", Prompt(5), 4);
  EXPECT_EQ(engine_->Submit(std::move(late)).code(), absl::StatusCode::kUnavailable);
  EXPECT_FALSE(engine_->WaitIdle(absl::Milliseconds(1)));
  controls_->Free();
  EXPECT_TRUE(engine_->WaitIdle(absl::Seconds(60)));
  EXPECT_EQ(a->ids(), Continue(Prompt(5), 4));
}

TEST_F(EngineTest, StopEndsEverySequenceExactlyOnce) {
  Start({.max_batch = 2, .max_step_tokens = 8, .max_waiting = 8});
  controls_->Allow(2);
  std::vector<std::shared_ptr<RecordingSink>> sinks;
  for (int i = 0; i < 5; ++i) sinks.push_back(Submit(absl::StrCat("r", i), Prompt(5), 200));
  ASSERT_TRUE(controls_->WaitHeld());
  std::thread stop([&] { engine_->Stop(); });
  // r0 lives: refused as a duplicate, until Stop has begun.
  for (absl::Status s; !absl::IsUnavailable(s);) {
    SequenceSpec again;
    MakeSpec(again, "r0", Prompt(5), 1);
    s = engine_->Submit(std::move(again));
    ASSERT_FALSE(s.ok());
  }
  controls_->Free();
  stop.join();
  engine_->Stop();
  for (auto& s : sinks) {
    EXPECT_EQ(s->finished, 1);
    EXPECT_EQ(s->result.reason, FinishReason::kCancelled);
    EXPECT_EQ(s->result.status.code(), absl::StatusCode::kUnavailable);
    s->result.blocks.clear();
  }
  EXPECT_EQ(pool_->stats().leased, 0u);
}

TEST_F(EngineTest, StatsAndObservationsDescribeTheLoad) {
  Start({.max_batch = 1, .max_step_tokens = 8, .max_waiting = 8});
  controls_->Allow(1);
  auto a = Submit("a", Prompt(20), 3);
  ASSERT_TRUE(controls_->WaitHeld());
  auto b = Submit("b", Prompt(6), 3);
  const EngineStats s = engine_->stats();
  EXPECT_EQ(s.running, 1u);
  EXPECT_EQ(s.waiting, 1u);
  EXPECT_EQ(s.queued_prefill_tokens, 12u + 6u);
  EXPECT_EQ(s.running_context_tokens, 8u);
  controls_->Free();
  ASSERT_TRUE(b->WaitFinished());
  ASSERT_TRUE(engine_->WaitIdle(absl::Seconds(60)));
  const EngineObservations o = engine_->DrainObservations();
  ASSERT_EQ(o.prefills.size(), 2u);
  EXPECT_EQ(o.prefills[0].new_tokens, 20u);
  EXPECT_GT(o.prefills[0].seconds, 0);
  ASSERT_EQ(o.decodes.size(), 4u);
  EXPECT_EQ(o.decodes[0].batch, 1u);
  EXPECT_EQ(o.decodes[0].context_tokens, 21u);
  EXPECT_TRUE(engine_->DrainObservations().prefills.empty());
  const std::string m = Metrics();
  EXPECT_THAT(m, HasSubstr("tidepool_generation_tokens_total 6"));
  EXPECT_THAT(m, HasSubstr("tidepool_engine_computed_tokens_total{kind=\"prefill\",role=\"both\"} 26"));
  EXPECT_THAT(m, HasSubstr("tidepool_engine_sequences_total{reason=\"length\",role=\"both\"} 2"));
  EXPECT_THAT(m, HasSubstr("tidepool_requests_waiting{reason=\"capacity\",role=\"both\"} 0"));
}

TEST_F(EngineTest, ImpossibleLimitsAreRefusedAtStart) {
  Start();
  auto start = [&](EngineConfig c) {
    return std::string(Engine::Start({.config = c,
                                      .runner = std::make_unique<KvRunner>(controls_),
                                      .pool = pool_.get(),
                                      .role = "both",
                                      .metrics = &metrics_})
                           .status()
                           .message());
  };
  EXPECT_THAT(start({.max_batch = 0}), HasSubstr("engine.max_batch"));
  EXPECT_THAT(start({.max_waiting = 0}), HasSubstr("engine.max_waiting"));
  EXPECT_THAT(start({.max_batch = 64, .max_step_tokens = 32}), HasSubstr("at least engine.max_batch (64)"));
}

// Random arrivals, lengths, cancels and reuse, from several threads: every request ends once, no block is
// lost, and every finished answer is the right one.
TEST_F(EngineTest, RandomTrafficLosesNothing) {
  Start({.max_batch = 4, .max_step_tokens = 11, .max_waiting = 1000}, /*slots=*/400);
  struct Request {
    std::vector<int32_t> prompt;
    uint32_t max_tokens;
    std::shared_ptr<RecordingSink> sink;
    bool cancelled = false;
  };
  std::vector<Request> requests[3];
  std::vector<std::thread> threads;
  for (int t = 0; t < 3; ++t) {
    threads.emplace_back([&, t] {
      Rng rng(t + 1);
      for (int i = 0; i < 40; ++i) {
        // Few different prompts: prefixes and keys collide all the time.
        Request r{.prompt = Prompt(1 + rng.Below(30), 1 + static_cast<int32_t>(rng.Below(3))),
                  .max_tokens = 1 + static_cast<uint32_t>(rng.Below(20))};
        const std::string id = absl::StrCat(t, "-", i);
        SequenceSpec spec;
        r.sink = std::make_shared<RecordingSink>();
        spec.request_id = id;
        spec.tokens = r.prompt;
        const auto keys = BlockKeys(BlockKey{}, r.prompt, kBlock);
        spec.blocks = pool_->LeasePrefix(
            std::span(keys).first(std::min<size_t>(keys.size(), ReusableBlocks(r.prompt.size(), kBlock))));
        spec.published_blocks = static_cast<uint32_t>(spec.blocks.size());
        spec.computed_tokens = spec.published_blocks * kBlock;
        auto own = pool_->Reserve((r.prompt.size() + kBlock - 1) / kBlock - spec.blocks.size());
        ASSERT_TRUE(own.ok()) << own.status();
        for (BlockLease& l : *own) spec.blocks.push_back(std::move(l));
        spec.sampling.temperature = 0;
        spec.max_tokens = r.max_tokens;
        spec.priority = static_cast<int32_t>(rng.Below(3));
        spec.sink = r.sink;
        ASSERT_TRUE(engine_->Submit(std::move(spec)).ok());
        if (rng.Chance(0.2)) r.cancelled = engine_->Cancel(id);
        requests[t].push_back(std::move(r));
        if (rng.Chance(0.3)) {
          ASSERT_TRUE(requests[t].back().sink->WaitFinished());
          requests[t].back().sink->result.blocks.clear();
        }
      }
    });
  }
  for (auto& t : threads) t.join();
  ASSERT_TRUE(engine_->WaitIdle(absl::Seconds(60)));
  for (auto& list : requests) {
    for (Request& r : list) {
      ASSERT_EQ(r.sink->finished, 1);
      const auto want = Continue(r.prompt, r.max_tokens);
      const auto got = r.sink->ids();
      if (r.sink->result.reason == FinishReason::kLength) {
        EXPECT_EQ(got, want);
      } else {
        EXPECT_TRUE(r.cancelled);
        EXPECT_EQ(got, std::vector<int32_t>(want.begin(), want.begin() + got.size()));
      }
      r.sink->result.blocks.clear();
    }
  }
  EXPECT_EQ(pool_->stats().leased, 0u);
}

TEST_F(EngineTest, PenaltiesCountPromptAndAnswer) {
  Start();
  const std::vector<int32_t> prompt = Prompt(5);
  // The likeliest token has logit 10, the next 5, all others 0: a bias makes it repeat, a penalty stops it.
  SequenceSpec spec;
  auto sink = MakeSpec(spec, "a", prompt, 6);
  spec.sampling.logit_bias = {{950, 30.0f}};
  spec.sampling.frequency_penalty = 8;  // 30, 22, 14, then 6 < 10
  ASSERT_TRUE(engine_->Submit(std::move(spec)).ok());
  ASSERT_TRUE(sink->WaitFinished());
  const std::vector<int32_t> ids = sink->ids();
  ASSERT_EQ(ids.size(), 6u);
  EXPECT_EQ(std::vector<int32_t>(ids.begin(), ids.begin() + 3), (std::vector<int32_t>{950, 950, 950}));
  EXPECT_NE(ids[3], 950);

  // Repetition counts the prompt, too: 30 / 4 is less than 10.
  const auto first = [&](const std::string& id, float repetition) {
    SequenceSpec again;
    auto again_sink = MakeSpec(again, id, prompt, 1);
    again.sampling.logit_bias = {{prompt[2], 30.0f}};
    again.sampling.repetition_penalty = repetition;
    EXPECT_TRUE(engine_->Submit(std::move(again)).ok());
    EXPECT_TRUE(again_sink->WaitFinished());
    return again_sink->ids();
  };
  EXPECT_THAT(first("b", 1), ElementsAre(prompt[2]));
  EXPECT_THAT(first("c", 4), ElementsAre(Next(prompt)));
}

TEST_F(EngineTest, TheTokenDrawnElsewhereCountsForPenaltiesAndBadWords) {
  Start();
  const std::vector<int32_t> prompt = Prompt(5);
  const auto run = [&](const std::string& id, bool handed_over) {
    SequenceSpec spec;
    auto sink = MakeSpec(spec, id, prompt, 4);
    spec.sampling.logit_bias = {{950, 30.0f}};
    spec.sampling.bad_words = {{950, 950}};
    if (handed_over) {
      // The prompt's KV, as another engine would have filled it in.
      for (size_t i = 0; i < prompt.size(); ++i) {
        reinterpret_cast<int32_t*>(spec.blocks[i / kBlock].data().data())[i % kBlock] = prompt[i];
      }
      spec.computed_tokens = static_cast<uint32_t>(prompt.size());
      spec.first_token.emplace().id = 950;
    }
    EXPECT_TRUE(engine_->Submit(std::move(spec)).ok());
    EXPECT_TRUE(sink->WaitFinished());
    return sink->ids();
  };
  const std::vector<int32_t> here = run("a", false);
  ASSERT_EQ(here.size(), 4u);
  EXPECT_EQ(here[0], 950);
  EXPECT_NE(here[1], 950) << "950 950 is banned";
  EXPECT_EQ(here[2], 950);
  EXPECT_EQ(run("b", true), here);
}

TEST_F(EngineTest, ScoresEveryTokenOfThePromptInAnyChunks) {
  // Chunks of the step's budget, pieces of max_batch rows: neither shows.
  Start({.max_batch = 3, .max_step_tokens = 7, .max_waiting = 8});
  std::vector<int32_t> prompt = {5, 6};
  prompt.push_back(Next(prompt));                              // the likeliest
  prompt.push_back((Next(prompt) + 1) % 900);                  // the second
  for (int32_t i = 0; i < 30; ++i) prompt.push_back(910 + i);  // far down
  auto other = Submit("other", Prompt(20, 300), 40);
  SequenceSpec spec;
  auto sink = MakeSpec(spec, "a", prompt, 3);
  spec.prompt_logprobs = 2;
  ASSERT_TRUE(engine_->Submit(std::move(spec)).ok());
  ASSERT_TRUE(sink->WaitFinished());
  ASSERT_TRUE(other->WaitFinished());
  EXPECT_EQ(other->ids(), Continue(Prompt(20, 300), 40)) << "whoever is in the batch beside it";
  EXPECT_EQ(sink->ids(), Continue(prompt, 3));
  ASSERT_EQ(sink->prompt_scores.size(), prompt.size() - 1);
  const double lse = std::log(std::exp(10.0) + std::exp(5.0) + kVocab - 2);
  for (size_t i = 1; i < prompt.size(); ++i) {
    const PromptLogprob& score = sink->prompt_scores[i - 1];
    const std::vector<int32_t> before(prompt.begin(), prompt.begin() + static_cast<std::ptrdiff_t>(i));
    ASSERT_EQ(score.top.size(), 2u);
    EXPECT_EQ(score.top[0].id, Next(before)) << i;
    EXPECT_NEAR(score.top[0].logprob, 10 - lse, 1e-4);
    EXPECT_EQ(score.top[1].id, (Next(before) + 1) % 900);
  }
  EXPECT_EQ(sink->prompt_scores[1].rank, 1u);
  EXPECT_EQ(sink->prompt_scores[2].rank, 2u);
  EXPECT_GT(sink->prompt_scores[4].rank, 800u);
  EXPECT_NEAR(sink->prompt_scores[4].logprob, 0 - lse, 1e-4);
  EXPECT_LT(sink->order.rfind('p'), sink->order.find('t')) << "before the first token";
}

TEST_F(EngineTest, AScoredPromptThatFailsEndsAlone) {
  Start();
  auto good = Submit("good", Prompt(6), 5);
  std::vector<int32_t> prompt = Prompt(6, 100);
  prompt[3] = kFailToken;
  SequenceSpec spec;
  auto sink = MakeSpec(spec, "bad", prompt, 3);
  spec.prompt_logprobs = 0;
  ASSERT_TRUE(engine_->Submit(std::move(spec)).ok());
  ASSERT_TRUE(sink->WaitFinished());
  EXPECT_EQ(sink->result.reason, FinishReason::kError);
  ASSERT_TRUE(good->WaitFinished());
  EXPECT_EQ(good->ids(), Continue(Prompt(6), 5));
}

TEST_F(EngineTest, SamplingOutOfRangeIsRefusedByName) {
  Start();
  const struct {
    const char* name;
    std::function<void(SequenceSpec&)> set;
  } cases[] = {
      {"typical_p", [](SequenceSpec& s) { s.sampling.typical_p = 0; }},
      {"repetition_penalty", [](SequenceSpec& s) { s.sampling.repetition_penalty = 0; }},
      {"presence_penalty", [](SequenceSpec& s) { s.sampling.presence_penalty = std::nanf(""); }},
      {"frequency_penalty", [](SequenceSpec& s) { s.sampling.frequency_penalty = INFINITY; }},
      {"logit_bias",
       [](SequenceSpec& s) {
         s.sampling.logit_bias = {{1000, 1}};
       }},
      {"logit_bias",
       [](SequenceSpec& s) {
         s.sampling.logit_bias = {{1, INFINITY}};
       }},
      {"allowed_token_ids", [](SequenceSpec& s) { s.sampling.allowed_token_ids = {-1}; }},
      {"bad_words", [](SequenceSpec& s) { s.sampling.bad_words = {{}}; }},
      {"bad_words",
       [](SequenceSpec& s) {
         s.sampling.bad_words = {{1, 1000}};
       }},
      {"prompt_logprobs", [](SequenceSpec& s) { s.prompt_logprobs = 21; }},
      {"prompt_logprobs",
       [](SequenceSpec& s) {
         s.prompt_logprobs = 1;
         s.prefill_only = true;
       }},
  };
  for (const auto& c : cases) {
    SequenceSpec spec;
    MakeSpec(spec, "x", Prompt(4), 2);
    c.set(spec);
    const absl::Status status = engine_->Submit(std::move(spec));
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << c.name;
    EXPECT_THAT(std::string(status.message()), HasSubstr(c.name));
  }
}

// ---- layers of the last chunk

TEST_F(EngineTest, LastChunkIsAnnouncedWithItsBlocksBeforeItsLayersAndItsToken) {
  Start({.max_batch = 4, .max_step_tokens = 8, .max_waiting = 8});
  SequenceSpec spec;
  auto sink = MakeSpec(spec, "r", Prompt(22), 1);  // chunks of 8, 8 and 6: a block, and a tail of 2
  spec.prefill_only = true;
  spec.stream_layers = true;
  std::vector<const std::byte*> bases;
  for (const BlockLease& block : spec.blocks) bases.push_back(block.data().data());
  ASSERT_TRUE(engine_->Submit(std::move(spec)).ok());
  ASSERT_TRUE(sink->WaitFinished());
  EXPECT_EQ(sink->order, "bbbbclbtf");
  EXPECT_EQ(sink->last_chunk_first, 4u);
  ASSERT_EQ(sink->last_chunk.size(), 2u) << "the tail is one of them";
  EXPECT_EQ(sink->last_chunk[0].data().data(), bases[4]);
  EXPECT_EQ(sink->last_chunk[1].data().data(), bases[5]);
  EXPECT_EQ(sink->layers, std::vector<uint32_t>{1});
  sink->last_chunk.clear();
}

TEST_F(EngineTest, LayersAreNotToldToWhoDoesNotAsk) {
  Start();
  auto sink = Submit("r", Prompt(10), 2);
  ASSERT_TRUE(sink->WaitFinished());
  EXPECT_EQ(sink->order, "bbttf");
}

TEST_F(EngineTest, LayersOfAFailedStepAreTakenBack) {
  struct Case {
    int32_t fails;
    FinishReason good;
    std::vector<uint32_t> layers;
  };
  for (const Case& c : {Case{kFailEarlyToken, FinishReason::kPrefilled, {0}},
                        // Its blocks may be read by others already: they are not written again.
                        Case{kFailToken, FinishReason::kError, {1, 0}}}) {
    SCOPED_TRACE(c.fails);
    engine_.reset();
    Start();
    controls_->Allow(0);
    SequenceSpec spec;
    auto sink = MakeSpec(spec, "r", Prompt(6), 1);
    spec.prefill_only = true;
    spec.stream_layers = true;
    ASSERT_TRUE(engine_->Submit(std::move(spec)).ok());
    ASSERT_TRUE(controls_->WaitHeld());
    // These join the batch together, behind the held step's sequence.
    SequenceSpec good, bad;
    auto good_sink = MakeSpec(good, "good", Prompt(6, 100), 1);
    good.prefill_only = good.stream_layers = true;
    auto bad_sink = MakeSpec(bad, "bad", {1, 2, c.fails}, 1);
    SequenceSpec silent;
    auto silent_sink = MakeSpec(silent, "silent", Prompt(5, 200), 1);
    ASSERT_TRUE(engine_->Submit(std::move(good)).ok());
    ASSERT_TRUE(engine_->Submit(std::move(bad)).ok());
    ASSERT_TRUE(engine_->Submit(std::move(silent)).ok());
    controls_->Free();
    for (auto* s : {good_sink.get(), bad_sink.get(), silent_sink.get()}) ASSERT_TRUE(s->WaitFinished());
    EXPECT_EQ(good_sink->layers, c.layers) << "a repeated step says nothing more";
    EXPECT_EQ(good_sink->result.reason, c.good);
    EXPECT_EQ(bad_sink->result.reason, FinishReason::kError);
    EXPECT_EQ(silent_sink->result.reason, FinishReason::kLength) << "nobody else reads what it computes";
    for (auto* s : {sink.get(), good_sink.get(), bad_sink.get(), silent_sink.get()}) {
      s->last_chunk.clear();
      s->result.blocks.clear();
    }
  }
}

// ---- what is remembered of blocks

TEST_F(EngineTest, SealedBlocksCarryWhoseTheyAreAndWhatTheyCost) {
  Start();
  SequenceSpec spec;
  auto sink = MakeSpec(spec, "r", Prompt(10), 8);
  spec.tenant = "tenant";
  spec.session = 5;
  spec.turn = 2;
  ASSERT_TRUE(engine_->Submit(std::move(spec)).ok());
  ASSERT_TRUE(sink->WaitFinished());
  ASSERT_EQ(sink->sealed.size(), 4u) << "two of the prompt, two with the answer";
  std::vector<int32_t> tokens = Prompt(10);
  for (int32_t id : sink->ids()) tokens.push_back(id);
  for (uint32_t i = 0; i < 4; ++i) {
    const auto info = pool_->Info(sink->sealed[i].second);
    ASSERT_TRUE(info.has_value());
    EXPECT_EQ(info->tenant, "tenant");
    EXPECT_EQ(info->session, 5u);
    EXPECT_EQ(info->turn, 2u);
    EXPECT_EQ(info->position, i);
    EXPECT_EQ(info->tokens,
              std::vector<int32_t>(tokens.begin() + i * kBlock, tokens.begin() + (i + 1) * kBlock));
    EXPECT_EQ(info->parent, i == 0 ? BlockKey{} : sink->sealed[i - 1].second);
    EXPECT_GT(info->compute_seconds, 0);
  }
}

TEST_F(EngineTest, AFetchedBlockThatWasClearedMeanwhileIsReadAndNotPublished) {
  Start();
  const std::vector<int32_t> prompt = Prompt(14);
  SequenceSpec spec;
  auto sink = MakeSpec(spec, "r", prompt, 4);
  for (uint32_t i = 0; i < 2; ++i)
    std::memcpy(spec.blocks[i].data().data(), prompt.data() + size_t{i} * kBlock, kBlock * sizeof(int32_t));
  spec.computed_tokens = 2 * kBlock;
  const std::vector<BlockKey> keys = BlockKeys({}, prompt, kBlock);
  pool_->Erase(std::span(keys).first(1));
  ASSERT_TRUE(engine_->Submit(std::move(spec)).ok());
  ASSERT_TRUE(sink->WaitFinished());
  EXPECT_EQ(sink->ids(), Continue(prompt, 4));
  EXPECT_FALSE(pool_->Info(keys[0]).has_value()) << "the clear holds";
  EXPECT_TRUE(pool_->Info(keys[1]).has_value());
  EXPECT_TRUE(pool_->Info(keys[2]).has_value()) << "computed here, after it";
  ASSERT_GE(sink->sealed.size(), 2u);
  EXPECT_EQ(sink->sealed[0].first, 1u) << "nobody is told of it as published";
}

TEST_F(EngineTest, BlocksOfAnotherProcessAreReadAndNeitherPublishedNorWritten) {
  Start();
  const std::vector<int32_t> prompt = Prompt(22);
  PeerMemory foreign(prompt);
  const auto before = foreign.bytes();
  SequenceSpec spec;
  auto sink = MakeSpec(spec, "r", prompt, 4);
  // Blocks 0, 1 and 3 are read there, 2 was fetched into a slot of this process, the rest is computed.
  std::memcpy(spec.blocks[2].data().data(), prompt.data() + 2 * kBlock, kBlock * sizeof(int32_t));
  for (uint32_t i : {0u, 1u, 3u}) spec.blocks[i] = BlockLease();
  spec.in_place.push_back({0, foreign.Run(0, 2)});
  spec.in_place.push_back({3, foreign.Run(3, 4)});
  spec.computed_tokens = 4 * kBlock;
  ASSERT_TRUE(engine_->Submit(std::move(spec)).ok());
  ASSERT_TRUE(sink->WaitFinished());
  EXPECT_EQ(sink->ids(), Continue(prompt, 4));
  const std::vector<BlockKey> keys = BlockKeys({}, prompt, kBlock);
  for (uint32_t i = 0; i < keys.size(); ++i) {
    const bool here = i == 2 || i == 4;
    EXPECT_EQ(pool_->Info(keys[i]).has_value(), here) << i;
  }
  ASSERT_GE(sink->sealed.size(), 2u);
  EXPECT_EQ(sink->sealed[0].first, 2u);
  EXPECT_EQ(sink->sealed[1].first, 4u);
  EXPECT_EQ(foreign.bytes(), before);
  EXPECT_EQ(foreign.leases, 2);
  sink->result = {};
  EXPECT_EQ(foreign.leases, 0);
}

TEST_F(EngineTest, BlocksOfAnotherProcessAreRefusedWhereTheyWouldBeWritten) {
  Start();
  const std::vector<int32_t> prompt = Prompt(22);
  PeerMemory foreign(prompt);
  struct Case {
    uint32_t published, begin, end;
    const char* error;
  };
  for (const Case& c :
       {Case{0, 2, 4, "in_place holds blocks [2, 4)"}, Case{2, 1, 3, "in_place holds blocks [1, 3)"},
        Case{0, 1, 1, "in_place holds blocks [1, 1)"}}) {
    SequenceSpec bad;
    auto sink = MakeSpec(bad, "bad", prompt, 4);
    bad.in_place.push_back({c.begin, foreign.Run(c.begin, c.end)});
    bad.published_blocks = c.published;
    bad.computed_tokens = 3 * kBlock;
    const absl::Status status = engine_->Submit(std::move(bad));
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_NE(status.message().find(c.error), std::string::npos) << status;
  }
  SequenceSpec twice;
  auto sink = MakeSpec(twice, "twice", prompt, 4);
  twice.in_place.push_back({0, foreign.Run(0, 2)});
  twice.in_place.push_back({1, foreign.Run(1, 3)});
  twice.computed_tokens = 3 * kBlock;
  EXPECT_EQ(engine_->Submit(std::move(twice)).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(foreign.leases, 0);
}

}  // namespace
}  // namespace tidepool
