#include "kvstore/codec/level_chooser.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "base/rng.h"

namespace tidepool {
namespace {

constexpr double kNever = std::numeric_limits<double>::infinity();

// A block of 4 MB: what 32 tokens of an 8-billion-parameter model have.
const std::vector<CodecLevel> kLevels = {{CodecId::kCacheGen3, 1.1e6, 0.002, 0.004},
                                         {CodecId::kCacheGen2, 0.95e6, 0.002, 0.004},
                                         {CodecId::kCacheGen1, 0.8e6, 0.002, 0.004}};

TEST(CodecLevels, TakesTheBestThatArrivesInTime) {
  // 1 MB/s: 1.1, 0.95 and 0.8 s a block.
  EXPECT_EQ(ChooseCodecLevel(kLevels, 10, 1e6, 0, kNever, 20).level, 0u);
  EXPECT_EQ(ChooseCodecLevel(kLevels, 10, 1e6, 0, kNever, 10).level, 1u);
  EXPECT_EQ(ChooseCodecLevel(kLevels, 10, 1e6, 0, kNever, 9).level, 2u);
  // None in time: the earliest.
  EXPECT_EQ(ChooseCodecLevel(kLevels, 10, 1e6, 0, kNever, 1).level, 2u);
  EXPECT_FALSE(ChooseCodecLevel(kLevels, 10, 1e6, 0, kNever, 1).recompute);
}

TEST(CodecLevels, ComputesWhereThatIsFaster) {
  EXPECT_TRUE(ChooseCodecLevel(kLevels, 10, 1e6, 0, 7.9, 20).recompute);
  EXPECT_EQ(ChooseCodecLevel(kLevels, 10, 1e6, 0, 10, 20).level, 1u);  // 11 s of the best are more than 10
  EXPECT_TRUE(ChooseCodecLevel(kLevels, 10, 0, 0, 100, 20).recompute);
  EXPECT_TRUE(ChooseCodecLevel(kLevels, 10, 1e9, 50, 1, 100).recompute);  // the latency alone
  EXPECT_TRUE(ChooseCodecLevel({}, 10, 1e9, 0, 1, 100).recompute);
}

TEST(CodecLevels, DecodingThatIsSlowerThanTheLinkSetsThePace) {
  // 10 GB/s move a block in 0.1 ms, decoding takes 4.
  EXPECT_NEAR(CodecLoadSeconds(kLevels[0], 100, 1e10, 0), 0.002 + 0.00011 + 0.004 + 99 * 0.004, 1e-9);
  EXPECT_EQ(CodecLoadSeconds(kLevels[0], 0, 1e10, 1), 0.0);
  EXPECT_EQ(CodecLoadSeconds(kLevels[0], 1, 0, 0), kNever);
}

// Random links of 0.1 to 10 Gbit/s: what is chosen is never later than the deadline where something would
// have met it, never later than recomputing, and of all that meets both never of less quality.
TEST(CodecLevels, OnRandomLinksNothingBetterWasLeft) {
  Rng rng(1);
  int by_level[4] = {};
  for (int i = 0; i < 20000; ++i) {
    const double bandwidth = 0.1e9 / 8 * std::pow(100, rng.Uniform());
    const size_t blocks = 1 + rng.Below(200);
    const double recompute = static_cast<double>(blocks) * (0.002 + 0.2 * rng.Uniform());
    const double budget = static_cast<double>(blocks) * 0.15 * rng.Uniform();
    const CodecChoice choice = ChooseCodecLevel(kLevels, blocks, bandwidth, 0.001, recompute, budget);
    EXPECT_LE(choice.seconds, recompute);
    double earliest = recompute;
    for (size_t l = 0; l < kLevels.size(); ++l) {
      const double seconds = CodecLoadSeconds(kLevels[l], blocks, bandwidth, 0.001);
      earliest = std::min(earliest, seconds);
      const bool fits = seconds < recompute && seconds <= budget;
      if (!choice.recompute && l < choice.level) {
        EXPECT_FALSE(fits);
      }
      if (choice.recompute) {
        EXPECT_GE(seconds, recompute);
      }
    }
    if (earliest <= budget && choice.seconds > budget) {
      // Only an exact answer may be late where an approximate one would not be: never chosen so.
      ADD_FAILURE() << "missed a deadline that could be met";
    }
    ++by_level[choice.recompute ? 3 : choice.level];
  }
  for (const int n : by_level) EXPECT_GT(n, 200);  // each of the four has its place
}

// Against levels that never change: over the same links and deadlines fewer are missed than with the best
// level, and the quality is higher than with the worst.
TEST(CodecLevels, AdaptingMissesFewerDeadlinesThanAnyFixedLevelAtItsQuality) {
  Rng rng(2);
  CodecLevelChooser chooser(*FindBlockCodec("cachegen"), {32, 8, 128, 32, DType::kBF16});
  const size_t levels = chooser.levels().size();
  ASSERT_EQ(levels, 4u);
  int missed = 0, missed_fixed[4] = {};
  size_t worse = 0;
  double bandwidth = 1e8;
  constexpr int kFetches = 5000;
  for (int i = 0; i < kFetches; ++i) {
    // The link wanders between 0.1 and 10 Gbit/s.
    bandwidth = std::clamp(bandwidth * std::exp(0.2 * (rng.Uniform() - 0.5)), 0.0125e9, 1.25e9);
    constexpr size_t kBlocks = 50;
    const double budget = kBlocks * (0.014 + 0.06 * rng.Uniform());
    const CodecChoice choice = chooser.Choose(kBlocks, kNever, budget);
    const auto took = [&](size_t level) {
      return CodecLoadSeconds(chooser.levels()[level], kBlocks, bandwidth, 0);
    };
    missed += took(choice.level) > budget;
    worse += choice.level;
    for (size_t l = 0; l < levels; ++l) missed_fixed[l] += took(l) > budget;
    const double bytes = chooser.levels()[choice.level].bytes * kBlocks;
    chooser.ObserveSend(bytes, bytes / bandwidth);
  }
  EXPECT_LT(missed * 2, missed_fixed[0]);  // exact blocks on a slow link
  EXPECT_LT(missed, missed_fixed[1]);
  EXPECT_LT(missed, missed_fixed[levels - 1] * 1.15);
  EXPECT_LT(worse, kFetches * (levels - 1) * 2 / 3);  // and not by always taking the worst
}

TEST(CodecLevelChooser, LearnsSizesAndSpeedsFromWhatWasCoded) {
  const BlockLayout layout{4, 2, 64, 32, DType::kBF16};
  CodecLevelChooser chooser(*FindBlockCodec("cachegen"), layout);
  ASSERT_EQ(chooser.levels().size(), 4u);
  EXPECT_EQ(chooser.levels()[0].bytes, layout.block_bytes());
  const double before = chooser.levels()[3].bytes;
  for (int i = 0; i < 50; ++i) {
    chooser.ObserveEncode(CodecId::kCacheGen3, 10000, 0.5);
    chooser.ObserveDecode(CodecId::kCacheGen3, 0.25);
    chooser.ObserveEncode(CodecId::kInt8, 1, 9);  // none of its levels
  }
  EXPECT_NEAR(chooser.levels()[1].bytes, 10000, 10);
  EXPECT_NEAR(chooser.levels()[1].encode_seconds, 0.5, 0.001);
  EXPECT_NEAR(chooser.levels()[3].decode_seconds, 0.25, 0.001);
  EXPECT_LT(chooser.levels()[3].bytes, before);                // what one takes tells of the others
  EXPECT_EQ(chooser.levels()[0].bytes, layout.block_bytes());  // but nothing of exact blocks
}

TEST(CodecLevelChooser, OfAFixedCodecThereIsOneLevelAndWithoutAMeasurementTheBest) {
  const BlockLayout layout{4, 2, 64, 32, DType::kBF16};
  const CodecLevelChooser fixed(*FindBlockCodec("int4"), layout);
  ASSERT_EQ(fixed.levels().size(), 1u);
  EXPECT_EQ(fixed.levels()[0].codec, CodecId::kInt4);
  CodecLevelChooser any(*FindBlockCodec("cachegen"), layout);
  EXPECT_EQ(any.Choose(1000, kNever, 1e-9).level, 0u);
  any.ObserveSend(1e6, 1e-5);  // latency, not bandwidth
  EXPECT_EQ(any.bytes_per_second(), 0);
  any.ObserveSend(1e3, 1);
  EXPECT_EQ(any.Choose(1000, kNever, 1e-9).level, 3u);
}

}  // namespace
}  // namespace tidepool
