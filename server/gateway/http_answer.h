#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "server/gateway/openai_response.h"
#include "server/http/http_server.h"

namespace tidepool {

// HttpAnswer: one request's way out over HTTP: collected into one body, or as server-sent events. Until
// the first event is due no header is sent, so that a failure before it has a proper status. Thread-safe.
class HttpAnswer final : public OutputSink {
 public:
  HttpAnswer(const InferenceRequest& request, OpenAiAnswer answer, std::string request_id,
             std::shared_ptr<ResponseWriter> writer)
      : stream_(request.stream),
        include_usage_(request.include_usage),
        answer_(std::move(answer)),
        request_id_(std::move(request_id)),
        writer_(std::move(writer)),
        delivered_(request.n) {}

  void OnAdmitted(const Admission& admission) override;
  void OnPromptLogprobs(std::vector<PromptScore> scores) override;
  bool OnDelta(uint32_t choice, OutputDelta delta, const TokenUsage& usage) override;
  bool Restart(uint32_t choice) override;
  void OnChoiceEnd(uint32_t choice, const ChoiceEnd& end, const TokenUsage& usage) override;
  int Status(const Outcome& outcome) override;
  void OnDone(const Outcome& outcome) override;

  // Sends a comment when the stream was silent for `interval` since `now` was last given a sign of life.
  void Ping(absl::Time now, absl::Duration interval);

 private:
  // The following hold mu_.
  void StartStream();
  bool Event(const std::string& json);
  bool First(uint32_t choice);

  const bool stream_, include_usage_;
  std::mutex mu_;
  OpenAiAnswer answer_;
  const std::string request_id_;
  std::shared_ptr<ResponseWriter> writer_;  // null once the answer is complete
  bool admitted_ = false;
  bool started_ = false;         // headers are out
  std::vector<bool> delivered_;  // of each choice: its first event is out, no restart
  absl::Time last_write_;
};

// Content-Type, X-Request-Id and, with an error, Retry-After.
HttpHeaders JsonHeaders(const std::string& request_id, uint32_t retry_after_seconds = 0);

}  // namespace tidepool
