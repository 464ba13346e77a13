// What a decision costs: decisions a second and their percentiles on one core, and the memory of the prefix
// index. Source of the figures in scheduler/README.md.
//
//   placement_bench [--workers=1000] [--inflight=4000] [--blocks=1000000] [--decisions=50000]
//
// Half of the workers prefill, half decode, all of them measured, loaded and reporting (a tenth of a second's
// reports come in per thousand decisions). Prompts are made as in a conversation trace: a system prompt of 16
// blocks that every worker holds, and up to 512 blocks of history that one to three hold, or nobody (one in
// three). Each placed request ends after `inflight` others.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <string>

#include "tests/scheduler/cluster_builder.h"

namespace tidepool {
namespace {

using SteadyClock = std::chrono::steady_clock;

double Seconds(SteadyClock::duration d) { return std::chrono::duration<double>(d).count(); }

struct Flags {
  size_t workers = 1000, inflight = 4000, blocks = 1'000'000, decisions = 50'000;
};

class Bench {
 public:
  explicit Bench(const Flags& flags) : flags_(flags), core_(Options(flags)) {
    for (uint32_t i = 0; i < flags.workers; ++i) {
      auto r = Report(i, 1);
      Holding(r, "system", 16);
      for (int k = 0; k < 20; ++k) {
        const auto n = static_cast<uint32_t>(64 + rng_.Below(8000));
        r.prefills.push_back({n, 0, 0.002 + n * 1.5e-4});
        r.decodes.push_back({1 + n / 100, n * 10, 0.015 + n * 1e-6});
        r.fetches.push_back({uint64_t{n} << 12, 0.001 + n * 4e-6});
      }
      core_.Report(std::move(r), now_);
    }
    // Conversations, until there are `blocks`.
    const auto began = SteadyClock::now();
    size_t added = 0, reports = 0;
    while (added < flags.blocks) {
      chains_.push_back({chains_.size(), static_cast<uint32_t>(16 + rng_.Below(497))});
      const auto holders = 1 + rng_.Below(3);
      for (uint64_t h = 0; h < holders; ++h) {
        auto r = Report(static_cast<uint32_t>(rng_.Below(flags.workers)), 0);
        for (uint32_t b = 0; b < chains_.back().blocks; ++b) r.events.push_back({Key(chains_.back(), b)});
        added += chains_.back().blocks;
        r.seq = ++seq_[r.address.worker_id];
        core_.Report(std::move(r), now_);
        ++reports;
      }
    }
    const double took = Seconds(SteadyClock::now() - began);
    std::printf(
        "index: %zu pairs of %zu blocks, %.1f bytes a pair, %.0f ns an update (%zu reports)\n",
        core_.prefixes().entries(), core_.prefixes().blocks(),
        static_cast<double>(core_.prefixes().bytes()) / static_cast<double>(core_.prefixes().entries()),
        took / static_cast<double>(added) * 1e9, reports);
  }

  void Run() {
    std::vector<PlaceRequest> requests;
    for (size_t i = 0; i < 4096; ++i) requests.push_back(Request());
    std::deque<std::string> open;
    std::vector<double> took;
    size_t placed = 0, fetched = 0, cached = 0, next_report = 0;
    double reports = 0, finishes = 0;
    for (size_t i = 0; i < flags_.inflight + flags_.decisions; ++i) {
      PlaceRequest r = requests[i % requests.size()];  // in the caches, as one just parsed
      r.request_id = "request-" + std::to_string(i);
      now_ += absl::Microseconds(100);
      const auto began = SteadyClock::now();
      const PlaceResult result = core_.Place(r, now_);
      const double seconds = Seconds(SteadyClock::now() - began);
      if (i >= flags_.inflight) took.push_back(seconds);
      if (result.placement) {
        ++placed;
        fetched += result.placement->holders.empty() ? 0 : 1;
        cached += result.placement->expected_cached_tokens > 512 ? 1 : 0;
        open.push_back(r.request_id);
      }
      const auto ending = SteadyClock::now();
      if (open.size() > flags_.inflight) {
        core_.Finish(open.front(), now_, {.output_tokens = 200});
        open.pop_front();
      }
      finishes += Seconds(SteadyClock::now() - ending);
      // Every worker ten times a second.
      auto report = Report(static_cast<uint32_t>(next_report++ % flags_.workers), 0);
      report.seq = ++seq_[report.address.worker_id];
      const auto reporting = SteadyClock::now();
      core_.Report(std::move(report), now_);
      reports += Seconds(SteadyClock::now() - reporting);
    }
    double sum = 0;
    for (const double t : took) sum += t;
    std::sort(took.begin(), took.end());
    const auto at = [&](double q) {
      return took[static_cast<size_t>(q * static_cast<double>(took.size() - 1))] * 1e6;
    };
    const auto all = static_cast<double>(flags_.inflight + flags_.decisions);
    std::printf("place: %.0f a second; p50 %.1f us, p90 %.1f, p99 %.1f, p99.9 %.1f, max %.1f\n",
                static_cast<double>(took.size()) / sum, at(0.5), at(0.9), at(0.99), at(0.999), at(1));
    std::printf(
        "finish: %.2f us; report: %.2f us; placed %.0f%%, with a long prefix %.0f%%, fetched %.0f%%\n",
        finishes / all * 1e6, reports / all * 1e6, 100 * static_cast<double>(placed) / all,
        100 * static_cast<double>(cached) / all, 100 * static_cast<double>(fetched) / all);
  }

 private:
  struct Chain {
    size_t number;
    uint32_t blocks;
  };
  static SchedulerOptions Options(const Flags& flags) {
    SchedulerOptions o;
    o.max_inflight = 1u << 20;
    o.max_index_entries = std::max<size_t>(o.max_index_entries, flags.blocks * 2);
    o.slo_ttft = absl::Seconds(60);
    o.slo_itl = absl::Seconds(1);
    return o;
  }
  // Block b of a chain: the system prompt's, then its own.
  static BlockKey Key(const Chain& chain, uint32_t b) {
    if (b < 16) return ChainKey("system", b);
    BlockKey key;
    for (uint64_t word = 0; word < 4; ++word) {
      const uint64_t v = Mix64(chain.number * 1024 + b + (word << 48));
      std::memcpy(key.bytes.data() + 8 * word, &v, 8);
    }
    return key;
  }
  WorkerReport Report(uint32_t i, uint64_t seq) {
    char name[32];
    std::snprintf(name, sizeof name, "worker-%04u", i);
    auto r = TestReport(name, i % 2 == 0 ? Role::kPrefill : Role::kDecode, seq);
    r.model.max_model_len = 1 << 20;
    r.load = {.slots_total = 1 << 20, .slots_free = 1 << 19};
    if (i % 2 == 0 && rng_.Chance(0.7)) {
      r.load.waiting = 1 + static_cast<uint32_t>(rng_.Below(4));
      r.load.queued_prefill_tokens = r.load.waiting * (500 + rng_.Below(4000));
    }
    if (i % 2 == 1) {
      r.load.running = static_cast<uint32_t>(4 + rng_.Below(16));
      r.load.running_context_tokens = r.load.running * (1000 + rng_.Below(8000));
    }
    if (seq == 1) seq_[r.address.worker_id] = 1;
    return r;
  }
  PlaceRequest Request() {
    PlaceRequest r;
    const Chain& chain = chains_[rng_.Below(chains_.size())];
    const bool fresh = rng_.Below(3) == 0;
    const uint32_t beyond = static_cast<uint32_t>(rng_.Below(32));
    for (uint32_t b = 0; b < chain.blocks + beyond; ++b) {
      const bool own = (fresh && b >= 16) || b >= chain.blocks;
      r.keys.push_back(own ? Key({(uint64_t{1} << 40) + fresh_, b}, b) : Key(chain, b));
    }
    ++fresh_;
    r.prompt_tokens = static_cast<uint32_t>(r.keys.size()) * 32 + 7;
    r.max_tokens = 1024;
    r.tenant = "tenant-" + std::to_string(fresh_ % 50);
    r.route = "chat";
    return r;
  }

  const Flags flags_;
  Rng rng_{7};
  SchedulerCore core_;
  absl::Time now_ = kStart;
  std::vector<Chain> chains_;
  std::map<std::string, uint64_t> seq_;
  uint64_t fresh_ = 0;
};

}  // namespace
}  // namespace tidepool

int main(int argc, char** argv) {
  tidepool::Flags flags;
  for (int i = 1; i < argc; ++i) {
    const std::string arg = argv[i];
    const auto eq = arg.find('=');
    const std::string name = arg.substr(0, eq);
    size_t* to = name == "--workers"     ? &flags.workers
                 : name == "--inflight"  ? &flags.inflight
                 : name == "--blocks"    ? &flags.blocks
                 : name == "--decisions" ? &flags.decisions
                                         : nullptr;
    if (to == nullptr || eq == std::string::npos) {
      std::fprintf(stderr,
                   "usage: placement_bench [--workers=N] [--inflight=N] [--blocks=N] [--decisions=N]\n");
      return 2;
    }
    *to = std::strtoull(arg.c_str() + eq + 1, nullptr, 10);
  }
  tidepool::Bench(flags).Run();
}
