#include "server/gateway/access_log.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <sstream>

#include "base/digest.h"
#include "server/gateway/json.h"

namespace tidepool {
namespace {

using ::testing::Contains;
using ::testing::Not;
using ::testing::Pair;

AccessRecord::Options Options() {
  AccessRecord::Options options;
  options.protocol = "http";
  options.peer = "127.0.0.1";
  options.method = "POST";
  options.path = "/v1/completions";
  options.bytes_in = 12;
  return options;
}

OrderedJson Line(const AccessRecord& record) {
  const std::string line = record.Line();
  EXPECT_EQ(line.find('\n'), std::string::npos);
  auto json = ParseJson(line);
  EXPECT_TRUE(json.ok()) << line;
  return json.ok() ? *json : OrderedJson();
}

std::string ReadAll(const std::string& path) {
  std::stringstream text;
  text << std::ifstream(path).rdbuf();
  return text.str();
}

TEST(AccessRecordTest, ALineHoldsWhatTheRequestTook) {
  AccessRecord record(Options());
  record.SetTenant("team-a");
  HttpHeaders headers = {{"X-Request-Id", "r-1"}, {"Retry-After", "3"}};
  record.OnHead(200, headers);
  record.OnBody(100);
  record.OnBody(20);
  AccessWork work;
  work.id = "abc";
  work.model = "toy";
  work.prompt_tokens = 10;
  work.cached_tokens = 4;
  work.completion_tokens = 3;
  work.attempts = 1;
  work.finish_reason = "stop";
  work.ttft = 0.0125;
  work.queue = 0;
  record.AddWork(work);
  record.AddWork(work);  // a second choice
  const OrderedJson line = Line(record);
  EXPECT_EQ(line["status"], 200);
  EXPECT_EQ(line["tenant"], "team-a");
  EXPECT_EQ(line["request_id"], "r-1");
  EXPECT_EQ(line["bytes_in"], 12);
  EXPECT_EQ(line["bytes_out"], 120);
  EXPECT_EQ(line["prompt_tokens"], 10);
  EXPECT_EQ(line["cached_tokens"], 4);
  EXPECT_EQ(line["completion_tokens"], 6) << "of both";
  EXPECT_EQ(line["ttft_ms"], 12.5);
  EXPECT_EQ(line["queue_ms"], 0);
  EXPECT_FALSE(line.contains("decode_ms")) << "it did not come so far";
  EXPECT_EQ(line["finish_reason"], "stop");
  EXPECT_FALSE(line.contains("error"));
  EXPECT_THAT(headers, Contains(Pair("Retry-After-Ms", "3000")));
}

TEST(AccessRecordTest, EveryRefusalForNowSaysWhenToComeBack) {
  for (const int status : {429, 503}) {
    HttpHeaders headers;
    AccessRecord(Options()).OnHead(status, headers);
    EXPECT_THAT(headers, Contains(Pair("Retry-After", "1"))) << status;
    EXPECT_THAT(headers, Contains(Pair("Retry-After-Ms", "1000"))) << status;
  }
  HttpHeaders headers;
  AccessRecord(Options()).OnHead(400, headers);
  EXPECT_THAT(headers, Not(Contains(Pair("Retry-After", "1"))));
}

TEST(AccessRecordTest, AClientThatLeftBeforeAnyAnswerIs499) {
  AccessRecord record(Options());
  AccessWork work;
  work.error = "client_gone";
  record.AddWork(work);
  EXPECT_EQ(Line(record)["status"], 499);
  EXPECT_EQ(Line(record)["error"], "client_gone");
}

TEST(AccessRecordTest, TracesAreContinuedOrBegun) {
  AccessRecord::Options options = Options();
  options.traceparent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
  AccessRecord given(options);
  EXPECT_EQ(given.trace().TraceIdHex(), "4bf92f3577b34da6a3ce929d0e0e4736");
  EXPECT_NE(FormatTraceparent(given.trace()), options.traceparent) << "under our own id";
  EXPECT_TRUE(given.trace().sampled);
  HttpHeaders headers;
  given.OnHead(200, headers);
  EXPECT_THAT(headers, Contains(Pair("Traceparent", FormatTraceparent(given.trace()))));
  options.traceparent = "00-00000000000000000000000000000000-00f067aa0ba902b7-01";
  AccessRecord fresh(options), other(options);
  EXPECT_TRUE(fresh.trace().valid());
  EXPECT_FALSE(fresh.trace() == other.trace());
}

TEST(AccessRecordTest, HostileTextStaysInsideItsLine) {
  AccessRecord::Options options = Options();
  options.path = "/a\n{\"event\":\"access\"}\x1b[31m\xff";
  EXPECT_EQ(Line(AccessRecord(options))["event"], "access");
  options.path = "/" + std::string(100000, 'x');
  EXPECT_LT(AccessRecord(options).Line().size(), 2000u);
}

TEST(AccessLogTest, WritesWhenTheLastHolderLetsGoAndReopens) {
  const auto dir = std::filesystem::temp_directory_path() / ("tidepool-access-" + RandomHexId());
  std::filesystem::create_directory(dir);
  const std::string path = dir / "access.log";
  auto log = AccessLog::Open(path);
  ASSERT_TRUE(log.ok()) << log.status();
  AccessRecord::Options options = Options();
  options.log = log->get();
  auto record = std::make_shared<AccessRecord>(options);
  auto runner = record;
  record.reset();
  EXPECT_EQ(ReadAll(path), "") << "its work is not done";
  runner.reset();
  EXPECT_NE(ReadAll(path).find("\"event\":\"access\""), std::string::npos);
  std::filesystem::rename(path, path + ".1");
  EXPECT_TRUE((*log)->Reopen().ok());
  std::make_shared<AccessRecord>(options);
  EXPECT_NE(ReadAll(path), "");
  log->reset();
  std::filesystem::remove_all(dir);
  EXPECT_EQ(AccessLog::Open("/proc/no/such/folder").status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_FALSE((*AccessLog::Open("off"))->enabled());
}

TEST(AccessLogTest, AFileThatItMakesIsItsOwnersAlone) {
  const auto dir = std::filesystem::temp_directory_path() / ("tidepool-log-" + RandomHexId());
  const auto path = dir / "access";
  EXPECT_TRUE(AccessLog::Open(path.string()).ok());
  EXPECT_EQ(std::filesystem::status(path).permissions(),
            std::filesystem::perms::owner_read | std::filesystem::perms::owner_write);
  std::filesystem::remove_all(dir);
}

}  // namespace
}  // namespace tidepool
