#pragma once

#include "base/probe.h"
#include "kvstore/block_tier.h"

namespace tidepool {

// DiskProbe: the metrics of the disk tier. Label sets exist from the start, at zero.
struct DiskProbe {
  explicit DiskProbe(MetricRegistry& metrics);

  void SetState(TierState state);

  Gauge& bytes;
  Gauge& capacity;
  Gauge& objects;
  Gauge& reads_waiting;
  Gauge& writes_waiting;

  Counter& read_hit;
  Counter& read_miss;
  Counter& read_mismatch;  // the record was another write's, another model's or of other tokens; dropped
  Counter& read_damaged;   // dropped
  Counter& read_full;
  Counter& read_timeout;
  Counter& read_cancelled;
  Counter& read_unavailable;
  Counter& write_ok;
  Counter& write_duplicate;
  Counter& write_invalid;
  Counter& write_cancelled;
  Counter& write_unavailable;
  Counter& write_dropped;

  // Why a store was dropped.
  Counter& dropped_queue;      // too many waiting
  Counter& dropped_wait;       // waited too long for loads, or for the rate
  Counter& dropped_endurance;  // the day's budget of writes is used up
  Counter& dropped_no_room;    // everything is being read or written

  Counter& evicted_capacity;
  Counter& evicted_erased;
  Counter& evicted_damaged;
  Counter& evicted_mismatch;

  // Why the tier was switched off.
  Counter& fault_open;
  Counter& fault_io;
  Counter& fault_no_space;
  Counter& fault_slow;
  Counter& fault_index;

  Counter& index_resets;
  Counter& read_bytes;
  Counter& written_bytes;
  Counter& compressed_shorter;  // by Compress
  Counter& compressed_not_worth;
  Counter& coded_payload_bytes;  // by Compress and by stores
  Counter& coded_stored_bytes;
  Histogram& read_seconds;
  Histogram& write_seconds;

 private:
  Gauge& opening_;
  Gauge& on_;
  Gauge& off_;
};

}  // namespace tidepool
