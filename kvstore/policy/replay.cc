#include "kvstore/policy/replay.h"

#include <algorithm>
#include <charconv>
#include <cstring>
#include <optional>

#include "absl/container/flat_hash_map.h"
#include "absl/time/clock.h"
#include "base/clock.h"
#include "base/rng.h"
#include "base/small_file.h"
#include "base/status.h"
#include "kvstore/block_pool.h"

namespace tidepool {

namespace {

constexpr BlockLayout kTinyLayout{
    .layers = 1, .kv_heads = 1, .head_dim = 1, .block_tokens = 1, .dtype = DType::kBF16};
constexpr size_t kMaxTraceBytes = size_t{1} << 30;

BlockKey KeyOf(uint32_t id) {
  BlockKey key;
  const uint64_t mixed = Mix64(id);
  std::memcpy(key.bytes.data(), &mixed, sizeof mixed);
  std::memcpy(key.bytes.data() + sizeof mixed, &id, sizeof id);
  return key;
}

uint32_t IdOf(const BlockKey& key) {
  uint32_t id;
  std::memcpy(&id, key.bytes.data() + sizeof(uint64_t), sizeof id);
  return id;
}

// What computing block `i` of a prompt takes, beside the first one: Mooncake's estimate for a 70B model, a *
// n^2 * d + b * n * d^2 with a = 4, b = 22, d = 8192 (n: tokens), differenced over one block.
float RelativeCost(size_t i) {
  constexpr double kShare = 4.0 / 22 * kMooncakeBlockTokens / 8192;
  return static_cast<float>((1 + kShare * (2.0 * static_cast<double>(i) + 1)) / (1 + kShare));
}

// The number that follows `"name":` in the line.
std::string_view After(std::string_view line, std::string_view name) {
  const std::string quoted = "\"" + std::string(name) + "\"";
  size_t at = line.find(quoted);
  if (at == std::string_view::npos) return {};
  at = line.find_first_not_of(" \t:", at + quoted.size());
  return at == std::string_view::npos ? std::string_view() : line.substr(at);
}

template <typename T>
bool TakeNumber(std::string_view& text, T& out) {
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), out);
  if (error != std::errc()) return false;
  text.remove_prefix(static_cast<size_t>(end - text.data()));
  return true;
}

}  // namespace

absl::StatusOr<BlockTrace> ParseMooncakeTrace(std::string_view text) {
  BlockTrace trace;
  absl::flat_hash_map<uint64_t, uint32_t> dense;  // ids as the trace has them, to ours
  for (size_t number = 1; !text.empty(); ++number) {
    const size_t end = text.find('\n');
    const std::string_view line = text.substr(0, end);
    text.remove_prefix(end == std::string_view::npos ? text.size() : end + 1);
    if (line.find_first_not_of(" \t\r") == std::string_view::npos) continue;
    const auto bad = [&](std::string_view what) {
      return absl::InvalidArgumentError("trace: line " + std::to_string(number) + ": " + std::string(what));
    };
    TraceRequest request;
    std::string_view at = After(line, "timestamp");
    if (!TakeNumber(at, request.at_ms)) return bad("no number 'timestamp'");
    at = After(line, "input_length");
    if (!TakeNumber(at, request.input_tokens)) return bad("no number 'input_length'");
    at = After(line, "output_length");
    if (!TakeNumber(at, request.output_tokens)) return bad("no number 'output_length'");
    at = After(line, "hash_ids");
    if (at.empty() || at.front() != '[') return bad("no list 'hash_ids'");
    at.remove_prefix(1);
    for (;;) {
      at.remove_prefix(std::min(at.find_first_not_of(" ,"), at.size()));
      if (at.empty()) return bad("'hash_ids' does not end");
      if (at.front() == ']') break;
      uint64_t id;
      if (!TakeNumber(at, id)) return bad("'hash_ids' holds what is no block number");
      request.blocks.push_back(dense.try_emplace(id, static_cast<uint32_t>(dense.size())).first->second);
    }
    trace.blocks += request.blocks.size();
    trace.requests.push_back(std::move(request));
  }
  trace.distinct_blocks = static_cast<uint32_t>(dense.size());
  return trace;
}

absl::StatusOr<BlockTrace> ReadMooncakeTrace(const std::string& path) {
  TP_ASSIGN_OR_RETURN(const std::string text, ReadSmallFile(path, kMaxTraceBytes));
  absl::StatusOr<BlockTrace> trace = ParseMooncakeTrace(text);
  if (!trace.ok()) return Annotate(trace.status(), path);
  return trace;
}

void RecogniseSessions(BlockTrace& trace, size_t shared) {
  std::vector<uint32_t> last(trace.distinct_blocks);  // request that used the block last, from 1; 0: none did
  uint64_t sessions = 0;
  for (size_t r = 0; r < trace.requests.size(); ++r) {
    TraceRequest& request = trace.requests[r];
    const auto fresh = std::find_if(request.blocks.begin(), request.blocks.end(),
                                    [&](uint32_t id) { return last[id] == 0; });
    const auto seen = static_cast<size_t>(fresh - request.blocks.begin());
    if (seen >= std::max<size_t>(shared, 1)) {
      const TraceRequest& before = trace.requests[last[request.blocks[seen - 1]] - 1];
      request.session = before.session;
      request.turn = before.turn + 1;
    } else {
      request.session = ++sessions;
      request.turn = 0;
    }
    for (const uint32_t id : request.blocks) last[id] = static_cast<uint32_t>(r + 1);
  }
}

const std::vector<PublishedHitRate>& PublishedHitRates() {
  static const std::vector<PublishedHitRate> all = [] {
    std::vector<PublishedHitRate> out;
    struct Row {
      uint32_t slots;
      double lru, lfu, belady;
    };
    for (const Row& r : {Row{0, .366, .366, .366}, Row{30000, .326, .276, .366}, Row{10000, .211, .132, .366},
                         Row{5859, .136, .097, .353}, Row{1000, .044, .048, .191}}) {
      out.push_back({{.slots = r.slots, .policy = "lru", .mode = ReplayMode::kUnlinked}, false, r.lru});
      out.push_back({{.slots = r.slots, .policy = "lfu", .mode = ReplayMode::kBlocks}, false, r.lfu});
      out.push_back({{.slots = r.slots, .policy = "belady", .mode = ReplayMode::kBlocks}, false, r.belady});
    }
    out.push_back({{.slots = 5859, .policy = "s3-fifo", .mode = ReplayMode::kBlocks}, false, .154});
    out.push_back({{.slots = 5859, .policy = "lru", .partial_blocks = false}, false, .141});
    for (const Row& r : {Row{3000, .065, .075, .292}, Row{10000, .212, .132, .366}}) {
      out.push_back({{.slots = r.slots, .policy = "lru"}, false, r.lru});
      out.push_back({{.slots = r.slots, .policy = "lfu"}, false, r.lfu});
      out.push_back({{.slots = r.slots, .policy = "belady"}, false, r.belady});
    }
    // "The best bonus of 100 to 3000 requests per cell".
    out.push_back({{.slots = 3000, .policy = "turn-aware", .turn_bonus = 500}, true, .106});
    out.push_back({{.slots = 10000, .policy = "turn-aware", .turn_bonus = 300}, true, .217});
    return out;
  }();
  return all;
}

absl::StatusOr<ReplayResult> ReplayTrace(const BlockTrace& trace, const ReplayOptions& options) {
  MetricRegistry metrics;
  FakeClock clock;
  BlockPool::Options pool_options{
      .layout = kTinyLayout,
      .slots = options.slots > 0 ? options.slots : std::max(trace.distinct_blocks, 1u),
      .policy = options.policy,
      .turn_bonus = options.turn_bonus,
      .max_events = 1,
      .clock = &clock,
      .metrics = &metrics};
  // uses[id]: the requests that use the block, in order, counted from 1 as the pool does.
  std::vector<std::vector<uint32_t>> uses;
  if (options.policy == "belady") {
    uses.resize(trace.distinct_blocks);
    for (size_t r = 0; r < trace.requests.size(); ++r) {
      for (const uint32_t id : trace.requests[r].blocks) uses[id].push_back(static_cast<uint32_t>(r + 1));
    }
    pool_options.next_use = [&uses](const BlockKey& key, uint64_t request) {
      const std::vector<uint32_t>& u = uses[IdOf(key)];
      const auto next = std::upper_bound(u.begin(), u.end(), request);
      return next == u.end() ? kNever : uint64_t{*next};
    };
  }
  TP_ASSIGN_OR_RETURN(const std::unique_ptr<BlockPool> pool, BlockPool::Create(pool_options));

  const absl::Time start = absl::Now();
  ReplayResult result;
  std::vector<BlockKey> keys;
  uint64_t last_ms = 0;
  for (const TraceRequest& request : trace.requests) {
    clock.Advance(absl::Milliseconds(std::max(request.at_ms, last_ms) - last_ms));
    last_ms = std::max(request.at_ms, last_ms);
    keys.clear();
    for (const uint32_t id : request.blocks) keys.push_back(KeyOf(id));
    result.blocks += keys.size();
    const size_t full = request.input_tokens / kMooncakeBlockTokens;
    if (!options.partial_blocks && keys.size() > full) keys.resize(full);
    const auto info = [&](size_t i) {
      BlockInfo out{.key = keys[i],
                    .session = request.session,
                    .turn = request.turn,
                    .position = static_cast<uint32_t>(i),
                    .compute_seconds = RelativeCost(i)};
      if (i > 0 && options.mode != ReplayMode::kUnlinked) out.parent = keys[i - 1];
      return out;
    };
    if (options.mode == ReplayMode::kUnlinked) {
      pool->LeasePrefix({});  // one more request
      bool prefix = true;
      for (size_t i = 0; i < keys.size(); ++i) {
        if (pool->Lease(keys[i])) {
          if (prefix) ++result.hits;
          continue;
        }
        prefix = false;
        TP_ASSIGN_OR_RETURN(std::vector<BlockLease> fresh, pool->Reserve(1));
        pool->Publish(std::move(fresh[0]), info(i));
      }
      continue;
    }
    std::vector<BlockLease> leases = pool->LeasePrefix(keys, {.session = request.session});
    result.hits += leases.size();
    if (options.mode == ReplayMode::kBlocks) {
      size_t at = leases.size();
      BlockLease::DropAll(std::move(leases));
      for (; at < keys.size(); ++at) {
        TP_ASSIGN_OR_RETURN(std::vector<BlockLease> fresh, pool->Reserve(1));
        // The block before this one had to go for it: nothing after the gap could ever be found.
        if (at > 0 && !pool->Contains(std::span(&keys[at - 1], 1))[0]) break;
        pool->Publish(std::move(fresh[0]), info(at));
      }
      continue;
    }
    const size_t room = pool_options.slots - leases.size();
    TP_ASSIGN_OR_RETURN(std::vector<BlockLease> fresh,
                        pool->Reserve(std::min(keys.size() - leases.size(), room)));
    for (BlockLease& lease : fresh) {
      const size_t at = leases.size();
      leases.push_back(pool->Publish(std::move(lease), info(at)));
    }
    BlockLease::DropAll(std::move(leases));
  }
  result.seconds = absl::ToDoubleSeconds(absl::Now() - start);
  const auto counter = [&](const char* name, Labels labels) {
    labels["tier"] = "host";
    return metrics.AddCounter(name, "", labels).value();
  };
  result.evictions = counter("tidepool_pool_evictions_total", {{"reason", "capacity"}});
  result.session_turns = counter("tidepool_pool_session_turns_total", {});
  return result;
}

}  // namespace tidepool
