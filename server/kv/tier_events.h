#pragma once

#include <condition_variable>
#include <mutex>
#include <thread>

#include "kvstore/block_tier.h"
#include "kvstore/event_log.h"

namespace tidepool {

// TierEvents: what becomes of the disk tier's blocks, in the log of all block events of the process. While
// the tier is not on its blocks are not readable: `cleared` is said when it goes, and `stored` of all that is
// there when it is back. Driver: owns a thread for that listing. The tier outlives it, the log too.
class TierEvents final : public TierObserver {
 public:
  TierEvents(BlockTier& tier, EventLog& log);
  ~TierEvents() override;

  void OnStored(const BlockInfo& info) override;
  void OnRemoved(const BlockKey& key, TierRemoval why) override;
  void OnHealth(const TierHealth& health) override;

 private:
  void Run();
  void List();

  BlockTier& tier_;
  EventLog& log_;
  std::mutex mu_;
  std::condition_variable wake_;
  bool stop_ = false;
  bool list_ = false;  // the tier is on again
  bool on_ = false;
  std::thread thread_;
};

}  // namespace tidepool
