#include "server/bench/report.h"

#include <algorithm>
#include <cmath>
#include <cstdio>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "server/bench/statistics.h"

namespace tidepool {
namespace {

using Json = nlohmann::ordered_json;

// Beyond this the load generator, not the server, is what is measured.
constexpr double kGeneratorDelayMsMax = 10;
constexpr double kLoopLagMeanMsMax = 5, kLoopLagMaxMsMax = 500;
constexpr size_t kPercentilesMedian = 50;

Distribution Describe(std::vector<double> sample, const std::vector<double>& percents) {
  Distribution out;
  for (double& x : sample) x *= 1e3;
  std::sort(sample.begin(), sample.end());
  out.mean = Mean(sample);
  out.std = StandardDeviation(sample);
  out.median = Percentile(sample, kPercentilesMedian);
  for (const double percent : percents) out.percentiles.push_back(Percentile(sample, percent));
  return out;
}

// The most requests that were between sent and end at once.
size_t PeakConcurrency(std::span<const RequestRecord> records) {
  std::vector<std::pair<absl::Duration, int>> edges;
  for (const RequestRecord& r : records) {
    edges.emplace_back(r.dispatched, 1);
    edges.emplace_back(r.end, -1);
  }
  // Ends before begins at the same time: -1 sorts first.
  std::sort(edges.begin(), edges.end());
  size_t now = 0, peak = 0;
  for (const auto& [unused, step] : edges) {
    now += static_cast<size_t>(step);
    peak = std::max(peak, now);
  }
  return peak;
}

double PeakOutput(std::span<const RequestRecord> records) {
  std::vector<double> seconds;
  for (const RequestRecord& r : records) {
    if (!r.got_token || r.output_tokens == 0) continue;
    // An event may hold several tokens; they are spread evenly over the events.
    const double tokens =
        static_cast<double>(r.output_tokens) / (static_cast<double>(r.gaps_seconds.size()) + 1);
    double at = absl::ToDoubleSeconds(r.first);
    const auto add = [&] {
      const auto second = static_cast<size_t>(std::max(0.0, at));
      if (second >= seconds.size()) seconds.resize(second + 1);
      seconds[second] += tokens;
    };
    add();
    for (const double gap : r.gaps_seconds) {
      at += gap;
      add();
    }
  }
  return seconds.empty() ? 0 : *std::max_element(seconds.begin(), seconds.end());
}

// "99", "99.9".
std::string PercentName(double percent) { return absl::StrCat(percent); }

void AddDistribution(Json& json, const std::string& name, const Distribution& d,
                     const std::vector<double>& percents) {
  json["mean_" + name + "_ms"] = d.mean;
  json["median_" + name + "_ms"] = d.median;
  json["std_" + name + "_ms"] = d.std;
  for (size_t i = 0; i < percents.size(); ++i) {
    json["p" + PercentName(percents[i]) + "_" + name + "_ms"] = d.percentiles[i];
  }
}

}  // namespace

Summary Summarize(std::span<const RequestRecord> records, const Slo& slo, const std::vector<double>& percents,
                  const GeneratorHealth& health) {
  Summary out;
  out.health = health;
  std::vector<double> ttfts, tpots, gaps, latencies, waits, delays;
  absl::Duration duration;
  for (const RequestRecord& r : records) {
    duration = std::max(duration, r.end);
    waits.push_back(absl::ToDoubleSeconds(r.released - r.planned));
    delays.push_back(absl::ToDoubleSeconds(r.dispatched - r.released));
    if (!r.ok()) {
      ++out.failed;
      out.rejected += r.rejected();
      continue;
    }
    ++out.completed;
    out.good += slo.Good(r);
    out.input_tokens += r.input_tokens;
    out.output_tokens += r.output_tokens;
    out.all_usage_from_server &= r.usage_from_server;
    out.cached_known |= r.cached_tokens.has_value();
    out.cached_tokens += r.cached_tokens.value_or(0);
    ttfts.push_back(r.TtftSeconds());
    // vLLM: single tokens have no time per token; they are left out of its distribution.
    if (r.output_tokens > 1) tpots.push_back(r.TpotSeconds());
    gaps.insert(gaps.end(), r.gaps_seconds.begin(), r.gaps_seconds.end());
    latencies.push_back(r.LatencySeconds());
    if (!r.path) continue;
    ++out.paths.traced;
    out.paths.disaggregated += r.path->prefill_worker != r.path->decode_worker;
    out.paths.queue_seconds += r.path->queue_seconds;
    out.paths.prefill_seconds += r.path->prefill_seconds;
    out.paths.transfer_seconds += r.path->transfer_seconds;
    out.paths.decode_seconds += absl::ToDoubleSeconds(r.last - r.first);
    out.paths.fetched_bytes += r.path->fetched_bytes;
  }
  out.duration_seconds = absl::ToDoubleSeconds(duration);
  if (out.duration_seconds > 0) {
    const double per_second = 1 / out.duration_seconds;
    out.request_throughput = static_cast<double>(out.completed) * per_second;
    out.request_goodput = static_cast<double>(out.good) * per_second;
    out.output_throughput = static_cast<double>(out.output_tokens) * per_second;
    out.total_token_throughput = static_cast<double>(out.input_tokens + out.output_tokens) * per_second;
  }
  out.output_tokens_per_second_max = PeakOutput(records);
  out.concurrent_requests_max = PeakConcurrency(records);
  out.ttft = Describe(std::move(ttfts), percents);
  out.tpot = Describe(std::move(tpots), percents);
  out.itl = Describe(std::move(gaps), percents);
  out.e2el = Describe(std::move(latencies), percents);
  out.cap_wait = Describe(std::move(waits), percents);
  out.generator_delay = Describe(std::move(delays), percents);
  return out;
}

Json SummaryJson(const Summary& s, const Slo& slo, const std::vector<double>& percents) {
  Json json;
  json["duration"] = s.duration_seconds;
  json["completed"] = s.completed;
  json["failed"] = s.failed;
  json["rejected"] = s.rejected;
  json["total_input_tokens"] = s.input_tokens;
  json["total_output_tokens"] = s.output_tokens;
  json["request_throughput"] = s.request_throughput;
  json["request_goodput"] = slo.empty() ? Json() : Json(s.request_goodput);
  json["output_throughput"] = s.output_throughput;
  json["total_token_throughput"] = s.total_token_throughput;
  json["max_output_tokens_per_s"] = s.output_tokens_per_second_max;
  json["max_concurrent_requests"] = s.concurrent_requests_max;
  AddDistribution(json, "ttft", s.ttft, percents);
  AddDistribution(json, "tpot", s.tpot, percents);
  AddDistribution(json, "itl", s.itl, percents);
  AddDistribution(json, "e2el", s.e2el, percents);
  json["slo"] = slo.empty() ? Json() : Json(slo.text());
  json["slo_good"] = slo.empty() ? Json() : Json(s.good);
  json["total_cached_tokens"] = s.cached_known ? Json(s.cached_tokens) : Json();
  json["token_counts"] = s.all_usage_from_server ? "server" : "client";
  AddDistribution(json, "cap_wait", s.cap_wait, percents);
  AddDistribution(json, "generator_delay", s.generator_delay, percents);
  json["generator"] = {{"cpu_seconds", s.health.cpu_seconds},
                       {"loop_lag_ms_mean", s.health.loop_lag_ms_mean},
                       {"loop_lag_ms_max", s.health.loop_lag_ms_max}};
  if (s.paths.traced > 0) {
    const auto n = static_cast<double>(s.paths.traced);
    const double busy = s.paths.prefill_seconds + s.paths.decode_seconds;
    json["paths"] = {
        {"traced", s.paths.traced},
        {"disaggregated_share", static_cast<double>(s.paths.disaggregated) / n},
        {"prefill_share", busy > 0 ? s.paths.prefill_seconds / busy : 0},
        {"mean_queue_ms", s.paths.queue_seconds / n * 1e3},
        {"mean_prefill_ms", s.paths.prefill_seconds / n * 1e3},
        {"mean_transfer_ms", s.paths.transfer_seconds / n * 1e3},
        {"mean_decode_ms", s.paths.decode_seconds / n * 1e3},
        {"fetched_bytes", s.paths.fetched_bytes},
    };
  }
  return json;
}

void AddDetails(std::span<const RequestRecord> records, bool texts, Json& json) {
  for (const char* key : {"input_lens", "output_lens", "ttfts", "itls", "errors"}) json[key] = Json::array();
  if (texts) json["generated_texts"] = Json::array();
  for (const RequestRecord& r : records) {
    json["input_lens"].push_back(r.input_tokens);
    json["output_lens"].push_back(r.ok() ? r.output_tokens : 0);
    json["ttfts"].push_back(r.got_token ? r.TtftSeconds() : 0);
    json["itls"].push_back(r.gaps_seconds);
    json["errors"].push_back(r.error);
    if (texts) json["generated_texts"].push_back(r.text);
  }
}

Json RecordJson(const RequestRecord& r, const Slo& slo) {
  Json json;
  json["index"] = r.index;
  json["session"] = r.session;
  json["turn"] = r.turn;
  json["planned_s"] = absl::ToDoubleSeconds(r.planned);
  json["released_s"] = absl::ToDoubleSeconds(r.released);
  json["dispatched_s"] = absl::ToDoubleSeconds(r.dispatched);
  json["sent_s"] = absl::ToDoubleSeconds(r.sent);
  json["end_s"] = absl::ToDoubleSeconds(r.end);
  json["ttft_ms"] = r.got_token ? Json(r.TtftSeconds() * 1e3) : Json();
  json["tpot_ms"] = r.output_tokens > 1 ? Json(r.TpotSeconds() * 1e3) : Json();
  json["e2el_ms"] = r.LatencySeconds() * 1e3;
  json["input_tokens"] = r.input_tokens;
  json["output_tokens"] = r.output_tokens;
  json["cached_tokens"] = r.cached_tokens ? Json(*r.cached_tokens) : Json();
  json["status"] = r.http_status;
  json["finish_reason"] = r.finish_reason.empty() ? Json() : Json(r.finish_reason);
  json["error"] = r.ok() ? Json() : Json(r.error);
  if (!slo.empty()) json["good"] = slo.Good(r);
  if (r.path) {
    json["prefill_worker"] = r.path->prefill_worker;
    json["decode_worker"] = r.path->decode_worker;
    json["queue_ms"] = r.path->queue_seconds * 1e3;
    json["prefill_ms"] = r.path->prefill_seconds * 1e3;
    json["transfer_ms"] = r.path->transfer_seconds * 1e3;
    json["fetched_bytes"] = r.path->fetched_bytes;
  }
  Json gaps = Json::array();
  for (const double gap : r.gaps_seconds) gaps.push_back(std::round(gap * 1e6) / 1e3);
  json["itls_ms"] = std::move(gaps);
  return json;
}

std::string SummaryTable(const Summary& s, const Slo& slo, const std::vector<double>& percents) {
  constexpr int kWidth = 50;
  std::string out;
  const auto title = [&](std::string_view text, char fill) {
    const int rest = kWidth - static_cast<int>(text.size());
    out.append(static_cast<size_t>(rest / 2), fill).append(text);
    out.append(static_cast<size_t>(rest - rest / 2), fill).append("\n");
  };
  const auto count = [&](std::string_view label, uint64_t n) {
    absl::StrAppendFormat(&out, "%-40s %-10d\n", std::string(label), n);
  };
  const auto number = [&](std::string_view label, double x) {
    absl::StrAppendFormat(&out, "%-40s %-10.2f\n", std::string(label), x);
  };
  title(" Serving Benchmark Result ", '=');
  count("Successful requests:", s.completed);
  count("Failed requests:", s.failed);
  if (s.rejected > 0) count("  of these refused for load:", s.rejected);
  number("Benchmark duration (s):", s.duration_seconds);
  count("Total input tokens:", s.input_tokens);
  if (s.cached_known) count("  of these cached:", s.cached_tokens);
  count("Total generated tokens:", s.output_tokens);
  number("Request throughput (req/s):", s.request_throughput);
  if (!slo.empty()) number("Request goodput (req/s):", s.request_goodput);
  number("Output token throughput (tok/s):", s.output_throughput);
  number("Peak output token throughput (tok/s):", s.output_tokens_per_second_max);
  count("Peak concurrent requests:", s.concurrent_requests_max);
  number("Total Token throughput (tok/s):", s.total_token_throughput);
  const auto distribution = [&](std::string_view heading, const std::string& name, const Distribution& d) {
    title(heading, '-');
    number("Mean " + name + " (ms):", d.mean);
    number("Median " + name + " (ms):", d.median);
    for (size_t i = 0; i < percents.size(); ++i) {
      if (percents[i] == kPercentilesMedian) continue;
      number("P" + PercentName(percents[i]) + " " + name + " (ms):", d.percentiles[i]);
    }
  };
  distribution("Time to First Token", "TTFT", s.ttft);
  distribution("Time per Output Token (excl. 1st token)", "TPOT", s.tpot);
  distribution("Inter-token Latency", "ITL", s.itl);
  distribution("End-to-end Latency", "E2EL", s.e2el);
  if (s.paths.traced > 0) {
    const auto n = static_cast<double>(s.paths.traced);
    title("Prefill and Decode", '-');
    number("Disaggregated requests (%):", 100 * static_cast<double>(s.paths.disaggregated) / n);
    number("Mean prefill (ms):", s.paths.prefill_seconds / n * 1e3);
    number("Mean transfer (ms):", s.paths.transfer_seconds / n * 1e3);
    number("Mean decode (ms):", s.paths.decode_seconds / n * 1e3);
  }
  title("Load Generator", '-');
  if (s.cap_wait.mean > 0) number("Mean wait for the concurrency cap (ms):", s.cap_wait.mean);
  number("Mean delay (ms):", s.generator_delay.mean);
  for (size_t i = 0; i < percents.size(); ++i) {
    if (percents[i] != kPercentilesMedian) {
      number("P" + PercentName(percents[i]) + " delay (ms):", s.generator_delay.percentiles[i]);
    }
  }
  number("CPU (s):", s.health.cpu_seconds);
  out.append(kWidth, '=').append("\n");
  return out;
}

std::vector<std::string> Warnings(const Summary& s) {
  std::vector<std::string> out;
  if (s.generator_delay.mean > kGeneratorDelayMsMax) {
    out.push_back(
        absl::StrFormat("the load generator sent its requests %.1f ms late on average: it is "
                        "saturated, and latencies include its own delay",
                        s.generator_delay.mean));
  }
  if (s.health.loop_lag_ms_mean > kLoopLagMeanMsMax || s.health.loop_lag_ms_max > kLoopLagMaxMsMax) {
    out.push_back(
        absl::StrFormat("the load generator's network threads lagged %.1f ms on average and %.0f ms at "
                        "most: gaps between tokens are partly its own",
                        s.health.loop_lag_ms_mean, s.health.loop_lag_ms_max));
  }
  if (s.completed > 0 && !s.all_usage_from_server) {
    out.push_back("the server did not report usage for every answer: tokens are counted as events");
  }
  return out;
}

}  // namespace tidepool
