#include "server/gateway/session_pins.h"

#include <iterator>
#include <string_view>

namespace tidepool {
namespace {

// The name under which all tools are counted.
constexpr std::string_view kAnyTool = "";
// The memory that a pin holds would serve one equal conversation in so many seconds.
constexpr double kRivalEverySeconds = 60;

}  // namespace

void SessionPins::TurnBegins(uint64_t session, bool tool_result, absl::Time now) {
  std::lock_guard lock(mu_);
  const auto it = waiting_.find(session);
  if (it == waiting_.end()) return;
  // A turn of the user's says nothing of tools: people take their time.
  if (tool_result) ttl_.Observe(kAnyTool, now - it->second.since);
  oldest_first_.erase(it->second.place);
  waiting_.erase(it);
}

absl::Duration SessionPins::TurnEnded(uint64_t session, absl::Time now) {
  std::lock_guard lock(mu_);
  const auto [it, fresh] = waiting_.try_emplace(session);
  if (!fresh) oldest_first_.erase(it->second.place);
  oldest_first_.push_back(session);
  it->second = {now, std::prev(oldest_first_.end())};
  if (waiting_.size() > kMaxSessions) {
    waiting_.erase(oldest_first_.front());
    oldest_first_.pop_front();
  }
  // Both in what computing this conversation again takes.
  return ttl_.Choose(kAnyTool, /*benefit=*/1, /*cost_per_second=*/1 / kRivalEverySeconds);
}

}  // namespace tidepool
