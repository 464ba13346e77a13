#include "tools/simulate/simulation.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>

#include "kvstore/policy/replay.h"
#include "tests/sim/sim_builder.h"
#include "tools/simulate/plot.h"
#include "tools/simulate/sweep.h"

namespace tidepool {
namespace {

using testing::HasSubstr;

constexpr char kTrace[] = "../shared/data/traces/mooncake/conversation_trace.jsonl";

SimResult RunOf(const SimOptions& options, const Workload& workload, const WorkerProfile& profile) {
  auto result = Simulate(options, workload, profile);
  EXPECT_TRUE(result.ok()) << result.status();
  return result.ok() ? *std::move(result) : SimResult();
}

std::string WithoutWallTimes(const SimResult& r) {
  auto json = ToJson(r);
  json.erase("wall_s");
  json.erase("decision_us");
  return json.dump();
}

void ExpectConserved(const SimResult& r, const Workload& w) {
  EXPECT_EQ(r.all.requests, w.requests.size());
  EXPECT_EQ(r.all.completed + r.all.rejected + r.all.failed, r.all.requests);
  uint64_t by_tenant = 0, by_class = 0;
  for (const auto& [tenant, g] : r.tenants) by_tenant += g.completed + g.rejected + g.failed;
  for (const GroupResult& g : r.classes) by_class += g.completed + g.rejected + g.failed;
  EXPECT_EQ(by_tenant, r.all.requests);
  EXPECT_EQ(by_class, r.all.requests);
  EXPECT_EQ(r.slots_leaked, 0u);
  EXPECT_EQ(r.bookings_left, 0u);
}

TEST(SimulationTest, OneRequestTakesWhatItsPartsTake) {
  const WorkerProfile p = TestProfile();
  Workload w;
  w.stretch_tokens = 32;
  w.requests.push_back({.prompt_tokens = 500, .output_tokens = 11});
  const SimResult r = RunOf(TestOptions(1, 1, 0), w, p);
  ASSERT_EQ(r.all.completed, 1u);
  const double compute = p.PrefillSeconds(500, 0);
  // Two messages, the prompt, and what of the transfer it does not hide.
  EXPECT_NEAR(r.all.ttft[0], 2 * p.control_seconds + compute + p.link_latency_seconds, 1e-4);
  EXPECT_NEAR(r.all.itl.mean(), p.DecodeStepSeconds(1, 505), 2e-4);
  EXPECT_EQ(r.bytes_handed_over, 500 * p.layout.bytes_per_token());
}

TEST(SimulationTest, EqualSeedsGiveEqualRuns) {
  auto profile = TestProfile();
  profile.jitter = 0.1;
  auto mix = TestMix(60, 3000);
  mix.interactive_share = 0.2;
  mix.batch_share = 0.2;
  mix.tenants = {{"a", 2}, {"b", 1}};
  const auto w = MakeSynthetic(mix, 5);
  ASSERT_TRUE(w.ok());
  SimOptions o = TestOptions(2, 2, 1);
  o.scheduler.admission = AdmissionPolicy::kPredicted;
  o.faults.worker_crash_every_seconds = 10;
  const std::string first = WithoutWallTimes(RunOf(o, *w, profile));
  EXPECT_EQ(first, WithoutWallTimes(RunOf(o, *w, profile)));
  o.seed = 2;
  EXPECT_NE(first, WithoutWallTimes(RunOf(o, *w, profile)));
}

TEST(SimulationTest, EveryRequestEndsOnceUnderEveryPolicy) {
  auto mix = TestMix(80, 1500);
  mix.batch_share = 0.2;
  const auto w = MakeSynthetic(mix, 1);
  ASSERT_TRUE(w.ok());
  for (size_t placement = 0; placement < kPlacementPolicies; ++placement) {
    for (size_t admission = 0; admission < kAdmissionPolicies; ++admission) {
      SimOptions o = TestOptions(2, 2, 0);
      o.scheduler.placement = static_cast<PlacementPolicy>(placement);
      o.scheduler.admission = static_cast<AdmissionPolicy>(admission);
      SCOPED_TRACE(std::string(PlacementPolicyName(o.scheduler.placement)) + " " +
                   std::string(AdmissionPolicyName(o.scheduler.admission)));
      const SimResult r = RunOf(o, *w, TestProfile());
      ExpectConserved(r, *w);
      EXPECT_GT(r.all.completed, 0u);
    }
  }
}

TEST(SimulationTest, MemoryThatIsTooSmallDelaysAndRefusesButLosesNothing) {
  auto profile = TestProfile();
  profile.pool_blocks = 140;  // one of the longest requests
  const auto w = MakeSynthetic(TestMix(60, 1000), 1);
  ASSERT_TRUE(w.ok());
  for (const SimOptions& o : {TestOptions(2, 2, 0), TestOptions(0, 0, 3), TestOptions(1, 1, 1)}) {
    const SimResult r = RunOf(o, *w, profile);
    ExpectConserved(r, *w);
    EXPECT_GT(r.all.completed, 100u);
  }
}

TEST(SimulationTest, AHitRateOfOneWorkerIsThatOfTheReplay) {
  if (!std::filesystem::exists(kTrace)) GTEST_SKIP() << kTrace << " is not there";
  auto blocks = ReadMooncakeTrace(kTrace);
  ASSERT_TRUE(blocks.ok()) << blocks.status();
  blocks->requests.resize(3000);
  // One after the other, whole blocks only, one token each: then the pool sees what the replay does.
  Workload w;
  for (size_t i = 0; i < blocks->requests.size(); ++i) {
    TraceRequest& r = blocks->requests[i];
    const uint32_t full = std::max(1u, r.input_tokens / kMooncakeBlockTokens);
    r.blocks.resize(std::min<size_t>(r.blocks.size(), full));
    r.input_tokens = static_cast<uint32_t>(r.blocks.size()) * kMooncakeBlockTokens;
    w.requests.push_back({.at = static_cast<SimTime>(i) * 60 * kSimSecond,
                          .prompt_tokens = r.input_tokens,
                          .output_tokens = 1,
                          .count = static_cast<uint32_t>(r.blocks.size()),
                          .first = w.ids.size()});
    w.ids.insert(w.ids.end(), r.blocks.begin(), r.blocks.end());
  }
  auto profile = TestProfile();
  profile.layout.block_tokens = 512;
  profile.max_model_len = 1 << 20;
  profile.max_step_tokens = 1 << 20;
  for (const char* policy : {"lru", "turn-aware"}) {
    for (const uint32_t slots : {1000u, 5859u}) {
      SCOPED_TRACE(std::string(policy) + " " + std::to_string(slots));
      SimOptions o = TestOptions(0, 0, 1);
      o.eviction = policy;
      o.pool_blocks = slots;
      o.max_tokens = 0;
      o.replication.copies = 1;
      o.report_interval_seconds = 50;
      o.scheduler.worker_timeout = absl::Seconds(1000);
      const SimResult r = RunOf(o, w, profile);
      const auto replay = ReplayTrace(*blocks, {.slots = slots, .policy = policy});
      ASSERT_TRUE(replay.ok()) << replay.status();
      EXPECT_EQ(r.all.completed, w.requests.size());
      EXPECT_EQ(r.blocks_asked, replay->blocks);
      // The token drawn has a slot of its own for a moment.
      EXPECT_NEAR(static_cast<double>(r.blocks_found), static_cast<double>(replay->hits),
                  0.02 * static_cast<double>(replay->hits) + 5);
      EXPECT_GT(r.blocks_found, 1000u);
    }
  }
}

TEST(SimulationTest, PoliciesRankOnAShortenedTraceAsTheyShould) {
  if (!std::filesystem::exists(kTrace)) GTEST_SKIP() << kTrace << " is not there";
  SimPlan plan;
  const auto profile = LoadProfile("llama-3-70b-a800", ".");
  ASSERT_TRUE(profile.ok()) << profile.status();
  plan.profile = *profile;
  plan.trace = kTrace;
  plan.replay.requests = 3000;
  plan.sim.prefill = plan.sim.decode = 8;
  plan.sim.scheduler.admission = AdmissionPolicy::kNone;
  plan.sim.scheduler.max_inflight = 1 << 20;
  const auto results = RunSweep(plan, {{"policy", {"random", "least-loaded", "tidepool"}}}, 1);
  ASSERT_TRUE(results.ok()) << results.status();
  const double random = Describe((*results)[0].all.ttft).mean, loaded = Describe((*results)[1].all.ttft).mean,
               ours = Describe((*results)[2].all.ttft).mean;
  EXPECT_GT(random, 1.3 * loaded);
  EXPECT_GT(loaded, 1.3 * ours);
  EXPECT_GT((*results)[2].hit_rate(), (*results)[1].hit_rate() + 0.05);
}

TEST(SimulationTest, PredictionsAreCloseOnASteadyLoad) {
  auto profile = TestProfile();
  profile.jitter = 0.05;
  const auto w = MakeSynthetic(TestMix(15, 1500), 1);
  ASSERT_TRUE(w.ok());
  const SimResult r = RunOf(TestOptions(2, 2, 0), *w, profile);
  EXPECT_LT(Describe(r.ttft_error).p50, 0.2);
}

TEST(SimulationTest, BadOptionsAreNamed) {
  const auto w = MakeSynthetic(TestMix(5, 10), 1);
  const auto message = [&](const SimOptions& o, const WorkerProfile& p) {
    return std::string(Simulate(o, *w, p).status().message());
  };
  EXPECT_THAT(message(TestOptions(0, 0, 0), TestProfile()), HasSubstr("--prefill"));
  EXPECT_THAT(message(TestOptions(2, 0, 0), TestProfile()), HasSubstr("--decode is 0"));
  SimOptions o = TestOptions(1, 1, 0);
  o.eviction = "none";
  EXPECT_THAT(message(o, TestProfile()), HasSubstr("lru"));
  WorkerProfile odd = TestProfile();
  odd.layout.block_tokens = 24;
  EXPECT_THAT(message(TestOptions(1, 1, 0), odd), HasSubstr("block-tokens is 24; it must divide the 32"));
}

TEST(SweepTest, RunsEveryCombinationAndTheNumberOfThreadsDoesNotMatter) {
  SimPlan plan;
  plan.profile = TestProfile();
  plan.synthetic = TestMix(20, 300);
  plan.sim = TestOptions(1, 1, 0);
  const std::vector<SweepKey> keys = {*ParseSweepKey("pd=1:1,2:1"), *ParseSweepKey("rate=10,20,40")};
  const auto one = RunSweep(plan, keys, 1), three = RunSweep(plan, keys, 3);
  ASSERT_TRUE(one.ok() && three.ok()) << one.status() << three.status();
  ASSERT_EQ(one->size(), 6u);
  for (size_t i = 0; i < 6; ++i) EXPECT_EQ(WithoutWallTimes((*one)[i]), WithoutWallTimes((*three)[i]));
  EXPECT_EQ((*one)[4].settings.at("pd"), "2:1");
  EXPECT_EQ((*one)[4].settings.at("rate"), "20");
  EXPECT_EQ((*one)[4].prefill, 2u);
  const std::string svg = RenderSvg(ChartsOf(*one, {"pd", "rate"}));
  EXPECT_TRUE(svg.starts_with("<svg"));
  EXPECT_TRUE(svg.ends_with("</svg>\n"));
  EXPECT_THAT(svg, HasSubstr("Goodput"));
  EXPECT_EQ(svg.find("nan"), svg.npos);
}

TEST(SweepTest, BadKeysAndValuesAreNamed) {
  const auto message = [](const char* text) { return std::string(ParseSweepKey(text).status().message()); };
  EXPECT_THAT(message("speed"), HasSubstr("KEY=a,b,c"));
  EXPECT_THAT(message("colour=red"), HasSubstr("there is no 'colour' to vary; there are prefill"));
  EXPECT_THAT(message("policy=best"), HasSubstr("policy is 'best'; it must be one of tidepool"));
  EXPECT_THAT(message("slo-ttft=5"), HasSubstr("a duration with its unit"));
  EXPECT_THAT(message("pd=8"), HasSubstr("8:8"));
}

}  // namespace
}  // namespace tidepool
