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

// ---- LeastSquares with the features and the prior of prefills

using Fit = LeastSquares<3>;
constexpr Fit::Vector kPrior = {2e-3, 0.1, 0.02};

Fit::Vector Prefill(double n, double cached = 0) {
  return {1, n / 512, n * (cached + n / 2) / (512.0 * 4096)};
}
double Dot(const Fit::Vector& a, const Fit::Vector& b) { return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]; }
// 16 to 4096 tokens, every octave as often.
double AnyLength(Rng& rng) { return 16 * std::exp(rng.Uniform() * std::log(256.0)); }

// `samples` of `truth` and of lengths(), up to `noise` off.
template <typename Lengths>
void Learn(Fit& fit, const Fit::Vector& truth, int samples, double noise, Rng& rng, const Lengths& lengths) {
  for (int i = 0; i < samples; ++i) {
    const Fit::Vector x = Prefill(lengths(), rng.Below(2) == 0 ? 0 : rng.Uniform() * 8000);
    fit.Observe(x, Dot(truth, x) * (1 + noise * (2 * rng.Uniform() - 1)));
  }
}

double WorstError(const Fit& fit, const Fit::Vector& truth) {
  double worst = 0;
  for (double n : {16.0, 64.0, 512.0, 2048.0, 4096.0})
    for (double cached : {0.0, 2000.0, 8000.0}) {
      const Fit::Vector x = Prefill(n, cached);
      worst = std::max(worst, std::abs(fit.Predict(x) / Dot(truth, x) - 1));
    }
  return worst;
}

TEST(LeastSquares, ACoefficientFarFromThePriorIsLearntInAHundredSamples) {
  for (size_t which = 0; which < 3; ++which)
    for (double factor : {26.0, 1 / 26.0})
      for (double noise : {0.0, 0.1}) {
        SCOPED_TRACE(testing::Message() << which << " x" << factor << ", noise " << noise);
        Fit::Vector truth = kPrior;
        truth[which] *= factor;
        Fit fit(kPrior);
        Rng rng(6);
        Learn(fit, truth, 100, noise, rng, [&] { return AnyLength(rng); });
        EXPECT_LT(WorstError(fit, truth), 0.05);
        if (noise == 0) {
          EXPECT_NEAR(fit.beta()[which] / truth[which], 1, 0.1);
        }
      }
}

// The demo model on a small CPU: attention costs more and the rest much less than the prior says.
constexpr Fit::Vector kSmallCpu = {2.3e-4, 0.0115, 0.079};

TEST(LeastSquares, ProportionsUnlikeThePriorsAreLearnt) {
  Fit fit(kPrior);
  Rng rng(7);
  Learn(fit, kSmallCpu, 100, 0.1, rng, [&] { return 1 + rng.Uniform() * 1900; });
  EXPECT_LT(WorstError(fit, kSmallCpu), 0.1);
  Learn(fit, kSmallCpu, 900, 0.1, rng, [&] { return 1 + rng.Uniform() * 1900; });
  EXPECT_LT(WorstError(fit, kSmallCpu), 0.05);
}

TEST(LeastSquares, OneLengthScalesThePriorAndKeepsItsProportionsForEver) {
  Fit fit(kPrior);
  Rng rng(8);
  const auto all = [&](double factor) {
    for (double n : {16.0, 1000.0, 8000.0, 32000.0}) {
      const Fit::Vector x = Prefill(n);
      EXPECT_NEAR(fit.Predict(x) / (factor * Dot(kPrior, x)), 1, 0.05) << n << " tokens";
    }
  };
  for (int samples : {20, 200, 20000}) {
    for (int i = 0; i < samples; ++i)
      fit.Observe(Prefill(1000), 7 * Dot(kPrior, Prefill(1000)) * (0.9 + 0.2 * rng.Uniform()));
    all(7);
  }
}

TEST(LeastSquares, NearlyOneLengthWithNoiseSendsOtherLengthsNowhere) {
  for (double factor : {1.0, 10.0}) {
    Fit fit(kPrior);
    Rng rng(9);
    for (int i = 0; i < 20000; ++i) {
      const Fit::Vector x = Prefill(950 + 100 * rng.Uniform());
      fit.Observe(x, factor * Dot(kPrior, x) * (0.9 + 0.2 * rng.Uniform()));
      if (i % 100 != 99) continue;
      for (double n : {16.0, 32.0, 8000.0, 32000.0}) {
        const double off = fit.Predict(Prefill(n)) / (factor * Dot(kPrior, Prefill(n)));
        ASSERT_GT(off, 0.5) << n << " tokens after " << i;
        ASSERT_LT(off, 2) << n << " tokens after " << i;
      }
    }
  }
}

TEST(LeastSquares, WhatWasLearntOutlastsSamplesOfOneLength) {
  Fit fit(kPrior);
  Rng rng(10);
  Learn(fit, kSmallCpu, 300, 0.1, rng, [&] { return AnyLength(rng); });
  ASSERT_LT(WorstError(fit, kSmallCpu), 0.05);
  for (int i = 0; i < 5000; ++i)
    fit.Observe(Prefill(1000), Dot(kSmallCpu, Prefill(1000)) * (0.9 + 0.2 * rng.Uniform()));
  EXPECT_LT(WorstError(fit, kSmallCpu), 0.15);
}

TEST(LeastSquares, ACoefficientOfNothingIsLearntOnceItIsSomething) {
  Fit fit(kPrior);
  Rng rng(11);
  const Fit::Vector linear = {0, 0.1, 0}, attention = {2e-3, 0.1, 0.1};
  Learn(fit, linear, 5000, 0.05, rng, [&] { return AnyLength(rng); });
  EXPECT_LT(WorstError(fit, linear), 0.1);
  Learn(fit, attention, 200, 0.05, rng, [&] { return AnyLength(rng); });
  EXPECT_LT(WorstError(fit, attention), 0.1);
}

}  // namespace
}  // namespace tidepool
