#pragma once

#include <set>
#include <vector>

#include "kvstore/event_log.h"

namespace tidepool {

// Follows a log from its start, as a router would.
class EventReader {
 public:
  explicit EventReader(const EventLog& log) : log_(log), next_(log.oldest()) {}

  EventLog::Page Read(size_t max = 1 << 20) {
    EventLog::Page page = log_.Read(next_, max);
    next_ = page.next;
    return page;
  }
  // What is readable after all events so far; nothing may have been lost.
  std::set<BlockKey> State() {
    for (EventLog::Page page = Read(); !page.events.empty(); page = Read()) {
      for (const PoolEvent& e : page.events) Apply(e);
    }
    return state_;
  }

 private:
  void Apply(const PoolEvent& e) {
    switch (e.kind) {
      case PoolEventKind::kStored:
        state_.insert(e.key);
        break;
      case PoolEventKind::kRemoved:
      case PoolEventKind::kMoved:
        state_.erase(e.key);
        break;
      case PoolEventKind::kCleared:
        state_.clear();
        break;
    }
  }

  const EventLog& log_;
  uint64_t next_;
  std::set<BlockKey> state_;
};

}  // namespace tidepool
