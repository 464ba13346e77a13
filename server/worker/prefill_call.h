#pragma once

#include <functional>
#include <memory>
#include <mutex>
#include <string>

#include "server/worker/request_blocks.h"
#include "server/worker/stream_writer.h"
#include "server/worker/worker_context.h"

namespace tidepool {

// PrefillCall: one prompt on its prefill worker: slots, prefix from the pool and from holders, computation
// chunk by chunk; every block is offered to the decode worker as soon as it is sealed, the unsealed tail
// with the first token. Offers stay until the decode worker RELEASEs them or their lease runs out. Ends
// exactly once. Thread-safe.
class PrefillCall final : public EngineSink, public std::enable_shared_from_this<PrefillCall> {
 public:
  using Port = StreamPort<v1::PrefillEvent>;

  // `trace`: the caller's. `on_end` runs once, when the outcome is known.
  PrefillCall(WorkerContext& context, const v1::PrefillRequest& request, const TraceContext& trace,
              std::shared_ptr<Port> port, std::function<void()> on_end);

  void Start();
  // The decode worker is gone: frees everything within one engine step.
  void Cancel();

  void OnBlockSealed(uint32_t index, const BlockKey& key, const BlockLease& lease) override;
  void OnToken(OutputToken token) override;
  void OnFinished(SequenceResult result) override;

 private:
  enum class Phase { kWaiting, kFetching, kEngine, kEnded };

  bool batch_class() const { return request_.request_class() == v1::REQUEST_CLASS_BATCH; }
  absl::Status Check();
  bool TryReserve();
  // Locks.
  void OnFetched(uint32_t begin, FetchResult result);
  // The following hold mu_.
  std::vector<PlannedFetch> PlanFetches();
  void Submit();
  // Offers the leading published blocks that the decode worker lacks.
  void OfferCached();
  void End(grpc::Status status);

  WorkerContext& context_;
  v1::PrefillRequest request_;  // without its grammar, once that is read
  const std::string attempt_id_;
  const std::string log_name_;
  const std::shared_ptr<Port> port_;
  const absl::Time arrival_;

  std::mutex mu_;
  std::function<void()> on_end_;
  Phase phase_ = Phase::kWaiting;
  RequestBlocks blocks_;
  std::unique_ptr<TokenConstraint> constraint_;  // null: none; gone to the engine with the rest
  uint32_t cached_tokens_ = 0;
  absl::Time granted_;
  OutputToken first_token_;
};

}  // namespace tidepool
