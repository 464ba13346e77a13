#include "server/gateway/http_answer.h"

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
  answer_.Begin(admission);
}

void HttpAnswer::StartStream() {
  if (started_) return;
  started_ = true;
  writer_->StartStream(200, {{"Content-Type", "text/event-stream; charset=utf-8"},
                             {"Cache-Control", "no-cache"},
                             {"X-Accel-Buffering", "no"},  // nginx would hold the stream back
                             {"X-Request-Id", request_id_}});
}

bool HttpAnswer::Event(const std::string& json) {
  last_write_ = Clock::Real().Now();
  return writer_->Write("data: " + json + "\n\n");
}

bool HttpAnswer::First(uint32_t choice) {
  StartStream();
  if (delivered_[choice]) return true;
  delivered_[choice] = true;
  const std::string chunk = answer_.FirstChunk(choice);
  return chunk.empty() || Event(chunk);
}

void HttpAnswer::OnPromptLogprobs(std::vector<PromptScore> scores) {
  std::lock_guard lock(mu_);
  answer_.AddPromptLogprobs(std::move(scores));
}

bool HttpAnswer::OnDelta(uint32_t choice, OutputDelta delta, const TokenUsage& usage) {
  std::lock_guard lock(mu_);
  if (!stream_) {
    answer_.Append(choice, std::move(delta));
    return true;
  }
  return First(choice) && Event(answer_.DeltaChunk(choice, delta, usage));
}

bool HttpAnswer::Restart(uint32_t choice) {
  std::lock_guard lock(mu_);
  if (delivered_[choice]) return false;
  answer_.Clear(choice);
  return true;
}

void HttpAnswer::OnChoiceEnd(uint32_t choice, const ChoiceEnd& end, const TokenUsage& usage) {
  std::lock_guard lock(mu_);
  if (!stream_) {
    answer_.End(choice, end);
    return;
  }
  // A client that is gone is found out by its connection.
  if (First(choice)) (void)Event(answer_.FinishChunk(choice, end, usage, !include_usage_));
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

void HttpAnswer::OnDone(const Outcome& outcome) {
  std::lock_guard lock(mu_);
  auto writer = std::move(writer_);
  writer_ = nullptr;
  if (!stream_ || (outcome.error && !started_)) {
    const int status = outcome.error ? outcome.error->status : 200;
    // Nobody reads 499; the connection is gone.
    if (outcome.error) {
      writer->Send(status, JsonHeaders(request_id_, outcome.error->retry_after_seconds),
                   ErrorBody(*outcome.error));
    } else {
      writer->Send(status, JsonHeaders(request_id_), answer_.Whole(outcome));
    }
    return;
  }
  writer_ = writer;
  if (outcome.error) {
    // No [DONE]: a client that reads only that must not take this for a complete answer.
    Event(ErrorBody(*outcome.error));
  } else {
    if (include_usage_) Event(answer_.UsageChunk(outcome, true));
    writer->Write("data: [DONE]\n\n");
  }
  writer->End();
  writer_ = nullptr;
}

}  // namespace tidepool
