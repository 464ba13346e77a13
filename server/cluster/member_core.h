#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "absl/time/time.h"

namespace tidepool {

// Who leads, as etcd's `leader` key says: the highest term that is known, even when etcd is away or the key
// is gone. Terms are counted in etcd, in one transaction with the creation of the leader's key, so that every
// leader has a higher one than all before it.
struct Leader {
  std::string address;  // host:port of its gRPC; empty: not known, only that there is one
  std::string boot_id;
  uint64_t term = 0;  // 0: none is known

  bool operator==(const Leader&) const = default;
};

// MemberCore: one process's place in a cluster: its lease, its registration under that lease, and, of a
// scheduler, the election. Core: no thread, no socket, no clock; randomness from outside. Its driver
// (ClusterMember) does what Next says, one thing at a time, and tells what came of it; times are those at
// which a call was sent, on one monotonic clock.
//
// What makes it safe when etcd is away or answers late:
// - A leader goes on leading when its lease cannot be renewed, also past the lease's end: without etcd nobody
//   else can win. It stops once a higher term is seen, in etcd or in any call that it gets (OnTerm): who
//   calls a scheduler says the highest term that it knows.
// - Whatever a watch misses is known late, never wrong: a term never goes down. Where etcd names a leader of
//   a lower term, that is who is asked, in the higher term: it must not answer before it has won one above.
// - A lease that etcd has ended is replaced by a new one, and with it the registration. A leader that lost
//   its lease campaigns again; it goes on meanwhile, and stops if another was faster.
class MemberCore {
 public:
  struct Options {
    bool candidate = false;  // of the election
    std::string boot_id;
    absl::Duration lease = absl::Seconds(3);
    absl::Duration retry_min = absl::Milliseconds(50), retry_max = absl::Seconds(1);
  };

  explicit MemberCore(Options options) : options_(std::move(options)) {}

  enum class Do {
    kWait,       // until Step::until, or until something is told
    kGrant,      // ask for a lease of Options::lease: OnGranted
    kKeepAlive,  // renew Step::lease: OnKeptAlive, OnLeaseGone
    kRegister,   // put the member's key under Step::lease: OnRegistered, OnLeaseGone
    kLeave,      // delete the member's key if it is of Step::lease: OnLeft
    // Create the leader's key under Step::lease, with NextTerm(Step::term, ...): OnCampaign, OnLeaseGone.
    kCampaign,
    kResign,  // delete the leader's key if it is of Step::lease: OnResigned
  };
  struct Step {
    Do what = Do::kWait;
    int64_t lease = 0;
    uint64_t term = 0;
    absl::Time until;
  };
  Step Next(absl::Time now) const;

  // The term to win, where etcd has counted to `counted` and the candidate knows of `known`. An etcd that
  // lost its data is far behind: terms that nobody here knows of may have been won before, so it begins far
  // above.
  // At most kTermMax.
  static uint64_t NextTerm(uint64_t known, std::optional<uint64_t> counted);
  // What no etcd counts up to: a higher one is somebody's mistake.
  static constexpr uint64_t kTermMax = uint64_t{1} << 62;

  void OnGranted(int64_t lease, absl::Duration ttl, absl::Time sent);
  void OnKeptAlive(absl::Duration ttl, absl::Time sent);
  void OnRegistered();
  void OnLeft();
  // What stands in the leader's key since etcd's `revision`, ours or another's; unreadable: not a leader that
  // one could ask, until somebody takes it away.
  void OnCampaign(const Leader& standing, int64_t revision);
  void OnUnreadableKey(int64_t revision);
  void OnResigned();
  // Any of them failed: etcd is away, or refuses us.
  void OnFailed(absl::Time now);
  // Etcd does not know the lease.
  void OnLeaseGone();

  // From the watch: what the leader's key holds since `revision`, or that there is none. What is older than
  // what was told before says nothing of now. After OnListed nothing was told before: etcd may have lost its
  // data.
  void OnListed() { seen_ = 0; }
  void OnLeaderKey(const std::optional<Leader>& leader, int64_t revision);
  // Somebody knows of this term. Its leader's address comes by the watch.
  void OnTerm(uint64_t term);
  // Is to be registered from now on (again: what it registers has changed), or no more.
  void WantRegistration(bool wanted);

  bool leading() const { return leading_; }
  const Leader& leader() const { return leader_; }
  // Etcd answered last time. What it said stays true for us while it does not.
  bool reachable() const { return reachable_; }
  // Calls that failed in a row.
  int failures() const { return failures_; }
  bool registered() const { return registered_; }
  int64_t lease() const { return lease_; }

 private:
  void Succeeded();
  absl::Duration Backoff() const;
  void Follow(const Leader& leader);
  void OnKey(bool present, int64_t revision);

  const Options options_;
  int64_t lease_ = 0;  // 0: none
  absl::Time renew_at_ = absl::InfinitePast();
  absl::Time retry_at_ = absl::InfinitePast();
  int failures_ = 0;
  bool reachable_ = false;
  bool wants_registration_ = false, registered_ = false;
  bool leading_ = false;
  int64_t seen_ = 0;          // revision of key_present_
  bool key_present_ = false;  // the leader's key, as last seen
  bool resign_ = false;       // fenced: a key that may still be ours says too low a term
  Leader leader_;
};

}  // namespace tidepool
