#include "server/gateway/http_answer.h"

#include <algorithm>

#include "base/clock.h"

namespace tidepool {

HttpHeaders JsonHeaders(const std::string& request_id, uint32_t retry_after_seconds) {
  HttpHeaders headers = {{"Content-Type", "application/json"}, {"X-Request-Id", request_id}};
  if (retry_after_seconds > 0) headers.emplace_back("Retry-After", std::to_string(retry_after_seconds));
  return headers;
}

void HttpAnswer::OnAdmitted(const Admission& admission) {
  std::lock_guard lock(mu_);
  admitted_ = true;
  last_write_ = Clock::Real().Now();
  if (plan_) {
    for (size_t i = 0; i < begun_.size(); ++i) parsers_.emplace_back(*plan_, admission.prompt_text);
    // A restart needs no more of the prompt than where it ends.
    constexpr size_t kTailBytes = 256;
    const std::string& text = admission.prompt_text;
    prompt_text_ = text.substr(text.size() - std::min(text.size(), kTailBytes));
  }
  encoder_->Begin(admission);
}

void HttpAnswer::StartStream() {
  if (started_) return;
  started_ = true;
  HttpHeaders headers = {{"Content-Type", "text/event-stream; charset=utf-8"},
                         {"Cache-Control", "no-cache"},
                         {"X-Accel-Buffering", "no"},  // nginx would hold the stream back
                         {"X-Request-Id", request_id_}};
  for (auto& header : encoder_->Headers()) headers.push_back(std::move(header));
  writer_->StartStream(200, std::move(headers));
}

HttpHeaders HttpAnswer::Headers(uint32_t retry_after_seconds) const {
  HttpHeaders headers = JsonHeaders(request_id_, retry_after_seconds);
  for (auto& header : encoder_->Headers()) headers.push_back(std::move(header));
  return headers;
}

bool HttpAnswer::Send() {
  if (events_.empty()) return true;
  last_write_ = Clock::Real().Now();
  const bool sent = writer_->Write(events_);
  events_.clear();
  return sent;
}

void HttpAnswer::First(uint32_t choice) {
  StartStream();
  if (delivered_[choice]) return;
  delivered_[choice] = true;
  for (uint32_t i = 0; i <= choice; ++i) {
    if (begun_[i]) continue;
    begun_[i] = true;
    encoder_->First(i, events_);
  }
}

TokenUsage HttpAnswer::WithReasoning(TokenUsage usage) const {
  for (const MessageParser& parser : parsers_) usage.reasoning_tokens += parser.reasoning_tokens();
  return usage;
}

void HttpAnswer::OnPromptLogprobs(std::vector<PromptScore> scores) {
  std::lock_guard lock(mu_);
  encoder_->AddPromptLogprobs(std::move(scores));
}

bool HttpAnswer::OnDelta(uint32_t choice, OutputDelta delta, const TokenUsage& usage) {
  std::lock_guard lock(mu_);
  message_.clear();
  if (plan_) parsers_[choice].Push(delta.text, delta.tokens.size(), message_);
  if (!stream_) {
    encoder_->Append(choice, std::move(delta), message_);
    return true;
  }
  First(choice);
  encoder_->Delta(choice, delta, message_, WithReasoning(usage), events_);
  return Send();
}

bool HttpAnswer::Restart(uint32_t choice) {
  std::lock_guard lock(mu_);
  if (delivered_[choice]) return false;
  if (plan_ && !parsers_.empty()) parsers_[choice] = MessageParser(*plan_, prompt_text_);
  encoder_->Clear(choice);
  return true;
}

void HttpAnswer::OnChoiceEnd(uint32_t choice, const ChoiceEnd& given, const TokenUsage& usage) {
  std::lock_guard lock(mu_);
  ChoiceEnd end = given;
  message_.clear();
  if (plan_) {
    parsers_[choice].Finish(message_);
    end.finish_reason = parsers_[choice].FinishReason(given.finish_reason);
  }
  if (!stream_) {
    encoder_->Append(choice, OutputDelta{}, message_);
    encoder_->Append(choice, end);
    return;
  }
  const TokenUsage all = WithReasoning(usage);
  First(choice);
  if (!message_.empty()) encoder_->Delta(choice, OutputDelta{}, message_, all, events_);
  encoder_->Finish(choice, end, all, events_);
  // A client that is gone is found out by its connection.
  (void)Send();
}

std::optional<std::vector<std::string>> HttpAnswer::CalledTools(uint32_t choice) {
  std::lock_guard lock(mu_);
  return choice < parsers_.size() ? parsers_[choice].CalledTools() : std::nullopt;
}

void HttpAnswer::Ping(absl::Time now, absl::Duration interval) {
  std::lock_guard lock(mu_);
  if (!stream_ || !admitted_ || writer_ == nullptr || now - last_write_ < interval) return;
  StartStream();
  last_write_ = now;
  // A client that is gone is found out by its connection.
  (void)writer_->Write(": ping\n\n");
}

int HttpAnswer::Status(const Outcome& outcome) {
  std::lock_guard lock(mu_);
  return outcome.error && !started_ ? outcome.error->status : 200;
}

void HttpAnswer::OnDone(const Outcome& given) {
  std::lock_guard lock(mu_);
  Outcome outcome = given;
  outcome.usage = WithReasoning(given.usage);
  if (!stream_ || (outcome.error && !started_)) {
    // Nobody reads 499; the connection is gone.
    if (outcome.error) {
      writer_->Send(outcome.error->status, Headers(outcome.error->retry_after_seconds),
                    encoder_->ErrorBody(*outcome.error));
    } else {
      writer_->Send(200, Headers(0), encoder_->Whole(outcome));
    }
  } else {
    StartStream();
    if (outcome.error) {
      encoder_->Error(*outcome.error, events_);
    } else {
      encoder_->End(outcome, events_);
    }
    (void)Send();
    writer_->End();
  }
  writer_ = nullptr;
}

}  // namespace tidepool
