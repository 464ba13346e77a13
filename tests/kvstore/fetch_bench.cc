// How fast blocks move between two nodes, beside what memcpy does with the same memory in the same run: the
// ratio survives a busy machine better than the figures do. Every block is distinct and touched once, so that
// no cache flatters the transport. Usage: fetch_bench [blocks a fetch] [fetches]

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "base/log.h"
#include "tests/kvstore/fetch_node_contract.h"
#include "transport/inproc_transport.h"
#include "transport/ucx_transport.h"

namespace tidepool {
namespace {

GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(FetchNodeContract);

double Seconds(absl::Time since) { return absl::ToDoubleSeconds(Clock::Real().Now() - since); }

double MemcpyGbs(TestNode& from, TestNode& to, const std::vector<BlockKey>& keys) {
  auto slots = to.Slots(keys.size());
  const absl::Time start = Clock::Real().Now();
  size_t bytes = 0;
  for (size_t i = 0; i < keys.size(); ++i) {
    auto lease = from.pool->Lease(keys[i]);
    std::memcpy(slots[i].data().data(), lease->data().data(), slots[i].data().size());
    bytes += slots[i].data().size();
  }
  return static_cast<double>(bytes) / Seconds(start) / 1e9;
}

void Measure(const char* name, const NodeTransportFactory& factory, size_t blocks, size_t fetches) {
  const uint32_t slots = static_cast<uint32_t>(blocks * (fetches + 2));
  TestNode a(factory, {.worker = "a", .boot = "ba", .slots = slots});
  TestNode b(factory, {.worker = "b", .boot = "bb", .slots = slots});
  const double copy = MemcpyGbs(b, a, b.Publish(1u << 20, blocks));
  double worst_ms = 0, first_ms = 0, total = 0;
  uint64_t bytes = 0;
  for (size_t f = 0; f <= fetches; ++f) {
    FetchSpec spec;
    spec.request_id = "bench";
    spec.part = static_cast<uint32_t>(f);
    spec.peer = b.peer();
    spec.keys = b.Publish(f * blocks, blocks);
    spec.slots = a.Slots(blocks);
    spec.deadline = Clock::Real().Now() + absl::Seconds(60);
    Waiter w;
    const absl::Time start = Clock::Real().Now();
    a.node->Fetch(std::move(spec), w.Callback());
    if (!w.Get().status.ok()) {
      std::printf("%-8s failed: %s\n", name, w.Get().status.ToString().c_str());
      return;
    }
    const double took = Seconds(start);
    if (f == 0) {
      first_ms = took * 1e3;  // connection and HELLO included
      continue;
    }
    total += took;
    bytes += w.Get().bytes;
    worst_ms = std::max(worst_ms, took * 1e3);
  }
  const double gbs = static_cast<double>(bytes) / total / 1e9;
  std::printf("%-8s %8.2f GB/s  memcpy %6.2f GB/s  ratio %.3f  mean %.2f ms  worst %.2f ms  first %.2f ms\n",
              name, gbs, copy, gbs / copy, total * 1e3 / static_cast<double>(fetches), worst_ms, first_ms);
}

}  // namespace
}  // namespace tidepool

int main(int argc, char** argv) {
  using namespace tidepool;
  spdlog::set_level(spdlog::level::warn);
  const size_t blocks = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 64;
  const size_t fetches = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 20;
  std::printf("%zu blocks of 128 KiB a fetch, %zu fetches, checksums on both sides included\n", blocks,
              fetches);
  InprocNetwork network;
  Measure(
      "inproc", [&] { return network.NewTransport(); }, blocks, fetches);
  Measure(
      "ucx-tcp", [] { return std::move(*CreateUcxTransport({})); }, blocks, fetches);
}
