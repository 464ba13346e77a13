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
Gauge& Pinned(MetricRegistry& m, std::string_view tier, PinKind kind) {
  return m.AddGauge("tidepool_pool_pinned_objects", "Blocks that a pin keeps from eviction.",
                    {{"tier", std::string(tier)}, {"kind", std::string(PinKindName(kind))}});
}
std::array<Gauge*, kLeaseKinds> Leases(MetricRegistry& m, std::string_view tier) {
  std::array<Gauge*, kLeaseKinds> out;
  for (size_t k = 0; k < kLeaseKinds; ++k) {
    out[k] = &m.AddGauge(
        "tidepool_pool_leases", "Leases held on slots, by what for.",
        {{"tier", std::string(tier)}, {"kind", std::string(LeaseKindName(static_cast<LeaseKind>(k)))}});
  }
  return out;
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
      pinned_hard(Pinned(m, tier, PinKind::kHard)),
      pinned_soft(Pinned(m, tier, PinKind::kSoft)),
      leases(Leases(m, tier)),
      reserve_ok(Ops(m, tier, "reserve", "ok")),
      reserve_full(Ops(m, tier, "reserve", "full")),
      lookup_hit(Ops(m, tier, "lookup", "hit")),
      lookup_miss(Ops(m, tier, "lookup", "miss")),
      publish_ok(Ops(m, tier, "publish", "ok")),
      publish_duplicate(Ops(m, tier, "publish", "duplicate")),
      publish_cleared(Ops(m, tier, "publish", "cleared")),
      evicted_capacity(Evictions(m, tier, "capacity")),
      evicted_quota(Evictions(m, tier, "quota")),
      evicted_quarantine(Evictions(m, tier, "quarantine")),
      erased(Evictions(m, tier, "erased")),
      zeroed(m.AddCounter("tidepool_pool_zeroed_total",
                          "Slots wiped because they passed from one tenant to another.",
                          {{"tier", std::string(tier)}})),
      session_turns(m.AddCounter("tidepool_pool_session_turns_total",
                                 "Requests recognised as a further turn of a conversation.",
                                 {{"tier", std::string(tier)}})),
      policy_switches(m.AddCounter("tidepool_pool_policy_switches_total",
                                   "Changes of the eviction policy by the tuner (kv.policy: auto).",
                                   {{"tier", std::string(tier)}})),
      pins_expired(m.AddCounter("tidepool_pool_pins_expired_total", "Pins that ended by their ttl.",
                                {{"tier", std::string(tier)}})),
      pins_refused(m.AddCounter("tidepool_pool_pins_refused_total",
                                "Blocks of a pinned session left unpinned: kv.hard_pin_percent was used up.",
                                {{"tier", std::string(tier)}})) {}

Counter& EventsLost(MetricRegistry& m) {
  return m.AddCounter("tidepool_pool_events_lost_total",
                      "Block events that a reader asked for too late: it had to list the tiers instead.");
}

}  // namespace tidepool
