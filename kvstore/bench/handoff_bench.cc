#include "kvstore/bench/handoff_bench.h"

#include <poll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <csignal>
#include <cstring>
#include <future>
#include <iterator>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "absl/strings/escaping.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "base/clock.h"
#include "base/rng.h"
#include "base/status.h"
#include "kvstore/bench/settle_pages.h"
#include "kvstore/fetch_node.h"
#include "transport/bench/ucx_tag_link.h"
#include "transport/factory.h"

namespace tidepool {
namespace {

constexpr size_t kLayerBytes = 64 << 10;
// What is fetched over which transport. `first`: blocks that the holder has never sent, so that it hashes
// them on the way; the others were sent before, and their checksums kept.
struct Subject {
  const char* name;
  const char* tls;
  bool first;
  const char* reference;
};
constexpr const char* kTag = "UCX tag messages over tcp";
constexpr const char* kMemcpy = "memcpy, one thread";
constexpr std::array<Subject, 6> kSubject = {Subject{"handoff/ucx-tcp/fetch", "tcp", false, kTag},
                                             Subject{"handoff/ucx-tcp/first", "tcp", true, kTag},
                                             Subject{"handoff/ucx-shm/fetch", "shm", false, kMemcpy},
                                             Subject{"handoff/ucx-shm/first", "shm", true, kMemcpy},
                                             Subject{"handoff/ucx-posix/fetch", "posix", false, kMemcpy},
                                             Subject{"handoff/ucx-cma/fetch", "posix,cma", false, kMemcpy}};
constexpr size_t kSubjects = kSubject.size();
// Each has a node of its own at both ends.
constexpr std::array<const char*, 4> kTransports = {"tcp", "shm", "posix", "posix,cma"};
size_t TransportOf(const Subject& subject) {
  return static_cast<size_t>(
      std::find(kTransports.begin(), kTransports.end(), std::string_view(subject.tls)) - kTransports.begin());
}

// One end of the wire between the two processes: texts of one line, whose turn it is.
class Wire {
 public:
  explicit Wire(int fd) : fd_(fd) {}
  bool Say(std::string line) const {
    line += '\n';
    return send(fd_, line.data(), line.size(), MSG_NOSIGNAL) == static_cast<ssize_t>(line.size());
  }
  std::optional<std::string> Hear(absl::Duration within) {
    for (;;) {
      if (const size_t end = read_.find('\n'); end != std::string::npos) {
        std::string line = read_.substr(0, end);
        read_.erase(0, end + 1);
        return line;
      }
      pollfd p{fd_, POLLIN, 0};
      if (poll(&p, 1, static_cast<int>(absl::ToInt64Milliseconds(within))) <= 0) return std::nullopt;
      char buffer[4096];
      const ssize_t n = recv(fd_, buffer, sizeof buffer, 0);
      if (n <= 0) return std::nullopt;
      read_.append(buffer, static_cast<size_t>(n));
    }
  }

 private:
  int fd_;
  std::string read_;
};

absl::Status Gone() { return absl::UnavailableError("the other process of the benchmark is gone"); }

// Touched: no page fault falls into a measurement.
std::span<std::byte> Memory(size_t bytes, int fill) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  TP_CHECK(p != MAP_FAILED);
  madvise(p, bytes, MADV_HUGEPAGE);
  std::memset(p, fill, bytes);
  return {static_cast<std::byte*>(p), bytes};
}

BlockKey KeyOf(uint64_t n) {
  BlockKey key;
  for (size_t i = 0; i < key.bytes.size(); i += 8) {
    const uint64_t v = Mix64(n + 1 + i);
    std::memcpy(key.bytes.data() + i, &v, 8);
  }
  return key;
}

// What both processes have: a pool of the pass's blocks, a node for each transport, the tag link beside them.
struct Side {
  MetricRegistry pool_metrics;
  std::unique_ptr<BlockPool> pool;
  std::array<MetricRegistry, kTransports.size()> metrics;
  std::array<std::unique_ptr<FetchNode>, kTransports.size()> nodes;
  std::unique_ptr<UcxTagLink> link;
  std::span<std::byte> memory;  // of the references

  absl::Status Start(const HandoffBenchOptions& options, const std::string& name, int fill) {
    BlockPool::Options p;
    p.layout = {.layers = static_cast<uint32_t>(options.block_bytes / kLayerBytes),
                .kv_heads = 8,
                .head_dim = 64,
                .block_tokens = 32};
    TP_CHECK(p.layout.layer_bytes() == kLayerBytes);
    p.slots = static_cast<uint32_t>(options.pass_bytes / options.block_bytes);
    p.metrics = &pool_metrics;
    TP_ASSIGN_OR_RETURN(pool, BlockPool::Create(p));
    SettlePages(*pool, pool_metrics);
    for (size_t i = 0; i < kTransports.size(); ++i) {
      TransportOptions t;
      t.ucx.tls = kTransports[i];
      FetchNode::Options o;
      o.worker_id = name;
      o.boot_id = absl::StrCat(name, "-", i);
      o.pool = pool.get();
      o.metrics = &metrics[i];
      o.share_arena = false;  // blocks go by the transport, which maps all the same
      o.lanes = options.lanes;
      o.flow = options.flow;
      TP_ASSIGN_OR_RETURN(o.transport, CreateTransport(t));
      if (const SlotArena& arena = pool->arena(); arena.fd() >= 0)
        o.transport->ShareMemory(arena.fd(), {arena.slot(0).data(), arena.bytes()});
      TP_ASSIGN_OR_RETURN(nodes[i], FetchNode::Start(std::move(o)));
    }
    TP_ASSIGN_OR_RETURN(link, UcxTagLink::Create("tcp", "lo"));
    memory = Memory(options.pass_bytes, fill);
    return absl::OkStatus();
  }
};

// The process that is fetched from.
absl::Status Serve(const HandoffBenchOptions& options, Wire wire) {
  Side side;
  TP_RETURN_IF_ERROR(side.Start(options, "holder", 2));
  TP_ASSIGN_OR_RETURN(auto slots, side.pool->Reserve(options.pass_bytes / options.block_bytes));
  Rng rng(1);
  for (BlockLease& slot : slots) {
    const std::span<std::byte> bytes = slot.data();
    for (size_t at = 0; at < bytes.size(); at += 8) {
      const uint64_t v = rng.Next();
      std::memcpy(bytes.data() + at, &v, 8);
    }
  }
  const auto publish = [&] {
    uint64_t n = 0;
    for (BlockLease& slot : slots) side.pool->Publish(std::move(slot), {.key = KeyOf(n++)});
  };
  publish();
  for (auto& node : side.nodes) wire.Say(node->address());
  wire.Say(absl::CHexEscape(side.link->Address()));
  const auto peer = wire.Hear(options.timeout);
  std::string address;
  if (!peer || !absl::CUnescape(*peer, &address)) return Gone();
  TP_RETURN_IF_ERROR(side.link->Join(address));
  // Of the fetches only this process's node has to know; the tag link is driven by its caller.
  while (const auto what = wire.Hear(options.timeout)) {
    if (*what == "stop") return absl::OkStatus();
    if (*what == "renew") {
      // The same memory as new blocks: nothing that is known of the old ones holds any more.
      side.pool->Clear({});
      TP_ASSIGN_OR_RETURN(slots, side.pool->Reserve(slots.size()));
      publish();
      wire.Say("renewed");
      continue;
    }
    TP_RETURN_IF_ERROR(
        side.link->Send(side.memory, options.block_bytes, 16, absl::ToDoubleSeconds(options.timeout)));
  }
  return Gone();
}

bool Wanted(const HandoffBenchOptions& options, const Subject& subject) {
  return std::string_view(subject.name).find(options.only) != std::string_view::npos;
}

struct Samples {
  std::array<std::vector<double>, kSubjects> value, reference;
};

absl::StatusOr<double> FetchAll(const HandoffBenchOptions& options, Side& side, size_t transport,
                                const std::string& address, uint32_t part) {
  FetchSpec spec;
  spec.request_id = "bench";
  spec.part = part;
  spec.peer = {"holder", absl::StrCat("holder-", transport), address};
  for (uint64_t i = 0; i < options.pass_bytes / options.block_bytes; ++i) spec.keys.push_back(KeyOf(i));
  TP_ASSIGN_OR_RETURN(spec.slots, side.pool->Reserve(spec.keys.size()));
  const size_t blocks = spec.keys.size();
  spec.deadline = Clock::Real().Now() + options.timeout;
  std::promise<FetchResult> promise;
  const absl::Time start = Clock::Real().Now();
  side.nodes[transport]->Fetch(std::move(spec), [&](FetchResult r) { promise.set_value(std::move(r)); });
  FetchResult result = promise.get_future().get();
  const double took = absl::ToDoubleSeconds(Clock::Real().Now() - start);
  TP_RETURN_IF_ERROR(result.status);
  if (result.bytes != blocks * options.block_bytes) return absl::DataLossError("not all blocks came");
  return static_cast<double>(options.pass_bytes) / took / 1e9;
}

absl::StatusOr<Samples> Measure(const HandoffBenchOptions& options, Wire wire) {
  Side side;
  TP_RETURN_IF_ERROR(side.Start(options, "fetcher", 1));
  std::array<std::string, kTransports.size()> addresses;
  for (std::string& address : addresses) {
    auto line = wire.Hear(options.timeout);
    if (!line) return Gone();
    address = *line;
  }
  const auto peer = wire.Hear(options.timeout);
  std::string address;
  if (!peer || !absl::CUnescape(*peer, &address)) return Gone();
  wire.Say(absl::CHexEscape(side.link->Address()));
  TP_RETURN_IF_ERROR(side.link->Join(address));
  const auto gbs = [&](absl::Time start) {
    return static_cast<double>(options.pass_bytes) / absl::ToDoubleSeconds(Clock::Real().Now() - start) / 1e9;
  };
  const double timeout = absl::ToDoubleSeconds(options.timeout);
  const std::span<std::byte> other = Memory(options.pass_bytes, 3);
  Samples out;
  uint32_t part = 0;
  // The first round connects and warms up; it is not counted.
  for (int round = 0; round <= options.rounds; ++round) {
    for (size_t i = 0; i < kSubjects; ++i) {
      const Subject& subject = kSubject[i];
      if (!Wanted(options, subject)) continue;
      if (subject.first) {
        if (!wire.Say("renew") || !wire.Hear(options.timeout)) return Gone();
      }
      double reference;
      if (subject.reference == kTag) {
        if (!wire.Say("tag")) return Gone();
        const absl::Time start = Clock::Real().Now();
        TP_RETURN_IF_ERROR(side.link->Receive(side.memory, options.block_bytes, 16, timeout));
        reference = gbs(start);
      } else {
        const absl::Time start = Clock::Real().Now();
        for (size_t at = 0; at < options.pass_bytes; at += options.block_bytes) {
          std::memcpy(side.memory.data() + at, other.data() + at, options.block_bytes);
        }
        reference = gbs(start);
      }
      const size_t transport = TransportOf(subject);
      TP_ASSIGN_OR_RETURN(const double value,
                          FetchAll(options, side, transport, addresses[transport], part++));
      if (round == 0) continue;
      out.value[i].push_back(value);
      out.reference[i].push_back(reference);
    }
  }
  wire.Say("stop");
  return out;
}

void Reap(pid_t pid) {
  if (pid <= 0) return;
  kill(pid, SIGKILL);
  waitpid(pid, nullptr, 0);
}

}  // namespace

absl::StatusOr<std::vector<BenchRow>> RunHandoffBench(const HandoffBenchOptions& given) {
  HandoffBenchOptions options = given;
  if (options.block_bytes == 0 || options.block_bytes % kLayerBytes != 0 || options.rounds < 1 ||
      options.pass_bytes < options.block_bytes || options.pass_bytes / options.block_bytes > 4096) {
    return absl::InvalidArgumentError(
        "handoff benchmark: blocks of a multiple of 64 KiB, 1 to 4096 of them, and at least one round");
  }
  options.pass_bytes -= options.pass_bytes % options.block_bytes;
  int between[2], report[2];
  if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, between) != 0) {
    return absl::ResourceExhaustedError(std::string("socketpair: ") + std::strerror(errno));
  }
  if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, report) != 0) {
    close(between[0]);
    close(between[1]);
    return absl::ResourceExhaustedError(std::string("socketpair: ") + std::strerror(errno));
  }
  const pid_t holder = fork();
  if (holder == 0) {
    close(between[0]);
    close(report[0]);
    const absl::Status status = Serve(options, Wire(between[1]));
    if (!status.ok()) Wire(report[1]).Say(absl::StrCat("!", status.message()));
    _exit(0);
  }
  const pid_t fetcher = fork();
  if (fetcher == 0) {
    close(between[1]);
    close(report[0]);
    const auto samples = Measure(options, Wire(between[0]));
    Wire out(report[1]);
    if (!samples.ok()) {
      out.Say(absl::StrCat("!", samples.status().message()));
    } else {
      for (size_t i = 0; i < kSubjects; ++i) {
        for (size_t r = 0; r < samples->value[i].size(); ++r) {
          out.Say(absl::StrCat(samples->value[i][r], " ", samples->reference[i][r]));
        }
      }
    }
    _exit(0);
  }
  for (int fd : {between[0], between[1], report[1]}) close(fd);
  std::vector<BenchRow> rows;
  absl::Status failed;
  Wire in(report[0]);
  std::vector<double> values, references;
  std::vector<Subject> subjects;
  std::copy_if(kSubject.begin(), kSubject.end(), std::back_inserter(subjects),
               [&](const Subject& subject) { return Wanted(options, subject); });
  while (failed.ok() && rows.size() < subjects.size()) {
    const auto line = in.Hear(options.timeout);
    const std::vector<std::string> parts = absl::StrSplit(line.value_or(""), ' ');
    double value = 0, reference = 0;
    if (!line || line->starts_with("!")) {
      failed = absl::UnavailableError(absl::StrCat(
          "handoff benchmark: ", line ? line->substr(1) : "its processes ended without a result"));
    } else if (parts.size() == 2 && absl::SimpleAtod(parts[0], &value) &&
               absl::SimpleAtod(parts[1], &reference)) {
      values.push_back(value);
      references.push_back(reference);
      if (values.size() < static_cast<size_t>(options.rounds)) continue;
      const Subject& subject = subjects[rows.size()];
      rows.push_back(RowOfRounds(subject.name, values, "GB/s", subject.reference, references));
      values.clear();
      references.clear();
    }
  }
  close(report[0]);
  Reap(holder);
  Reap(fetcher);
  TP_RETURN_IF_ERROR(failed);
  return rows;
}

}  // namespace tidepool
