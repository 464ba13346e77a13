#include "tools/simulate/profile.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>

#include "base/small_file.h"

namespace tidepool {
namespace {

using testing::HasSubstr;

std::string Good() { return *ReadSmallFile("config/profiles/llama-3-8b-h200.yaml", 1 << 20); }

std::string Replaced(std::string text, const std::string& from, const std::string& to) {
  const size_t at = text.find(from);
  EXPECT_NE(at, text.npos) << from;
  return text.replace(at, from.size(), to);
}

TEST(ProfileTest, EveryProfileInConfigLoadsAndIsFoundByName) {
  size_t n = 0;
  for (const auto& entry : std::filesystem::directory_iterator("config/profiles")) {
    if (entry.path().extension() != ".yaml") continue;
    ++n;
    const auto p = LoadProfile(entry.path().stem().string(), ".");
    ASSERT_TRUE(p.ok()) << p.status();
    EXPECT_FALSE(p->about.empty());
    EXPECT_GT(p->PrefillSeconds(1024, 0), p->PrefillSeconds(256, 0));
    EXPECT_GT(p->DecodeStepSeconds(8, 8000), p->DecodeStepSeconds(1, 1000));
  }
  EXPECT_GE(n, 5u);
}

TEST(ProfileTest, H200StepsAreThoseOfItsLimits) {
  // PERFORMANCE's floors for this model: 3.7 / 5.7 / 11.5 ms at 1k context, 8,192 tokens in 0.18 s.
  const auto p = LoadProfile("llama-3-8b-h200", ".");
  ASSERT_TRUE(p.ok()) << p.status();
  EXPECT_NEAR(p->DecodeStepSeconds(1, 1024) * 1e3, 3.7, 0.6);
  EXPECT_NEAR(p->DecodeStepSeconds(256, 256 * 1024) * 1e3, 11.5, 5);
  EXPECT_NEAR(p->PrefillSeconds(8192, 0), 0.18, 0.1);
  EXPECT_GE(p->PrefillSeconds(8192, 0), 0.18);
}

TEST(ProfileTest, ErrorsNameFileFieldAndLimit) {
  const auto message = [](const std::string& text) {
    const auto p = ParseProfile(text, "f.yaml");
    EXPECT_FALSE(p.ok()) << text;
    return std::string(p.status().message());
  };
  EXPECT_THAT(message(Replaced(Good(), "  token_us: ", "  tokens_us: ")), HasSubstr("f.yaml: step.token"));
  EXPECT_THAT(message(Replaced(Good(), "layers: 32", "layers: 0")),
              HasSubstr("model.layers is 0; it must be a whole number from 1 to"));
  EXPECT_THAT(message(Replaced(Good(), "jitter: 0.05", "jitter: x")), HasSubstr("step.jitter"));
  EXPECT_THAT(message(Replaced(Good(), "jitter: 0.05", "jitter: 7")), HasSubstr("from 0 to 1"));
  EXPECT_THAT(message(Replaced(Good(), "max_step_tokens: 2048", "max_step_tokens: 8")),
              HasSubstr("at least engine.max_batch"));
  EXPECT_THAT(message("a: ["), HasSubstr("f.yaml:"));
  EXPECT_THAT(message("[]"), HasSubstr("must be a map"));
  EXPECT_THAT(message(Good() + "surplus: 1\n"), HasSubstr("surplus is no field"));
}

TEST(ProfileTest, AnUnknownNameListsThoseThatThereAre) {
  const auto p = LoadProfile("gpt-7", ".");
  EXPECT_EQ(p.status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(p.status().message()), HasSubstr("llama-3-8b-h200"));
}

}  // namespace
}  // namespace tidepool
