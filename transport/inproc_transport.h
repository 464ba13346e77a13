#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "absl/time/time.h"
#include "base/clock.h"
#include "transport/transport.h"

namespace tidepool {

// What an in-process network does to traffic. Probabilities are per message (or per bulk transfer), drawn
// from a generator seeded with `seed`. The default is a perfect network without delay.
struct SimFaults {
  uint64_t seed = 1;
  double loss = 0;       // a message vanishes; a lost bulk transfer still completes OK at its sender
  double duplicate = 0;  // delivered twice, the second time later
  double corrupt = 0;    // one bit flipped in transit
  absl::Duration delay_min = absl::ZeroDuration();
  absl::Duration delay_max = absl::ZeroDuration();  // uniform; unequal delays reorder
  int bulk_pieces = 1;  // a bulk transfer is written piece by piece, each with a delay of its own
  absl::Duration close_max = absl::ZeroDuration();  // how long Close takes; pieces keep landing meanwhile
};

// InprocNetwork: the double of a network inside one process. Transports of several threads may share it
// (one mutex), or one thread may drive all of them under a FakeClock: then everything that happens is a
// function of the seed and of the calls. Thread-safe. Outlives its transports.
class InprocNetwork {
 public:
  explicit InprocNetwork(const Clock* clock = &Clock::Real(), const SimFaults& faults = {});
  ~InprocNetwork();

  // A new node with an address of its own.
  std::unique_ptr<Transport> NewTransport();

  // Replaces the probabilities and delays (not the generator) from now on.
  void SetFaults(const SimFaults& faults);
  // While cut, nothing moves between the two nodes and neither notices; what was under way waits. Healing
  // delivers it (late).
  void Cut(const std::string& address_a, const std::string& address_b, bool cut);
  // The process behind `address` dies: none of its callbacks runs any more, its peers learn of it after
  // a delay. Destroy its Transport afterwards.
  void Crash(const std::string& address);

  // When the next thing is due; InfiniteFuture when nothing is.
  absl::Time NextEvent() const;
  // True while a transfer may still write into [begin, begin + size): what quiescence has to rule out.
  bool MayWrite(const std::byte* begin, size_t size) const;

  struct State;

 private:
  std::shared_ptr<State> state_;
};

}  // namespace tidepool
