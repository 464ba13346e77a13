#include "server/batch/batch_gate.h"

#include <algorithm>

#include "base/status.h"

namespace tidepool {

BatchGate::RunId BatchGate::Join() {
  std::lock_guard lock(mu_);
  members_.emplace(next_, Member{});
  return next_++;
}

void BatchGate::Leave(RunId run) {
  std::lock_guard lock(mu_);
  const auto it = members_.find(run);
  if (it == members_.end()) return;
  running_ -= it->second.running;
  members_.erase(it);
}

bool BatchGate::TryStart(RunId run) {
  const OnlineLoad load = Load();
  std::lock_guard lock(mu_);
  Member& member = members_.at(run);
  if (running_ >= core_.Allowed(load, clock_.Now())) return false;
  for (const auto& [id, other] : members_) {
    if (id != run && other.hungry && other.running < member.running) return false;
  }
  ++member.running;
  ++running_;
  return true;
}

void BatchGate::SetHungry(RunId run, bool more) {
  std::lock_guard lock(mu_);
  members_.at(run).hungry = more;
}

void BatchGate::Ended(RunId run, absl::Time started, const BatchReply* reply) {
  std::lock_guard lock(mu_);
  const auto it = members_.find(run);
  if (it == members_.end()) return;  // it left, and its lines with it
  TP_CHECK(it->second.running > 0);
  --it->second.running;
  --running_;
  if (reply == nullptr) return;
  if (KindOf(*reply) == ReplyKind::kRefused) {
    core_.Refused(started, reply->retry_after, clock_.Now());
  } else {
    core_.Answered();
  }
}

size_t BatchGate::GiveBack(RunId run) {
  const OnlineLoad load = Load();
  std::lock_guard lock(mu_);
  const Member& member = members_.at(run);
  // From the run that has most; the others' turn comes.
  for (const auto& [id, other] : members_) {
    if (other.running > member.running) return 0;
  }
  return std::min(member.running, core_.GiveBack(load, running_, clock_.Now()));
}

size_t BatchGate::running() const {
  std::lock_guard lock(mu_);
  return running_;
}

absl::Time BatchGate::paused_until() const {
  std::lock_guard lock(mu_);
  return core_.paused_until();
}

}  // namespace tidepool
