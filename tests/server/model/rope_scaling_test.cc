#include "server/model/rope_scaling.h"

#include <gtest/gtest.h>

#include <cmath>
#include <numbers>

namespace tidepool {
namespace {

// Within a few roundings to float32 of the exact value.
void ExpectFrequencies(const std::vector<float>& got, const std::vector<double>& want) {
  ASSERT_EQ(got.size(), want.size());
  for (size_t i = 0; i < got.size(); ++i) EXPECT_NEAR(got[i], want[i], 5e-7 * want[i]) << "frequency " << i;
}

std::vector<double> Plain(double theta, uint32_t dim) {
  std::vector<double> out;
  for (uint32_t i = 0; i < dim; i += 2) out.push_back(std::pow(theta, -double(i) / dim));
  return out;
}

TEST(RopeFrequencies, UnscaledFallGeometrically) {
  ExpectFrequencies(RopeFrequencies({.theta = 500000, .rotary_dim = 128}, 1), Plain(500000, 128));
  ExpectFrequencies(RopeFrequencies({.rotary_dim = 2}, 1), {1.0});
}

TEST(RopeFrequencies, LinearDividesAll) {
  std::vector<double> want = Plain(10000, 64);
  for (double& f : want) f /= 8;
  ExpectFrequencies(RopeFrequencies({.type = RopeType::kLinear, .rotary_dim = 64, .factor = 8}, 1), want);
}

TEST(RopeFrequencies, DynamicIsUnscaledUpToTheTrainedLengthAndThenHasALargerBase) {
  const RopeSpec r{.type = RopeType::kDynamic, .rotary_dim = 64, .original_max_positions = 2048, .factor = 4};
  ExpectFrequencies(RopeFrequencies(r, 100), Plain(10000, 64));
  ExpectFrequencies(RopeFrequencies(r, 2048), Plain(10000, 64));
  // factor * length / trained - (factor - 1) = 13
  ExpectFrequencies(RopeFrequencies(r, 8192), Plain(10000 * std::pow(13.0, 64.0 / 62), 64));
  EXPECT_NE(RopeFrequencies(r, 8192), RopeFrequencies(r, 4096));
}

TEST(RopeFrequencies, LongropeChoosesItsFactorsByTheLongestSequenceServed) {
  const RopeSpec r{.type = RopeType::kLongrope,
                   .rotary_dim = 6,
                   .original_max_positions = 4096,
                   .short_factor = {1.0, 1.5, 2.0},
                   .long_factor = {2.0, 10.0, 60.0}};
  std::vector<double> want_short = Plain(10000, 6), want_long = want_short;
  for (size_t i = 0; i < 3; ++i) {
    want_short[i] /= r.short_factor[i];
    want_long[i] /= r.long_factor[i];
  }
  ExpectFrequencies(RopeFrequencies(r, 4096), want_short);
  ExpectFrequencies(RopeFrequencies(r, 4097), want_long);
}

TEST(RopeFrequencies, Llama3KeepsShortWavesStretchesLongOnesAndRampsBetween) {
  const RopeSpec r{.type = RopeType::kLlama3,
                   .theta = 500000,
                   .rotary_dim = 128,
                   .original_max_positions = 8192,
                   .factor = 8,
                   .low_freq_factor = 1,
                   .high_freq_factor = 4};
  std::vector<double> want = Plain(500000, 128);
  int kept = 0, stretched = 0;
  for (double& f : want) {
    const double turns = 8192 * f / (2 * std::numbers::pi);  // over the trained length
    if (turns > 4) {
      ++kept;
    } else if (turns < 1) {
      ++stretched;
      f /= 8;
    } else {
      const double smooth = (turns - 1) / 3;
      f = (1 - smooth) * f / 8 + smooth * f;
    }
  }
  EXPECT_GT(kept, 20);
  EXPECT_GT(stretched, 20);
  EXPECT_LT(kept + stretched, 64);
  ExpectFrequencies(RopeFrequencies(r, 131072), want);
}

TEST(RopeFrequencies, YarnKeepsFastWavesInterpolatesSlowOnesAndRampsBetween) {
  RopeSpec r{.type = RopeType::kYarn,
             .theta = 1000000,
             .rotary_dim = 128,
             .original_max_positions = 32768,
             .factor = 4};
  for (const bool truncate : {true, false}) {
    r.truncate = truncate;
    // Dimension whose wave turns `n` times over the trained length.
    const auto dimension = [&](double n) {
      return 128 * std::log(32768 / (n * 2 * std::numbers::pi)) / (2 * std::log(1000000.0));
    };
    const double low = truncate ? std::floor(dimension(32)) : dimension(32);
    const double high = truncate ? std::ceil(dimension(1)) : dimension(1);
    std::vector<double> want = Plain(1000000, 128);
    for (size_t i = 0; i < want.size(); ++i) {
      const double ramp = std::clamp((static_cast<double>(i) - low) / (high - low), 0.0, 1.0);
      want[i] = want[i] * (1 - ramp) + want[i] / 4 * ramp;
    }
    ExpectFrequencies(RopeFrequencies(r, 131072), want);
    EXPECT_EQ(RopeFrequencies(r, 131072), RopeFrequencies(r, 64));
  }
}

TEST(RopeFrequencies, SummaryNamesTheTypeAndWhatMatters) {
  EXPECT_EQ(RopeSummary({.theta = 500000}), "default, theta 500000");
  EXPECT_EQ(RopeSummary({.type = RopeType::kLlama3, .original_max_positions = 8192, .factor = 32}),
            "llama3, theta 10000, factor 32, trained on 8192");
}

}  // namespace
}  // namespace tidepool
