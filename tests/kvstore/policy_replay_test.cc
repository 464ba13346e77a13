#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>

#include "kvstore/policy/replay.h"
#include "kvstore/policy/tuner.h"

namespace tidepool {
namespace {

using testing::HasSubstr;

constexpr char kTrace[] = "../shared/data/traces/mooncake/conversation_trace.jsonl";

TEST(TraceTest, ReadsRequestsAndNumbersTheirBlocks) {
  const auto trace = ParseMooncakeTrace(
      "{\"timestamp\": 5, \"input_length\": 1500, \"output_length\": 7, \"hash_ids\": [900, 7, 12]}\n"
      "\n"
      "{\"timestamp\":6,\"input_length\":600,\"output_length\":0,\"hash_ids\":[900,8]}");
  ASSERT_TRUE(trace.ok()) << trace.status();
  ASSERT_EQ(trace->requests.size(), 2u);
  EXPECT_EQ(trace->requests[0].at_ms, 5u);
  EXPECT_EQ(trace->requests[0].input_tokens, 1500u);
  EXPECT_EQ(trace->requests[0].output_tokens, 7u);
  EXPECT_EQ(trace->requests[0].blocks, (std::vector<uint32_t>{0, 1, 2}));
  EXPECT_EQ(trace->requests[1].blocks, (std::vector<uint32_t>{0, 3}));
  EXPECT_EQ(trace->blocks, 5u);
  EXPECT_EQ(trace->distinct_blocks, 4u);
}

TEST(TraceTest, RefusesWhatIsNoTraceAndNamesTheLine) {
  const std::string good =
      "{\"timestamp\": 5, \"input_length\": 1, \"output_length\": 7, \"hash_ids\": [9]}\n";
  for (const char* bad :
       {"{}", "hash_ids", "{\"timestamp\": x}",
        "{\"timestamp\": 5, \"input_length\": 1, \"output_length\": 7}",
        "{\"timestamp\": 5, \"input_length\": 1, \"output_length\": 7, \"hash_ids\": [9",
        "{\"timestamp\": 5, \"input_length\": 1, \"output_length\": 7, \"hash_ids\": [-9]}",
        "{\"timestamp\": 5, \"input_length\": 99999999999, \"output_length\": 7, \"hash_ids\": []}"}) {
    const auto trace = ParseMooncakeTrace(good + bad);
    EXPECT_EQ(trace.status().code(), absl::StatusCode::kInvalidArgument) << bad;
    EXPECT_THAT(std::string(trace.status().message()), HasSubstr("line 2"));
  }
  EXPECT_TRUE(ParseMooncakeTrace("")->requests.empty());
  EXPECT_FALSE(ReadMooncakeTrace("/nonexistent/trace").ok());
}

TEST(TraceTest, SessionsAreRecognisedFromSharedPrefixes) {
  BlockTrace trace;
  const std::vector<std::vector<uint32_t>> blocks = {{0, 1, 2}, {0, 3},       {0, 1, 4, 5},
                                                     {0, 3, 6}, {0, 1, 4, 7}, {0}};
  for (const auto& b : blocks) trace.requests.push_back({.blocks = b});
  trace.distinct_blocks = 8;
  RecogniseSessions(trace);
  std::vector<std::pair<uint64_t, uint32_t>> found;
  for (const auto& r : trace.requests) found.emplace_back(r.session, r.turn);
  EXPECT_EQ(found,
            (std::vector<std::pair<uint64_t, uint32_t>>{{1, 0}, {2, 0}, {1, 1}, {2, 1}, {1, 2}, {3, 0}}));
}

TEST(ReplayTest, CountsPrefixHitsOnly) {
  BlockTrace trace;
  for (const auto& b : std::vector<std::vector<uint32_t>>{{0, 1, 2}, {0, 1, 3}, {4, 1, 2}}) {
    trace.requests.push_back({.blocks = b});
  }
  trace.distinct_blocks = 5;
  for (const ReplayMode mode : {ReplayMode::kRequests, ReplayMode::kBlocks, ReplayMode::kUnlinked}) {
    const auto r = ReplayTrace(trace, {.slots = 8, .mode = mode});
    ASSERT_TRUE(r.ok()) << r.status();
    EXPECT_EQ(r->blocks, 9u);
    EXPECT_EQ(r->hits, 2u) << "the third request has its second block behind a miss";
    EXPECT_EQ(r->evictions, 0u);
  }
  const auto tiny = ReplayTrace(trace, {.slots = 2});
  ASSERT_TRUE(tiny.ok());
  EXPECT_EQ(tiny->hits, 2u) << "a request larger than the pool keeps its head";
}

class PublishedHitRatesTest : public testing::Test {
 protected:
  void SetUp() override {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
    GTEST_SKIP() << "single-threaded figures; the random tests exercise the same code under sanitizers";
#endif
    if (!std::filesystem::exists(kTrace)) GTEST_SKIP() << kTrace << " is not there";
    auto trace = ReadMooncakeTrace(kTrace);
    ASSERT_TRUE(trace.ok()) << trace.status();
    trace_ = std::move(*trace);
    ASSERT_EQ(trace_.requests.size(), 12031u);
    ASSERT_EQ(trace_.blocks, 288500u);
  }
  double Rate(ReplayOptions options) {
    const auto r = ReplayTrace(trace_, options);
    EXPECT_TRUE(r.ok()) << r.status();
    return r.ok() ? r->hit_rate() : -1;
  }
  BlockTrace trace_;
};

TEST_F(PublishedHitRatesTest, AreReproducedByThePoolToTheLastDigit) {
  BlockTrace with_sessions = trace_;
  RecogniseSessions(with_sessions);
  for (const PublishedHitRate& published : PublishedHitRates()) {
    const auto r = ReplayTrace(published.sessions ? with_sessions : trace_, published.options);
    ASSERT_TRUE(r.ok()) << r.status();
    const double scale = std::pow(10, published.digits);
    EXPECT_EQ(std::round(r->hit_rate() * scale) / scale, published.rate)
        << published.options.policy << " with room for " << published.options.slots;
  }
}

TEST_F(PublishedHitRatesTest, TurnAwareBeatsLruByItselfOnSealedBlocks) {
  // Nobody names a session here and nobody sets the bonus. Percentage points won at least.
  for (const auto& [slots, points] :
       {std::pair(1000u, 0.5), {3000u, 4.0}, {5859u, 1.5}, {10000u, 0.5}, {30000u, 0.0}}) {
    const double lru = Rate({.slots = slots, .policy = "lru", .partial_blocks = false});
    const double turns = Rate({.slots = slots, .policy = "turn-aware", .partial_blocks = false});
    EXPECT_GT(100 * turns, 100 * lru + points) << slots;
  }
}

TEST_F(PublishedHitRatesTest, TunerFindsThePolicyThatIsBestForTheTrace) {
  const auto key = [](uint32_t id) {
    BlockKey k;
    k.bytes[0] = static_cast<uint8_t>(id);
    k.bytes[1] = static_cast<uint8_t>(id >> 8);
    k.bytes[2] = static_cast<uint8_t>(id >> 16);
    return k;
  };
  PolicyTuner tuner({.slots = 3000, .policy = "lru"});
  std::vector<std::string> switches;
  for (const TraceRequest& r : trace_.requests) {
    std::vector<BlockKey> keys;
    for (size_t i = 0; i < r.input_tokens / kMooncakeBlockTokens && i < r.blocks.size(); ++i) {
      keys.push_back(key(r.blocks[i]));
    }
    if (const auto better = tuner.OnRequest(keys, 0)) switches.push_back(*better);
  }
  ASSERT_FALSE(switches.empty());
  EXPECT_EQ(tuner.policy(), "turn-aware");
  EXPECT_LE(switches.size(), 2u) << "it does not waver";
  for (const auto& s : tuner.scores()) {
    if (s.policy == "turn-aware") {
      EXPECT_NEAR(s.hit_rate, .112, .04) << "about what the whole pool gets";
    }
  }
}

}  // namespace
}  // namespace tidepool
