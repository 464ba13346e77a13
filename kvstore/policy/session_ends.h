#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "kvstore/types.h"

namespace tidepool {

// SessionEnds: what a pool remembers of conversations that it no longer holds to the end: the last keys of
// their chains (64 bits of each), the sessions that were named, and which request is about to make which
// block. All bounded; the oldest are forgotten first.
class SessionEnds {
 public:
  struct Maker {
    uint64_t request = 0;
    bool extends = false;
  };

  explicit SessionEnds(size_t limit) : limit_(limit) {}

  // The chain of request `end_of` ended with this block.
  void Remember(const BlockKey& key, uint64_t end_of) {
    if (ends_.insert_or_assign(Short(key), end_of).second) end_order_.push_back(Short(key));
    while (end_order_.size() > limit_) {
      ends_.erase(end_order_.front());
      end_order_.pop_front();
    }
  }
  // Which request's chain ended there; 0: none that is remembered.
  uint64_t EndOf(const BlockKey& key) const {
    const auto it = ends_.find(Short(key));
    return it == ends_.end() ? 0 : it->second;
  }
  bool empty() const { return ends_.empty(); }

  // The session's turn is request `now`; returns the one before, 0 if none is remembered.
  uint64_t NextTurn(uint64_t session, uint64_t now) {
    const auto [it, first] = sessions_.try_emplace(session, now);
    if (!first) return std::exchange(it->second, now);
    session_order_.push_back(session);
    while (session_order_.size() > limit_) {
      sessions_.erase(session_order_.front());
      session_order_.pop_front();
    }
    return 0;
  }

  // The request missed this block: whoever publishes it does so for that request.
  void Expect(const BlockKey& key, Maker maker) {
    if (expected_.insert_or_assign(Short(key), maker).second) expected_order_.push_back(Short(key));
    while (expected_order_.size() > limit_) {
      expected_.erase(expected_order_.front());
      expected_order_.pop_front();
    }
  }
  const Maker* Expected(const BlockKey& key) const {
    const auto it = expected_.find(Short(key));
    return it == expected_.end() ? nullptr : &it->second;
  }

 private:
  static uint64_t Short(const BlockKey& key) {
    uint64_t v;
    std::memcpy(&v, key.bytes.data(), sizeof v);
    return v;
  }

  const size_t limit_;
  absl::flat_hash_map<uint64_t, uint64_t> ends_, sessions_;
  absl::flat_hash_map<uint64_t, Maker> expected_;
  std::deque<uint64_t> end_order_, session_order_, expected_order_;
};

}  // namespace tidepool
