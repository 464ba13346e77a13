#include "server/bench/kv_codec_quality.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <iostream>

namespace tidepool {
namespace {

KvCodecQualityOptions Short() {
  KvCodecQualityOptions options;
  options.contexts = {256};
  options.questions = 12;
  return options;
}

// TIDEPOOL_CODEC_QUESTIONS=100 prints the table of kvstore/codec/README.md.
TEST(KvCodecQuality, CodecsKeepWhatTheyPromiseOnTheDemoModel) {
  KvCodecQualityOptions options = Short();
  if (const char* questions = std::getenv("TIDEPOOL_CODEC_QUESTIONS")) {
    options.contexts = KvCodecQualityOptions().contexts;
    options.questions = static_cast<uint32_t>(std::atoi(questions));
  }
  const auto rows = MeasureKvCodecQuality(options);
  ASSERT_TRUE(rows.ok()) << rows.status();
  std::cout << KvCodecQualityTable(*rows);
  for (const KvCodecQualityRow& r : *rows) {
    SCOPED_TRACE(r.codec);
    EXPECT_GE(r.first.right_exact, 0.9);  // the model does what it was trained for
    for (const KvCodecAnswers& a : {r.first, r.second}) {
      if (r.codec == "none" || r.codec == "lossless") {
        EXPECT_EQ(a.right, a.right_exact);
        EXPECT_EQ(a.top1, 1.0);
        EXPECT_LT(a.kl, 1e-9);
      } else if (r.codec == "int8" || r.codec == "fp8") {
        EXPECT_GE(a.top1, 0.98);
        EXPECT_LT(a.kl, 0.05);
      }
    }
    EXPECT_GT(r.ratio, r.codec == "none"                       ? 0.99
                       : r.codec == "lossless"                 ? 1.2
                       : r.codec == "int8" || r.codec == "fp8" ? 1.95
                                                               : 3.0);
  }
}

TEST(KvCodecQuality, RefusesWhatItCannotMeasure) {
  KvCodecQualityOptions options = Short();
  options.codecs = {"zip"};
  EXPECT_EQ(MeasureKvCodecQuality(options).status().code(), absl::StatusCode::kInvalidArgument);
  options = Short();
  options.contexts = {100000};
  EXPECT_EQ(MeasureKvCodecQuality(options).status().code(), absl::StatusCode::kInvalidArgument);
  options.contexts = {30};
  EXPECT_EQ(MeasureKvCodecQuality(options).status().code(), absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace tidepool
