#include "server/cluster/live_config.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/time/clock.h"
#include "base/log.h"
#include "base/status.h"
#include "config/fields.h"

namespace tidepool {
namespace {

std::string By(const StoredConfig& stored) {
  if (!stored.author) return "";
  return absl::StrCat(", by ", stored.author->who, " at ",
                      absl::FormatTime(absl::RFC3339_sec, stored.author->when, absl::UTCTimeZone()));
}

void SetLogLevel(const std::string& level) {
  spdlog::default_logger()->set_level(spdlog::level::from_str(level));
}

}  // namespace

struct LiveConfig::Probe {
  explicit Probe(MetricRegistry& metrics)
      : updates{&Updates(metrics, "success"), &Updates(metrics, "failure")},
        revision(metrics.AddGauge("tidepool_config_cluster_revision",
                                  "Revision of the cluster's document that holds; 0: none does.")),
        refused(
            metrics.AddGauge("tidepool_config_cluster_refused",
                             "1: the document that stands in etcd is refused, and an earlier one holds.")),
        restart(
            metrics.AddGauge("tidepool_config_restart_needed",
                             "Fields whose configured value holds only after a restart of this process.")) {}

  static Counter& Updates(MetricRegistry& metrics, const char* result) {
    return metrics.AddCounter("tidepool_config_updates_total",
                              "Changes of the configuration that were taken, or refused as a whole.",
                              {{"result", result}});
  }

  Counter* updates[2];
  Gauge& revision;
  Gauge& refused;
  Gauge& restart;
};

LiveConfig::LiveConfig(Options options)
    : options_(std::move(options)), probe_(std::make_unique<Probe>(*options_.metrics)) {}

absl::StatusOr<std::unique_ptr<LiveConfig>> LiveConfig::Start(Options options) {
  std::unique_ptr<LiveConfig> live(new LiveConfig(std::move(options)));
  TP_ASSIGN_OR_RETURN(live->running_, live->options_.load(nullptr));
  const ClusterConfig cluster = live->running_.config.cluster;
  if (cluster.etcd.empty()) {
    live->phase_ = Phase::kStarting;
    return live;
  }
  const auto on_change = [l = live.get()](const StoredConfig& stored) {
    std::lock_guard lock(l->mu_);
    (void)l->TakeStored(stored);
  };
  const auto on_idle = [l = live.get()] {
    std::lock_guard lock(l->mu_);
    if (l->phase_ == Phase::kRunning) (void)l->TakeRefused();
  };
  TP_ASSIGN_OR_RETURN(live->watch_,
                      ConfigWatch::Start(cluster, on_change, on_idle, live->options_.try_again));
  if (!live->watch_->WaitFirst(live->options_.first_look)) {
    spdlog::warn("etcd does not say whether there is a configuration for the cluster; starting without");
  }
  std::lock_guard lock(live->mu_);
  live->phase_ = Phase::kStarting;
  SetLogLevel(live->running_.config.log.level);
  return live;
}

LiveConfig::~LiveConfig() { Stop(); }

void LiveConfig::Stop() {
  {
    std::lock_guard lock(mu_);
    phase_ = Phase::kStopped;
  }
  if (watch_) watch_->Stop();
}

LoadedConfig LiveConfig::current() const {
  std::lock_guard lock(mu_);
  return running_;
}

void LiveConfig::Run(std::function<absl::Status(const Config&)> apply) {
  std::lock_guard lock(mu_);
  TP_CHECK(phase_ == Phase::kStarting);
  apply_ = std::move(apply);
  phase_ = Phase::kRunning;
  if (waiting_) (void)TakeStored(*std::exchange(waiting_, std::nullopt));
}

absl::Status LiveConfig::TakeRefused() {
  if (!refused_) return absl::OkStatus();
  const StoredConfig again = refused_->stored;
  return TakeStored(again);
}

absl::Status LiveConfig::TakeStored(const StoredConfig& stored) {
  if (phase_ == Phase::kStopped) return absl::OkStatus();
  if (phase_ == Phase::kStarting) {
    waiting_ = stored;
    return absl::OkStatus();
  }
  const std::string what = absl::StrCat("the cluster's configuration ", stored.name, By(stored));
  std::shared_ptr<const LoadedConfig> document;
  absl::Status status;
  if (stored.revision != 0) {
    auto parsed = ParseClusterDocument(stored.text, stored.name);
    status = parsed.status();
    if (parsed.ok()) document = std::make_shared<const LoadedConfig>(*std::move(parsed));
  }
  if (status.ok()) status = Take(std::move(document), what);
  probe_->refused.Set(status.ok() ? 0 : 1);
  if (!status.ok()) {
    // Tried again every few seconds: said once, until the reason is another.
    const bool said = refused_ && refused_->stored.revision == stored.revision &&
                      refused_->stored.text == stored.text && refused_->status == status;
    refused_ = Refused{stored, status};
    if (!said) Refuse(what, status);
    return status;
  }
  refused_.reset();
  probe_->revision.Set(static_cast<double>(stored.revision));
  if (stored.revision != 0) {
    spdlog::info("{} holds", what);
    // Somebody may wonder why a value does not come through.
    for (const auto& [path, place] : document_->sources) {
      const auto source = running_.sources.find(path);
      if (source != running_.sources.end() && source->second != place && Concerns(path, options_.role)) {
        spdlog::info("{} of {} does not hold here: {} says otherwise", path, stored.name, source->second);
      }
    }
  }
  return absl::OkStatus();
}

absl::Status LiveConfig::Reload() {
  std::lock_guard lock(mu_);
  if (phase_ != Phase::kRunning) return absl::OkStatus();
  if (refused_) {
    // What it was refused for may have been in the file; who asked is told if it was not.
    refused_->status = absl::OkStatus();
    if (const absl::Status taken = TakeRefused(); taken.ok()) return taken;
  }
  const absl::Status status = Take(document_, "the configuration, read again");
  if (!status.ok()) Refuse("the configuration, read again,", status);
  return status;
}

void LiveConfig::Refuse(const std::string& what, const absl::Status& status) {
  probe_->updates[1]->Add();
  for (const absl::string_view line : absl::StrSplit(status.message(), '\n')) {
    spdlog::error("{} is refused: {}", what, std::string(line));
  }
  spdlog::error("what held before goes on to hold");
}

absl::Status LiveConfig::Take(std::shared_ptr<const LoadedConfig> document, const std::string& why) {
  TP_ASSIGN_OR_RETURN(LoadedConfig wanted, options_.load(document));
  if (phase_ == Phase::kLooking) {
    // Nothing is made of it yet: all of it holds.
    running_ = std::move(wanted);
    document_ = std::move(document);
    probe_->updates[0]->Add();
    return absl::OkStatus();
  }
  const ConfigChange change = CompareConfigs(running_.config, wanted.config, options_.role);
  LoadedConfig next = running_;
  CopyLiveFields(wanted, next);
  if (!change.live.empty()) {
    // What may change now has to go with what may not.
    TP_RETURN_IF_ERROR(Annotate(Validate(next, options_.role), "with what this process was started with"));
    TP_RETURN_IF_ERROR(apply_(next.config));
    SetLogLevel(next.config.log.level);
    for (const std::string_view path : change.live) {
      spdlog::info("{}: {}", why, DescribeChange(path, running_.config, next.config));
    }
  }
  running_ = std::move(next);
  document_ = std::move(document);
  probe_->updates[0]->Add();
  ExportRestart(wanted);
  return absl::OkStatus();
}

void LiveConfig::ExportRestart(const LoadedConfig& wanted) {
  const ConfigChange left = CompareConfigs(running_.config, wanted.config, options_.role);
  probe_->restart.Set(static_cast<double>(left.restart.size()));
  if (left.restart == restart_) return;
  for (const std::string_view path : left.restart) {
    spdlog::warn("restart this process to take {}, from {}",
                 DescribeChange(path, running_.config, wanted.config), wanted.Describe(path));
  }
  if (left.restart.empty()) spdlog::info("no restart is needed any more");
  restart_ = left.restart;
}

}  // namespace tidepool
