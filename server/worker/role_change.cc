#include "server/worker/role_change.h"

#include <string>

#include "base/log.h"

namespace tidepool {
namespace {

bool Does(v1::Role role, v1::Role kind) { return role == kind || role == v1::ROLE_BOTH; }

// The kind of work that `from` does and `to` does not; unspecified: none.
v1::Role GivenUp(v1::Role from, v1::Role to) {
  for (const v1::Role kind : {v1::ROLE_PREFILL, v1::ROLE_DECODE}) {
    if (Does(from, kind) && !Does(to, kind)) return kind;
  }
  return v1::ROLE_UNSPECIFIED;
}

}  // namespace

const char* RoleText(v1::Role role) {
  switch (role) {
    case v1::ROLE_PREFILL:
      return "prefill";
    case v1::ROLE_DECODE:
      return "decode";
    case v1::ROLE_BOTH:
      return "both";
    case v1::ROLE_STORE:
      return "store";
    default:
      return "unknown";
  }
}

RoleChange::State RoleChange::Get() const {
  std::lock_guard lock(mu_);
  return state_;
}

absl::StatusOr<RoleChange::State> RoleChange::Order(v1::Role wanted) {
  if (wanted != v1::ROLE_PREFILL && wanted != v1::ROLE_DECODE && wanted != v1::ROLE_BOTH) {
    return absl::InvalidArgumentError("role: is " + std::to_string(static_cast<int>(wanted)) +
                                      "; a worker can become prefill, decode or both");
  }
  std::lock_guard lock(mu_);
  if (wanted == state_.role) {
    if (state_.changing()) spdlog::info("role: stays {}", RoleText(state_.role));
    state_.next = v1::ROLE_UNSPECIFIED;
  } else if (GivenUp(state_.role, wanted) == v1::ROLE_UNSPECIFIED) {
    Become(wanted);
  } else if (wanted != state_.next) {
    spdlog::info("role: {}, and {} when what it has is done", RoleText(state_.role), RoleText(wanted));
    state_.next = wanted;
  }
  return state_;
}

bool RoleChange::Advance(const std::optional<State>& told, Active active, absl::Time now) {
  std::lock_guard lock(mu_);
  if (!state_.changing() || told != state_) return false;
  const v1::Role kind = GivenUp(state_.role, state_.next);
  if ((kind == v1::ROLE_DECODE ? active.generate : active.prefill) > 0) return false;
  Become(state_.next);
  given_up_ = kind;
  given_up_at_ = now;
  return true;
}

void RoleChange::Become(v1::Role role) {
  spdlog::info("role: {} now, was {}", RoleText(role), RoleText(state_.role));
  given_up_ = v1::ROLE_UNSPECIFIED;
  state_ = {.role = role};
}

bool RoleChange::Takes(v1::Role kind, absl::Time now) const {
  std::lock_guard lock(mu_);
  return Does(state_.role, kind) || (given_up_ == kind && now - given_up_at_ <= kLateCalls);
}

}  // namespace tidepool
