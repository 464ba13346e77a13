#pragma once

#include <memory>
#include <mutex>
#include <set>

#include "server/kv/block_mover.h"
#include "server/kv/kv_context.h"
#include "server/kv/selection.h"
#include "server/rpc/long_call.h"

namespace tidepool {

class EventSubscription;

// KvService: the pool's control API of one process (proto/tidepool/v1/kv.proto). Long operations run on two
// threads of its own of each kind (one for compressing), and at most 16 of it wait; each of at most 16
// subscribers has a thread. Thread-safe.
class KvService final : public v1::Kv::CallbackService {
 public:
  static constexpr size_t kLongThreads = 2;
  static constexpr size_t kLongWaiting = 16;
  static constexpr size_t kSubscribersMax = 16;

  KvService(const KvContext& context, MetricRegistry& metrics);
  ~KvService() override;

  // Ends subscriptions and long operations; to be called before the server is shut down, which waits for its
  // calls. What is called later is refused.
  void Stop();

  BlockMover& mover() { return mover_; }

  grpc::ServerUnaryReactor* Lookup(grpc::CallbackServerContext* rpc, const v1::KvLookupRequest* request,
                                   v1::KvLookupReply* reply) override;
  grpc::ServerUnaryReactor* Where(grpc::CallbackServerContext* rpc, const v1::KvWhereRequest* request,
                                  v1::KvWhereReply* reply) override;
  grpc::ServerUnaryReactor* Pin(grpc::CallbackServerContext* rpc, const v1::KvPinRequest* request,
                                v1::KvPinReply* reply) override;
  grpc::ServerUnaryReactor* Unpin(grpc::CallbackServerContext* rpc, const v1::KvUnpinRequest* request,
                                  v1::KvUnpinReply* reply) override;
  grpc::ServerUnaryReactor* Stats(grpc::CallbackServerContext* rpc, const v1::KvStatsRequest* request,
                                  v1::KvStatsReply* reply) override;
  grpc::ServerWriteReactor<v1::KvProgress>* Copy(grpc::CallbackServerContext* rpc,
                                                 const v1::KvCopyRequest* request) override;
  grpc::ServerWriteReactor<v1::KvProgress>* Move(grpc::CallbackServerContext* rpc,
                                                 const v1::KvMoveRequest* request) override;
  grpc::ServerWriteReactor<v1::KvProgress>* Prefetch(grpc::CallbackServerContext* rpc,
                                                     const v1::KvPrefetchRequest* request) override;
  grpc::ServerWriteReactor<v1::KvProgress>* Evict(grpc::CallbackServerContext* rpc,
                                                  const v1::KvEvictRequest* request) override;
  grpc::ServerWriteReactor<v1::KvProgress>* Clear(grpc::CallbackServerContext* rpc,
                                                  const v1::KvClearRequest* request) override;
  grpc::ServerWriteReactor<v1::KvProgress>* Compress(grpc::CallbackServerContext* rpc,
                                                     const v1::KvCompressRequest* request) override;
  grpc::ServerWriteReactor<v1::KvEventBatch>* Subscribe(grpc::CallbackServerContext* rpc,
                                                        const v1::KvSubscribeRequest* request) override;

 private:
  using Progress = grpc::ServerWriteReactor<v1::KvProgress>;
  using Work = std::function<absl::Status(const MoveControl&, MoveTally&)>;

  // Answers at once.
  template <typename Body>
  grpc::ServerUnaryReactor* Answer(grpc::CallbackServerContext* rpc, const Body& body);
  // Runs on a thread of `calls`; `bytes_per_second` paces it.
  Progress* Run(LongCalls& calls, const char* name, uint64_t bytes_per_second, Work work);
  Progress* Refuse(const absl::Status& why);
  // Removes what is selected from these tiers. `pinned`: hard pins do not protect.
  absl::Status Remove(const KvSelection& selection, bool host, bool disk, bool pinned,
                      const MoveControl& control, MoveTally& tally);

  const KvContext& context_;
  BlockMover mover_;
  Counter& calls_failed_;
  Gauge& subscribers_gauge_;
  // Those that ask peers to do something, and those that ask nobody: two processes whose operations wait for
  // each other's would both stand still if they shared threads.
  LongCalls peer_calls_{kLongThreads, kLongWaiting};
  LongCalls local_calls_{kLongThreads, kLongWaiting};
  // Paced, it takes hours: an eviction or a clear does not wait for that.
  LongCalls compress_calls_{1, kLongWaiting};
  std::mutex mu_;
  bool stopping_ = false;
  std::set<std::shared_ptr<EventSubscription>> subscriptions_;
};

}  // namespace tidepool
