#include "kvstore/disk/disk_probe.h"

namespace tidepool {
namespace {

Counter& Ops(MetricRegistry& m, const char* op, const char* result) {
  return m.AddCounter("tidepool_pool_ops_total", "Operations on the block pool by outcome.",
                      {{"tier", "disk"}, {"op", op}, {"result", result}});
}
Counter& Dropped(MetricRegistry& m, const char* reason) {
  return m.AddCounter("tidepool_pool_stores_dropped_total", "Blocks that were not stored, by reason.",
                      {{"tier", "disk"}, {"reason", reason}});
}
Counter& Evictions(MetricRegistry& m, const char* reason) {
  return m.AddCounter("tidepool_pool_evictions_total", "Published blocks that left the pool.",
                      {{"tier", "disk"}, {"reason", reason}});
}
Counter& Faults(MetricRegistry& m, const char* reason) {
  return m.AddCounter("tidepool_pool_faults_total", "Times that the tier was switched off, by reason.",
                      {{"tier", "disk"}, {"reason", reason}});
}
Gauge& Waiting(MetricRegistry& m, const char* op) {
  return m.AddGauge("tidepool_pool_ops_waiting", "Operations accepted and not answered.",
                    {{"tier", "disk"}, {"op", op}});
}
Gauge& State(MetricRegistry& m, TierState state) {
  return m.AddGauge("tidepool_pool_tier_state", "1 for the state that the tier is in.",
                    {{"tier", "disk"}, {"state", std::string(TierStateName(state))}});
}
Counter& MovedBytes(MetricRegistry& m, const char* op) {
  return m.AddCounter("tidepool_pool_tier_bytes_total", "Bytes moved from and to the tier.",
                      {{"tier", "disk"}, {"op", op}});
}
Counter& Compressed(MetricRegistry& m, const char* result) {
  return m.AddCounter("tidepool_pool_compressed_blocks_total",
                      "Blocks on the disk that were to be stored in fewer bytes, by what became of them.",
                      {{"tier", "disk"}, {"result", result}});
}
Counter& CodedBytes(MetricRegistry& m, const char* form) {
  return m.AddCounter("tidepool_pool_encoded_bytes_total",
                      "Bytes of blocks that went through the lossless encoding, and what was stored of them.",
                      {{"tier", "disk"}, {"form", form}});
}
Histogram& Seconds(MetricRegistry& m, const char* op) {
  return m.AddHistogram("tidepool_pool_op_seconds", "Time of one operation at the tier's backend.",
                        LatencyBuckets(), {{"tier", "disk"}, {"op", op}});
}

}  // namespace

DiskProbe::DiskProbe(MetricRegistry& m)
    : bytes(m.AddGauge("tidepool_pool_bytes", "Bytes of KV held.", {{"tier", "disk"}})),
      capacity(m.AddGauge("tidepool_pool_capacity_bytes", "Bytes of KV that the tier may hold.",
                          {{"tier", "disk"}})),
      objects(m.AddGauge("tidepool_pool_objects", "Blocks readable by key.", {{"tier", "disk"}})),
      reads_waiting(Waiting(m, "read")),
      writes_waiting(Waiting(m, "write")),
      read_hit(Ops(m, "read", "hit")),
      read_miss(Ops(m, "read", "miss")),
      read_mismatch(Ops(m, "read", "mismatch")),
      read_damaged(Ops(m, "read", "damaged")),
      read_full(Ops(m, "read", "full")),
      read_timeout(Ops(m, "read", "timeout")),
      read_cancelled(Ops(m, "read", "cancelled")),
      read_unavailable(Ops(m, "read", "unavailable")),
      write_ok(Ops(m, "write", "ok")),
      write_duplicate(Ops(m, "write", "duplicate")),
      write_invalid(Ops(m, "write", "invalid")),
      write_cancelled(Ops(m, "write", "cancelled")),
      write_unavailable(Ops(m, "write", "unavailable")),
      write_dropped(Ops(m, "write", "dropped")),
      dropped_queue(Dropped(m, "queue")),
      dropped_wait(Dropped(m, "wait")),
      dropped_endurance(Dropped(m, "endurance")),
      dropped_no_room(Dropped(m, "no_room")),
      evicted_capacity(Evictions(m, "capacity")),
      evicted_erased(Evictions(m, "erased")),
      evicted_damaged(Evictions(m, "damaged")),
      evicted_mismatch(Evictions(m, "mismatch")),
      fault_open(Faults(m, "open")),
      fault_io(Faults(m, "io_error")),
      fault_no_space(Faults(m, "no_space")),
      fault_slow(Faults(m, "slow")),
      fault_index(Faults(m, "index")),
      index_resets(m.AddCounter("tidepool_pool_index_resets_total",
                                "Times that the tier's index could not be read and was begun anew.",
                                {{"tier", "disk"}})),
      read_bytes(MovedBytes(m, "read")),
      written_bytes(MovedBytes(m, "write")),
      compressed_shorter(Compressed(m, "shorter")),
      compressed_not_worth(Compressed(m, "as_it_was")),
      coded_payload_bytes(CodedBytes(m, "payload")),
      coded_stored_bytes(CodedBytes(m, "stored")),
      read_seconds(Seconds(m, "read")),
      write_seconds(Seconds(m, "write")),
      opening_(State(m, TierState::kOpening)),
      on_(State(m, TierState::kOn)),
      off_(State(m, TierState::kOff)) {}

void DiskProbe::SetState(TierState state) {
  opening_.Set(state == TierState::kOpening);
  on_.Set(state == TierState::kOn);
  off_.Set(state == TierState::kOff);
}

}  // namespace tidepool
