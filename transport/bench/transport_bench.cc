#include "transport/bench/transport_bench.h"

#include <poll.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <utility>

#include "base/clock.h"
#include "base/shared_memory.h"
#include "base/status.h"
#include "transport/bench/ucx_tag_link.h"

namespace tidepool {
namespace {

using Subject = TransportBenchOptions::Subject;

double Now() { return absl::ToDoubleSeconds(Clock::Real().Now() - absl::UnixEpoch()); }

// Pipe: framed messages over one end of a socket pair or pipe, blocking. The two processes take turns over
// it, so that the one that waits uses no processor while the other measures memcpy.
class Pipe {
 public:
  explicit Pipe(int fd) : fd_(fd) {}
  bool Write(const std::string& text) const {
    const uint32_t n = static_cast<uint32_t>(text.size());
    std::string frame(reinterpret_cast<const char*>(&n), sizeof n);
    frame += text;
    return send(fd_, frame.data(), frame.size(), MSG_NOSIGNAL) == static_cast<ssize_t>(frame.size());
  }
  bool Read(std::string& out, double timeout_s) const {
    uint32_t n = 0;
    if (!ReadAll(&n, sizeof n, timeout_s) || n > 1 << 20) return false;
    out.resize(n);
    return ReadAll(out.data(), n, timeout_s);
  }
  // Something is there to be read, or the other side is gone.
  bool Ready() const {
    pollfd p{fd_, POLLIN, 0};
    return poll(&p, 1, 0) > 0;
  }

 private:
  bool ReadAll(void* to, size_t n, double timeout_s) const {
    auto* at = static_cast<char*>(to);
    while (n > 0) {
      pollfd p{fd_, POLLIN, 0};
      if (poll(&p, 1, static_cast<int>(timeout_s * 1000)) <= 0) return false;
      const ssize_t got = recv(fd_, at, n, 0);
      if (got <= 0) return false;
      at += got;
      n -= static_cast<size_t>(got);
    }
    return true;
  }
  int fd_;
};

// Anonymous memory of its own, touched: no page fault falls into a measurement.
std::span<std::byte> Arena(size_t bytes, int fill) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  TP_CHECK(p != MAP_FAILED);
  madvise(p, bytes, MADV_HUGEPAGE);
  std::memset(p, fill, bytes);
  return {static_cast<std::byte*>(p), bytes};
}

// The same, as the pool's memory is: peers may map it to read.
struct SharedArena {
  SharedMemory memory;
  FileDescriptor fd;
  std::span<const std::byte> bytes;
};
absl::StatusOr<SharedArena> MakeSharedArena(size_t bytes, int fill) {
  TP_ASSIGN_OR_RETURN(auto made, SharedMemory::Create("tidepool-bench", bytes, /*peer_writes=*/false));
  std::memset(made.first.data(), fill, bytes);
  SharedArena out{std::move(made.first), std::move(made.second), {}};
  out.bytes = {out.memory.data(), bytes};
  return out;
}

// The side that sends: hands out block i for each "i" it is asked for... all of them, `in_flight` at a time.
struct Sender : TransportHandler {
  explicit Sender(std::span<const std::byte> memory, size_t block, size_t in_flight)
      : memory(memory), block(block), in_flight(in_flight) {}
  void OnMessage(EndpointId from, std::string_view) override {
    peer = from;
    next = 0;
    done = 0;
    for (size_t i = 0; i < in_flight; ++i) Next();
  }
  BulkSink OnBulk(EndpointId, std::string_view, size_t) override { return {}; }
  void OnEndpointDown(EndpointId, absl::Status) override { failed = true; }
  void Next() {
    if (next == memory.size() / block) return;
    const uint64_t i = next++;
    const std::string_view header(reinterpret_cast<const char*>(&i), sizeof i);
    const absl::Status s =
        transport->SendBulk(peer, header, memory.subspan(i * block, block), [this](absl::Status status) {
          failed |= !status.ok();
          ++done;
          Next();
        });
    failed |= !s.ok();
  }
  Transport* transport = nullptr;
  std::span<const std::byte> memory;
  size_t block, in_flight;
  EndpointId peer = 0;
  size_t next = 0, done = 0;
  bool failed = false;
};

struct Receiver : TransportHandler {
  explicit Receiver(std::span<std::byte> memory, size_t block) : memory(memory), block(block) {}
  void OnMessage(EndpointId, std::string_view) override {}
  BulkSink OnBulk(EndpointId, std::string_view header, size_t length) override {
    uint64_t i = 0;
    if (header.size() == sizeof i) std::memcpy(&i, header.data(), sizeof i);
    if (length != block || i >= memory.size() / block) return {};
    return {memory.subspan(i * block, block), [this](absl::Status s) {
              failed |= !s.ok();
              ++landed;
            }};
  }
  void OnEndpointDown(EndpointId, absl::Status why) override {
    failed = true;
    reason = std::string(why.message());
  }
  std::span<std::byte> memory;
  size_t block;
  size_t landed = 0;
  bool failed = false;
  std::string reason;
};

absl::Status PeerGone() { return absl::UnavailableError("the other process of the benchmark is gone"); }

// The sending process: does what the other asks, by name, until it is told to stop or is left alone.
absl::Status RunSender(const TransportBenchOptions& options, const Pipe& pipe) {
  const auto memory = Arena(options.pass_bytes, 2);
  SharedArena shared;
  for (const Subject& subject : options.subjects) {
    if (!subject.from_shared_memory || !shared.bytes.empty()) continue;
    TP_ASSIGN_OR_RETURN(shared, MakeSharedArena(options.pass_bytes, 2));
  }
  const double timeout = absl::ToDoubleSeconds(options.timeout);
  struct Served {
    std::unique_ptr<Sender> handler;
    std::unique_ptr<Transport> transport;
  };
  std::map<std::string, Served> transports;
  std::map<std::string, std::unique_ptr<UcxTagLink>> links;
  for (const Subject& subject : options.subjects) {
    Served served;
    const std::span<const std::byte> source = subject.from_shared_memory ? shared.bytes : memory;
    served.handler = std::make_unique<Sender>(source, options.block_bytes, options.in_flight);
    TP_ASSIGN_OR_RETURN(served.transport, CreateTransport(subject.transport));
    if (subject.from_shared_memory) served.transport->ShareMemory(shared.fd.get(), source);
    served.transport->SetHandler(served.handler.get());
    served.handler->transport = served.transport.get();
    pipe.Write(served.transport->Address());
    transports[subject.name] = std::move(served);
    if (subject.against_memcpy || links.contains(subject.reference_tls)) continue;
    TP_ASSIGN_OR_RETURN(auto link,
                        UcxTagLink::Create(subject.reference_tls, subject.transport.ucx.net_devices));
    pipe.Write(link->Address());
    std::string peer;
    if (!pipe.Read(peer, timeout)) return PeerGone();
    TP_RETURN_IF_ERROR(link->Join(peer));
    links[subject.reference_tls] = std::move(link);
  }
  for (std::string what; pipe.Read(what, timeout) && what != "stop";) {
    if (auto link = links.find(what); link != links.end()) {
      TP_RETURN_IF_ERROR(link->second->Send(memory, options.block_bytes, options.in_flight, timeout));
      // UCX moves nothing unless it is progressed: until the other side says that all is there.
    } else if (auto served = transports.find(what); served != transports.end()) {
      const Sender& sender = *served->second.handler;
      while (!pipe.Ready() && !sender.failed) {
        // On a busy machine the other side may be waiting for this very processor.
        if (served->second.transport->Progress() == 0) sched_yield();
      }
      // After the last block the other side may be gone already, having said that all is there.
      if (std::string end; sender.failed && !pipe.Read(end, 1)) {
        return absl::UnavailableError(what + ": sending failed");
      }
      if (sender.failed) continue;
    }
    if (std::string end; !pipe.Read(end, timeout)) return PeerGone();
  }
  return absl::OkStatus();
}

struct Samples {
  std::vector<double> value, reference;
};

absl::StatusOr<std::map<std::string, Samples>> RunReceiver(const TransportBenchOptions& options,
                                                           const Pipe& pipe) {
  const auto memory = Arena(options.pass_bytes, 1);
  const auto other = Arena(options.pass_bytes, 3);
  const double timeout = absl::ToDoubleSeconds(options.timeout);
  const double end = Now() + timeout;
  const size_t blocks = options.pass_bytes / options.block_bytes;
  struct Used {
    std::unique_ptr<Receiver> handler;
    std::unique_ptr<Transport> transport;
    std::string address;  // of the other side
    EndpointId peer = 0;
  };
  std::map<std::string, Used> transports;
  std::map<std::string, std::unique_ptr<UcxTagLink>> links;
  for (const Subject& subject : options.subjects) {
    Used used;
    used.handler = std::make_unique<Receiver>(memory, options.block_bytes);
    TP_ASSIGN_OR_RETURN(used.transport, CreateTransport(subject.transport));
    used.transport->SetHandler(used.handler.get());
    if (!pipe.Read(used.address, timeout)) return PeerGone();
    transports[subject.name] = std::move(used);
    if (subject.against_memcpy || links.contains(subject.reference_tls)) continue;
    TP_ASSIGN_OR_RETURN(auto link,
                        UcxTagLink::Create(subject.reference_tls, subject.transport.ucx.net_devices));
    pipe.Write(link->Address());
    std::string address;
    if (!pipe.Read(address, timeout)) return PeerGone();
    TP_RETURN_IF_ERROR(link->Join(address));
    links[subject.reference_tls] = std::move(link);
  }
  const auto gbs = [&](double start) {
    return static_cast<double>(options.pass_bytes) / (Now() - start) / 1e9;
  };
  std::map<std::string, Samples> out;
  // The first round connects and warms up; it is not counted.
  for (int round = 0; round <= options.rounds; ++round) {
    for (const Subject& subject : options.subjects) {
      double reference;
      if (subject.against_memcpy) {
        const double start = Now();
        for (size_t i = 0; i < blocks; ++i) {
          std::memcpy(memory.data() + i * options.block_bytes, other.data() + i * options.block_bytes,
                      options.block_bytes);
        }
        reference = gbs(start);
      } else {
        if (!pipe.Write(subject.reference_tls)) return PeerGone();
        const double start = Now();
        TP_RETURN_IF_ERROR(links[subject.reference_tls]->Receive(memory, options.block_bytes,
                                                                 options.in_flight, end - Now()));
        reference = gbs(start);
        pipe.Write("done");
      }
      Used& used = transports[subject.name];
      used.handler->landed = 0;
      if (!pipe.Write(subject.name)) return PeerGone();
      // Not before the other side progresses it: a greeting has its deadline.
      if (round == 0) {
        TP_ASSIGN_OR_RETURN(used.peer, used.transport->Connect(used.address));
      }
      const double start = Now();
      TP_RETURN_IF_ERROR(used.transport->Send(used.peer, "go"));
      while (used.handler->landed < blocks && !used.handler->failed) {
        if (used.transport->Progress() == 0) sched_yield();
        if (Now() > end) return absl::DeadlineExceededError(subject.name + " did not get through in time");
      }
      if (used.handler->failed) {
        return absl::UnavailableError(subject.name + ": receiving failed: " + used.handler->reason);
      }
      const double value = gbs(start);
      pipe.Write("done");
      if (memory[options.pass_bytes - 1] != std::byte{2}) {
        return absl::DataLossError(subject.name + ": not what was sent");
      }
      if (round == 0) continue;
      out[subject.name].value.push_back(value);
      out[subject.name].reference.push_back(reference);
    }
  }
  pipe.Write("stop");
  return out;
}

// What the receiving child tells its parent: "name value reference\n"*, or "!message".
std::string Encode(const absl::StatusOr<std::map<std::string, Samples>>& samples) {
  if (!samples.ok()) return "!" + std::string(samples.status().message());
  std::string out;
  for (const auto& [name, s] : *samples) {
    for (size_t i = 0; i < s.value.size(); ++i) {
      out += name + " " + std::to_string(s.value[i]) + " " + std::to_string(s.reference[i]) + "\n";
    }
  }
  return out;
}

std::map<std::string, Samples> Decode(const std::string& text) {
  std::map<std::string, Samples> out;
  size_t at = 0;
  while (at < text.size()) {
    const size_t end = text.find('\n', at);
    const std::string line = text.substr(at, end - at);
    at = end + 1;
    const size_t second = line.rfind(' '), first = line.rfind(' ', second - 1);
    Samples& s = out[line.substr(0, first)];
    s.value.push_back(std::stod(line.substr(first + 1)));
    s.reference.push_back(std::stod(line.substr(second + 1)));
  }
  return out;
}

// Ends a child that is still there, and takes it off the process table.
void Reap(pid_t pid) {
  kill(pid, SIGKILL);
  waitpid(pid, nullptr, 0);
}

}  // namespace

absl::StatusOr<std::vector<BenchRow>> RunTransportBench(const TransportBenchOptions& given) {
  TransportBenchOptions options = given;
  if (options.block_bytes == 0 || options.pass_bytes < options.block_bytes || options.rounds < 1 ||
      options.in_flight < 1) {
    return absl::InvalidArgumentError(
        "transport benchmark: give at least one block, one round and one block in flight");
  }
  options.pass_bytes -= options.pass_bytes % options.block_bytes;
  if (options.subjects.empty()) {
    Subject mapped{.name = "transport/shm/bulk", .from_shared_memory = true, .against_memcpy = true};
    mapped.transport.ucx.tls = "shm";
    Subject read{.name = "transport/shm/bulk-of-private-memory", .against_memcpy = true};
    read.transport.ucx.tls = "shm";
    Subject fifo{.name = "transport/ucx-posix/bulk", .against_memcpy = true};
    fifo.transport.ucx.tls = "posix";
    Subject tcp{.name = "transport/ucx-tcp/bulk"};
    tcp.transport.ucx.tls = "tcp";
    options.subjects = {mapped, read, fifo, tcp};
  }
  int between[2], report[2];
  if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, between) != 0) {
    return absl::ResourceExhaustedError(std::string("socketpair: ") + std::strerror(errno));
  }
  if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, report) != 0) {
    close(between[0]);
    close(between[1]);
    return absl::ResourceExhaustedError(std::string("socketpair: ") + std::strerror(errno));
  }
  const pid_t sender = fork();
  if (sender == 0) {
    close(between[0]);
    close(report[0]);
    const absl::Status status = RunSender(options, Pipe(between[1]));
    if (!status.ok()) Pipe(report[1]).Write("!" + std::string(status.message()));
    _exit(0);
  }
  const pid_t receiver = fork();
  if (receiver == 0) {
    close(between[1]);
    close(report[0]);
    Pipe(report[1]).Write(Encode(RunReceiver(options, Pipe(between[0]))));
    _exit(0);
  }
  for (int fd : {between[0], between[1], report[1]}) close(fd);
  std::string text;
  const bool told =
      sender > 0 && receiver > 0 && Pipe(report[0]).Read(text, absl::ToDoubleSeconds(options.timeout) + 10);
  close(report[0]);
  if (sender > 0) Reap(sender);
  if (receiver > 0) Reap(receiver);
  if (!told) return absl::UnavailableError("transport benchmark: its processes ended without a result");
  if (text.starts_with("!")) return absl::UnavailableError("transport benchmark: " + text.substr(1));
  const auto samples = Decode(text);
  std::vector<BenchRow> rows;
  for (const Subject& subject : options.subjects) {
    const auto it = samples.find(subject.name);
    if (it == samples.end()) continue;
    rows.push_back(RowOfRounds(
        subject.name, it->second.value, "GB/s",
        subject.against_memcpy ? "memcpy, one thread" : "UCX tag messages over " + subject.reference_tls,
        it->second.reference));
  }
  return rows;
}

}  // namespace tidepool
