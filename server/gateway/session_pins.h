#pragma once

#include <cstddef>
#include <cstdint>
#include <list>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/time/time.h"
#include "kvstore/policy/tool_ttl.h"

namespace tidepool {

// SessionPins: keeps a conversation's KV while a tool runs for it (Continuum). The answer says which tools
// were called; the next turn of that session that brings a tool's result tells how long that took. ToolTtl
// makes of those durations how long waiting for the result is worth the memory; for so long the runner pins
// the session's blocks softly on the workers that hold them: such blocks are evicted only when nothing else
// is left. An answer that calls no tool is followed by a person, and pins nothing.
//
// Durations are kept by tenant and tool: what one tenant calls `search` is none of another's business.
// Several calls in one answer return together, so their names together are a tool of its own. Kept are
// kToolsMax tools of a tenant and kTenantsMax tenants, those used last; a tool that was seen too seldom goes
// by what the tenant's tools take on the whole. Where the answer does not tell (the model's calls are not
// looked for, or the calls are too many to name), any tool may have been called: those turns are one tool,
// too.
//
// What is held costs others what they would have found in its place; that is taken to be one equal
// conversation a minute: no worker says yet how fast its pool turns over. Thread-safe.
class SessionPins {
 public:
  static constexpr size_t kMaxSessions = 65536;  // that wait for their next turn; the oldest go first
  static constexpr size_t kTenantsMax = 256;
  static constexpr size_t kToolsMax = 64;           // of a tenant
  static constexpr size_t kDurationsMax = 64;       // of a tool
  static constexpr size_t kToolNameBytesMax = 256;  // of the names that were called together

  // A turn of a session (never 0) begins; `tool_result`: its last message is one.
  void TurnBegins(uint64_t session, bool tool_result, absl::Time now);
  // A turn ended in which these tools were called, in any order; nullopt: that is not known. For how long its
  // KV is to be pinned; 0: not at all.
  absl::Duration TurnEnded(uint64_t session, std::string_view tenant,
                           const std::optional<std::vector<std::string>>& called, absl::Time now);

  size_t tenants() const;

 private:
  struct Waiting {
    absl::Time since;
    std::string tenant, tool;
    std::list<uint64_t>::iterator place;
  };
  struct Tenant {
    ToolTtl ttl;
    std::list<std::string>::iterator place;
  };

  // The following hold mu_.
  ToolTtl& TtlOf(const std::string& tenant);
  void Forget(uint64_t session);

  mutable std::mutex mu_;
  std::map<std::string, Tenant, std::less<>> tenants_;
  std::list<std::string> idlest_first_;  // of tenants_
  absl::flat_hash_map<uint64_t, Waiting> waiting_;
  std::list<uint64_t> oldest_first_;  // of waiting_
};

}  // namespace tidepool
