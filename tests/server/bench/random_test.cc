#include "server/bench/random.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "server/bench/arrivals.h"
#include "server/bench/statistics.h"

namespace tidepool {
namespace {

constexpr int kDraws = 200'000;

std::vector<double> Gaps(const ArrivalSpec& spec, uint64_t seed) {
  Arrivals arrivals(spec, seed);
  std::vector<double> gaps;
  absl::Duration last;
  for (int i = 0; i < kDraws; ++i) {
    const absl::Duration at = arrivals.Next();
    EXPECT_GE(at, last);
    gaps.push_back(absl::ToDoubleSeconds(at - last));
    last = at;
  }
  return gaps;
}

double Cv(const std::vector<double>& sample) { return StandardDeviation(sample) / Mean(sample); }

TEST(ArrivalsTest, PoissonHasExponentialGaps) {
  auto gaps = Gaps({.kind = ArrivalSpec::Kind::kPoisson, .rate = 50}, 1);
  EXPECT_NEAR(Mean(gaps), 0.02, 0.02 * 0.01);
  EXPECT_NEAR(Cv(gaps), 1, 0.02);
  std::sort(gaps.begin(), gaps.end());
  // Quantiles of the exponential distribution: -ln(1 - p) / rate.
  for (const double p : {0.1, 0.5, 0.9, 0.99}) {
    EXPECT_NEAR(Percentile(gaps, p * 100), -std::log(1 - p) / 50, 0.02 * -std::log(1 - p) / 50) << p;
  }
}

TEST(ArrivalsTest, GammaHasTheRateAndTheBurstinessAskedFor) {
  for (const double burstiness : {0.25, 0.5, 1.0, 4.0, 100.0}) {
    const auto gaps = Gaps({.kind = ArrivalSpec::Kind::kGamma, .rate = 20, .burstiness = burstiness}, 3);
    EXPECT_NEAR(Mean(gaps), 0.05, 0.05 * 0.02) << burstiness;
    EXPECT_NEAR(Cv(gaps), 1 / std::sqrt(burstiness), 0.02 / std::sqrt(burstiness)) << burstiness;
  }
}

TEST(ArrivalsTest, ConstantDoesNotDrift) {
  Arrivals arrivals({.kind = ArrivalSpec::Kind::kConstant, .rate = 3}, 0);
  for (int i = 0; i < 300'000; ++i) arrivals.Next();
  EXPECT_EQ(arrivals.Next(), absl::Seconds(100'000));
}

TEST(ArrivalsTest, DependOnTheSeedOnly) {
  const ArrivalSpec spec{.kind = ArrivalSpec::Kind::kGamma, .rate = 5, .burstiness = 0.7};
  EXPECT_EQ(Gaps(spec, 9), Gaps(spec, 9));
  EXPECT_NE(Gaps(spec, 9), Gaps(spec, 10));
}

std::vector<double> Lengths(std::string_view text) {
  const auto spec = LengthSpec::Parse(text);
  EXPECT_TRUE(spec.ok()) << spec.status();
  Rng rng(7);
  std::vector<double> out;
  for (int i = 0; i < kDraws; ++i) out.push_back(spec->Draw(rng));
  std::sort(out.begin(), out.end());
  return out;
}

TEST(LengthSpecTest, DrawsWhatItSays) {
  EXPECT_THAT(Lengths("128"), testing::Each(128));
  const auto uniform = Lengths("10-20");
  EXPECT_EQ(uniform.front(), 10);
  EXPECT_EQ(uniform.back(), 20);
  EXPECT_NEAR(Mean(uniform), 15, 0.05);
  const auto normal = Lengths("normal:500,50");
  EXPECT_NEAR(Mean(normal), 500, 1);
  EXPECT_NEAR(StandardDeviation(normal), 50, 1);
  const auto lognormal = Lengths("lognormal:100,0.5");
  EXPECT_NEAR(Percentile(lognormal, 50), 100, 1);
  EXPECT_NEAR(Mean(lognormal), 100 * std::exp(0.125), 1);
  EXPECT_NEAR(Mean(Lengths("exponential:300")), 300, 3);
  const auto clamped = Lengths("normal:100,100@50-120");
  EXPECT_EQ(clamped.front(), 50);
  EXPECT_EQ(clamped.back(), 120);
}

TEST(LengthSpecTest, NeverDrawsNothing) { EXPECT_EQ(Lengths("normal:1,50").front(), 1); }

TEST(LengthSpecTest, RefusesWhatIsNoLength) {
  for (const char* text :
       {"", "0", "-5", "1.5", "20-10", "x", "normal:1", "normal:1,2,3", "normal:a,b", "zipf:2", "128@",
        "128@9-3", "1e99", "nan", "exponential:1,2", "lognormal:-1,1", "5-"}) {
    EXPECT_FALSE(LengthSpec::Parse(text).ok()) << text;
  }
}

}  // namespace
}  // namespace tidepool
