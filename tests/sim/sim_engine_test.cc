#include "tools/simulate/sim_engine.h"

#include <gtest/gtest.h>

#include <map>
#include <memory>
#include <vector>

#include "tests/sim/sim_builder.h"

namespace tidepool {
namespace {

// Runs an engine to its end; what is added comes when the test says.
class EngineTest : public testing::Test {
 protected:
  void Kick() {
    begun_.clear();
    engine_->Kick(now_, begun_);
  }
  // Ends the present step. Prefilled ones go on to decode `outputs_[id] - 1` tokens, if any.
  void Step() {
    now_ = engine_->end();
    SimEngine::Outcome out;
    engine_->End(out);
    for (const auto& p : out.prefilled) {
      first_[p.id] = now_;
      samples_[p.id] = p.sample;
      if (outputs_[p.id] > 1) {
        engine_->Decode(p.id, outputs_[p.id] - 1, now_);
      } else {
        engine_->Remove(p.id);
        ended_[p.id] = now_;
      }
    }
    for (const uint64_t id : out.finished) ended_[id] = now_;
    Kick();
  }
  void Run() {
    Kick();
    while (engine_->end() != SimEngine::kIdle) Step();
  }
  void Prefill(uint64_t id, uint32_t fresh, uint32_t outputs, uint32_t cached = 0) {
    outputs_[id] = outputs;
    engine_->AddPrefill(id, cached, fresh, {}, now_);
  }

  WorkerProfile profile_ = TestProfile();
  WeightedHistogram gaps_;
  std::unique_ptr<SimEngine> engine_ = std::make_unique<SimEngine>(profile_, 1, &gaps_);
  SimTime now_ = 0;
  std::vector<uint64_t> begun_;
  std::map<uint64_t, uint32_t> outputs_;
  std::map<uint64_t, SimTime> first_, ended_;
  std::map<uint64_t, PrefillSample> samples_;
};

TEST_F(EngineTest, APromptTakesWhatTheProfileSays) {
  Prefill(1, 600, 1, 64);
  Run();
  EXPECT_NEAR(ToSeconds(first_[1]), profile_.PrefillSeconds(600, 64), 1e-8);
  EXPECT_NEAR(samples_[1].seconds, profile_.PrefillSeconds(600, 64), 1e-8);
  EXPECT_EQ(samples_[1].new_tokens, 600u);
  EXPECT_EQ(samples_[1].cached_tokens, 64u);
}

TEST_F(EngineTest, AGroupOfDecodesTakesAsLongAsItsSteps) {
  engine_->AddDecode(1, 1000, 50, {}, 0);
  engine_->AddDecode(2, 500, 20, {}, 0);
  Run();
  double t = 0;
  uint64_t context = 1500;
  for (int step = 0; step < 50; ++step) {
    const uint64_t batch = step < 20 ? 2 : 1;
    t += profile_.DecodeStepSeconds(batch, context);
    context += batch;
    if (step == 19) {
      EXPECT_NEAR(ToSeconds(ended_[2]), t, 1e-6);
      context -= 520;
    }
  }
  EXPECT_NEAR(ToSeconds(ended_[1]), t, 1e-6);
  EXPECT_EQ(engine_->sequences(), 0u);
  EXPECT_EQ(engine_->context_tokens(now_), 0u);
}

TEST_F(EngineTest, ANewcomerWaitsForTheStepAtHandOnly) {
  engine_->AddDecode(1, 1000, 1000, {}, 0);
  Kick();
  Step();  // joins
  const double step = profile_.DecodeStepSeconds(1, 1000);
  const SimTime group_began = now_;
  now_ += FromSeconds(step * 10.5);
  engine_->AddDecode(2, 100, 5, {}, now_);
  Kick();
  EXPECT_NEAR(ToSeconds(engine_->end() - group_began), step * 11, step * 0.1);
  Step();
  while (!ended_.contains(2)) Step();
  EXPECT_NEAR(ToSeconds(ended_[2] - group_began), step * 16, step * 0.4);
  while (!ended_.contains(1)) Step();
  EXPECT_NEAR(gaps_.weight(), 1005, 1e-6) << "one gap for each token";
}

TEST_F(EngineTest, GroupedStepsEqualSingleOnes) {
  // The same load with a prompt that is cut into single steps all along, and without: every token comes, in
  // as many steps; with it the steps are longer.
  for (uint64_t seed = 1; seed <= 20; ++seed) {
    SCOPED_TRACE(seed);
    Rng rng(seed);
    engine_ = std::make_unique<SimEngine>(profile_, 1, &gaps_);
    gaps_ = {};
    ended_.clear();
    now_ = 0;
    uint64_t tokens = 0;
    for (uint64_t id = 1; id <= 30; ++id) {
      const auto n = static_cast<uint32_t>(1 + rng.Below(60));
      if (rng.Chance(0.5)) {
        Prefill(id, static_cast<uint32_t>(1 + rng.Below(900)), n);
        tokens += n - 1;
      } else {
        engine_->AddDecode(id, static_cast<uint32_t>(rng.Below(2000)), n, {.batch_class = rng.Chance(0.3)},
                           now_);
        tokens += n;
      }
      Kick();
      for (uint64_t steps = rng.Below(4); steps > 0 && engine_->end() != SimEngine::kIdle; --steps) Step();
    }
    Run();
    EXPECT_EQ(ended_.size(), 30u);
    EXPECT_NEAR(gaps_.weight(), static_cast<double>(tokens), 1e-6);
    EXPECT_EQ(engine_->sequences(), 0u);
    EXPECT_EQ(engine_->running(), 0u);
    EXPECT_EQ(engine_->decoding(), 0u);
    EXPECT_EQ(engine_->context_tokens(now_), 0u);
  }
}

TEST_F(EngineTest, OnlineSequencesTakeThePlacesOfTheBatchClass) {
  for (uint64_t id = 1; id <= 8; ++id) engine_->AddDecode(id, 100, 1000, {.batch_class = true}, 0);
  Kick();
  Step();
  EXPECT_EQ(engine_->decoding(), 8u);
  engine_->AddDecode(9, 100, 10, {}, now_);
  Kick();
  while (!ended_.contains(9)) Step();
  EXPECT_LT(ToSeconds(ended_[9]), 0.2);
  Run();
  EXPECT_EQ(ended_.size(), 9u);
  EXPECT_NEAR(gaps_.weight(), 8010, 1e-6);
}

// What is drawn in groups of steps counts as if every step had been planned.
TEST_F(EngineTest, LongAnswersCountAgainstTheirTenant) {
  for (const bool fair : {true, false}) {
    profile_.max_batch = 1;
    engine_ = std::make_unique<SimEngine>(profile_, 1, &gaps_,
                                          fair ? FairQueue::Order::kVtc : FairQueue::Order::kFcfs);
    ended_.clear();
    now_ = 0;
    engine_->AddDecode(1, 100, 1000, {.tenant = "a"}, now_);
    Kick();
    // They come while the first has drawn nothing; b is not lifted to what a is given later.
    for (const uint64_t id : {2, 3, 4}) {
      outputs_[id] = 1;
      engine_->AddPrefill(id, 0, 400, {.tenant = id == 2 ? "a" : "b"}, now_);
    }
    Run();
    std::map<SimTime, uint64_t> order;
    for (const auto& [id, at] : ended_) order[at] = id;
    std::vector<uint64_t> ids;
    for (const auto& [at, id] : order) ids.push_back(id);
    EXPECT_EQ(ids, fair ? (std::vector<uint64_t>{1, 3, 4, 2}) : (std::vector<uint64_t>{1, 2, 3, 4}));
  }
}

TEST_F(EngineTest, WhatIsRemovedLeavesNothingBehind) {
  Prefill(1, 1000, 10);
  engine_->AddDecode(2, 100, 30, {}, 0);
  Kick();
  engine_->Remove(1);  // in the middle of its step
  Step();
  now_ += FromSeconds(0.02);
  EXPECT_GT(engine_->TokensLeft(2, now_), 20u);
  engine_->Remove(2);  // in the middle of a group
  Run();
  EXPECT_EQ(engine_->sequences(), 0u);
  EXPECT_EQ(engine_->context_tokens(now_), 0u);
  EXPECT_EQ(engine_->queued_prefill_tokens(), 0u);
}

}  // namespace
}  // namespace tidepool
