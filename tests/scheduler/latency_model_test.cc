#include "scheduler/latency_model.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "base/rng.h"

namespace tidepool {
namespace {

// A made-up machine, 20 times slower than the prior.
double TruePrefill(double n, double cached) { return 0.02 + 4e-3 * n + 2e-7 * n * (cached + n / 2); }

PrefillSample Sample(Rng& rng, double noise) {
  PrefillSample s;
  s.new_tokens = 1 + static_cast<uint32_t>(rng.Below(4000));
  s.cached_tokens = static_cast<uint32_t>(rng.Below(8000));
  s.seconds = TruePrefill(s.new_tokens, s.cached_tokens) * (1 + noise * (2 * rng.Uniform() - 1));
  return s;
}

double WorstError(const LatencyModel& m) {
  double worst = 0;
  for (double n : {32.0, 300.0, 2000.0, 4000.0})
    for (double cached : {0.0, 1000.0, 8000.0}) {
      const double truth = TruePrefill(n, cached);
      worst = std::max(
          worst, std::abs(m.PrefillSeconds(static_cast<uint64_t>(n), static_cast<uint64_t>(cached)) - truth) /
                     truth);
    }
  return worst;
}

TEST(LatencyModel, PriorIsPositiveAndRisesWithWork) {
  LatencyModel m;
  EXPECT_EQ(m.PrefillSeconds(0, 100), 0);
  EXPECT_GT(m.PrefillSeconds(1, 0), 0);
  EXPECT_GT(m.PrefillSeconds(200, 0), m.PrefillSeconds(100, 0));
  EXPECT_GT(m.PrefillSeconds(100, 4000), m.PrefillSeconds(100, 0));
  EXPECT_GT(m.DecodeStepSeconds(2, 100), m.DecodeStepSeconds(1, 100));
  EXPECT_GT(m.DecodeStepSeconds(2, 10000), m.DecodeStepSeconds(2, 100));
  EXPECT_GT(m.FetchSeconds(2 << 20), m.FetchSeconds(1 << 20));
  EXPECT_EQ(m.FetchSeconds(0), 0);
  EXPECT_GT(m.QueueSeconds(1000, 2), m.QueueSeconds(500, 2));
}

TEST(LatencyModel, PrefillConvergesOnNoisyMeasurements) {
  LatencyModel m;
  EXPECT_GT(WorstError(m), 0.5);
  Rng rng(1);
  for (int i = 0; i < 300; ++i) m.Observe(Sample(rng, 0.1));
  EXPECT_LT(WorstError(m), 0.1);
  EXPECT_LT(m.prefill_error(), 0.1);
  EXPECT_GT(m.prefill_error(), 0.01);
}

TEST(LatencyModel, AFewSamplesAlreadyBeatThePrior) {
  LatencyModel m;
  Rng rng(2);
  for (int i = 0; i < 8; ++i) m.Observe(Sample(rng, 0.05));
  EXPECT_LT(WorstError(m), 0.5);
}

TEST(LatencyModel, RareStallsDoNotBendTheFit) {
  LatencyModel m;
  Rng rng(3);
  for (int i = 0; i < 400; ++i) {
    PrefillSample s = Sample(rng, 0.05);
    if (i > 50 && i % 20 == 0) s.seconds *= 1000;
    m.Observe(s);
  }
  EXPECT_LT(WorstError(m), 0.35);
}

TEST(LatencyModel, FollowsALastingChange) {
  LatencyModel m;
  Rng rng(4);
  for (int i = 0; i < 200; ++i) m.Observe(Sample(rng, 0.05));
  for (int i = 0; i < 400; ++i) {
    PrefillSample s = Sample(rng, 0.05);
    s.seconds *= 10;  // another model of clock, a noisy neighbour
    m.Observe(s);
  }
  const double now = m.PrefillSeconds(2000, 0) / TruePrefill(2000, 0);
  EXPECT_NEAR(now, 10, 1.5);
}

TEST(LatencyModel, OneShapeRepeatedIsPredictedAndNothingGoesNegative) {
  LatencyModel m;
  for (int i = 0; i < 200; ++i) m.Observe(PrefillSample{100, 0, 0.003});
  EXPECT_NEAR(m.PrefillSeconds(100, 0), 0.003, 0.0005);
  for (uint64_t n : {1, 50, 100, 1000, 100000})
    for (uint64_t cached : {0, 100, 100000}) EXPECT_GE(m.PrefillSeconds(n, cached), 0);
}

TEST(LatencyModel, WorkThatGetsCheaperWithSizeStaysMonotone) {
  // Impossible as physics, possible as noise.
  LatencyModel m;
  for (int i = 0; i < 50; ++i) {
    m.Observe(PrefillSample{100, 0, 0.5});
    m.Observe(PrefillSample{1000, 0, 0.1});
  }
  EXPECT_GE(m.PrefillSeconds(1000, 0), m.PrefillSeconds(100, 0));
  EXPECT_GT(m.PrefillSeconds(100, 0), 0);
}

TEST(LatencyModel, NonsenseSamplesAreIgnored) {
  LatencyModel m;
  const double before = m.PrefillSeconds(100, 100);
  m.Observe(PrefillSample{100, 0, 0});
  m.Observe(PrefillSample{100, 0, -1});
  m.Observe(PrefillSample{100, 0, std::nan("")});
  m.Observe(PrefillSample{100, 0, std::numeric_limits<double>::infinity()});
  m.Observe(PrefillSample{0, 100, 1});
  EXPECT_EQ(m.PrefillSeconds(100, 100), before);
  m.Observe(PrefillSample{~0u, ~0u, 1e300});
  m.Observe(PrefillSample{100, 0, 0.02});
  EXPECT_TRUE(std::isfinite(m.PrefillSeconds(100, 100)));
}

TEST(LatencyModel, DecodeAndFetchConverge) {
  LatencyModel m;
  Rng rng(5);
  for (int i = 0; i < 300; ++i) {
    DecodeSample d;
    d.batch = 1 + static_cast<uint32_t>(rng.Below(32));
    d.context_tokens = d.batch * (100 + rng.Below(4000));
    d.seconds = 0.004 + 2e-4 * d.batch + 1e-7 * static_cast<double>(d.context_tokens);
    m.Observe(d);
    FetchSample f;
    f.bytes = 1000 + rng.Below(100 << 20);
    f.seconds = 5e-4 + static_cast<double>(f.bytes) / 2e9;
    m.Observe(f);
  }
  EXPECT_NEAR(m.DecodeStepSeconds(16, 30000), 0.004 + 3.2e-3 + 3e-3, 5e-4);
  EXPECT_NEAR(m.FetchSeconds(64 << 20), 5e-4 + (64 << 20) / 2e9, 2e-3);
  EXPECT_LT(m.decode_error(), 0.05);
  EXPECT_LT(m.fetch_error(), 0.05);
}

}  // namespace
}  // namespace tidepool
