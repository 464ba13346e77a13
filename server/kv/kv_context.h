#pragma once

#include <functional>
#include <string>

#include "absl/time/time.h"
#include "base/block_layout.h"
#include "base/clock.h"
#include "kvstore/block_pool.h"
#include "kvstore/block_tier.h"
#include "kvstore/fetch_node.h"
#include "server/cluster/scheduler_locator.h"
#include "server/rpc/rpc.h"
#include "tidepool/v1/kv.grpc.pb.h"

namespace tidepool {

// KvContext: the pool of this process, as its control API sees it. What it points to outlives the service.
struct KvContext {
  v1::WorkerAddress self;  // worker_id and boot_id are used
  std::string fingerprint;
  BlockLayout layout;
  std::string codec = "none";  // enters the root keys
  std::string cluster_token;
  BlockPool* pool = nullptr;
  // Whole, decoded blocks of layout.block_bytes(); null: no disk tier. Its events are in pool->events(), too.
  BlockTier* disk = nullptr;
  // Told of each block that was copied here and published: for whoever stores it below. May be empty; must
  // not block.
  std::function<void(const BlockKey&, const BlockLease&)> on_copied;
  FetchNode* fetch = nullptr;
  ChannelCache* channels = nullptr;
  // Whom to ask, and whose orders to obey; may be null where nothing asks.
  SchedulerLocator* scheduler = nullptr;
  absl::Duration fetch_timeout = absl::Seconds(10);  // of one batch of blocks
  const Clock* clock = &Clock::Real();               // FetchNode's
};

}  // namespace tidepool
