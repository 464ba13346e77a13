#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <string>

#include "absl/time/time.h"
#include "kvstore/types.h"
#include "scheduler/least_squares.h"

namespace tidepool {

// Where a load comes from: a tier of a peer, or one of this worker's own (empty `worker`).
struct SourceId {
  std::string worker;
  Tier tier = Tier::kHost;
  auto operator<=>(const SourceId&) const = default;
};

// SourceSpeeds: what loading took, by source, fitted online:
//
//   seconds(n) = latency + seconds_per_byte * (n + bytes that had been asked for before)
//
// so what is queued at a source, by whatever request of this worker, counts. Until a source has been measured
// it is thought fast: trying costs little, as SpanLoad stops waiting. So it is again, by and by, when it has
// not been asked for long: the excess over the first guess halves every 30 s. At most 256 sources are
// remembered, the ones asked last. Thread-safe.
class SourceSpeeds {
 public:
  struct Speed {
    double latency_seconds = 0;
    double queued_seconds = 0;
    double seconds_per_byte = 0;
  };
  // One load under way.
  struct Ticket {
    SourceId source;
    uint64_t bytes = 0;
    uint64_t queued = 0;  // with its own bytes
    absl::Time begun;
  };

  Speed Of(const SourceId& source, absl::Time now) const;
  Ticket Begin(const SourceId& source, uint64_t bytes, absl::Time now);
  // `bytes` of the ticket's arrived.
  void End(const Ticket& ticket, uint64_t bytes, absl::Time now);
  // It was given up, or failed: all that is known is that it takes at least this long (if that is news). Of a
  // source that has not delivered yet the first few are not held against it: it had to be connected to.
  void GiveUp(const Ticket& ticket, absl::Time now);

 private:
  struct Source {
    LeastSquares<2> fit;
    uint64_t queued = 0;
    uint32_t given_up = 0;  // since it last delivered
    absl::Time asked, measured;
  };
  Source& Get(const SourceId& id, absl::Time now);
  void Forget(const Ticket& ticket);

  mutable std::mutex mu_;
  std::map<SourceId, Source> sources_;
};

}  // namespace tidepool
