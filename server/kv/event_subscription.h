#pragma once

#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>

#include "server/kv/kv_context.h"

namespace tidepool {

// EventSubscription: one consumer of this process's block events. Driver: a thread that reads the log and
// writes one batch at a time; a consumer that reads slowly slows only itself, and one that falls out of the
// log gets a snapshot. See EVENTS.md for what it is promised.
class EventSubscription : public std::enable_shared_from_this<EventSubscription> {
 public:
  EventSubscription(const KvContext& context, const v1::KvSubscribeRequest& request);
  ~EventSubscription();

  // The call. `on_end` runs once, when the call is gone; then Join does not wait for long.
  grpc::ServerWriteReactor<v1::KvEventBatch>* Start(std::function<void()> on_end);
  // Ends it, with UNAVAILABLE unless the consumer was first. Any thread; does not wait.
  void Stop();
  void Join();

 private:
  class Reactor;

  void Run();
  // False: the call is over.
  bool Send(v1::KvEventBatch batch);
  bool SendSnapshot();
  bool SendEvents();
  bool Over();
  void Describe(v1::KvEvent& event, const BlockKey& key, Tier tier) const;
  v1::KvEventBatch NewBatch() const;

  const KvContext& context_;
  const bool with_tokens_;
  uint64_t next_ = 0;  // event wanted next; 0: a snapshot. The thread's own
  std::mutex mu_;
  std::condition_variable changed_;
  Reactor* reactor_ = nullptr;  // null: the call is gone
  bool writing_ = false;
  bool over_ = false;
  std::function<void()> on_end_;
  std::thread thread_;
};

}  // namespace tidepool
