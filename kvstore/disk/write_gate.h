#pragma once

#include <cstdint>

#include "absl/time/time.h"
#include "kvstore/disk/rocks_index.h"
#include "kvstore/disk/token_bucket.h"

namespace tidepool {

// WriteGate: when a store may go to the disk. Core. Three limits: a rate (token bucket), a budget per day (a
// disk has so many writes in it), and the loads, which go first: while there are any, and for a moment after,
// stores get `share` of the bytes that loads moved.
class WriteGate {
 public:
  struct Options {
    uint64_t bytes_per_second = 0;  // 0: no limit
    uint64_t bytes_per_day = 0;     // 0: no limit
    double read_share = 0.1;        // of loads' bytes, while there are loads
    absl::Duration read_quiet = absl::Milliseconds(10);
    uint64_t record_bytes = 1;  // the largest store: the bucket holds at least one
  };

  enum class Answer : uint8_t { kGo, kLater, kWornOut };
  struct Decision {
    Answer answer = Answer::kGo;
    // Of kLater: worth asking again after this, or when a load has ended.
    absl::Duration wait = absl::ZeroDuration();
  };

  WriteGate(const Options& options, const WrittenToday& written, absl::Time now);

  // A load is waiting or under way.
  void OnReadsActive(absl::Time now);
  // A load of so many bytes has ended.
  void OnReadDone(uint64_t bytes, absl::Time now);

  // May a store of so many bytes (at most record_bytes) go now? `day`: days since 1970 by the wall clock.
  Decision Ask(absl::Time now, uint32_t day, uint64_t bytes);
  // It goes, as Ask has just said that it may: takes it off all budgets.
  void Take(absl::Time now, uint64_t bytes);

  const WrittenToday& written() const { return written_; }
  void set_written(const WrittenToday& written) { written_ = written; }

 private:
  const Options options_;
  WrittenToday written_;
  TokenBucket bucket_;
  double credit_ = 0;  // bytes that loads have earned for stores
  absl::Time reads_until_ = absl::InfinitePast();
};

}  // namespace tidepool
