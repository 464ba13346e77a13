#include "server/gateway/grpc_front.h"

#include <cmath>
#include <deque>

#include "server/gateway/field_reader.h"

namespace tidepool {
namespace {

grpc::Status ToGrpcStatus(const ApiError& error) {
  return {static_cast<grpc::StatusCode>(GrpcCode(error)), error.message};
}

// One Generate call: the sink of its request, and the reactor that writes what the client can take. Owns
// itself until gRPC is done with it.
class GenerateStream final : public OutputSink,
                             public grpc::ServerWriteReactor<v1::GenerateResponse>,
                             public std::enable_shared_from_this<GenerateStream> {
 public:
  GenerateStream(grpc::CallbackServerContext* context, std::string id, size_t buffer_bytes_max)
      : context_(context), id_(std::move(id)), buffer_bytes_max_(buffer_bytes_max) {}

  void Hold() { self_ = shared_from_this(); }
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
    if (id_.empty()) id_ = admission.id;
  }

  bool OnDelta(OutputDelta delta, const TokenUsage&) override {
    v1::GenerateResponse message;
    message.set_text(std::move(delta.text));
    for (const DeliveredToken& token : delta.tokens) message.add_token_ids(token.id);
    std::lock_guard lock(mu_);
    return Push(std::move(message));
  }

  bool Restart() override {
    std::lock_guard lock(mu_);
    return !delivered_;
  }

  int Status(const Outcome& outcome) override { return outcome.error ? outcome.error->status : 200; }

  void OnDone(const Outcome& outcome) override {
    std::lock_guard lock(mu_);
    if (outcome.error) {
      status_ = ToGrpcStatus(*outcome.error);
      if (outcome.error->retry_after_seconds > 0) retry_after_seconds_ = outcome.error->retry_after_seconds;
    } else {
      v1::GenerateResponse message;
      message.set_finish_reason(outcome.finish_reason);
      v1::Usage& usage = *message.mutable_usage();
      usage.set_prompt_tokens(outcome.usage.prompt_tokens);
      usage.set_completion_tokens(outcome.usage.completion_tokens);
      usage.set_cached_tokens(outcome.usage.cached_tokens);
      Push(std::move(message));
    }
    done_ = true;
    MaybeFinish();
  }

  void Refuse(const ApiError& error) {
    Outcome outcome;
    outcome.error = error;
    OnDone(outcome);
  }

 private:
  // The following three hold mu_.
  bool Push(v1::GenerateResponse message) {
    if (cancelled_) return false;
    message.set_request_id(id_);
    const size_t bytes = message.ByteSizeLong();
    if (queued_bytes_ + bytes > buffer_bytes_max_) return false;
    delivered_ = true;
    queued_bytes_ += bytes;
    queue_.push_back(std::move(message));
    MaybeWrite();
    return true;
  }
  void MaybeWrite() {
    if (writing_ || cancelled_ || queue_.empty()) return;
    writing_ = true;
    StartWrite(&queue_.front());
  }
  void MaybeFinish() {
    if (!done_ || finished_ || writing_ || (!queue_.empty() && !cancelled_)) return;
    finished_ = true;
    if (retry_after_seconds_ > 0) {
      // gRPC's own word for Retry-After.
      context_->AddTrailingMetadata("grpc-retry-pushback-ms", std::to_string(retry_after_seconds_ * 1000));
    }
    Finish(status_);
  }

  void OnWriteDone(bool ok) override {
    std::lock_guard lock(mu_);
    writing_ = false;
    if (!ok) cancelled_ = true;
    queued_bytes_ -= std::min(queued_bytes_, queue_.front().ByteSizeLong());
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
  std::shared_ptr<GenerateStream> self_;
  std::mutex mu_;
  std::string id_;
  const size_t buffer_bytes_max_;
  std::weak_ptr<RequestRunner::Running> running_;
  std::deque<v1::GenerateResponse> queue_;  // the front is being written, while writing_
  size_t queued_bytes_ = 0;
  bool writing_ = false, delivered_ = false, done_ = false, finished_ = false, cancelled_ = false;
  uint32_t retry_after_seconds_ = 0;
  grpc::Status status_;
};

std::optional<ApiError> Bad(std::string_view field, std::string_view what) {
  return MakeError(errors::kInvalidRequest, std::string(field) + ": " + std::string(what),
                   std::string(field));
}

bool InRange(double v, double min, double max) { return std::isfinite(v) && v >= min && v <= max; }

std::optional<ApiError> ReadSampling(const v1::SamplingParams& sampling, InferenceRequest& out) {
  if (sampling.has_temperature()) out.temperature = sampling.temperature();
  if (sampling.has_top_p()) out.top_p = sampling.top_p();
  if (sampling.has_min_p()) out.min_p = sampling.min_p();
  if (sampling.has_top_k()) out.top_k = std::max(0, sampling.top_k());
  if (sampling.has_seed()) out.seed = sampling.seed();
  if (!InRange(out.temperature, 0, 2)) return Bad("sampling.temperature", "must be from 0 to 2");
  if (!InRange(out.top_p, 0, 1) || out.top_p == 0)
    return Bad("sampling.top_p", "must be above 0 and at most 1");
  if (!InRange(out.min_p, 0, 1)) return Bad("sampling.min_p", "must be from 0 to 1");
  if (sampling.has_top_k() && sampling.top_k() < -1) return Bad("sampling.top_k", "must be -1 or more");
  return std::nullopt;
}

std::optional<ApiError> ReadInput(const v1::GenerateRequest& message, InferenceRequest& out) {
  switch (message.input_case()) {
    case v1::GenerateRequest::kText:
      if (message.text().empty()) return Bad("text", "must not be empty");
      out.input = message.text();
      return std::nullopt;
    case v1::GenerateRequest::kTokens: {
      std::vector<int32_t> ids(message.tokens().ids().begin(), message.tokens().ids().end());
      if (ids.empty()) return Bad("tokens", "must not be empty");
      for (int32_t id : ids) {
        if (id < 0) return Bad("tokens", "ids must not be negative");
      }
      out.input = std::move(ids);
      return std::nullopt;
    }
    case v1::GenerateRequest::kChat: {
      if (message.chat().messages().empty()) return Bad("chat", "must have at least one message");
      ChatInput chat;
      chat.messages = OrderedJson::array();
      for (const v1::ChatMessage& m : message.chat().messages()) {
        if (m.role() != "system" && m.role() != "user" && m.role() != "assistant") {
          return Bad("chat.messages.role", "must be one of system, user, assistant");
        }
        chat.messages.push_back({{"role", m.role()}, {"content", m.content()}});
      }
      out.input = std::move(chat);
      out.chat = true;
      return std::nullopt;
    }
    case v1::GenerateRequest::INPUT_NOT_SET:
      break;
  }
  return Bad("input", "give one of text, tokens, chat");
}

}  // namespace

std::variant<InferenceRequest, ApiError> FromProto(const v1::GenerateRequest& message) {
  InferenceRequest out;
  out.model = message.model();
  out.stream = true;
  if (auto error = ReadInput(message, out)) return std::move(*error);
  if (auto error = ReadSampling(message.sampling(), out)) return std::move(*error);
  if (message.has_max_tokens()) {
    if (message.max_tokens() == 0 || message.max_tokens() > 1u << 24) {
      return *Bad("max_tokens", "must be from 1 to 16777216");
    }
    out.max_tokens = message.max_tokens();
  } else if (!out.chat) {
    out.max_tokens = kCompletionTokensDefault;
  }
  if (message.stop_size() > static_cast<int>(kStopStringsMax))
    return *Bad("stop", "must have at most 4 strings");
  for (const std::string& stop : message.stop()) {
    if (stop.empty() || stop.size() > 1024) return *Bad("stop", "each string must have 1 to 1024 bytes");
    out.stop.push_back(stop);
  }
  if (message.stop_token_ids_size() > static_cast<int>(kStopTokenIdsMax)) {
    return *Bad("stop_token_ids", "must have at most 128 ids");
  }
  for (int32_t id : message.stop_token_ids()) {
    if (id < 0) return *Bad("stop_token_ids", "ids must not be negative");
    out.stop_token_ids.push_back(id);
  }
  out.ignore_eos = message.ignore_eos();
  if (CountCodePoints(message.cache_salt()) > kCacheSaltCharsMax) {
    return *Bad("cache_salt", "must have at most 1024 characters");
  }
  out.cache_salt = message.cache_salt();
  if (message.request_id().size() > 128) return *Bad("request_id", "must have at most 128 bytes");
  return out;
}

absl::StatusOr<std::string> GrpcFront::Tenant(const grpc::CallbackServerContext& context) const {
  const auto& metadata = context.client_metadata();
  const auto it = metadata.find("authorization");
  return deps_.auth->Tenant(it == metadata.end() ? std::string_view()
                                                 : std::string_view(it->second.data(), it->second.size()));
}

grpc::ServerWriteReactor<v1::GenerateResponse>* GrpcFront::Generate(grpc::CallbackServerContext* context,
                                                                    const v1::GenerateRequest* message) {
  auto stream = std::make_shared<GenerateStream>(context, message->request_id(),
                                                 deps_.config->gateway.max_stream_buffer_bytes);
  stream->Hold();
  auto* reactor = stream.get();
  auto refuse = [&](const ApiError& error) {
    deps_.probe->Request(error.status, error.code);
    deps_.probe->Rejected(error.code);
    stream->Refuse(error);
    return reactor;
  };
  auto tenant = Tenant(*context);
  if (!tenant.ok()) return refuse(MakeError(errors::kUnauthorized, std::string(tenant.status().message())));
  auto parsed = FromProto(*message);
  if (const auto* error = std::get_if<ApiError>(&parsed)) return refuse(*error);
  stream->Attach(deps_.runner->Start(std::move(std::get<InferenceRequest>(parsed)), *std::move(tenant),
                                     stream, TimeLeft(*context)));
  return reactor;
}

grpc::ServerUnaryReactor* GrpcFront::ListModels(grpc::CallbackServerContext* context,
                                                const v1::ListModelsRequest*,
                                                v1::ListModelsResponse* response) {
  auto* reactor = context->DefaultReactor();
  if (const auto tenant = Tenant(*context); !tenant.ok()) {
    reactor->Finish(ToGrpcStatus(MakeError(errors::kUnauthorized, std::string(tenant.status().message()))));
    return reactor;
  }
  if (auto error = deps_.runner->CheckModel("")) {
    reactor->Finish(ToGrpcStatus(*error));
    return reactor;
  }
  if (const auto model = deps_.runner->Model()) {
    v1::Model& card = *response->add_models();
    card.set_id(model->name());
    card.set_max_model_len(model->max_model_len());
  }
  reactor->Finish(grpc::Status::OK);
  return reactor;
}

}  // namespace tidepool
