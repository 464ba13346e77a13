#include "base/probe.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace tidepool {
namespace {

using ::testing::HasSubstr;

TEST(Probe, RendersLabelledCountersAtZero) {
  MetricRegistry registry;
  registry.AddCounter("tidepool_errors_total", "Errors.", {{"reason", "timeout"}});
  EXPECT_THAT(registry.Render(), HasSubstr("tidepool_errors_total{reason=\"timeout\"} 0"));
}

TEST(Probe, SameNameAndLabelsAreOneMetric) {
  MetricRegistry registry;
  Counter& a = registry.AddCounter("tidepool_x_total", "X.", {{"k", "v"}});
  Counter& b = registry.AddCounter("tidepool_x_total", "X.", {{"k", "v"}});
  EXPECT_EQ(&a, &b);
}

TEST(Probe, HistogramBucketsAreCumulativeAndBoundsInclusive) {
  MetricRegistry registry;
  Histogram& h = registry.AddHistogram("tidepool_t_seconds", "T.", {1, 2, 5});
  for (double v : {0.5, 1.0, 3.0, 9.0}) h.Observe(v);
  const std::string text = registry.Render();
  EXPECT_THAT(text, HasSubstr("tidepool_t_seconds_bucket{le=\"1\"} 2"));
  EXPECT_THAT(text, HasSubstr("tidepool_t_seconds_bucket{le=\"2\"} 2"));
  EXPECT_THAT(text, HasSubstr("tidepool_t_seconds_bucket{le=\"5\"} 3"));
  EXPECT_THAT(text, HasSubstr("tidepool_t_seconds_bucket{le=\"+Inf\"} 4"));
  EXPECT_THAT(text, HasSubstr("tidepool_t_seconds_sum 13.5"));
  EXPECT_EQ(h.Quantile(0.5), 1);
  EXPECT_EQ(h.Quantile(0.75), 5);
}

TEST(Probe, CollectorsRunAtEveryScrape) {
  MetricRegistry registry;
  Gauge& g = registry.AddGauge("tidepool_level_ratio", "L.");
  int scrapes = 0;
  registry.AddCollector([&] { g.Set(++scrapes); });
  registry.Render();
  EXPECT_THAT(registry.Render(), HasSubstr("tidepool_level_ratio 2"));
}

TEST(Probe, ReportsTheProcessItself) {
  MetricRegistry registry;
  const std::string text = registry.Render();
  for (const char* name :
       {"process_cpu_seconds_total", "process_resident_memory_bytes", "process_open_fds"}) {
    EXPECT_THAT(text, HasSubstr(std::string("\n") + name + " ")) << name;
  }
}

}  // namespace
}  // namespace tidepool
