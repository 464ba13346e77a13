#pragma once

#include <array>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/time/time.h"
#include "base/clock.h"
#include "base/probe.h"
#include "config/config.h"
#include "kvstore/block_pool.h"
#include "kvstore/fetch_node.h"
#include "kvstore/keys.h"
#include "server/engine/engine.h"
#include "server/model/model.h"
#include "server/rpc/rpc.h"
#include "server/worker/answer_lengths.h"
#include "server/worker/block_loader.h"
#include "server/worker/constraint_factory.h"
#include "server/worker/reporter.h"
#include "server/worker/slot_queue.h"
#include "server/worker/write_behind.h"
#include "tidepool/v1/cluster.grpc.pb.h"

namespace tidepool {

// WorkerProbe: the metrics that the worker's requests share.
struct WorkerProbe {
  explicit WorkerProbe(MetricRegistry& metrics);

  Counter& host_query_tokens;                             // prompt tokens looked up in the pool
  Counter& disk_query_tokens;                             // of those it had not: in the disk tier
  Counter& peer_query_tokens;                             // and at peers, their host and disk
  Counter& host_hit_tokens;                               // found in this worker's pool
  std::array<Counter*, kLoadedFrom> loaded_hit_tokens{};  // loaded instead of computed
  Histogram& queue_seconds;
  Histogram& prefill_seconds;
  Histogram& transfer_seconds;
  Histogram& decode_seconds;
  Counter& fallback_prefill;  // a remote prefill failed: computed here instead
  Counter& fallback_fetch;    // a fetch failed: its blocks are computed instead
  Counter& cancelled;
  Counter& failed;
};

// WorkerContext: what the requests of one worker share. Outlives them all. Thread-safe.
struct WorkerContext {
  Config config;
  v1::WorkerAddress self;
  std::shared_ptr<const Model> model;
  BlockLayout layout;
  BlockPool* pool = nullptr;
  Engine* engine = nullptr;
  FetchNode* fetch = nullptr;
  Reporter* reporter = nullptr;
  SlotQueue* slots = nullptr;
  AnswerLengths* lengths = nullptr;
  PrefillCost prefill_seconds;  // thread-safe; null: not known
  ChannelCache* channels = nullptr;
  ConstraintFactory* constraints = nullptr;
  const BlockLoader::Environment* loads = nullptr;  // null: nothing is loaded (config.kv.load is never)
  WriteBehind* store = nullptr;                     // null: no disk tier
  WorkerProbe* probe = nullptr;
  const Clock* clock = &Clock::Real();

  // Measured fetches for the next report; the oldest go when more than a report should carry wait.
  void AddFetchSample(const SourceId& source, uint64_t bytes, absl::Duration elapsed);
  std::vector<v1::FetchSample> TakeFetchSamples();

 private:
  std::mutex mu_;
  std::vector<v1::FetchSample> fetch_samples_;
};

// The name under which a request's attempt is known to engine, pool and peers: attempts never meet.
std::string AttemptId(const std::string& request_id, uint32_t attempt);

// SequenceSpec::priority of a message's: the signs differ.
int32_t EnginePriority(int32_t priority);

PeerAddress ToPeerAddress(const v1::WorkerAddress& address);
OutputToken FromProto(const v1::OutputToken& token);
void ToProto(const OutputToken& token, v1::OutputToken& out);
void ToProto(const PromptLogprob& score, v1::PromptLogprob& out);
// Fills what `sampling` says in `spec`. A peer's numbers: CheckSampling, and the engine, judge them.
void FromProto(const v1::Sampling& sampling, SequenceSpec& spec);
// InvalidArgument names the field and its limit. Not of the grammar: ConstraintFactory judges that.
absl::Status CheckSampling(const Model& model, const v1::Sampling& sampling);
// A prompt that this model can take: not empty, ids in the vocabulary, prompt + max_tokens in the context.
// max_tokens may be 0.
absl::Status CheckPrompt(const Model& model, std::span<const int32_t> prompt, uint32_t max_tokens);
// That the last `emitted` of a prompt may be the first of an answer of at most `max_tokens`.
absl::Status CheckEmitted(std::span<const int32_t> prompt, uint32_t emitted, uint32_t max_tokens);
// Brings a constraint to where the answer is after them. InvalidArgument: they are no beginning of what it
// allows.
absl::Status AcceptEmitted(std::span<const int32_t> prompt, uint32_t emitted, TokenConstraint& constraint);

}  // namespace tidepool
