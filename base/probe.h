#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

namespace tidepool {

using Labels = std::map<std::string, std::string>;

// Counter: only rises. Lock-free; any thread.
class Counter {
 public:
  void Add(uint64_t n = 1) { value_.fetch_add(n, std::memory_order_relaxed); }
  uint64_t value() const { return value_.load(std::memory_order_relaxed); }

 private:
  std::atomic<uint64_t> value_{0};
};

// Gauge: goes up and down. Lock-free; any thread.
class Gauge {
 public:
  void Set(double v) { value_.store(v, std::memory_order_relaxed); }
  void Add(double d) { value_.fetch_add(d, std::memory_order_relaxed); }
  double value() const { return value_.load(std::memory_order_relaxed); }

 private:
  std::atomic<double> value_{0};
};

// Histogram: cumulative buckets with fixed upper bounds. Observe takes no lock (a per-token path calls
// it), so a scrape may see a sum one observation ahead of the buckets.
class Histogram {
 public:
  explicit Histogram(std::vector<double> bounds);
  void Observe(double v);
  const std::vector<double>& bounds() const { return bounds_; }
  // counts()[i]: observations in (bounds[i-1], bounds[i]]; the last is the overflow.
  std::vector<uint64_t> counts() const;
  double sum() const { return sum_.load(std::memory_order_relaxed); }
  // Upper bound of the bucket that holds quantile q of what was seen; 0 when empty.
  double Quantile(double q) const;

 private:
  std::vector<double> bounds_;
  std::unique_ptr<std::atomic<uint64_t>[]> counts_;
  std::atomic<double> sum_{0};
};

// Bucket bounds in seconds, from SURFACE's table: an SLO on a bound can be read off.
const std::vector<double>& TtftBuckets();
const std::vector<double>& ItlBuckets();
const std::vector<double>& LatencyBuckets();

// MetricRegistry: the process's metrics, rendered in the Prometheus text format. One per process (tests
// make their own). The references returned live as long as the registry; asking again for the same name
// and labels returns the same object. Thread-safe. Names obey tidepool_<what>_<unit>; counters end in
// _total; label values come from small closed sets, never request or user ids.
class MetricRegistry {
 public:
  MetricRegistry();
  ~MetricRegistry();
  MetricRegistry(const MetricRegistry&) = delete;
  MetricRegistry& operator=(const MetricRegistry&) = delete;

  Counter& AddCounter(std::string_view name, std::string_view help, const Labels& labels = {});
  Gauge& AddGauge(std::string_view name, std::string_view help, const Labels& labels = {});
  Histogram& AddHistogram(std::string_view name, std::string_view help, const std::vector<double>& bounds,
                          const Labels& labels = {});
  // Called at every scrape, before rendering, to set gauges that are cheaper to read than to maintain.
  void AddCollector(std::function<void()> collect);

  // Prometheus text exposition format 0.0.4, with process_* of this process.
  std::string Render() const;

 private:
  struct Family;
  Family& GetFamily(std::string_view name, std::string_view help, int type);

  mutable std::mutex mu_;
  std::map<std::string, std::unique_ptr<Family>, std::less<>> families_;
  std::vector<std::function<void()>> collectors_;
};

}  // namespace tidepool
