#include "server/bench/report.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "server/bench/statistics.h"

namespace tidepool {
namespace {

using testing::HasSubstr;

RequestRecord Record(double planned, double ttft, std::vector<double> gaps, uint32_t input = 10) {
  RequestRecord r;
  r.planned = r.released = r.dispatched = r.sent = absl::Seconds(planned);
  r.first = r.last = absl::Seconds(planned + ttft);
  for (const double gap : gaps) r.last += absl::Seconds(gap);
  r.end = r.last;
  r.gaps_seconds = std::move(gaps);
  r.http_status = 200;
  r.got_token = r.usage_from_server = true;
  r.input_tokens = input;
  r.output_tokens = static_cast<uint32_t>(r.gaps_seconds.size() + 1);
  return r;
}

RequestRecord Failed(double planned, int status) {
  RequestRecord r = Record(planned, 0.1, {});
  r.http_status = status;
  r.error = "no";
  return r;
}

Slo SloOf(std::string_view text) {
  auto slo = Slo::Parse(text);
  EXPECT_TRUE(slo.ok()) << slo.status();
  return *slo;
}

// The expected values are numpy's: np.percentile(x, q), np.std(x).
TEST(StatisticsTest, AgreesWithNumpy) {
  const std::vector<double> x = {1, 2, 3, 4, 10};
  EXPECT_DOUBLE_EQ(Mean(x), 4);
  EXPECT_NEAR(StandardDeviation(x), 3.1622776601683795, 1e-12);
  EXPECT_DOUBLE_EQ(Percentile(x, 0), 1);
  EXPECT_DOUBLE_EQ(Percentile(x, 50), 3);
  EXPECT_DOUBLE_EQ(Percentile(x, 90), 7.6);
  EXPECT_NEAR(Percentile(x, 99), 9.76, 1e-12);
  EXPECT_DOUBLE_EQ(Percentile(x, 100), 10);
  EXPECT_DOUBLE_EQ(Percentile(std::vector<double>{7}, 99), 7);
  EXPECT_EQ(Percentile({}, 50), 0);
  EXPECT_EQ(Mean({}), 0);
}

TEST(SloTest, ReadsBothNotations) {
  EXPECT_EQ(SloOf("ttft:200ms,itl:50ms").text(), "ttft:200ms,itl:50ms");
  EXPECT_EQ(SloOf("ttft:200 tpot:50 e2el:1.5s").text(), "ttft:200ms,tpot:50ms,e2el:1.5s");
  for (const char* text :
       {"ttft", "ttft:", "ttft:x", "ttft:-1", "foo:1", "ttft:1,ttft:2", "ttft:inf", "ttft:1h:2"}) {
    EXPECT_FALSE(Slo::Parse(text).ok()) << text;
  }
  EXPECT_TRUE(SloOf("").empty());
}

TEST(SloTest, JudgesEachBoundByItself) {
  // TTFT 200 ms; gaps of 10, 20 and 90 ms: mean 40, TPOT 40, worst 90; end to end 320 ms.
  const RequestRecord r = Record(5, 0.2, {0.01, 0.02, 0.09});
  for (const char* text :
       {"ttft:201ms", "tpot:41ms", "itl:41ms", "itl_max:91ms", "itl_p99:89ms", "e2el:321ms"}) {
    EXPECT_TRUE(SloOf(text).Good(r)) << text;
  }
  for (const char* text :
       {"ttft:199ms", "tpot:39ms", "itl:39ms", "itl_max:89ms", "itl_p99:88ms", "e2el:319ms"}) {
    EXPECT_FALSE(SloOf(text).Good(r)) << text;
  }
  EXPECT_FALSE(SloOf("ttft:300ms,tpot:39ms").Good(r));
  EXPECT_FALSE(SloOf("ttft:10s").Good(Failed(0, 500)));
}

TEST(SloTest, CountsFromThePlannedStart) {
  RequestRecord r = Record(1, 0.1, {});
  EXPECT_TRUE(SloOf("ttft:150ms").Good(r));
  r.planned = absl::Milliseconds(900);  // sent 100 ms late: the server does not get the benefit
  EXPECT_FALSE(SloOf("ttft:150ms").Good(r));
}

TEST(SummaryTest, AddsUpWhatTheRequestsCameTo) {
  std::vector<RequestRecord> records = {Record(0, 0.1, {0.05, 0.05}), Record(1, 0.2, {0.1, 0.1, 0.1}, 20),
                                        Record(2, 0.4, {}), Failed(3, 500), Failed(3.9, 429)};
  records[0].cached_tokens = 4;
  const std::vector<double> percents = {50, 99};
  const Slo slo = SloOf("ttft:250ms,tpot:60ms");
  const Summary s = Summarize(records, slo, percents, {});
  EXPECT_NEAR(s.duration_seconds, 4.0, 1e-9);  // the last answer, a refusal, ended at 4
  EXPECT_EQ(s.completed, 3u);
  EXPECT_EQ(s.failed, 2u);
  EXPECT_EQ(s.rejected, 1u);
  EXPECT_EQ(s.good, 1u);  // the second is too slow a token, the third too late
  EXPECT_EQ(s.input_tokens, 40u);
  EXPECT_EQ(s.output_tokens, 8u);
  EXPECT_EQ(s.cached_tokens, 4u);
  EXPECT_NEAR(s.request_throughput, 0.75, 1e-9);
  EXPECT_NEAR(s.request_goodput, 0.25, 1e-9);
  EXPECT_NEAR(s.output_throughput, 2, 1e-9);
  EXPECT_NEAR(s.total_token_throughput, 12, 1e-9);
  EXPECT_NEAR(s.ttft.mean, 700.0 / 3, 1e-6);
  EXPECT_NEAR(s.ttft.median, 200, 1e-6);
  EXPECT_NEAR(s.ttft.percentiles[1], 396, 1e-6);
  EXPECT_NEAR(s.tpot.mean, 75, 1e-6);  // of the two with more than one token
  EXPECT_NEAR(s.itl.mean, 80, 1e-6);   // five gaps
  EXPECT_NEAR(s.itl.median, 100, 1e-6);
  EXPECT_NEAR(s.e2el.median, 400, 1e-6);
  EXPECT_EQ(s.concurrent_requests_max, 1u);
  EXPECT_NEAR(s.output_tokens_per_second_max, 4, 1e-9);  // the second's four, all in [1, 2)
}

TEST(SummaryTest, FindsThePeakOfRequestsUnderWay) {
  std::vector<RequestRecord> records;
  for (int i = 0; i < 10; ++i) records.push_back(Record(i * 0.1, 0.25, {}));
  EXPECT_EQ(Summarize(records, Slo(), {}, {}).concurrent_requests_max, 3u);
}

TEST(SummaryTest, ShowsWhoseDelayItWas) {
  RequestRecord r = Record(0, 2, {});
  r.released = absl::Seconds(1);      // the cap
  r.dispatched = absl::Seconds(1.5);  // the load generator
  const Summary s = Summarize(std::vector{r}, Slo(), {99}, {});
  EXPECT_NEAR(s.cap_wait.mean, 1000, 1e-6);
  EXPECT_NEAR(s.generator_delay.mean, 500, 1e-6);
  EXPECT_NEAR(s.ttft.mean, 2000, 1e-6);
  ASSERT_EQ(Warnings(s).size(), 1u);
  EXPECT_THAT(Warnings(s)[0], HasSubstr("500.0 ms late"));
}

// The names of vllm bench serve's result; tools that read it find them here.
TEST(SummaryTest, HasTheKeysOfVllm) {
  const std::vector<RequestRecord> records = {Record(0, 0.1, {0.05, 0.05}), Failed(0, 500)};
  const std::vector<double> percents = {50, 99};
  const Slo slo = SloOf("ttft:1s");
  auto json = SummaryJson(Summarize(records, slo, percents, {}), slo, percents);
  AddDetails(records, true, json);
  for (const char* key :
       {"duration", "completed", "failed", "total_input_tokens", "total_output_tokens", "request_throughput",
        "request_goodput", "output_throughput", "total_token_throughput", "input_lens", "output_lens",
        "ttfts", "itls", "generated_texts", "errors", "max_output_tokens_per_s", "max_concurrent_requests"}) {
    EXPECT_TRUE(json.contains(key)) << key;
  }
  for (const std::string metric : {"ttft", "tpot", "itl", "e2el"}) {
    for (const std::string what : {"mean", "median", "std", "p50", "p99"}) {
      EXPECT_TRUE(json[what + "_" + metric + "_ms"].is_number()) << what << metric;
    }
  }
  EXPECT_EQ(json["errors"], (nlohmann::ordered_json{"", "no"}));
  EXPECT_EQ(json["output_lens"], (nlohmann::ordered_json{3, 0}));
}

TEST(SummaryTest, PrintsTheTableOfVllm) {
  const std::vector<RequestRecord> records = {Record(0, 0.1, {0.05, 0.05})};
  const std::string table =
      SummaryTable(Summarize(records, SloOf("ttft:1s"), {50, 99}, {}), SloOf("ttft:1s"), {50, 99});
  for (const char* line :
       {"============ Serving Benchmark Result ============\n",
        "Successful requests:                     1         \n", "Request goodput (req/s):",
        "Peak output token throughput (tok/s):", "---------------Time to First Token----------------\n",
        "Mean TTFT (ms):                          100.00    \n",
        "-----Time per Output Token (excl. 1st token)------\n", "P99 ITL (ms):", "Median E2EL (ms):"}) {
    EXPECT_THAT(table, HasSubstr(line));
  }
}

TEST(SummaryTest, HoldsWithoutAnyRequest) {
  const Summary s = Summarize({}, Slo(), {99}, {});
  EXPECT_EQ(s.completed, 0u);
  EXPECT_EQ(s.request_throughput, 0);
  EXPECT_EQ(s.ttft.percentiles[0], 0);
  EXPECT_FALSE(SummaryTable(s, Slo(), {99}).empty());
}

}  // namespace
}  // namespace tidepool
