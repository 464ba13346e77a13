#pragma once

#include <atomic>
#include <functional>
#include <mutex>
#include <set>
#include <string>

#include "absl/status/status.h"
#include "base/probe.h"
#include "scheduler/replication.h"
#include "server/cluster/scheduler_locator.h"
#include "server/rpc/rpc.h"

namespace tidepool {

// Replicator: carries out copy orders, each by one Kv.Copy call to the worker that is to have the blocks.
// Blocking: for threads that may wait. Thread-safe.
class Replicator {
 public:
  struct Tally {
    uint32_t copied = 0;
    uint32_t skipped = 0;
    uint64_t bytes = 0;
    std::string note;  // why blocks were skipped
  };

  // bytes_per_second: of each call; 0: no limit.
  Replicator(std::string cluster_token, uint64_t bytes_per_second, MetricRegistry& metrics);

  // Adds to `tally` as it goes on and calls `progress` then. An order of which nothing could be done is
  // counted as skipped, with the reason noted; only cancellation is an error. `cancelled` is asked at least
  // whenever the worker says how it goes on.
  absl::Status Execute(const CopyOrder& order, uint64_t block_bytes, const std::function<bool()>& cancelled,
                       const std::function<void()>& progress, Tally& tally);
  // Ends what runs; later calls are Cancelled.
  void Stop();
  // The term in which orders are given from now on: workers that know of a higher one refuse them.
  void SetTerm(uint64_t term) { term_ = term; }
  // Of calls from now on.
  void SetRate(uint64_t bytes_per_second) { bytes_per_second_ = bytes_per_second; }

 private:
  const std::string token_;
  std::atomic<uint64_t> bytes_per_second_;
  std::atomic<uint64_t> term_{0};  // 0: there are no terms
  Counter& blocks_;
  Counter& bytes_;
  Counter& skipped_;
  Counter& failures_;
  ChannelCache channels_;
  std::mutex mu_;
  bool stopped_ = false;
  std::set<grpc::ClientContext*> running_;
};

}  // namespace tidepool
