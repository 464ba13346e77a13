#include "server/cluster/cluster_member.h"

#include <algorithm>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "base/clock.h"
#include "base/log.h"
#include "base/status.h"
#include "server/cluster/etcd_options.h"
#include "server/cluster/member_codec.h"

namespace tidepool {
namespace {

constexpr char kLeaderKey[] = "leader";
constexpr char kTermKey[] = "term";
constexpr char kMembersKey[] = "members/";
// A watch is begun anew after this long, so that one that has gone silent is noticed.
constexpr absl::Duration kWatchLimit = absl::Seconds(20);
constexpr absl::Duration kWatchRetry = absl::Milliseconds(200);
constexpr absl::Duration kWatchSayEvery = absl::Minutes(1);
constexpr size_t kMembersMax = 65536;
// Without etcd this many tries say so only once in a while.
constexpr int kSayEvery = 60;

}  // namespace

struct ClusterMember::Probe {
  explicit Probe(MetricRegistry& metrics)
      : etcd_up(metrics.AddGauge("tidepool_cluster_etcd_up",
                                 "1: etcd answered last time; 0: membership is frozen as it was.")),
        etcd_failures(metrics.AddCounter("tidepool_cluster_etcd_failures_total",
                                         "Calls to etcd that no endpoint answered, or that it refused.")),
        malformed(metrics.AddCounter("tidepool_cluster_etcd_malformed_total",
                                     "Values in etcd that were not understood, and left alone.")),
        leading(metrics.AddGauge("tidepool_cluster_leading", "1: this process is the scheduler that leads.")),
        term(metrics.AddGauge("tidepool_cluster_term", "Highest term of a leader that is known.")),
        leader_changes(metrics.AddCounter("tidepool_cluster_leader_changes_total",
                                          "Times that another scheduler, or term, was known to lead.")),
        leases_lost(metrics.AddCounter("tidepool_cluster_leases_lost_total",
                                       "Leases that etcd ended, and that were replaced.")),
        members(metrics.AddGauge("tidepool_cluster_members", "Processes that have joined, where watched.")) {}

  Gauge& etcd_up;
  Counter& etcd_failures;
  Counter& malformed;
  Gauge& leading;
  Gauge& term;
  Counter& leader_changes;
  Counter& leases_lost;
  Gauge& members;
};

ClusterMember::ClusterMember(Options options)
    : options_(std::move(options)),
      prefix_(EtcdPrefix(options_.config)),
      probe_(std::make_unique<Probe>(*options_.metrics)),
      core_({.candidate = options_.candidate, .boot_id = options_.boot_id, .lease = options_.config.lease}) {}

absl::StatusOr<std::unique_ptr<ClusterMember>> ClusterMember::Start(Options options) {
  std::unique_ptr<ClusterMember> member(new ClusterMember(std::move(options)));
  TP_ASSIGN_OR_RETURN(member->etcd_, EtcdClient::Create(EtcdOptionsOf(member->options_.config)));
  member->watch_thread_ = std::thread([m = member.get()] { m->Watch(); });
  member->lease_thread_ = std::thread([m = member.get()] { m->Run(); });
  return member;
}

absl::StatusOr<std::shared_ptr<ClusterMember>> ClusterMember::StartIfConfigured(Options options) {
  if (options.config.etcd.empty()) return nullptr;
  return Start(std::move(options));
}

ClusterMember::~ClusterMember() { Resign(); }

void ClusterMember::Resign() {
  int64_t lease = 0;
  {
    std::lock_guard lock(mu_);
    if (stop_) return;
    stop_ = true;
    if (core_.reachable()) lease = core_.lease();
  }
  wake_.notify_all();
  if (lease_thread_.joinable()) lease_thread_.join();
  if (lease != 0) {
    if (const absl::Status s = etcd_->Revoke(lease); !s.ok()) {
      spdlog::info("the lease in etcd ends by itself: {}", std::string(s.message()));
    }
  }
  if (etcd_) etcd_->Stop();
  if (watch_thread_.joinable()) watch_thread_.join();
}

std::string ClusterMember::MemberKey() const {
  return absl::StrCat(prefix_, kMembersKey, self_.role(), "/", self_.id());
}

void ClusterMember::Join(const v1::Member& self) {
  {
    std::lock_guard lock(mu_);
    const std::string old = MemberKey();
    self_ = self;
    self_.set_boot_id(options_.boot_id);
    if (joined_ && old != MemberKey()) old_keys_.push_back(old);
    std::erase(old_keys_, MemberKey());
    joined_ = true;
    ++wishes_;
    core_.WantRegistration(true);
    changed_ = true;
  }
  wake_.notify_all();
}

void ClusterMember::Leave() {
  {
    std::lock_guard lock(mu_);
    ++wishes_;
    core_.WantRegistration(false);
    changed_ = true;
  }
  wake_.notify_all();
}

SchedulerLocator::Place ClusterMember::Get() const {
  std::lock_guard lock(mu_);
  return {core_.leader().address, core_.leader().term};
}

bool ClusterMember::Obey(uint64_t term) {
  std::lock_guard lock(mu_);
  if (term < core_.leader().term) return false;
  if (term > core_.leader().term) {
    core_.OnTerm(term);
    changed_ = true;
    wake_.notify_all();
  }
  return true;
}

std::optional<uint64_t> ClusterMember::Term(uint64_t callers_term) {
  (void)Obey(callers_term);
  std::lock_guard lock(mu_);
  if (!core_.leading()) return std::nullopt;
  return core_.leader().term;
}

std::string ClusterMember::LeaderAddress() const {
  std::lock_guard lock(mu_);
  return core_.leader().address;
}

std::vector<v1::Member> ClusterMember::Members() const {
  std::lock_guard lock(mu_);
  std::vector<v1::Member> out;
  out.reserve(members_.size());
  for (const auto& [key, member] : members_) out.push_back(member);
  return out;
}

bool ClusterMember::EtcdReachable() const {
  std::lock_guard lock(mu_);
  return core_.reachable();
}

void ClusterMember::Run() {
  std::unique_lock lock(mu_);
  while (!stop_) {
    changed_ = false;
    const absl::Time now = Clock::Real().Now();
    // Without a place in the cluster there is nothing to hold a lease for.
    const MemberCore::Step step =
        joined_ ? core_.Next(now) : MemberCore::Step{.until = now + absl::Seconds(1)};
    if (step.what == MemberCore::Do::kWait) {
      wake_.wait_for(lock, absl::ToChronoNanoseconds(std::min(step.until - now, absl::Seconds(1))),
                     [&] { return stop_ || changed_; });
    } else {
      Execute(step, lock);
    }
    Changed();
  }
}

void ClusterMember::Execute(const MemberCore::Step& step, std::unique_lock<std::mutex>& lock) {
  v1::Member self = self_;
  const std::string key = MemberKey();
  const absl::Time sent = Clock::Real().Now();
  const uint64_t wishes = wishes_;
  std::vector<std::string> old_keys = old_keys_;
  const auto forget = [&](const std::vector<std::string>& keys) {
    absl::StatusOr<bool> deleted = false;
    for (auto old = keys.begin(); old != keys.end() && deleted.ok(); ++old)
      deleted = etcd_->DeleteOf(*old, step.lease);
    return deleted;
  };
  // Runs without the lock; what it gives is told to the core with it, unless the lease is gone or the call
  // failed, which is the same for all.
  const auto call = [&](const char* what, auto body, auto told) {
    lock.unlock();
    auto result = body();
    lock.lock();
    const absl::Status& status = result.status();
    if (status.ok()) {
      if (core_.failures() > 0) spdlog::info("etcd answers again");
      last_error_.clear();
      told(result);
    } else if (absl::IsNotFound(status)) {
      spdlog::warn("etcd has ended this process's lease; asking for another");
      probe_->leases_lost.Add();
      core_.OnLeaseGone();
    } else {
      core_.OnFailed(Clock::Real().Now());
      Note(status, what);
    }
  };
  switch (step.what) {
    case MemberCore::Do::kWait:
      break;
    case MemberCore::Do::kGrant:
      call(
          "a lease", [&] { return etcd_->Grant(options_.config.lease); },
          [&](const auto& lease) { core_.OnGranted(lease->id, lease->ttl, sent); });
      break;
    case MemberCore::Do::kKeepAlive:
      call(
          "to renew its lease", [&] { return etcd_->KeepAlive(step.lease); },
          [&](const auto& ttl) { core_.OnKeptAlive(*ttl, sent); });
      break;
    case MemberCore::Do::kRegister:
      call(
          "to register",
          [&]() -> absl::StatusOr<bool> {
            TP_RETURN_IF_ERROR(etcd_->Put(key, EncodeMember(self), step.lease).status());
            return forget(old_keys);
          },
          [&](const auto&) {
            // Joined again, or left, meanwhile: that is still to be done.
            if (wishes != wishes_) return;
            old_keys_.clear();
            core_.OnRegistered();
          });
      break;
    case MemberCore::Do::kLeave:
      old_keys.push_back(key);
      call(
          "to leave", [&] { return forget(old_keys); }, [&](const auto&) { core_.OnLeft(); });
      break;
    case MemberCore::Do::kCampaign:
      call(
          "to lead", [&] { return Campaign(step, self); },
          [&](const auto& standing) {
            if (const auto leader = ToLeader(*standing)) {
              core_.OnCampaign(*leader, standing->mod_revision);
            } else {
              core_.OnUnreadableKey(standing->mod_revision);
            }
          });
      break;
    case MemberCore::Do::kResign:
      call(
          "to resign", [&] { return etcd_->DeleteOf(prefix_ + kLeaderKey, step.lease); },
          [&](const auto&) { core_.OnResigned(); });
      break;
  }
}

absl::StatusOr<EtcdEntry> ClusterMember::Campaign(const MemberCore::Step& step, v1::Member self) {
  const std::string counter = prefix_ + kTermKey;
  TP_ASSIGN_OR_RETURN(const std::optional<EtcdEntry> last, etcd_->Get(counter));
  std::optional<uint64_t> counted;
  uint64_t number = 0;
  if (last && absl::SimpleAtoi(last->value, &number)) counted = number;
  self.set_term(MemberCore::NextTerm(step.term, counted));
  const EtcdClient::Along along{counter, std::to_string(self.term()), last ? last->mod_revision : 0};
  return etcd_->Create(prefix_ + kLeaderKey, EncodeMember(self), step.lease, &along);
}

void ClusterMember::Note(const absl::Status& status, const char* what) {
  probe_->etcd_failures.Add();
  const std::string text = status.ToString();
  if (text == last_error_ && core_.failures() % kSayEvery != 0) return;
  spdlog::warn("etcd was asked {} and did not answer: {}; going on with what is known", what,
               std::string(status.message()));
  last_error_ = text;
}

void ClusterMember::Changed() {
  const bool leading = core_.leading();
  const Leader& leader = core_.leader();
  if (leader.term != told_.term || leader.address != told_.address) {
    if (leader.term != told_.term) probe_->leader_changes.Add();
    if (leading) {
      spdlog::info("this scheduler leads, term {}", leader.term);
    } else if (leader.address.empty()) {
      spdlog::warn("another scheduler leads term {}; who, etcd will say", leader.term);
    } else {
      spdlog::info("the scheduler at {} leads, term {}", leader.address, leader.term);
    }
  }
  told_ = {leader.address, leader.term};
  probe_->leading.Set(leading ? 1 : 0);
  probe_->term.Set(static_cast<double>(leader.term));
  probe_->etcd_up.Set(core_.reachable() ? 1 : 0);
  probe_->members.Set(static_cast<double>(members_.size()));
}

std::optional<v1::Member> ClusterMember::Decode(const EtcdEntry& entry) {
  auto member = DecodeMember(entry.value);
  if (member.ok()) return *std::move(member);
  probe_->malformed.Add();
  spdlog::warn("etcd's key {} {}; left alone", entry.key, std::string(member.status().message()));
  return std::nullopt;
}

std::optional<Leader> ClusterMember::ToLeader(const EtcdEntry& entry) {
  const auto member = Decode(entry);
  if (!member || member->term() == 0 || member->term() > MemberCore::kTermMax) return std::nullopt;
  return Leader{.address = member->address(), .boot_id = member->boot_id(), .term = member->term()};
}

void ClusterMember::TakeLeader(const EtcdEntry& entry) {
  if (const auto leader = ToLeader(entry)) return core_.OnLeaderKey(leader, entry.mod_revision);
  core_.OnUnreadableKey(entry.mod_revision);
}

void ClusterMember::TakeMember(const EtcdEntry& entry) {
  auto member = Decode(entry);
  if (!member) return;
  if (members_.size() >= kMembersMax && !members_.contains(entry.key)) return;
  members_[entry.key] = *std::move(member);
}

void ClusterMember::TakeListing(const EtcdListing& listing) {
  members_.clear();
  core_.OnListed();
  const EtcdEntry* leader = nullptr;
  for (const EtcdEntry& entry : listing.entries) {
    if (entry.key == prefix_ + kLeaderKey) leader = &entry;
    if (absl::StartsWith(entry.key, prefix_ + kMembersKey)) TakeMember(entry);
  }
  if (leader != nullptr) {
    TakeLeader(*leader);
  } else {
    core_.OnLeaderKey(std::nullopt, listing.revision);
  }
}

void ClusterMember::TakeEvent(const EtcdClient::WatchEvent& event) {
  const std::string& key = event.entry.key;
  if (key == prefix_ + kLeaderKey) {
    if (event.deleted) {
      core_.OnLeaderKey(std::nullopt, event.entry.mod_revision);
    } else {
      TakeLeader(event.entry);
    }
  } else if (absl::StartsWith(key, prefix_ + kMembersKey)) {
    if (event.deleted) {
      members_.erase(key);
    } else {
      TakeMember(event.entry);
    }
  }
}

void ClusterMember::Watch() {
  const std::string watched = options_.watch_members ? prefix_ : prefix_ + kLeaderKey;
  const auto tell = [this](auto change) {
    {
      std::lock_guard lock(mu_);
      change();
      changed_ = true;
    }
    wake_.notify_all();
  };
  absl::Time said = absl::InfinitePast();
  std::optional<int64_t> next;  // none: what is there is not known
  std::unique_lock lock(mu_);
  while (!stop_) {
    lock.unlock();
    absl::Status status;
    if (!next) {
      const auto listing = etcd_->List(watched);
      status = listing.status();
      if (listing.ok()) {
        tell([&] { TakeListing(*listing); });
        next = listing->revision + 1;
      }
    } else {
      EtcdClient::WatchSink sink;
      sink.on_ready = [] {};
      sink.on_events = [&](const std::vector<EtcdClient::WatchEvent>& events, int64_t revision) {
        next = revision + 1;
        if (events.empty()) return;
        tell([&] {
          for (const auto& event : events) TakeEvent(event);
        });
      };
      status = etcd_->Watch(watched, *next, kWatchLimit, sink);
      if (absl::IsOutOfRange(status) || absl::IsDataLoss(status)) {
        spdlog::info("looking at all of etcd's {} again: {}", watched, std::string(status.message()));
        next.reset();
        status = absl::OkStatus();
      }
      if (absl::IsDeadlineExceeded(status)) status = absl::OkStatus();
    }
    // Cancelled: the client asks another endpoint, and has said so.
    if (!status.ok() && !absl::IsCancelled(status)) {
      probe_->etcd_failures.Add();
      if (const absl::Time now = Clock::Real().Now(); now - said >= kWatchSayEvery) {
        said = now;
        spdlog::warn("etcd's {} cannot be {}: {}; trying again", watched, next ? "watched" : "listed",
                     std::string(status.message()));
      }
    }
    lock.lock();
    if (!status.ok()) wake_.wait_for(lock, absl::ToChronoNanoseconds(kWatchRetry), [&] { return stop_; });
  }
}

std::shared_ptr<SchedulerLocator> MakeLocator(const ClusterConfig& config,
                                              std::shared_ptr<ClusterMember> member) {
  if (member) return member;
  return std::make_shared<FixedScheduler>(config.scheduler);
}

absl::StatusOr<std::string> FindLeader(const ClusterConfig& config) {
  TP_ASSIGN_OR_RETURN(const std::unique_ptr<EtcdClient> etcd, EtcdClient::Create(EtcdOptionsOf(config)));
  TP_ASSIGN_OR_RETURN(const std::optional<EtcdEntry> entry, etcd->Get(EtcdPrefix(config) + kLeaderKey));
  if (!entry)
    return absl::UnavailableError("no scheduler leads: etcd has no key " + EtcdPrefix(config) + kLeaderKey);
  const auto member = DecodeMember(entry->value);
  if (!member.ok()) return Annotate(member.status(), "etcd's key " + entry->key);
  return member->address();
}

}  // namespace tidepool
