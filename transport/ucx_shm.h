#pragma once

#include <poll.h>

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "transport/probe.h"
#include "transport/transport.h"

namespace tidepool {

// Which of the names of UCX_TLS are shared memory (and so lanes of ours), and which are left for the network.
struct UcxTlsSplit {
  std::string network;  // "tcp,self"; empty: none
  std::string shm;      // "posix" or "sysv"; empty: none
  bool cma = false;     // bulk data is read straight out of the sender's memory, by the kernel
  bool map = false;     // what a sender shares (Transport::ShareMemory) is mapped, and copied from there
};
UcxTlsSplit SplitUcxTls(const std::string& tls);

// UcxShmLanes: connections between processes of one host through UCX's shared memory (posix or sysv).
// Belongs to UcxTransport: same thread, same rules; callbacks go into `events`.
//
// UCX carries control messages and short or unshared bulk data: through its FIFO, in eager chunks, which the
// active-message handler copies to their destination. Longer bulk data is read by its receiver, piece by
// piece from Progress: out of a mapping of the memory that the sender shares (`map`), else by
// process_vm_readv (`cma`; UCX's own cma is not used: it ends the process when the peer dies in
// mid-transfer).
//
// UCX cannot force-close an endpoint over shared memory, so each connection (lane) is a UCX worker of its
// own. Nothing but our own progress of that worker, and our own reads, write to our memory. So destroying the
// worker is the quiescence, and it needs nothing of the peer. Nor does a sender depend on its peer: it ends
// the connection before it tells that a payload is its own again, and a receiver looks whether the connection
// has ended after it has read, before what it read counts.
//
// Peers meet at an AF_UNIX socket (abstract name): same user, and the token of the address; only then are UCX
// addresses exchanged, since a UCX address that was tampered with can end the process, and then the
// descriptors of the shared memory. The socket stays open: its end tells of the peer's death or close. A
// stopped peer is not noticed, as over TCP.
//
// Memory: about 2.5 MB of shared memory per lane, at most `max_lanes`; 4 MiB of control messages and 4096
// bulk transfers wait for a lane whose peer does not read.
class UcxShmLanes {
 public:
  struct Options {
    std::string device;  // posix or sysv
    bool cma = false;
    bool map = false;
    size_t max_lanes = 64;
    absl::Duration handshake_timeout = absl::Seconds(5);
    TransportHandler* const* handler = nullptr;           // where the owner keeps its handler
    std::deque<std::function<void()>>* events = nullptr;  // of the owner
    TransportProbe* probe = nullptr;
  };
  // Ids of lanes have this bit.
  static constexpr EndpointId kLaneBit = EndpointId{1} << 63;

  // Unavailable: no shared memory, no socket.
  static absl::StatusOr<std::unique_ptr<UcxShmLanes>> Create(const Options& options);
  virtual ~UcxShmLanes() = default;

  // "HOSTKEY,SOCKET,TOKEN": the host key is equal exactly where memory can be shared.
  virtual std::string Address() const = 0;
  // InvalidArgument: malformed.
  static absl::Status CheckAddress(std::string_view address);
  virtual bool Reaches(std::string_view address) const = 0;
  // A lane to it ended before it was ready, seconds ago: the peer has no room for more, or does not answer.
  virtual bool TurnedAway(std::string_view address) const = 0;

  virtual absl::StatusOr<EndpointId> Connect(std::string_view address) = 0;
  virtual absl::Status Send(EndpointId to, std::string_view message) = 0;
  virtual absl::Status SendBulk(EndpointId to, std::string_view header, std::span<const std::byte> payload,
                                std::function<void(absl::Status)> done) = 0;
  virtual void Close(EndpointId endpoint, std::function<void()> quiesced) = 0;
  // As Transport's; of lanes made from now on. At most one memory.
  virtual void ShareMemory(int fd, std::span<const std::byte> memory) = 0;
  virtual int Progress() = 0;
  // False: there is something for Progress already. Otherwise appends what to wait for, and how long at most.
  virtual bool Arm(std::vector<pollfd>& fds, int& timeout_ms) = 0;
};

}  // namespace tidepool
