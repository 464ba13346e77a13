#pragma once

#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "server/gateway/chat/message_parser.h"
#include "server/gateway/request_runner.h"
#include "server/http/http_server.h"

namespace tidepool {

// One server-sent event, appended to `out`. `name` may be empty: then there is no `event:` line. `json` is
// one line.
void AppendEvent(std::string_view name, std::string_view json, std::string& out);

// AnswerEncoder: Codec of the answers to one request (choices 0 to n - 1) to one API's JSON, whole or as
// server-sent events. Driven by HttpAnswer, which knows when headers go out and what may still be restarted.
// Calls come in the order of OutputSink's; not thread-safe.
//
// `message`: what a MessageParser made of the delta's text; empty for raw completions, which show delta.text
// itself. The stream's functions append whole events to `out`, or nothing where there is nothing to say.
class AnswerEncoder {
 public:
  virtual ~AnswerEncoder() = default;

  // Before all else, once the request is admitted.
  virtual void Begin(const Admission& admission) = 0;
  virtual void AddPromptLogprobs(std::vector<PromptScore> scores) = 0;

  // The stream: First once for each choice, before its first Delta or Finish; End once, when all choices have
  // finished; or Error, at any point after the first event, and nothing more. `usage` is what is known so
  // far.
  virtual void First(uint32_t choice, std::string& out) = 0;
  virtual void Delta(uint32_t choice, const OutputDelta& delta, std::span<const MessageDelta> message,
                     const TokenUsage& usage, std::string& out) = 0;
  virtual void Finish(uint32_t choice, const ChoiceEnd& end, const TokenUsage& usage, std::string& out) = 0;
  virtual void End(const Outcome& outcome, std::string& out) = 0;
  virtual void Error(const ApiError& error, std::string& out) = 0;

  // The whole answer: deltas and the end of each choice (Clear: it starts again), then the body.
  virtual void Append(uint32_t choice, OutputDelta delta, std::span<const MessageDelta> message) = 0;
  virtual void Clear(uint32_t choice) = 0;
  virtual void Append(uint32_t choice, const ChoiceEnd& end) = 0;
  virtual std::string Whole(const Outcome& outcome) = 0;

  // Headers of every answer, beside Content-Type and X-Request-Id.
  virtual HttpHeaders Headers() const { return {}; }

  // The body of an answer that is an error from the start.
  virtual std::string ErrorBody(const ApiError& error) const = 0;
};

}  // namespace tidepool
