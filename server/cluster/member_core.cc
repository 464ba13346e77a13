#include "server/cluster/member_core.h"

#include <algorithm>

namespace tidepool {
namespace {

// Two renewals may be lost before a lease ends.
constexpr int kRenewalsInLease = 3;
// Elections that may have been won unheard of.
constexpr uint64_t kTermsAside = uint64_t{1} << 20;

}  // namespace

MemberCore::Step MemberCore::Next(absl::Time now) const {
  if (now < retry_at_) return {.until = retry_at_};
  if (lease_ == 0) return {.what = Do::kGrant};
  if (now >= renew_at_) return {.what = Do::kKeepAlive, .lease = lease_};
  if (resign_) return {.what = Do::kResign, .lease = lease_};
  if (options_.candidate && !key_present_) {
    return {.what = Do::kCampaign, .lease = lease_, .term = leader_.term};
  }
  if (wants_registration_ && !registered_) return {.what = Do::kRegister, .lease = lease_};
  if (!wants_registration_ && registered_) return {.what = Do::kLeave, .lease = lease_};
  return {.until = renew_at_};
}

uint64_t MemberCore::NextTerm(uint64_t known, std::optional<uint64_t> counted) {
  // No less than what is known, unless the counter is not the one that was counted with.
  if (counted && *counted < kTermMax && *counted >= known) return *counted + 1;
  return known == 0 ? 1 : std::min(known, kTermMax - kTermsAside) + kTermsAside;
}

absl::Duration MemberCore::Backoff() const {
  absl::Duration wait = options_.retry_min;
  for (int i = 1; i < failures_ && wait < options_.retry_max; ++i) wait *= 2;
  return std::min(wait, options_.retry_max);
}

void MemberCore::Succeeded() {
  reachable_ = true;
  failures_ = 0;
  retry_at_ = absl::InfinitePast();
}

void MemberCore::OnFailed(absl::Time now) {
  reachable_ = false;
  ++failures_;
  retry_at_ = now + Backoff();
}

void MemberCore::OnGranted(int64_t lease, absl::Duration ttl, absl::Time sent) {
  Succeeded();
  lease_ = lease;
  renew_at_ = sent + ttl / kRenewalsInLease;
}

void MemberCore::OnKeptAlive(absl::Duration ttl, absl::Time sent) {
  Succeeded();
  renew_at_ = sent + ttl / kRenewalsInLease;
}

void MemberCore::OnLeaseGone() {
  Succeeded();
  lease_ = 0;
  registered_ = false;
  resign_ = false;
  // The key went with the lease. The watch may say so later, or what has come in its place.
  if (leading_) key_present_ = false;
}

void MemberCore::OnRegistered() {
  Succeeded();
  registered_ = true;
}

void MemberCore::OnLeft() {
  Succeeded();
  registered_ = false;
}

void MemberCore::WantRegistration(bool wanted) {
  wants_registration_ = wanted;
  if (wanted) registered_ = false;
}

void MemberCore::OnKey(bool present, int64_t revision) {
  if (revision < seen_) return;
  seen_ = revision;
  key_present_ = present;
}

void MemberCore::Follow(const Leader& leader) {
  if (leader.term < leader_.term) {
    // A watch that lags, or an etcd that lost its data and a leader that does not know of our term yet. It is
    // told by our next call, and either refuses, or resigns and wins again with a higher one.
    if (!leading_) {
      leader_ = {.address = leader.address, .boot_id = leader.boot_id, .term = leader_.term};
      // Our own that still stands, or was created when a higher term was heard of: nobody leads while it
      // does.
      if (options_.candidate && leader.boot_id == options_.boot_id) resign_ = true;
    }
    return;
  }
  leading_ = options_.candidate && leader.boot_id == options_.boot_id;
  if (leading_) resign_ = false;  // what stands says our term
  leader_ = leader;
}

void MemberCore::OnCampaign(const Leader& standing, int64_t revision) {
  Succeeded();
  OnKey(/*present=*/true, revision);
  Follow(standing);
}

void MemberCore::OnUnreadableKey(int64_t revision) {
  Succeeded();
  OnKey(/*present=*/true, revision);
}

void MemberCore::OnResigned() {
  Succeeded();
  resign_ = false;
  key_present_ = false;  // if another's stands there, the campaign will say so
}

void MemberCore::OnLeaderKey(const std::optional<Leader>& leader, int64_t revision) {
  OnKey(leader.has_value(), revision);
  if (leader) Follow(*leader);
}

void MemberCore::OnTerm(uint64_t term) {
  if (term <= leader_.term || term > kTermMax) return;
  resign_ = resign_ || leading_;  // the second term heard of does not undo what the first has asked for
  leading_ = false;
  leader_ = {.address = "", .boot_id = "", .term = term};
}

}  // namespace tidepool
