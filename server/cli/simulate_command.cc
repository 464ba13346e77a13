// `tidepool simulate`: the flags of tools/simulate, its progress and its tables.
#include "server/cli/simulate_command.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <map>
#include <memory>
#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "base/clock.h"
#include "base/status.h"
#include "kvstore/policy/policy.h"
#include "server/cli/config_flags.h"
#include "server/cli/output.h"
#include "tools/simulate/plot.h"
#include "tools/simulate/sweep.h"

namespace tidepool {
namespace {

using nlohmann::ordered_json;

struct Settings {
  std::string trace, profile = "llama-3-70b-a800", plot, output = "table";
  uint32_t block_tokens = 0;
  std::map<std::string, std::string> values;  // of the keys that a sweep can vary, too
  std::vector<std::string> sweeps;
  unsigned jobs = 1;
  // Of synthetic loads.
  std::string input = "lognormal:2000,1", answers = "lognormal:200,0.7", turns = "1", system = "0",
              tenants = "default";
  double think = 30, interactive_share = 0, batch_share = 0;
  FaultOptions faults;
};

// ProgressBar: a line on a terminal, moved on; nothing elsewhere.
class ProgressBar {
 public:
  ~ProgressBar() { Clear(); }
  void Show(size_t done, size_t runs, double share) {
    const absl::Time now = Clock::Real().Now();
    if (!terminal_ || now < next_) return;
    next_ = now + absl::Milliseconds(200);
    const int filled = static_cast<int>(std::clamp(share, 0.0, 1.0) * kCells);
    std::string text = absl::StrFormat("%.0f%%", share * 100);
    if (runs > 1) absl::StrAppendFormat(&text, ", %d of %d runs", done, runs);
    const absl::Duration elapsed = now - began_;
    if (share > 0.02) {
      absl::StrAppend(&text, ", ",
                      absl::FormatDuration(absl::Trunc(elapsed * ((1 - share) / share), absl::Seconds(1))),
                      " left");
    }
    std::fprintf(stderr, "\r\x1b[K[%s%s] %s", std::string(static_cast<size_t>(filled), '#').c_str(),
                 std::string(static_cast<size_t>(kCells - filled), '.').c_str(), text.c_str());
    shown_ = true;
  }
  void Clear() {
    if (shown_) std::fputs("\r\x1b[K", stderr);
    shown_ = false;
  }

 private:
  static constexpr int kCells = 24;
  const bool terminal_ = ::isatty(STDERR_FILENO) == 1;
  const absl::Time began_ = Clock::Real().Now();
  absl::Time next_ = began_ + absl::Milliseconds(500);
  bool shown_ = false;
};

absl::StatusOr<SimPlan> MakePlan(const Settings& s) {
  SimPlan plan;
  TP_ASSIGN_OR_RETURN(plan.profile, LoadProfile(s.profile, TIDEPOOL_SOURCE_DIR));
  if (s.block_tokens > 0) {
    // The same memory in blocks of another size.
    const uint64_t tokens = uint64_t{plan.profile.pool_blocks} * plan.profile.layout.block_tokens;
    plan.profile.layout.block_tokens = s.block_tokens;
    plan.profile.pool_blocks = static_cast<uint32_t>(std::max<uint64_t>(1, tokens / s.block_tokens));
  }
  plan.trace = s.trace;
  plan.sim.scheduler.slo_ttft = absl::Seconds(plan.profile.slo_ttft_seconds);
  plan.sim.scheduler.slo_itl = absl::Seconds(plan.profile.slo_itl_seconds);
  // What a cluster of any size may have under way; a real one is told by its operator.
  plan.sim.scheduler.max_inflight = 1u << 20;
  plan.sim.faults = s.faults;
  SyntheticOptions& mix = plan.synthetic;
  for (const auto& [flag, text, spec] :
       {std::tuple("input", &s.input, &mix.input), std::tuple("output-tokens", &s.answers, &mix.output),
        std::tuple("turns", &s.turns, &mix.turns), std::tuple("system-prompt", &s.system, &mix.system)}) {
    auto parsed = *text == "0" ? absl::StatusOr<LengthSpec>(LengthSpec::Fixed(0)) : LengthSpec::Parse(*text);
    if (!parsed.ok()) return Annotate(parsed.status(), absl::StrCat("--", flag));
    *spec = *std::move(parsed);
  }
  TP_ASSIGN_OR_RETURN(mix.tenants, ParseTenantShares(s.tenants));
  mix.think_seconds = s.think;
  mix.interactive_share = s.interactive_share;
  mix.batch_share = s.batch_share;
  for (const auto& [key, value] : s.values) {
    if (const absl::Status status = Set(plan, key, value); !status.ok()) return Annotate(status, "--" + key);
  }
  return plan;
}

std::string Figure(double value) {
  if (value >= 1000) return absl::StrFormat("%.0f", value);
  return absl::StrFormat(value >= 10 ? "%.1f" : "%.3g", value);
}

std::string ToTable(const std::vector<SimResult>& results, const std::vector<SweepKey>& keys) {
  std::vector<std::string> header;
  for (const SweepKey& key : keys) header.push_back(key.key);
  for (const char* column : {"REQUESTS", "DONE", "REJECTED", "FAILED", "GOOD/S", "HIT", "TTFT MEAN", "P50",
                             "P90", "P99 s", "ITL P50", "P90", "P99 ms", "WALL s"})
    header.emplace_back(column);
  std::vector<std::vector<std::string>> rows;
  for (const SimResult& r : results) {
    std::vector<std::string>& row = rows.emplace_back();
    for (const SweepKey& key : keys) row.push_back(r.settings.at(key.key));
    const Distribution ttft = Describe(r.all.ttft), itl = Describe(r.gaps);
    for (const uint64_t n : {r.all.requests, r.all.completed, r.all.rejected, r.all.failed})
      row.push_back(absl::StrCat(n));
    row.push_back(Figure(r.goodput()));
    row.push_back(absl::StrFormat("%.1f%%", r.hit_rate() * 100));
    for (const double t : {ttft.mean, ttft.p50, ttft.p90, ttft.p99}) row.push_back(Figure(t));
    for (const double t : {itl.p50, itl.p90, itl.p99}) row.push_back(Figure(t * 1e3));
    row.push_back(Figure(r.wall_seconds));
  }
  return FormatTable(header, rows);
}

// Of one run: its tenants and classes, where there are several, and why requests were refused.
std::string Details(const SimResult& r) {
  std::string out;
  std::vector<std::vector<std::string>> rows;
  const auto add = [&](const std::string& name, const GroupResult& g) {
    const Distribution ttft = Describe(g.ttft), itl = Describe(g.itl);
    rows.push_back({name, absl::StrCat(g.requests), absl::StrCat(g.completed), absl::StrCat(g.rejected),
                    absl::StrCat(g.good), Figure(ttft.p50), Figure(ttft.p99), Figure(itl.p50 * 1e3),
                    Figure(itl.p99 * 1e3)});
  };
  if (r.tenants.size() > 1) {
    for (const auto& [tenant, group] : r.tenants) add(tenant, group);
  }
  for (size_t c = 0; c < kSloClasses; ++c) {
    if (r.classes[c].requests > 0 && r.classes[c].requests < r.all.requests)
      add(std::string(SloClassName(static_cast<SloClass>(c))), r.classes[c]);
  }
  if (!rows.empty())
    out += "\n" + FormatTable({"OF WHICH", "REQUESTS", "DONE", "REJECTED", "GOOD", "TTFT P50", "P99 s",
                               "ITL P50", "P99 ms"},
                              rows);
  std::vector<std::string> why;
  for (const auto& [kind, n] : r.rejections) why.push_back(absl::StrCat(n, " ", kind));
  if (!why.empty()) absl::StrAppend(&out, "\nrejected for: ", absl::StrJoin(why, ", "), "\n");
  const Distribution ttft = Describe(r.ttft_error), itl = Describe(r.itl_error);
  absl::StrAppendFormat(
      &out,
      "\nprediction error (share of what was measured): TTFT p50 %.3f, p90 %.3f; ITL p50 %.3f, "
      "p90 %.3f\n%d decisions of %.1f us, %d reports, %d events; %.0f s simulated\n",
      ttft.p50, ttft.p90, itl.p50, itl.p90, r.decisions,
      r.decisions > 0 ? r.place_seconds * 1e6 / static_cast<double>(r.decisions) : 0, r.reports, r.events,
      r.simulated_seconds);
  return out;
}

absl::Status WriteFile(const std::string& path, const std::string& text) {
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  file << text;
  file.close();
  if (!file) return absl::UnavailableError(absl::StrCat("--plot: ", path, " could not be written"));
  return absl::OkStatus();
}

absl::StatusOr<int> RunIt(const Settings& settings) {
  TP_ASSIGN_OR_RETURN(const SimPlan plan, MakePlan(settings));
  std::vector<SweepKey> keys;
  for (const std::string& sweep : settings.sweeps) {
    TP_ASSIGN_OR_RETURN(keys.emplace_back(), ParseSweepKey(sweep));
  }
  ProgressBar bar;
  TP_ASSIGN_OR_RETURN(const std::vector<SimResult> results,
                      RunSweep(plan, keys, settings.jobs,
                               [&](size_t done, size_t runs, double share) { bar.Show(done, runs, share); }));
  bar.Clear();
  if (!settings.plot.empty()) {
    std::vector<std::string> names;
    for (const SweepKey& key : keys) names.push_back(key.key);
    TP_RETURN_IF_ERROR(
        WriteFile(settings.plot, RenderSvg(keys.empty() ? ChartsOf(results[0]) : ChartsOf(results, names))));
  }
  if (settings.output == "json") {
    ordered_json out = ordered_json::array();
    for (const SimResult& r : results) out.push_back(ToJson(r));
    PrintJson(keys.empty() ? out[0] : out);
    return 0;
  }
  std::fputs(ToTable(results, keys).c_str(), stdout);
  if (keys.empty()) std::fputs(Details(results[0]).c_str(), stdout);
  return 0;
}

template <typename Enum>
std::string Names(size_t n, std::string_view (*name)(Enum)) {
  std::vector<std::string> out;
  for (size_t i = 0; i < n; ++i) out.emplace_back(name(static_cast<Enum>(i)));
  return absl::StrJoin(out, ", ");
}

}  // namespace

void AddSimulateCommand(CLI::App& app, Command& run) {
  CLI::App* command = app.add_subcommand(
      "simulate",
      "Replay a trace, or a made-up mix, on a cluster that is simulated: the scheduler, the pool's policy "
      "and\n"
      "the engine's batching are the ones that ship; how fast workers and links are says a profile.");
  const auto s = std::make_shared<Settings>();
  const auto keyed = [&](const char* key, std::string help, const char* group) {
    command
        ->add_option_function<std::string>(
            absl::StrCat("--", key), [s, key](const std::string& value) { s->values[key] = value; },
            std::move(help))
        ->group(group);
  };
  const char* load = "Load";
  command
      ->add_option(
          "--trace", s->trace,
          "A trace: Mooncake's jsonl (with hash_ids), BurstGPT's or Azure's csv. Without one, a mix\n"
          "is made up")
      ->group(load);
  keyed("speed", "The trace's arrivals come so many times as fast (1)", load);
  keyed("requests", "The trace's first so many; of a mix: how many (10000)", load);
  keyed("length-scale", "Factor of all token counts of the trace, and of its blocks (1)", load);
  keyed("rate", "Mix: requests a second (10)", load);
  keyed("burst", "Mix: coefficient of variation of the gaps between sessions (1: Poisson)", load);
  command
      ->add_option("--input", s->input,
                   "Mix: new tokens of a turn: 128, 64-256, normal:128,32, lognormal:128,0.8")
      ->capture_default_str()
      ->group(load);
  command->add_option("--output-tokens", s->answers, "Mix: tokens of an answer, written likewise")
      ->capture_default_str()
      ->group(load);
  command->add_option("--turns", s->turns, "Mix: turns of a session, each after all that was said before")
      ->capture_default_str()
      ->group(load);
  command->add_option("--think", s->think, "Mix: seconds between an answer and the next turn, on average")
      ->capture_default_str()
      ->group(load);
  command->add_option("--system-prompt", s->system, "Mix: tokens that all prompts of a tenant begin with")
      ->capture_default_str()
      ->group(load);
  command->add_option("--tenants", s->tenants, "Mix: names with weights: a:10,b:1")
      ->capture_default_str()
      ->group(load);
  command->add_option("--interactive-share", s->interactive_share, "Mix: requests of the interactive class")
      ->check(CLI::Range(0.0, 1.0))
      ->group(load);
  command->add_option("--batch-share", s->batch_share, "Mix: requests of the batch class")
      ->check(CLI::Range(0.0, 1.0))
      ->group(load);

  const char* cluster = "Cluster";
  command
      ->add_option("--profile", s->profile,
                   "What a worker is: a name of config/profiles, or the path of such a file")
      ->capture_default_str()
      ->group(cluster);
  keyed("prefill", "Workers that prefill", cluster);
  keyed("decode", "Workers that decode", cluster);
  keyed("both", "Workers that do both", cluster);
  keyed("pd", "Prefill and decode workers at once: 8:8", cluster);
  keyed("pool-blocks", "KV blocks of each worker (the profile's)", cluster);
  command
      ->add_option("--block-tokens", s->block_tokens, "Tokens of a block (the profile's, in the same memory)")
      ->group(cluster);
  keyed("report-interval", "Between a worker's reports (100ms)", cluster);

  const char* policy = "Policies";
  keyed("policy", absl::StrCat("Placement: ", Names(kPlacementPolicies, PlacementPolicyName)), policy);
  keyed("admission", absl::StrCat("Refusals: ", Names(kAdmissionPolicies, AdmissionPolicyName)), policy);
  keyed("fairness", absl::StrCat("Between tenants: ", Names(2, FairnessPolicyName)), policy);
  keyed("order",
        absl::StrCat("What begins next in an engine, between tenants: ", Names(kQueueOrders, QueueOrderName),
                     " (vtc)"),
        policy);
  const auto evictions = PolicyNames();
  keyed("eviction",
        absl::StrCat("What leaves a pool first: ",
                     absl::StrJoin(std::vector<std::string>(evictions.begin(), evictions.end()), ", ")),
        policy);
  keyed("hot-copies", "Workers that are to hold a block in much use; 1: no copies (2)", policy);
  keyed("elasticity",
        absl::StrCat("Workers change between prefill and decode: ",
                     Names(kElasticityModes, ElasticityModeName), " (off)"),
        policy);
  keyed("elasticity-dwell", "So long one kind is short before a worker of the other changes (10s)", policy);
  keyed("peer-fetch", "on, off: whether prefixes are fetched from other workers (on)", policy);
  keyed("oracle-lengths", "on, off: the scheduler knows how long answers get (off)", policy);
  keyed("max-tokens", "What clients ask for where answers are shorter (2048)", policy);
  keyed("slo-ttft", "Objective of the time to the first token (the profile's)", policy);
  keyed("slo-itl", "Objective of the mean time between tokens (the profile's)", policy);

  const char* faults = "Faults";
  FaultOptions& f = s->faults;
  command
      ->add_option("--worker-crash-every", f.worker_crash_every_seconds,
                   "Seconds between two crashes of a worker, on average; 0: none")
      ->check(CLI::Range(0.0, 1e9))
      ->group(faults);
  command->add_option("--worker-down", f.worker_down_seconds, "Seconds until it is back, empty")
      ->check(CLI::Range(0.0, 1e9))
      ->capture_default_str()
      ->group(faults);
  command->add_option("--scheduler-crash-every", f.scheduler_crash_every_seconds, "The same of the scheduler")
      ->check(CLI::Range(0.0, 1e9))
      ->group(faults);
  command->add_option("--scheduler-down", f.scheduler_down_seconds, "Seconds until it is back, empty")
      ->check(CLI::Range(0.0, 1e9))
      ->capture_default_str()
      ->group(faults);
  command->add_option("--report-loss", f.report_loss, "Share of the reports that do not arrive")
      ->check(CLI::Range(0.0, 0.99))
      ->group(faults);
  command->add_option("--report-delay", f.report_delay_seconds, "Seconds that a report may be late, at most")
      ->check(CLI::Range(0.0, 3600.0))
      ->group(faults);

  const char* runs = "Runs";
  keyed("seed", "Equal seeds, equal runs (1)", runs);
  command
      ->add_option(
          "--sweep", s->sweeps,
          absl::StrCat("KEY=a,b,c: a run for each value; may be given again, for all combinations. Keys: ",
                       absl::StrJoin(SweepKeys(), ", ")))
      ->group(runs);
  command->add_option("--jobs", s->jobs, "Runs of a sweep at a time, each on one thread")
      ->check(CLI::Range(1, 1024))
      ->capture_default_str()
      ->group(runs);
  command->add_option("-o,--output", s->output, "table or json")
      ->check(CLI::IsMember({"table", "json"}))
      ->capture_default_str()
      ->group(runs);
  command->add_option("--plot", s->plot, "Write charts to this SVG file")->group(runs);
  command->callback([&run, s] {
    run = [s]() -> int {
      const absl::StatusOr<int> code = RunIt(*s);
      if (code.ok()) return *code;
      return ReportError(code.status());
    };
  });
}

}  // namespace tidepool
