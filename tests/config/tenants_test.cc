#include "config/tenants.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>

namespace tidepool {
namespace {

using ::testing::HasSubstr;

const std::string kA(64, 'a'), kB(64, 'b');

std::string Problems(const std::string& yaml) {
  const auto table = ParseTenants(yaml, "k.yaml", {});
  return std::string(table.status().message());
}

TEST(TenantsTest, ReadsKeysAndLimitsInYamlAndJson) {
  TenantLimitsConfig defaults;
  defaults.max_inflight = 7;
  for (
      const std::string& text :
      {"keys:\n  - {key_sha256: " + kA + ", tenant: a}\n  - {key_sha256: " + kB +
           ", tenant: b}\ntenants:\n  - {name: a, requests_per_minute: 60, cache_epoch: 2}\n",
       R"({"keys": [{"key_sha256": ")" + kA + R"(", "tenant": "a"}, {"key_sha256": ")" + kB +
           R"(", "tenant": "b"}], "tenants": [{"name": "a", "requests_per_minute": 60, "cache_epoch": 2}]})"}) {
    const auto table = ParseTenants(text, "k.yaml", defaults);
    ASSERT_TRUE(table.ok()) << table.status();
    EXPECT_EQ(table->keys.size(), 2u);
    EXPECT_EQ(table->Settings("a").limits.requests_per_minute, 60u);
    EXPECT_EQ(table->Settings("a").limits.max_inflight, 7u) << "what is left out";
    EXPECT_EQ(table->Settings("a").cache_epoch, 2u);
    EXPECT_EQ(table->Settings("b").limits.requests_per_minute, 0u);
    EXPECT_EQ(table->Settings("b").limits.max_inflight, 7u);
  }
}

TEST(TenantsTest, AFileThatLetsNobodyInIsRefused) {
  for (const char* text : {"", "{}", "keys: []", "keys:", "tenants: []", "- a", "42"}) {
    EXPECT_NE(Problems(text), "") << text;
  }
}

TEST(TenantsTest, EveryMistakeHasItsPlace) {
  const std::string keys = "keys: [{key_sha256: " + kA + ", tenant: a}]\n";
  EXPECT_THAT(Problems(keys + "tenant: []\n"), HasSubstr("k.yaml:2:1: unknown key 'tenant'"));
  EXPECT_THAT(Problems(keys + "tenants:\n  - {name: a, request_per_minute: 1}\n"),
              HasSubstr("did you mean 'requests_per_minute'?"));
  EXPECT_THAT(Problems(keys + "tenants: [{name: a, max_inflight: -1}]\n"), HasSubstr("not a whole number"));
  EXPECT_THAT(Problems(keys + "tenants: [{name: a, max_inflight: 4294967296}]\n"),
              HasSubstr("not a whole number"));
  EXPECT_THAT(Problems(keys + "tenants: [{name: a}, {name: a}]\n"), HasSubstr("given twice"));
  EXPECT_THAT(Problems(keys + "tenants: [{max_inflight: 1}]\n"), HasSubstr("1 to 64"));
  EXPECT_THAT(Problems("keys: [{key_sha256: sk-plain, tenant: a}]\n"), HasSubstr("64 lower-case hex digits"));
  EXPECT_THAT(Problems("keys: [{key_sha256: " + kA + ", tenant: a}, {key_sha256: " + kA + ", tenant: b}]\n"),
              HasSubstr("repeats a key"));
  EXPECT_THAT(Problems("keys: [{key: " + kA + ", tenant: a}]\n"),
              HasSubstr("knows only key_sha256 and tenant"));
  EXPECT_THAT(Problems("{"), HasSubstr("not YAML"));
}

TEST(TenantsTest, WithoutAFileTheConfigurationsOwnKeysHold) {
  GatewayConfig config;
  EXPECT_TRUE(LoadTenants(config)->keys.empty());
  config.api_keys = {{kA, "a"}};
  config.tenant_limits.requests_per_minute = 5;
  EXPECT_EQ(LoadTenants(config)->Settings("a").limits.requests_per_minute, 5u);
  config.api_keys_file = testing::TempDir() + "/tidepool-no-such-file";
  EXPECT_EQ(LoadTenants(config).status().code(), absl::StatusCode::kNotFound);
}

}  // namespace
}  // namespace tidepool
