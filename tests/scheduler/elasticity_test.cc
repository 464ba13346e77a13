#include "scheduler/elasticity.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <set>
#include <string>
#include <vector>

#include "tests/scheduler/cluster_builder.h"

namespace tidepool {
namespace {

using testing::HasSubstr;

constexpr double kTtft = 2, kItl = 0.05;

// A cluster whose load is given in workers' worth: what `prefill` workers can compute arrives, and decode
// steps take as long as `decode` workers at their objective would. Does what is advised, as workers would.
class ElasticityTest : public testing::Test {
 protected:
  void Workers(int prefill, int decode, int both = 0) {
    for (int i = 0; i < prefill; ++i) Add("p" + std::to_string(i), Role::kPrefill);
    for (int i = 0; i < decode; ++i) Add("d" + std::to_string(i), Role::kDecode);
    for (int i = 0; i < both; ++i) Add("x" + std::to_string(i), Role::kBoth);
  }
  void Add(const std::string& id, Role role) {
    load_.workers.push_back({.id = id, .role = role, .next_role = {}, .ready = true});
  }
  ElasticityLoad::Worker& Find(const std::string& id) {
    for (auto& w : load_.workers) {
      if (w.id == id) return w;
    }
    ADD_FAILURE() << "no worker " << id;
    return load_.workers[0];
  }
  void Lose(const std::string& id) {
    std::erase_if(load_.workers, [&](const auto& w) { return w.id == id; });
  }
  uint32_t Count(Role role) const {
    uint32_t n = 0;
    for (const auto& w : load_.workers) n += w.role == role;
    return n;
  }

  ElasticityAdvice Tick(double prefill, double decode) {
    now_ += absl::Seconds(1);
    load_.slo_ttft_seconds = kTtft;
    load_.slo_itl_seconds = kItl;
    load_.decisions.placed += 10;
    load_.decisions.prefill_seconds += prefill;
    load_.decode_floor_seconds = 0;
    load_.decode_step_seconds = decode * kItl;
    return core_.Tick(load_, now_);
  }
  // Ticks for so long and carries out what is advised, each change taking `busy` ticks. Returns the ids that
  // changed.
  std::vector<std::string> Run(int seconds, double prefill, double decode, int busy = 3) {
    std::vector<std::string> changed;
    for (int i = 0; i < seconds; ++i) {
      const ElasticityAdvice advice = Tick(prefill, decode);
      if (changing_.empty() && !advice.worker.empty()) {
        core_.OnOrdered(advice.worker, /*taken=*/true, now_);
        changing_ = advice.worker;
        left_ = busy;
        Find(changing_).next_role = advice.role;
        Find(changing_).ready = false;
        changed.push_back(changing_);
      } else if (!changing_.empty()) {
        EXPECT_TRUE(advice.worker.empty()) << "two at a time: " << advice.reason;
        if (--left_ == 0) {
          ElasticityLoad::Worker& w = Find(changing_);
          w.role = *w.next_role;
          w.next_role.reset();
          w.ready = true;
          changing_.clear();
        }
      }
    }
    return changed;
  }

  ElasticityOptions options_;
  ElasticityCore core_{options_};
  ElasticityLoad load_;
  absl::Time now_ = kStart;
  std::string changing_;
  int left_ = 0;
};

TEST_F(ElasticityTest, ALoadThatFitsChangesNothing) {
  Workers(4, 4);
  EXPECT_TRUE(Run(600, 2.5, 2.5).empty());
  EXPECT_THAT(Tick(2.5, 2.5).reason, HasSubstr("neither is short"));
}

TEST_F(ElasticityTest, PrefillThatIsShortGetsWorkersUntilItIsNot) {
  Workers(4, 12);
  Run(1000, 9.6, 1.8);
  // 9.6 workers' worth: ten are above 0.9, and thirteen are the first below 0.75.
  EXPECT_EQ(Count(Role::kPrefill), 13u);
  EXPECT_TRUE(Run(1000, 9.6, 1.8).empty());
  const ElasticityAdvice advice = Tick(9.6, 1.8);
  EXPECT_EQ(advice.wanted_prefill, 13u);
  EXPECT_EQ(advice.wanted_decode, 3u);
}

TEST_F(ElasticityTest, DecodeThatIsShortGetsWorkersUntilItIsNot) {
  Workers(12, 4);
  Run(1000, 1.8, 9.6);
  EXPECT_EQ(Count(Role::kDecode), 13u);
}

TEST_F(ElasticityTest, WhatIsBestIsSaidAlsoWhereNothingIsShortEnoughToGoThere) {
  Workers(6, 10);
  EXPECT_TRUE(Run(300, 5.2, 1.8).empty());
  const ElasticityAdvice advice = Tick(5.2, 1.8);
  EXPECT_EQ(advice.wanted_prefill, 12u);
  EXPECT_EQ(advice.wanted_decode, 4u);
  EXPECT_EQ(advice.worker, "");
}

TEST_F(ElasticityTest, NothingChangesBeforeTheDwellIsOver) {
  Workers(2, 6);
  int ticks = 0;
  while (Tick(3, 1).worker.empty()) ASSERT_LT(++ticks, 60);
  EXPECT_GE(ticks, absl::ToInt64Seconds(options_.dwell));
  EXPECT_LE(ticks, absl::ToInt64Seconds(options_.dwell) * 2);
}

TEST_F(ElasticityTest, ABurstShorterThanTheDwellChangesNothing) {
  Workers(2, 6);
  for (int i = 0; i < 20; ++i) {
    EXPECT_TRUE(Run(4, 4, 1).empty());
    EXPECT_TRUE(Run(30, 0.5, 1).empty());
  }
}

TEST_F(ElasticityTest, ALoadThatSwingsDoesNotMoveWorkersBackAndForth) {
  Workers(4, 4);
  std::vector<std::string> all;
  // Half a minute each: longer than a dwell, shorter than what it takes to change back.
  for (int i = 0; i < 40; ++i) {
    for (const auto& id : Run(30, 4.2, 1.5)) all.push_back(id);
    for (const auto& id : Run(30, 1.5, 4.2)) all.push_back(id);
  }
  // Forty swings, each of which is long enough to move a worker there and back.
  EXPECT_LE(all.size(), 12u);
  EXPECT_GE(Count(Role::kPrefill), 3u);
  EXPECT_GE(Count(Role::kDecode), 3u);
}

TEST_F(ElasticityTest, WhatHasChangedIsNotAskedBackByTheSameLoad) {
  for (double prefill = 0.2; prefill < 8; prefill += 0.37) {
    for (double decode = 0.2; decode < 8; decode += 0.37) {
      core_ = ElasticityCore(options_);
      load_ = {};
      changing_.clear();
      Workers(4, 4);
      const std::vector<std::string> changed = Run(800, prefill, decode);
      const std::set<std::string> once(changed.begin(), changed.end());
      EXPECT_EQ(once.size(), changed.size()) << "prefill " << prefill << ", decode " << decode;
      EXPECT_GE(Count(Role::kPrefill), 1u);
      EXPECT_GE(Count(Role::kDecode), 1u);
    }
  }
}

TEST_F(ElasticityTest, OneChangesBackSoonerThanNeverAndLaterThanTheNext) {
  Workers(2, 6);
  Run(300, 3.1, 1);
  const uint32_t prefill = Count(Role::kPrefill);
  ASSERT_GT(prefill, 2u);
  int ticks = 0;
  while (Run(1, 0.3, 3.6).empty()) ASSERT_LT(++ticks, 200);
  // The last change to prefill ended long ago: only the dwell is waited for.
  EXPECT_LT(ticks, absl::ToInt64Seconds(options_.dwell) * 2);
  Run(10, 0.3, 3.6);
  ticks = 0;
  while (Run(1, 5, 1).empty()) ASSERT_LT(++ticks, 200);
  EXPECT_GT(ticks, absl::ToInt64Seconds(options_.dwell) * 4);
}

TEST_F(ElasticityTest, TheLastWorkerOfAKindStays) {
  Workers(1, 1);
  EXPECT_TRUE(Run(300, 5, 0.1).empty());
  EXPECT_THAT(Tick(5, 0.1).reason, HasSubstr("the last decode worker stays"));
}

TEST_F(ElasticityTest, WorkersOfBothNeverChange) {
  Workers(2, 2, 4);
  for (const std::string& id : Run(600, 9, 0.1)) EXPECT_EQ(id[0], 'd');
  EXPECT_EQ(Count(Role::kBoth), 4u);
}

TEST_F(ElasticityTest, WithOneKindOnlyThereIsNothingToWeigh) {
  Workers(3, 0, 2);
  EXPECT_TRUE(Run(100, 9, 9).empty());
  EXPECT_EQ(Tick(9, 9).wanted_prefill, 3u);
}

TEST_F(ElasticityTest, NobodyGivesAWorkerWhoWouldBeShortWithoutIt) {
  Workers(4, 4);
  EXPECT_TRUE(Run(600, 4, 2.6).empty());
  EXPECT_THAT(Tick(4, 2.6).reason, HasSubstr("with one worker less decode would be at 87%"));
}

TEST_F(ElasticityTest, WhereBothAreShortNothingChanges) {
  Workers(4, 4);
  EXPECT_TRUE(Run(600, 5, 5).empty());
  EXPECT_THAT(Tick(5, 5).reason, HasSubstr("both are short"));
}

TEST_F(ElasticityTest, WhereOneIsFarShorterThanTheOtherItGetsAWorkerAllTheSame) {
  Workers(15, 1);
  Run(600, 12, 2.2);
  // With one decode worker it was at 220%, with two at 110%; with fourteen prefill workers that is 86%.
  EXPECT_EQ(Count(Role::kDecode), 2u);
  EXPECT_TRUE(Run(600, 12, 2.2).empty());
}

TEST_F(ElasticityTest, TheOneWithLeastToFinishChanges) {
  Workers(2, 4);
  for (auto& w : load_.workers) w.work = 1000;
  Find("d2").work = 10;
  const auto changed = Run(60, 4, 0.5);
  ASSERT_FALSE(changed.empty());
  EXPECT_EQ(changed[0], "d2");
}

TEST_F(ElasticityTest, AWorkerThatRefusedIsLeftAlone) {
  Workers(2, 4);
  Find("d2").work = 0;
  for (const char* id : {"d0", "d1", "d3"}) Find(id).work = 5;
  ElasticityAdvice advice;
  for (int i = 0; advice.worker.empty(); ++i) {
    ASSERT_LT(i, 100);
    advice = Tick(4, 0.5);
  }
  ASSERT_EQ(advice.worker, "d2");
  core_.OnOrdered("d2", /*taken=*/false, now_);
  EXPECT_EQ(Tick(4, 0.5).worker, "d0");
}

TEST_F(ElasticityTest, AnOrderThatIsNotConfirmedIsForgotten) {
  Workers(2, 4);
  ElasticityAdvice advice;
  for (int i = 0; advice.worker.empty(); ++i) {
    ASSERT_LT(i, 100);
    advice = Tick(4, 0.5);
  }
  core_.OnOrdered(advice.worker, /*taken=*/true, now_);
  EXPECT_THAT(Tick(4, 0.5).reason, HasSubstr("one does at a time"));
  for (int i = 0; Tick(4, 0.5).worker.empty(); ++i) ASSERT_LT(i, 10);
}

TEST_F(ElasticityTest, AnOperatorsChangeIsWaitedForLikeAnother) {
  Workers(3, 5);
  Run(100, 1, 1);
  Find("d0").role = Role::kPrefill;
  Tick(1, 1);
  // Now decode is short. The worker that somebody has just moved is not moved back at once.
  int ticks = 0;
  while (Run(1, 0.5, 5).empty()) ASSERT_LT(++ticks, 200);
  EXPECT_GT(ticks, absl::ToInt64Seconds(options_.dwell) * 4);
}

TEST_F(ElasticityTest, WorkersThatDrainAreNotCounted) {
  Workers(2, 4);
  Find("d0").ready = false;
  const ElasticityAdvice advice = Tick(1, 1);
  EXPECT_EQ(advice.decode, 3u);
}

TEST_F(ElasticityTest, WhoIsLeavingDecodeStaysWhereTheOtherDies) {
  Workers(2, 2);
  ElasticityAdvice advice;
  for (int i = 0; advice.worker.empty(); ++i) {
    ASSERT_LT(i, 100);
    advice = Tick(4, 0.1);
  }
  ASSERT_EQ(advice.worker, "d0");
  core_.OnOrdered("d0", /*taken=*/true, now_);
  Find("d0").next_role = Role::kPrefill;
  Find("d0").ready = false;
  EXPECT_EQ(Tick(4, 0.1).worker, "");
  Lose("d1");
  advice = Tick(4, 0);
  EXPECT_EQ(advice.worker, "d0");
  EXPECT_EQ(advice.role, Role::kDecode);
  core_.OnOrdered("d0", /*taken=*/true, now_);
  EXPECT_EQ(Tick(4, 0).worker, "") << "it was told, and has not said yet that it stays";
  Find("d0").next_role.reset();
  Find("d0").ready = true;
  EXPECT_EQ(Tick(4, 0).decode, 1u);
}

TEST_F(ElasticityTest, WhoWillNotStayIsReplacedByAPrefillWorker) {
  Workers(2, 1);
  Find("d0").next_role = Role::kPrefill;
  Find("d0").ready = false;
  ASSERT_EQ(Tick(1, 0).worker, "d0");
  core_.OnOrdered("d0", /*taken=*/false, now_);
  const ElasticityAdvice advice = Tick(1, 0);
  EXPECT_EQ(advice.worker, "p0");
  EXPECT_EQ(advice.role, Role::kDecode);
}

TEST_F(ElasticityTest, WhereTheLastDecodeWorkerIsLostAPrefillWorkerTakesItsPlaceAtOnce) {
  for (const int prefill : {1, 2}) {
    for (const int both : {0, 1}) {
      core_ = ElasticityCore(options_);
      load_ = {};
      Workers(prefill, 1, both);
      EXPECT_EQ(Tick(0.1, 0.1).worker, "");
      Lose("d0");
      EXPECT_EQ(Tick(0.1, 0).worker, prefill == 2 && both == 0 ? "p0" : "")
          << prefill << " prefill, " << both << " both";
    }
  }
}

TEST_F(ElasticityTest, DecodeWorkersThatWereNeverHereAreWaitedFor) {
  Workers(3, 0);
  int ticks = 0;
  while (Tick(0.1, 0).worker.empty()) ASSERT_LT(++ticks, 200);
  EXPECT_GE(ticks, options_.back * absl::ToDoubleSeconds(options_.dwell));
}

TEST_F(ElasticityTest, WhatIsRefusedAgainAndAgainIsWorthNineTimesWhatIsServed) {
  Workers(4, 4);
  ElasticityAdvice advice;
  for (int i = 0; i < 200; ++i) {
    load_.decisions.refused_prefill_seconds += 100;
    advice = Tick(0.5, 3.5);
  }
  EXPECT_NEAR(advice.prefill_pressure, 10 * 0.5 / 4, 0.02);
}

TEST_F(ElasticityTest, RefusalsOfAKindMakeItShort) {
  Workers(4, 4);
  std::string worker;
  for (int i = 0; i < 60 && worker.empty(); ++i) {
    load_.decisions.refused_prefill += 1;
    worker = Tick(2, 1).worker;
  }
  EXPECT_EQ(worker[0], 'd');
}

TEST_F(ElasticityTest, WhatWasRefusedWouldHaveToBeDecodedToo) {
  Workers(4, 4);
  // Half of the requests are refused for want of prefill: with room for them decode would have twice as much
  // to do, and no worker to give.
  for (int i = 0; i < 200; ++i) {
    load_.decisions.refused_prefill += 10;
    EXPECT_EQ(Tick(4.4, 1.6).worker, "");
  }
}

TEST_F(ElasticityTest, AQueueIsAsMuchMoreWorkAsWouldClearItInTime) {
  Workers(2, 2);
  load_.prefill_queue_seconds = kTtft;
  ElasticityAdvice advice;
  for (int i = 0; i < 100; ++i) advice = Tick(1, 0.1);
  EXPECT_NEAR(advice.prefill_pressure, (1 + 1) / 2.0, 0.01);
}

TEST_F(ElasticityTest, MemoryCountsWhereNoItlIsAskedFor) {
  Workers(4, 4);
  load_.decode_memory = 3.8;
  std::string worker;
  for (int i = 0; i < 60 && worker.empty(); ++i) {
    now_ += absl::Seconds(1);
    worker = core_.Tick(load_, now_).worker;
  }
  EXPECT_EQ(worker[0], 'p');
}

TEST_F(ElasticityTest, EqualTicksGiveEqualAdvice) {
  Workers(3, 5);
  ElasticityCore other(options_);
  for (int i = 0; i < 200; ++i) {
    const ElasticityAdvice one = Tick(i % 7, (i * 3) % 5);
    const ElasticityAdvice two = other.Tick(load_, now_);
    EXPECT_EQ(one.reason, two.reason);
    EXPECT_EQ(one.prefill_pressure, two.prefill_pressure);
  }
}

// What the core is fed with.
TEST(ElasticityLoadTest, SumsWhatWorkersReportAndWhatWasDecided) {
  SchedulerOptions options;
  options.slo_ttft = absl::Seconds(2);
  options.slo_itl = absl::Milliseconds(50);
  SchedulerCore core(options);
  core.Report(TestReport("p1", Role::kPrefill), kStart);
  auto d1 = TestReport("d1", Role::kDecode);
  d1.load.slots_free = 2500;
  d1.load.running = 4;
  d1.load.running_context_tokens = 8000;
  core.Report(d1, kStart);
  auto d2 = TestReport("d2", Role::kDecode);
  d2.draining = true;
  d2.next_role = Role::kPrefill;
  core.Report(d2, kStart);
  core.Report(TestReport("s", Role::kStore), kStart);
  ElasticityLoad load = core.Elasticity(kStart);
  ASSERT_EQ(load.workers.size(), 3u);
  EXPECT_EQ(load.workers[0].id, "d1");
  EXPECT_TRUE(load.workers[0].ready);
  EXPECT_EQ(load.workers[0].work, 8000u);
  EXPECT_EQ(load.workers[1].next_role, Role::kPrefill);
  EXPECT_FALSE(load.workers[1].ready);
  EXPECT_DOUBLE_EQ(load.decode_memory, 0.75);
  EXPECT_GT(load.decode_step_seconds, load.decode_floor_seconds);
  EXPECT_EQ(load.slo_ttft_seconds, 2);
  EXPECT_EQ(load.decisions.placed, 0u);

  ASSERT_TRUE(core.Place(TestRequest("a", 3200), kStart).placement);
  load = core.Elasticity(kStart);
  EXPECT_EQ(load.decisions.placed, 1u);
  EXPECT_GT(load.decisions.prefill_seconds, 0);
  EXPECT_GT(load.prefill_queue_seconds, 0);
  auto impossible = TestRequest("b", 3200, "y");
  impossible.slo_ttft = absl::Nanoseconds(1);
  ASSERT_TRUE(core.Place(impossible, kStart).rejection);
  EXPECT_EQ(core.Elasticity(kStart).decisions.refused_prefill, 1u);
}

TEST(ElasticityLoadTest, WhatNoNumberOfWorkersWouldMendIsNoShortage) {
  const auto refused = [](absl::Duration ttft, absl::Duration itl, uint32_t running) {
    SchedulerCore core({});
    core.Report(TestReport("p1", Role::kPrefill), kStart);
    auto d = TestReport("d1", Role::kDecode);
    d.load.running = running;
    core.Report(d, kStart);
    auto r = TestRequest("r", 3200);
    r.slo_ttft = ttft;
    r.slo_itl = itl;
    EXPECT_TRUE(core.Place(r, kStart).rejection);
    const DecisionCounts counts = core.Elasticity(kStart).decisions;
    EXPECT_EQ(counts.placed, 0u);
    EXPECT_EQ(counts.prefill_seconds, 0);
    EXPECT_EQ(counts.refused_prefill_seconds > 0, counts.refused_prefill + counts.refused_decode > 0);
    return counts.refused_prefill + counts.refused_decode;
  };
  const absl::Duration none, never = absl::Nanoseconds(1);
  EXPECT_EQ(refused(never, none, 0), 0u);
  EXPECT_EQ(refused(none, never, 0), 0u);
  EXPECT_EQ(refused(none, never, 2), 1u);
}

TEST(ElasticityLoadTest, BatchWorkAsksForNoWorkers) {
  SchedulerCore core({});
  core.Report(TestReport("p1", Role::kPrefill), kStart);
  core.Report(TestReport("d1", Role::kDecode), kStart);
  auto r = TestRequest("r", 3200);
  r.slo_class = SloClass::kBatch;
  ASSERT_TRUE(core.Place(r, kStart).placement);
  r.request_id = "again";
  r.slo_ttft = absl::Nanoseconds(1);
  ASSERT_TRUE(core.Place(r, kStart).rejection);
  const DecisionCounts counts = core.Elasticity(kStart).decisions;
  EXPECT_EQ(counts.placed + counts.refused_prefill + counts.refused_decode, 0u);
  EXPECT_EQ(counts.prefill_seconds + counts.refused_prefill_seconds, 0);
}

TEST(ElasticityLoadTest, WhatWorkersOfBothPrefillIsNotAskedOfPrefillWorkers) {
  SchedulerCore core({});
  core.Report(TestReport("b1", Role::kBoth), kStart);
  ASSERT_TRUE(core.Place(TestRequest("r", 3200), kStart).placement);
  EXPECT_EQ(core.Elasticity(kStart).decisions.placed, 1u);
  EXPECT_EQ(core.Elasticity(kStart).decisions.prefill_seconds, 0);
}

TEST(ElasticityLoadTest, TheObjectivesAreThoseOfTheStandardClass) {
  SchedulerOptions options;
  options.slo_ttft = absl::Seconds(2);
  options.classes[static_cast<size_t>(SloClass::kStandard)].slo_ttft = absl::Seconds(3);
  const ElasticityLoad load = SchedulerCore(options).Elasticity(kStart);
  EXPECT_EQ(load.slo_ttft_seconds, 3);
  EXPECT_EQ(load.slo_itl_seconds, 0) << "none";
}

TEST(ElasticityLoadTest, MemoryThatWaitsForAPrefillIsNotDecodes) {
  SchedulerCore core({});
  core.Report(TestReport("p1", Role::kPrefill), kStart);
  core.Report(TestReport("d1", Role::kDecode), kStart);
  for (int i = 0; i < 10; ++i) {
    ASSERT_TRUE(
        core.Place(TestRequest("r" + std::to_string(i), 3200, "c" + std::to_string(i)), kStart).placement);
  }
  auto report = TestReport("d1", Role::kDecode, 2);
  report.load.slots_free = 0;
  report.load.running = 1;
  core.Report(report, kStart + absl::Seconds(1));
  EXPECT_NEAR(core.Elasticity(kStart + absl::Seconds(1)).decode_memory, 0.1, 1e-9);
}

}  // namespace
}  // namespace tidepool
