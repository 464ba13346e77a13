#include "kvstore/probe.h"

#include <string>

namespace tidepool {

namespace {
Counter& Ops(MetricRegistry& m, std::string_view tier, const char* op, const char* result) {
  return m.AddCounter("tidepool_pool_ops_total", "Operations on the block pool by outcome.",
                      {{"tier", std::string(tier)}, {"op", op}, {"result", result}});
}
Counter& Evictions(MetricRegistry& m, std::string_view tier, const char* reason) {
  return m.AddCounter("tidepool_pool_evictions_total", "Published blocks that left the pool.",
                      {{"tier", std::string(tier)}, {"reason", reason}});
}
}  // namespace

PoolProbe::PoolProbe(MetricRegistry& m, std::string_view tier)
    : usage(m.AddGauge("tidepool_kv_cache_usage_ratio",
                       "Share of KV slots in use by requests (reusable cache counts as free).")),
      bytes(m.AddGauge("tidepool_pool_bytes", "Bytes of KV held.", {{"tier", std::string(tier)}})),
      objects(m.AddGauge("tidepool_pool_objects", "Blocks readable by key.", {{"tier", std::string(tier)}})),
      quarantined(m.AddGauge("tidepool_pool_quarantined_objects",
                             "Slots never to be used again: a transfer into them could not be stopped.",
                             {{"tier", std::string(tier)}})),
      reserve_ok(Ops(m, tier, "reserve", "ok")),
      reserve_full(Ops(m, tier, "reserve", "full")),
      lookup_hit(Ops(m, tier, "lookup", "hit")),
      lookup_miss(Ops(m, tier, "lookup", "miss")),
      publish_ok(Ops(m, tier, "publish", "ok")),
      publish_duplicate(Ops(m, tier, "publish", "duplicate")),
      evicted_capacity(Evictions(m, tier, "capacity")),
      evicted_quarantine(Evictions(m, tier, "quarantine")),
      events_lost(m.AddCounter("tidepool_pool_events_lost_total",
                               "Block events dropped because the event queue was full.",
                               {{"tier", std::string(tier)}})) {}

}  // namespace tidepool
