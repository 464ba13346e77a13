#include "scheduler/admission.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "scheduler/core.h"
#include "tests/scheduler/cluster_builder.h"

namespace tidepool {
namespace {

using testing::HasSubstr;

struct Load {
  uint64_t queued_tokens = 0;
  uint32_t running = 0;
  uint32_t slots_free = 10'000;
};

SchedulerCore Cluster(const SchedulerOptions& options, const Load& load) {
  SchedulerCore core(options);
  auto p = TestReport("p1", Role::kPrefill);
  p.load.queued_prefill_tokens = load.queued_tokens;
  p.load.waiting = load.queued_tokens > 0 ? 1 : 0;
  auto d = TestReport("d1", Role::kDecode);
  d.load.running = load.running;
  d.load.running_context_tokens = load.running * 1000;
  d.load.slots_free = load.slots_free;
  core.Report(p, kStart);
  core.Report(d, kStart);
  return core;
}

PlaceResult PlaceUnder(const SchedulerOptions& options, const Load& load) {
  return Cluster(options, load).Place(TestRequest("r", 640), kStart);
}

TEST(Admission, NothingIsRejectedEarlyWithoutAnSlo) {
  EXPECT_TRUE(PlaceUnder({}, {.queued_tokens = 10'000'000, .running = 1000}).placement.has_value());
}

TEST(Admission, MissedTtftIsRejectedWithASentenceAndADrainEstimate) {
  SchedulerOptions options;
  options.slo_ttft = absl::Seconds(1);
  const auto result = PlaceUnder(options, {.queued_tokens = 50'000});
  EXPECT_EQ(result.status.code(), absl::StatusCode::kResourceExhausted);
  ASSERT_TRUE(result.rejection.has_value());
  EXPECT_EQ(result.rejection->kind, "ttft");
  EXPECT_THAT(result.rejection->reason, HasSubstr("first token"));
  EXPECT_THAT(result.rejection->reason, HasSubstr("objective of 1.00 s"));
  EXPECT_GT(result.rejection->ttft_seconds, 1);
  // What is above the objective drains in real time.
  EXPECT_NEAR(result.rejection->retry_after_seconds, result.rejection->ttft_seconds - 1, 1);
}

TEST(Admission, RetryAfterStaysBetweenOneAndSixtySeconds) {
  SchedulerOptions options;
  options.slo_ttft = absl::Seconds(1);
  EXPECT_EQ(PlaceUnder(options, {.queued_tokens = 100'000'000}).rejection->retry_after_seconds, 60u);
  options.slo_ttft = absl::Milliseconds(1);
  const auto impossible = PlaceUnder(options, {});
  EXPECT_EQ(impossible.rejection->retry_after_seconds, 1u);
  EXPECT_THAT(impossible.rejection->reason, HasSubstr("idle worker"));
}

TEST(Admission, MissedItlIsRejected) {
  SchedulerOptions options;
  options.slo_itl = absl::Milliseconds(30);
  EXPECT_TRUE(PlaceUnder(options, {.running = 2}).placement.has_value());
  const auto result = PlaceUnder(options, {.running = 200});
  ASSERT_TRUE(result.rejection.has_value());
  EXPECT_EQ(result.rejection->kind, "itl");
  EXPECT_THAT(result.rejection->reason, HasSubstr("30.0 ms"));
}

TEST(Admission, RequestsOwnSloReplacesTheConfiguredOne) {
  SchedulerOptions options;
  options.slo_ttft = absl::Seconds(1);
  auto core = Cluster(options, {.queued_tokens = 50'000});
  auto r = TestRequest("r", 640);
  r.slo_ttft = absl::Seconds(100);
  EXPECT_TRUE(core.Place(r, kStart).placement.has_value());
}

TEST(Admission, FullWorkersAreNotHandedWorkThatTheyWouldRefuse) {
  const auto result = PlaceUnder({}, {.slots_free = 20});
  ASSERT_TRUE(result.rejection.has_value());
  EXPECT_EQ(result.rejection->kind, "memory");
  EXPECT_TRUE(PlaceUnder({}, {.slots_free = 21}).placement.has_value());
}

TEST(Admission, WhoGoesFirstIsPlacedWhereOthersGiveTheirBlocksUp) {
  const auto place = [](bool preempts, int32_t priority, SloClass running) {
    SchedulerCore core{SchedulerOptions{}};
    core.Report(TestReport("p1", Role::kPrefill), kStart);
    auto d = TestReport("d1", Role::kDecode);
    d.load.slots_total = d.load.slots_free = 40;
    d.load.preempts = preempts;
    core.Report(d, kStart);
    PlaceRequest first = TestRequest("first", 640);
    first.priority = 5;
    first.slo_class = running;
    EXPECT_TRUE(core.Place(first, kStart).placement.has_value());
    d.seq = 2;
    d.snapshot = false;
    d.load.slots_free = 10;
    core.Report(d, kStart + absl::Seconds(1));
    PlaceRequest second = TestRequest("second", 640, "y");
    second.priority = priority;
    return core.Place(second, kStart + absl::Seconds(1));
  };
  EXPECT_TRUE(place(true, 4, SloClass::kStandard).placement.has_value());
  EXPECT_TRUE(place(true, 9, SloClass::kBatch).placement.has_value());
  EXPECT_EQ(place(true, 5, SloClass::kStandard).rejection->kind, "memory");
  EXPECT_EQ(place(false, 4, SloClass::kStandard).rejection->kind, "memory");
}

TEST(Admission, InflightRequestsAreBounded) {
  SchedulerOptions options;
  options.max_inflight = 3;
  auto core = Cluster(options, {});
  for (int i = 0; i < 3; ++i)
    EXPECT_TRUE(core.Place(TestRequest("r" + std::to_string(i), 64), kStart).placement.has_value());
  const auto result = core.Place(TestRequest("r3", 64), kStart);
  ASSERT_TRUE(result.rejection.has_value());
  EXPECT_EQ(result.rejection->kind, "inflight");
  EXPECT_THAT(result.rejection->reason, HasSubstr("scheduler.max_inflight"));
  EXPECT_TRUE(core.Place(TestRequest("r2", 64), kStart).placement.has_value()) << "a retry is not one more";
  core.Finish("r0", kStart);
  EXPECT_TRUE(core.Place(TestRequest("r3", 64), kStart).placement.has_value());
}

TEST(Admission, RejectionIsMonotoneInLoadAndInTheSlo) {
  for (double slo : {0.3, 1.0, 5.0}) {
    SchedulerOptions options;
    options.slo_ttft = absl::Seconds(slo);
    options.slo_itl = absl::Milliseconds(40);
    for (uint32_t running : {0u, 5u, 50u, 500u}) {
      bool rejected = false;
      for (uint64_t queued = 0; queued < 60'000; queued += 500) {
        const bool now =
            PlaceUnder(options, {.queued_tokens = queued, .running = running}).rejection.has_value();
        EXPECT_TRUE(now || !rejected) << "admitted again under more load: " << queued << " queued";
        rejected = now;
      }
      EXPECT_TRUE(rejected);
    }
    bool rejected = false;
    for (uint32_t running = 0; running < 300; running += 3) {
      const bool now = PlaceUnder(options, {.running = running}).rejection.has_value();
      EXPECT_TRUE(now || !rejected);
      rejected = now;
    }
  }
  bool admitted = false;
  for (double slo = 0.05; slo < 20; slo *= 1.1) {
    SchedulerOptions options;
    options.slo_ttft = absl::Seconds(slo);
    const bool now = PlaceUnder(options, {.queued_tokens = 20'000}).placement.has_value();
    EXPECT_TRUE(now || !admitted) << "a wider objective rejects: " << slo;
    admitted = now;
  }
  EXPECT_TRUE(admitted);
}

TEST(Admission, RejectedRequestBooksNothing) {
  SchedulerOptions options;
  options.slo_ttft = absl::Milliseconds(1);
  auto core = Cluster(options, {});
  for (int i = 0; i < 10; ++i) core.Place(TestRequest("r" + std::to_string(i), 640), kStart);
  EXPECT_EQ(core.inflight(), 0u);
}

TEST(Admission, OverloadAdmitsUpToTheObjectiveThenRejects) {
  // A burst far beyond capacity: the admitted ones still meet the objective by the model's own account.
  SchedulerOptions options;
  options.slo_ttft = absl::Seconds(2);
  auto core = Cluster(options, {});
  int admitted = 0;
  for (int i = 0; i < 500; ++i) {
    const auto result =
        core.Place(TestRequest("r" + std::to_string(i), 640, "c" + std::to_string(i)), kStart);
    if (!result.placement) continue;
    ++admitted;
    EXPECT_LE(result.placement->ttft_seconds, 2.0);
  }
  EXPECT_GT(admitted, 3);
  EXPECT_LT(admitted, 100);
}

// ---- policies

SchedulerOptions With(AdmissionPolicy policy) {
  SchedulerOptions options;
  options.admission = policy;
  options.slo_ttft = absl::Seconds(1);
  options.slo_itl = absl::Milliseconds(30);
  return options;
}

TEST(AdmissionPolicies, NoneRefusesOnlyWhatNoWorkerHasMemoryFor) {
  const auto options = With(AdmissionPolicy::kNone);
  EXPECT_TRUE(PlaceUnder(options, {.queued_tokens = 1'000'000, .running = 1000}).placement.has_value());
  EXPECT_EQ(PlaceUnder(options, {.slots_free = 20}).rejection->kind, "memory");
}

TEST(AdmissionPolicies, AtStageLooksAtEachPoolWhenItIsItsTurn) {
  const auto options = With(AdmissionPolicy::kAtStage);
  EXPECT_EQ(PlaceUnder(options, {.queued_tokens = 50'000}).rejection->kind, "ttft");
  auto core = Cluster(options, {.running = 200});
  ASSERT_TRUE(core.Place(TestRequest("r", 640), kStart).placement.has_value()) << "decode is judged later";
  EXPECT_FALSE(core.AdmitDecode("r", kStart + absl::Seconds(1)));
  EXPECT_EQ(core.inflight(), 0u);
  EXPECT_EQ(core.FindRequest("r")->outcome, "rejected_decode");
  EXPECT_FALSE(core.Finish("r", kStart));
}

TEST(AdmissionPolicies, AtStageAdmitsWhereTheDecodePoolHasDrainedMeanwhile) {
  auto core = Cluster(With(AdmissionPolicy::kAtStage), {.running = 200});
  core.Place(TestRequest("r", 640), kStart);
  auto d = TestReport("d1", Role::kDecode, 2);
  d.prefilled = {"r"};
  core.Report(d, kStart + absl::Seconds(1));
  EXPECT_TRUE(core.AdmitDecode("r", kStart + absl::Seconds(1)));
  EXPECT_TRUE(core.AdmitDecode("unknown", kStart));
  EXPECT_EQ(core.inflight(), 1u);
}

TEST(AdmissionPolicies, OtherPoliciesAdmitEveryDecodeThatTheyPlaced) {
  for (const auto policy : {AdmissionPolicy::kNone, AdmissionPolicy::kEarly, AdmissionPolicy::kPredicted}) {
    auto core = Cluster(With(policy), {});
    core.Place(TestRequest("r", 640), kStart);
    auto d = TestReport("d1", Role::kDecode, 2);
    d.load.running = 500;
    core.Report(d, kStart + absl::Milliseconds(10));
    EXPECT_TRUE(core.AdmitDecode("r", kStart + absl::Seconds(1)));
  }
}

// Both objectives would be kept: what is refused is the request that asks for much, on a worker that is not
// idle.
TEST(AdmissionPolicies, PredictionLeavesRoomForThoseWhoNeedLittle) {
  auto options = With(AdmissionPolicy::kPredicted);
  options.slo_ttft = absl::Seconds(20);
  options.slo_itl = absl::ZeroDuration();
  const auto place = [&](uint64_t queued_tokens, uint32_t prompt_tokens) {
    auto core = Cluster(options, {.queued_tokens = queued_tokens});
    for (int i = 0; i < 20; ++i) {
      core.Place(TestRequest("typical", 640, "typical"), kStart);
      core.Finish("typical", kStart, {.completed = false});
    }
    return core.Place(TestRequest("r", prompt_tokens), kStart);
  };
  const PlaceResult busy = place(32'000, 20'000);
  ASSERT_TRUE(busy.rejection.has_value());
  EXPECT_EQ(busy.rejection->kind, "ttft");
  EXPECT_LT(busy.rejection->ttft_seconds, 20);
  EXPECT_THAT(busy.rejection->reason, HasSubstr("kept for requests that need less"));
  EXPECT_TRUE(place(32'000, 640).placement.has_value());
  EXPECT_TRUE(place(0, 20'000).placement.has_value()) << "an idle worker reserves nothing";
}

// Ten prompts on their way to the decode worker: early rejection does not see them, prediction does. That is
// what makes the one oscillate.
TEST(AdmissionPolicies, PredictionSeesThePrefillsUnderWayAndEarlyDoesNot) {
  for (const auto policy : {AdmissionPolicy::kEarly, AdmissionPolicy::kPredicted}) {
    auto options = With(policy);
    options.slo_ttft = absl::ZeroDuration();
    options.slo_itl = absl::Milliseconds(18);
    auto core = Cluster(options, {});
    int admitted = 0;
    for (int i = 0; i < 60; ++i) {
      auto r = TestRequest("r" + std::to_string(i), 640);
      r.max_tokens = 4096;
      admitted += core.Place(r, kStart).placement ? 1 : 0;
    }
    if (policy == AdmissionPolicy::kEarly) {
      EXPECT_EQ(admitted, 60);
    } else {
      EXPECT_GT(admitted, 3);
      EXPECT_LT(admitted, 40);
    }
  }
}

// A booking whose request nobody has ended says nothing of how many come.
TEST(AdmissionPolicies, APrefillThatIsLongOverdueIsNoStreamOfThem) {
  auto options = With(AdmissionPolicy::kPredicted);
  options.slo_ttft = absl::ZeroDuration();
  options.slo_itl = absl::Milliseconds(18);
  auto core = Cluster(options, {});
  ASSERT_TRUE(core.Place(TestRequest("orphan", 640), kStart).placement.has_value());
  const absl::Time later = kStart + absl::Minutes(10);
  auto p = TestReport("p1", Role::kPrefill, 2);
  p.load.queued_prefill_tokens = 50'000;
  p.load.waiting = 1;
  core.Report(p, later);
  core.Report(TestReport("d1", Role::kDecode, 2), later);
  auto r = TestRequest("r", 640);
  r.max_tokens = 4096;
  const PlaceResult result = core.Place(r, later);
  EXPECT_TRUE(result.placement.has_value()) << result.status;
}

TEST(AdmissionPolicies, EarlyJudgesTheLoadNowAlsoWhereItWillBeGone) {
  auto options = With(AdmissionPolicy::kEarly);
  EXPECT_EQ(PlaceUnder(options, {.running = 200}).rejection->kind, "itl");
  EXPECT_TRUE(PlaceUnder(options, {.running = 2}).placement.has_value());
}

// ---- classes

TEST(AdmissionClasses, EachClassHasItsOwnObjective) {
  SchedulerOptions options;
  options.slo_ttft = absl::Seconds(5);
  options.classes[static_cast<size_t>(SloClass::kInteractive)].slo_ttft = absl::Seconds(1);
  auto core = Cluster(options, {.queued_tokens = 10'000});  // two seconds
  auto r = TestRequest("r", 640);
  EXPECT_TRUE(core.Explain(r, kStart).placement.has_value());
  r.slo_class = SloClass::kInteractive;
  EXPECT_EQ(core.Explain(r, kStart).rejection->kind, "ttft");
  r.slo_ttft = absl::Seconds(20);
  EXPECT_TRUE(core.Explain(r, kStart).placement.has_value()) << "the request's own goes first";
}

TEST(AdmissionClasses, BatchGoesIntoGapsOnly) {
  SchedulerOptions options;
  options.slo_ttft = absl::Seconds(4);
  options.slo_itl = absl::Milliseconds(40);
  const auto judge = [&](SloClass slo_class, const Load& load) -> std::string {
    auto core = Cluster(options, load);
    auto r = TestRequest("r", 640);
    r.slo_class = slo_class;
    const auto result = core.Place(r, kStart);
    return result.rejection ? std::string(result.rejection->kind) : "";
  };
  EXPECT_EQ(judge(SloClass::kBatch, {}), "");
  // A queue of 3 s, a step of 36 ms, nine tenths of the memory: others still fit.
  for (const Load& load :
       {Load{.queued_tokens = 12'000}, Load{.running = 55}, Load{.running = 1, .slots_free = 900}}) {
    EXPECT_EQ(judge(SloClass::kStandard, load), "");
    EXPECT_EQ(judge(SloClass::kBatch, load), "batch");
  }
  options.admission = AdmissionPolicy::kNone;
  EXPECT_EQ(judge(SloClass::kBatch, {.queued_tokens = 12'000}), "");
}

TEST(AdmissionClasses, BatchIsTakenByAnIdleWorkerHoweverSmallTheGaps) {
  SchedulerOptions options;
  options.slo_ttft = absl::Seconds(4);
  options.slo_itl = absl::Microseconds(1);  // no step is as short
  const auto judge = [&](const Load& load) -> std::string {
    auto core = Cluster(options, load);
    auto r = TestRequest("r", 640);
    r.slo_class = SloClass::kBatch;
    const auto result = core.Place(r, kStart);
    return result.rejection ? std::string(result.rejection->kind) : "";
  };
  EXPECT_EQ(judge({}), "");
  EXPECT_EQ(judge({.slots_free = 100}), "") << "less than is kept free for others";
  EXPECT_EQ(judge({.running = 1}), "batch");
}

}  // namespace
}  // namespace tidepool
