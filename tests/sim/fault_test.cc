#include <gtest/gtest.h>

#include <cstdlib>

#include "tests/sim/sim_builder.h"

namespace tidepool {
namespace {

// A number of seeds, the first; both from the environment.
uint64_t FromEnvironment(const char* name, uint64_t otherwise) {
  const char* value = std::getenv(name);
  return value == nullptr ? otherwise : std::strtoull(value, nullptr, 10);
}

// A cluster, a load and its faults, all of them drawn from the seed.
void RunSeed(uint64_t seed) {
  Rng rng(seed);
  WorkerProfile profile = TestProfile();
  profile.jitter = 0.2 * rng.Uniform();
  profile.pool_blocks = static_cast<uint32_t>(140 + rng.Below(600));
  profile.max_waiting = static_cast<uint32_t>(1 + rng.Below(20));
  SyntheticOptions mix = TestMix(10 + 60 * rng.Uniform(), 40 + rng.Below(120));
  mix.batch_share = 0.3 * rng.Uniform();
  mix.burst = 0.5 + 2 * rng.Uniform();
  mix.tenants = {{"a", 1}, {"b", 2}};
  SimOptions o = TestOptions(static_cast<uint32_t>(1 + rng.Below(3)), static_cast<uint32_t>(1 + rng.Below(3)),
                             static_cast<uint32_t>(rng.Below(2)));
  o.seed = seed;
  o.scheduler.placement = static_cast<PlacementPolicy>(rng.Below(kPlacementPolicies));
  o.scheduler.admission = static_cast<AdmissionPolicy>(rng.Below(kAdmissionPolicies));
  o.scheduler.fairness = static_cast<FairnessPolicy>(rng.Below(2));
  o.scheduler.worker_timeout = absl::Seconds(1 + rng.Below(3));
  o.faults.worker_crash_every_seconds = 0.3 + 5 * rng.Uniform();
  o.faults.worker_down_seconds = 4 * rng.Uniform();
  o.faults.report_loss = rng.Chance(0.5) ? 0.3 * rng.Uniform() : 0;
  o.faults.report_delay_seconds = rng.Chance(0.5) ? rng.Uniform() : 0;
  o.faults.scheduler_crash_every_seconds = rng.Chance(0.5) ? 1 + 5 * rng.Uniform() : 0;
  o.faults.scheduler_down_seconds = 2 * rng.Uniform();
  o.order = static_cast<FairQueue::Order>(rng.Below(kQueueOrders));
  const auto w = MakeSynthetic(mix, seed);
  ASSERT_TRUE(w.ok()) << w.status();
  const auto r = Simulate(o, *w, profile);
  ASSERT_TRUE(r.ok()) << r.status();
  EXPECT_EQ(r->all.requests, w->requests.size());
  EXPECT_EQ(r->all.completed + r->all.rejected + r->all.failed, r->all.requests);
  EXPECT_EQ(r->slots_leaked, 0u);
  // A scheduler that came back does not know of those before it.
  if (r->scheduler_restarts == 0) {
    EXPECT_EQ(r->bookings_left, 0u);
  }
}

TEST(FaultTest, EveryRequestIsAccountedForWhateverFails) {
  const uint64_t first = FromEnvironment("TIDEPOOL_SIM_SEED", 1);
  const uint64_t seeds = FromEnvironment("TIDEPOOL_SIM_SEEDS", 2000);
  for (uint64_t seed = first; seed < first + seeds; ++seed) {
    RunSeed(seed);
    if (testing::Test::HasFailure()) {
      FAIL() << "seed " << seed << ": run with TIDEPOOL_SIM_SEED=" << seed << " TIDEPOOL_SIM_SEEDS=1";
    }
  }
}

}  // namespace
}  // namespace tidepool
