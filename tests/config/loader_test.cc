#include "config/loader.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>

#include "config/fields.h"

namespace tidepool {
namespace {

using ::testing::HasSubstr;
using ::testing::StartsWith;

std::string Problems(std::string_view yaml) {
  const auto loaded = LoadConfigText(yaml, "t.yaml");
  EXPECT_EQ(loaded.status().code(), absl::StatusCode::kInvalidArgument) << yaml;
  return std::string(loaded.status().message());
}

// TempFile: a file that goes away with the test.
class TempFile {
 public:
  explicit TempFile(std::string_view text) : path_(testing::TempDir() + "/tidepool_loader_XXXXXX") {
    const int fd = mkstemp(path_.data());
    TP_CHECK(fd >= 0);
    close(fd);
    std::ofstream(path_) << text;
  }
  ~TempFile() { std::filesystem::remove(path_); }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

TEST(LoaderTest, ReadsNestedSections) {
  const auto loaded = LoadConfigText("scheduler:\n  slo:\n    ttft: 500ms\nengine: {threads: 3}\n", "t.yaml");
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  EXPECT_EQ(loaded->config.scheduler.slo.ttft, absl::Milliseconds(500));
  EXPECT_EQ(loaded->config.engine.threads, 3u);
  EXPECT_EQ(loaded->Describe("scheduler.slo.ttft"), "scheduler.slo.ttft (t.yaml:3)");
  EXPECT_EQ(loaded->Describe("scheduler.slo.itl"), "scheduler.slo.itl (default)");
}

TEST(LoaderTest, EmptyDocumentsAndEmptySectionsAreDefaults) {
  for (const char* yaml : {"", "# nothing\n", "engine:\n", "---\n"}) {
    const auto loaded = LoadConfigText(yaml, "t.yaml");
    ASSERT_TRUE(loaded.ok()) << yaml << loaded.status();
    EXPECT_TRUE(loaded->sources.empty());
  }
}

TEST(LoaderTest, UnknownKeyNamesPlaceAndNearest) {
  EXPECT_EQ(Problems("log:\n  level: info\nengine:\n  thread: 2\n"),
            "t.yaml:4:3: unknown key 'thread' in engine; did you mean 'threads'?");
  EXPECT_EQ(Problems("gatway: {}\n"), "t.yaml:1:1: unknown key 'gatway'; did you mean 'gateway'?");
  EXPECT_THAT(Problems("log: {banana: 1}\n"), HasSubstr("known here: level"));
}

TEST(LoaderTest, AFieldByItsFormerNameIsRefusedWithTheNewOne) {
  EXPECT_EQ(Problems("transport: {tls: tcp}\n"),
            "t.yaml:1:13: transport.tls is now called transport.ucx_tls; rename it");
  ConfigInput input;
  input.env = [](const std::string& name) -> std::optional<std::string> {
    if (name == "TIDEPOOL_TRANSPORT_TLS") return "tcp";
    return std::nullopt;
  };
  const auto loaded = LoadConfig(input);
  ASSERT_FALSE(loaded.ok());
  EXPECT_EQ(std::string(loaded.status().message()),
            "TIDEPOOL_TRANSPORT_TLS: is now called TIDEPOOL_TRANSPORT_UCX_TLS; rename it");
}

TEST(LoaderTest, WrongValueNamesPlaceFieldLimitAndFix) {
  EXPECT_EQ(Problems("engine:\n  max_batch: 0\n"),
            "t.yaml:2:14: engine.max_batch '0' is out of range; give 1 to 4096 sequences");
  EXPECT_THAT(Problems("cluster: {drain_timeout: 30}\n"),
              HasSubstr("cluster.drain_timeout '30' has no unit"));
  EXPECT_THAT(Problems("engine:\n  threads: [1]\n"),
              HasSubstr("t.yaml:2:12: engine.threads must be a single value"));
  EXPECT_THAT(Problems("engine:\n  threads:\n"), HasSubstr("engine.threads has no value"));
  EXPECT_THAT(Problems("engine: 3\n"), HasSubstr("engine must be a mapping"));
}

TEST(LoaderTest, ReportsEveryProblemAtOnce) {
  const std::string problems = Problems("engine: {thread: 1, max_batch: x}\nlog: {level: loud}\n");
  EXPECT_EQ(std::count(problems.begin(), problems.end(), '\n'), 2);
}

TEST(LoaderTest, RefusesAKeyGivenTwice) {
  EXPECT_THAT(Problems("log:\n  level: info\n  level: debug\n"),
              HasSubstr("t.yaml:3:3: log.level is given twice"));
}

TEST(LoaderTest, BrokenYamlNamesThePlace) {
  EXPECT_THAT(Problems("engine: {threads: 1\nlog: ]\n"), StartsWith("t.yaml:2:"));
  EXPECT_THAT(Problems("a: 1\n---\nb: 2\n"), HasSubstr("more than one YAML document"));
  EXPECT_THAT(Problems("&a 'x' {!m}"), HasSubstr("more than one YAML document")) << "and comes to an end";
  EXPECT_THAT(Problems(std::string(100000, '[')), StartsWith("t.yaml:"));
}

TEST(LoaderTest, ReadsTenantQuotas) {
  const auto loaded = LoadConfigText("kv:\n  tenant_quotas:\n    team-a: 2GiB\n    b: 0\n", "t.yaml");
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  EXPECT_EQ(loaded->config.kv.tenant_quotas,
            (std::map<std::string, uint64_t>{{"b", 0}, {"team-a", 2ULL << 30}}));
  EXPECT_THAT(Problems("kv:\n  tenant_quotas:\n    a: [1]\n"),
              HasSubstr("kv.tenant_quotas must hold TENANT: SIZE"));
  EXPECT_THAT(Problems("kv: {tenant_quotas: {a: lots}}\n"), HasSubstr("'lots' is not a size"));
  EXPECT_THAT(Problems("kv: {tenant_quotas: {'a:b': 1GiB}}\n"), HasSubstr("without ',' and ':'"));
  EXPECT_THAT(Problems("kv: {tenant_quotas: {a\xff: 1GiB}}\n"), HasSubstr("printable UTF-8"));
}

TEST(LoaderTest, ReadsApiKeys) {
  const auto loaded = LoadConfigText("gateway:\n  api_keys:\n    - {key_sha256: aa, tenant: t}\n", "t.yaml");
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  ASSERT_EQ(loaded->config.gateway.api_keys.size(), 1u);
  EXPECT_EQ(loaded->config.gateway.api_keys[0].tenant, "t");
  EXPECT_THAT(Problems("gateway:\n  api_keys:\n    - {key: aa}\n"),
              HasSubstr("t.yaml:3:8: gateway.api_keys knows only"));
  EXPECT_THAT(Problems("gateway: {api_keys: {a: b}}\n"), HasSubstr("must be a list"));
}

TEST(LoaderTest, FlagBeatsEnvironmentBeatsFileBeatsDefault) {
  const TempFile file("engine: {threads: 2, max_batch: 2, max_waiting: 2}\n");
  ConfigInput input;
  input.file = file.path();
  input.env = [](const std::string& name) -> std::optional<std::string> {
    if (name == "TIDEPOOL_ENGINE_THREADS" || name == "TIDEPOOL_ENGINE_MAX_BATCH") return "3";
    return std::nullopt;
  };
  input.flags = {{"engine.threads", "4"}};
  const auto loaded = LoadConfig(input);
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  EXPECT_EQ(loaded->config.engine.threads, 4u);
  EXPECT_EQ(loaded->config.engine.max_batch, 3u);
  EXPECT_EQ(loaded->config.engine.max_waiting, 2u);
  EXPECT_EQ(loaded->config.engine.max_step_tokens, Config().engine.max_step_tokens);
  EXPECT_EQ(loaded->sources.at("engine.threads"), "--engine-threads");
  EXPECT_EQ(loaded->sources.at("engine.max_batch"), "TIDEPOOL_ENGINE_MAX_BATCH");
  EXPECT_EQ(loaded->sources.at("engine.max_waiting"), file.path() + ":1");
  EXPECT_TRUE(loaded->IsDefault("engine.max_step_tokens"));
}

TEST(LoaderTest, WrongVariablesAndFlagsAreNamed) {
  ConfigInput input;
  input.env = [](const std::string& name) -> std::optional<std::string> {
    return name == "TIDEPOOL_LOG_LEVEL" ? std::optional<std::string>("loud") : std::nullopt;
  };
  input.flags = {{"engine.threads", "many"}};
  const auto loaded = LoadConfig(input);
  EXPECT_THAT(std::string(loaded.status().message()), HasSubstr("TIDEPOOL_LOG_LEVEL: log.level 'loud'"));
  EXPECT_THAT(std::string(loaded.status().message()), HasSubstr("--engine-threads: engine.threads 'many'"));
}

TEST(LoaderTest, MissingFilesDirectoriesAndHugeFilesAreRefused) {
  ConfigInput input;
  input.file = testing::TempDir() + "/no-such-tidepool.yaml";
  EXPECT_EQ(LoadConfig(input).status().code(), absl::StatusCode::kNotFound);
  input.file = testing::TempDir();
  EXPECT_EQ(LoadConfig(input).status().code(), absl::StatusCode::kNotFound);
  const TempFile huge(std::string(2 << 20, '#'));
  input.file = huge.path();
  EXPECT_THAT(std::string(LoadConfig(input).status().message()), HasSubstr("is it the right file?"));
}

TEST(LoaderTest, EveryShippedFileLoadsAndIsValid) {
  size_t files = 0;
  for (const auto& entry : std::filesystem::directory_iterator("config")) {
    if (entry.path().extension() != ".yaml") continue;
    ++files;
    ConfigInput input;
    input.file = entry.path();
    input.env = [](const std::string&) { return std::nullopt; };
    const auto loaded = LoadConfig(input);
    ASSERT_TRUE(loaded.ok()) << loaded.status();
    EXPECT_TRUE(Validate(*loaded, ConfigRole::kServe).ok()) << Validate(*loaded, ConfigRole::kServe);
  }
  EXPECT_GT(files, 0u);
}

// The reference file names every field and gives exactly the defaults.
TEST(LoaderTest, TheReferenceFileHoldsEveryDefault) {
  ConfigInput input;
  input.file = "config/tidepool.yaml";
  input.env = [](const std::string&) { return std::nullopt; };
  const auto loaded = LoadConfig(input);
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  for (const Field& field : Fields()) {
    EXPECT_FALSE(loaded->IsDefault(field.path)) << field.path << " is missing in config/tidepool.yaml";
    EXPECT_EQ(FormatField(field, loaded->config), FormatField(field, Config())) << field.path;
  }
}

}  // namespace
}  // namespace tidepool
