// `tidepool bench kv`: how fast KV moves on this machine, beside what the machine can do.
#include <cstdio>
#include <memory>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/log.h"
#include "server/bench/kv_bench.h"
#include "server/cli/commands.h"
#include "server/cli/config_flags.h"
#include "server/cli/output.h"

namespace tidepool {
namespace {

using nlohmann::ordered_json;

struct Settings {
  KvBenchOptions options;
  std::vector<std::string> suites;
  std::string output = "table";
};

// A list of {name, value, unit, reference, ratio}: the last two null where nothing stands beside the value.
ordered_json ToJson(const std::vector<BenchRow>& rows) {
  ordered_json out = ordered_json::array();
  for (const BenchRow& row : rows) {
    const bool compared = !row.reference_name.empty();
    out.push_back({{"name", row.name},
                   {"value", row.value},
                   {"unit", row.unit},
                   {"reference", compared ? ordered_json(row.reference) : ordered_json()},
                   {"ratio", compared ? ordered_json(row.ratio) : ordered_json()},
                   {"reference_name", compared ? ordered_json(row.reference_name) : ordered_json()}});
  }
  return out;
}

std::string ToTable(const std::vector<BenchRow>& rows) {
  std::vector<std::vector<std::string>> cells;
  for (const BenchRow& row : rows) {
    const bool compared = !row.reference_name.empty();
    cells.push_back({row.name, absl::StrFormat("%.4g", row.value), row.unit,
                     compared ? absl::StrFormat("%.4g", row.reference) : "",
                     compared ? absl::StrFormat("%.3f", row.ratio) : "", row.reference_name});
  }
  return FormatTable({"NAME", "VALUE", "UNIT", "REFERENCE", "RATIO", "MEASURED BESIDE"}, cells);
}

int Run(const Settings& settings) {
  // On stderr; and the rooms' own accounts of what they do are no result.
  if (const absl::Status s = InitLogging("bench", "warn"); !s.ok()) return ReportError(s);
  const auto rows = RunKvBench(settings.suites, settings.options, [](std::string_view suite) {
    std::fprintf(stderr, "measuring %s ...\n", std::string(suite).c_str());
  });
  if (!rows.ok()) return ReportError(rows.status());
  if (settings.output == "json") {
    PrintJson(ToJson(*rows));
  } else {
    std::fputs(ToTable(*rows).c_str(), stdout);
  }
  return 0;
}

}  // namespace

void AddBenchKvCommand(CLI::App& bench, Command& run) {
  std::string suites = "Which paths to measure (default: all that have what they need):";
  std::vector<std::string> names;
  for (const KvBenchSuite& suite : KvBenchSuites()) {
    absl::StrAppend(&suites, "\n  ", std::string(suite.name), ": ", std::string(suite.help));
    names.emplace_back(suite.name);
  }
  CLI::App* kv = bench.add_subcommand("kv",
                                      "How fast KV blocks move here, each figure beside what the machine "
                                      "does with the same bytes in the same\n"
                                      "run. Read the ratios: the figures are this machine's, now.");
  const auto settings = std::make_shared<Settings>();
  KvBenchOptions& o = settings->options;
  kv->add_option("--suite", settings->suites, suites)->delimiter(',')->check(CLI::IsMember(names));
  kv->add_option("--block-bytes", o.block_bytes, "Size of a block, a multiple of 16 KiB")
      ->check(CLI::Range(size_t{16} << 10, size_t{64} << 20))
      ->capture_default_str();
  kv->add_option("--bytes", o.bytes, "Distinct bytes of a pass: more than the caches hold")
      ->check(CLI::Range(size_t{1} << 20, size_t{16} << 30))
      ->capture_default_str();
  kv->add_option("--rounds", o.rounds, "Medians of so many")
      ->check(CLI::Range(1, 1000))
      ->capture_default_str();
  kv->add_option("--index-blocks", o.index_blocks,
                 "index: blocks in the pool, about 500 bytes of memory each")
      ->check(CLI::Range(1000u, 200'000'000u))
      ->capture_default_str();
  kv->add_option("--disk-path", o.disk_path, "disk: a directory on the disk to measure");
  kv->add_option("--model", o.model, "codec: the demo model's directory (tools/demo_model/model)");
  kv->add_option("--trace", o.trace, "policy: a trace in Mooncake's format");
  kv->add_option("-o,--output", settings->output, "table or json")
      ->check(CLI::IsMember({"table", "json"}))
      ->capture_default_str();
  kv->callback([&run, settings] { run = [settings]() -> int { return Run(*settings); }; });
}

}  // namespace tidepool
