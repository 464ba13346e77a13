#include "tools/simulate/workload.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <set>

#include "tests/sim/sim_builder.h"

namespace tidepool {
namespace {

using testing::HasSubstr;

Workload Read(const std::string& text, const TraceOptions& options = {}) {
  const auto trace = ParseTrace(text, "t");
  EXPECT_TRUE(trace.ok()) << trace.status();
  auto workload = FromTrace(*trace, "t", options);
  EXPECT_TRUE(workload.ok()) << workload.status();
  return *workload;
}

constexpr char kMooncake[] =
    "{\"timestamp\": 0, \"input_length\": 1100, \"output_length\": 7, \"hash_ids\": [9, 8, 7]}\n"
    "{\"timestamp\": 2000, \"input_length\": 1600, \"output_length\": 5, \"hash_ids\": [9, 8, 3, 4]}\n";

TEST(WorkloadTest, EqualHashIdsAreEqualKeysAndTailsHaveNone) {
  const Workload w = Read(kMooncake);
  std::vector<BlockKey> a, b;
  w.Keys(w.requests[0], 1100, 512, a);
  w.Keys(w.requests[1], 1600, 512, b);
  ASSERT_EQ(a.size(), 2u) << "two blocks are full, the third is not";
  ASSERT_EQ(b.size(), 3u);
  EXPECT_EQ(a[0], b[0]);
  EXPECT_EQ(a[1], b[1]);
  EXPECT_EQ(w.requests[1].at, 2 * kSimSecond);
}

TEST(WorkloadTest, SmallerBlocksDivideTheIdsTheyBelongTo) {
  const Workload w = Read(kMooncake);
  std::vector<BlockKey> a, b;
  w.Keys(w.requests[0], 1100, 128, a);
  w.Keys(w.requests[1], 1600, 128, b);
  ASSERT_EQ(a.size(), 8u) << "1100 tokens seal 8 blocks of 128";
  ASSERT_EQ(b.size(), 12u);
  EXPECT_TRUE(std::equal(a.begin(), a.end(), b.begin()));
  EXPECT_EQ(std::set<BlockKey>(b.begin(), b.end()).size(), 12u);
}

TEST(WorkloadTest, SpeedLengthAndNumberAreScaled) {
  const Workload w = Read(kMooncake, {.speed = 4, .length_scale = 0.25});
  EXPECT_EQ(w.requests[1].at, kSimSecond / 2);
  EXPECT_EQ(w.requests[1].prompt_tokens, 400u);
  EXPECT_EQ(w.requests[1].output_tokens, 1u);
  EXPECT_EQ(w.stretch_tokens, 128u);
  EXPECT_EQ(Read(kMooncake, {.requests = 1}).requests.size(), 1u);
}

TEST(WorkloadTest, LengthsAloneShareNothing) {
  for (const char* text :
       {"TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,4808,10\n"
        "2023-11-16 18:17:04.0319600,3180,8\n",
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n5,ChatGPT,4808,10,482,"
        "Conversation log\n45,ChatGPT,3180,8,490,Conversation log\n"}) {
    const Workload w = Read(text);
    ASSERT_EQ(w.requests.size(), 2u);
    std::vector<BlockKey> a, b;
    w.Keys(w.requests[0], w.requests[0].prompt_tokens, 512, a);
    w.Keys(w.requests[1], w.requests[1].prompt_tokens, 512, b);
    EXPECT_EQ(a.size(), 9u);
    EXPECT_EQ(b.size(), 6u);
    std::set<BlockKey> all(a.begin(), a.end());
    all.insert(b.begin(), b.end());
    EXPECT_EQ(all.size(), 15u);
  }
}

TEST(WorkloadTest, OptionsOutOfRangeAreNamed) {
  const auto trace = ParseTrace(kMooncake, "t");
  const auto bad = FromTrace(*trace, "t", {.speed = 0});
  EXPECT_THAT(std::string(bad.status().message()), HasSubstr("speed is 0; it must be above 0"));
  SyntheticOptions mix;
  mix.batch_share = 2;
  EXPECT_THAT(std::string(MakeSynthetic(mix, 1).status().message()), HasSubstr("batch-share"));
  EXPECT_THAT(std::string(ParseTenantShares("a:x").status().message()), HasSubstr("weight of a"));
}

TEST(SyntheticTest, EqualSeedsGiveEqualMixesAndOthersDoNot) {
  const auto a = MakeSynthetic(TestMix(5, 500), 3), b = MakeSynthetic(TestMix(5, 500), 3),
             c = MakeSynthetic(TestMix(5, 500), 4);
  ASSERT_TRUE(a.ok() && b.ok() && c.ok());
  ASSERT_EQ(a->requests.size(), 500u);
  EXPECT_EQ(a->ids, b->ids);
  for (size_t i = 0; i < 500; ++i) EXPECT_EQ(a->requests[i].at, b->requests[i].at);
  EXPECT_NE(a->requests[100].at, c->requests[100].at);
}

TEST(SyntheticTest, ComesAtTheRateAskedFor) {
  auto mix = TestMix(20, 20'000);
  mix.burst = 2;
  const auto w = MakeSynthetic(mix, 1);
  ASSERT_TRUE(w.ok());
  EXPECT_NEAR(20'000 / ToSeconds(w->span()), 20, 1.5);
}

TEST(SyntheticTest, ATurnsPromptBeginsWithAllThatWasSaidBefore) {
  auto mix = TestMix(5, 200);
  mix.tenants = {{"a", 3}, {"b", 1}};
  const auto w = MakeSynthetic(mix, 1);
  ASSERT_TRUE(w.ok());
  std::map<uint64_t, const SimRequest*> last;  // by session: where its chain is kept
  size_t turns = 0, of_a = 0;
  std::vector<BlockKey> before, now;
  for (const SimRequest& r : w->requests) {
    if (r.tenant == 0) ++of_a;
    if (const SimRequest* earlier = std::exchange(last[r.first], &r)) {
      ++turns;
      EXPECT_GT(r.prompt_tokens, earlier->prompt_tokens + earlier->output_tokens);
      w->Keys(*earlier, earlier->prompt_tokens + earlier->output_tokens, 32, before);
      w->Keys(r, r.prompt_tokens, 32, now);
      ASSERT_GE(now.size(), before.size());
      EXPECT_TRUE(std::equal(before.begin(), before.end(), now.begin()));
    }
  }
  EXPECT_GT(turns, 50u);
  EXPECT_NEAR(static_cast<double>(of_a), 150, 30);
}

}  // namespace
}  // namespace tidepool
