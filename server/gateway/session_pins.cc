#include "server/gateway/session_pins.h"

#include <iterator>
#include <set>
#include <utility>

namespace tidepool {
namespace {

// The name under which turns are counted that do not tell what they called. No tool has it: names are not
// empty.
constexpr std::string_view kAnyTool = "";
// The memory that a pin holds would serve one equal conversation in so many seconds.
constexpr double kRivalEverySeconds = 60;

// One name for what was called together.
std::string NameOf(const std::vector<std::string>& called) {
  std::string out;
  for (const std::string& name : std::set<std::string>(called.begin(), called.end())) {
    if (!out.empty()) out += '\n';
    out += name;
    if (out.size() > SessionPins::kToolNameBytesMax) return std::string(kAnyTool);
  }
  return out;
}

}  // namespace

ToolTtl& SessionPins::TtlOf(const std::string& tenant) {
  auto it = tenants_.find(tenant);
  if (it == tenants_.end()) {
    if (tenants_.size() >= kTenantsMax) {
      tenants_.erase(idlest_first_.front());
      idlest_first_.pop_front();
    }
    const ToolTtl::Options options{.max_tools = kToolsMax, .samples = kDurationsMax};
    it = tenants_.emplace(tenant, Tenant{ToolTtl(options), {}}).first;
  } else {
    idlest_first_.erase(it->second.place);
  }
  idlest_first_.push_back(tenant);
  it->second.place = std::prev(idlest_first_.end());
  return it->second.ttl;
}

void SessionPins::Forget(uint64_t session) {
  const auto it = waiting_.find(session);
  if (it == waiting_.end()) return;
  oldest_first_.erase(it->second.place);
  waiting_.erase(it);
}

void SessionPins::TurnBegins(uint64_t session, bool tool_result, absl::Time now) {
  std::lock_guard lock(mu_);
  const auto it = waiting_.find(session);
  if (it == waiting_.end()) return;
  // A turn of the user's says nothing of tools: people take their time.
  if (tool_result) TtlOf(it->second.tenant).Observe(it->second.tool, now - it->second.since);
  Forget(session);
}

absl::Duration SessionPins::TurnEnded(uint64_t session, std::string_view tenant,
                                      const std::optional<std::vector<std::string>>& called, absl::Time now) {
  std::lock_guard lock(mu_);
  Forget(session);
  if (called && called->empty()) return absl::ZeroDuration();
  Waiting waiting{.since = now,
                  .tenant = std::string(tenant),
                  .tool = called ? NameOf(*called) : std::string(kAnyTool),
                  .place = {}};
  const ToolTtl& ttl = TtlOf(waiting.tenant);
  // Both in what computing this conversation again takes.
  const absl::Duration out =
      ttl.Choose(waiting.tool, /*benefit=*/1, /*cost_per_second=*/1 / kRivalEverySeconds);
  oldest_first_.push_back(session);
  waiting.place = std::prev(oldest_first_.end());
  waiting_.emplace(session, std::move(waiting));
  if (waiting_.size() > kMaxSessions) Forget(oldest_first_.front());
  return out;
}

size_t SessionPins::tenants() const {
  std::lock_guard lock(mu_);
  return tenants_.size();
}

}  // namespace tidepool
