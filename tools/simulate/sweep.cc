#include "tools/simulate/sweep.h"

#include <algorithm>
#include <atomic>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "base/status.h"
#include "kvstore/policy/policy.h"

namespace tidepool {

namespace {

absl::string_view View(std::string_view text) { return {text.data(), text.size()}; }

absl::Status Bad(std::string_view key, std::string_view value, std::string_view expected) {
  return absl::InvalidArgumentError(
      absl::StrCat(View(key), " is '", View(value), "'; it must be ", View(expected)));
}

absl::Status ToCount(std::string_view key, std::string_view value, uint64_t max, uint64_t& out) {
  uint64_t n = 0;
  if (!absl::SimpleAtoi(View(value), &n) || n > max)
    return Bad(key, value, absl::StrCat("a whole number, at most ", max));
  out = n;
  return absl::OkStatus();
}

absl::Status ToCount(std::string_view key, std::string_view value, uint32_t max, uint32_t& out) {
  uint64_t n = 0;
  TP_RETURN_IF_ERROR(ToCount(key, value, uint64_t{max}, n));
  out = static_cast<uint32_t>(n);
  return absl::OkStatus();
}

absl::Status ToNumber(std::string_view key, std::string_view value, double& out) {
  double n = 0;
  if (!absl::SimpleAtod(View(value), &n) || !(n >= 0) || n > 1e15)
    return Bad(key, value, "a number, 0 or more");
  out = n;
  return absl::OkStatus();
}

absl::Status ToDuration(std::string_view key, std::string_view value, absl::Duration& out) {
  absl::Duration d;
  if (!absl::ParseDuration(View(value), &d) || d < absl::ZeroDuration() || d == absl::InfiniteDuration())
    return Bad(key, value, "a duration with its unit: 30s, 100ms");
  out = d;
  return absl::OkStatus();
}

absl::Status ToSeconds(std::string_view key, std::string_view value, double& out) {
  absl::Duration d;
  TP_RETURN_IF_ERROR(ToDuration(key, value, d));
  out = absl::ToDoubleSeconds(d);
  return absl::OkStatus();
}

template <typename Enum>
absl::Status ToEnum(std::string_view key, std::string_view value, size_t n, std::string_view (*name)(Enum),
                    Enum& out) {
  std::vector<std::string> names;
  for (size_t i = 0; i < n; ++i) {
    const auto e = static_cast<Enum>(i);
    if (name(e) == value) {
      out = e;
      return absl::OkStatus();
    }
    names.emplace_back(name(e));
  }
  return Bad(key, value, absl::StrCat("one of ", absl::StrJoin(names, ", ")));
}

absl::Status ToSwitch(std::string_view key, std::string_view value, bool& out) {
  if (value != "on" && value != "off") return Bad(key, value, "on or off");
  out = value == "on";
  return absl::OkStatus();
}

absl::Status ToRatio(std::string_view key, std::string_view value, SimOptions& out) {
  const std::pair<std::string, std::string> parts = absl::StrSplit(View(value), absl::MaxSplits(':', 1));
  if (parts.second.empty()) return Bad(key, value, "prefill and decode workers: 8:8");
  TP_RETURN_IF_ERROR(ToCount(key, parts.first, 100'000u, out.prefill));
  return ToCount(key, parts.second, 100'000u, out.decode);
}

absl::Status ToEviction(std::string_view key, std::string_view value, std::string& out) {
  const auto names = PolicyNames();
  if (std::find(names.begin(), names.end(), value) == names.end()) {
    std::vector<std::string> all(names.begin(), names.end());
    return Bad(key, value, absl::StrCat("one of ", absl::StrJoin(all, ", ")));
  }
  out = value;
  return absl::OkStatus();
}

using Setter = absl::Status (*)(SimPlan&, std::string_view key, std::string_view value);
using Entry = std::pair<std::string_view, Setter>;

const std::vector<Entry>& Setters() {
  using P = SimPlan&;
  using S = std::string_view;
  static const std::vector<Entry> all = {
      {"prefill", [](P p, S k, S v) { return ToCount(k, v, 100'000u, p.sim.prefill); }},
      {"decode", [](P p, S k, S v) { return ToCount(k, v, 100'000u, p.sim.decode); }},
      {"both", [](P p, S k, S v) { return ToCount(k, v, 100'000u, p.sim.both); }},
      {"pd", [](P p, S k, S v) { return ToRatio(k, v, p.sim); }},
      {"policy",
       [](P p, S k, S v) {
         return ToEnum(k, v, kPlacementPolicies, PlacementPolicyName, p.sim.scheduler.placement);
       }},
      {"admission",
       [](P p, S k, S v) {
         return ToEnum(k, v, kAdmissionPolicies, AdmissionPolicyName, p.sim.scheduler.admission);
       }},
      {"fairness",
       [](P p, S k, S v) { return ToEnum(k, v, 2, FairnessPolicyName, p.sim.scheduler.fairness); }},
      {"order", [](P p, S k, S v) { return ToEnum(k, v, kQueueOrders, QueueOrderName, p.sim.order); }},
      {"eviction", [](P p, S k, S v) { return ToEviction(k, v, p.sim.eviction); }},
      {"pool-blocks", [](P p, S k, S v) { return ToCount(k, v, 1u << 28, p.sim.pool_blocks); }},
      {"hot-copies", [](P p, S k, S v) { return ToCount(k, v, 1000u, p.sim.replication.copies); }},
      {"elasticity",
       [](P p, S k, S v) { return ToEnum(k, v, kElasticityModes, ElasticityModeName, p.sim.elasticity); }},
      {"elasticity-dwell", [](P p, S k, S v) { return ToDuration(k, v, p.sim.elasticity_options.dwell); }},
      {"peer-fetch", [](P p, S k, S v) { return ToSwitch(k, v, p.sim.scheduler.peer_fetch); }},
      {"oracle-lengths", [](P p, S k, S v) { return ToSwitch(k, v, p.sim.oracle_lengths); }},
      {"slo-ttft", [](P p, S k, S v) { return ToDuration(k, v, p.sim.scheduler.slo_ttft); }},
      {"slo-itl", [](P p, S k, S v) { return ToDuration(k, v, p.sim.scheduler.slo_itl); }},
      {"report-interval", [](P p, S k, S v) { return ToSeconds(k, v, p.sim.report_interval_seconds); }},
      {"max-tokens", [](P p, S k, S v) { return ToCount(k, v, 1u << 28, p.sim.max_tokens); }},
      {"seed", [](P p, S k, S v) { return ToCount(k, v, UINT64_MAX, p.sim.seed); }},
      {"speed", [](P p, S k, S v) { return ToNumber(k, v, p.replay.speed); }},
      {"length-scale", [](P p, S k, S v) { return ToNumber(k, v, p.replay.length_scale); }},
      {"rate", [](P p, S k, S v) { return ToNumber(k, v, p.synthetic.rate); }},
      {"burst", [](P p, S k, S v) { return ToNumber(k, v, p.synthetic.burst); }},
      {"requests",
       [](P p, S k, S v) {
         TP_RETURN_IF_ERROR(ToCount(k, v, UINT64_MAX, p.replay.requests));
         if (p.replay.requests > 0) p.synthetic.requests = p.replay.requests;
         return absl::OkStatus();
       }},
  };
  return all;
}

// What a run simulates, shared by the runs that simulate the same.
class Workloads {
 public:
  absl::StatusOr<Workload> Make(const SimPlan& plan) {
    if (plan.trace.empty()) {
      SyntheticOptions options = plan.synthetic;
      options.stretch_tokens = plan.profile.layout.block_tokens;
      if (options.prompt_max == 0)
        options.prompt_max = plan.profile.max_model_len - std::min(plan.profile.max_model_len / 2, 4096u);
      return MakeSynthetic(options, plan.sim.seed);
    }
    std::shared_ptr<const Trace> trace;
    {
      std::lock_guard lock(mu_);
      if (trace_ == nullptr) {
        TP_ASSIGN_OR_RETURN(Trace read, ReadTrace(plan.trace));
        trace_ = std::make_shared<const Trace>(std::move(read));
      }
      trace = trace_;
    }
    const size_t slash = plan.trace.rfind('/');
    return FromTrace(*trace, plan.trace.substr(slash == std::string::npos ? 0 : slash + 1), plan.replay);
  }

 private:
  std::mutex mu_;
  std::shared_ptr<const Trace> trace_;
};

}  // namespace

std::vector<std::string> SweepKeys() {
  std::vector<std::string> out;
  for (const auto& [key, setter] : Setters()) out.emplace_back(key);
  return out;
}

absl::Status Set(SimPlan& plan, std::string_view key, std::string_view value) {
  for (const auto& [name, setter] : Setters()) {
    if (name == key) return setter(plan, key, value);
  }
  return absl::InvalidArgumentError(
      absl::StrCat("there is no '", View(key), "' to vary; there are ", absl::StrJoin(SweepKeys(), ", ")));
}

absl::StatusOr<SweepKey> ParseSweepKey(std::string_view text) {
  const size_t equals = text.find('=');
  if (equals == text.npos || equals == 0 || equals + 1 == text.size())
    return absl::InvalidArgumentError(
        absl::StrCat("sweep is '", View(text), "'; it must be KEY=a,b,c, for example speed=1,2,4"));
  SweepKey key{std::string(text.substr(0, equals)), absl::StrSplit(View(text.substr(equals + 1)), ',')};
  SimPlan scratch;
  for (const std::string& value : key.values) TP_RETURN_IF_ERROR(Set(scratch, key.key, value));
  return key;
}

absl::StatusOr<std::vector<SimResult>> RunSweep(const SimPlan& plan, const std::vector<SweepKey>& keys,
                                                unsigned jobs, const SweepProgress& progress) {
  std::vector<SimPlan> plans = {plan};
  std::vector<std::map<std::string, std::string>> settings(1);
  for (const SweepKey& key : keys) {
    std::vector<SimPlan> next;
    std::vector<std::map<std::string, std::string>> next_settings;
    for (size_t i = 0; i < plans.size(); ++i) {
      for (const std::string& value : key.values) {
        next.push_back(plans[i]);
        next_settings.push_back(settings[i]);
        TP_RETURN_IF_ERROR(Set(next.back(), key.key, value));
        next_settings.back()[key.key] = value;
      }
    }
    plans = std::move(next);
    settings = std::move(next_settings);
  }
  Workloads workloads;
  std::vector<std::optional<SimResult>> results(plans.size());
  std::mutex mu;  // of all that follows
  absl::Status failed;
  std::vector<double> shares(plans.size());
  size_t next = 0, done = 0;
  const auto work = [&] {
    for (;;) {
      size_t i = 0;
      {
        std::lock_guard lock(mu);
        if (!failed.ok() || next == plans.size()) return;
        i = next++;
      }
      const auto show = [&](double share) {
        if (!progress) return;
        std::lock_guard lock(mu);
        shares[i] = share;
        double sum = 0;
        for (const double s : shares) sum += s;
        progress(done, plans.size(), sum / static_cast<double>(plans.size()));
      };
      const auto run = [&]() -> absl::StatusOr<SimResult> {
        TP_ASSIGN_OR_RETURN(const Workload workload, workloads.Make(plans[i]));
        return Simulate(plans[i].sim, workload, plans[i].profile, show);
      };
      absl::StatusOr<SimResult> result = run();
      std::lock_guard lock(mu);
      if (!result.ok()) {
        if (failed.ok()) failed = result.status();
        return;
      }
      result->settings = settings[i];
      results[i] = *std::move(result);
      ++done;
    }
  };
  std::vector<std::thread> threads;
  for (unsigned t = 1; t < std::min<size_t>(std::max(jobs, 1u), plans.size()); ++t)
    threads.emplace_back(work);
  work();
  for (std::thread& t : threads) t.join();
  TP_RETURN_IF_ERROR(failed);
  std::vector<SimResult> out;
  for (auto& result : results) out.push_back(*std::move(result));
  return out;
}

}  // namespace tidepool
