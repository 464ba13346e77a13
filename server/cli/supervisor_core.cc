#include "server/cli/supervisor_core.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "base/status.h"

namespace tidepool {
namespace {

// The exit code of a usage or configuration error: trying again cannot help.
constexpr int kConfigError = 2;

std::string DescribeExit(int exit_code) {
  return exit_code > 128 ? absl::StrCat("was ended by signal ", exit_code - 128)
                         : absl::StrCat("exited with code ", exit_code);
}

}  // namespace

SupervisorCore::SupervisorCore(SupervisorPolicy policy, std::vector<std::string> names,
                               std::vector<int> stages)
    : policy_(policy), children_(names.size()) {
  TP_CHECK(names.size() == stages.size());
  for (size_t i = 0; i < names.size(); ++i) {
    children_[i].name = std::move(names[i]);
    children_[i].stage = stages[i];
    children_[i].backoff = policy_.backoff_min;
  }
}

std::vector<SupervisorCore::Action> SupervisorCore::Step(const Event& event, absl::Time now) {
  std::vector<Action> actions;
  if (finished_) return actions;
  switch (event.kind) {
    case Event::kTick:
      break;
    case Event::kReady:
      OnReady(children_.at(event.child), now);
      break;
    case Event::kExited:
      OnExited(children_.at(event.child), event.exit_code, now);
      break;
    case Event::kStop:
      BeginStop(0, "");
      break;
    case Event::kStopNow:
      BeginStop(1, "stopped before the drain ended");
      stop_now_ = true;
      break;
  }
  if (!stopping_) AdvanceRunning(now, actions);
  if (stopping_) AdvanceStopping(now, actions);
  return actions;
}

absl::Time SupervisorCore::NextWake() const {
  absl::Time wake = absl::InfiniteFuture();
  for (const Child& child : children_) {
    // A ready child waits for nothing until it is told to stop; a killed one only for its exit.
    const bool waits = child.state == State::kStarting || child.state == State::kBackoff || child.terminated;
    if (waits && !child.killed) wake = std::min(wake, child.deadline);
  }
  return wake;
}

void SupervisorCore::OnReady(Child& child, absl::Time now) {
  if (child.state != State::kStarting || child.killed) return;
  child.state = State::kReady;
  child.was_ready = true;
  child.start_failures = 0;
  child.ready_since = now;
  if (!child.terminated) child.deadline = absl::InfiniteFuture();
}

void SupervisorCore::OnExited(Child& child, int exit_code, absl::Time now) {
  if (!Alive(child)) return;
  if (stopping_) {
    child.state = State::kStopped;
    return;
  }
  const bool was_up = child.state == State::kReady;
  if (was_up && now - child.ready_since >= policy_.healthy_reset) child.backoff = policy_.backoff_min;
  child.state = State::kBackoff;
  child.killed = false;
  child.deadline = now + child.backoff;
  child.backoff = std::min(child.backoff * 2, policy_.backoff_max);
  if (child.was_ready) return;
  ++child.start_failures;
  if (exit_code == kConfigError) {
    BeginStop(kConfigError, absl::StrCat(child.name, " refused its configuration (exit code 2)"));
  } else if (child.start_failures >= policy_.start_failures_max) {
    BeginStop(1, absl::StrCat(child.name, " ", DescribeExit(exit_code), " before it was ready, ",
                              child.start_failures, " times"));
  }
}

void SupervisorCore::Kill(size_t i, std::string reason, std::vector<Action>& actions) {
  if (children_[i].killed) return;
  children_[i].killed = true;
  actions.push_back({Action::kKill, i, 0, std::move(reason)});
}

void SupervisorCore::BeginStop(int exit_code, std::string reason) {
  if (exit_code_ == 0 && exit_code != 0) {
    exit_code_ = exit_code;
    reason_ = std::move(reason);
  }
  stopping_ = true;
}

void SupervisorCore::AdvanceRunning(absl::Time now, std::vector<Action>& actions) {
  const auto below_up = [&](int stage) {
    return std::all_of(children_.begin(), children_.end(),
                       [&](const Child& child) { return child.stage >= stage || child.was_ready; });
  };
  for (size_t i = 0; i < children_.size(); ++i) {
    Child& child = children_[i];
    if (child.state == State::kStarting && child.deadline <= now) {
      const std::string reason =
          absl::StrCat(child.name, " was not ready within ", absl::FormatDuration(policy_.start_timeout));
      Kill(i, reason, actions);
      if (!child.was_ready) return BeginStop(1, reason);
    }
    const bool first = child.state == State::kPending && below_up(child.stage);
    const bool again = child.state == State::kBackoff && child.deadline <= now;
    if (!first && !again) continue;
    if (again) ++child.restarts;
    child.state = State::kStarting;
    child.deadline = now + policy_.start_timeout;
    actions.push_back({Action::kSpawn, i, 0, again ? "restart" : ""});
  }
  const bool all_ready = std::all_of(children_.begin(), children_.end(),
                                     [](const Child& child) { return child.state == State::kReady; });
  if (all_ready && !all_ready_said_) {
    all_ready_said_ = true;
    actions.push_back({Action::kAllReady});
  }
}

void SupervisorCore::AdvanceStopping(absl::Time now, std::vector<Action>& actions) {
  int top = -1;
  for (Child& child : children_) {
    if (!Alive(child)) child.state = State::kStopped;
    if (Alive(child)) top = std::max(top, child.stage);
  }
  if (top < 0) {
    finished_ = true;
    actions.push_back({Action::kFinish, 0, exit_code_, reason_});
    return;
  }
  for (size_t i = 0; i < children_.size(); ++i) {
    Child& child = children_[i];
    if (!Alive(child)) continue;
    if (stop_now_) {
      Kill(i, "", actions);
    } else if (child.stage == top && !child.terminated) {
      child.terminated = true;
      child.deadline = now + policy_.drain_timeout + policy_.kill_grace;
      if (!child.killed) actions.push_back({Action::kTerminate, i});
    } else if (child.terminated && child.deadline <= now && !child.killed) {
      const std::string reason = absl::StrCat(child.name, " did not end within its drain time");
      if (exit_code_ == 0) {
        exit_code_ = 1;
        reason_ = reason;
      }
      Kill(i, reason, actions);
    }
  }
}

}  // namespace tidepool
