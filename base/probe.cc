#include "base/probe.h"

#include <prometheus/metric_family.h>
#include <prometheus/text_serializer.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <limits>
#include <sstream>

#include "base/status.h"

namespace tidepool {
namespace {

enum FamilyType { kCounter, kGauge, kHistogram };

prometheus::MetricFamily ProcessGauge(const char* name, const char* help, double value,
                                      prometheus::MetricType type = prometheus::MetricType::Gauge) {
  prometheus::MetricFamily family;
  family.name = name;
  family.help = help;
  family.type = type;
  prometheus::ClientMetric metric;
  (type == prometheus::MetricType::Counter ? metric.counter.value : metric.gauge.value) = value;
  family.metric.push_back(std::move(metric));
  return family;
}

double StartTimeSeconds() {
  static const double start = [] {
    timespec ts;
    clock_gettime(CLOCK_REALTIME, &ts);
    return static_cast<double>(ts.tv_sec) + static_cast<double>(ts.tv_nsec) * 1e-9;
  }();
  return start;
}

// The conventional process_* set, read from /proc; what cannot be read is left out.
void AppendProcessMetrics(std::vector<prometheus::MetricFamily>& out) {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  const double cpu = static_cast<double>(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) +
                     static_cast<double>(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) * 1e-6;
  out.push_back(ProcessGauge("process_cpu_seconds_total", "User and system CPU time spent in seconds.", cpu,
                             prometheus::MetricType::Counter));
  out.push_back(ProcessGauge("process_start_time_seconds", "Start time since the Unix epoch in seconds.",
                             StartTimeSeconds()));
  if (std::ifstream statm("/proc/self/statm"); statm) {
    double pages_virtual = 0, pages_resident = 0;
    statm >> pages_virtual >> pages_resident;
    const double page = static_cast<double>(sysconf(_SC_PAGESIZE));
    out.push_back(
        ProcessGauge("process_virtual_memory_bytes", "Virtual memory size in bytes.", pages_virtual * page));
    out.push_back(ProcessGauge("process_resident_memory_bytes", "Resident memory size in bytes.",
                               pages_resident * page));
  }
  std::error_code ec;
  const auto fds = std::distance(std::filesystem::directory_iterator("/proc/self/fd", ec), {});
  if (!ec)
    out.push_back(ProcessGauge("process_open_fds", "Open file descriptors.", static_cast<double>(fds)));
  const auto threads = std::distance(std::filesystem::directory_iterator("/proc/self/task", ec), {});
  if (!ec)
    out.push_back(ProcessGauge("process_threads", "Operating system threads.", static_cast<double>(threads)));
}

}  // namespace

Histogram::Histogram(std::vector<double> bounds)
    : bounds_(std::move(bounds)), counts_(new std::atomic<uint64_t>[bounds_.size() + 1]()) {
  TP_CHECK(std::is_sorted(bounds_.begin(), bounds_.end()));
}

void Histogram::Observe(double v) {
  const size_t i = static_cast<size_t>(std::lower_bound(bounds_.begin(), bounds_.end(), v) - bounds_.begin());
  counts_[i].fetch_add(1, std::memory_order_relaxed);
  sum_.fetch_add(v, std::memory_order_relaxed);
}

std::vector<uint64_t> Histogram::counts() const {
  std::vector<uint64_t> out(bounds_.size() + 1);
  for (size_t i = 0; i < out.size(); ++i) out[i] = counts_[i].load(std::memory_order_relaxed);
  return out;
}

double Histogram::Quantile(double q) const {
  const auto c = counts();
  uint64_t total = 0;
  for (uint64_t n : c) total += n;
  if (total == 0) return 0;
  const double rank = q * static_cast<double>(total);
  uint64_t seen = 0;
  for (size_t i = 0; i < c.size(); ++i) {
    seen += c[i];
    if (static_cast<double>(seen) >= rank) return i < bounds_.size() ? bounds_[i] : bounds_.back();
  }
  return bounds_.back();
}

const std::vector<double>& TtftBuckets() {
  static const std::vector<double> b = {.005, .01, .02, .05, .1, .2, .3, .5, .75, 1,  1.5,
                                        2,    3,   5,   7.5, 10, 15, 20, 30, 60,  120};
  return b;
}
const std::vector<double>& ItlBuckets() {
  static const std::vector<double> b = {.001, .0025, .005, .0075, .01, .015, .02, .03, .04,
                                        .05,  .075,  .1,   .15,   .2,  .3,   .5,  1,   2.5};
  return b;
}
const std::vector<double>& LatencyBuckets() {
  static const std::vector<double> b = {.0001, .00025, .0005, .001, .0025, .005, .01, .025, .05, .1,
                                        .25,   .5,     1,     2.5,  5,     10,   30,  60,   120};
  return b;
}

struct MetricRegistry::Family {
  std::string help;
  int type = 0;
  std::map<Labels, std::unique_ptr<Counter>> counters;
  std::map<Labels, std::unique_ptr<Gauge>> gauges;
  std::map<Labels, std::unique_ptr<Histogram>> histograms;
};

MetricRegistry::MetricRegistry() { StartTimeSeconds(); }
MetricRegistry::~MetricRegistry() = default;

MetricRegistry::Family& MetricRegistry::GetFamily(std::string_view name, std::string_view help, int type) {
  auto it = families_.find(name);
  if (it == families_.end()) {
    it = families_.emplace(std::string(name), std::make_unique<Family>()).first;
    it->second->help = help;
    it->second->type = type;
  }
  TP_CHECK(it->second->type == type);
  return *it->second;
}

Counter& MetricRegistry::AddCounter(std::string_view name, std::string_view help, const Labels& labels) {
  std::lock_guard lock(mu_);
  auto& slot = GetFamily(name, help, kCounter).counters[labels];
  if (!slot) slot = std::make_unique<Counter>();
  return *slot;
}

Gauge& MetricRegistry::AddGauge(std::string_view name, std::string_view help, const Labels& labels) {
  std::lock_guard lock(mu_);
  auto& slot = GetFamily(name, help, kGauge).gauges[labels];
  if (!slot) slot = std::make_unique<Gauge>();
  return *slot;
}

Histogram& MetricRegistry::AddHistogram(std::string_view name, std::string_view help,
                                        const std::vector<double>& bounds, const Labels& labels) {
  std::lock_guard lock(mu_);
  auto& slot = GetFamily(name, help, kHistogram).histograms[labels];
  if (!slot) slot = std::make_unique<Histogram>(bounds);
  return *slot;
}

void MetricRegistry::AddCollector(std::function<void()> collect) {
  std::lock_guard lock(mu_);
  collectors_.push_back(std::move(collect));
}

std::string MetricRegistry::Render() const {
  std::vector<std::function<void()>> collectors;
  {
    std::lock_guard lock(mu_);
    collectors = collectors_;
  }
  for (auto& collect : collectors) collect();

  std::vector<prometheus::MetricFamily> out;
  std::lock_guard lock(mu_);
  for (const auto& [name, family] : families_) {
    prometheus::MetricFamily f;
    f.name = name;
    f.help = family->help;
    auto add = [&](const Labels& labels) -> prometheus::ClientMetric& {
      auto& m = f.metric.emplace_back();
      for (const auto& [k, v] : labels) m.label.push_back({k, v});
      return m;
    };
    switch (family->type) {
      case kCounter:
        f.type = prometheus::MetricType::Counter;
        for (const auto& [labels, c] : family->counters)
          add(labels).counter.value = static_cast<double>(c->value());
        break;
      case kGauge:
        f.type = prometheus::MetricType::Gauge;
        for (const auto& [labels, g] : family->gauges) add(labels).gauge.value = g->value();
        break;
      case kHistogram:
        f.type = prometheus::MetricType::Histogram;
        for (const auto& [labels, h] : family->histograms) {
          auto& m = add(labels);
          uint64_t cumulative = 0;
          const auto counts = h->counts();
          for (size_t i = 0; i < counts.size(); ++i) {
            cumulative += counts[i];
            m.histogram.bucket.push_back({cumulative, i < h->bounds().size()
                                                          ? h->bounds()[i]
                                                          : std::numeric_limits<double>::infinity()});
          }
          m.histogram.sample_count = cumulative;
          m.histogram.sample_sum = h->sum();
        }
        break;
    }
    out.push_back(std::move(f));
  }
  AppendProcessMetrics(out);
  return prometheus::TextSerializer().Serialize(out);
}

}  // namespace tidepool
