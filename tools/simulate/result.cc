#include "tools/simulate/result.h"

#include <algorithm>
#include <cmath>

namespace tidepool {

namespace {

using nlohmann::ordered_json;

double Round(double value) { return std::round(value * 1e4) / 1e4; }

ordered_json Milliseconds(const Distribution& d) {
  return {{"mean", Round(d.mean * 1e3)},
          {"p50", Round(d.p50 * 1e3)},
          {"p90", Round(d.p90 * 1e3)},
          {"p99", Round(d.p99 * 1e3)}};
}

ordered_json Shares(const Distribution& d) {
  return {{"mean", Round(d.mean)}, {"p50", Round(d.p50)}, {"p90", Round(d.p90)}, {"p99", Round(d.p99)}};
}

ordered_json ToJson(const GroupResult& g, double seconds) {
  return {{"requests", g.requests},
          {"completed", g.completed},
          {"rejected", g.rejected},
          {"failed", g.failed},
          {"goodput_rps", Round(seconds > 0 ? static_cast<double>(g.good) / seconds : 0)},
          {"ttft_ms", Milliseconds(Describe(g.ttft))},
          {"itl_ms", Milliseconds(Describe(g.itl))}};
}

// The largest difference between the tenants served most and least, in the first and in the second half of
// the time in which requests arrived. (What is left then is whoever asked for most.)
ordered_json ServiceGap(const std::vector<std::vector<float>>& service, double arrival_seconds) {
  size_t seconds = 0;
  for (const auto& tenant : service) seconds = std::max(seconds, tenant.size());
  seconds = std::min(seconds, static_cast<size_t>(std::ceil(arrival_seconds)));
  std::vector<double> sums(service.size());
  double halves[2] = {};
  for (size_t t = 0; t < seconds; ++t) {
    for (size_t i = 0; i < service.size(); ++i) sums[i] += t < service[i].size() ? service[i][t] : 0;
    const auto [least, most] = std::minmax_element(sums.begin(), sums.end());
    double& half = halves[t < seconds / 2 ? 0 : 1];
    half = std::max(half, *most - *least);
  }
  return {{"first_half", Round(halves[0])}, {"second_half", Round(halves[1])}};
}

}  // namespace

Distribution Describe(std::vector<float> values) {
  if (values.empty()) return {};
  std::sort(values.begin(), values.end());
  Distribution d;
  for (const float v : values) d.mean += v;
  d.mean /= static_cast<double>(values.size());
  // Linear between two values, as numpy's default.
  const auto at = [&](double q) {
    const double x = q * static_cast<double>(values.size() - 1);
    const auto below = static_cast<size_t>(x);
    const size_t above = std::min(below + 1, values.size() - 1);
    return values[below] + (values[above] - values[below]) * (x - static_cast<double>(below));
  };
  d.p50 = at(0.5);
  d.p90 = at(0.9);
  d.p99 = at(0.99);
  return d;
}

Distribution Describe(const WeightedHistogram& values) {
  return {values.mean(), values.Quantile(0.5), values.Quantile(0.9), values.Quantile(0.99)};
}

LoadSummary Summarize(const std::vector<LoadSample>& load, float LoadSample::*which) {
  LoadSummary out;
  const size_t begin = load.size() / 10;
  const auto n = static_cast<double>(load.size() - begin);
  if (load.size() < 10) return out;
  for (size_t i = begin; i < load.size(); ++i) out.mean += load[i].*which / n;
  for (size_t i = begin; i < load.size(); ++i) out.deviation += std::pow(load[i].*which - out.mean, 2) / n;
  out.deviation = std::sqrt(out.deviation);
  return out;
}

ordered_json ToJson(const SimResult& r) {
  ordered_json out;
  out["workload"] = r.workload;
  out["workers"] = {{"prefill", r.prefill}, {"decode", r.decode}, {"both", r.both}};
  out["slo_ms"] = {{"ttft", Round(r.slo_ttft_seconds * 1e3)}, {"itl", Round(r.slo_itl_seconds * 1e3)}};
  out["seed"] = r.seed;
  for (const auto& [key, value] : r.settings) out["settings"][key] = value;
  out["requests"] = r.all.requests;
  out["completed"] = r.all.completed;
  out["rejected"] = r.all.rejected;
  out["failed"] = r.all.failed;
  out["rejections"] = ordered_json::object();
  for (const auto& [kind, n] : r.rejections) out["rejections"][kind] = n;
  out["good"] = r.all.good;
  out["goodput_rps"] = Round(r.goodput());
  out["hit_rate"] = Round(r.hit_rate());
  out["fetched_share"] = Round(r.prefilled_tokens > 0 ? static_cast<double>(r.fetched_tokens) /
                                                            static_cast<double>(r.prefilled_tokens)
                                                      : 0);
  out["prefill_compute_s"] = Round(r.prefill_seconds);
  out["prefills_wasted"] = r.prefills_wasted;
  out["ttft_ms"] = Milliseconds(Describe(r.all.ttft));
  out["itl_ms"] = Milliseconds(Describe(r.gaps));
  out["tenants"] = ordered_json::object();
  for (const auto& [tenant, group] : r.tenants) out["tenants"][tenant] = ToJson(group, r.arrival_seconds);
  if (r.service.size() > 1) out["service_gap_tokens"] = ServiceGap(r.service, r.arrival_seconds);
  out["classes"] = ordered_json::object();
  for (size_t c = 0; c < kSloClasses; ++c) {
    if (r.classes[c].requests > 0)
      out["classes"][std::string(SloClassName(static_cast<SloClass>(c)))] =
          ToJson(r.classes[c], r.arrival_seconds);
  }
  out["prediction_error"] = {{"ttft", Shares(Describe(r.ttft_error))},
                             {"itl", Shares(Describe(r.itl_error))}};
  const LoadSummary prefill = Summarize(r.load, &LoadSample::prefill_load);
  const LoadSummary decode = Summarize(r.load, &LoadSample::decode_load);
  out["load"] = {{"prefill_mean", Round(prefill.mean)},
                 {"prefill_deviation", Round(prefill.deviation)},
                 {"decode_mean", Round(decode.mean)},
                 {"decode_deviation", Round(decode.deviation)}};
  out["bytes"] = {
      {"fetched", r.bytes_fetched}, {"handed_over", r.bytes_handed_over}, {"replicated", r.bytes_replicated}};
  out["elasticity"] = {{"role_changes", r.role_changes},
                       {"prefill_at_end", r.prefill_at_end},
                       {"decode_at_end", r.decode_at_end}};
  out["faults"] = {{"crashes", r.crashes},
                   {"scheduler_restarts", r.scheduler_restarts},
                   {"reports_lost", r.reports_lost},
                   {"retries", r.retries}};
  out["arrival_s"] = Round(r.arrival_seconds);
  out["simulated_s"] = Round(r.simulated_seconds);
  out["decisions"] = r.decisions;
  out["reports"] = r.reports;
  out["events"] = r.events;
  out["decision_us"] = Round(r.decisions > 0 ? r.place_seconds * 1e6 / static_cast<double>(r.decisions) : 0);
  out["wall_s"] = Round(r.wall_seconds);
  return out;
}

}  // namespace tidepool
