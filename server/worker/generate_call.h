#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <optional>
#include <string>

#include "server/worker/request_blocks.h"
#include "server/worker/stream_writer.h"
#include "server/worker/worker_context.h"

namespace tidepool {

// GenerateCall: one request on its decode worker, from the reservation of slots to the last token:
//
//   waiting for slots → [remote prefill + fetches | load from disk and holders] → engine → finished
//
// It may be preempted once it is in the engine: it waits for slots again then, however many do, finds
// what is left of its blocks, loads or computes the rest, and goes on where it was; whoever reads its answer
// sees a pause.
//
// Whatever fails on the way to the engine (prefill worker gone, blocks missing or damaged) costs time only:
// what is not here is computed here. A prompt whose logprobs are wanted is computed here from its first token
// on: its logits are nowhere else; so is one that is to be pooled (the mean of its hidden states) or ends
// before its first token. Ends exactly once: with a finish reason, an error, or the caller's cancellation,
// after which its slots come back as soon as they are quiescent. Thread-safe.
class GenerateCall final : public EngineSink, public std::enable_shared_from_this<GenerateCall> {
 public:
  using Port = StreamPort<v1::WorkerGenerateEvent>;

  // `trace`: the caller's. `on_end` runs once, when the outcome is known.
  GenerateCall(WorkerContext& context, const v1::WorkerGenerateRequest& request, const TraceContext& trace,
               std::shared_ptr<Port> port, std::function<void()> on_end);

  void Start();
  // The caller is gone: frees everything within one engine step.
  void Cancel();

  void OnBlockSealed(uint32_t index, const BlockKey& key, const BlockLease& lease) override;
  void OnPromptLogprobs(std::vector<PromptLogprob> scores) override;
  void OnToken(OutputToken token) override;
  void OnPreempted(std::unique_ptr<PreemptedSequence> sequence) override;
  void OnFinished(SequenceResult result) override;

 private:
  enum class Phase { kWaiting, kFetching, kEngine, kEnded };

  bool pooled() const { return request_.pooling() != v1::POOLING_UNSPECIFIED; }
  bool batch_class() const { return request_.request_class() == v1::REQUEST_CLASS_BATCH; }
  // Prompt and answer together.
  uint32_t tokens_max() const {
    return static_cast<uint32_t>(request_.prompt_size()) - request_.emitted_tokens() + request_.max_tokens();
  }
  // Everything that may be wrong with the request, before it waits for anything; makes constraint_.
  absl::Status Check();
  bool preemptible() const { return !pooled() && !request_.has_prompt_logprobs(); }
  // What is reserved at once, of tokens_max().
  uint32_t tokens_to_reserve() const;
  // These under SlotQueue's lock. Granted also where the request is over.
  SlotGrant TryReserve();
  bool Preempt();
  bool MayPreempt();
  // Saves the tail; what that cost, in tokens' worth.
  double SwapOut();
  // The following hold mu_.
  // Slots were granted for the first time.
  void BeginFetching(bool whole);
  void Resume();
  void StartRemotePrefill();
  void OnPrefillEvent(const v1::PrefillEvent& event);
  void OnPrefillEnd(const absl::Status& status);
  // Of the prefill worker's offers.
  void PlanFetch(uint32_t begin, uint32_t end, bool growing);
  // Goes on to the engine once no prefill, fetch or load is under way any more.
  void MaybeSubmit();
  void Submit();
  void End(grpc::Status status);
  void ReleasePeer();
  // Unlocks.
  void StartPlannedFetches(std::unique_lock<std::mutex>& lock);
  // These lock.
  void OnFetched(const PlannedFetch& fetch, FetchResult result);
  void OnLoaded(BlockLoader::Result result);

  WorkerContext& context_;
  v1::WorkerGenerateRequest request_;  // without its grammar, once that is read
  const std::string attempt_id_;
  const TraceContext trace_;
  const std::string log_name_;
  const std::shared_ptr<Port> port_;
  const absl::Time arrival_;

  std::mutex mu_;
  std::function<void()> on_end_;
  Phase phase_ = Phase::kWaiting;
  SlotQueue::Place place_;
  std::unique_ptr<RequestBlocks> blocks_;        // never null
  std::shared_ptr<BlockLoader> loader_;          // while it loads
  std::unique_ptr<TokenConstraint> constraint_;  // null: none; gone to the engine with the rest
  bool remote_ = false;                          // a remote prefill was started
  bool prefill_running_ = false;                 // and has not ended
  std::shared_ptr<grpc::ClientContext> prefill_context_;
  std::vector<PlannedFetch> planned_;  // counted as pending, to be started without the lock
  uint32_t next_offer_ = 0;      // first block that was not offered yet; above the sealed ones: nor the tail
  uint32_t first_computed_ = 0;  // blocks from here on are sealed from what was computed here
  std::optional<v1::PrefillEvent::Done> done_;
  v1::RequestPath path_;
  // Preempted and not yet in the engine again.
  std::unique_ptr<PreemptedSequence> preempted_;
  uint32_t preemptions_ = 0;           // so far
  std::atomic<uint32_t> outputs_ = 0;  // of its answer, what an earlier attempt has emitted not counted
  absl::Time granted_;
  absl::Time prefill_done_;
  absl::Time first_token_;
};

}  // namespace tidepool
