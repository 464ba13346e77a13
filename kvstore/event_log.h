#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <span>
#include <string_view>
#include <vector>

#include "absl/time/time.h"
#include "base/probe.h"
#include "kvstore/types.h"

namespace tidepool {

// PoolEventKind: what happened to a block on one tier of this process.
//   stored   it became readable by key on `tier`
//   removed  it no longer is
//   cleared  nothing is readable on `tier` any more (`key` means nothing)
//   moved    it left `from` and is readable on `tier` (no removed and stored come with it)
enum class PoolEventKind : uint8_t { kStored, kRemoved, kCleared, kMoved };
constexpr std::string_view PoolEventKindName(PoolEventKind kind) {
  constexpr std::array<std::string_view, 4> kNames = {"stored", "removed", "cleared", "moved"};
  return kNames[static_cast<size_t>(kind)];
}

struct PoolEvent {
  uint64_t seq =
      0;  // 1, 2, 3, ... over all tiers of this process; begins again with the process (its boot id)
  PoolEventKind kind = PoolEventKind::kStored;
  Tier tier = Tier::kHost;
  Tier from = Tier::kHost;  // of a move
  BlockKey key;

  bool operator==(const PoolEvent&) const = default;
};

// EventLog: the block events of all tiers of one process in one order, the newest `capacity` of them kept.
// Each reader has a cursor of its own: it asks for what follows a number it has. One that has fallen further
// behind than the log reaches is told so; it then notes next(), lists the tiers, and reads on from there
// (what happened during the listing comes again as events: applying one twice is harmless, they name states).
// Thread-safe; appending never waits for a reader.
class EventLog {
 public:
  // `lost`, if given, counts the events that readers asked for too late; it outlives the log.
  explicit EventLog(size_t capacity, Counter* lost = nullptr);

  struct Page {
    std::vector<PoolEvent> events;  // in order, without gaps, from the number asked for
    uint64_t next = 0;              // ask for this number next
    bool lost = false;  // events before the oldest kept were asked for: list the tiers; events is empty
  };

  // The seq fields are filled in here.
  void Append(std::span<const PoolEvent> events);
  void Append(const PoolEvent& event) { Append(std::span(&event, 1)); }

  // Events from number `from` on (0 means from the oldest kept), at most `max` and never more than kMaxPage:
  // what appends must not wait for a long copy.
  static constexpr size_t kMaxPage = 4096;
  Page Read(uint64_t from, size_t max) const;
  // The number that the next event will have.
  uint64_t next() const;
  // The oldest number that can still be read (== next() when there is none).
  uint64_t oldest() const;
  // Waits until number `from` exists, at most `timeout`. False: it does not, or Close was called.
  bool WaitFor(uint64_t from, absl::Duration timeout) const;
  // Ends all waits, those to come too: before shutting down what waits.
  void Close();

 private:
  const size_t capacity_;
  Counter* const lost_;
  mutable std::mutex mu_;
  mutable std::condition_variable grown_;
  std::vector<PoolEvent> ring_;  // event n is at n % capacity_
  uint64_t next_ = 1;
  bool closed_ = false;
};

}  // namespace tidepool
