#include <poll.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <future>
#include <memory>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/clock.h"
#include "base/status.h"
#include "kvstore/fetch_node.h"
#include "server/cli/doctor_checks.h"
#include "server/worker/transport_options.h"

namespace tidepool {
namespace {

constexpr size_t kBlocks = 16;
constexpr int kFetches = 20;
constexpr int kTimeoutMs = 20'000;

BlockKey KeyOf(size_t n) {
  BlockKey key;
  key.bytes.fill(static_cast<uint8_t>(n + 1));
  return key;
}

// A process's pool of 16 blocks of 1 MiB, and its node.
struct Side {
  MetricRegistry metrics;
  std::unique_ptr<BlockPool> pool;
  std::unique_ptr<FetchNode> node;

  absl::Status Start(const TransportConfig& config, const char* name) {
    BlockPool::Options p;
    p.layout = {.layers = 16, .kv_heads = 8, .head_dim = 64, .block_tokens = 32};
    p.slots = 2 * kBlocks;
    p.metrics = &metrics;
    TP_ASSIGN_OR_RETURN(pool, BlockPool::Create(p));
    TransportOptions transport = TransportOptionsOf(config, "doctor", nullptr);
    // Beside a worker that may be running; neither is a worker by name.
    transport.ucx.listen_port = 0;
    transport.tls.listen_port = 0;
    transport.tls.check_name = false;
    FetchNode::Options o;
    o.worker_id = name;
    o.boot_id = absl::StrCat(name, "-boot");
    o.pool = pool.get();
    o.metrics = &metrics;
    TP_ASSIGN_OR_RETURN(o.transport, CreateTransport(transport));
    TP_ASSIGN_OR_RETURN(node, FetchNode::Start(std::move(o)));
    return absl::OkStatus();
  }
};

bool Say(int fd, const std::string& text) {
  return send(fd, text.data(), text.size(), MSG_NOSIGNAL) == static_cast<ssize_t>(text.size());
}
// One message of a SOCK_SEQPACKET socket; empty: none came.
std::string Hear(int fd) {
  pollfd p{fd, POLLIN, 0};
  std::string out(4096, '\0');
  if (poll(&p, 1, kTimeoutMs) <= 0) return "";
  const ssize_t n = recv(fd, out.data(), out.size(), 0);
  out.resize(static_cast<size_t>(std::max<ssize_t>(n, 0)));
  return out;
}

// The process that is fetched from; until the other one is through.
absl::Status Hold(const TransportConfig& config, int fd) {
  Side side;
  TP_RETURN_IF_ERROR(side.Start(config, "holder"));
  TP_ASSIGN_OR_RETURN(auto slots, side.pool->Reserve(kBlocks));
  for (size_t i = 0; i < kBlocks; ++i) {
    std::memset(slots[i].data().data(), static_cast<int>(i), slots[i].data().size());
    side.pool->Publish(std::move(slots[i]), {.key = KeyOf(i)});
  }
  Say(fd, side.node->address());
  Say(fd, side.node->arena_address().empty() ? "-" : side.node->arena_address());
  Hear(fd);
  return absl::OkStatus();
}

// "WAY MICROSECONDS BYTES" of the median fetch.
absl::StatusOr<std::string> FetchAll(const TransportConfig& config, int fd) {
  Side side;
  TP_RETURN_IF_ERROR(side.Start(config, "fetcher"));
  FetchSpec spec;
  spec.peer.worker_id = "holder";
  spec.peer.boot_id = "holder-boot";
  spec.peer.transport = Hear(fd);
  spec.peer.arena = Hear(fd);
  if (spec.peer.transport.empty() || spec.peer.arena.empty()) {
    return absl::UnavailableError("the other process is gone");
  }
  if (spec.peer.arena == "-")
    return absl::UnavailableError("memory cannot be shared here (the log says why)");
  for (size_t i = 0; i < kBlocks; ++i) spec.keys.push_back(KeyOf(i));
  spec.request_id = "doctor";
  std::vector<double> took;
  std::string way;
  uint64_t bytes = 0;
  for (int i = 0; i < kFetches; ++i) {
    FetchSpec now;
    now.request_id = spec.request_id;
    now.part = static_cast<uint32_t>(i);
    now.peer = spec.peer;
    now.keys = spec.keys;
    now.in_place = true;
    TP_ASSIGN_OR_RETURN(now.slots, side.pool->Reserve(kBlocks));
    now.deadline = Clock::Real().Now() + absl::Milliseconds(kTimeoutMs);
    std::promise<FetchResult> promise;
    const absl::Time start = Clock::Real().Now();
    side.node->Fetch(std::move(now), [&](FetchResult r) { promise.set_value(std::move(r)); });
    const FetchResult result = promise.get_future().get();
    took.push_back(absl::ToDoubleMicroseconds(Clock::Real().Now() - start));
    TP_RETURN_IF_ERROR(result.status);
    way = std::string(result.transport);
    bytes = result.bytes;
  }
  std::nth_element(took.begin(), took.begin() + kFetches / 2, took.end());
  return absl::StrCat(way, " ", took[kFetches / 2], " ", bytes);
}

}  // namespace

Finding MeasureArena(const TransportConfig& config) {
  int between[2], report[2];
  if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, between) != 0) {
    return Fail("shared arena", absl::StrCat("socketpair: ", std::strerror(errno)));
  }
  if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, report) != 0) {
    close(between[0]);
    close(between[1]);
    return Fail("shared arena", absl::StrCat("socketpair: ", std::strerror(errno)));
  }
  const pid_t holder = fork();
  if (holder == 0) {
    close(between[0]);
    close(report[0]);
    const absl::Status status = Hold(config, between[1]);
    if (!status.ok()) Say(report[1], "!" + std::string(status.message()));
    _exit(0);
  }
  const pid_t fetcher = fork();
  if (fetcher == 0) {
    close(between[1]);
    close(report[0]);
    const auto result = FetchAll(config, between[0]);
    Say(report[1], result.ok() ? *result : "!" + std::string(result.status().message()));
    _exit(0);
  }
  for (int fd : {between[0], between[1], report[1]}) close(fd);
  const std::string text = Hear(report[0]);
  close(report[0]);
  for (const pid_t pid : {holder, fetcher}) {
    if (pid <= 0) continue;
    kill(pid, SIGKILL);
    waitpid(pid, nullptr, 0);
  }
  if (text.empty()) return Fail("shared arena", "the two processes ended without a result");
  if (text[0] == '!') {
    return Warn("shared arena", text.substr(1) + "; processes of this machine then copy over the transport");
  }
  char way[32] = {};
  double us = 0;
  unsigned long long bytes = 0;
  if (std::sscanf(text.c_str(), "%31s %lf %llu", way, &us, &bytes) != 3) {
    return Fail("shared arena", "unreadable result: " + text);
  }
  char detail[160];
  std::snprintf(detail, sizeof detail, "%zu blocks of 1 MiB from one process to another in %.0f us over %s",
                kBlocks, us, way);
  if (std::string_view(way) != "arena") {
    return Warn("shared arena",
                std::string(detail) + ": copied, memory could not be shared (the log says why)");
  }
  return Ok("shared arena", detail);
}

}  // namespace tidepool
