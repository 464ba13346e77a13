#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "base/block_layout.h"
#include "base/clock.h"
#include "base/probe.h"
#include "kvstore/block_run.h"
#include "kvstore/types.h"

namespace tidepool {

// ArenaClient: reads the blocks of other processes of this host where they lie (arena_server.h is the other
// end). Driver: owns a thread, which connects, asks and hears answers; blocks on offer are taken on the
// caller's thread without any of that. Thread-safe. Runs may outlive the client and the peer: the mapping
// stays as long as one of them does, and nobody writes to what they are on.
class ArenaClient {
 public:
  struct Options {
    std::string worker_id;
    std::string fingerprint;
    BlockLayout layout;
    const Clock* clock = &Clock::Real();
    MetricRegistry* metrics = nullptr;
    size_t max_peers = 256;
    size_t max_takes = 4096;  // under way
    // From connecting to being welcome; a peer on this host that takes longer hangs.
    absl::Duration hello_timeout = absl::Milliseconds(500);
    // A peer that could not be mapped is not tried again for so long.
    absl::Duration retry_after = absl::Seconds(5);
  };

  // One process's arena. `boot` is its boot id.
  struct Peer {
    std::string arena;
    std::string boot;
  };

  // OK: all of the keys, in their order, or an empty run: the peer does not have them all. Anything else: no
  // blocks. Unavailable: not mappable, gone; DeadlineExceeded; Cancelled; ResourceExhausted: a limit.
  struct Taken {
    absl::Status status;
    BlockRun blocks;
    bool short_of_room = false;  // the peer wants its slots back: copy, and let go
  };

  explicit ArenaClient(Options options);
  // Ends what is under way with Cancelled.
  ~ArenaClient();

  // Whether asking the peer this way is worth a try: it is on this machine, and did not fail just now.
  bool Reaches(const Peer& peer) const;
  // All of the keys from what the peer has on offer for `request`, if it is mapped and has them all: no
  // system call, no waiting. nullopt: use Take.
  std::optional<Taken> TryTake(const Peer& peer, const std::string& request, std::span<const BlockKey> keys);
  // Connects if need be, and waits for offers that are growing. `done` runs exactly once, on the client's
  // thread, by the deadline. At most 4096 keys. `attempt` names it for Cancel.
  void Take(const Peer& peer, const std::string& request, uint32_t attempt, std::vector<BlockKey> keys,
            absl::Time deadline, std::function<void(Taken)> done);
  void Cancel(const std::string& request, uint32_t attempt);
  // Tells the peer that nothing more will be taken of the request: its offers may go, what was taken stays.
  // False: there is no connection to say it over.
  bool Done(const Peer& peer, const std::string& request);

  size_t peers() const;   // mapped now
  size_t active() const;  // Takes under way

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace tidepool
