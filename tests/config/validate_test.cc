#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "config/loader.h"

namespace tidepool {
namespace {

using ::testing::HasSubstr;

std::string Problems(std::string_view yaml, ConfigRole role) {
  const auto loaded = LoadConfigText(yaml, "t.yaml");
  EXPECT_TRUE(loaded.ok()) << loaded.status();
  return std::string(Validate(*loaded, role).message());
}

TEST(ValidateTest, ServeNeedsNothing) { EXPECT_EQ(Problems("", ConfigRole::kServe), ""); }

TEST(ValidateTest, WorkersAndGatewayNeedAModel) {
  EXPECT_THAT(Problems("", ConfigRole::kWorker), HasSubstr("model.path (default): is empty"));
  EXPECT_THAT(Problems("", ConfigRole::kGateway), HasSubstr("--model-path DIR"));
  EXPECT_EQ(Problems("", ConfigRole::kScheduler), "");
}

TEST(ValidateTest, AnOpenListenerNeedsAToken) {
  const std::string yaml = "scheduler:\n  listen: 0.0.0.0:8002\n";
  EXPECT_THAT(Problems(yaml, ConfigRole::kScheduler),
              HasSubstr("cluster.token (default): is empty while scheduler.listen"));
  EXPECT_EQ(Problems(yaml + "cluster: {token: 0123456789abcdef}\n", ConfigRole::kScheduler), "");
  EXPECT_EQ(Problems(yaml, ConfigRole::kServe), "");  // draws one
}

TEST(ValidateTest, AShortTokenIsRefused) {
  EXPECT_THAT(Problems("cluster: {token: secret}\n", ConfigRole::kServe),
              HasSubstr("cluster.token (t.yaml:1): has 6"));
}

TEST(ValidateTest, EtcdIsAskedAsItCanBe) {
  const auto problems = [](const std::string& cluster, ConfigRole role = ConfigRole::kScheduler,
                           const std::string& more = "") {
    return Problems("cluster: {token: 0123456789abcdef, " + cluster + "}\n" + more, role);
  };
  EXPECT_EQ(problems("etcd: [10.0.0.1:2379, 10.0.0.2:2379]"), "");
  EXPECT_THAT(problems("etcd: [10.0.0.1]"), HasSubstr("cluster.etcd (t.yaml:1)"));
  EXPECT_THAT(problems("etcd: ['10.0.0.1:0']"), HasSubstr("port 0"));
  EXPECT_THAT(problems("etcd: [a:1]", ConfigRole::kServe), HasSubstr("`serve` needs no etcd"));
  EXPECT_THAT(problems("etcd_user: me"), HasSubstr("cluster.etcd_password (default): is empty"));
  EXPECT_THAT(problems("etcd: [10.0.0.1:1], etcd_user: me, etcd_password: secret"),
              HasSubstr("in plaintext"));
  EXPECT_EQ(problems("etcd: [127.0.0.1:1], etcd_user: me, etcd_password: secret"), "");
  EXPECT_THAT(problems("etcd_cert: c"), HasSubstr("cluster.etcd_key (default): is empty"));
  EXPECT_THAT(problems("etcd_cert: c, etcd_key: k"), HasSubstr("cluster.etcd_ca (default): is empty"));
  EXPECT_THAT(problems("etcd_prefix: ''"), HasSubstr("cluster.etcd_prefix"));
  EXPECT_THAT(problems("etcd: [a:1]", ConfigRole::kScheduler, "scheduler: {listen: '0.0.0.0:8002'}\n"),
              HasSubstr("scheduler.listen (t.yaml:2): 0.0.0.0:8002 is no address"));
}

TEST(ValidateTest, TlsBetweenWorkersNeedsItsThreeFiles) {
  const std::string model = "model: {path: /m}\n";
  EXPECT_THAT(Problems(model + "transport: {kind: tls, tls_cert: a, tls_key: b}\n", ConfigRole::kWorker),
              HasSubstr("transport.tls_ca (default): is empty"));
  EXPECT_EQ(
      Problems(model + "transport: {kind: tls, tls_cert: a, tls_key: b, tls_ca: c}\n", ConfigRole::kWorker),
      "");
  EXPECT_THAT(Problems(model + "transport: {tls_cert: a}\n", ConfigRole::kWorker),
              HasSubstr("transport.tls_cert (t.yaml:2): is of no use with transport.kind ucx"));
  EXPECT_THAT(Problems(model + "transport: {kind: tls, tls_cert: a, tls_key: b, tls_ca: c, "
                               "tls_check_name: true}\n",
                       ConfigRole::kWorker),
              HasSubstr("needs worker.id"));
  const std::string named =
      "transport: {kind: tls, tls_cert: a, tls_key: b, tls_ca: c, tls_check_name: true}\n";
  EXPECT_THAT(Problems(named, ConfigRole::kStore), HasSubstr("needs store.id"));
  EXPECT_THAT(Problems(named, ConfigRole::kServe), HasSubstr("cannot hold with `serve`"));
  EXPECT_EQ(Problems(named + "store: {id: s1}\n", ConfigRole::kStore), "");
}

TEST(ValidateTest, AnIdHasNoCharactersThatPathsAndAddressesUse) {
  for (const char* id : {"'a:1'", "'a/b'", "'.hidden'", "'a b'"}) {
    EXPECT_THAT(Problems(std::string("model: {path: /m}\nworker: {id: ") + id + "}\n", ConfigRole::kWorker),
                HasSubstr("worker.id (t.yaml:2): '"))
        << id;
    EXPECT_THAT(Problems(std::string("store: {id: ") + id + "}\n", ConfigRole::kStore),
                HasSubstr("store.id (t.yaml:1): '"))
        << id;
  }
  EXPECT_EQ(Problems("model: {path: /m}\nworker: {id: Rack-7_gpu.2}\n", ConfigRole::kWorker), "");
}

TEST(ValidateTest, AFixedTransportPortCannotServeTwoWorkers) {
  EXPECT_THAT(Problems("transport: {port: 9100}\n", ConfigRole::kServe),
              HasSubstr("transport.port (t.yaml:1): 9100 cannot serve two workers"));
  EXPECT_EQ(Problems("model: {path: /m}\ntransport: {port: 9100}\n", ConfigRole::kWorker), "");
}

TEST(ValidateTest, PortsMayNotClash) {
  EXPECT_THAT(Problems("gateway: {http_listen: '127.0.0.1:9000', grpc_listen: '127.0.0.1:9000'}\n",
                       ConfigRole::kServe),
              HasSubstr("gateway.grpc_listen (t.yaml:1): port 9000 is taken"));
  EXPECT_EQ(
      Problems("gateway: {http_listen: '127.0.0.1:0', grpc_listen: '127.0.0.1:0'}\n", ConfigRole::kServe),
      "");
}

TEST(ValidateTest, ServeGivesItsTwoWorkersNoCommonPort) {
  EXPECT_THAT(Problems("worker: {listen: '127.0.0.1:9000', id: w}\n", ConfigRole::kServe),
              HasSubstr("cannot serve two"));
  EXPECT_EQ(Problems("worker: {listen: '127.0.0.1:9000', id: w}\nmodel: {path: m}\n", ConfigRole::kWorker),
            "");
}

TEST(ValidateTest, ApiKeysAreDigestsOfOneTenantEach) {
  const std::string digest(64, 'a');
  EXPECT_EQ(Problems("gateway:\n  api_keys: [{key_sha256: " + digest + ", tenant: t}]\n", ConfigRole::kServe),
            "");
  EXPECT_THAT(Problems("gateway:\n  api_keys: [{key_sha256: sk-plain, tenant: t}]\n", ConfigRole::kServe),
              HasSubstr("entry 1 needs key_sha256 of 64"));
  EXPECT_THAT(Problems("gateway:\n  api_keys: [{key_sha256: " + digest +
                           ", tenant: t}, {key_sha256: " + digest + ", tenant: u}]\n",
                       ConfigRole::kServe),
              HasSubstr("entry 2 repeats a key"));
  EXPECT_THAT(Problems("gateway:\n  api_keys: [{key_sha256: " + digest + "}]\n", ConfigRole::kServe),
              HasSubstr("needs a tenant"));
}

TEST(ValidateTest, AnOpenFrontDoorNeedsKeysOrConsent) {
  for (const char* listen : {"http_listen: '0.0.0.0:8000'", "grpc_listen: '10.0.0.1:9000'"}) {
    const std::string yaml = std::string("gateway:\n  ") + listen + "\n";
    EXPECT_THAT(Problems(yaml, ConfigRole::kServe), HasSubstr("no API keys are configured"));
    EXPECT_EQ(Problems(yaml + "  allow_unauthenticated: true\n", ConfigRole::kServe), "");
    EXPECT_EQ(Problems(yaml + "  api_keys_file: keys.yaml\n", ConfigRole::kServe), "");
    EXPECT_EQ(Problems(yaml + "  tls: {cert: c, key: k, client_ca: ca}\n", ConfigRole::kServe), "");
    EXPECT_THAT(Problems(yaml + "  tls: {cert: c, key: k}\n", ConfigRole::kServe), HasSubstr("no API keys"));
  }
}

TEST(ValidateTest, TlsAndOriginsAreWhole) {
  EXPECT_THAT(Problems("gateway: {tls: {cert: c}}\n", ConfigRole::kServe),
              HasSubstr("gateway.tls.key (default): is empty"));
  EXPECT_THAT(Problems("gateway: {tls: {client_ca: c}}\n", ConfigRole::kServe), HasSubstr("is of no use"));
  EXPECT_THAT(Problems("gateway: {cors: {allowed_origins: ['https://a.example/']}}\n", ConfigRole::kServe),
              HasSubstr("is no origin"));
  EXPECT_EQ(
      Problems("gateway: {cors: {allowed_origins: ['*', 'http://localhost:3000']}}\n", ConfigRole::kServe),
      "");
  EXPECT_THAT(Problems("gateway: {api_keys_file: f, api_keys: [{key_sha256: " + std::string(64, 'a') +
                           ", tenant: t}]}\n",
                       ConfigRole::kServe),
              HasSubstr("are both given"));
}

TEST(ValidateTest, AdmissionAtStageIsForTheSimulatorAlone) {
  const std::string yaml = "scheduler: {admission: at-stage}\n";
  for (const auto role : {ConfigRole::kServe, ConfigRole::kScheduler}) {
    EXPECT_THAT(Problems(yaml, role), HasSubstr("scheduler.admission (t.yaml:1): at-stage"));
    EXPECT_EQ(Problems("scheduler: {admission: early, placement: mooncake, fairness: d2lpm}\n", role), "");
  }
}

TEST(ValidateTest, LimitsThatContradictEachOtherAreRefused) {
  EXPECT_THAT(Problems("engine: {max_batch: 300}\n", ConfigRole::kServe),
              HasSubstr("engine.max_step_tokens"));
  EXPECT_THAT(Problems("kv: {offer_lease: 5s}\n", ConfigRole::kServe), HasSubstr("give at least 12.5s"));
  EXPECT_THAT(Problems("worker: {report_interval: 2s}\n", ConfigRole::kServe),
              HasSubstr("three report intervals"));
}

TEST(ValidateTest, ReportsEveryProblemAtOnce) {
  const std::string problems =
      Problems("cluster: {token: x}\nengine: {max_batch: 300}\n", ConfigRole::kServe);
  EXPECT_EQ(std::count(problems.begin(), problems.end(), '\n'), 1) << problems;
}

}  // namespace
}  // namespace tidepool
