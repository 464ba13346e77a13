#include "server/cluster/live_config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "tests/server/cluster/etcd_process.h"

namespace tidepool {
namespace {

using testing::HasSubstr;

// A process of one role whose file is `yaml`, and what it was told.
struct Process {
  explicit Process(ConfigRole r = ConfigRole::kScheduler) : role(r) {}

  absl::Status Start(const std::string& etcd = "", absl::Duration first_look = absl::Seconds(15)) {
    LiveConfig::Options options;
    options.role = role;
    options.load = [this, etcd](std::shared_ptr<const LoadedConfig> cluster) -> absl::StatusOr<LoadedConfig> {
      std::lock_guard lock(mu);
      ConfigInput input;
      input.env = [this](const std::string& name) -> std::optional<std::string> {
        const auto it = env.find(name);
        if (it == env.end()) return std::nullopt;
        return it->second;
      };
      input.cluster = std::move(cluster);
      if (!etcd.empty()) env["TIDEPOOL_CLUSTER_ETCD"] = etcd;
      TP_ASSIGN_OR_RETURN(LoadedConfig loaded, LoadConfig(input));
      TP_RETURN_IF_ERROR(Validate(loaded, role));
      return loaded;
    };
    options.metrics = &metrics;
    options.first_look = first_look;
    options.try_again = absl::Milliseconds(100);
    TP_ASSIGN_OR_RETURN(live, LiveConfig::Start(std::move(options)));
    return absl::OkStatus();
  }
  void Run() {
    live->Run([this](const Config& now) {
      std::lock_guard lock(mu);
      if (!refuse.empty()) return absl::InvalidArgumentError(refuse);
      applied.push_back(now);
      return absl::OkStatus();
    });
  }
  void SetEnv(const std::string& name, const std::string& value) {
    std::lock_guard lock(mu);
    env[name] = value;
  }
  size_t times() {
    std::lock_guard lock(mu);
    return applied.size();
  }
  absl::Duration ttft() const { return live->current().config.scheduler.slo.ttft; }
  double Metric(const std::string& name) const { return metrics_of(name, {}); }
  double metrics_of(const std::string& name, const Labels& labels) const {
    return const_cast<MetricRegistry&>(metrics).AddGauge(name, "", labels).value();
  }
  uint64_t Updates(const std::string& result) {
    return metrics.AddCounter("tidepool_config_updates_total", "", {{"result", result}}).value();
  }

  const ConfigRole role;
  MetricRegistry metrics;
  std::mutex mu;
  std::map<std::string, std::string> env;
  std::string refuse;
  std::vector<Config> applied;
  std::unique_ptr<LiveConfig> live;
};

TEST(LiveConfig, WithoutEtcdWhatIsReadAgainIsApplied) {
  Process p;
  p.SetEnv("TIDEPOOL_SCHEDULER_SLO_TTFT", "5s");
  ASSERT_TRUE(p.Start().ok());
  EXPECT_EQ(p.ttft(), absl::Seconds(5));
  p.Run();
  EXPECT_EQ(p.times(), 0u) << "nothing has changed";
  ASSERT_TRUE(p.live->Reload().ok());
  EXPECT_EQ(p.times(), 0u);
  p.SetEnv("TIDEPOOL_SCHEDULER_SLO_TTFT", "8s");
  ASSERT_TRUE(p.live->Reload().ok());
  ASSERT_EQ(p.times(), 1u);
  EXPECT_EQ(p.applied[0].scheduler.slo.ttft, absl::Seconds(8));
  EXPECT_EQ(p.ttft(), absl::Seconds(8));
}

TEST(LiveConfig, WhatNeedsARestartIsCountedUntilItIsAsBefore) {
  Process p;
  ASSERT_TRUE(p.Start().ok());
  p.Run();
  p.SetEnv("TIDEPOOL_SCHEDULER_LISTEN", "127.0.0.1:8005");
  p.SetEnv("TIDEPOOL_SCHEDULER_MAX_INFLIGHT", "9");
  p.SetEnv("TIDEPOOL_ENGINE_MAX_BATCH", "9");  // a scheduler does not read it
  ASSERT_TRUE(p.live->Reload().ok());
  EXPECT_EQ(p.Metric("tidepool_config_restart_needed"), 1);
  EXPECT_EQ(p.live->current().config.scheduler.listen, SchedulerConfig().listen);
  EXPECT_EQ(p.live->current().config.scheduler.max_inflight, 9u);
  p.SetEnv("TIDEPOOL_SCHEDULER_LISTEN", SchedulerConfig().listen);
  ASSERT_TRUE(p.live->Reload().ok());
  EXPECT_EQ(p.Metric("tidepool_config_restart_needed"), 0);
}

TEST(LiveConfig, WhatIsBrokenOrRefusedChangesNothing) {
  Process p;
  ASSERT_TRUE(p.Start().ok());
  p.Run();
  p.SetEnv("TIDEPOOL_SCHEDULER_SLO_TTFT", "8s");
  p.SetEnv("TIDEPOOL_SCHEDULER_HOT_COPIES", "many");
  const absl::Status broken = p.live->Reload();
  EXPECT_THAT(std::string(broken.message()), HasSubstr("TIDEPOOL_SCHEDULER_HOT_COPIES"));
  EXPECT_EQ(p.times(), 0u);
  EXPECT_EQ(p.ttft(), absl::ZeroDuration());
  p.SetEnv("TIDEPOOL_SCHEDULER_HOT_COPIES", "3");
  p.refuse = "not now";
  EXPECT_EQ(p.live->Reload().message(), "not now");
  EXPECT_EQ(p.ttft(), absl::ZeroDuration());
  EXPECT_EQ(p.Updates("failure"), 2u);
  p.refuse.clear();
  EXPECT_TRUE(p.live->Reload().ok());
  EXPECT_EQ(p.ttft(), absl::Seconds(8));
}

TEST(ConfigAuthor, ReadsBackAndRefusesGarbage) {
  const ConfigAuthor author{"me@\xff\nhere", absl::FromUnixSeconds(1'700'000'000)};
  const auto read = DecodeConfigAuthor(EncodeConfigAuthor(author));
  ASSERT_TRUE(read.ok()) << read.status();
  EXPECT_EQ(read->when, author.when);
  EXPECT_EQ(read->who.find('\n'), std::string::npos);
  for (const std::string garbage : {"", "[]", "{}", R"({"who": 1, "when": "2020-01-01T00:00:00Z"})",
                                    R"({"who": "me", "when": "yesterday"})", "\xff"}) {
    EXPECT_FALSE(DecodeConfigAuthor(garbage).ok()) << garbage;
  }
}

class ClusterConfigTest : public testing::Test {
 protected:
  void SetUp() override {
    TP_NEEDS_ETCD();
    etcd_ = std::make_unique<EtcdProcess>();
    ASSERT_TRUE(etcd_->ready());
    cluster_.etcd = {etcd_->address()};
    // A busy machine's etcd takes its time.
    cluster_.lease = absl::Seconds(15);
  }
  // Its revision.
  int64_t Write(const std::string& text, int64_t over) {
    const auto written = WriteStoredConfig(cluster_, over, text, {"me@here", absl::Now()});
    EXPECT_TRUE(written.ok()) << written.status();
    return written.value_or(0);
  }

  std::unique_ptr<EtcdProcess> etcd_;
  ClusterConfig cluster_;
};

TEST_F(ClusterConfigTest, IsWrittenOnlyOverWhatWasReadAndSaysByWhom) {
  const auto none = ReadStoredConfig(cluster_);
  ASSERT_TRUE(none.ok()) << none.status();
  EXPECT_EQ(none->revision, 0);
  const int64_t first = Write("scheduler: {max_inflight: 7}\n", 0);
  const auto read = ReadStoredConfig(cluster_);
  ASSERT_TRUE(read.ok()) << read.status();
  EXPECT_EQ(read->text, "scheduler: {max_inflight: 7}\n");
  EXPECT_EQ(read->revision, first);
  EXPECT_EQ(read->name, "/tidepool/config@" + std::to_string(first));
  ASSERT_TRUE(read->author.has_value());
  EXPECT_EQ(read->author->who, "me@here");
  const absl::Status late = WriteStoredConfig(cluster_, 0, "", {"you@there", absl::Now()}).status();
  EXPECT_TRUE(absl::IsAborted(late)) << late;
  EXPECT_THAT(std::string(late.message()), HasSubstr("by me@here"));
  // Past us: nobody is named for it.
  auto client = *EtcdClient::Create(etcd_->options());
  ASSERT_TRUE(client->Put("/tidepool/config", "x", 0).ok());
  const auto past = ReadStoredConfig(cluster_);
  ASSERT_TRUE(past.ok()) << past.status();
  EXPECT_FALSE(past->author.has_value());
}

TEST_F(ClusterConfigTest, AProcessStartsWithItAndTakesEveryChange) {
  const int64_t first = Write("scheduler: {slo: {ttft: 5s}, max_inflight: 7}\n", 0);
  Process p;
  ASSERT_TRUE(p.Start(etcd_->address()).ok());
  EXPECT_EQ(p.ttft(), absl::Seconds(5));
  EXPECT_EQ(p.Metric("tidepool_config_cluster_revision"), first);
  p.Run();
  const int64_t second = Write("scheduler: {slo: {ttft: 8s}}\nengine: {max_batch: 8}\n", first);
  ASSERT_TRUE(Eventually([&] { return p.times() == 1; }));
  EXPECT_EQ(p.ttft(), absl::Seconds(8));
  EXPECT_EQ(p.live->current().config.scheduler.max_inflight, SchedulerConfig().max_inflight);
  ASSERT_TRUE(Eventually([&] { return p.Metric("tidepool_config_cluster_revision") == second; }));
  EXPECT_EQ(p.Metric("tidepool_config_restart_needed"), 0) << "the scheduler has no engine";
  // Taken away: as without.
  auto client = *EtcdClient::Create(etcd_->options());
  ASSERT_TRUE(client->DeleteOf("/tidepool/config", 0).ok());
  ASSERT_TRUE(Eventually([&] { return p.ttft() == absl::ZeroDuration(); }));
}

TEST_F(ClusterConfigTest, WhatCameWhileTheProcessWasStartingIsTakenWhenItRuns) {
  Process p;
  ASSERT_TRUE(p.Start(etcd_->address()).ok());
  Write("scheduler: {slo: {ttft: 8s}}\n", 0);
  Process witness;
  ASSERT_TRUE(witness.Start(etcd_->address()).ok());
  ASSERT_EQ(witness.ttft(), absl::Seconds(8));
  EXPECT_EQ(p.ttft(), absl::ZeroDuration()) << "what it is being made of stands still";
  p.Run();
  EXPECT_TRUE(Eventually([&] { return p.times() == 1 && p.ttft() == absl::Seconds(8); }));
}

TEST_F(ClusterConfigTest, ABrokenOneIsRefusedAndTheLastGoodOneStays) {
  const int64_t first = Write("scheduler: {slo: {ttft: 5s}}\n", 0);
  Process p;
  ASSERT_TRUE(p.Start(etcd_->address()).ok());
  p.Run();
  const int64_t broken = Write("scheduler: {slo: {ttft: 8s}}\nworker: {id: all}\n", first);
  ASSERT_TRUE(Eventually([&] { return p.Metric("tidepool_config_cluster_refused") == 1; }));
  EXPECT_EQ(p.ttft(), absl::Seconds(5));
  EXPECT_EQ(p.Metric("tidepool_config_cluster_revision"), first);
  // Who starts now has no good one to stay with.
  Process late;
  ASSERT_TRUE(late.Start(etcd_->address()).ok());
  EXPECT_EQ(late.ttft(), absl::ZeroDuration());
  EXPECT_EQ(late.Metric("tidepool_config_cluster_refused"), 1);
  Write("scheduler: {slo: {ttft: 8s}}\n", broken);
  ASSERT_TRUE(Eventually([&] { return p.Metric("tidepool_config_cluster_refused") == 0; }));
  EXPECT_EQ(p.ttft(), absl::Seconds(8));
}

TEST_F(ClusterConfigTest, OneThatWasRefusedIsTriedAgainByItselfAndIsCountedOnce) {
  const int64_t first = Write("scheduler: {slo: {ttft: 5s}}\n", 0);
  Process p;
  ASSERT_TRUE(p.Start(etcd_->address()).ok());
  p.Run();
  {
    std::lock_guard lock(p.mu);
    p.refuse = "not now";
  }
  const int64_t second = Write("scheduler: {slo: {ttft: 8s}}\n", first);
  ASSERT_TRUE(Eventually([&] { return p.Metric("tidepool_config_cluster_refused") == 1; }));
  {
    std::lock_guard lock(p.mu);
    p.refuse.clear();
  }
  ASSERT_TRUE(Eventually([&] { return p.ttft() == absl::Seconds(8); }));
  ASSERT_TRUE(Eventually([&] { return p.Metric("tidepool_config_cluster_revision") == second; }));
  EXPECT_EQ(p.Metric("tidepool_config_cluster_refused"), 0);
  EXPECT_EQ(p.Updates("failure"), 1u);
}

TEST_F(ClusterConfigTest, OneThatDoesNotGoWithTheFileIsTakenWhenTheFileIsReadAgain) {
  Write("scheduler: {worker_timeout: 1s}\n", 0);
  Process p;
  p.SetEnv("TIDEPOOL_WORKER_REPORT_INTERVAL", "500ms");
  p.SetEnv("TIDEPOOL_SCHEDULER_MAX_INFLIGHT", "5");
  ASSERT_TRUE(p.Start(etcd_->address()).ok());
  EXPECT_EQ(p.Metric("tidepool_config_cluster_refused"), 1);
  EXPECT_EQ(p.live->current().config.scheduler.worker_timeout, SchedulerConfig().worker_timeout);
  p.Run();
  p.SetEnv("TIDEPOOL_SCHEDULER_MAX_INFLIGHT", "6");
  ASSERT_TRUE(p.live->Reload().ok());
  EXPECT_EQ(p.live->current().config.scheduler.max_inflight, 6u) << "what holds is read again";
  EXPECT_EQ(p.Metric("tidepool_config_cluster_refused"), 1);
  p.SetEnv("TIDEPOOL_SCHEDULER_WORKER_TIMEOUT", "2s");
  ASSERT_TRUE(p.live->Reload().ok());
  EXPECT_EQ(p.Metric("tidepool_config_cluster_refused"), 0);
  EXPECT_EQ(p.live->current().config.scheduler.worker_timeout, absl::Seconds(2));
}

TEST_F(ClusterConfigTest, WhatAProcessWasGivenByHandHolds) {
  Write("scheduler: {slo: {ttft: 5s, itl: 50ms}}\n", 0);
  Process p;
  p.SetEnv("TIDEPOOL_SCHEDULER_SLO_TTFT", "2s");
  ASSERT_TRUE(p.Start(etcd_->address()).ok());
  EXPECT_EQ(p.ttft(), absl::Seconds(2));
  EXPECT_EQ(p.live->current().config.scheduler.slo.itl, absl::Milliseconds(50));
}

TEST_F(ClusterConfigTest, WithoutEtcdAndAfterItHasLostItsDataTheLastGoodOneStays) {
  Write("scheduler: {slo: {ttft: 5s}}\n", 0);
  // So that an empty etcd is recognised as one that has lost something.
  auto client = *EtcdClient::Create(etcd_->options());
  for (int i = 0; i < 20; ++i) ASSERT_TRUE(client->Put("/tidepool/config_other", "x", 0).ok());
  Process p;
  ASSERT_TRUE(p.Start(etcd_->address()).ok());
  p.Run();
  etcd_->Kill();
  ASSERT_TRUE(p.live->Reload().ok());
  EXPECT_EQ(p.ttft(), absl::Seconds(5));
  etcd_->LoseData();
  etcd_->Start();
  // Something that it sees is proof that it has looked again.
  ASSERT_TRUE(Eventually([&] { return client->Put("/tidepool/config_other", "y", 0).ok(); }));
  EXPECT_EQ(p.ttft(), absl::Seconds(5));
  Write("scheduler: {slo: {ttft: 6s}}\n", 0);
  EXPECT_TRUE(Eventually([&] { return p.ttft() == absl::Seconds(6); }));
  EXPECT_EQ(p.times(), 1u) << "it never fell back to nothing";
}

TEST_F(ClusterConfigTest, AProcessStartsWithoutEtcdAndTakesItLater) {
  Write("scheduler: {slo: {ttft: 5s}}\n", 0);
  etcd_->Kill();
  Process p;
  ASSERT_TRUE(p.Start(etcd_->address(), absl::Milliseconds(50)).ok());
  EXPECT_EQ(p.ttft(), absl::ZeroDuration());
  p.Run();
  etcd_->Start();
  EXPECT_TRUE(Eventually([&] { return p.ttft() == absl::Seconds(5); }));
}

}  // namespace
}  // namespace tidepool
