#include "transport/ucx_shm.h"

#include <fcntl.h>
#include <immintrin.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <ucp/api/ucp.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <map>
#include <utility>

#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "base/clock.h"
#include "base/digest.h"
#include "base/log.h"
#include "base/shared_memory.h"
#include "base/status.h"
#include "transport/ucx_inventory.h"
#include "transport/ucx_status.h"

namespace tidepool {
namespace {

// Active messages of a lane. kControl carries the layer above's messages; the others are ours:
//   kOpen   header {id, length, source, at}, data: the bulk's header
//   kChunk  header {id, offset}, data: payload
//   kRead   header {id, ok}: the receiver has read bulk `id` (ok: 0 or 1); of id 0: it can read from source
//   `ok`
constexpr unsigned kControl = 1, kOpen = 2, kChunk = 3, kRead = 4;

// Where the payload is: in chunks that follow; `at` bytes into the memory that the sender shares; at address
// `at` of the sender, read by process_vm_readv.
enum Source : uint64_t { kChunks = 0, kMapping = 1, kProcess = 2 };

// One chunk fills one segment of the FIFO, so that it arrives in one piece, in the sender's cache. 64 of
// them: with 32 KiB the fixed cost is hidden, and both ends of the FIFO still fit the second-level caches.
constexpr size_t kChunkBytes = 32 * 1024;
constexpr const char* kSegmentBytes = "33024";
constexpr const char* kFifoSegments = "64";
constexpr size_t kMaxHeaderBytes = 512;
constexpr size_t kMaxControlBytes = 4 << 20;
constexpr size_t kMaxQueuedBulks = 4096;
constexpr size_t kMaxOpenBulks = 4096;  // inbound
// Chunks that the FIFO had no room for: UCX queues them.
constexpr size_t kMaxPending = 8;
constexpr size_t kRoundBytes = 2 << 20;  // of one lane in one round
// Fits the second-level cache, from which the digest then takes it.
constexpr size_t kReadPiece = 256 << 10;
// From here on the destination bypasses the cache: it would not fit, and reading it first is a third of the
// memory traffic.
constexpr size_t kStreamFrom = 512 * 1024;
constexpr size_t kMaxHandshakes = 16;
constexpr absl::Duration kAcceptPause = absl::Milliseconds(100);
// A peer that let no lane come about is not asked for another one for so long.
constexpr absl::Duration kTurnedAway = absl::Seconds(5);
constexpr size_t kMaxTurnedAway = 1024;
constexpr size_t kMaxUcxAddress = 2048;
constexpr size_t kTokenBytes = 32;

struct OpenHeader {
  uint64_t id;
  uint64_t length;
  uint64_t source;
  uint64_t at;
};
struct ChunkHeader {
  uint64_t id;
  uint64_t offset;
};
struct ReadHeader {
  uint64_t id;
  uint64_t ok;
};

// What both sides send once over the socket, the connecting one first. Same host, same binary: host order.
struct Hello {
  char magic[8];
  unsigned char token[kTokenBytes / 2];  // the connecting side shows the first half, the other the second
  uint64_t probe_address;                // of a word of ours that holds probe_value: can the peer read us?
  uint64_t probe_value;
  uint32_t cma;  // bulk data may be read that way
  uint32_t map;  // shared memory is mapped
  uint32_t ucx_bytes;
  unsigned char ucx[kMaxUcxAddress];
};
constexpr char kMagic[8] = {'T', 'P', 'S', 'H', 'M', '0', '0', '3'};
constexpr size_t kHelloFixed = offsetof(Hello, ucx);

// Comes once, after the greetings, with the descriptor of the memory that the sender of this shares. Only
// where both map.
struct Share {
  char magic[8];
  uint64_t bytes;
};
constexpr char kShareMagic[8] = {'T', 'P', 'S', 'H', 'A', 'R', 'E', '1'};

// One packet of the socket, and the first descriptor that came with it, if any. Returns what recv would.
ssize_t ReceivePacket(int from, void* to, size_t bytes, FileDescriptor& with) {
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))];
  iovec piece{to, bytes};
  msghdr message{};
  message.msg_iov = &piece;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof control;
  const ssize_t n = recvmsg(from, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
  if (n < 0) return n;
  for (cmsghdr* c = CMSG_FIRSTHDR(&message); c != nullptr; c = CMSG_NXTHDR(&message, c)) {
    if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS) continue;
    // Every one of them is ours now, however many the peer has packed in.
    const size_t count = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (size_t i = 0; i < count; ++i) {
      int fd = -1;
      std::memcpy(&fd, CMSG_DATA(c) + i * sizeof fd, sizeof fd);
      FileDescriptor received(fd);
      if (with.get() < 0) with = std::move(received);
    }
  }
  return n;
}

bool SendShare(int to, uint64_t bytes, int fd) {
  Share share{};
  std::memcpy(share.magic, kShareMagic, sizeof kShareMagic);
  share.bytes = bytes;
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  iovec piece{&share, sizeof share};
  msghdr message{};
  message.msg_iov = &piece;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof control;
  cmsghdr* c = CMSG_FIRSTHDR(&message);
  c->cmsg_level = SOL_SOCKET;
  c->cmsg_type = SCM_RIGHTS;
  c->cmsg_len = CMSG_LEN(sizeof(int));
  std::memcpy(CMSG_DATA(c), &fd, sizeof fd);
  return sendmsg(to, &message, MSG_NOSIGNAL) == sizeof share;
}

// Ends the connection for both sides, whoever else has the descriptor.
void Hang(int fd) {
  shutdown(fd, SHUT_RDWR);
  close(fd);
}

// False: not 2n hex digits.
bool Unhex(std::string_view text, std::span<unsigned char> out) {
  if (text.size() != 2 * out.size()) return false;
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    const int digit = c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
    if (digit < 0) return false;
    out[i / 2] = static_cast<unsigned char>(i % 2 == 0 ? digit << 4 : out[i / 2] | digit);
  }
  return true;
}

struct ShmAddress {
  std::string host;
  std::string socket;
  unsigned char token[kTokenBytes];
};

absl::StatusOr<ShmAddress> Parse(std::string_view text) {
  const std::vector<std::string> parts = absl::StrSplit(std::string(text), ',');
  ShmAddress out;
  unsigned char raw[16];
  if (parts.size() != 3 || !Unhex(parts[0], raw) || !Unhex(parts[1], raw) || !Unhex(parts[2], out.token)) {
    return absl::InvalidArgumentError("transport address has a malformed shared-memory part");
  }
  out.host = parts[0];
  out.socket = parts[1];
  return out;
}

// Equal for processes that can share memory and meet at an abstract socket: same boot, same user, same
// network and IPC namespaces, same /dev/shm.
std::string HostKey() {
  std::string facts;
  char boot[64] = {};
  if (const int fd = open("/proc/sys/kernel/random/boot_id", O_RDONLY | O_CLOEXEC); fd >= 0) {
    [[maybe_unused]] const ssize_t n = read(fd, boot, sizeof boot - 1);
    close(fd);
  }
  facts += boot;
  for (const char* file : {"/proc/self/ns/net", "/proc/self/ns/ipc", "/proc/self/ns/pid", "/dev/shm"}) {
    struct stat s {};
    if (stat(file, &s) == 0) facts += " " + std::to_string(s.st_dev) + ":" + std::to_string(s.st_ino);
  }
  facts += " " + std::to_string(getuid());
  const Sha256Digest digest = Sha256().Update(facts).Finish();
  return HexEncode(std::span(digest).first(16));
}

sockaddr_un AbstractName(const std::string& name, socklen_t& size) {
  sockaddr_un out{};
  out.sun_family = AF_UNIX;
  const std::string text = "tidepool-shm-" + name;
  std::memcpy(out.sun_path + 1, text.data(), text.size());  // the first byte stays 0: no file
  size = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + text.size());
  return out;
}

// Copies past the cache; `dst` is visible to other threads only after _mm_sfence.
void StreamCopy(std::byte* dst, const std::byte* src, size_t n) {
  const size_t head = std::min(n, (32 - reinterpret_cast<uintptr_t>(dst) % 32) % 32);
  std::memcpy(dst, src, head);
  size_t i = head;
  for (; i + 128 <= n; i += 128) {
    const auto* from = reinterpret_cast<const __m256i*>(src + i);
    auto* to = reinterpret_cast<__m256i*>(dst + i);
    const __m256i a = _mm256_loadu_si256(from), b = _mm256_loadu_si256(from + 1);
    const __m256i c = _mm256_loadu_si256(from + 2), d = _mm256_loadu_si256(from + 3);
    _mm256_stream_si256(to, a);
    _mm256_stream_si256(to + 1, b);
    _mm256_stream_si256(to + 2, c);
    _mm256_stream_si256(to + 3, d);
  }
  std::memcpy(dst + i, src + i, n - i);
}

class Lanes;

struct OutBulk {
  uint64_t id = 0;
  std::string header;
  std::span<const std::byte> payload;
  std::function<void(absl::Status)> done;
  size_t offset = 0;
  bool opened = false;
  bool by_peer = false;  // read by the peer, from when it is handed over until it says so
  size_t pending = 0;    // chunks in UCX's hands
};

struct InBulk {
  BulkSink sink;
  size_t length = 0;
  size_t filled = 0;
  uint64_t source = kChunks;
  uint64_t at = 0;
};

// Copies the next piece of a bulk to its place; the caller counts it.
void Land(const InBulk& bulk, std::span<const std::byte> piece) {
  std::byte* dst = bulk.sink.dst.data() + bulk.filled;
  const bool stream = bulk.length >= kStreamFrom;
  if (bulk.sink.digest != nullptr) {
    bulk.sink.digest->Copy(dst, piece, stream);
  } else if (stream) {
    StreamCopy(dst, piece.data(), piece.size());
  } else {
    std::memcpy(dst, piece.data(), piece.size());
  }
}

struct Lane;

// One active message under way: owns what UCX borrows.
struct Op {
  Lane* lane;
  uint64_t bulk;  // 0: none
  unsigned char header[sizeof(OpenHeader)];
  std::string bytes;
};

struct Lane {
  Lanes* owner = nullptr;
  EndpointId id = 0;
  int fd = -1;
  ucp_worker_h worker = nullptr;
  ucp_ep_h ep = nullptr;
  bool accepted = false;
  bool ready = false;  // the peer has shown the token, and its UCX address is known
  std::shared_ptr<bool> closed = std::make_shared<bool>(false);
  absl::Time born;
  pid_t peer_pid = 0;
  bool read_peer = false;                      // we can read the peer's memory
  std::shared_ptr<SharedMemory> peer_memory;   // what it shares, mapped
  bool shared = false;                         // it has said what it shares
  bool peer_reads = false;                     // it can read ours
  bool peer_maps = false;                      // it has mapped what we share
  unsigned char peer_token[kTokenBytes] = {};  // of the address that we connect to
  std::string peer_address;                    // it; empty: the peer connected
  std::deque<std::string> control;
  size_t control_bytes = 0;
  uint64_t next_bulk = 1;
  std::deque<OutBulk> bulks;           // not yet wholly handed to UCX, first one being sent
  std::map<uint64_t, OutBulk> handed;  // wholly handed over; completions are out
  std::map<uint64_t, InBulk> open;     // inbound
  size_t pending = 0;                  // active messages in UCX's queue
  bool broken = false;                 // the peer broke the rules
  bool heard = false;                  // something came since the last progress
};

class Lanes final : public UcxShmLanes {
 public:
  explicit Lanes(const Options& options) : options_(options) {}
  ~Lanes() override;
  absl::Status Init();

  std::string Address() const override { return address_; }
  bool Reaches(std::string_view address) const override { return address.substr(0, 32) == host_; }
  bool TurnedAway(std::string_view address) const override {
    const auto it = turned_away_.find(address);
    return it != turned_away_.end() && Clock::Real().Now() < it->second;
  }
  absl::StatusOr<EndpointId> Connect(std::string_view address) override;
  absl::Status Send(EndpointId to, std::string_view message) override;
  absl::Status SendBulk(EndpointId to, std::string_view header, std::span<const std::byte> payload,
                        std::function<void(absl::Status)> done) override;
  void Close(EndpointId endpoint, std::function<void()> quiesced) override;
  void ShareMemory(int fd, std::span<const std::byte> memory) override;
  int Progress() override;
  bool Arm(std::vector<pollfd>& fds, int& timeout_ms) override;

 private:
  static void OnSent(void* request, ucs_status_t status, void* arg);
  static ucs_status_t OnControl(void* arg, const void* header, size_t header_length, void* data,
                                size_t length, const ucp_am_recv_param_t* param);
  static ucs_status_t OnOpen(void* arg, const void* header, size_t header_length, void* data, size_t length,
                             const ucp_am_recv_param_t* param);
  static ucs_status_t OnChunk(void* arg, const void* header, size_t header_length, void* data, size_t length,
                              const ucp_am_recv_param_t* param);
  static ucs_status_t OnRead(void* arg, const void* header, size_t header_length, void* data, size_t length,
                             const ucp_am_recv_param_t* param);

  absl::StatusOr<Lane*> NewLane(int fd, bool accepted);
  absl::Status SendHello(Lane& lane, const unsigned char* half);
  // False: the lane failed, and why.
  absl::Status TakeHello(Lane& lane);
  absl::Status Check(Lane& lane);
  absl::Status TakeShare(Lane& lane, uint64_t bytes, const FileDescriptor& fd);
  void Accept();
  absl::Status Post(Lane& lane, unsigned am, const void* header, size_t header_bytes, std::string bytes,
                    std::span<const std::byte> payload, uint64_t bulk);
  OpenHeader Open(const Lane& lane, const OutBulk& bulk) const;
  absl::Status Pump(Lane& lane);
  absl::Status ReadPiece(const Lane& lane, const InBulk& bulk, size_t n);
  absl::Status ReadPeer(Lane& lane, int& handled);
  void Sent(Lane& lane, uint64_t bulk);
  void Received(Lane& lane, std::map<uint64_t, InBulk>::iterator it, absl::Status status);
  void Lose(EndpointId id, const absl::Status& why);
  void Drop(EndpointId id, const absl::Status& why);
  Lane* Find(EndpointId id);

  const Options options_;
  ucp_context_h context_ = nullptr;
  int listener_ = -1;
  std::string host_, socket_, address_;
  unsigned char token_[kTokenBytes];
  uint64_t probe_word_ = 0;
  EndpointId next_id_ = 1;
  std::map<EndpointId, std::unique_ptr<Lane>> lanes_;
  size_t handshakes_ = 0;
  std::map<EndpointId, std::shared_ptr<bool>> lost_;  // ended, and the handler is still to hear of it
  int shared_fd_ = -1;
  std::span<const std::byte> shared_;
  // Peers' memory that is mapped, by device and inode: the lanes of one peer have it in common.
  std::map<std::pair<dev_t, ino_t>, std::weak_ptr<SharedMemory>> mapped_;
  std::map<std::string, absl::Time, std::less<>> turned_away_;  // by address, until when
  absl::Time accept_after_ = absl::InfinitePast();
  std::vector<EndpointId> order_;  // of a round: lanes come and go meanwhile
  bool look_ = false;
  unsigned round_ = 0;
};

absl::Status Lanes::Init() {
  RouteUcxLog();
  ucp_config_t* config = nullptr;
  TP_RETURN_IF_ERROR(FromUcs(ucp_config_read(nullptr, nullptr, &config), "reading UCX's environment"));
  ucs_status_t s = ucp_config_modify(config, "TLS", options_.device.c_str());
  if (s == UCS_OK) s = ucp_config_modify(config, "SEG_SIZE", kSegmentBytes);
  if (s == UCS_OK) s = ucp_config_modify(config, "FIFO_SIZE", kFifoSegments);
  if (s == UCS_OK) {
    ucp_params_t params{};
    params.field_mask = UCP_PARAM_FIELD_FEATURES;
    params.features = UCP_FEATURE_AM | UCP_FEATURE_WAKEUP;
    s = ucp_init(&params, config, &context_);
  }
  ucp_config_release(config);
  TP_RETURN_IF_ERROR(FromUcs(s, "starting UCX's shared memory"));

  unsigned char name[16];
  if (getrandom(token_, sizeof token_, 0) != sizeof token_ || getrandom(name, sizeof name, 0) != 16 ||
      getrandom(&probe_word_, sizeof probe_word_, 0) != sizeof probe_word_) {
    return absl::UnavailableError("no random numbers for shared memory's token");
  }
  host_ = HostKey();
  socket_ = HexEncode(name);
  address_ = host_ + "," + socket_ + "," + HexEncode(token_);
  listener_ = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
  socklen_t size;
  const sockaddr_un bound = AbstractName(socket_, size);
  if (listener_ < 0 || bind(listener_, reinterpret_cast<const sockaddr*>(&bound), size) != 0 ||
      listen(listener_, 64) != 0) {
    return absl::UnavailableError(std::string("shared memory's socket: ") + std::strerror(errno));
  }
  return absl::OkStatus();
}

Lanes::~Lanes() {
  for (auto& [id, lane] : lanes_) {
    *lane->closed = true;
    // Their callbacks belong to a handler that may be gone.
    lane->bulks.clear();
    lane->handed.clear();
    Hang(lane->fd);
    ucp_worker_destroy(lane->worker);
    options_.probe->connections.Add(-1);
  }
  if (listener_ >= 0) close(listener_);
  if (context_ != nullptr) ucp_cleanup(context_);
}

Lane* Lanes::Find(EndpointId id) {
  auto it = lanes_.find(id);
  return it == lanes_.end() ? nullptr : it->second.get();
}

// Takes `fd` over, also on failure.
absl::StatusOr<Lane*> Lanes::NewLane(int fd, bool accepted) {
  auto lane = std::make_unique<Lane>();
  lane->owner = this;
  lane->fd = fd;
  lane->accepted = accepted;
  lane->born = Clock::Real().Now();
  ucred peer{};
  socklen_t size = sizeof peer;
  const auto fail = [&](absl::Status why) -> absl::Status {
    if (lane->worker != nullptr) ucp_worker_destroy(lane->worker);
    close(fd);
    return why;
  };
  // The token is enough; another user's process that has it could not map our memory anyway.
  if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &size) != 0 || peer.uid != getuid()) {
    return fail(absl::PermissionDeniedError("shared memory: the peer is another user's process"));
  }
  lane->peer_pid = peer.pid;
  ucp_worker_params_t params{};
  params.field_mask = UCP_WORKER_PARAM_FIELD_THREAD_MODE;
  params.thread_mode = UCS_THREAD_MODE_SINGLE;
  if (auto s = FromUcs(ucp_worker_create(context_, &params, &lane->worker), "creating a shared-memory lane");
      !s.ok()) {
    return fail(s);
  }
  for (auto [id, callback] :
       {std::pair{kControl, &OnControl}, {kOpen, &OnOpen}, {kChunk, &OnChunk}, {kRead, &OnRead}}) {
    ucp_am_handler_param_t am{};
    am.field_mask = UCP_AM_HANDLER_PARAM_FIELD_ID | UCP_AM_HANDLER_PARAM_FIELD_FLAGS |
                    UCP_AM_HANDLER_PARAM_FIELD_CB | UCP_AM_HANDLER_PARAM_FIELD_ARG;
    am.id = id;
    am.flags = UCP_AM_FLAG_WHOLE_MSG;
    am.cb = callback;
    am.arg = lane.get();
    if (auto s = FromUcs(ucp_worker_set_am_recv_handler(lane->worker, &am), "setting an AM handler");
        !s.ok()) {
      return fail(s);
    }
  }
  lane->id = next_id_++ | kLaneBit;
  handshakes_ += accepted;
  options_.probe->connections.Add(1);
  Lane* out = lane.get();
  lanes_[lane->id] = std::move(lane);
  return out;
}

absl::Status Lanes::SendHello(Lane& lane, const unsigned char* half) {
  Hello hello{};
  std::memcpy(hello.magic, kMagic, sizeof kMagic);
  std::memcpy(hello.token, half, sizeof hello.token);
  hello.probe_address = reinterpret_cast<uintptr_t>(&probe_word_);
  hello.probe_value = probe_word_;
  hello.cma = options_.cma;
  hello.map = options_.map;
  ucp_address_t* address = nullptr;
  size_t bytes = 0;
  TP_RETURN_IF_ERROR(FromUcs(ucp_worker_get_address(lane.worker, &address, &bytes), "asking for an address"));
  const bool fits = bytes <= kMaxUcxAddress;
  if (fits) std::memcpy(hello.ucx, address, bytes);
  ucp_worker_release_address(lane.worker, address);
  if (!fits) return absl::InternalError("UCX's address is longer than 2048 bytes");
  hello.ucx_bytes = static_cast<uint32_t>(bytes);
  const size_t size = kHelloFixed + bytes;
  if (send(lane.fd, &hello, size, MSG_NOSIGNAL) != static_cast<ssize_t>(size)) {
    return absl::UnavailableError(std::string("shared memory's socket: ") + std::strerror(errno));
  }
  return absl::OkStatus();
}

absl::StatusOr<EndpointId> Lanes::Connect(std::string_view text) {
  TP_ASSIGN_OR_RETURN(const ShmAddress peer, Parse(text));
  if (lanes_.size() >= options_.max_lanes) {
    return absl::ResourceExhaustedError("there are " + std::to_string(lanes_.size()) +
                                        " shared-memory lanes, the limit");
  }
  const int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
  if (fd < 0) return absl::ResourceExhaustedError(std::string("socket: ") + std::strerror(errno));
  socklen_t size;
  const sockaddr_un name = AbstractName(peer.socket, size);
  if (connect(fd, reinterpret_cast<const sockaddr*>(&name), size) != 0) {
    const absl::Status why =
        absl::UnavailableError(std::string("connecting over shared memory: ") + std::strerror(errno));
    close(fd);
    return why;
  }
  TP_ASSIGN_OR_RETURN(Lane * lane, NewLane(fd, false));
  std::memcpy(lane->peer_token, peer.token, kTokenBytes);
  lane->peer_address = std::string(text);
  if (absl::Status s = SendHello(*lane, lane->peer_token); !s.ok()) {
    Drop(lane->id, s);
    return s;
  }
  return lane->id;
}

void Lanes::Accept() {
  if (accept_after_ != absl::InfinitePast()) {
    if (Clock::Real().Now() < accept_after_) return;
    accept_after_ = absl::InfinitePast();
  }
  for (;;) {
    const int fd = accept4(listener_, nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (fd < 0) {
      // No descriptor or memory left: the kernel keeps the connection, and the socket readable.
      if (errno != EAGAIN && errno != EINTR && errno != ECONNABORTED)
        accept_after_ = Clock::Real().Now() + kAcceptPause;
      return;
    }
    if (lanes_.size() >= options_.max_lanes || handshakes_ >= kMaxHandshakes) {
      options_.probe->Refused(RefusedReason::kLimit).Add();
      close(fd);
      continue;
    }
    if (auto lane = NewLane(fd, true); !lane.ok()) {
      spdlog::warn("shared-memory lane not accepted: {}", std::string(lane.status().message()));
    }
  }
}

absl::Status Lanes::TakeHello(Lane& lane) {
  Hello hello{};
  const ssize_t n = recv(lane.fd, &hello, sizeof hello, 0);
  if (n < 0 && (errno == EAGAIN || errno == EINTR)) return absl::OkStatus();
  if (n <= 0) return absl::UnavailableError("the peer closed the connection");
  const unsigned char* expected = lane.accepted ? token_ : lane.peer_token + kTokenBytes / 2;
  if (static_cast<size_t>(n) < kHelloFixed || std::memcmp(hello.magic, kMagic, sizeof kMagic) != 0 ||
      hello.ucx_bytes == 0 || kHelloFixed + hello.ucx_bytes != static_cast<size_t>(n) ||
      !SecretEquals({reinterpret_cast<const char*>(hello.token), sizeof hello.token},
                    {reinterpret_cast<const char*>(expected), sizeof hello.token})) {
    options_.probe->Refused(RefusedReason::kHandshake).Add();
    return absl::PermissionDeniedError("the peer's greeting over shared memory is not one of ours");
  }
  if (lane.accepted) TP_RETURN_IF_ERROR(SendHello(lane, token_ + kTokenBytes / 2));
  ucp_ep_params_t params{};
  params.field_mask = UCP_EP_PARAM_FIELD_REMOTE_ADDRESS;
  params.address = reinterpret_cast<const ucp_address_t*>(hello.ucx);
  TP_RETURN_IF_ERROR(FromUcs(ucp_ep_create(lane.worker, &params, &lane.ep), "joining the peer's memory"));
  lane.ready = true;
  handshakes_ -= lane.accepted;
  if (options_.cma && hello.cma != 0) {
    uint64_t word = 0;
    const iovec local{&word, sizeof word};
    const iovec remote{reinterpret_cast<void*>(hello.probe_address), sizeof word};
    lane.read_peer =
        process_vm_readv(lane.peer_pid, &local, 1, &remote, 1, 0) == sizeof word && word == hello.probe_value;
    if (lane.read_peer) {
      const ReadHeader can{0, kProcess};
      TP_RETURN_IF_ERROR(Post(lane, kRead, &can, sizeof can, {}, {}, 0));
    }
  }
  // To nobody who has not shown the token.
  if (options_.map && hello.map != 0 && shared_fd_ >= 0 && !SendShare(lane.fd, shared_.size(), shared_fd_)) {
    return absl::UnavailableError(std::string("shared memory's socket: ") + std::strerror(errno));
  }
  return absl::OkStatus();
}

// The memory from which the peer's bulk data can be copied. One that we cannot map costs no more than that.
absl::Status Lanes::TakeShare(Lane& lane, uint64_t bytes, const FileDescriptor& fd) {
  lane.shared = true;
  struct stat file {};
  // The kernel drops a descriptor for which this process has no room.
  if (fd.get() < 0 || fstat(fd.get(), &file) != 0) {
    spdlog::warn("a peer's memory cannot be mapped: its descriptor did not arrive");
    return absl::OkStatus();
  }
  std::weak_ptr<SharedMemory>& known = mapped_[{file.st_dev, file.st_ino}];
  lane.peer_memory = known.lock();
  if (lane.peer_memory == nullptr || lane.peer_memory->size() != bytes) {
    auto memory = SharedMemory::Open(fd.get(), bytes, /*writable=*/false);
    std::erase_if(mapped_, [](const auto& item) { return item.second.expired(); });
    if (!memory.ok()) {
      lane.peer_memory = nullptr;
      spdlog::warn("a peer's memory cannot be mapped: {}", std::string(memory.status().message()));
      return absl::OkStatus();
    }
    lane.peer_memory = std::make_shared<SharedMemory>(std::move(*memory));
    mapped_[{file.st_dev, file.st_ino}] = lane.peer_memory;
  }
  const ReadHeader can{0, kMapping};
  return Post(lane, kRead, &can, sizeof can, {}, {}, 0);
}

// Looks at the socket: the greeting, the memory that the peer shares, or its end.
absl::Status Lanes::Check(Lane& lane) {
  if (!lane.ready) {
    TP_RETURN_IF_ERROR(TakeHello(lane));
    if (!lane.ready && Clock::Real().Now() - lane.born > options_.handshake_timeout) {
      options_.probe->Refused(RefusedReason::kHandshakeTimeout).Add();
      return absl::UnavailableError("no greeting over shared memory in time");
    }
    return absl::OkStatus();
  }
  for (;;) {
    Share share{};
    FileDescriptor fd;
    const ssize_t n = ReceivePacket(lane.fd, &share, sizeof share, fd);
    if (n < 0 && (errno == EAGAIN || errno == EINTR)) return absl::OkStatus();
    // Nothing else is ever sent after the greetings: it is as much the end as the end.
    if (n != sizeof share || std::memcmp(share.magic, kShareMagic, sizeof kShareMagic) != 0 ||
        !options_.map || lane.shared) {
      return absl::UnavailableError("connection lost: the peer closed it or died");
    }
    TP_RETURN_IF_ERROR(TakeShare(lane, share.bytes, fd));
  }
}

void Lanes::OnSent(void* request, ucs_status_t, void* arg) {
  ucp_request_free(request);
  Op* op = static_cast<Op*>(arg);
  --op->lane->pending;
  op->lane->owner->Sent(*op->lane, op->bulk);
  delete op;
}

absl::Status Lanes::Post(Lane& lane, unsigned am, const void* header, size_t header_bytes, std::string bytes,
                         std::span<const std::byte> payload, uint64_t bulk) {
  Op* op = new Op{&lane, bulk, {}, std::move(bytes)};
  std::memcpy(op->header, header, header_bytes);
  ucp_request_param_t param{};
  param.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA | UCP_OP_ATTR_FIELD_FLAGS;
  param.flags = UCP_AM_SEND_FLAG_EAGER;
  param.cb.send = &OnSent;
  param.user_data = op;
  const void* data = payload.empty() ? static_cast<const void*>(op->bytes.data()) : payload.data();
  const size_t size = payload.empty() ? op->bytes.size() : payload.size();
  const ucs_status_ptr_t r = ucp_am_send_nbx(lane.ep, am, op->header, header_bytes, data, size, &param);
  if (r != nullptr && !UCS_PTR_IS_ERR(r)) {
    ++lane.pending;
    return absl::OkStatus();
  }
  delete op;
  if (UCS_PTR_IS_ERR(r)) return FromUcs(UCS_PTR_STATUS(r), "sending over shared memory");
  Sent(lane, bulk);
  return absl::OkStatus();
}

// One message of bulk `id` has been copied out; 0: of none.
void Lanes::Sent(Lane& lane, uint64_t id) {
  if (id == 0) return;
  OutBulk* bulk = nullptr;
  if (auto it = lane.handed.find(id); it != lane.handed.end()) {
    bulk = &it->second;
  } else if (!lane.bulks.empty() && lane.bulks.front().id == id) {
    bulk = &lane.bulks.front();
  }
  if (bulk == nullptr) return;  // told already: the lane is being dropped
  --bulk->pending;
  if (bulk->offset < bulk->payload.size() || bulk->pending > 0 || !lane.handed.contains(id)) return;
  options_.probe->sent_bulk.Add(bulk->payload.size());
  options_.events->push_back([done = std::move(bulk->done)] { done(absl::OkStatus()); });
  lane.handed.erase(id);
}

// How a payload goes: a copy out of the mapping is one, and done by a processor that may bypass its cache;
// the kernel's is one; through the FIFO it is two. A short one is not worth the answer that ends a read.
OpenHeader Lanes::Open(const Lane& lane, const OutBulk& bulk) const {
  OpenHeader open{bulk.id, bulk.payload.size(), kChunks, 0};
  if (bulk.payload.size() < kChunkBytes) return open;
  const auto begin = reinterpret_cast<uintptr_t>(bulk.payload.data());
  const auto shared = reinterpret_cast<uintptr_t>(shared_.data());
  if (lane.peer_maps && begin >= shared && begin - shared <= shared_.size() &&
      bulk.payload.size() <= shared_.size() - (begin - shared)) {
    open.source = kMapping;
    open.at = begin - shared;
  } else if (lane.peer_reads) {
    open.source = kProcess;
    open.at = begin;
  }
  return open;
}

// Hands over what waits, as long as the FIFO takes it.
absl::Status Lanes::Pump(Lane& lane) {
  if (!lane.ready) return absl::OkStatus();
  size_t budget = kRoundBytes;
  while (lane.pending < kMaxPending && budget > 0) {
    if (!lane.control.empty()) {
      std::string message = std::move(lane.control.front());
      lane.control.pop_front();
      lane.control_bytes -= message.size();
      budget -= std::min(budget, message.size() + 64);
      const uint64_t none = 0;
      TP_RETURN_IF_ERROR(Post(lane, kControl, &none, 0, std::move(message), {}, 0));
      continue;
    }
    if (lane.bulks.empty()) return absl::OkStatus();
    OutBulk& bulk = lane.bulks.front();
    if (!bulk.opened) {
      bulk.opened = true;
      const OpenHeader open = Open(lane, bulk);
      if (open.source != kChunks) {
        // Read by the peer, which tells when it has.
        std::string header = bulk.header;
        const uint64_t id = bulk.id;
        bulk.by_peer = true;
        lane.handed[id] = std::move(bulk);
        lane.handed[id].pending = 1;
        lane.bulks.pop_front();
        TP_RETURN_IF_ERROR(Post(lane, kOpen, &open, sizeof open, std::move(header), {}, 0));
        continue;
      }
      ++bulk.pending;
      TP_RETURN_IF_ERROR(Post(lane, kOpen, &open, sizeof open, bulk.header, {}, bulk.id));
      if (!bulk.payload.empty()) continue;
    } else {
      const size_t n = std::min(kChunkBytes, bulk.payload.size() - bulk.offset);
      const ChunkHeader chunk{bulk.id, bulk.offset};
      const std::span<const std::byte> piece = bulk.payload.subspan(bulk.offset, n);
      bulk.offset += n;
      ++bulk.pending;
      budget -= std::min(budget, n);
      TP_RETURN_IF_ERROR(Post(lane, kChunk, &chunk, sizeof chunk, {}, piece, bulk.id));
    }
    if (bulk.offset < bulk.payload.size()) continue;
    // Wholly handed over. One token keeps Sent from completing it while it moves.
    const uint64_t id = bulk.id;
    ++bulk.pending;
    lane.handed[id] = std::move(bulk);
    lane.bulks.pop_front();
    Sent(lane, id);
  }
  return absl::OkStatus();
}

ucs_status_t Lanes::OnControl(void* arg, const void*, size_t, void* data, size_t length,
                              const ucp_am_recv_param_t* param) {
  Lane& lane = *static_cast<Lane*>(arg);
  Lanes& self = *lane.owner;
  lane.heard = true;
  if ((param->recv_attr & UCP_AM_RECV_ATTR_FLAG_RNDV) != 0 || length > Transport::kMaxMessageBytes) {
    lane.broken = true;
    return UCS_OK;
  }
  self.options_.probe->received_control.Add(length);
  self.options_.events->push_back([handler = self.options_.handler, id = lane.id, closed = lane.closed,
                                   message = std::string(static_cast<const char*>(data), length)] {
    if (!*closed && *handler != nullptr) (*handler)->OnMessage(id, message);
  });
  return UCS_OK;
}

ucs_status_t Lanes::OnOpen(void* arg, const void* header, size_t header_length, void* data, size_t length,
                           const ucp_am_recv_param_t* param) {
  Lane& lane = *static_cast<Lane*>(arg);
  Lanes& self = *lane.owner;
  lane.heard = true;
  OpenHeader open;
  if ((param->recv_attr & UCP_AM_RECV_ATTR_FLAG_RNDV) != 0 || header_length != sizeof open ||
      length > kMaxHeaderBytes || lane.open.size() >= kMaxOpenBulks) {
    lane.broken = true;
    return UCS_OK;
  }
  std::memcpy(&open, header, sizeof open);
  const size_t mapped = lane.peer_memory == nullptr ? 0 : lane.peer_memory->size();
  const bool can_read = open.source == kChunks || (open.source == kProcess && lane.read_peer) ||
                        (open.source == kMapping && open.length <= mapped && open.at <= mapped - open.length);
  if (open.id == 0 || lane.open.contains(open.id) || !can_read) {
    lane.broken = true;
    return UCS_OK;
  }
  BulkSink sink;
  if (*self.options_.handler != nullptr) {
    sink = (*self.options_.handler)->OnBulk(lane.id, {static_cast<const char*>(data), length}, open.length);
  }
  TP_CHECK(sink.dst.empty() || sink.dst.size() == open.length);
  const bool dropped = sink.dst.empty() && open.length > 0;
  auto [it, fresh] =
      lane.open.emplace(open.id, InBulk{std::move(sink), open.length, 0, open.source, open.at});
  if (dropped || open.length == 0) {
    if (it->second.sink.done) {
      self.options_.events->push_back([done = std::exchange(it->second.sink.done, nullptr), dropped] {
        done(dropped ? absl::CancelledError("dropped") : absl::OkStatus());
      });
    }
    // Chunks that are still to come are counted and thrown away.
    if (open.length == 0) lane.open.erase(it);
  }
  return UCS_OK;
}

void Lanes::Received(Lane& lane, std::map<uint64_t, InBulk>::iterator it, absl::Status status) {
  _mm_sfence();
  if (status.ok() && !it->second.sink.dst.empty()) options_.probe->received_bulk.Add(it->second.length);
  if (it->second.sink.done) {
    options_.events->push_back(
        [done = std::move(it->second.sink.done), status = std::move(status)] { done(status); });
  }
  lane.open.erase(it);
}

ucs_status_t Lanes::OnChunk(void* arg, const void* header, size_t header_length, void* data, size_t length,
                            const ucp_am_recv_param_t* param) {
  Lane& lane = *static_cast<Lane*>(arg);
  lane.heard = true;
  ChunkHeader chunk;
  if ((param->recv_attr & UCP_AM_RECV_ATTR_FLAG_RNDV) != 0 || header_length != sizeof chunk) {
    lane.broken = true;
    return UCS_OK;
  }
  std::memcpy(&chunk, header, sizeof chunk);
  auto it = lane.open.find(chunk.id);
  if (it == lane.open.end() || it->second.source != kChunks || length == 0 ||
      chunk.offset != it->second.filled || length > it->second.length - it->second.filled) {
    lane.broken = true;
    return UCS_OK;
  }
  InBulk& bulk = it->second;
  if (!bulk.sink.dst.empty()) {
    Land(bulk, {static_cast<const std::byte*>(data), length});
  }
  bulk.filled += length;
  if (bulk.filled == bulk.length) lane.owner->Received(lane, it, absl::OkStatus());
  return UCS_OK;
}

ucs_status_t Lanes::OnRead(void* arg, const void* header, size_t header_length, void*, size_t,
                           const ucp_am_recv_param_t*) {
  Lane& lane = *static_cast<Lane*>(arg);
  Lanes& self = *lane.owner;
  lane.heard = true;
  ReadHeader read;
  if (header_length != sizeof read) {
    lane.broken = true;
    return UCS_OK;
  }
  std::memcpy(&read, header, sizeof read);
  if (read.id == 0) {
    if (read.ok == kProcess) lane.peer_reads = self.options_.cma;
    if (read.ok == kMapping) lane.peer_maps = self.options_.map;
    return UCS_OK;
  }
  auto it = lane.handed.find(read.id);
  if (it == lane.handed.end() || !it->second.by_peer) {
    lane.broken = true;
    return UCS_OK;
  }
  if (read.ok != 0) self.options_.probe->sent_bulk.Add(it->second.payload.size());
  self.options_.events->push_back([done = std::move(it->second.done), ok = read.ok != 0] {
    done(ok ? absl::OkStatus() : absl::UnavailableError("the peer could not read the payload"));
  });
  lane.handed.erase(it);
  return UCS_OK;
}

// The next `n` bytes of a bulk that we read, to where they belong.
absl::Status Lanes::ReadPiece(const Lane& lane, const InBulk& bulk, size_t n) {
  if (bulk.source == kMapping) {
    Land(bulk, {lane.peer_memory->data() + bulk.at + bulk.filled, n});
    return absl::OkStatus();
  }
  std::byte* to = bulk.sink.dst.data() + bulk.filled;
  for (size_t got = 0; got < n;) {
    const iovec local{to + got, n - got};
    const iovec remote{reinterpret_cast<void*>(bulk.at + bulk.filled + got), n - got};
    const ssize_t now = process_vm_readv(lane.peer_pid, &local, 1, &remote, 1, 0);
    if (now <= 0) {
      return absl::UnavailableError(std::string("reading the peer's memory: ") + std::strerror(errno));
    }
    got += static_cast<size_t>(now);
  }
  // Now, while it is in the cache. Nobody else writes there.
  if (bulk.sink.digest != nullptr) bulk.sink.digest->Update({to, n});
  return absl::OkStatus();
}

// Reads payloads that the peer only announced; a bounded piece of each round.
absl::Status Lanes::ReadPeer(Lane& lane, int& handled) {
  size_t budget = kRoundBytes;
  const bool reads = std::any_of(lane.open.begin(), lane.open.end(),
                                 [](const auto& bulk) { return bulk.second.source != kChunks; });
  if (!reads) return absl::OkStatus();
  // A peer that has ended reuses its memory, and its process id may be another's.
  TP_RETURN_IF_ERROR(Check(lane));
  for (auto it = lane.open.begin(); it != lane.open.end() && budget > 0;) {
    auto now = it++;
    InBulk& bulk = now->second;
    if (bulk.source == kChunks) continue;
    absl::Status status;
    while (!bulk.sink.dst.empty() && bulk.filled < bulk.length && budget > 0) {
      const size_t n = std::min({kReadPiece, bulk.length - bulk.filled, budget});
      status = ReadPiece(lane, bulk, n);
      ++handled;
      if (!status.ok()) break;
      bulk.filled += n;
      budget -= n;
    }
    if (status.ok() && !bulk.sink.dst.empty() && bulk.filled < bulk.length) return absl::OkStatus();
    TP_RETURN_IF_ERROR(Check(lane));  // what was read counts only if it was the peer's until now
    const ReadHeader told{now->first, status.ok()};
    Received(lane, now, std::move(status));
    TP_RETURN_IF_ERROR(Post(lane, kRead, &told, sizeof told, {}, {}, 0));
  }
  return absl::OkStatus();
}

absl::Status Lanes::Send(EndpointId to, std::string_view message) {
  Lane* lane = Find(to);
  if (lane == nullptr) return absl::UnavailableError("the endpoint is down");
  if (lane->control_bytes + message.size() > kMaxControlBytes) {
    return absl::ResourceExhaustedError("4 MiB of control messages wait for a peer that does not read");
  }
  lane->control_bytes += message.size();
  lane->control.emplace_back(message);
  options_.probe->sent_control.Add(message.size());
  return absl::OkStatus();
}

absl::Status Lanes::SendBulk(EndpointId to, std::string_view header, std::span<const std::byte> payload,
                             std::function<void(absl::Status)> done) {
  Lane* lane = Find(to);
  if (lane == nullptr) return absl::UnavailableError("the endpoint is down");
  if (lane->bulks.size() + lane->handed.size() >= kMaxQueuedBulks) {
    return absl::ResourceExhaustedError("4096 bulk transfers wait for the same peer");
  }
  lane->bulks.push_back({lane->next_bulk++, std::string(header), payload, std::move(done)});
  return absl::OkStatus();
}

void Lanes::Drop(EndpointId id, const absl::Status& why) {
  auto it = lanes_.find(id);
  Lane& lane = *it->second;
  const auto tell = [&](std::function<void(absl::Status)>& done) {
    if (done) options_.events->push_back([done = std::move(done), why] { done(why); });
  };
  // First of all: what the peer reads from here on, it sees the end after, and does not count.
  Hang(lane.fd);
  for (auto& [bulk_id, bulk] : lane.handed) tell(bulk.done);
  for (OutBulk& bulk : lane.bulks) tell(bulk.done);
  for (auto& [bulk_id, bulk] : lane.open) tell(bulk.sink.done);
  lane.handed.clear();
  lane.bulks.clear();
  lane.open.clear();
  // From here on nothing progresses it, so nothing writes; what it still has in its queue calls OnSent.
  ucp_worker_destroy(lane.worker);
  if (lane.accepted && !lane.ready) --handshakes_;
  options_.probe->connections.Add(-1);
  lanes_.erase(it);
}

void Lanes::Lose(EndpointId id, const absl::Status& why) {
  Lane& lane = *Find(id);
  if (!lane.accepted && !lane.ready) {
    const absl::Time now = Clock::Real().Now();
    std::erase_if(turned_away_, [&](const auto& item) { return item.second <= now; });
    if (turned_away_.size() < kMaxTurnedAway) turned_away_[lane.peer_address] = now + kTurnedAway;
  }
  const bool stranger = lane.accepted && !lane.ready;
  const std::shared_ptr<bool> closed = lane.closed;
  Drop(id, why);
  if (stranger) return;
  lost_[id] = closed;
  options_.events->push_back([this, id, why, closed] {
    lost_.erase(id);
    TransportHandler* handler = *options_.handler;
    if (!*closed && handler != nullptr) handler->OnEndpointDown(id, why);
  });
}

void Lanes::Close(EndpointId endpoint, std::function<void()> quiesced) {
  if (Lane* lane = Find(endpoint); lane != nullptr) {
    *lane->closed = true;
    Drop(endpoint, absl::CancelledError("the endpoint was closed"));
  } else if (auto lost = lost_.find(endpoint); lost != lost_.end()) {
    *lost->second = true;
  }
  options_.events->push_back(std::move(quiesced));
}

void Lanes::ShareMemory(int fd, std::span<const std::byte> memory) {
  shared_fd_ = fd;
  shared_ = memory;
}

int Lanes::Progress() {
  // The sockets say something at a lane's begin and end only: they are not asked in every round.
  const bool look = std::exchange(look_, false) || ++round_ % 16 == 0;
  int handled = 0;
  if (look) Accept();
  order_.clear();
  for (const auto& [id, lane] : lanes_) order_.push_back(id);
  for (EndpointId id : order_) {
    Lane& lane = *Find(id);
    absl::Status status = look || !lane.ready ? Check(lane) : absl::OkStatus();
    // What the peer sent before it closed lies in our memory: it counts.
    for (int i = 0; i < (status.ok() ? 16 : 4096) && lane.ready && !lane.broken; ++i) {
      lane.heard = false;
      const unsigned moved = ucp_worker_progress(lane.worker);
      handled += static_cast<int>(moved);
      if (moved == 0 && !lane.heard) break;
    }
    if (status.ok() && lane.broken) {
      options_.probe->Refused(RefusedReason::kProtocol).Add();
      status = absl::UnavailableError("the peer broke the rules of shared memory");
    }
    if (status.ok() && lane.ready) status = ReadPeer(lane, handled);
    if (status.ok()) {
      const size_t before = lane.bulks.size() + lane.control.size();
      status = Pump(lane);
      handled += static_cast<int>(before != lane.bulks.size() + lane.control.size());
    }
    if (!status.ok()) {
      Lose(id, status);
      ++handled;
    }
  }
  return handled;
}

bool Lanes::Arm(std::vector<pollfd>& fds, int& timeout_ms) {
  if (accept_after_ == absl::InfinitePast()) {
    fds.push_back({listener_, POLLIN, 0});
  } else {
    timeout_ms = std::min(timeout_ms, static_cast<int>(absl::ToInt64Milliseconds(kAcceptPause)));
  }
  look_ = true;
  for (auto& [id, lane] : lanes_) {
    fds.push_back({lane->fd, POLLIN, 0});
    if (!lane->ready) {
      timeout_ms = std::min(timeout_ms, 100);
      continue;
    }
    const bool can_send = lane->pending < kMaxPending && !(lane->control.empty() && lane->bulks.empty());
    const bool reads = std::any_of(lane->open.begin(), lane->open.end(),
                                   [](const auto& bulk) { return bulk.second.source != kChunks; });
    if (can_send || reads) return false;
    // A full FIFO has no event of its own for its sender: it is looked at again soon.
    if (lane->pending > 0) timeout_ms = std::min(timeout_ms, 1);
    int fd = -1;
    if (ucp_worker_get_efd(lane->worker, &fd) != UCS_OK) return false;
    if (ucp_worker_arm(lane->worker) != UCS_OK) return false;
    fds.push_back({fd, POLLIN, 0});
  }
  return true;
}

}  // namespace

UcxTlsSplit SplitUcxTls(const std::string& tls) {
  UcxTlsSplit out;
  if (tls.starts_with("^") || tls == "all") {
    out.network = tls;
    return out;
  }
  std::vector<std::string> network;
  bool posix = false, sysv = false, other = false;
  for (const std::string& name : std::vector<std::string>(absl::StrSplit(tls, ',', absl::SkipEmpty()))) {
    if (name == "shm" || name == "sm") {
      posix = out.cma = out.map = true;
    } else if (name == "mm" || name == "posix") {
      posix = true;
    } else if (name == "sysv") {
      sysv = true;
    } else if (name == "cma") {
      out.cma = true;
    } else {
      network.push_back(name);
      other |= name != "self" && !name.starts_with("cuda") && !name.starts_with("gdr");
    }
  }
  if (out.cma && !sysv) posix = true;  // its control messages go over posix
  out.shm = posix ? "posix" : sysv ? "sysv" : "";
  if (other) out.network = absl::StrJoin(network, ",");
  return out;
}

absl::Status UcxShmLanes::CheckAddress(std::string_view address) { return Parse(address).status(); }

absl::StatusOr<std::unique_ptr<UcxShmLanes>> UcxShmLanes::Create(const Options& options) {
  auto lanes = std::make_unique<Lanes>(options);
  TP_RETURN_IF_ERROR(lanes->Init());
  return std::unique_ptr<UcxShmLanes>(std::move(lanes));
}

}  // namespace tidepool
