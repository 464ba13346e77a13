#pragma once

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <variant>
#include <vector>

#include "base/clock.h"
#include "config/config.h"
#include "server/cluster/scheduler_locator.h"
#include "server/gateway/auth.h"
#include "server/gateway/cluster_watch.h"
#include "server/gateway/embeddings.h"
#include "server/gateway/errors.h"
#include "server/gateway/generation_defaults.h"
#include "server/gateway/probe.h"
#include "server/gateway/request.h"
#include "server/gateway/session_pins.h"
#include "server/gateway/tenant_limits.h"
#include "server/gateway/text_model.h"
#include "server/gateway/work_pool.h"
#include "server/rpc/rpc.h"

namespace tidepool {

class GrammarCompiler;

struct OutputLogprob {
  int32_t id = 0;
  float logprob = 0;
};
struct DeliveredToken {
  int32_t id = 0;
  float logprob = 0;
  std::vector<OutputLogprob> top;
};
// Of one token of the prompt.
struct PromptScore {
  float logprob = 0;
  uint32_t rank = 1;  // 1: the likeliest
  std::vector<OutputLogprob> top;
};

// What became known of the answer. Text lags behind tokens where a character is unfinished or a stop string
// may be beginning.
struct OutputDelta {
  std::string text;  // whole characters
  std::vector<DeliveredToken> tokens;
};

struct TokenUsage {
  uint32_t prompt_tokens = 0;
  uint32_t completion_tokens = 0;  // of all choices, those that best_of drops too; a stop token is not one
  uint32_t cached_tokens = 0;
  uint32_t reasoning_tokens = 0;  // of completion_tokens; the fronts' parsers know them
};

// What `return_trace` shows.
struct RequestTrace {
  v1::RequestPath path;
  std::string placement_reason;
  uint32_t attempts = 0;
  double ttft_seconds = 0;
  double itl_mean_seconds = 0;
  double itl_p99_seconds = 0;
};

struct AdmittedPrompt {
  std::vector<int32_t> ids;
  std::string text;  // as encoded; empty where the client sent ids
};

struct Admission {
  std::string id;  // of the request, made here
  std::vector<int32_t> prompt_ids;
  std::string prompt_text;           // as encoded; empty where the client sent ids
  std::vector<AdmittedPrompt> more;  // InferenceRequest::more_prompts, in their order
};

// How one choice ended.
struct ChoiceEnd {
  std::string finish_reason;  // stop, length; pooled
  // The stop string or stop token id that ended it; monostate: end of sequence, or length.
  std::variant<std::monostate, std::string, int32_t> stop_reason;
  std::vector<float> pooled;  // with `pooling`: the vector, and there was no answer
  RequestTrace trace;
};

struct Outcome {
  std::optional<ApiError> error;
  TokenUsage usage;
  RequestTrace trace;  // of choice 0
};

// OutputSink: where a front door takes the answers to one request: choices 0 to n - 1, with more_prompts
// those of each prompt one after another. Calls are ordered and never concurrent; none may block: OnAdmitted
// at most once, when all prompts are, then OnPromptLogprobs (before the first delta of
// choice 0) and, for each choice, OnDelta* with Restart between attempts and one OnChoiceEnd; OnDone exactly
// once, last. Without an error every choice has ended by then.
class OutputSink {
 public:
  virtual ~OutputSink() = default;
  // Tokenised and placed on workers; nothing was computed yet.
  virtual void OnAdmitted(const Admission& admission) = 0;
  // The next prompt tokens' logprobs, from prompt token 1 on.
  virtual void OnPromptLogprobs(std::vector<PromptScore> scores) = 0;
  // `usage`: so far. False: the client is gone or too slow, and the request is cancelled.
  virtual bool OnDelta(uint32_t choice, OutputDelta delta, const TokenUsage& usage) = 0;
  // A worker failed and the choice starts again from its first token, choice 0 with the prompt's logprobs.
  // False: the client has seen some of it.
  virtual bool Restart(uint32_t choice) = 0;
  virtual void OnChoiceEnd(uint32_t choice, const ChoiceEnd& end, const TokenUsage& usage) = 0;
  // Which tools a choice that has ended called, by name and in their order: who takes messages apart knows.
  // nullopt: it is not known. May be asked between OnChoiceEnd and OnDone.
  virtual std::optional<std::vector<std::string>> CalledTools(uint32_t /*choice*/) { return std::nullopt; }
  // The HTTP status that the client sees (or saw, where headers are out). Asked right before OnDone, so that
  // a request is counted before its client can ask for the count.
  virtual int Status(const Outcome& outcome) = 0;
  virtual void OnDone(const Outcome& outcome) = 0;
};

// RequestRunner: one request from its parsed form to its terminal outcome, independent of the front door:
//
//   tokenise (pool) → keys → Scheduler.Place → Worker.Generate → text, stop strings → sink → Scheduler.Finish
//
// A worker that fails costs time only: the request is placed again without that process, at most max_retries
// times, and goes on behind the tokens that came until then, as if nothing had happened: none is repeated,
// skipped or taken back (only what is numerically different at another batch size can differ, unless
// engine.batch_invariant). One attempt owns a request at a time; what another sends is dropped. Afterwards it
// ends in an error. Where no scheduler answers in a cluster with etcd, or no worker can go on with an answer
// that has begun, it asks again for placement_wait. Every request ends once, within request_timeout.
// Thread-safe; starts no thread of its own.
//
// With n or best_of above 1, or more_prompts, every choice is a sequence of its own, placed and counted (in
// flight, in metrics) as one, and drawn with seed + its number (of its prompt). The first choice of a prompt
// goes first; the others start with its first token, when the prompt's blocks are in the pool, so that they
// compute the prompt's last block at most. One that fails ends all, and counts as the one failure that it is:
// a client never gets fewer choices than it asked for.
//
// Requests of class batch are counted apart: at most gateway.batch_max_inflight of them are in flight, and
// none of max_inflight's places is theirs. The scheduler and the workers put them behind online ones.
class RequestRunner {
 public:
  struct Dependencies {  // all borrowed, except where shared
    const Config* config = nullptr;
    std::shared_ptr<const TextModel> text;
    const Authenticator* auth = nullptr;
    const ClusterWatch* cluster = nullptr;
    const SchedulerLocator* scheduler = nullptr;
    ChannelCache* channels = nullptr;
    GatewayProbe* probe = nullptr;
    WorkPool* pool = nullptr;
    const Clock* clock = nullptr;
    GenerationDefaults defaults;
    TenantLimits* limits = nullptr;  // null: none
    GrammarCompiler* grammars = nullptr;
  };

  // Handle of a running request; weak for the fronts: the request keeps itself alive.
  class Running {
   public:
    virtual ~Running() = default;
    // Ends the request with `why` and frees it everywhere. From any thread; later calls do nothing.
    virtual void Cancel(const ErrorKind& why) = 0;
  };

  explicit RequestRunner(Dependencies deps);
  // Shutdown was called.
  ~RequestRunner();

  // `timeout`: the client's own deadline, where it has one. The sink's OnDone may run before this returns.
  std::weak_ptr<Running> Start(InferenceRequest request, std::string tenant, std::shared_ptr<OutputSink> sink,
                               absl::Duration timeout = absl::InfiniteDuration());

  // The vectors of all inputs, or an error; `done` is called once, as a sink's OnDone, and may be before this
  // returns. Each input is a sequence, at most EmbeddingGroup::kSequences of them at once; nothing is
  // computed before all inputs are checked.
  std::weak_ptr<Running> StartEmbeddings(EmbeddingRequest request, std::string tenant, EmbeddingsDone done,
                                         absl::Duration timeout = absl::InfiniteDuration());

  // Why no request of that model can be taken now; nullopt: it can.
  std::optional<ApiError> CheckModel(std::string_view model) const;
  // The served model's name and context length, once known.
  std::optional<v1::ModelIdentity> Model() const;

  // What class online has in flight, for those who yield to it. O(requests in flight).
  struct OnlineTraffic {
    size_t inflight = 0;
    size_t waiting = 0;          // without a first token
    absl::Duration oldest_wait;  // of those
    // The next first token, or the tokens of late, miss their SLO or nearly do.
    bool slo_short = false;
  };
  OnlineTraffic Online();

  void BeginDrain() { draining_ = true; }
  bool draining() const { return draining_; }
  // Waits at most `grace` for the requests in flight, cancels the rest and waits until they are gone.
  void Shutdown(absl::Duration grace);

 private:
  class Request;

  // Why nothing (more) of that class can be taken now.
  std::optional<ApiError> CheckRoom(RequestClass request_class);
  uint64_t NewSeed();
  void NoteOnlineGap(double seconds, absl::Time now);
  void Register(const std::shared_ptr<Request>& request);
  // Of ~Request: it is found no more; and, when the last of it is gone, it does not keep Shutdown waiting.
  void Forget(Request* request);
  void Release();

  const Dependencies deps_;
  std::atomic<bool> draining_{false};
  std::atomic<uint64_t> next_seed_;
  SessionPins session_pins_;
  // Mean of the gaps between online tokens, the last few dozen; updates that race may lose one.
  std::atomic<double> online_gap_seconds_{0};
  std::atomic<int64_t> online_gap_at_ns_{0};

  std::mutex mu_;
  std::condition_variable changed_;
  size_t live_ = 0;          // Request objects
  size_t active_ = 0;        // requests without an outcome
  size_t active_batch_ = 0;  // of them
  std::set<Request*> requests_;
};

}  // namespace tidepool
