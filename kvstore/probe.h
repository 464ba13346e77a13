#pragma once

#include "base/probe.h"

namespace tidepool {

// PoolProbe: the metrics of one tier of the pool. Label sets exist from the start, at zero.
struct PoolProbe {
  PoolProbe(MetricRegistry& metrics, std::string_view tier);

  Gauge& usage;        // leased and quarantined slots / slots
  Gauge& bytes;        // in slots that hold something
  Gauge& objects;      // keys readable
  Gauge& quarantined;  // slots out of use for good
  Counter& reserve_ok;
  Counter& reserve_full;
  Counter& lookup_hit;   // per block
  Counter& lookup_miss;  // per call that ended in a miss
  Counter& publish_ok;
  Counter& publish_duplicate;
  Counter& evicted_capacity;
  Counter& evicted_quarantine;
  Counter& events_lost;  // events dropped because nobody drained them
};

}  // namespace tidepool
