#include "server/gateway/grpc_front.h"

#include <grpcpp/alarm.h>

#include <algorithm>
#include <array>
#include <deque>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "base/digest.h"
#include "server/gateway/chat/chat_format.h"
#include "server/gateway/chat/message_parser.h"
#include "server/gateway/embeddings.h"
#include "server/gateway/grpc_error.h"

namespace tidepool {
namespace {

constexpr char kRequestIdKey[] = "x-request-id";
constexpr size_t kRequestIdChars = 128;
// A parser that starts again needs no more of the prompt than where it ends.
constexpr size_t kPromptTailBytes = 256;
// Of a message in each slow_client_timeout, as over HTTP.
constexpr size_t kWriteProgressBytes = 64u << 10;

std::string_view Metadata(const grpc::CallbackServerContext& context, const char* key) {
  const auto& metadata = context.client_metadata();
  const auto it = metadata.find(key);
  return it == metadata.end() ? std::string_view() : std::string_view(it->second.data(), it->second.size());
}

bool UsableId(std::string_view id) {
  return !id.empty() && id.size() <= kRequestIdChars &&
         std::ranges::all_of(id, [](char c) { return c > 0x20 && c < 0x7f; });
}

void SetUsage(const TokenUsage& from, v1::Usage& usage) {
  usage.set_prompt_tokens(from.prompt_tokens);
  usage.set_completion_tokens(from.completion_tokens);
  usage.set_cached_tokens(from.cached_tokens);
  usage.set_reasoning_tokens(from.reasoning_tokens);
}

void SetTrace(const RequestTrace& from, v1::Trace& trace) {
  trace.set_prefill_worker(from.path.prefill_worker());
  trace.set_decode_worker(from.path.decode_worker());
  trace.set_fetched_blocks(from.path.fetched_blocks());
  trace.set_fetched_bytes(from.path.fetched_bytes());
  trace.set_transport(from.path.transport());
  trace.set_queue_seconds(from.path.queue_seconds());
  trace.set_prefill_seconds(from.path.prefill_seconds());
  trace.set_transfer_seconds(from.path.transfer_seconds());
  trace.set_ttft_seconds(from.ttft_seconds);
  trace.set_itl_seconds_mean(from.itl_mean_seconds);
  trace.set_itl_seconds_p99(from.itl_p99_seconds);
  trace.set_attempts(from.attempts);
  trace.set_placement_reason(from.placement_reason);
}

// One Generate call: the sink of its request, and the reactor that writes what the client can take. Owns
// itself until gRPC is done with it.
class GenerateStream final : public OutputSink,
                             public grpc::ServerWriteReactor<v1::GenerateResponse>,
                             public std::enable_shared_from_this<GenerateStream> {
 public:
  GenerateStream(grpc::CallbackServerContext* context, std::string id, std::shared_ptr<AccessRecord> record,
                 const GatewayConfig& config)
      : context_(context),
        id_(std::move(id)),
        record_(std::move(record)),
        buffer_bytes_max_(config.max_stream_buffer_bytes),
        slow_client_timeout_(config.slow_client_timeout) {}

  void Hold() { self_ = shared_from_this(); }
  // Before the request starts. `plan`: of a chat.
  void Expect(const GrpcRequest& request, std::optional<ParserPlan> plan) {
    std::lock_guard lock(mu_);
    logprobs_ = request.request.top_logprobs >= 0;
    trace_ = request.request.return_trace;
    choices_ = request.request.n;
    names_ = request.names;
    plan_ = std::move(plan);
  }
  void Attach(std::weak_ptr<RequestRunner::Running> running) {
    std::unique_lock lock(mu_);
    running_ = std::move(running);
    if (!cancelled_) return;
    auto request = running_.lock();
    lock.unlock();
    if (request) request->Cancel(errors::kClientGone);
  }

  void OnAdmitted(const Admission& admission) override {
    std::lock_guard lock(mu_);
    if (!plan_) return;
    for (uint32_t i = 0; i < choices_; ++i) parsers_.emplace_back(*plan_, admission.prompt_text);
    const std::string& text = admission.prompt_text;
    prompt_tail_ = text.substr(text.size() - std::min(text.size(), kPromptTailBytes));
  }

  void OnPromptLogprobs(std::vector<PromptScore> scores) override {
    v1::GenerateResponse message;
    for (const PromptScore& score : scores) {
      v1::TokenLogprobs& out = *message.add_prompt_logprobs();
      out.set_logprob(score.logprob);
      out.set_rank(score.rank);
      AddTop(score.top, out);
    }
    std::lock_guard lock(mu_);
    // Not held to the buffer's limit but to kPromptLogprobEntriesMax: a client that reads as fast as it can
    // is no slow client.
    Enqueue(0, std::move(message));
  }

  bool OnDelta(uint32_t choice, OutputDelta delta, const TokenUsage&) override {
    v1::GenerateResponse message;
    for (const DeliveredToken& token : delta.tokens) {
      message.add_token_ids(token.id);
      if (!logprobs_) continue;
      v1::TokenLogprobs& out = *message.add_logprobs();
      out.set_logprob(token.logprob);
      AddTop(token.top, out);
    }
    std::lock_guard lock(mu_);
    if (plan_) {
      pieces_.clear();
      parsers_[choice].Push(delta.text, delta.tokens.size(), pieces_);
    } else {
      message.set_text(std::move(delta.text));
    }
    for (v1::GenerateResponse& one : Split(std::move(message))) {
      if (!Push(choice, std::move(one))) return false;
    }
    return true;
  }

  bool Restart(uint32_t choice) override {
    std::lock_guard lock(mu_);
    if (delivered_[choice]) return false;
    if (!parsers_.empty()) parsers_[choice] = MessageParser(*plan_, prompt_tail_);
    return true;
  }

  void OnChoiceEnd(uint32_t choice, const ChoiceEnd& end, const TokenUsage&) override {
    v1::GenerateResponse message;
    if (const auto* text = std::get_if<std::string>(&end.stop_reason)) message.set_stop_text(*text);
    if (const auto* id = std::get_if<int32_t>(&end.stop_reason)) message.set_stop_token_id(*id);
    std::lock_guard lock(mu_);
    message.set_finish_reason(end.finish_reason);
    if (trace_) SetTrace(end.trace, *message.mutable_trace());
    // An end comes once a choice, with what its parser held back: no full buffer may swallow it.
    if (ended_) Enqueue(ended_->first, std::move(ended_->second));
    ended_.reset();
    if (plan_) {
      pieces_.clear();
      parsers_[choice].Finish(pieces_);
      message.set_finish_reason(std::string(parsers_[choice].FinishReason(end.finish_reason)));
      for (v1::GenerateResponse& one : Split({})) Enqueue(choice, std::move(one));
    }
    ended_.emplace(choice, std::move(message));
  }

  std::optional<std::vector<std::string>> CalledTools(uint32_t choice) override {
    std::lock_guard lock(mu_);
    return choice < parsers_.size() ? parsers_[choice].CalledTools() : std::nullopt;
  }

  int Status(const Outcome& outcome) override { return outcome.error ? outcome.error->status : 200; }

  void OnDone(const Outcome& outcome) override {
    std::unique_lock lock(mu_);
    if (outcome.error) {
      error_ = names_.Own(*outcome.error);
    } else if (ended_) {
      TokenUsage usage = outcome.usage;
      for (const MessageParser& parser : parsers_) usage.reasoning_tokens += parser.reasoning_tokens();
      SetUsage(usage, *ended_->second.mutable_usage());
      Enqueue(ended_->first, std::move(ended_->second));
    }
    done_ = true;
    // What is being written would wait for the client for ever.
    const bool slow = outcome.error && outcome.error->code == errors::kSlowClient.code;
    if (slow && writing_) return Cut(lock);
    MaybeFinish();
  }

  void Refuse(const ApiError& error) {
    Outcome outcome;
    outcome.error = error;
    OnDone(outcome);
  }

 private:
  static void AddTop(const std::vector<OutputLogprob>& top, v1::TokenLogprobs& out) {
    for (const OutputLogprob& t : top) {
      v1::Logprob& one = *out.add_top();
      one.set_id(t.id);
      one.set_logprob(t.logprob);
    }
  }

  // The following hold mu_.
  // pieces_ as messages, the first of them after `message`, which may be empty. Inside one message thoughts
  // come before text and text before calls; what comes in another order takes another message.
  std::vector<v1::GenerateResponse> Split(v1::GenerateResponse message) {
    std::vector<v1::GenerateResponse> out;
    MessageDelta::Kind last = MessageDelta::Kind::kReasoning;
    for (MessageDelta& piece : pieces_) {
      if (piece.kind < last) out.push_back(std::exchange(message, {}));
      last = piece.kind;
      switch (piece.kind) {
        case MessageDelta::Kind::kReasoning:
          *message.mutable_reasoning() += piece.text;
          break;
        case MessageDelta::Kind::kContent:
          *message.mutable_text() += piece.text;
          break;
        case MessageDelta::Kind::kToolCall: {
          v1::ToolCallDelta& call = *message.add_tool_calls();
          call.set_index(piece.call);
          call.set_id(std::move(piece.id));
          call.set_name(std::move(piece.name));
          call.set_arguments(std::move(piece.text));
          break;
        }
      }
    }
    pieces_.clear();
    if (message.ByteSizeLong() > 0) out.push_back(std::move(message));
    return out;
  }
  bool Push(uint32_t choice, v1::GenerateResponse message) {
    if (cancelled_ || queued_bytes_ + message.ByteSizeLong() > buffer_bytes_max_) return false;
    Enqueue(choice, std::move(message));
    return true;
  }
  void Enqueue(uint32_t choice, v1::GenerateResponse message) {
    message.set_request_id(id_);
    message.set_index(choice);
    delivered_[choice] = true;
    // What the prompt's logprobs take is no debt of the tokens after them.
    if (message.prompt_logprobs().empty()) queued_bytes_ += message.ByteSizeLong();
    queue_.push_back(std::move(message));
    MaybeWrite();
  }
  void MaybeWrite() {
    if (writing_ || cancelled_ || queue_.empty()) return;
    writing_ = true;
    const size_t bytes = queue_.front().ByteSizeLong();
    if (record_) record_->OnBody(bytes);
    // A large message may take longer, as long as its client reads it.
    write_deadline_ = absl::Now() + slow_client_timeout_ * (1 + bytes / kWriteProgressBytes);
    if (alarm_ == nullptr) Watch();
    StartWrite(&queue_.front());
  }
  // One alarm a stream and slow_client_timeout, not one a write: it looks at the write of its time.
  void Watch() {
    alarm_ = std::make_unique<grpc::Alarm>();
    alarm_->Set(absl::ToChronoTime(write_deadline_), [weak = weak_from_this()](bool expired) {
      const auto self = weak.lock();
      if (self == nullptr || !expired) return;
      std::unique_lock lock(self->mu_);
      self->alarm_.reset();
      if (!self->writing_ || self->cancelled_) return;
      if (absl::Now() < self->write_deadline_) return self->Watch();
      self->Cut(lock);
    });
  }
  // The client does not take what is being written: ends the call, and with it the write. Unlocked, as gRPC
  // may call back from inside; the call's context lasts until Finish, which waits.
  void Cut(std::unique_lock<std::mutex>& lock) {
    cancelled_ = cutting_ = true;
    if (!error_) error_ = MakeError(errors::kSlowClient, "the client did not read what was sent");
    auto request = running_.lock();
    lock.unlock();
    if (request) request->Cancel(errors::kSlowClient);
    context_->TryCancel();
    lock.lock();
    cutting_ = false;
    MaybeFinish();
  }
  void MaybeFinish() {
    if (!done_ || finished_ || writing_ || cutting_ || (!queue_.empty() && !cancelled_)) return;
    finished_ = true;
    if (record_) record_->SetStatus(error_ ? error_->status : 200, error_ ? error_->code : "");
    if (error_) AddErrorTrailers(*error_, *context_);
    Finish(error_ ? ToGrpcStatus(*error_) : grpc::Status::OK);
  }

  void OnWriteDone(bool ok) override {
    std::lock_guard lock(mu_);
    writing_ = false;
    if (!ok) cancelled_ = true;
    if (queue_.front().prompt_logprobs().empty()) {
      queued_bytes_ -= std::min(queued_bytes_, queue_.front().ByteSizeLong());
    }
    queue_.pop_front();
    MaybeWrite();
    MaybeFinish();
  }
  void OnCancel() override {
    std::unique_lock lock(mu_);
    cancelled_ = true;
    auto request = running_.lock();
    MaybeFinish();
    lock.unlock();
    if (request) request->Cancel(errors::kClientGone);
  }
  void OnDone() override { self_.reset(); }

  grpc::CallbackServerContext* const context_;
  const std::string id_;
  const std::shared_ptr<AccessRecord> record_;
  const size_t buffer_bytes_max_;
  const absl::Duration slow_client_timeout_;
  std::shared_ptr<GenerateStream> self_;
  std::mutex mu_;
  bool logprobs_ = false, trace_ = false;
  uint32_t choices_ = 1;
  FieldNames names_;
  std::optional<ParserPlan> plan_;
  std::vector<MessageParser> parsers_;  // of each choice of a chat, from its admission on
  std::string prompt_tail_;
  std::vector<MessageDelta> pieces_;
  std::weak_ptr<RequestRunner::Running> running_;
  std::deque<v1::GenerateResponse> queue_;  // the front is being written, while writing_
  size_t queued_bytes_ = 0;
  // The last message of the choice that ended last: it goes out with the next one's, or with the usage.
  std::optional<std::pair<uint32_t, v1::GenerateResponse>> ended_;
  std::array<bool, kChoicesMax> delivered_{};  // of each choice: a client has seen some of it
  bool writing_ = false, done_ = false, finished_ = false, cancelled_ = false, cutting_ = false;
  absl::Time write_deadline_;           // of the one in flight
  std::unique_ptr<grpc::Alarm> alarm_;  // null: none is set
  std::optional<ApiError> error_;
};

// One Embed call. Owns itself until gRPC is done with it.
class EmbedCall final : public grpc::ServerUnaryReactor, public std::enable_shared_from_this<EmbedCall> {
 public:
  EmbedCall(grpc::CallbackServerContext* context, std::string id, std::shared_ptr<AccessRecord> record,
            v1::EmbedResponse* response)
      : context_(context), id_(std::move(id)), record_(std::move(record)), response_(response) {}

  void Hold() { self_ = shared_from_this(); }
  void Attach(std::weak_ptr<RequestRunner::Running> running) {
    std::unique_lock lock(mu_);
    running_ = std::move(running);
    if (!cancelled_) return;
    auto request = running_.lock();
    lock.unlock();
    if (request) request->Cancel(errors::kClientGone);
  }
  // Once.
  void End(EmbeddingsOutcome outcome) {
    if (outcome.error) {
      FieldNames names;
      names.Add("input", "inputs");
      *outcome.error = names.Own(std::move(*outcome.error));
      AddErrorTrailers(*outcome.error, *context_);
      record_->SetStatus(outcome.error->status, outcome.error->code);
      return Finish(ToGrpcStatus(*outcome.error));
    }
    response_->set_request_id(id_);
    for (const std::vector<float>& vector : outcome.vectors) {
      response_->add_embeddings()->mutable_values()->Add(vector.begin(), vector.end());
    }
    response_->mutable_usage()->set_prompt_tokens(outcome.prompt_tokens);
    response_->mutable_usage()->set_cached_tokens(outcome.cached_tokens);
    record_->SetStatus(200);
    record_->OnBody(response_->ByteSizeLong());
    Finish(grpc::Status::OK);
  }

 private:
  void OnCancel() override {
    std::unique_lock lock(mu_);
    cancelled_ = true;
    auto request = running_.lock();
    lock.unlock();
    if (request) request->Cancel(errors::kClientGone);
  }
  void OnDone() override { self_.reset(); }

  grpc::CallbackServerContext* const context_;
  const std::string id_;
  const std::shared_ptr<AccessRecord> record_;
  v1::EmbedResponse* const response_;
  std::shared_ptr<EmbedCall> self_;
  std::mutex mu_;
  std::weak_ptr<RequestRunner::Running> running_;
  bool cancelled_ = false;
};

}  // namespace

GrpcFront::Call GrpcFront::Begin(grpc::CallbackServerContext& context, std::string_view method,
                                 std::string request_id, size_t bytes) {
  Call call;
  call.context = &context;
  call.id = std::move(request_id);
  if (call.id.empty()) call.id = std::string(Metadata(context, kRequestIdKey));
  // One that no header can carry is answered in the messages all the same; one that is too long nowhere.
  if (call.id.empty() || call.id.size() > kRequestIdChars) call.id = RandomHexId();
  if (UsableId(call.id)) context.AddInitialMetadata(kRequestIdKey, call.id);
  AccessRecord::Options options;
  options.log = deps_.access_log;
  options.protocol = "grpc";
  options.peer = context.peer();
  options.method = "POST";
  options.path = "/tidepool.v1.Inference/" + std::string(method);
  options.traceparent = std::string(Metadata(context, kTraceparentHeader));
  options.bytes_in = bytes;
  call.record = std::make_shared<AccessRecord>(std::move(options));
  call.record->SetRequestId(call.id);
  const std::string_view authorization = Metadata(context, "authorization");
  const std::string_view key = Metadata(context, "x-api-key");
  auto tenant = authorization.empty() && !key.empty() ? deps_.auth->TenantOfKey(key)
                                                      : deps_.auth->Tenant(authorization);
  if (tenant.ok()) {
    call.tenant = *std::move(tenant);
    call.record->SetTenant(call.tenant);
  } else {
    call.error = MakeError(errors::kUnauthorized, std::string(tenant.status().message()));
  }
  return call;
}

grpc::Status GrpcFront::Refuse(const Call& call, const ApiError& error) const {
  deps_.probe->Request(error.status, error.code);
  deps_.probe->Rejected(error.code);
  call.record->SetStatus(error.status, error.code);
  AddErrorTrailers(error, *call.context);
  return ToGrpcStatus(error);
}

grpc::ServerWriteReactor<v1::GenerateResponse>* GrpcFront::Generate(grpc::CallbackServerContext* context,
                                                                    const v1::GenerateRequest* message) {
  Call call = Begin(*context, "Generate", message->request_id(), message->ByteSizeLong());
  auto stream = std::make_shared<GenerateStream>(context, call.id, call.record, deps_.config->gateway);
  stream->Hold();
  auto* reactor = stream.get();
  auto refuse = [&](const ApiError& error) {
    deps_.probe->Request(error.status, error.code);
    deps_.probe->Rejected(error.code);
    stream->Refuse(error);
    return reactor;
  };
  if (call.error) return refuse(*call.error);
  auto parsed = FromProto(*message);
  if (const auto* error = std::get_if<ApiError>(&parsed)) return refuse(*error);
  auto& read = std::get<GrpcRequest>(parsed);
  std::optional<ParserPlan> plan;
  if (read.request.chat) {
    if (auto error = deps_.text->format().Check(read.request)) return refuse(read.names.Own(*error));
    plan = deps_.text->format().Plan(read.request);
  }
  stream->Expect(read, std::move(plan));
  read.request.record = call.record;
  read.request.trace = call.record->trace();
  read.request.session = std::string(Metadata(*context, "x-session-id"));
  stream->Attach(
      deps_.runner->Start(std::move(read.request), std::move(call.tenant), stream, TimeLeft(*context)));
  return reactor;
}

grpc::ServerUnaryReactor* GrpcFront::Embed(grpc::CallbackServerContext* context,
                                           const v1::EmbedRequest* message, v1::EmbedResponse* response) {
  Call call = Begin(*context, "Embed", message->request_id(), message->ByteSizeLong());
  auto parsed = FromProto(*message);
  if (auto* error = std::get_if<ApiError>(&parsed); error != nullptr && !call.error)
    call.error = std::move(*error);
  if (call.error) {
    auto* reactor = context->DefaultReactor();
    reactor->Finish(Refuse(call, *call.error));
    return reactor;
  }
  auto embed = std::make_shared<EmbedCall>(context, call.id, call.record, response);
  embed->Hold();
  auto& request = std::get<EmbeddingRequest>(parsed);
  request.record = call.record;
  request.trace = call.record->trace();
  embed->Attach(deps_.runner->StartEmbeddings(
      std::move(request), std::move(call.tenant),
      [embed](EmbeddingsOutcome outcome) { embed->End(std::move(outcome)); }, TimeLeft(*context)));
  return embed.get();
}

grpc::ServerUnaryReactor* GrpcFront::ListModels(grpc::CallbackServerContext* context,
                                                const v1::ListModelsRequest* request,
                                                v1::ListModelsResponse* response) {
  auto* reactor = context->DefaultReactor();
  Call call = Begin(*context, "ListModels", {}, request->ByteSizeLong());
  if (!call.error) call.error = deps_.runner->CheckModel("");
  if (call.error) {
    reactor->Finish(Refuse(call, *call.error));
    return reactor;
  }
  if (const auto model = deps_.runner->Model()) {
    v1::Model& card = *response->add_models();
    card.set_id(model->name());
    card.set_max_model_len(model->max_model_len());
  }
  call.record->SetStatus(200);
  reactor->Finish(grpc::Status::OK);
  return reactor;
}

grpc::ServerUnaryReactor* GrpcFront::InPool(Call call, std::function<std::optional<ApiError>()> work) {
  auto* reactor = call.context->DefaultReactor();
  if (call.error) {
    reactor->Finish(Refuse(call, *call.error));
    return reactor;
  }
  auto admitted = deps_.limits->Admit(call.tenant);
  if (const auto* error = std::get_if<ApiError>(&admitted)) {
    reactor->Finish(Refuse(call, *error));
    return reactor;
  }
  auto ticket = std::make_shared<TenantLimits::Ticket>(std::get<TenantLimits::Ticket>(std::move(admitted)));
  const bool queued = deps_.pool->TrySubmit([this, call, reactor, ticket, work = std::move(work)] {
    if (const auto error = work()) return reactor->Finish(Refuse(call, *error));
    call.record->SetStatus(200);
    reactor->Finish(grpc::Status::OK);
  });
  if (!queued) {
    reactor->Finish(
        Refuse(call, MakeRetryable(errors::kTooManyRequests,
                                   "too many prompts are waiting to be tokenised; try again later", 1)));
  }
  return reactor;
}

grpc::ServerUnaryReactor* GrpcFront::Tokenize(grpc::CallbackServerContext* context,
                                              const v1::TokenizeRequest* request,
                                              v1::TokenizeResponse* response) {
  Call call = Begin(*context, "Tokenize", {}, request->ByteSizeLong());
  // gRPC keeps both messages until the call is finished.
  return InPool(std::move(call), [this, request, response]() -> std::optional<ApiError> {
    auto parsed = FromProto(*request);
    if (auto* error = std::get_if<ApiError>(&parsed)) return std::move(*error);
    const auto& [ask, names] = std::get<GrpcRequest>(parsed);
    if (auto error = deps_.runner->CheckModel(ask.model)) return error;
    const auto model = deps_.runner->Model();
    if (model) response->set_max_model_len(model->max_model_len());
    absl::StatusOr<std::vector<int32_t>> ids;
    if (const auto* chat = std::get_if<ChatInput>(&ask.input)) {
      const auto prompt = deps_.text->Render(*chat);
      if (!prompt.ok()) {
        return names.Own(
            MakeError(errors::kChatTemplate, std::string(prompt.status().message()), "messages"));
      }
      ids = deps_.text->Encode(*prompt, ask.add_special_tokens.value_or(false));
    } else {
      Tokenizer::EncodeOptions options;
      options.add_special_tokens = ask.add_special_tokens.value_or(true);
      ids = deps_.text->tokenizer().Encode(std::get<std::string>(ask.input), options);
    }
    if (!ids.ok()) {
      return MakeError(errors::kInvalidRequest, "input: " + std::string(ids.status().message()), "input");
    }
    response->mutable_ids()->Add(ids->begin(), ids->end());
    return std::nullopt;
  });
}

grpc::ServerUnaryReactor* GrpcFront::Detokenize(grpc::CallbackServerContext* context,
                                                const v1::DetokenizeRequest* request,
                                                v1::DetokenizeResponse* response) {
  Call call = Begin(*context, "Detokenize", {}, request->ByteSizeLong());
  return InPool(std::move(call), [this, request, response]() -> std::optional<ApiError> {
    if (auto error = deps_.runner->CheckModel(request->model())) return error;
    const auto vocab = deps_.text->tokenizer().vocab_size();
    for (int32_t id : request->ids()) {
      if (id >= 0 && id < vocab) continue;
      return MakeError(errors::kInvalidRequest,
                       absl::StrCat("ids: token id ", id, " is not below the vocabulary's size, ", vocab),
                       "ids");
    }
    const std::vector<int32_t> ids(request->ids().begin(), request->ids().end());
    response->set_text(deps_.text->tokenizer().Decode(ids, /*skip_special_tokens=*/false));
    return std::nullopt;
  });
}

}  // namespace tidepool
