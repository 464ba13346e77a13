#include "scheduler/fair_share.h"

#include <gtest/gtest.h>

#include "tests/scheduler/cluster_builder.h"

namespace tidepool {
namespace {

TEST(FairShare, CreditEndsWithTheQuantumAndComesBackWithTheNext) {
  FairShare fair(1000);
  EXPECT_TRUE(FairShare::HasCredit(fair.Of("a"), 0));
  fair.Charge("a", 0, 999, kStart);
  EXPECT_TRUE(FairShare::HasCredit(fair.Of("a"), 0));
  fair.Charge("a", 0, 1500, kStart);
  EXPECT_FALSE(FairShare::HasCredit(fair.Of("a"), 0));
  EXPECT_TRUE(FairShare::HasCredit(fair.Of("a"), 1)) << "elsewhere it has its own";
  EXPECT_TRUE(FairShare::HasCredit(fair.Of("b"), 0));
  fair.Refill("a");
  EXPECT_FALSE(FairShare::HasCredit(fair.Of("a"), 0)) << "1499 behind";
  fair.Refill("a");
  EXPECT_TRUE(FairShare::HasCredit(fair.Of("a"), 0));
}

TEST(FairShare, RefundNeverLiftsAboveTheQuantum) {
  FairShare fair(1000);
  fair.Charge("a", 0, 500, kStart);
  fair.Charge("a", 0, -5000, kStart);
  fair.Charge("a", 0, 1000, kStart);
  EXPECT_FALSE(FairShare::HasCredit(fair.Of("a"), 0));
}

TEST(FairShare, AWorkerWhoseQuantumIsWholeAgainTakesNoRoom) {
  FairShare fair(1000);
  fair.Charge("a", 0, 500, kStart);
  fair.Charge("a", 1, 1000, kStart);
  EXPECT_EQ(fair.Of("a")->size(), 2u);
  fair.Charge("a", 0, -500, kStart);
  fair.Refill("a");
  EXPECT_TRUE(fair.Of("a")->empty());
}

TEST(FairShare, TenantsAreBoundedAndTheLongestUnseenIsForgotten) {
  FairShare fair(1000, 2);
  fair.Charge("a", 0, 5000, kStart);
  fair.Charge("b", 0, 5000, kStart + absl::Seconds(1));
  fair.Charge("c", 0, 5000, kStart + absl::Seconds(2));
  EXPECT_EQ(fair.tenants(), 2u);
  EXPECT_EQ(fair.Of("a"), nullptr);
  fair.Forget(0);
  EXPECT_TRUE(FairShare::HasCredit(fair.Of("b"), 0));
}

// One tenant whose prefix is on p0, at ten times the rate of others that use p0, too: where its share of p0
// is used up, it goes elsewhere although p0 would be quicker.
double ShareOfHeavyTenantOnItsWorker(FairnessPolicy fairness) {
  SchedulerOptions options;
  options.fairness = fairness;
  options.fair_quantum_tokens = 4000;
  SchedulerCore core(options);
  for (const char* id : {"p0", "p1", "p2", "p3"}) {
    auto r = TestReport(id, Role::kPrefill);
    if (id[1] == '0') Holding(r, "heavy", 100);
    // Fetching is slow: the prefix is worth most where it is.
    for (int i = 0; i < 40; ++i)
      r.fetches.push_back({uint64_t{1 << 20} * static_cast<uint64_t>(1 + i % 3), 2.0 * (1 + i % 3)});
    core.Report(std::move(r), kStart);
  }
  core.Report(TestReport("d", Role::kDecode), kStart);
  int heavy = 0, at_home = 0;
  for (int i = 0; i < 200; ++i) {
    auto r = TestRequest("r" + std::to_string(i), 100 * 32 + 400, "heavy");
    r.tenant = "heavy";
    const auto placed = core.Place(r, kStart + absl::Seconds(i));
    EXPECT_TRUE(placed.placement.has_value());
    ++heavy;
    at_home += placed.placement->prefill->worker_id == "p0" ? 1 : 0;
    core.Finish(r.request_id, kStart + absl::Seconds(i), {.output_tokens = 50});
  }
  return static_cast<double>(at_home) / heavy;
}

TEST(FairShare, PlacementSpreadsATenantThatHasUsedUpItsShareOfAWorker) {
  EXPECT_EQ(ShareOfHeavyTenantOnItsWorker(FairnessPolicy::kNone), 1.0);
  EXPECT_LT(ShareOfHeavyTenantOnItsWorker(FairnessPolicy::kD2lpm), 0.9);
  EXPECT_GT(ShareOfHeavyTenantOnItsWorker(FairnessPolicy::kD2lpm), 0.3) << "locality still counts";
}

}  // namespace
}  // namespace tidepool
