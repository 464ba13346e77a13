#pragma once

#include <gtest/gtest.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "base/shared_memory.h"
#include "kvstore/arena_client.h"
#include "kvstore/arena_codec.h"
#include "kvstore/arena_server.h"
#include "kvstore/offer_table.h"
#include "tests/kvstore/fetch_test_util.h"

namespace tidepool {

inline constexpr BlockLayout kArenaLayout = {.layers = 4, .kv_heads = 2, .head_dim = 16, .block_tokens = 8};

template <typename Holds>
bool EventuallyTrue(const Holds& holds) {
  const absl::Time limit = Clock::Real().Now() + absl::Seconds(15);
  while (!holds()) {
    if (Clock::Real().Now() > limit) return false;
    std::this_thread::yield();
  }
  return true;
}

// A process's pool with the server of its arena.
struct ArenaOwner {
  explicit ArenaOwner(uint32_t slots = 256, ArenaServer::Options options = {}) {
    pool = *BlockPool::Create({.layout = kArenaLayout, .slots = slots, .metrics = &metrics});
    offers = std::make_shared<OfferTable>(kArenaLayout.layers, absl::Seconds(30));
    options.pool = pool.get();
    options.offers = offers;
    options.boot_id = "boot";
    options.fingerprint = "model";
    options.metrics = &metrics;
    server = *ArenaServer::Start(std::move(options));
  }
  ArenaClient::Peer peer() const { return {server->address(), "boot"}; }
  void Offer(const std::string& request, uint64_t first, size_t n, uint32_t layers = kArenaLayout.layers) {
    auto slots = *pool->Reserve(n);
    for (size_t i = 0; i < n; ++i) {
      Fill(slots[i].data(), first + i);
      offers->Offer(request, TestKey(first + i), std::move(slots[i]), layers, Clock::Real().Now());
    }
  }
  void Publish(uint64_t first, size_t n) {
    auto slots = *pool->Reserve(n);
    for (size_t i = 0; i < n; ++i) {
      Fill(slots[i].data(), first + i);
      pool->Publish(std::move(slots[i]), {.key = TestKey(first + i)});
    }
  }
  // Everything that was leased is free again, and whoever was held for is known to have let go.
  bool Idle() const { return server->held_blocks() == 0 && pool->stats().leased == 0; }
  uint64_t leases(LeaseKind kind) const { return pool->stats().leases[static_cast<size_t>(kind)]; }

  MetricRegistry metrics;
  std::unique_ptr<BlockPool> pool;
  std::shared_ptr<OfferTable> offers;
  std::unique_ptr<ArenaServer> server;
};

// Blocks first, first + 1, ... as ArenaOwner fills them.
inline void ExpectHolds(const BlockRun& blocks, uint64_t first, size_t n) {
  ASSERT_EQ(blocks.size(), n);
  for (size_t i = 0; i < n; ++i) EXPECT_TRUE(Holds(blocks.data(i), first + i)) << i;
}

inline std::vector<BlockKey> TestKeys(uint64_t first, size_t n) {
  std::vector<BlockKey> keys;
  for (size_t i = 0; i < n; ++i) keys.push_back(TestKey(first + i));
  return keys;
}

inline std::unique_ptr<ArenaClient> MakeArenaClient(MetricRegistry* metrics,
                                                    ArenaClient::Options options = {}) {
  options.worker_id = "reader";
  options.fingerprint = "model";
  options.layout = kArenaLayout;
  options.metrics = metrics;
  return std::make_unique<ArenaClient>(std::move(options));
}

// Take, and wait for its end.
inline ArenaClient::Taken TakeNow(ArenaClient& client, const ArenaClient::Peer& peer,
                                  const std::string& request, uint64_t first, size_t n,
                                  absl::Duration within = absl::Seconds(10)) {
  std::mutex mu;
  std::condition_variable cv;
  std::optional<ArenaClient::Taken> out;
  client.Take(peer, request, 1, TestKeys(first, n), Clock::Real().Now() + within,
              [&](ArenaClient::Taken taken) {
                std::lock_guard lock(mu);
                out = std::move(taken);
                cv.notify_all();
              });
  std::unique_lock lock(mu);
  cv.wait(lock, [&] { return out.has_value(); });
  return std::move(*out);
}

// A connection that says whatever it likes.
class RawReader {
 public:
  explicit RawReader(const std::string& arena) {
    EXPECT_TRUE(ArenaAddress::Parse(arena, address_));
    fd_ = FileDescriptor(socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
    sockaddr_un name = {.sun_family = AF_UNIX, .sun_path = {}};
    std::copy(address_.socket.begin(), address_.socket.end(), name.sun_path + 1);
    const auto length = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + address_.socket.size());
    EXPECT_EQ(connect(fd_.get(), reinterpret_cast<sockaddr*>(&name), length), 0);
    const timeval limit = {.tv_sec = 10, .tv_usec = 0};
    setsockopt(fd_.get(), SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
  }
  ArenaHello Hello() const {
    return {.token = address_.token,
            .boot = "boot",
            .worker = "raw",
            .fingerprint = "model",
            .layout = kArenaLayout.ToString()};
  }
  bool Send(const std::string& bytes) {
    return send(fd_.get(), bytes.data(), bytes.size(), MSG_NOSIGNAL) == static_cast<ssize_t>(bytes.size());
  }
  // Will say no more, and goes on reading.
  void ShutDown() { shutdown(fd_.get(), SHUT_WR); }
  bool Send(const ArenaPacket& packet) { return Send(EncodeArenaPacket(packet)); }
  // nullopt: the connection is at its end. Descriptors that come along are closed.
  std::optional<ArenaPacket> Receive() {
    std::vector<std::byte> bytes(kMaxArenaPacket);
    const ssize_t n = recv(fd_.get(), bytes.data(), bytes.size(), 0);
    if (n <= 0) return std::nullopt;
    auto packet = DecodeArenaPacket(std::span(bytes).first(static_cast<size_t>(n)));
    EXPECT_TRUE(packet.ok()) << packet.status();
    return *std::move(packet);
  }
  bool Welcome() {
    Send(Hello());
    const auto answer = Receive();
    return answer && std::holds_alternative<ArenaWelcome>(*answer);
  }
  std::optional<ArenaRefusal> Refused() {
    const auto answer = Receive();
    if (!answer || !std::holds_alternative<ArenaRefuse>(*answer)) return std::nullopt;
    return std::get<ArenaRefuse>(*answer).reason;
  }

 private:
  ArenaAddress address_;
  FileDescriptor fd_;
};

}  // namespace tidepool
