#pragma once

#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "server/gateway/answer_encoder.h"
#include "server/http/http_server.h"

namespace tidepool {

// HttpAnswer: one request's way out over HTTP: collected into one body, or as server-sent events. What the
// model wrote is taken apart into its message here, and put into an API's JSON by the encoder. Until the
// first event is due no header is sent, so that a failure before it has a proper status. Thread-safe.
class HttpAnswer final : public OutputSink {
 public:
  // `plan`: of a chat (ChatFormat::Plan); nullopt: raw text.
  HttpAnswer(const InferenceRequest& request, std::optional<ParserPlan> plan,
             std::unique_ptr<AnswerEncoder> encoder, std::string request_id,
             std::shared_ptr<ResponseWriter> writer)
      : stream_(request.stream),
        plan_(std::move(plan)),
        encoder_(std::move(encoder)),
        request_id_(std::move(request_id)),
        writer_(std::move(writer)),
        begun_(request.choices()),
        delivered_(request.choices()) {}

  void OnAdmitted(const Admission& admission) override;
  void OnPromptLogprobs(std::vector<PromptScore> scores) override;
  bool OnDelta(uint32_t choice, OutputDelta delta, const TokenUsage& usage) override;
  bool Restart(uint32_t choice) override;
  void OnChoiceEnd(uint32_t choice, const ChoiceEnd& end, const TokenUsage& usage) override;
  std::optional<std::vector<std::string>> CalledTools(uint32_t choice) override;
  int Status(const Outcome& outcome) override;
  void OnDone(const Outcome& outcome) override;

  // Sends a comment when the stream was silent for `interval` since `now` was last given a sign of life.
  void Ping(absl::Time now, absl::Duration interval);

 private:
  // The following hold mu_.
  void StartStream();
  // The first event of a choice into events_, where it is still due, and of those before it: clients of
  // others take choices by the order in which they first see them.
  void First(uint32_t choice);
  // Sends events_. False: the client is gone or too slow.
  bool Send();
  TokenUsage WithReasoning(TokenUsage usage) const;
  HttpHeaders Headers(uint32_t retry_after_seconds) const;  // of a body

  const bool stream_;
  const std::optional<ParserPlan> plan_;
  std::mutex mu_;
  const std::unique_ptr<AnswerEncoder> encoder_;
  const std::string request_id_;
  std::shared_ptr<ResponseWriter> writer_;  // null once the answer is complete
  bool admitted_ = false;
  bool started_ = false;         // headers are out
  std::vector<bool> begun_;      // of each choice: its first event is out
  std::vector<bool> delivered_;  // of each choice: more than that is out, no restart
  absl::Time last_write_;
  std::string prompt_text_;
  std::vector<MessageParser> parsers_;  // of each choice of a chat, from its admission on
  // Kept for their memory: the token path makes nothing new.
  std::vector<MessageDelta> message_;
  std::string events_;
};

// Content-Type, X-Request-Id and, with an error, Retry-After.
HttpHeaders JsonHeaders(const std::string& request_id, uint32_t retry_after_seconds = 0);

}  // namespace tidepool
