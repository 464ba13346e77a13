#include "kvstore/bench/host_bench.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>
#include <string>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "base/probe.h"
#include "base/rng.h"
#include "base/status.h"
#include "kvstore/bench/settle_pages.h"
#include "kvstore/block_pool.h"

namespace tidepool {
namespace {

constexpr size_t kLayers = 32;
constexpr size_t kHeads = 8;
constexpr uint32_t kBlockTokens = 32;

// A digest that nobody computed: benchmarks need many keys, not their making.
BlockKey KeyOf(uint64_t n) {
  BlockKey key;
  Rng rng(n + 1);
  for (size_t i = 0; i < key.bytes.size(); i += 8) {
    const uint64_t word = rng.Next();
    std::memcpy(key.bytes.data() + i, &word, 8);
  }
  return key;
}

std::vector<BlockKey> KeysOf(uint64_t first, size_t n) {
  std::vector<BlockKey> keys(n);
  for (size_t i = 0; i < n; ++i) keys[i] = KeyOf(first + i);
  return keys;
}

double SecondsSince(absl::Time start) { return absl::ToDoubleSeconds(absl::Now() - start); }

// Resident bytes of this process.
size_t Resident() {
  std::ifstream statm("/proc/self/statm");
  size_t total = 0, resident = 0;
  statm >> total >> resident;
  return resident * static_cast<size_t>(sysconf(_SC_PAGESIZE));
}

// Memory like the arena's, huge pages where the kernel gives them: the copies are what is compared.
struct Buffer {
  explicit Buffer(size_t bytes) {
    constexpr size_t kHuge = size_t{2} << 20;
    const size_t rounded = (bytes + kHuge - 1) / kHuge * kHuge;
    data.reset(static_cast<std::byte*>(std::aligned_alloc(kHuge, rounded)));
    TP_CHECK(data != nullptr);
    madvise(data.get(), rounded, MADV_HUGEPAGE);
    std::memset(data.get(), 1, rounded);
  }
  struct Free {
    void operator()(std::byte* p) const { std::free(p); }
  };
  std::unique_ptr<std::byte[], Free> data;
};

absl::StatusOr<double> Put(BlockPool& pool, const std::vector<BlockKey>& keys, const std::byte* from) {
  const size_t bytes = pool.layout().block_bytes();
  const absl::Time start = absl::Now();
  TP_ASSIGN_OR_RETURN(std::vector<BlockLease> slots, pool.Reserve(keys.size()));
  for (size_t i = 0; i < keys.size(); ++i) {
    std::memcpy(slots[i].data().data(), from + i * bytes, bytes);
    BlockInfo info{.key = keys[i], .position = static_cast<uint32_t>(i)};
    if (i > 0) info.parent = keys[i - 1];
    slots[i] = pool.Publish(std::move(slots[i]), std::move(info));
  }
  BlockLease::DropAll(std::move(slots));
  return SecondsSince(start);
}

absl::StatusOr<double> Get(BlockPool& pool, const std::vector<BlockKey>& keys, std::byte* to) {
  const size_t bytes = pool.layout().block_bytes();
  const absl::Time start = absl::Now();
  std::vector<BlockLease> slots = pool.LeasePrefix(keys);
  if (slots.size() != keys.size()) return absl::InternalError("host bench: blocks of the run are missing");
  for (size_t i = 0; i < keys.size(); ++i) std::memcpy(to + i * bytes, slots[i].data().data(), bytes);
  BlockLease::DropAll(std::move(slots));
  return SecondsSince(start);
}

double Copy(const std::byte* from, std::byte* to, size_t blocks, size_t bytes) {
  const absl::Time start = absl::Now();
  for (size_t i = 0; i < blocks; ++i) std::memcpy(to + i * bytes, from + i * bytes, bytes);
  return SecondsSince(start);
}

}  // namespace

absl::StatusOr<std::vector<BenchRow>> RunHostBench(const HostBenchOptions& options) {
  MetricRegistry metrics;
  BlockPool::Options pool_options;
  const size_t head_dim = options.block_bytes / (2 * 2 * kLayers * kHeads * kBlockTokens);
  pool_options.layout = {.layers = kLayers,
                         .kv_heads = kHeads,
                         .head_dim = static_cast<uint32_t>(head_dim),
                         .block_tokens = kBlockTokens};
  if (pool_options.layout.block_bytes() != options.block_bytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("block size ", options.block_bytes, " is not a multiple of 16384 bytes"));
  }
  pool_options.slots = static_cast<uint32_t>(options.blocks);
  pool_options.metrics = &metrics;
  TP_ASSIGN_OR_RETURN(const std::unique_ptr<BlockPool> pool, BlockPool::Create(pool_options));
  SettlePages(*pool, metrics);
  const size_t total = options.blocks * options.block_bytes;
  Buffer outside(total), other(total), third(total);

  std::vector<double> put, get, copy_in, copy_out;
  for (int round = 0; round <= options.rounds; ++round) {
    const std::vector<BlockKey> keys = KeysOf(static_cast<uint64_t>(round) * options.blocks, options.blocks);
    const double reference_in =
        Copy(outside.data.get(), other.data.get(), options.blocks, options.block_bytes);
    TP_ASSIGN_OR_RETURN(const double in, Put(*pool, keys, outside.data.get()));
    const double reference_out =
        Copy(other.data.get(), third.data.get(), options.blocks, options.block_bytes);
    TP_ASSIGN_OR_RETURN(const double out, Get(*pool, keys, third.data.get()));
    if (round == 0) continue;  // touches the arena's pages for the first time
    const double gigabytes = static_cast<double>(total) / 1e9;
    put.push_back(gigabytes / in);
    get.push_back(gigabytes / out);
    copy_in.push_back(gigabytes / reference_in);
    copy_out.push_back(gigabytes / reference_out);
  }
  return std::vector<BenchRow>{RowOfRounds("host put", put, "GB/s", "memcpy", copy_in),
                               RowOfRounds("host get", get, "GB/s", "memcpy", copy_out)};
}

absl::StatusOr<std::vector<BenchRow>> RunIndexBench(const IndexBenchOptions& options) {
  const size_t before = Resident();
  MetricRegistry metrics;
  BlockPool::Options pool_options;
  // The smallest blocks there are: what is measured is what the pool keeps of a block besides its bytes.
  pool_options.layout = {.layers = 1, .kv_heads = 1, .head_dim = 1, .block_tokens = 1};
  pool_options.slots = options.blocks;
  pool_options.metrics = &metrics;
  TP_ASSIGN_OR_RETURN(const std::unique_ptr<BlockPool> pool, BlockPool::Create(pool_options));
  constexpr size_t kChain = 1000;  // a request's worth
  const std::vector<int32_t> tokens(kBlockTokens, 7);
  for (uint64_t first = 0; first < options.blocks; first += kChain) {
    const size_t n = std::min<uint64_t>(kChain, options.blocks - first);
    TP_ASSIGN_OR_RETURN(std::vector<BlockLease> slots, pool->Reserve(n));
    std::optional<BlockKey> parent;
    for (size_t i = 0; i < n; ++i) {
      BlockInfo info{.key = KeyOf(first + i), .parent = parent, .tokens = tokens, .tenant = "default"};
      info.position = static_cast<uint32_t>(i);
      parent = info.key;
      slots[i] = pool->Publish(std::move(slots[i]), std::move(info));
    }
    BlockLease::DropAll(std::move(slots));
  }
  const double per_block = static_cast<double>(Resident() - before) / options.blocks;

  // A chain of reads, each of which waits for the one before it: what a table without look-ahead pays.
  std::vector<uint32_t> order(options.blocks);
  Rng rng(1);
  for (uint32_t i = 0; i < options.blocks; ++i) order[i] = i;
  for (uint32_t i = options.blocks - 1; i > 0; --i) std::swap(order[i], order[rng.Next() % i]);

  std::vector<double> match, lease, chase;
  uint32_t at = 0;
  for (int k = 0; k < options.lookups; ++k) {
    const uint64_t chains = std::max<uint64_t>(options.blocks / kChain, 1);
    const std::vector<BlockKey> keys = KeysOf(rng.Next() % chains * kChain, options.prefix);
    absl::Time start = absl::Now();
    const size_t found = pool->MatchPrefix(keys);
    match.push_back(SecondsSince(start) * 1e6);
    if (found < std::min<size_t>(options.prefix, kChain)) {
      return absl::InternalError("index bench: blocks of the run are missing");
    }
    const std::vector<BlockKey> others = KeysOf(rng.Next() % chains * kChain, options.prefix);
    start = absl::Now();
    std::vector<BlockLease> leases = pool->LeasePrefix(others);
    lease.push_back(SecondsSince(start) * 1e6);
    BlockLease::DropAll(std::move(leases));
    start = absl::Now();
    for (size_t i = 0; i < options.prefix; ++i) at = order[at];
    chase.push_back(SecondsSince(start) * 1e6);
  }
  if (at >= options.blocks) return absl::InternalError("index bench: the chain left its memory");
  const std::string size = absl::StrCat(options.prefix, " of ", options.blocks, " blocks");
  const std::string chained = "as many dependent reads of memory";
  return std::vector<BenchRow>{
      RowOfRounds("lookup of " + size, match, "us", chained, chase),
      RowOfRounds("lease of " + size, lease, "us", chained, chase),
      {.name = "memory of a block's entry, tokens included", .value = per_block, .unit = "bytes"}};
}

}  // namespace tidepool
