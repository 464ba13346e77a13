#include "server/gateway/request_runner.h"

#include <grpcpp/alarm.h>

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "base/digest.h"
#include "base/log.h"
#include "base/rng.h"
#include "base/status.h"
#include "kvstore/keys.h"
#include "server/gateway/access_log.h"
#include "server/gateway/choice_group.h"
#include "server/gateway/embedding_group.h"
#include "server/gateway/structured_output.h"
#include "server/model/text/detokenizer.h"
#include "server/model/text/stop_matcher.h"
#include "tidepool/v1/kv.grpc.pb.h"

namespace tidepool {
namespace {

// The scheduler decides in microseconds; what takes longer is a scheduler that is gone.
constexpr absl::Duration kPlaceTimeout = absl::Seconds(2);
constexpr absl::Duration kFinishTimeout = absl::Seconds(2);
constexpr absl::Duration kPlaceAgain = absl::Milliseconds(100);
constexpr uint32_t kRetryAfterMax = 60;
constexpr size_t kGapsMax = 4096;  // of return_trace's percentile
constexpr double kNoSloSeconds = 1e6;

// Spread by 20 %, so that the clients that were refused together do not come back together.
uint32_t RetryAfter(uint32_t seconds) {
  static std::atomic<uint64_t> counter{0};
  const double factor = 0.8 + 0.4 * Rng(counter.fetch_add(1)).Uniform();
  return static_cast<uint32_t>(
      std::clamp(std::ceil(std::max(1u, seconds) * factor), 1.0, double{kRetryAfterMax}));
}

// gRPC's own messages name addresses; clients get those that our processes wrote.
std::string SafeMessage(const grpc::Status& status, std::string_view otherwise) {
  const std::string& message = status.error_message();
  for (const char* sign :
       {"ipv4:", "ipv6:", "unix:", "connect", "Socket", "GOAWAY", "Stream removed", "RST_STREAM"}) {
    if (message.find(sign) != std::string::npos) return std::string(otherwise);
  }
  return message.empty() ? std::string(otherwise) : message;
}

ApiError Cancelled(const ErrorKind& why) {
  if (why.code == errors::kDraining.code) {
    return MakeRetryable(why, "the gateway shut down before the answer was complete; send the request again",
                         RetryAfter(1));
  }
  return MakeError(why, why.code == errors::kSlowClient.code ? "the client did not read what was sent"
                                                             : "the client went away");
}

std::string_view CauseOf(grpc::StatusCode code) {
  switch (code) {
    case grpc::StatusCode::UNAVAILABLE:
      return "its worker became unavailable";
    case grpc::StatusCode::RESOURCE_EXHAUSTED:
      return "its worker has no room";
    case grpc::StatusCode::DATA_LOSS:
      return "its worker found damaged data";
    case grpc::StatusCode::CANCELLED:
      return "its worker stopped";
    default:
      return "its worker failed";
  }
}

}  // namespace

// One choice of a request; mostly the only one.
class RequestRunner::Request final : public ChoiceRun,
                                     public std::enable_shared_from_this<RequestRunner::Request> {
 public:
  Request(RequestRunner& runner, InferenceRequest request, std::string tenant,
          std::shared_ptr<OutputSink> sink, absl::Duration timeout)
      : runner_(runner),
        deps_(runner.deps_),
        request_(std::move(request)),
        tenant_(std::move(tenant)),
        sink_(std::move(sink)),
        arrival_(deps_.clock->Now()),
        deadline_(arrival_ + std::min(timeout, deps_.config->gateway.request_timeout)) {
    admission_.id = RandomHexId();
    log_name_ = admission_.id + TraceNote(request_.trace);
  }
  ~Request() override { runner_.Forget(this); }

  // Refuses at once, or goes on in the pool.
  void Begin() override;
  void BeginWith(PrepareFn prepare) override;
  void BeginAfter(std::vector<int32_t> ids, std::string text) override;
  void Abandon() override;
  void Cancel(const ErrorKind& why) override;
  void CancelUncounted(const ErrorKind& why) override;
  bool batch_class() const { return request_.request_class == RequestClass::kBatch; }
  // Without a first token, and not ended.
  bool waiting() const { return waiting_; }
  absl::Time arrival() const { return arrival_; }

 private:
  class Attempt;

  void Prepare();
  void Go(const v1::ModelIdentity& model);
  std::optional<ApiError> Tokenise();
  // truncate_prompt_tokens.
  void Truncate(const v1::ModelIdentity& model);
  std::optional<ApiError> FitContext(const v1::ModelIdentity& model);
  std::optional<ApiError> CheckIds(const v1::ModelIdentity& model) const;
  std::optional<ApiError> CheckRepeatedPrompt() const;
  void MakeSampling(const v1::ModelIdentity& model);
  // What the answer is held to. The first choice of a prompt compiles it, in the pool; the others find it.
  std::optional<ApiError> MakeGrammar();
  void MakeBadWords(uint32_t vocab);
  void MakeKeys(const v1::ModelIdentity& model);
  // What is to be placed: the prompt, and what was emitted of the answer.
  void FillPlace();
  std::vector<int32_t> PromptAndEmitted() const;
  void Place();
  // Places again after a moment, where there is time for it; false: there is none.
  bool PlaceLater();
  void OnPlaced(const grpc::Status& status, const v1::PlaceReply& reply);
  void Generate(const v1::PlaceReply& placement);
  // What makes text of tokens, from the first on. False: it cannot, and the request has failed.
  bool BeginAnswer();
  void TakePath(const v1::RequestPath& path);
  // Of `pooling`. False: read no further.
  bool OnPooled(const v1::WorkerGenerateEvent& event);
  // False: read no further.
  bool OnEvent(uint32_t attempt, const v1::WorkerGenerateEvent& event);
  // The prompt's logprobs as they come. False: they do not fit the prompt, and the request has failed.
  bool TakePromptLogprobs(const v1::WorkerGenerateEvent& event);
  void OnAttemptEnd(uint32_t attempt, const grpc::Status& status);
  void Retry();
  // `completed`: the answer is there, and the scheduler may learn from it.
  void SendFinish(bool completed, std::function<void()> then);
  // Keeps a conversation whose next turn may bring a tool's result. Not under mu_.
  void SendPin(const std::string& worker, absl::Duration ttl);
  bool Deliver(OutputDelta delta);
  void TimeTokens(size_t count);
  // For the access log: what became of this choice.
  void Record(const Outcome& outcome, const ChoiceEnd* end, absl::Time now) const;
  void Fail(ApiError error);
  // An error, or how the choice ended.
  void Done(std::variant<ApiError, ChoiceEnd> how);

  // The context of the next call, with what is left of the deadline; null: cancelled, and Done was called.
  std::shared_ptr<grpc::ClientContext> NewCall(absl::Duration timeout);
  TokenUsage Usage() const {
    return {static_cast<uint32_t>(admission_.prompt_ids.size()), delivered_, trace_.path.cached_tokens()};
  }

  RequestRunner& runner_;
  // Goes after all that follows it: once nothing is alive the runner's owner takes away what records and
  // sinks still use when they go.
  struct Alive {
    RequestRunner& runner;
    ~Alive() { runner.Release(); }
  };
  const Alive alive_{runner_};
  const Dependencies& deps_;
  const InferenceRequest request_;
  const std::string tenant_;
  const std::shared_ptr<OutputSink> sink_;
  const absl::Time arrival_, deadline_;

  // Touched by one step at a time: the steps follow each other.
  Admission admission_;
  std::string log_name_;
  PrepareFn prepare_;  // in Tokenise's place, where somebody else does that
  bool admitted_ = false;
  uint32_t max_tokens_ = 0;
  std::string salt_;
  uint64_t session_ = 0;
  uint32_t turn_ = 0;                 // of a chat: how many messages its user has sent
  bool offers_tools_ = false;         // of a chat: its answer may be a call
  bool ends_in_tool_result_ = false;  // of a chat
  v1::Sampling sampling_;             // without its grammar, which is large and shared
  GrammarCompiler::Grammar grammar_;  // null: the answer is free
  BlockKey root_;                     // of the block keys
  uint32_t block_tokens_ = 0;
  v1::PlaceRequest place_;
  bool placed_ = false;                            // a booking may exist at the scheduler
  absl::Time place_until_ = absl::InfinitePast();  // while it is asked for again and again: for how long
  std::optional<StreamDecoder> decoder_;
  std::optional<StopMatcher> stops_;
  uint32_t next_index_ = 0;
  std::vector<int32_t> emitted_;  // next_index_ of them: what the next attempt goes on behind
  uint32_t delivered_ = 0;
  size_t scores_ = 0;  // of the prompt, taken
  std::string decode_worker_, decode_boot_;
  std::vector<std::string> workers_;  // host:port of those that hold the KV
  RequestTrace trace_;
  bool resumed_ = false;          // an attempt failed in the middle of the answer
  bool ended_by_itself_ = false;  // the answer did, not at a limit: its length tells something
  absl::Time first_token_, last_token_;
  std::atomic<bool> waiting_{true};
  double admit_seconds_ = -1;
  std::optional<TenantLimits::Ticket> ticket_;  // the tenant's place, until Done
  std::vector<float> gaps_;

  std::mutex mu_;
  std::optional<ErrorKind> cancelled_;
  bool uncounted_ = false;  // its error is another's consequence
  bool ended_ = false;
  uint32_t attempt_ = 0;  // the fence: events of another attempt are dropped
  std::shared_ptr<grpc::ClientContext> call_;
};

// One Worker.Generate call. Owns itself until gRPC is done with it.
class RequestRunner::Request::Attempt final : public grpc::ClientReadReactor<v1::WorkerGenerateEvent> {
 public:
  Attempt(std::shared_ptr<Request> request, uint32_t number, std::shared_ptr<grpc::ClientContext> context,
          const std::shared_ptr<grpc::Channel>& channel)
      : request_(std::move(request)),
        number_(number),
        context_(std::move(context)),
        stub_(v1::Worker::NewStub(channel)) {}

  void Start(v1::WorkerGenerateRequest message) {
    message_ = std::move(message);
    stub_->async()->Generate(context_.get(), &message_, this);
    StartRead(&event_);
    StartCall();
  }

 private:
  void OnReadDone(bool ok) override {
    if (!ok) return;
    message_.Clear();  // long since sent: a prompt and a grammar are not kept for as long as an answer takes
    if (request_->OnEvent(number_, event_)) {
      StartRead(&event_);
    } else {
      context_->TryCancel();
    }
  }
  void OnDone(const grpc::Status& status) override {
    request_->OnAttemptEnd(number_, status);
    delete this;
  }

  const std::shared_ptr<Request> request_;
  const uint32_t number_;
  const std::shared_ptr<grpc::ClientContext> context_;
  const std::unique_ptr<v1::Worker::Stub> stub_;
  v1::WorkerGenerateRequest message_;
  v1::WorkerGenerateEvent event_;
};

void RequestRunner::Request::Begin() {
  if (auto error = runner_.CheckRoom(request_.request_class)) return Fail(std::move(*error));
  if (auto error = runner_.CheckModel(request_.model)) return Fail(std::move(*error));
  if (!request_.more_prompts.empty() && request_.scored() >= 0) {
    const char* field = request_.prompt_logprobs >= 0 ? "prompt_logprobs" : "echo";
    return Fail(MakeError(errors::kUnsupported,
                          absl::StrCat(field,
                                       ": what the model thought of a prompt is given for one prompt at a "
                                       "time; send the prompts one by one"),
                          field));
  }
  // Batch lines have a limit of their own and take nothing of what their tenant may use online.
  if (deps_.limits != nullptr && request_.metered) {
    auto admitted = deps_.limits->Admit(tenant_);
    if (auto* error = std::get_if<ApiError>(&admitted)) return Fail(std::move(*error));
    ticket_.emplace(std::get<TenantLimits::Ticket>(std::move(admitted)));
  }
  if (!deps_.pool->TrySubmit([self = shared_from_this()] { self->Prepare(); })) {
    Fail(MakeRetryable(errors::kTooManyRequests,
                       "too many prompts are waiting to be tokenised; try again later", RetryAfter(1)));
  }
}

void RequestRunner::Request::BeginWith(PrepareFn prepare) {
  prepare_ = std::move(prepare);
  Begin();
}

void RequestRunner::Request::CancelUncounted(const ErrorKind& why) {
  {
    std::lock_guard lock(mu_);
    uncounted_ = true;
  }
  Cancel(why);
}

void RequestRunner::Request::Cancel(const ErrorKind& why) {
  std::shared_ptr<grpc::ClientContext> call;
  {
    std::lock_guard lock(mu_);
    if (ended_ || cancelled_) return;
    cancelled_ = why;
    call = call_;
  }
  // The step that is under way sees cancelled_ and ends the request.
  if (call) call->TryCancel();
}

std::shared_ptr<grpc::ClientContext> RequestRunner::Request::NewCall(absl::Duration timeout) {
  auto context = std::make_shared<grpc::ClientContext>();
  AddClusterToken(*context, deps_.config->cluster.token);
  AddTrace(*context, request_.trace);
  SetTimeout(*context, std::min(timeout, deadline_ - deps_.clock->Now()));
  {
    std::lock_guard lock(mu_);
    if (ended_) return nullptr;
    if (!cancelled_) {
      call_ = context;
      return context;
    }
  }
  Fail(Cancelled(*cancelled_));
  return nullptr;
}

void RequestRunner::Request::Prepare() {
  if (deps_.clock->Now() >= deadline_) {
    return Fail(MakeError(errors::kTimeout, "the request waited longer than its deadline before it started"));
  }
  const auto model = runner_.Model();
  if (!model)
    return Fail(MakeRetryable(errors::kNotReady, "no worker has registered a model yet", RetryAfter(1)));
  uint32_t tokens = 0;
  if (const PrepareFn prepare = std::exchange(prepare_, nullptr)) {
    auto prepared = prepare();
    if (auto* error = std::get_if<ApiError>(&prepared)) return Fail(std::move(*error));
    auto& prompt = std::get<PreparedPrompt>(prepared);
    admission_.prompt_ids = std::move(prompt.ids);
    tokens = prompt.charged_tokens;
  } else {
    if (auto error = Tokenise()) return Fail(std::move(*error));
    Truncate(*model);
    tokens = static_cast<uint32_t>(admission_.prompt_ids.size());
  }
  if (ticket_) {
    if (auto error = ticket_->TakePrompt(tokens)) return Fail(std::move(*error));
  }
  Go(*model);
}

void RequestRunner::Request::BeginAfter(std::vector<int32_t> ids, std::string text) {
  admission_.prompt_ids = std::move(ids);
  admission_.prompt_text = std::move(text);
  if (deps_.limits != nullptr && request_.metered) ticket_.emplace(deps_.limits->Join(tenant_));
  if (const auto model = runner_.Model()) {
    Go(*model);
  } else {
    Fail(MakeRetryable(errors::kNotReady, "the model went away", RetryAfter(1)));
  }
}

void RequestRunner::Request::Abandon() {
  {
    std::lock_guard lock(mu_);
    if (ended_) return;
    ended_ = true;
  }
  waiting_ = false;
  {
    std::lock_guard lock(runner_.mu_);
    --runner_.active_;
    if (batch_class()) --runner_.active_batch_;
    deps_.probe->running.Set(static_cast<double>(runner_.active_));
  }
  runner_.changed_.notify_all();
}

void RequestRunner::Request::Go(const v1::ModelIdentity& model) {
  if (auto error = FitContext(model)) return Fail(std::move(*error));
  if (auto error = CheckIds(model)) return Fail(std::move(*error));
  if (request_.pooling == Pooling::kNone) {
    MakeSampling(model);
    if (auto error = MakeGrammar()) return Fail(std::move(*error));
  }
  MakeKeys(model);
  Place();
}

std::optional<ApiError> RequestRunner::Request::Tokenise() {
  if (auto error = deps_.text->format().Check(request_)) return error;
  if (const auto* ids = std::get_if<std::vector<int32_t>>(&request_.input)) {
    admission_.prompt_ids = *ids;
  } else {
    absl::StatusOr<std::vector<int32_t>> ids_of_text;
    if (const auto* chat = std::get_if<ChatInput>(&request_.input)) {
      turn_ = static_cast<uint32_t>(std::ranges::count_if(
          chat->messages, [](const OrderedJson& m) { return m.value("role", "") == "user"; }));
      ends_in_tool_result_ = !chat->messages.empty() && chat->messages.back().value("role", "") == "tool";
      offers_tools_ = !chat->tools.empty();
      auto prompt = deps_.text->Render(*chat);
      if (!prompt.ok()) {
        return MakeError(errors::kChatTemplate, std::string(prompt.status().message()), "messages");
      }
      ids_of_text = deps_.text->Encode(*prompt, request_.add_special_tokens.value_or(false));
      admission_.prompt_text = std::move(prompt->text);
    } else {
      // Whoever writes a raw prompt is its template's author: special tokens that are spelled out count.
      Tokenizer::EncodeOptions options;
      options.add_special_tokens = request_.add_special_tokens.value_or(true);
      admission_.prompt_text = std::get<std::string>(request_.input);
      ids_of_text = deps_.text->tokenizer().Encode(admission_.prompt_text, options);
    }
    if (!ids_of_text.ok()) {
      return MakeError(errors::kInvalidRequest, "prompt: " + std::string(ids_of_text.status().message()),
                       "prompt");
    }
    admission_.prompt_ids = std::move(ids_of_text).value();
  }
  const char* field = request_.chat ? "messages" : "prompt";
  if (admission_.prompt_ids.empty()) {
    return MakeError(errors::kInvalidRequest, absl::StrCat(field, ": must hold at least one token"), field);
  }
  return std::nullopt;
}

void RequestRunner::Request::Truncate(const v1::ModelIdentity& model) {
  if (!request_.truncate_prompt_tokens) return;
  std::vector<int32_t>& ids = admission_.prompt_ids;
  const uint32_t answer = std::max(1u, request_.max_tokens.value_or(1));
  const uint32_t fits = model.max_model_len() > answer ? model.max_model_len() - answer : 1;
  const int32_t asked = *request_.truncate_prompt_tokens;
  const size_t kept = asked < 0 ? fits : static_cast<uint32_t>(asked);
  if (ids.size() <= kept) return;
  ids.erase(ids.begin(), ids.end() - static_cast<std::ptrdiff_t>(kept));
  // A raw prompt is echoed as it was computed; a chat's text is looked at for its end only.
  if (!request_.chat) admission_.prompt_text.clear();
}

std::optional<ApiError> RequestRunner::Request::FitContext(const v1::ModelIdentity& model) {
  const char* field = request_.chat ? "messages" : "prompt";
  const auto prompt = static_cast<uint32_t>(admission_.prompt_ids.size());
  const uint32_t context = model.max_model_len();
  if (request_.pooling != Pooling::kNone) return std::nullopt;  // checked with the other inputs
  // Clients of others tell this error by "this model's maximum context length is".
  if (prompt >= context) {
    return MakeError(errors::kContextLength,
                     absl::StrCat(field, ": has ", prompt, " tokens; this model's maximum context length is ",
                                  context, " tokens with the answer; shorten it"),
                     field);
  }
  const uint32_t left = context - prompt;
  if (request_.max_tokens && *request_.max_tokens > left) {
    // The default of /v1/completions is not the client's wish.
    if (request_.chat || *request_.max_tokens != kCompletionTokensDefault) {
      return MakeError(errors::kContextLength,
                       absl::StrCat("max_tokens: ", *request_.max_tokens, " with a prompt of ", prompt,
                                    " tokens is too much; this model's maximum context length is ", context,
                                    " tokens; at most ", left, " fit"),
                       "max_tokens");
    }
  }
  // Decode workers reserve KV for the whole answer before they start: an answer without a stated length gets
  // at most a quarter of a worker's pool, or it would run alone.
  const auto pool = deps_.cluster->Get()->decode_pool_tokens;
  uint64_t fair = pool == 0 ? left : std::max<uint64_t>(kCompletionTokensDefault, pool / 4);
  if (deps_.defaults.max_new_tokens) {
    fair = std::max(std::min<uint64_t>(fair, *deps_.defaults.max_new_tokens), uint64_t{request_.min_tokens});
  }
  max_tokens_ = std::min<uint32_t>(left, request_.max_tokens.value_or(std::min<uint64_t>(left, fair)));
  if (request_.min_tokens > max_tokens_) {
    return MakeError(errors::kInvalidRequest,
                     absl::StrCat("min_tokens: ", request_.min_tokens, " exceeds max_tokens, ", max_tokens_),
                     "min_tokens");
  }
  return std::nullopt;
}

std::optional<ApiError> RequestRunner::Request::CheckIds(const v1::ModelIdentity& model) const {
  const uint32_t vocab = model.vocab_size();
  const auto check = [&](const char* field, int32_t id) -> std::optional<ApiError> {
    if (id >= 0 && static_cast<uint32_t>(id) < vocab) return std::nullopt;
    return MakeError(errors::kInvalidRequest,
                     absl::StrCat(field, ": token id ", id, " is not below the vocabulary's size, ", vocab),
                     field);
  };
  for (int32_t id : admission_.prompt_ids) {
    if (auto error = check(request_.chat ? "messages" : "prompt", id)) return error;
  }
  for (int32_t id : request_.stop_token_ids) {
    if (auto error = check("stop_token_ids", id)) return error;
  }
  for (int32_t id : request_.allowed_token_ids) {
    if (auto error = check("allowed_token_ids", id)) return error;
  }
  for (const auto& [id, bias] : request_.logit_bias) {
    if (auto error = check("logit_bias", id)) return error;
  }
  // Each choice shows them again, and an echo beside prompt_logprobs twice.
  const size_t times = request_.shown * (request_.echo && request_.prompt_logprobs >= 0 ? 2 : 1);
  const size_t per_token = static_cast<size_t>(request_.scored() + 1) * times;
  const bool event = request_.echo && request_.stream;
  const size_t entries_max = event ? kEchoedLogprobEntriesMax : kPromptLogprobEntriesMax;
  if (admission_.prompt_ids.size() * per_token > entries_max) {
    const char* field = request_.prompt_logprobs >= request_.scored() ? "prompt_logprobs" : "logprobs";
    return MakeError(
        errors::kInvalidRequest,
        absl::StrCat(field, ": ", per_token, " for each of the prompt's ", admission_.prompt_ids.size(),
                     " tokens are more than ", entries_max, "; ask for fewer, ",
                     event ? "leave out stream, " : "", "or shorten the prompt"),
        field);
  }
  return CheckRepeatedPrompt();
}

// What a stream begins with goes out at once: more than its buffer takes would look like a slow client.
std::optional<ApiError> RequestRunner::Request::CheckRepeatedPrompt() const {
  constexpr size_t kTokenBytes = 8;  // of an id in JSON; about that of a token's text, too
  if (!request_.stream || (!request_.echo && !request_.return_token_ids)) return std::nullopt;
  size_t bytes = 0;
  if (request_.echo) {
    bytes += std::max(admission_.prompt_text.size(), admission_.prompt_ids.size() * kTokenBytes);
  }
  if (request_.return_token_ids) bytes += admission_.prompt_ids.size() * kTokenBytes;
  const size_t bytes_max = deps_.config->gateway.max_stream_buffer_bytes / 2;
  if (bytes * request_.shown <= bytes_max) return std::nullopt;
  const char* field = request_.echo ? "echo" : "return_token_ids";
  return MakeError(errors::kInvalidRequest,
                   absl::StrCat(field, ": about ", bytes * request_.shown,
                                " bytes of prompt before the answer are more than a stream takes at once, ",
                                bytes_max, "; leave out ", field, " or stream"),
                   field);
}

void RequestRunner::Request::MakeSampling(const v1::ModelIdentity& model) {
  const GenerationDefaults& defaults = deps_.defaults;
  v1::Sampling& s = sampling_;
  s.set_temperature(request_.temperature.value_or(defaults.temperature.value_or(1.0f)));
  s.set_top_k(request_.top_k.value_or(defaults.top_k.value_or(0)));
  s.set_top_p(request_.top_p.value_or(defaults.top_p.value_or(1.0f)));
  s.set_min_p(request_.min_p.value_or(defaults.min_p.value_or(0.0f)));
  s.set_repetition_penalty(request_.repetition_penalty.value_or(defaults.repetition_penalty.value_or(1.0f)));
  s.set_typical_p(request_.typical_p);
  s.set_presence_penalty(request_.presence_penalty);
  s.set_frequency_penalty(request_.frequency_penalty);
  s.set_seed(request_.seed ? *request_.seed : runner_.NewSeed());
  for (const auto& [id, bias] : request_.logit_bias) {
    v1::LogitBias& out = *s.add_logit_bias();
    out.set_id(id);
    out.set_bias(bias);
  }
  s.mutable_allowed_token_ids()->Add(request_.allowed_token_ids.begin(), request_.allowed_token_ids.end());
  MakeBadWords(model.vocab_size());
  s.set_min_tokens(request_.min_tokens);
  if (!request_.ignore_eos) {
    s.mutable_stop_token_ids()->Add(deps_.text->eos_ids().begin(), deps_.text->eos_ids().end());
  }
  s.mutable_stop_token_ids()->Add(request_.stop_token_ids.begin(), request_.stop_token_ids.end());
  if (request_.top_logprobs >= 0) s.set_top_logprobs(request_.top_logprobs);
}

std::optional<ApiError> RequestRunner::Request::MakeGrammar() {
  auto compiled = deps_.grammars->Compile(request_, admission_.prompt_text,
                                          deps_.auth->Salt(tenant_, request_.cache_salt));
  if (auto* error = std::get_if<ApiError>(&compiled)) return std::move(*error);
  grammar_ = std::get<GrammarCompiler::Grammar>(std::move(compiled));
  return std::nullopt;
}

// As vLLM's SamplingParams.update_from_tokenizer: each word as it stands at a text's beginning and inside it,
// where that is spelled with another first token and as many of them.
void RequestRunner::Request::MakeBadWords(uint32_t vocab) {
  Tokenizer::EncodeOptions options;
  options.add_special_tokens = false;
  for (const std::string& word : request_.bad_words) {
    const size_t begin = word.find_first_not_of(" \t\r\n\v\f");
    const std::string bare = begin == std::string::npos ? std::string() : word.substr(begin);
    std::vector<int32_t> first;
    for (const bool space : {false, true}) {
      auto ids = deps_.text->tokenizer().Encode(space ? " " + bare : bare, options);
      if (!ids.ok() || ids->empty()) continue;
      if (space && !first.empty() && (ids->front() == first.front() || ids->size() != first.size())) continue;
      if (!space) first = *ids;
      // What the model cannot say needs no ban.
      const bool sayable =
          std::ranges::all_of(*ids, [&](int32_t id) { return static_cast<uint32_t>(id) < vocab; });
      if (sayable) sampling_.add_bad_words()->mutable_ids()->Add(ids->begin(), ids->end());
    }
  }
}

void RequestRunner::Request::MakeKeys(const v1::ModelIdentity& model) {
  salt_ = deps_.auth->Salt(tenant_, request_.cache_salt);
  session_ = deps_.auth->Session(tenant_, request_.session);
  if (session_ != 0) runner_.session_pins_.TurnBegins(session_, ends_in_tool_result_, deps_.clock->Now());
  BlockLayout layout;
  layout.layers = model.layers();
  layout.kv_heads = model.kv_heads();
  layout.head_dim = model.head_dim();
  layout.block_tokens = model.block_tokens();
  layout.dtype = static_cast<DType>(model.kv_dtype());
  root_ = RootKey(model.fingerprint(), layout, salt_, model.kv_codec());
  block_tokens_ = layout.block_tokens;
  FillPlace();
  place_.set_request_id(admission_.id);
  place_.set_tenant(tenant_);
  place_.set_priority(request_.priority);
  place_.set_request_class(batch_class() ? v1::REQUEST_CLASS_BATCH : v1::REQUEST_CLASS_ONLINE);
  place_.set_route(request_.chat ? "chat" : "completion");
}

std::vector<int32_t> RequestRunner::Request::PromptAndEmitted() const {
  std::vector<int32_t> ids = admission_.prompt_ids;
  ids.insert(ids.end(), emitted_.begin(), emitted_.end());
  return ids;
}

void RequestRunner::Request::FillPlace() {
  const std::vector<int32_t> ids = PromptAndEmitted();
  place_.clear_keys();
  for (const BlockKey& key : BlockKeys(root_, ids, block_tokens_)) {
    place_.add_keys(key.bytes.data(), key.bytes.size());
  }
  place_.set_prompt_tokens(static_cast<uint32_t>(ids.size()));
  place_.set_max_tokens(max_tokens_ - next_index_);
}

bool RequestRunner::Request::PlaceLater() {
  const bool cluster = !deps_.config->cluster.etcd.empty();
  if (!cluster && emitted_.empty()) return false;
  const absl::Time now = deps_.clock->Now();
  if (place_until_ == absl::InfinitePast()) place_until_ = now + deps_.config->gateway.placement_wait;
  if (now + kPlaceAgain >= std::min(place_until_, deadline_)) return false;
  deps_.probe->placed_again.Add();
  // Holding the request keeps the runner's Shutdown waiting until it has gone off.
  auto alarm = std::make_shared<grpc::Alarm>();
  alarm->Set(std::chrono::system_clock::now() + absl::ToChronoMilliseconds(kPlaceAgain),
             [self = shared_from_this(), alarm](bool) mutable {
               self->Place();
               alarm.reset();
             });
  return true;
}

void RequestRunner::Request::Place() {
  const SchedulerLocator::Place scheduler = deps_.scheduler->Get();
  if (scheduler.address.empty()) {
    return OnPlaced(grpc::Status(grpc::StatusCode::UNAVAILABLE, "no scheduler is known to lead"), {});
  }
  auto context = NewCall(kPlaceTimeout);
  if (context == nullptr) return;
  AddSchedulerTerm(*context, scheduler.term);
  struct Call {
    std::shared_ptr<grpc::ClientContext> context;
    std::unique_ptr<v1::Scheduler::Stub> stub;
    v1::PlaceReply reply;
  };
  auto call = std::make_shared<Call>();
  call->context = std::move(context);
  call->stub = v1::Scheduler::NewStub(deps_.channels->Get(scheduler.address));
  placed_ = true;
  call->stub->async()->Place(
      call->context.get(), &place_, &call->reply,
      [self = shared_from_this(), call](const grpc::Status& status) { self->OnPlaced(status, call->reply); });
}

void RequestRunner::Request::OnPlaced(const grpc::Status& status, const v1::PlaceReply& reply) {
  std::optional<ErrorKind> cancelled;
  {
    std::lock_guard lock(mu_);
    call_.reset();
    cancelled = cancelled_;
  }
  if (cancelled) return Fail(Cancelled(*cancelled));
  grpc::StatusCode code = status.error_code();
  // What has begun was a valid request: those that could go on with it are not here now.
  if (code == grpc::StatusCode::INVALID_ARGUMENT && !emitted_.empty()) code = grpc::StatusCode::UNAVAILABLE;
  switch (code) {
    case grpc::StatusCode::OK:
      break;
    case grpc::StatusCode::RESOURCE_EXHAUSTED: {
      // What has begun is not refused: there will be room.
      if (!emitted_.empty() && PlaceLater()) return;
      v1::PlaceRejection rejection;
      if (!rejection.ParseFromString(status.error_details())) rejection.Clear();
      return Fail(MakeRetryable(
          errors::kOverloaded,
          rejection.reason().empty() ? SafeMessage(status, "the cluster is overloaded") : rejection.reason(),
          RetryAfter(rejection.retry_after_seconds())));
    }
    case grpc::StatusCode::UNAVAILABLE:
    case grpc::StatusCode::DEADLINE_EXCEEDED:
    case grpc::StatusCode::CANCELLED: {
      // Said at the first try and the last.
      const bool first = place_until_ == absl::InfinitePast();
      if (first) spdlog::warn("{}: not placed: {}", log_name_, status.error_message());
      if (deps_.clock->Now() < deadline_ && PlaceLater()) return;
      if (!first) spdlog::warn("{}: given up, not placed: {}", log_name_, status.error_message());
      if (deps_.clock->Now() >= deadline_) {
        return Fail(MakeError(errors::kTimeout, "the request's deadline passed before it was placed"));
      }
      return Fail(MakeRetryable(errors::kUnavailable, SafeMessage(status, "the scheduler cannot be reached"),
                                RetryAfter(1)));
    }
    case grpc::StatusCode::INVALID_ARGUMENT:
      return Fail(
          MakeError(errors::kInvalidRequest, SafeMessage(status, "the scheduler refused the request")));
    default:
      spdlog::error("{}: not placed: {}", log_name_, status.error_message());
      return Fail(MakeError(errors::kInternal, "the scheduler failed to place the request"));
  }
  if (reply.decode().grpc().empty()) {
    return Fail(MakeError(errors::kInternal, "the scheduler placed the request nowhere"));
  }
  place_until_ = absl::InfinitePast();
  trace_.placement_reason = reply.reason();
  if (!admitted_) {
    admitted_ = true;
    admit_seconds_ = absl::ToDoubleSeconds(deps_.clock->Now() - arrival_);
    deps_.probe->stage_admit.Observe(admit_seconds_);
    sink_->OnAdmitted(admission_);
  }
  Generate(reply);
}

bool RequestRunner::Request::BeginAnswer() {
  std::span<const int32_t> kept;
  if (request_.chat) kept = deps_.text->format().KeptTokens();
  decoder_.emplace(deps_.text->tokenizer(), request_.skip_special_tokens, kept);
  decoder_->Prime(admission_.prompt_ids);  // an answer goes on where the prompt ends: its first space stays
  auto stops = StopMatcher::Create(request_.stop, request_.include_stop_str_in_output);
  if (!stops.ok()) {
    Fail(MakeError(errors::kInvalidRequest, "stop: " + std::string(stops.status().message()), "stop"));
    return false;
  }
  stops_.emplace(std::move(stops).value());
  scores_ = 0;
  trace_.path.Clear();
  return true;
}

void RequestRunner::Request::Generate(const v1::PlaceReply& placement) {
  // Else text, stop strings and counts go on where they are.
  if (emitted_.empty() && !BeginAnswer()) return;
  decode_worker_ = placement.decode().worker_id();
  decode_boot_ = placement.decode().boot_id();
  workers_ = {placement.decode().grpc()};
  if (placement.has_prefill()) workers_.push_back(placement.prefill().grpc());

  auto context = NewCall(absl::InfiniteDuration());
  if (context == nullptr) return;
  uint32_t number;
  {
    std::lock_guard lock(mu_);
    number = ++attempt_;
  }
  trace_.attempts = number;
  v1::WorkerGenerateRequest message;
  message.set_request_id(admission_.id);
  message.set_attempt(number);
  message.set_tenant(tenant_);
  message.set_salt(salt_);
  const std::vector<int32_t> ids = PromptAndEmitted();
  message.mutable_prompt()->Add(ids.begin(), ids.end());
  message.set_emitted_tokens(next_index_);
  message.set_max_tokens(max_tokens_);
  *message.mutable_sampling() = sampling_;
  if (grammar_) message.mutable_sampling()->set_grammar(grammar_->bytes());
  message.set_request_class(batch_class() ? v1::REQUEST_CLASS_BATCH : v1::REQUEST_CLASS_ONLINE);
  message.set_priority(request_.priority);
  message.set_session(session_);
  if (session_ != 0) message.set_turn(turn_);
  if (request_.pooling != Pooling::kNone) {
    message.set_pooling(request_.pooling == Pooling::kMean ? v1::POOLING_MEAN : v1::POOLING_LAST);
    message.set_normalize(request_.normalize);
  }
  if (request_.scored() >= 0 && emitted_.empty()) {
    message.set_prompt_logprobs(static_cast<uint32_t>(request_.scored()));
  }
  if (placement.has_prefill()) *message.mutable_prefill() = placement.prefill();
  *message.mutable_holders() = placement.holders();
  auto* attempt = new Attempt(shared_from_this(), number, std::move(context),
                              deps_.channels->Get(placement.decode().grpc()));
  attempt->Start(std::move(message));
}

bool RequestRunner::Request::OnEvent(uint32_t attempt, const v1::WorkerGenerateEvent& event) {
  {
    std::lock_guard lock(mu_);
    if (ended_ || cancelled_ || attempt != attempt_) return false;
  }
  if (event.has_path()) TakePath(event.path());
  if (request_.pooling != Pooling::kNone) return OnPooled(event);
  if (!TakePromptLogprobs(event)) return false;
  TimeTokens(static_cast<size_t>(event.tokens_size()));
  OutputDelta delta;
  std::optional<size_t> matched;
  auto take = [&](std::string text, bool may_match) {
    auto result = stops_->Push(text, may_match);
    delta.text += result.emit;
    matched = result.matched;
  };
  for (const v1::OutputToken& token : event.tokens()) {
    if (token.index() != next_index_) {
      spdlog::error("{}: token {} from {} where {} was due", log_name_, token.index(), decode_worker_,
                    next_index_);
      Fail(MakeError(errors::kInternal, "a worker sent tokens out of order"));
      return false;
    }
    ++next_index_;
    emitted_.push_back(token.id());
    if (request_.prompt_only) continue;
    DeliveredToken out{token.id(), token.logprob(), {}};
    for (const v1::TokenLogprob& top : token.top()) out.top.push_back({top.id(), top.logprob()});
    delta.tokens.push_back(std::move(out));
    take(decoder_->Push(token.id()), next_index_ > request_.min_tokens);
    if (matched) break;
  }
  const bool last = !event.finish_reason().empty();
  const bool eos =
      std::ranges::find(deps_.text->eos_ids(), event.stop_token()) != deps_.text->eos_ids().end();
  if (last && !matched && !request_.prompt_only) {
    // A stop token that the client named is part of the output where it asked for that, as in vLLM.
    if (event.finish_reason() == "stop" && event.stop_token() >= 0 && !eos &&
        request_.include_stop_str_in_output) {
      take(decoder_->Push(event.stop_token()), true);
    }
    if (!matched) take(decoder_->Finish(), true);
    if (!matched) delta.text += stops_->Flush();
  }
  if (!delta.tokens.empty() || !delta.text.empty()) {
    if (!Deliver(std::move(delta))) return false;
  }
  if (!matched && !last) return true;

  ChoiceEnd end;
  end.finish_reason = matched ? "stop" : request_.prompt_only ? "length" : event.finish_reason();
  if (matched) {
    end.stop_reason = request_.stop[*matched];
  } else if (end.finish_reason == "stop" && event.stop_token() >= 0 && !eos) {
    end.stop_reason = event.stop_token();
  }
  Done(std::move(end));
  // The worker is cancelled where it would go on; its own last event needs no cancelling, so read to the end.
  return last;
}

void RequestRunner::Request::TakePath(const v1::RequestPath& path) {
  // Of an answer that goes on elsewhere, what came of its prompt was told by the attempt that began it.
  if (!resumed_) {
    trace_.path = path;
    return;
  }
  trace_.path.set_decode_worker(path.decode_worker());
  trace_.path.set_decode_pid(path.decode_pid());
}

bool RequestRunner::Request::OnPooled(const v1::WorkerGenerateEvent& event) {
  if (event.finish_reason().empty()) return true;
  const auto model = runner_.Model();
  const bool whole = model && static_cast<uint32_t>(event.embedding_size()) == model->hidden_size();
  // Numbers that JSON does not have are a damaged model's.
  if (!whole || !std::ranges::all_of(event.embedding(), [](float x) { return std::isfinite(x); })) {
    spdlog::error("{}: {} numbers of an embedding from {}", log_name_, event.embedding_size(),
                  decode_worker_);
    Fail(MakeError(errors::kInternal, "a worker sent a damaged embedding"));
    return false;
  }
  ChoiceEnd end;
  end.finish_reason = "pooled";
  end.pooled = {event.embedding().begin(), event.embedding().end()};
  Done(std::move(end));
  return true;
}

bool RequestRunner::Request::TakePromptLogprobs(const v1::WorkerGenerateEvent& event) {
  const size_t due = request_.scored() < 0 ? 0 : admission_.prompt_ids.size() - 1;
  scores_ += static_cast<size_t>(event.prompt_logprobs_size());
  if (scores_ > due || (scores_ < due && event.tokens_size() > 0)) {
    spdlog::error("{}: {} logprobs of the prompt from {} where {} were due", log_name_, scores_,
                  decode_worker_, due);
    Fail(MakeError(errors::kInternal, "a worker sent the prompt's logprobs out of order"));
    return false;
  }
  if (event.prompt_logprobs_size() == 0) return true;
  std::vector<PromptScore> scores;
  scores.reserve(static_cast<size_t>(event.prompt_logprobs_size()));
  for (const v1::PromptLogprob& score : event.prompt_logprobs()) {
    PromptScore& out = scores.emplace_back(PromptScore{score.logprob(), score.rank(), {}});
    for (const v1::TokenLogprob& top : score.top()) out.top.push_back({top.id(), top.logprob()});
  }
  sink_->OnPromptLogprobs(std::move(scores));
  return true;
}

void RequestRunner::Request::TimeTokens(size_t count) {
  if (count == 0) return;
  const absl::Time now = deps_.clock->Now();
  if (next_index_ == 0) {
    first_token_ = last_token_ = now;
    waiting_ = false;
    trace_.ttft_seconds = absl::ToDoubleSeconds(now - arrival_);
    if (ticket_) ticket_->FirstToken();
    if (--count == 0) return;
  }
  const double gap = absl::ToDoubleSeconds(now - last_token_) / static_cast<double>(count);
  last_token_ = now;
  if (!batch_class()) runner_.NoteOnlineGap(gap, now);
  for (size_t i = 0; i < count; ++i) {
    deps_.probe->itl.Observe(gap);
    if (request_.return_trace && gaps_.size() < kGapsMax) gaps_.push_back(static_cast<float>(gap));
  }
}

bool RequestRunner::Request::Deliver(OutputDelta delta) {
  delivered_ += static_cast<uint32_t>(delta.tokens.size());
  if (sink_->OnDelta(0, std::move(delta), Usage())) return true;
  Cancel(errors::kSlowClient);  // unless the front said why already
  return false;
}

void RequestRunner::Request::OnAttemptEnd(uint32_t attempt, const grpc::Status& status) {
  std::optional<ErrorKind> cancelled;
  {
    std::lock_guard lock(mu_);
    if (ended_ || attempt != attempt_) return;
    call_.reset();
    cancelled = cancelled_;
  }
  if (cancelled) return Fail(Cancelled(*cancelled));
  spdlog::warn("{}: attempt {} on {} ended: {} {}", log_name_, attempt, decode_worker_,
               static_cast<int>(status.error_code()), status.error_message());
  const grpc::StatusCode code = status.ok() ? grpc::StatusCode::INTERNAL : status.error_code();
  // One that has begun was valid.
  if (code == grpc::StatusCode::INVALID_ARGUMENT && emitted_.empty()) {
    return Fail(MakeError(errors::kInvalidRequest, SafeMessage(status, "the worker refused the request")));
  }
  if (code == grpc::StatusCode::DEADLINE_EXCEEDED || deps_.clock->Now() >= deadline_) {
    return Fail(MakeError(errors::kTimeout, "the answer was not complete within the request's deadline"));
  }
  const bool retries_left = attempt <= deps_.config->gateway.max_retries;
  if (retries_left && (!emitted_.empty() || sink_->Restart(0))) return Retry();
  const std::string message =
      absl::StrCat("the request failed because ", std::string(CauseOf(code)),
                   delivered_ > 0 ? " in the middle of the answer" : "",
                   attempt > 1 ? absl::StrCat(" (attempt ", attempt, ")") : "", "; send it again");
  if (code == grpc::StatusCode::INTERNAL || code == grpc::StatusCode::UNIMPLEMENTED ||
      code == grpc::StatusCode::DATA_LOSS || code == grpc::StatusCode::FAILED_PRECONDITION) {
    return Fail(MakeError(errors::kInternal, message));
  }
  Fail(MakeRetryable(errors::kUnavailable, message, RetryAfter(1)));
}

void RequestRunner::Request::Retry() {
  deps_.probe->retries.Add();
  if (!emitted_.empty()) {
    resumed_ = true;
    deps_.probe->resumed.Add();
    spdlog::info("{}: goes on elsewhere behind {} tokens", log_name_, next_index_);
    FillPlace();
    // It was admitted once: what it would miss now is not its fault.
    place_.set_slo_ttft_seconds(kNoSloSeconds);
    place_.set_slo_itl_seconds(kNoSloSeconds);
    place_.set_request_class(v1::REQUEST_CLASS_ONLINE);  // nor does it wait for a gap once more
  }
  // The process, not the name: it may be back before there is another.
  place_.add_exclude_workers(decode_boot_);
  // The new booking takes the old one's place, which nobody else gets meanwhile; its tokens count at the end.
  if (!emitted_.empty()) return Place();
  // One that has given nothing ends first: what was charged for its prompt is given back.
  SendFinish(false, [self = shared_from_this()] { self->Place(); });
}

void RequestRunner::Request::SendFinish(bool completed, std::function<void()> then) {
  struct Call {
    grpc::ClientContext context;
    std::unique_ptr<v1::Scheduler::Stub> stub;
    v1::FinishRequest request;
    v1::FinishReply reply;
  };
  auto call = std::make_shared<Call>();
  const SchedulerLocator::Place scheduler = deps_.scheduler->Get();
  if (scheduler.address.empty()) {  // nor is its booking known to anybody
    if (then) then();
    return;
  }
  AddClusterToken(call->context, deps_.config->cluster.token);
  AddSchedulerTerm(call->context, scheduler.term);
  AddTrace(call->context, request_.trace);
  SetTimeout(call->context, kFinishTimeout);
  call->stub = v1::Scheduler::NewStub(deps_.channels->Get(scheduler.address));
  call->request.set_request_id(admission_.id);
  call->request.set_completed(completed);
  call->request.set_cut(!ended_by_itself_);
  call->request.set_output_tokens(next_index_);
  // What a client waited that was resumed elsewhere is nobody's prediction.
  if (next_index_ > 0 && !resumed_) {
    call->request.set_ttft_seconds(trace_.ttft_seconds);
    call->request.set_itl_seconds(trace_.itl_mean_seconds);
    *call->request.mutable_path() = trace_.path;
  }
  // Holding the request keeps the runner's Shutdown waiting until the call is over.
  call->stub->async()->Finish(
      &call->context, &call->request, &call->reply,
      [self = shared_from_this(), call, then = std::move(then)](const grpc::Status& s) {
        // The scheduler drops a booking by itself in the end.
        if (!s.ok()) spdlog::debug("{}: finish: {}", self->log_name_, s.error_message());
        if (then) then();
      });
}

void RequestRunner::Request::SendPin(const std::string& worker, absl::Duration ttl) {
  struct Call {
    grpc::ClientContext context;
    std::unique_ptr<v1::Kv::Stub> stub;
    v1::KvPinRequest request;
    v1::KvPinReply reply;
  };
  auto call = std::make_shared<Call>();
  AddClusterToken(call->context, deps_.config->cluster.token);
  AddTrace(call->context, request_.trace);
  SetTimeout(call->context, kFinishTimeout);
  call->stub = v1::Kv::NewStub(deps_.channels->Get(worker));
  call->request.mutable_blocks()->set_session(session_);
  call->request.set_ttl_seconds(absl::ToDoubleSeconds(ttl));
  // Holding the request keeps the runner's Shutdown waiting until the call is over.
  call->stub->async()->Pin(&call->context, &call->request, &call->reply,
                           [self = shared_from_this(), call](const grpc::Status& s) {
                             GatewayProbe& probe = *self->deps_.probe;
                             (s.ok() ? probe.session_pins : probe.session_pins_failed).Add();
                             if (!s.ok()) spdlog::debug("{}: pin: {}", self->log_name_, s.error_message());
                           });
}

void RequestRunner::Request::Fail(ApiError error) { Done(std::move(error)); }

void RequestRunner::Request::Done(std::variant<ApiError, ChoiceEnd> how) {
  bool uncounted = false;
  {
    std::lock_guard lock(mu_);
    if (ended_) return;
    ended_ = true;
    call_.reset();
    uncounted = uncounted_;
  }
  Outcome outcome;
  auto* end = std::get_if<ChoiceEnd>(&how);
  if (end == nullptr) outcome.error = std::get<ApiError>(std::move(how));
  ended_by_itself_ = end != nullptr && !request_.prompt_only && end->finish_reason == "stop";
  GatewayProbe& probe = *deps_.probe;
  const absl::Time now = deps_.clock->Now();
  outcome.usage = Usage();
  if (next_index_ > 0) {
    probe.ttft.Observe(trace_.ttft_seconds);
    probe.SloTtft(first_token_ - arrival_);
    probe.stage_decode.Observe(absl::ToDoubleSeconds(now - first_token_));
    probe.stage_queue.Observe(trace_.path.queue_seconds());
    probe.stage_prefill.Observe(trace_.path.prefill_seconds());
    probe.stage_transfer.Observe(trace_.path.transfer_seconds());
    if (next_index_ > 1) {
      const absl::Duration mean = (last_token_ - first_token_) / (next_index_ - 1);
      trace_.itl_mean_seconds = absl::ToDoubleSeconds(mean);
      probe.tpot.Observe(trace_.itl_mean_seconds);
      probe.SloItl(mean);
    }
    if (!gaps_.empty()) {
      const size_t at = (gaps_.size() * 99) / 100;
      std::nth_element(gaps_.begin(), gaps_.begin() + static_cast<std::ptrdiff_t>(at), gaps_.end());
      trace_.itl_p99_seconds = gaps_[at];
    }
  }
  if (next_index_ > 0 || end != nullptr) {
    probe.prompt_cached.Add(outcome.usage.cached_tokens);
    probe.prompt_computed.Add(outcome.usage.prompt_tokens -
                              std::min(outcome.usage.prompt_tokens, outcome.usage.cached_tokens));
  }
  probe.generated.Add(delivered_);
  probe.duration.Observe(absl::ToDoubleSeconds(now - arrival_));
  trace_.path.set_prompt_tokens(outcome.usage.prompt_tokens);
  outcome.trace = trace_;
  const int seen = sink_->Status(outcome);
  if (end != nullptr) {
    end->trace = trace_;
    probe.Request(200, end->finish_reason);
  } else if (uncounted) {
    probe.choices_cancelled.Add();
  } else if (outcome.error->status == errors::kClientGone.status) {
    probe.Request(outcome.error->status, outcome.error->code);
    probe.Disconnect(next_index_ > 0 ? "streaming" : "queued");
  } else {
    probe.Request(seen, outcome.error->code);
    if (next_index_ == 0) probe.Rejected(outcome.error->code);
  }
  if (request_.record) Record(outcome, end, now);
  if (deps_.limits != nullptr && request_.metered) deps_.limits->Spend(tenant_, delivered_);
  ticket_.reset();
  waiting_ = false;
  {
    // Before the client knows: its next request finds the place free.
    std::lock_guard lock(runner_.mu_);
    --runner_.active_;
    if (batch_class()) --runner_.active_batch_;
    probe.running.Set(static_cast<double>(runner_.active_));
  }
  if (end != nullptr) sink_->OnChoiceEnd(0, *end, outcome.usage);
  absl::Duration pin = absl::ZeroDuration();
  if (end != nullptr && session_ != 0 && offers_tools_) {
    // Before the client has the whole answer: it may come back at once.
    pin = runner_.session_pins_.TurnEnded(session_, tenant_, sink_->CalledTools(0), now);
  }
  sink_->OnDone(outcome);
  if (placed_) SendFinish(end != nullptr, nullptr);
  if (pin > absl::ZeroDuration()) {
    for (const std::string& worker : workers_) SendPin(worker, pin);
  }
  runner_.changed_.notify_all();
}

void RequestRunner::Request::Record(const Outcome& outcome, const ChoiceEnd* end, absl::Time now) const {
  AccessWork work;
  work.id = admission_.id;
  if (const auto model = runner_.Model()) work.model = model->name();
  work.prompt_tokens = outcome.usage.prompt_tokens;
  work.cached_tokens = outcome.usage.cached_tokens;
  work.completion_tokens = outcome.usage.completion_tokens;
  work.attempts = trace_.attempts;
  work.prefill_worker = trace_.path.prefill_worker();
  work.decode_worker = decode_worker_;
  if (end != nullptr) {
    work.finish_reason = end->finish_reason;
  } else {
    work.error = outcome.error->code;
  }
  work.admit = admit_seconds_;
  if (next_index_ > 0) {
    work.ttft = trace_.ttft_seconds;
    work.queue = trace_.path.queue_seconds();
    work.prefill = trace_.path.prefill_seconds();
    work.transfer = trace_.path.transfer_seconds();
    work.decode = absl::ToDoubleSeconds(now - first_token_);
  }
  request_.record->AddWork(work);
}

RequestRunner::RequestRunner(Dependencies deps) : deps_(std::move(deps)) {
  const Sha256Digest random = Sha256().Update(RandomHexId()).Finish();
  uint64_t seed = 0;
  for (int i = 0; i < 8; ++i) seed = seed << 8 | random[static_cast<size_t>(i)];
  next_seed_ = seed;
}

RequestRunner::~RequestRunner() {
  std::lock_guard lock(mu_);
  TP_CHECK(live_ == 0);
}

void RequestRunner::Register(const std::shared_ptr<Request>& request) {
  std::lock_guard lock(mu_);
  ++live_;
  ++active_;
  if (request->batch_class()) ++active_batch_;
  requests_.insert(request.get());
  deps_.probe->running.Set(static_cast<double>(active_));
}

void RequestRunner::Forget(Request* request) {
  std::lock_guard lock(mu_);
  requests_.erase(request);
}

void RequestRunner::Release() {
  // Notified under the lock: the runner may be destroyed as soon as live_ is 0.
  std::lock_guard lock(mu_);
  --live_;
  changed_.notify_all();
}

void RequestRunner::NoteOnlineGap(double seconds, absl::Time now) {
  constexpr double kWeight = 1.0 / 32;
  const double mean = online_gap_seconds_;
  online_gap_seconds_ = mean + kWeight * (seconds - mean);
  online_gap_at_ns_ = absl::ToUnixNanos(now);
}

RequestRunner::OnlineTraffic RequestRunner::Online() {
  // Old news is none: nobody is decoding.
  constexpr absl::Duration kFresh = absl::Seconds(1);
  constexpr double kNearly = 0.8;
  const absl::Time now = deps_.clock->Now();
  OnlineTraffic traffic;
  {
    std::lock_guard lock(mu_);
    traffic.inflight = active_ - active_batch_;
    for (const Request* request : requests_) {
      if (request->batch_class() || !request->waiting()) continue;
      ++traffic.waiting;
      traffic.oldest_wait = std::max(traffic.oldest_wait, now - request->arrival());
    }
  }
  const SloConfig slo = deps_.probe->slo();
  const bool ttft = slo.ttft > absl::ZeroDuration() && traffic.oldest_wait > slo.ttft / 2;
  const bool itl = slo.itl > absl::ZeroDuration() && now - absl::FromUnixNanos(online_gap_at_ns_) < kFresh &&
                   online_gap_seconds_ > kNearly * absl::ToDoubleSeconds(slo.itl);
  traffic.slo_short = ttft || itl;
  return traffic;
}

std::optional<ApiError> RequestRunner::CheckRoom(RequestClass request_class) {
  if (draining_) {
    return MakeRetryable(errors::kDraining, "the gateway is shutting down; send the request again",
                         RetryAfter(1));
  }
  const bool batch = request_class == RequestClass::kBatch;
  const uint32_t limit =
      batch ? deps_.config->gateway.batch_max_inflight : deps_.config->gateway.max_inflight;
  {
    // Whoever asks is counted already.
    std::lock_guard lock(mu_);
    if ((batch ? active_batch_ : active_ - active_batch_) <= limit) return std::nullopt;
  }
  return MakeRetryable(
      errors::kTooManyRequests,
      absl::StrCat("more than ", limit, batch ? " batch" : "", " requests are in flight; try again later"),
      RetryAfter(1));
}

std::weak_ptr<RequestRunner::Running> RequestRunner::Start(InferenceRequest request, std::string tenant,
                                                           std::shared_ptr<OutputSink> sink,
                                                           absl::Duration timeout) {
  if (request.record && !request.trace.valid()) request.trace = request.record->trace();
  if (request.best_of <= 1 && request.more_prompts.empty()) {
    auto running =
        std::make_shared<Request>(*this, std::move(request), std::move(tenant), std::move(sink), timeout);
    Register(running);
    running->Begin();
    return running;
  }
  const uint32_t per_prompt = std::max(request.n, request.best_of);
  const auto prompts = static_cast<uint32_t>(1 + request.more_prompts.size());
  auto group = std::make_shared<ChoiceGroup>(prompts, request.n, per_prompt, std::move(sink));
  const uint64_t seed = request.seed ? *request.seed : NewSeed();
  group->Start([&](uint32_t choice, std::shared_ptr<OutputSink> member) {
    const uint32_t prompt = choice / per_prompt, number = choice % per_prompt;
    InferenceRequest one = request;
    if (choice > 0) one.more_prompts.clear();  // the first is asked whether they go with its fields
    if (prompt > 0) std::visit([&](const auto& p) { one.input = p; }, request.more_prompts[prompt - 1]);
    one.n = one.best_of = 1;
    one.seed = seed + number;
    if (!request.chat) one.shown = request.n * prompts;
    if (request.best_of > request.n) {
      // What choices are compared by is not for an echo to show: that would score the prompt.
      one.echo = request.echo && request.top_logprobs >= 0;
      one.top_logprobs = std::max(one.top_logprobs, 0);
    }
    if (number > 0) {
      // The prompt is scored once.
      one.prompt_logprobs = -1;
      one.echo = false;
    }
    auto run = std::make_shared<Request>(*this, std::move(one), tenant, std::move(member), timeout);
    Register(run);
    return run;
  });
  return group;
}

std::weak_ptr<RequestRunner::Running> RequestRunner::StartEmbeddings(EmbeddingRequest request,
                                                                     std::string tenant, EmbeddingsDone done,
                                                                     absl::Duration timeout) {
  if (request.record && !request.trace.valid()) request.trace = request.record->trace();
  const absl::Time deadline = deps_.clock->Now() + std::min(timeout, deps_.config->gateway.request_timeout);
  InferenceRequest one;
  one.model = request.model;
  one.add_special_tokens = request.add_special_tokens;
  one.pooling = request.pooling;
  one.normalize = request.normalize;
  one.priority = request.priority;
  one.cache_salt = request.cache_salt;
  one.request_class = request.request_class;
  one.metered = request.metered;
  one.trace = request.trace;
  one.record = request.record;
  EmbeddingGroup::Options options;
  options.make = [this, one = std::move(one), tenant = std::move(tenant),
                  deadline](std::shared_ptr<OutputSink> member) -> std::shared_ptr<ChoiceRun> {
    auto run =
        std::make_shared<Request>(*this, one, tenant, std::move(member), deadline - deps_.clock->Now());
    Register(run);
    return run;
  };
  options.prepare = [this](const EmbeddingRequest& asked) -> std::variant<TokenLists, ApiError> {
    const auto model = Model();
    if (!model) {
      return MakeRetryable(errors::kNotReady, "no worker has registered a model yet", RetryAfter(1));
    }
    return TokeniseInputs(asked, deps_.text->tokenizer(),
                          {model->max_model_len(), model->vocab_size(), model->hidden_size()});
  };
  options.done = std::move(done);
  auto group = std::make_shared<EmbeddingGroup>(std::move(request), std::move(options));
  group->Start();
  return group;
}

// Splitting a seed over requests: Mix64 is a bijection, so no two requests share one.
uint64_t RequestRunner::NewSeed() { return Mix64(next_seed_.fetch_add(1)); }

std::optional<v1::ModelIdentity> RequestRunner::Model() const {
  auto model = deps_.cluster->Get()->model;
  if (!model) return std::nullopt;
  if (!deps_.config->model.name.empty()) model->set_name(deps_.config->model.name);
  if (const uint32_t limit = deps_.config->model.max_model_len; limit > 0 && limit < model->max_model_len()) {
    model->set_max_model_len(limit);
  }
  return model;
}

std::optional<ApiError> RequestRunner::CheckModel(std::string_view name) const {
  const auto model = Model();
  if (!model) {
    return MakeRetryable(errors::kNotReady, "no worker has registered a model yet; try again later",
                         RetryAfter(1));
  }
  if (!name.empty() && name != model->name()) {
    return MakeError(errors::kModelNotFound,
                     absl::StrCat("model: '", std::string(name.substr(0, 256)), "' is not served here; '",
                                  model->name(), "' is"),
                     "model");
  }
  return std::nullopt;
}

void RequestRunner::Shutdown(absl::Duration grace) {
  draining_ = true;
  std::unique_lock lock(mu_);
  changed_.wait_for(lock, absl::ToChronoNanoseconds(grace), [&] { return active_ == 0; });
  // Cancelling needs no lock of ours, and a request that is cancelled may end here and now.
  std::vector<std::shared_ptr<Request>> rest;
  for (Request* request : requests_) {
    if (auto shared = request->weak_from_this().lock()) rest.push_back(std::move(shared));
  }
  lock.unlock();
  for (auto& request : rest) request->Cancel(errors::kDraining);
  rest.clear();
  lock.lock();
  // Every call has a deadline and was cancelled: this ends.
  changed_.wait(lock, [&] { return live_ == 0; });
}

}  // namespace tidepool
