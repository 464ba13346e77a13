#include "config/cluster_document.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "config/fields.h"

namespace tidepool {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

LoadedConfig Parsed(std::string_view yaml) {
  const auto parsed = ParseClusterDocument(yaml, "doc");
  EXPECT_TRUE(parsed.ok()) << parsed.status();
  return parsed.value_or(LoadedConfig());
}

std::string Refusal(std::string_view yaml) {
  return std::string(ParseClusterDocument(yaml, "doc").status().message());
}

// What `text` is for a field that may be anything.
std::string SampleOf(const Field& field) {
  if (field.kind == FieldKind::kTenantBytes) return "a:256MiB,b:1GiB";
  return FormatField(field, Config());
}

TEST(ClusterDocument, EveryFieldIsEitherForTheClusterOrRefusedWithAReason) {
  for (const Field& field : Fields()) {
    const ClusterRule rule = ClusterRuleOf(field.path);
    EXPECT_NE(rule.reason, "is not known to be the same everywhere") << field.path << ": say so in kRules";
    EXPECT_EQ(rule.use == ClusterUse::kRefused, !rule.reason.empty()) << field.path;
    EXPECT_TRUE(!field.secret || rule.use == ClusterUse::kRefused) << field.path << ": etcd shows its values";
  }
}

TEST(ClusterDocument, TakesObjectivesQuotasAndLimits) {
  const LoadedConfig c = Parsed(R"(
scheduler:
  slo: {ttft: 8s, itl: 200ms}
  placement: mooncake
kv:
  tenant_quotas: {a: 256MiB}
gateway:
  tenant_limits: {requests_per_minute: 60}
)");
  EXPECT_EQ(c.config.scheduler.slo.ttft, absl::Seconds(8));
  EXPECT_EQ(c.config.kv.tenant_quotas.at("a"), 256u << 20);
  EXPECT_EQ(c.sources.at("scheduler.placement"), "doc:4");
  EXPECT_EQ(c.sources.size(), 5u);
}

TEST(ClusterDocument, AnEmptyOneSaysNothing) {
  EXPECT_TRUE(Parsed("").sources.empty());
  EXPECT_TRUE(Parsed("# all as in the files\n").sources.empty());
}

TEST(ClusterDocument, NamesWhatMayNotStandThereWithPlaceAndReason) {
  const std::string refusal =
      Refusal("worker:\n  listen: 0.0.0.0:1\ngateway:\n  server_key: x\nkv:\n  block_tokens: 16\n");
  EXPECT_THAT(refusal,
              HasSubstr("doc:2: worker.listen cannot be set for the whole cluster: it is an address"));
  EXPECT_THAT(refusal, HasSubstr("doc:4: gateway.server_key"));
  EXPECT_THAT(refusal,
              HasSubstr("doc:6: kv.block_tokens cannot be set for the whole cluster: it is part of"));
}

TEST(ClusterDocument, NamesUnknownKeysBadValuesAndWhatDoesNotGoTogether) {
  EXPECT_THAT(Refusal("scheduler:\n  placment: tidepool\n"), HasSubstr("doc:2:3: unknown key 'placment'"));
  EXPECT_THAT(Refusal("scheduler:\n  slo:\n    ttft: 8\n"),
              HasSubstr("doc:3:11: scheduler.slo.ttft '8' has no unit"));
  EXPECT_THAT(Refusal("scheduler: {admission: at-stage}\n"),
              HasSubstr("scheduler.admission (doc:1): at-stage"));
  EXPECT_THAT(Refusal("scheduler: {worker_timeout: 200ms}\n"), HasSubstr("is under three report intervals"));
  EXPECT_THAT(Refusal("worker: {report_interval: 2s}\n"), HasSubstr("is under three report intervals"));
  EXPECT_EQ(Refusal("scheduler: {worker_timeout: 120ms}\nworker: {report_interval: 40ms}\n"), "");
  EXPECT_THAT(Refusal("engine: {max_batch: 512}\n"), HasSubstr("is below engine.max_batch (512)"));
  EXPECT_THAT(Refusal("[1, 2]"), HasSubstr("must be a mapping"));
  EXPECT_THAT(Refusal(std::string(kClusterDocumentBytesMax + 1, '#')), HasSubstr("at most"));
}

TEST(ClusterDocument, StandsAboveTheFileAndBelowWhatOneProcessWasGivenByHand) {
  const std::string file = testing::TempDir() + "/cluster_document_test.yaml";
  FILE* out = fopen(file.c_str(), "w");
  ASSERT_NE(out, nullptr);
  fputs("scheduler: {hot_copies: 3, max_inflight: 30, local_prefill_tokens: 30}\n", out);
  fclose(out);
  ConfigInput input;
  input.file = file;
  input.cluster = std::make_shared<const LoadedConfig>(
      Parsed("scheduler: {max_inflight: 40, local_prefill_tokens: 40, placement: dynamo}\n"));
  input.env = [](const std::string& name) -> std::optional<std::string> {
    if (name == "TIDEPOOL_SCHEDULER_LOCAL_PREFILL_TOKENS") return "50";
    return std::nullopt;
  };
  input.flags = {{"scheduler.placement", "random"}};
  const auto c = LoadConfig(input);
  remove(file.c_str());
  ASSERT_TRUE(c.ok()) << c.status();
  EXPECT_EQ(c->config.scheduler.hot_copies, 3u);
  EXPECT_EQ(c->config.scheduler.max_inflight, 40u);
  EXPECT_EQ(c->config.scheduler.local_prefill_tokens, 50u);
  EXPECT_EQ(c->config.scheduler.placement, "random");
  EXPECT_EQ(c->sources.at("scheduler.max_inflight"), "doc:1");
}

TEST(ClusterDocument, ComparesByWhatAChangeNeedsAndForWhom) {
  Config from, to;
  to.scheduler.slo.ttft = absl::Seconds(1);
  to.kv.tenant_quotas["a"] = 1 << 20;
  to.engine.max_batch = 7;
  to.gateway.http_listen = "127.0.0.1:1";
  EXPECT_EQ(CompareConfigs(from, from, ConfigRole::kServe), ConfigChange());
  EXPECT_THAT(CompareConfigs(from, to, ConfigRole::kServe).live,
              ElementsAre("kv.tenant_quotas", "scheduler.slo.ttft"));
  EXPECT_THAT(CompareConfigs(from, to, ConfigRole::kServe).restart,
              ElementsAre("engine.max_batch", "gateway.http_listen"));
  EXPECT_THAT(CompareConfigs(from, to, ConfigRole::kScheduler).live, ElementsAre("scheduler.slo.ttft"));
  EXPECT_THAT(CompareConfigs(from, to, ConfigRole::kScheduler).restart, ElementsAre());
  EXPECT_THAT(CompareConfigs(from, to, ConfigRole::kStore).live, ElementsAre("kv.tenant_quotas"));
  EXPECT_THAT(CompareConfigs(from, to, ConfigRole::kWorker).restart, ElementsAre("engine.max_batch"));
  // The gateway judges its own answers by the objectives.
  EXPECT_THAT(CompareConfigs(from, to, ConfigRole::kGateway).live, ElementsAre("scheduler.slo.ttft"));
}

TEST(ClusterDocument, CopiesLiveFieldsAloneWithTheirSources) {
  LoadedConfig from = Parsed("scheduler: {max_inflight: 9}\nengine: {max_batch: 7}\n"), to;
  to.sources["kv.tenant_quota_bytes"] = "old";
  CopyLiveFields(from, to);
  EXPECT_EQ(to.config.scheduler.max_inflight, 9u);
  EXPECT_EQ(to.config.engine.max_batch, Config().engine.max_batch);
  EXPECT_EQ(to.sources.size(), 1u);
  EXPECT_EQ(to.sources.at("scheduler.max_inflight"), "doc:1");
}

TEST(ClusterDocument, LiveFieldsReadBackAsTheyWereWritten) {
  Config config;
  for (const Field& field : Fields()) {
    if (ClusterRuleOf(field.path).use != ClusterUse::kLive) continue;
    ASSERT_TRUE(SetField(field, SampleOf(field), config).ok()) << field.path;
  }
  config.scheduler.slo.itl = absl::Milliseconds(75);
  config.kv.tenant_quotas["null"] = 1 << 20;
  const auto read = ParseClusterDocument(FormatLiveFields(config), "again");
  ASSERT_TRUE(read.ok()) << read.status() << "\n" << FormatLiveFields(config);
  for (const Field& field : Fields()) {
    const bool live = ClusterRuleOf(field.path).use == ClusterUse::kLive;
    EXPECT_EQ(!read->IsDefault(field.path), live) << field.path;
    if (!live) continue;
    EXPECT_EQ(FormatField(field, read->config), FormatField(field, config)) << field.path;
  }
}

TEST(ClusterDocument, ChangesAreDescribedWithoutSecrets) {
  Config from, to;
  to.gateway.server_key = "hush";
  EXPECT_EQ(DescribeChange("gateway.server_key", from, to), "gateway.server_key (empty) -> (set)");
  to.scheduler.slo.ttft = absl::Seconds(8);
  EXPECT_EQ(DescribeChange("scheduler.slo.ttft", from, to), "scheduler.slo.ttft 0s -> 8s");
}

}  // namespace
}  // namespace tidepool
