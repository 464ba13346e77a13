#include "server/bench/kv_bench.h"

#include <algorithm>
#include <filesystem>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "base/status.h"
#include "kvstore/bench/arena_bench.h"
#include "kvstore/bench/handoff_bench.h"
#include "kvstore/bench/host_bench.h"
#include "kvstore/disk/disk_bench.h"
#include "kvstore/policy/replay.h"
#include "server/bench/kv_codec_quality.h"
#include "server/worker/worker_bench.h"
#include "transport/bench/transport_bench.h"

namespace tidepool {
namespace {

using Rows = absl::StatusOr<std::vector<BenchRow>>;

bool Always(const KvBenchOptions&) { return true; }

size_t Blocks(const KvBenchOptions& o) { return std::max<size_t>(o.bytes / o.block_bytes, 1); }

Rows MeasureArena(const KvBenchOptions&) { return RunArenaBench({}); }

Rows MeasureTransport(const KvBenchOptions& o) {
  return RunTransportBench({.block_bytes = o.block_bytes, .pass_bytes = o.bytes, .rounds = o.rounds});
}

Rows MeasureHandoff(const KvBenchOptions& o) {
  return RunHandoffBench({.block_bytes = o.block_bytes, .pass_bytes = o.bytes, .rounds = o.rounds});
}

Rows MeasureStreaming(const KvBenchOptions& o) { return BenchLayerStreaming({.rounds = o.rounds}); }

Rows MeasureLoad(const KvBenchOptions& o) { return BenchLoadOrRecompute({.rounds = o.rounds}); }

Rows MeasureHost(const KvBenchOptions& o) {
  return RunHostBench({.block_bytes = o.block_bytes, .blocks = Blocks(o), .rounds = o.rounds});
}

Rows MeasureIndex(const KvBenchOptions& o) { return RunIndexBench({.blocks = o.index_blocks}); }

Rows MeasureDisk(const KvBenchOptions& o) {
  DiskBenchOptions disk;
  disk.path = o.disk_path.empty() ? std::filesystem::temp_directory_path().string() : o.disk_path;
  disk.block_bytes = o.block_bytes;
  disk.blocks = Blocks(o);
  disk.rounds = o.rounds;
  return RunDiskBench(disk);
}

// A figure that has nothing beside it.
BenchRow Alone(std::string name, double value, std::string unit) {
  return {.name = std::move(name), .value = value, .unit = std::move(unit)};
}

BenchRow Beside(std::string name, double value, std::string unit, std::string reference_name,
                double reference) {
  return {std::move(name), value, std::move(unit), std::move(reference_name), reference, value / reference};
}

Rows MeasurePolicy(const KvBenchOptions& o) {
  TP_ASSIGN_OR_RETURN(BlockTrace trace, ReadMooncakeTrace(o.trace));
  RecogniseSessions(trace);
  std::vector<BenchRow> rows;
  for (const uint32_t slots : {1000u, 3000u, 5859u, 10000u, 30000u}) {
    double lru = 0;
    for (const std::string policy : {"lru", "lfu", "s3-fifo", "gdsf", "pgdsf", "turn-aware", "belady"}) {
      TP_ASSIGN_OR_RETURN(const ReplayResult result, ReplayTrace(trace, {.slots = slots, .policy = policy}));
      const std::string name = absl::StrCat("blocks hit by ", policy, ", room for ", slots);
      if (policy == "lru") lru = result.hit_rate();
      rows.push_back(policy == "lru" ? Alone(name, lru, "share")
                                     : Beside(name, result.hit_rate(), "share", "lru", lru));
    }
  }
  return rows;
}

Rows MeasureCodec(const KvBenchOptions& o) {
  KvCodecQualityOptions quality;
  quality.model = o.model;
  TP_ASSIGN_OR_RETURN(const std::vector<KvCodecQualityRow> measured, MeasureKvCodecQuality(quality));
  std::vector<BenchRow> rows;
  for (const KvCodecQualityRow& m : measured) {
    const std::string name = absl::StrCat(m.codec, " at ", m.context, " tokens: ");
    rows.push_back(
        Beside(name + "bytes of a token", m.bytes_per_token, "bytes", "exact", m.bytes_per_token * m.ratio));
    rows.push_back(Alone(name + "encode a block", m.encode_ms, "ms"));
    rows.push_back(Alone(name + "decode a block", m.decode_ms, "ms"));
    rows.push_back(Beside(name + "right answers", m.first.right, "share", "exact", m.first.right_exact));
    rows.push_back(Beside(name + "right answers to a second question", m.second.right, "share", "exact",
                          m.second.right_exact));
  }
  return rows;
}

}  // namespace

const std::vector<KvBenchSuite>& KvBenchSuites() {
  static const std::vector<KvBenchSuite> suites = {
      // Those that fork come first: before there are threads.
      {"arena", "blocks that another process of this host takes in place", Always, MeasureArena},
      {"transport", "bulk messages between two processes, beside memcpy and UCX's own", Always,
       MeasureTransport},
      {"handoff", "verified fetches of blocks over the transports", Always, MeasureHandoff},
      {"host", "put and get of the host tier, beside memcpy", Always, MeasureHost},
      {"index", "lookup and lease of a long prefix in a large pool", Always, MeasureIndex},
      {"disk", "load and store of the disk tier, beside fio (--disk-path)", Always, MeasureDisk},
      {"streaming", "first token of a prompt of one chunk over 1 Gbit/s, layer by layer and after it", Always,
       MeasureStreaming},
      {"load", "first token of a prompt that a slow peer holds, beside computing it", Always, MeasureLoad},
      {"policy", "hit rates of the eviction policies on a trace (--trace)",
       [](const KvBenchOptions& o) { return !o.trace.empty(); }, MeasurePolicy},
      {"codec", "bytes, time and lost answers of the KV codecs (--model)",
       [](const KvBenchOptions& o) { return !o.model.empty(); }, MeasureCodec},
  };
  return suites;
}

Rows RunKvBench(const std::vector<std::string>& names, const KvBenchOptions& options,
                const std::function<void(std::string_view)>& progress) {
  for (const std::string& name : names) {
    const bool known = std::any_of(KvBenchSuites().begin(), KvBenchSuites().end(),
                                   [&](const KvBenchSuite& suite) { return suite.name == name; });
    if (!known) return absl::InvalidArgumentError("there is no suite '" + name + "'");
  }
  std::vector<BenchRow> rows;
  for (const KvBenchSuite& suite : KvBenchSuites()) {
    const bool named = std::find(names.begin(), names.end(), suite.name) != names.end();
    if (names.empty() ? !suite.ready(options) : !named) continue;
    if (!suite.ready(options)) {
      return absl::InvalidArgumentError(
          absl::StrCat("suite ", std::string(suite.name), " needs more: ", std::string(suite.help)));
    }
    progress(suite.name);
    Rows more = suite.run(options);
    if (!more.ok()) return Annotate(more.status(), std::string(suite.name));
    std::move(more->begin(), more->end(), std::back_inserter(rows));
  }
  return rows;
}

}  // namespace tidepool
