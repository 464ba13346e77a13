#pragma once

#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>

#include "server/worker/request_blocks.h"
#include "server/worker/stream_writer.h"
#include "server/worker/worker_context.h"

namespace tidepool {

// PrefillCall: one prompt on its prefill worker: slots, prefix from the pool, from the disk and from holders,
// computation chunk by chunk; every block is offered to the decode worker as soon as it is sealed. Those of
// the last chunk, the unsealed tail with them, are offered when the chunk begins and grow by layers; with
// config.transport.layer_streaming off, they are offered after it, the tail with the first token. Offers stay
// until the decode worker RELEASEs them or their lease runs out. Ends exactly once. Thread-safe.
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
  void OnLastChunk(uint32_t first, std::span<const BlockLease> blocks) override;
  void OnLayersComputed(uint32_t layers) override;
  void OnToken(OutputToken token) override;
  void OnFinished(SequenceResult result) override;

 private:
  enum class Phase { kWaiting, kFetching, kEngine, kEnded };

  bool batch_class() const { return request_.request_class() == v1::REQUEST_CLASS_BATCH; }
  absl::Status Check();
  SlotGrant TryReserve();
  // Locks.
  void OnLoaded(BlockLoader::Result result);
  // The following hold mu_.
  void Submit();
  // Offers those of the published blocks [begin, end) that the decode worker lacks.
  void OfferPublished(uint32_t begin, uint32_t end);
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
  SlotQueue::Place place_;
  RequestBlocks blocks_;
  std::shared_ptr<BlockLoader> loader_;  // while it loads
  std::optional<uint32_t>
      growing_;  // blocks from here on, and the tail, are on offer since the last chunk began
  std::unique_ptr<TokenConstraint> constraint_;  // null: none; gone to the engine with the rest
  uint32_t cached_tokens_ = 0;
  absl::Time granted_;
  OutputToken first_token_;
};

}  // namespace tidepool
