#include "config/fields.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <set>

namespace tidepool {
namespace {

using ::testing::HasSubstr;

const Field& Get(std::string_view path) {
  const Field* field = FindField(path);
  TP_CHECK(field != nullptr);
  return *field;
}

std::string Message(std::string_view path, std::string_view text) {
  Config config;
  const absl::Status status = SetField(Get(path), text, config);
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << path << "=" << text;
  return std::string(status.message());
}

TEST(FieldsTest, EnvironmentAndFlagNamesFollowThePath) {
  EXPECT_EQ(Get("gateway.http_listen").env(), "TIDEPOOL_GATEWAY_HTTP_LISTEN");
  EXPECT_EQ(Get("gateway.http_listen").flag(), "--gateway-http-listen");
  EXPECT_EQ(Get("scheduler.slo.ttft").env(), "TIDEPOOL_SCHEDULER_SLO_TTFT");
}

TEST(FieldsTest, NoTwoFieldsShareAVariable) {
  std::set<std::string> names;
  for (const Field& field : Fields()) EXPECT_TRUE(names.insert(field.env()).second) << field.path;
}

TEST(FieldsTest, EveryFieldHasHelp) {
  for (const Field& field : Fields()) EXPECT_FALSE(field.help.empty()) << field.path;
}

// `serve` hands its configuration to the roles as text, so every default must survive the way back.
TEST(FieldsTest, EveryDefaultReadsBackFromItsOwnText) {
  for (const Field& field : Fields()) {
    const Config defaults;
    Config config;
    const std::string text = FormatField(field, defaults);
    ASSERT_TRUE(SetField(field, text, config).ok()) << field.path << "=" << text;
    EXPECT_EQ(FormatField(field, config), text) << field.path;
  }
}

TEST(FieldsTest, ReadsDurationsWithUnits) {
  Config config;
  ASSERT_TRUE(SetField(Get("transport.fetch_timeout"), "500ms", config).ok());
  EXPECT_EQ(config.transport.fetch_timeout, absl::Milliseconds(500));
  ASSERT_TRUE(SetField(Get("transport.fetch_timeout"), "2m", config).ok());
  EXPECT_EQ(config.transport.fetch_timeout, absl::Minutes(2));
  ASSERT_TRUE(SetField(Get("transport.fetch_timeout"), "1m30s", config).ok());
  EXPECT_EQ(config.transport.fetch_timeout, absl::Seconds(90));
}

TEST(FieldsTest, RefusesADurationWithoutUnitAndSaysHowToWriteIt) {
  EXPECT_THAT(Message("transport.fetch_timeout", "30"), HasSubstr("no unit; write it as 30s"));
  EXPECT_THAT(Message("transport.fetch_timeout", "soon"), HasSubstr("30s, 500ms or 2m"));
  EXPECT_THAT(Message("transport.fetch_timeout", "inf"), HasSubstr("out of range"));
  EXPECT_THAT(Message("transport.fetch_timeout", "-1s"), HasSubstr("give 10ms to 1h"));
}

TEST(FieldsTest, ReadsSizesWithUnits) {
  Config config;
  ASSERT_TRUE(SetField(Get("kv.host_bytes"), "2GiB", config).ok());
  EXPECT_EQ(config.kv.host_bytes, 2ull << 30);
  ASSERT_TRUE(SetField(Get("kv.host_bytes"), "5 MB", config).ok());
  EXPECT_EQ(config.kv.host_bytes, 5000000u);
  ASSERT_TRUE(SetField(Get("gateway.max_body_bytes"), "1048576", config).ok());
  EXPECT_EQ(config.gateway.max_body_bytes, 1048576u);
}

TEST(FieldsTest, RefusesSizesThatAreNone) {
  EXPECT_THAT(Message("kv.host_bytes", "256M"), HasSubstr("write it as 256MiB"));
  EXPECT_THAT(Message("kv.host_bytes", "-1"), HasSubstr("not a size"));
  EXPECT_THAT(Message("kv.host_bytes", "1.5GiB"), HasSubstr("not a size"));
  EXPECT_THAT(Message("kv.host_bytes", "99999999999TiB"), HasSubstr("64 bits"));
  EXPECT_THAT(Message("kv.host_bytes", "1KiB"), HasSubstr("give 1MiB to"));
}

TEST(FieldsTest, RefusesCountsOutOfRange) {
  EXPECT_THAT(Message("engine.max_batch", "0"), HasSubstr("give 1 to 4096 sequences"));
  EXPECT_THAT(Message("engine.max_batch", "1e3"), HasSubstr("not a whole number"));
  EXPECT_THAT(Message("engine.max_batch", "4294967297"), HasSubstr("out of range"));
}

TEST(FieldsTest, NamesTheChoicesAndTheNearest) {
  EXPECT_THAT(Message("model.dtype", "bflat16"), HasSubstr("did you mean bfloat16?"));
  EXPECT_THAT(Message("log.level", "loud"), HasSubstr("error, warn, info, debug"));
  EXPECT_THAT(Message("engine.batch_invariant", "yes"), HasSubstr("true or false"));
}

TEST(FieldsTest, AFailedSetLeavesTheValue) {
  Config config;
  const std::string before = FormatField(Get("gateway.http_listen"), config);
  EXPECT_FALSE(SetField(Get("gateway.http_listen"), "8000", config).ok());
  EXPECT_EQ(FormatField(Get("gateway.http_listen"), config), before);
}

TEST(FieldsTest, ApiKeysReadBackFromText) {
  Config config;
  ASSERT_TRUE(SetField(Get("gateway.api_keys"), "aa:team-a, bb:team-b", config).ok());
  ASSERT_EQ(config.gateway.api_keys.size(), 2u);
  EXPECT_EQ(config.gateway.api_keys[1].tenant, "team-b");
  EXPECT_EQ(FormatField(Get("gateway.api_keys"), config), "aa:team-a,bb:team-b");
}

TEST(FieldsTest, TenantQuotasReadBackFromText) {
  Config config;
  const Field& field = Get("kv.tenant_quotas");
  ASSERT_TRUE(SetField(field, "team-a:2GiB, team-b: 512MiB,free:0", config).ok());
  EXPECT_EQ(config.kv.tenant_quotas,
            (std::map<std::string, uint64_t>{{"team-a", 2ULL << 30}, {"team-b", 512ULL << 20}, {"free", 0}}));
  EXPECT_EQ(FormatField(field, config), "free:0B,team-a:2GiB,team-b:512MiB");
  Config again;
  ASSERT_TRUE(SetField(field, FormatField(field, config), again).ok());
  EXPECT_EQ(again.kv.tenant_quotas, config.kv.tenant_quotas);
  for (const auto& [text, why] :
       std::map<std::string, std::string>{{"team-a", "entry 1 has no size"},
                                          {"team-a:much", "of tenant 'team-a': 'much' is not a size"},
                                          {"team-a:65TiB", "out of range"},
                                          {":1GiB", "1 to 64 characters"},
                                          {"team-a:1GiB,team-a:2GiB", "gives tenant 'team-a' twice"}}) {
    const absl::Status status = SetField(field, text, config);
    EXPECT_THAT(std::string(status.message()), HasSubstr(why)) << text;
  }
  EXPECT_EQ(again.kv.tenant_quotas, config.kv.tenant_quotas) << "unchanged by errors";
}

TEST(FieldsTest, SecretsAreNotDisplayed) {
  Config config;
  EXPECT_EQ(DisplayField(Get("cluster.token"), config), "(empty)");
  config.cluster.token = "swordfish-swordfish";
  EXPECT_EQ(DisplayField(Get("cluster.token"), config), "(set)");
  EXPECT_EQ(FormatField(Get("cluster.token"), config), "swordfish-swordfish");
}

TEST(FieldsTest, NearestKnowsSlipsFromOtherWords) {
  const std::vector<std::string> known = {"threads", "max_batch"};
  EXPECT_EQ(NearestOf("thread", known), "threads");
  EXPECT_EQ(NearestOf("max-batch", known), "max_batch");
  EXPECT_EQ(NearestOf("banana", known), "");
}

}  // namespace
}  // namespace tidepool
