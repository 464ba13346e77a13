#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "base/clock.h"
#include "base/probe.h"
#include "kvstore/block_pool.h"
#include "kvstore/offer_table.h"

namespace tidepool {

// Where a process's arena can be mapped: "1.MACHINE.SOCKET.TOKEN". The machine is a digest of the kernel's
// boot id, so that a peer elsewhere need not even try; the token admits whoever was given the address.
struct ArenaAddress {
  std::string machine, socket, token;
  std::string ToString() const;
  // False: it is no such address.
  static bool Parse(std::string_view text, ArenaAddress& out);
  static std::string ThisMachine();
};

// So that packets of any allowed length can be sent at all; the kernel's default depends on the machine.
// Where even this is too little, sending says so.
void MakeRoomForArenaPackets(int socket);

// ArenaServer: lets processes of this host and user read this process's blocks where they lie. Driver: owns a
// thread and an AF_UNIX socket (SEQPACKET, abstract name); packets are those of arena_codec.h.
//
// A peer that presents the token, and means this process with this model, is given the arena's memory
// (read-only: the kernel refuses anything else), the directory of offers and a claims array
// (arena_directory.h). It takes the offers of a request by claiming them, without a message. For what is in
// no offer, or not complete yet, it asks: a GRANT names slots that stay leased for it.
//
// A block that a peer has taken is leased, with kind `peer`, until the peer lets go of it or its connection
// is closed at its end: the kernel closes it when the process dies, and a process keeps it open for as long
// as it reads. Nothing else frees. A peer that breaks the protocol gets nothing more, and its connection is
// kept for that reason alone. What is still being read when the server goes is quarantined.
//
// Costs to be bounded by its user: a peer can pin what it may read. It runs as the same user, which could as
// well read this process's memory.
class ArenaServer {
 public:
  struct Options {
    BlockPool* pool = nullptr;  // outlives the server
    std::shared_ptr<OfferTable> offers;
    std::string boot_id;
    std::string fingerprint;
    const Clock* clock = &Clock::Real();
    MetricRegistry* metrics = nullptr;
    size_t max_connections = 64;
    size_t max_waits = 256;             // TAKEs of one connection that wait for a growing offer
    uint32_t directory_entries = 4096;  // requests with offers that can be taken without asking
    // Below this share of free or evictable slots peers are told to copy and let go.
    double short_of_room = 0.25;
    absl::Duration hello_timeout = absl::Seconds(2);
  };

  // Unavailable: this machine, or the pool's memory, does not allow it.
  static absl::StatusOr<std::unique_ptr<ArenaServer>> Start(Options options);
  // Clears the offers. Nobody may add any meanwhile.
  ~ArenaServer();

  const std::string& address() const;
  size_t connections() const;
  // Blocks leased for peers beyond their offers.
  size_t held_blocks() const;

 private:
  struct Impl;
  explicit ArenaServer(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace tidepool
