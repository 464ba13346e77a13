#pragma once

#include <condition_variable>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "server/kv/block_mover.h"
#include "server/kv/follow_core.h"
#include "tidepool/v1/kv.grpc.pb.h"

namespace tidepool {

// Follower: keeps a store fed: subscribes to the block events of every worker of the cluster and copies what
// FollowCore wants. Driver: owns a thread that looks for workers and copies, and one for each worker it
// follows (at most 64). Losing a worker or the scheduler only pauses it.
class Follower {
 public:
  struct Options {
    FollowCore::Options core;
    uint64_t bytes_per_second = 0;  // 0: no limit
  };

  // `context` and `mover` outlive it.
  Follower(Options options, const KvContext& context, BlockMover& mover, MetricRegistry& metrics);
  ~Follower();

 private:
  // One worker that is followed.
  struct Source {
    v1::WorkerAddress address;
    grpc::ClientContext call;
    std::thread thread;
    bool ended = false;  // its thread is about to return
  };

  void Run();
  void LookForWorkers();
  void Follow(Source& source);
  void Take();
  void OnBatch(Source& source, const v1::KvEventBatch& batch);

  const Options options_;
  const KvContext& context_;
  BlockMover& mover_;
  Counter& dropped_;
  Counter& failures_;
  Gauge& wanted_;
  Gauge& followed_;
  std::mutex mu_;
  std::condition_variable wake_;
  bool stop_ = false;
  FollowCore core_;
  uint64_t dropped_said_ = 0;
  std::map<std::string, std::unique_ptr<Source>> sources_;  // by worker id
  std::thread thread_;
};

}  // namespace tidepool
