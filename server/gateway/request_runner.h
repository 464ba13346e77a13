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
#include "server/gateway/auth.h"
#include "server/gateway/cluster_watch.h"
#include "server/gateway/errors.h"
#include "server/gateway/probe.h"
#include "server/gateway/request.h"
#include "server/gateway/text_model.h"
#include "server/gateway/work_pool.h"
#include "server/rpc/rpc.h"

namespace tidepool {

struct OutputLogprob {
  int32_t id = 0;
  float logprob = 0;
};
struct DeliveredToken {
  int32_t id = 0;
  float logprob = 0;
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
  uint32_t completion_tokens = 0;  // delivered; a stop token is not
  uint32_t cached_tokens = 0;
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

struct Admission {
  std::string id;  // of the request, made here
  std::vector<int32_t> prompt_ids;
  std::string prompt_text;  // as encoded; empty where the client sent ids
};

struct Outcome {
  std::optional<ApiError> error;
  std::string finish_reason;  // stop, length; empty with an error
  // The stop string or stop token id that ended it; monostate: end of sequence, or length.
  std::variant<std::monostate, std::string, int32_t> stop_reason;
  TokenUsage usage;
  RequestTrace trace;
};

// OutputSink: where a front door takes one answer. Calls are ordered and never concurrent; none may block:
// OnAdmitted at most once, then OnDelta*, with Restart between attempts, and OnDone exactly once, last.
class OutputSink {
 public:
  virtual ~OutputSink() = default;
  // Tokenised and placed on workers; nothing was computed yet.
  virtual void OnAdmitted(const Admission& admission) = 0;
  // `usage`: so far. False: the client is gone or too slow, and the request is cancelled.
  virtual bool OnDelta(OutputDelta delta, const TokenUsage& usage) = 0;
  // A worker failed and the answer starts again from its first token. False: the client has seen some of it.
  virtual bool Restart() = 0;
  // The HTTP status that the client sees (or saw, where headers are out). Asked right before OnDone, so that
  // a request is counted before its client can ask for the count.
  virtual int Status(const Outcome& outcome) = 0;
  virtual void OnDone(const Outcome& outcome) = 0;
};

// RequestRunner: one request from its parsed form to its terminal outcome, independent of the front door:
//
//   tokenise (pool) → keys → Scheduler.Place → Worker.Generate → text, stop strings → sink → Scheduler.Finish
//
// A worker that fails before anything reached the client costs time only: the request is placed again without
// that worker, at most max_retries times. Afterwards it ends in an error. Every request ends once, within
// request_timeout. Thread-safe; starts no thread of its own.
class RequestRunner {
 public:
  struct Dependencies {  // all borrowed, except where shared
    const Config* config = nullptr;
    std::shared_ptr<const TextModel> text;
    const Authenticator* auth = nullptr;
    const ClusterWatch* cluster = nullptr;
    ChannelCache* channels = nullptr;
    GatewayProbe* probe = nullptr;
    WorkPool* pool = nullptr;
    const Clock* clock = nullptr;
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

  // Why no request of that model can be taken now; nullopt: it can.
  std::optional<ApiError> CheckModel(std::string_view model) const;
  // The served model's name and context length, once known.
  std::optional<v1::ModelIdentity> Model() const;

  void BeginDrain() { draining_ = true; }
  bool draining() const { return draining_; }
  // Waits at most `grace` for the requests in flight, cancels the rest and waits until they are gone.
  void Shutdown(absl::Duration grace);

 private:
  class Request;

  void Register(const std::shared_ptr<Request>& request);
  void Unregister(Request* request);

  const Dependencies deps_;
  std::atomic<bool> draining_{false};
  std::atomic<uint64_t> next_seed_;

  std::mutex mu_;
  std::condition_variable changed_;
  size_t live_ = 0;    // Request objects
  size_t active_ = 0;  // requests without an outcome
  std::set<Request*> requests_;
};

}  // namespace tidepool
