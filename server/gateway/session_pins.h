#pragma once

#include <cstddef>
#include <cstdint>
#include <list>
#include <mutex>

#include "absl/container/flat_hash_map.h"
#include "absl/time/time.h"
#include "kvstore/policy/tool_ttl.h"

namespace tidepool {

// SessionPins: keeps a conversation's KV while a tool may be running for it (Continuum). A turn that ended
// with tools on offer may have ended in a call; the next turn of that session that brings a tool's result
// tells how long the tool took. ToolTtl makes of those durations how long waiting for the result is worth the
// memory; for so long the runner pins the session's blocks softly on the workers that hold them: such blocks
// are evicted only when nothing else is left.
//
// Which tool was called is not known here when the turn ends: the durations of all tools are one
// distribution. What is held costs others what they would have found in its place; that is taken to be one
// equal conversation a minute. Thread-safe.
class SessionPins {
 public:
  static constexpr size_t kMaxSessions = 65536;  // that wait for their next turn; the oldest go first

  // A turn of a session (never 0) begins; `tool_result`: its last message is one.
  void TurnBegins(uint64_t session, bool tool_result, absl::Time now);
  // A turn ended that may have called a tool. For how long its KV is to be pinned; 0: not at all.
  absl::Duration TurnEnded(uint64_t session, absl::Time now);

 private:
  struct Waiting {
    absl::Time since;
    std::list<uint64_t>::iterator place;
  };

  std::mutex mu_;
  ToolTtl ttl_{ToolTtl::Options()};
  absl::flat_hash_map<uint64_t, Waiting> waiting_;
  std::list<uint64_t> oldest_first_;
};

}  // namespace tidepool
