#pragma once

#include <array>

#include "base/probe.h"
#include "kvstore/types.h"

namespace tidepool {

// PoolProbe: the metrics of one tier of the pool. Label sets exist from the start, at zero.
struct PoolProbe {
  PoolProbe(MetricRegistry& metrics, std::string_view tier);

  Gauge& usage;        // leased and quarantined slots / slots
  Gauge& bytes;        // in slots that hold something
  Gauge& objects;      // keys readable
  Gauge& quarantined;  // slots out of use for good
  Gauge& pinned_hard;  // blocks
  Gauge& pinned_soft;
  std::array<Gauge*, kLeaseKinds> leases;  // by LeaseKind
  Counter& reserve_ok;
  Counter& reserve_full;
  Counter& lookup_hit;   // per block
  Counter& lookup_miss;  // per call that ended in a miss
  Counter& publish_ok;
  Counter& publish_duplicate;
  Counter& publish_cleared;  // not made readable: cleared while it was being read
  Counter& evicted_capacity;
  Counter& evicted_quota;
  Counter& evicted_quarantine;
  Counter& erased;           // on somebody's request
  Counter& zeroed;           // slots wiped because they passed to another tenant
  Counter& session_turns;    // requests that carried on a conversation
  Counter& policy_switches;  // of the tuner
  Counter& pins_expired;
  Counter& pins_refused;  // blocks of a pinned session beyond the share of hard pins
};

// Of the event log, which all tiers of a process share.
Counter& EventsLost(MetricRegistry& metrics);

}  // namespace tidepool
