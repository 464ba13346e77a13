#include "server/cluster/config_store.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/clock.h"
#include "base/log.h"
#include "base/status.h"
#include "server/cluster/etcd_options.h"

namespace tidepool {
namespace {

constexpr char kDocumentKey[] = "config";
constexpr char kAuthorKey[] = "config_author";
constexpr absl::Duration kRetry = absl::Milliseconds(200);
constexpr absl::Duration kSayEvery = absl::Minutes(1);

StoredConfig ToStored(const std::string& prefix, const std::optional<EtcdEntry>& document,
                      const std::optional<EtcdEntry>& author) {
  StoredConfig out;
  out.name = prefix + kDocumentKey;
  if (!document) return out;
  out.text = document->value;
  out.revision = document->mod_revision;
  absl::StrAppend(&out.name, "@", out.revision);
  if (author && author->mod_revision == document->mod_revision) {
    if (auto read = DecodeConfigAuthor(author->value); read.ok()) out.author = *std::move(read);
  }
  return out;
}

absl::StatusOr<StoredConfig> Read(EtcdClient& etcd, const std::string& prefix) {
  TP_ASSIGN_OR_RETURN(const EtcdListing listing, etcd.List(prefix + kDocumentKey));
  std::optional<EtcdEntry> document, author;
  for (const EtcdEntry& entry : listing.entries) {
    if (entry.key == prefix + kDocumentKey) document = entry;
    if (entry.key == prefix + kAuthorKey) author = entry;
  }
  return ToStored(prefix, document, author);
}

absl::StatusOr<std::unique_ptr<EtcdClient>> Connect(const ClusterConfig& config) {
  if (config.etcd.empty()) {
    return absl::FailedPreconditionError(
        "cluster.etcd is empty: a document for the whole cluster stands in etcd; name it with "
        "TIDEPOOL_CLUSTER_ETCD or --config FILE");
  }
  return EtcdClient::Create(EtcdOptionsOf(config));
}

std::string AuthorText(const StoredConfig& stored) {
  if (!stored.author) return "somebody without `ctl config apply`";
  return absl::StrCat(stored.author->who, " at ",
                      absl::FormatTime(absl::RFC3339_sec, stored.author->when, absl::UTCTimeZone()));
}

}  // namespace

absl::StatusOr<StoredConfig> ReadStoredConfig(const ClusterConfig& config) {
  TP_ASSIGN_OR_RETURN(const auto etcd, Connect(config));
  return Read(*etcd, EtcdPrefix(config));
}

absl::StatusOr<int64_t> WriteStoredConfig(const ClusterConfig& config, int64_t revision,
                                          const std::string& text, const ConfigAuthor& author) {
  TP_ASSIGN_OR_RETURN(const auto etcd, Connect(config));
  const std::string prefix = EtcdPrefix(config);
  const std::string by = EncodeConfigAuthor(author);
  TP_ASSIGN_OR_RETURN(const std::optional<int64_t> written,
                      etcd->CompareAndPut(prefix + kDocumentKey, revision,
                                          {{prefix + kDocumentKey, text}, {prefix + kAuthorKey, by}}));
  if (written) return *written;
  TP_ASSIGN_OR_RETURN(const StoredConfig now, Read(*etcd, prefix));
  // Ours after all: the answer to a first try was lost.
  if (now.revision > revision && now.text == text && now.author && EncodeConfigAuthor(*now.author) == by) {
    return now.revision;
  }
  if (now.revision == 0) {
    return absl::AbortedError(absl::StrCat(now.name, " is gone: it was of revision ", revision,
                                           "; look again with `ctl config diff`"));
  }
  return absl::AbortedError(absl::StrCat(prefix + kDocumentKey, " is of revision ", now.revision, " now, by ",
                                         AuthorText(now), ", and not of ", revision,
                                         " any more; look again with `ctl config diff`"));
}

absl::StatusOr<std::unique_ptr<ConfigWatch>> ConfigWatch::Start(
    const ClusterConfig& config, std::function<void(const StoredConfig&)> on_change,
    std::function<void()> on_idle, absl::Duration idle) {
  TP_ASSIGN_OR_RETURN(auto etcd, Connect(config));
  std::unique_ptr<ConfigWatch> watch(
      new ConfigWatch(EtcdPrefix(config), std::move(etcd), std::move(on_change), std::move(on_idle), idle));
  watch->thread_ = std::thread([w = watch.get()] { w->Run(); });
  return watch;
}

ConfigWatch::ConfigWatch(std::string prefix, std::unique_ptr<EtcdClient> etcd,
                         std::function<void(const StoredConfig&)> on_change, std::function<void()> on_idle,
                         absl::Duration idle)
    : prefix_(std::move(prefix)),
      etcd_(std::move(etcd)),
      on_change_(std::move(on_change)),
      on_idle_(std::move(on_idle)),
      idle_(idle) {}

ConfigWatch::~ConfigWatch() { Stop(); }

void ConfigWatch::Stop() {
  {
    std::lock_guard lock(mu_);
    stop_ = true;
  }
  wake_.notify_all();
  etcd_->Stop();
  if (thread_.joinable()) thread_.join();
}

bool ConfigWatch::WaitFirst(absl::Duration limit) {
  std::unique_lock lock(mu_);
  return wake_.wait_for(lock, absl::ToChronoNanoseconds(limit), [&] { return first_; });
}

void ConfigWatch::Tell() {
  const StoredConfig stored = ToStored(prefix_, document_, author_);
  if (const std::pair now(stored.revision, stored.text); told_ != now) {
    told_ = now;
    on_change_(stored);
  }
  {
    std::lock_guard lock(mu_);
    first_ = true;
  }
  wake_.notify_all();
}

void ConfigWatch::TakeListing(const EtcdListing& listing) {
  std::optional<EtcdEntry> document, author;
  for (const EtcdEntry& entry : listing.entries) {
    if (entry.key == prefix_ + kDocumentKey) document = entry;
    if (entry.key == prefix_ + kAuthorKey) author = entry;
  }
  // An etcd that has lost its data says nothing of what the operator wants, until somebody writes a document.
  lost_ = (lost_ || listing.revision < seen_) && !document && document_;
  if (lost_) {
    spdlog::warn("etcd has lost its data, and {}{} with it: what it said goes on to hold; apply it again",
                 prefix_, kDocumentKey);
  } else {
    document_ = std::move(document);
    author_ = std::move(author);
  }
  seen_ = listing.revision;
}

void ConfigWatch::Run() {
  const std::string watched = prefix_ + kDocumentKey;
  std::optional<int64_t> next;  // none: what is there is not known
  absl::Time said = absl::InfinitePast();
  std::unique_lock lock(mu_);
  while (!stop_) {
    lock.unlock();
    absl::Status status;
    if (!next) {
      const auto listing = etcd_->List(watched);
      status = listing.status();
      if (listing.ok()) {
        TakeListing(*listing);
        Tell();
        next = listing->revision + 1;
      }
    } else {
      EtcdClient::WatchSink sink;
      bool ready = false;
      sink.on_ready = [&ready] { ready = true; };
      sink.on_events = [&](const std::vector<EtcdClient::WatchEvent>& events, int64_t revision) {
        next = revision + 1;
        seen_ = std::max(seen_, revision);
        for (const EtcdClient::WatchEvent& event : events) {
          std::optional<EtcdEntry> entry;
          if (!event.deleted) entry = event.entry;
          if (event.entry.key == prefix_ + kDocumentKey) {
            document_ = entry;
            lost_ = false;
          }
          if (event.entry.key == prefix_ + kAuthorKey) author_ = entry;
        }
        // Both keys of one transaction come in one message.
        if (!events.empty()) Tell();
      };
      status = etcd_->Watch(watched, *next, idle_, sink);
      if (absl::IsOutOfRange(status) || absl::IsDataLoss(status)) {
        lost_ = lost_ || absl::IsDataLoss(status);
        next.reset();
        status = absl::OkStatus();
      }
      if (absl::IsDeadlineExceeded(status)) on_idle_();
      // One that has gone silent before it began to watch is told of below.
      if (absl::IsDeadlineExceeded(status) && ready) status = absl::OkStatus();
    }
    if (!status.ok() && !absl::IsCancelled(status)) {
      if (const absl::Time now = Clock::Real().Now(); now - said >= kSayEvery) {
        said = now;
        spdlog::warn("etcd's {} cannot be {}: {}; what it said last goes on to hold", watched,
                     next ? "watched" : "read", std::string(status.message()));
      }
    }
    lock.lock();
    if (!status.ok()) wake_.wait_for(lock, absl::ToChronoNanoseconds(kRetry), [&] { return stop_; });
  }
}

}  // namespace tidepool
