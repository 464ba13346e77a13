#pragma once

#include <cstdint>
#include <deque>
#include <optional>
#include <set>
#include <span>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/time/time.h"

namespace tidepool {

// DispatchCore: which line starts next (Core; pure). Lines come in an order, some of them after another one:
// that one computes the prefix that both share, and runs ahead until the prefix is in the pool (Ahead), or it
// ended, or it has run for gate_max (a prefix computed twice costs less than a batch that stands still).
// Meanwhile lines further on start, `lookahead` at most: groups are gone through one after the other, and
// their prefixes leave the pool before there are too many.
class DispatchCore {
 public:
  struct Options {
    size_t lookahead = 256;
    absl::Duration gate_max = absl::Seconds(10);
  };
  explicit DispatchCore(Options options) : options_(options) {}

  struct Line {
    uint32_t line = 0;   // the caller's number for it; never twice at a time
    int32_t after = -1;  // index into the same call's lines, before this one; -1: none
  };
  // Behind all that were added before.
  void Add(std::span<const Line> lines);

  // The next line to start, now started; nullopt: none can at `now`.
  std::optional<uint32_t> Next(absl::Time now);
  // A running line has computed its prompt.
  void Ahead(uint32_t line);
  // A running line ended.
  void Finished(uint32_t line);
  // A running line starts again, not before `at`; before those that never ran.
  void Again(uint32_t line, absl::Time at);
  // Never to start: lines that are not running, all of them.
  void Clear();

  size_t waiting() const { return waiting_ + again_.size(); }
  size_t running() const { return running_.size(); }

 private:
  using Entry = uint64_t;  // number since the beginning; entries_[i] is number head_ + i
  enum class State : uint8_t { kWaiting, kRunning, kDone };
  struct Slot {
    uint32_t line = 0;
    State state = State::kWaiting;
    bool open = false;  // those after it may start
    std::optional<Entry> after;
    absl::Time started;
  };
  // Null: gone, and so done.
  const Slot* At(Entry entry) const {
    return entry < head_ ? nullptr : &entries_[static_cast<size_t>(entry - head_)];
  }
  Slot* At(Entry entry) { return const_cast<Slot*>(std::as_const(*this).At(entry)); }
  // When the line may start as far as the one before it goes; infinite: once something is reported.
  absl::Time GateOpens(const Slot& slot) const;
  uint32_t Start(Entry entry, absl::Time now);
  void Trim();

  const Options options_;
  std::deque<Slot> entries_;
  Entry head_ = 0;
  Entry first_waiting_ = 0;  // none waits before it
  size_t waiting_ = 0;       // of entries_, those of again_ apart
  absl::flat_hash_map<uint32_t, Entry> running_;
  std::set<std::pair<absl::Time, Entry>> again_;
};

}  // namespace tidepool
