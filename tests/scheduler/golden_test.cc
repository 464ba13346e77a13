#include <gtest/gtest.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>

#include "tests/scheduler/cluster_builder.h"

// Runs every script in tests/golden/scheduler: one event a line, the core's whole answer below it in lines
// that begin with "> ". Regenerate with TIDEPOOL_UPDATE_GOLDEN=1 and review the difference.
//
//   option NAME VALUE             before the first event: slo_ttft, slo_itl (s), local_prefill_tokens,
//                                 max_inflight
//   at MS                         the time of what follows
//   report ID [key=value...]      role, boot, seq (default: one more), draining, free/total, run, wait, queue
//                                 (tokens), ctx, add=CHAIN:N, del=CHAIN:FROM-TO, snapshot, prefilled=ID,
//                                 prefill=NEW,CACHED,SECONDS decode=BATCH,CTX,SECONDS fetch=BYTES,SECONDS,
//                                 fingerprint
//   place|explain ID tokens=N [chain=NAME] [max=N] [exclude=ID]
//   finish ID | tick | workers
namespace tidepool {
namespace {

class Script {
 public:
  std::string Run(const std::string& line) {
    std::istringstream in(line);
    std::string verb, id;
    in >> verb;
    if (verb != "tick" && verb != "workers") in >> id;
    std::multimap<std::string, std::string> args;
    for (std::string word; in >> word;) {
      const auto eq = word.find('=');
      args.emplace(word.substr(0, eq), eq == std::string::npos ? "1" : word.substr(eq + 1));
    }
    if (verb == "option") return Option(id, args.begin()->first);
    if (!core_) core_.emplace(options_);
    if (verb == "at") return now_ = kStart + absl::Milliseconds(std::stod(id)), "";
    if (verb == "report") return Report(id, args);
    if (verb == "place") return Show(core_->Place(Request(id, args), now_));
    if (verb == "explain") return Show(core_->Explain(Request(id, args), now_));
    if (verb == "finish") return core_->Finish(id, now_) ? "> finished\n" : "> nothing booked\n";
    if (verb == "tick") return Tick();
    if (verb == "workers") return Workers();
    return "> unknown verb " + verb + "\n";
  }

 private:
  using Args = std::multimap<std::string, std::string>;

  static std::vector<double> Numbers(const std::string& s) {
    std::vector<double> out;
    std::istringstream in(s);
    for (std::string part; std::getline(in, part, ',');) out.push_back(std::stod(part));
    return out;
  }
  static std::string Fixed(double v) {
    char buf[32];
    std::snprintf(buf, sizeof buf, "%.6f", v);
    return buf;
  }

  std::string Option(const std::string& name, const std::string& value) {
    if (name == "slo_ttft") options_.slo_ttft = absl::Seconds(std::stod(value));
    if (name == "slo_itl") options_.slo_itl = absl::Seconds(std::stod(value));
    if (name == "local_prefill_tokens")
      options_.local_prefill_tokens = static_cast<uint32_t>(std::stoul(value));
    if (name == "max_inflight") options_.max_inflight = static_cast<uint32_t>(std::stoul(value));
    return "";
  }

  std::string Report(const std::string& id, const Args& args) {
    WorkerReport& known = last_.try_emplace(id, TestReport(id, Role::kBoth, 0)).first->second;
    WorkerReport r = known;
    ++r.seq;
    r.snapshot = r.seq == 1;
    for (const auto& [k, v] : args) {
      const auto u = [&v = v] { return std::stoull(v); };
      if (k == "role") r.role = v == "prefill" ? Role::kPrefill : v == "decode" ? Role::kDecode : Role::kBoth;
      if (k == "boot") r.address.boot_id = v;
      if (k == "seq") r.seq = u();
      if (k == "draining") r.draining = u() != 0;
      if (k == "free") r.load.slots_free = static_cast<uint32_t>(u());
      if (k == "total") r.load.slots_total = static_cast<uint32_t>(u());
      if (k == "run") r.load.running = static_cast<uint32_t>(u());
      if (k == "wait") r.load.waiting = static_cast<uint32_t>(u());
      if (k == "queue") r.load.queued_prefill_tokens = u();
      if (k == "ctx") r.load.running_context_tokens = u();
      if (k == "fingerprint") r.model.fingerprint = v;
    }
    known = r;
    for (const auto& [k, v] : args) {
      if (k == "snapshot") r.snapshot = v == "1";
      if (k == "prefilled") r.prefilled.push_back(v);
      if (k == "add" || k == "del") AddEvents(r, v, k == "del");
      if (k == "prefill") {
        const auto n = Numbers(v);
        r.prefills.push_back({static_cast<uint32_t>(n[0]), static_cast<uint32_t>(n[1]), n[2]});
      }
      if (k == "decode") {
        const auto n = Numbers(v);
        r.decodes.push_back({static_cast<uint32_t>(n[0]), static_cast<uint64_t>(n[1]), n[2]});
      }
      if (k == "fetch") {
        const auto n = Numbers(v);
        r.fetches.push_back({static_cast<uint64_t>(n[0]), n[1]});
      }
    }
    const ReportResult result = core_->Report(r, now_);
    if (!result.status.ok()) return "> refused: " + std::string(result.status.message()) + "\n";
    return std::string("> ok") + (result.registered ? " registered" : "") + (result.resync ? " resync" : "") +
           "\n";
  }

  // CHAIN:TO or CHAIN:FROM-TO, half open.
  static void AddEvents(WorkerReport& r, const std::string& range, bool removed) {
    const auto colon = range.find(':'), dash = range.find('-', colon);
    const uint32_t from = dash == std::string::npos
                              ? 0
                              : static_cast<uint32_t>(std::stoul(range.substr(colon + 1, dash - colon - 1)));
    const auto to =
        static_cast<uint32_t>(std::stoul(range.substr(dash == std::string::npos ? colon + 1 : dash + 1)));
    for (uint32_t i = from; i < to; ++i) r.events.push_back({ChainKey(range.substr(0, colon), i), removed});
  }

  static PlaceRequest Request(const std::string& id, const Args& args) {
    const auto get = [&](const char* k, const char* fallback) {
      const auto it = args.find(k);
      return it == args.end() ? std::string(fallback) : it->second;
    };
    PlaceRequest r =
        TestRequest(id, static_cast<uint32_t>(std::stoul(get("tokens", "1"))), get("chain", "x"));
    r.max_tokens = static_cast<uint32_t>(std::stoul(get("max", "64")));
    for (auto [it, end] = args.equal_range("exclude"); it != end; ++it)
      r.exclude_workers.push_back(it->second);
    return r;
  }

  static std::string Show(const PlaceResult& result) {
    std::string out;
    for (const Candidate& c : result.candidates) {
      out += "> " + std::string(c.chosen ? "* " : "- ") + std::string(c.kind) + " " + c.worker_id +
             " cached " + std::to_string(c.cached_tokens) + " fetched " + std::to_string(c.fetched_tokens) +
             " queue " + Fixed(c.queue_seconds) + " fetch " + Fixed(c.fetch_seconds) + " compute " +
             Fixed(c.compute_seconds) + " total " + Fixed(c.total_seconds) + " itl " + Fixed(c.itl_seconds) +
             (c.note.empty() ? "" : " (" + c.note + ")") + "\n";
    }
    if (result.rejection) {
      const Rejection& r = *result.rejection;
      return out + "> rejected " + std::string(r.kind) + ": " + r.reason + " | ttft " +
             Fixed(r.ttft_seconds) + " itl " + Fixed(r.itl_seconds) + " retry after " +
             std::to_string(r.retry_after_seconds) + " s\n";
    }
    if (!result.placement) return out + "> " + result.status.ToString() + "\n";
    const Placement& p = *result.placement;
    out += "> prefill " + (p.prefill ? p.prefill->worker_id : std::string("local")) + " decode " +
           p.decode.worker_id + " cached " + std::to_string(p.expected_cached_tokens) + " ttft " +
           Fixed(p.ttft_seconds) + " itl " + Fixed(p.itl_seconds) + "\n";
    for (const PrefixHolder& h : p.holders)
      out += ">   blocks [" + std::to_string(h.begin) + ", " + std::to_string(h.end) + ") from " +
             h.worker.worker_id + "\n";
    return out + ">   " + p.reason + "\n";
  }

  std::string Tick() {
    std::string out;
    for (const std::string& id : core_->Tick(now_)) out += "> lost " + id + "\n";
    return out + "> " + std::to_string(core_->inflight()) + " in flight\n";
  }

  std::string Workers() {
    std::string out;
    for (const WorkerView& w : core_->Workers(now_))
      out += "> " + w.address.worker_id + " " + std::string(RoleName(w.role)) + " " +
             std::string(WorkerStateName(w.state)) + " boot " + w.address.boot_id + " blocks " +
             std::to_string(w.indexed_blocks) + " reported " +
             std::to_string(absl::ToInt64Milliseconds(w.since_report)) + " ms ago\n";
    return out;
  }

  SchedulerOptions options_;
  std::optional<SchedulerCore> core_;
  absl::Time now_ = kStart;
  std::map<std::string, WorkerReport> last_;
};

TEST(SchedulerGolden, EveryScriptGivesTheRecordedDecisions) {
  const bool update = std::getenv("TIDEPOOL_UPDATE_GOLDEN") != nullptr;
  size_t scripts = 0;
  for (const auto& entry : std::filesystem::directory_iterator("tests/golden/scheduler")) {
    if (entry.path().extension() != ".txt") continue;
    ++scripts;
    std::ifstream in(entry.path());
    std::string recorded, replayed;
    Script script;
    for (std::string line; std::getline(in, line);) {
      recorded += line + "\n";
      if (line.starts_with("> ") || line.starts_with(">")) continue;
      replayed += line + "\n";
      if (!line.empty() && line[0] != '#') replayed += script.Run(line);
    }
    in.close();
    if (update) {
      std::ofstream(entry.path()) << replayed;
    } else {
      EXPECT_EQ(replayed, recorded) << entry.path() << " (TIDEPOOL_UPDATE_GOLDEN=1 records it anew)";
    }
  }
  EXPECT_GE(scripts, 4u);
}

}  // namespace
}  // namespace tidepool
