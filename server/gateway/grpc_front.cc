#include "server/gateway/grpc_front.h"

#include <array>
#include <cmath>
#include <deque>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
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
  GenerateStream(grpc::CallbackServerContext* context, const v1::GenerateRequest& request,
                 size_t buffer_bytes_max)
      : context_(context),
        logprobs_(request.has_logprobs()),
        id_(request.request_id()),
        buffer_bytes_max_(buffer_bytes_max) {}

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
    message.set_text(std::move(delta.text));
    for (const DeliveredToken& token : delta.tokens) {
      message.add_token_ids(token.id);
      if (!logprobs_) continue;
      v1::TokenLogprobs& out = *message.add_logprobs();
      out.set_logprob(token.logprob);
      AddTop(token.top, out);
    }
    std::lock_guard lock(mu_);
    return Push(choice, std::move(message));
  }

  bool Restart(uint32_t choice) override {
    std::lock_guard lock(mu_);
    return !delivered_[choice];
  }

  void OnChoiceEnd(uint32_t choice, const ChoiceEnd& end, const TokenUsage&) override {
    v1::GenerateResponse message;
    message.set_finish_reason(end.finish_reason);
    std::lock_guard lock(mu_);
    // An end is a few bytes and comes once a choice: no full buffer may swallow it.
    if (ended_) Enqueue(ended_->first, std::move(ended_->second));
    ended_.emplace(choice, std::move(message));
  }

  int Status(const Outcome& outcome) override { return outcome.error ? outcome.error->status : 200; }

  void OnDone(const Outcome& outcome) override {
    std::lock_guard lock(mu_);
    if (outcome.error) {
      status_ = ToGrpcStatus(*outcome.error);
      if (outcome.error->retry_after_seconds > 0) retry_after_seconds_ = outcome.error->retry_after_seconds;
    } else if (ended_) {
      v1::Usage& usage = *ended_->second.mutable_usage();
      usage.set_prompt_tokens(outcome.usage.prompt_tokens);
      usage.set_completion_tokens(outcome.usage.completion_tokens);
      usage.set_cached_tokens(outcome.usage.cached_tokens);
      Enqueue(ended_->first, std::move(ended_->second));
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
  static void AddTop(const std::vector<OutputLogprob>& top, v1::TokenLogprobs& out) {
    for (const OutputLogprob& t : top) {
      v1::Logprob& one = *out.add_top();
      one.set_id(t.id);
      one.set_logprob(t.logprob);
    }
  }

  // The following hold mu_.
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
  const bool logprobs_;
  std::shared_ptr<GenerateStream> self_;
  std::mutex mu_;
  std::string id_;
  const size_t buffer_bytes_max_;
  std::weak_ptr<RequestRunner::Running> running_;
  std::deque<v1::GenerateResponse> queue_;  // the front is being written, while writing_
  size_t queued_bytes_ = 0;
  // The last message of the choice that ended last: it goes out with the next one's, or with the usage.
  std::optional<std::pair<uint32_t, v1::GenerateResponse>> ended_;
  std::array<bool, kChoicesMax> delivered_{};  // of each choice: a client has seen some of it
  bool writing_ = false, done_ = false, finished_ = false, cancelled_ = false;
  uint32_t retry_after_seconds_ = 0;
  grpc::Status status_;
};

std::optional<ApiError> Bad(std::string_view field, std::string_view what) {
  return MakeError(errors::kInvalidRequest, std::string(field) + ": " + std::string(what),
                   std::string(field));
}

bool InRange(double v, double min, double max) { return std::isfinite(v) && v >= min && v <= max; }

// Checks a number that the client has set. `open_below`: in (min, max].
struct Range {
  const char* field;
  bool set;
  double value, min, max;
  bool open_below = false;
};
std::optional<ApiError> Check(const Range& r) {
  if (!r.set || (InRange(r.value, r.min, r.max) && !(r.open_below && r.value == r.min))) return std::nullopt;
  return Bad(r.field, absl::StrCat("must be ", r.open_below ? "above " : "from ", r.min,
                                   r.open_below ? " and at most " : " to ", r.max));
}

template <typename Ids>
std::optional<ApiError> ReadIds(const char* field, const Ids& from, size_t max, std::vector<int32_t>& into) {
  if (static_cast<size_t>(from.size()) > max)
    return Bad(field, absl::StrCat("must have at most ", max, " ids"));
  for (int32_t id : from) {
    if (id < 0) return Bad(field, "ids must not be negative");
    into.push_back(id);
  }
  return std::nullopt;
}

std::optional<ApiError> ReadSampling(const v1::SamplingParams& s, InferenceRequest& out) {
  for (const Range& range : {Range{"sampling.temperature", s.has_temperature(), s.temperature(), 0, 2},
                             Range{"sampling.top_k", s.has_top_k(), double(s.top_k()), -1, 1 << 24},
                             Range{"sampling.top_p", s.has_top_p(), s.top_p(), 0, 1, true},
                             Range{"sampling.min_p", s.has_min_p(), s.min_p(), 0, 1},
                             Range{"sampling.typical_p", s.has_typical_p(), s.typical_p(), 0, 1, true},
                             Range{"sampling.repetition_penalty", s.has_repetition_penalty(),
                                   s.repetition_penalty(), 0, kRepetitionPenaltyMax, true},
                             Range{"sampling.presence_penalty", s.has_presence_penalty(),
                                   s.presence_penalty(), -kPenaltyMax, kPenaltyMax},
                             Range{"sampling.frequency_penalty", s.has_frequency_penalty(),
                                   s.frequency_penalty(), -kPenaltyMax, kPenaltyMax}}) {
    if (auto error = Check(range)) return error;
  }
  if (s.has_temperature()) out.temperature = s.temperature();
  if (s.has_top_k()) out.top_k = std::max(0, s.top_k());
  if (s.has_top_p()) out.top_p = s.top_p();
  if (s.has_min_p()) out.min_p = s.min_p();
  if (s.has_typical_p()) out.typical_p = s.typical_p();
  if (s.has_repetition_penalty()) out.repetition_penalty = s.repetition_penalty();
  if (s.has_presence_penalty()) out.presence_penalty = s.presence_penalty();
  if (s.has_frequency_penalty()) out.frequency_penalty = s.frequency_penalty();
  if (s.has_seed()) out.seed = s.seed();
  if (s.logit_bias().size() > kLogitBiasCountMax) {
    return Bad("sampling.logit_bias", absl::StrCat("must have at most ", kLogitBiasCountMax, " entries"));
  }
  for (const auto& [id, bias] : s.logit_bias()) {
    if (id < 0) return Bad("sampling.logit_bias", "ids must not be negative");
    if (auto error = Check({"sampling.logit_bias", true, bias, -kLogitBiasAbsMax, kLogitBiasAbsMax}))
      return error;
    out.logit_bias.emplace_back(id, bias);
  }
  if (auto error = ReadIds("sampling.allowed_token_ids", s.allowed_token_ids(), kAllowedTokenIdsMax,
                           out.allowed_token_ids)) {
    return error;
  }
  if (static_cast<size_t>(s.bad_words_size()) > kBadWordsCountMax) {
    return Bad("sampling.bad_words", absl::StrCat("must have at most ", kBadWordsCountMax, " words"));
  }
  for (const std::string& word : s.bad_words()) {
    if (word.empty() || word.size() > kBadWordBytesMax) {
      return Bad("sampling.bad_words", absl::StrCat("each word must have 1 to ", kBadWordBytesMax, " bytes"));
    }
    out.bad_words.push_back(word);
  }
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
    out.max_tokens = std::max(kCompletionTokensDefault, message.min_tokens());
  }
  if (message.stop_size() > static_cast<int>(kStopStringsMax))
    return *Bad("stop", "must have at most 4 strings");
  for (const std::string& stop : message.stop()) {
    if (stop.empty() || stop.size() > 1024) return *Bad("stop", "each string must have 1 to 1024 bytes");
    out.stop.push_back(stop);
  }
  if (auto error =
          ReadIds("stop_token_ids", message.stop_token_ids(), kStopTokenIdsMax, out.stop_token_ids)) {
    return *std::move(error);
  }
  const double tokens_max = out.max_tokens ? *out.max_tokens : 1 << 24;
  for (const Range& range :
       {Range{"min_tokens", true, double(message.min_tokens()), 0, tokens_max},
        Range{"n", true, double(message.n()), 0, kChoicesMax},
        Range{"logprobs", message.has_logprobs(), double(message.logprobs()), 0, kTopLogprobsMax},
        Range{"prompt_logprobs", message.has_prompt_logprobs(), double(message.prompt_logprobs()), 0,
              kTopLogprobsMax}}) {
    if (auto error = Check(range)) return *std::move(error);
  }
  out.min_tokens = message.min_tokens();
  out.n = out.best_of = std::max(1u, message.n());
  if (message.has_logprobs()) out.top_logprobs = static_cast<int>(message.logprobs());
  if (message.has_prompt_logprobs()) out.prompt_logprobs = static_cast<int>(message.prompt_logprobs());
  out.include_stop_str_in_output = message.include_stop_str_in_output();
  if (message.has_skip_special_tokens()) out.skip_special_tokens = message.skip_special_tokens();
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
  auto stream =
      std::make_shared<GenerateStream>(context, *message, deps_.config->gateway.max_stream_buffer_bytes);
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
