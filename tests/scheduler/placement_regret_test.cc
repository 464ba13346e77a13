#include <gtest/gtest.h>

#include <algorithm>
#include <cstdio>
#include <map>

#include "scheduler/placement.h"
#include "tests/scheduler/cluster_builder.h"

// Beyond evaluate_all_workers a decision looks at some workers only: how much worse is it than one that looks
// at all of them?
namespace tidepool {
namespace {

class Cluster {
 public:
  Cluster(uint64_t seed, uint32_t workers, bool mixed, double load, const SchedulerOptions& options)
      : rng_(seed), options_(options), view_(options) {
    for (uint32_t c = 0; c < 60; ++c) lengths_.push_back(static_cast<uint32_t>(4 + rng_.Below(300)));
    for (uint32_t i = 0; i < workers; ++i) {
      const Role role = mixed && i % 3 == 0 ? Role::kBoth : i % 2 == 0 ? Role::kPrefill : Role::kDecode;
      auto r = TestReport("w" + std::to_string(i), role);
      if (rng_.Chance(0.02)) r.draining = true;
      r.load.slots_total = 20'000;
      r.load.slots_free = static_cast<uint32_t>(rng_.Below(rng_.Chance(0.1) ? 500 : 20'000));
      if (CanPrefill(role) && rng_.Chance(load)) {
        r.load.waiting = static_cast<uint32_t>(1 + rng_.Below(6));
        r.load.queued_prefill_tokens = r.load.waiting * (100 + rng_.Below(6000));
      }
      if (CanDecode(role)) {
        r.load.running = static_cast<uint32_t>(static_cast<double>(rng_.Below(40)) * load);
        r.load.running_context_tokens = r.load.running * (500 + rng_.Below(8000));
      }
      const double speed = 0.8 + 0.4 * rng_.Uniform();
      for (int k = 0; k < 12; ++k) {
        const auto n = static_cast<uint32_t>(64 + rng_.Below(8000));
        r.prefills.push_back({n, 0, speed * (0.002 + n * 1.5e-4)});
        r.decodes.push_back({1 + n / 100, n * 10, speed * (0.015 + n * 2e-6)});
        r.fetches.push_back({uint64_t{n} << 12, speed * (0.001 + n * 8e-6)});
      }
      Holding(r, "system", 8);
      for (uint32_t c = 0; c < lengths_.size(); ++c) {
        // Some conversations are on one worker, some on many.
        if (rng_.Chance(c % 10 == 0 ? 0.3 : 0.01)) {
          const auto n = static_cast<uint32_t>(8 + rng_.Below(lengths_[c]));
          for (uint32_t b = 8; b < n; ++b)
            r.events.push_back({Key(c, b), false, rng_.Chance(0.05) ? Tier::kDisk : Tier::kHost});
        }
      }
      EXPECT_TRUE(view_.Report(std::move(r), kStart).status.ok());
    }
  }

  static BlockKey Key(uint32_t c, uint32_t b) {
    return b < 8 ? ChainKey("system", b) : ChainKey("c" + std::to_string(c), b);
  }

  PlaceRequest Request(int i) {
    const auto c = static_cast<uint32_t>(rng_.Below(lengths_.size()));
    PlaceRequest r;
    r.request_id = "r" + std::to_string(i);
    const auto n = static_cast<uint32_t>(lengths_[c] + rng_.Below(20));
    for (uint32_t b = 0; b < n; ++b) r.keys.push_back(Key(c, b));
    r.prompt_tokens = n * 32 + static_cast<uint32_t>(rng_.Below(32)) + 1;
    r.max_tokens = static_cast<uint32_t>(1 + rng_.Below(400));
    return r;
  }

  Evaluation Decide(const PlaceRequest& r, bool all, absl::Time now) {
    PolicyState policy(1);
    const PlacementInput input{.length = {.mean = 256, .median = 256, .high = 256}, .all_workers = all};
    return Evaluate(view_, options_, r, input, policy, now);
  }

  void Book(const PlaceRequest& r, const Plan& plan, absl::Time now) {
    view_.Book({.request_id = r.request_id,
                .prefill = plan.prefill.worker,
                .decode = plan.decode.worker,
                .holder = plan.prefill.holder,
                .placed_at = now,
                .prefill_ends_at = now + absl::Seconds(plan.ttft_seconds()),
                .prefill_seconds = plan.prefill.service_seconds(),
                .prompt_tokens = r.prompt_tokens,
                .output_tokens = r.max_tokens,
                .prefill_blocks = plan.prefill.blocks_needed,
                .decode_blocks = plan.decode.blocks_needed});
  }

 private:
  Rng rng_;
  const SchedulerOptions options_;
  ClusterView view_;
  std::vector<uint32_t> lengths_;
};

struct Regret {
  int decisions = 0, worse = 0, full = 0, violations = 0;
  std::vector<double> ratios;
  double At(double q) {
    std::sort(ratios.begin(), ratios.end());
    return ratios[static_cast<size_t>(q * static_cast<double>(ratios.size() - 1))];
  }
};

Regret Measure(uint32_t workers, bool mixed, double load, SchedulerOptions options = {}) {
  Regret out;
  for (uint64_t seed = 1; seed <= 3; ++seed) {
    Cluster cluster(seed, workers, mixed, load, options);
    for (int i = 0; i < 250; ++i) {
      const absl::Time now = kStart + absl::Microseconds(i * 200);
      const PlaceRequest r = cluster.Request(i);
      const Evaluation all = cluster.Decide(r, true, now);
      const Evaluation some = cluster.Decide(r, false, now);
      EXPECT_EQ(all.best.has_value(), some.best.has_value());
      if (!all.best || !some.best) continue;
      ++out.decisions;
      if (some.best->full && !all.best->full) ++out.full;
      if (some.best->violations > all.best->violations) ++out.violations;
      out.ratios.push_back(some.best->cost_seconds / all.best->cost_seconds);
      if (out.ratios.back() > 1.001) ++out.worse;
      // The cluster goes the way of the one that sees less.
      if (!some.best->full) cluster.Book(r, *some.best, now);
    }
  }
  return out;
}

TEST(PlacementRegret, SeeingSomeWorkersCostsNextToNothing) {
  for (const bool mixed : {false, true}) {
    for (const double load : {0.0, 0.5, 1.0}) {
      Regret r = Measure(300, mixed, load);
      std::printf("mixed %d load %.1f: %d of %d worse, p50 %.4f p90 %.4f p99 %.4f max %.4f\n", mixed, load,
                  r.worse, r.decisions, r.At(0.5), r.At(0.9), r.At(0.99), r.At(1));
      EXPECT_GT(r.decisions, 700);
      EXPECT_EQ(r.full, 0);
      EXPECT_LE(r.At(0.5), 1.1) << "mixed " << mixed << " load " << load;
      EXPECT_LE(r.At(0.9), 1.2) << "mixed " << mixed << " load " << load;
      EXPECT_LE(r.At(0.99), 1.5) << "mixed " << mixed << " load " << load;
    }
  }
}

TEST(PlacementRegret, NobodyIsRefusedForWhatWasNotLookedAt) {
  SchedulerOptions options;
  options.slo_ttft = absl::Seconds(1);
  options.slo_itl = absl::Milliseconds(45);
  Regret r = Measure(300, false, 1.0, options);
  std::printf("violations %d of %d\n", r.violations, r.decisions);
  EXPECT_LE(r.violations, r.decisions / 100);
  EXPECT_EQ(r.full, 0);
}

TEST(PlacementRegret, SmallClustersAreLookedAtWhole) {
  SchedulerOptions options;
  Regret r = Measure(options.evaluate_all_workers, true, 0.7);
  EXPECT_EQ(r.worse, 0);
  EXPECT_EQ(r.At(1), 1.0);
}

}  // namespace
}  // namespace tidepool
