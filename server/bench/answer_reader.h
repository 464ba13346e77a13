#pragma once

#include <string>
#include <string_view>

#include "absl/time/time.h"
#include "server/bench/request_record.h"
#include "server/bench/sse_parser.h"
#include "server/http/http_server.h"

namespace tidepool {

// AnswerReader: Codec of one streamed answer of an OpenAI-compatible server (chat or text completions) into a
// RequestRecord: when tokens came, how many, how it ended. Tells apart what vLLM, SGLang, llama.cpp and
// Tidepool send. Not thread-safe.
class AnswerReader {
 public:
  // `record` is borrowed. `run_start`: what the record's times count from.
  AnswerReader(RequestRecord& record, absl::Time run_start, bool keep_text)
      : record_(record), run_start_(run_start), keep_text_(keep_text) {}

  void Head(int status, const HttpHeaders& headers);
  void Bytes(std::string_view bytes, absl::Time at);
  // The answer is over: decides whether it succeeded. `transport`: how the HTTP exchange ended.
  void End(const absl::Status& transport, absl::Time at);

 private:
  void Event(std::string_view data, absl::Time at);
  void Token(absl::Time at);
  void Fail(std::string_view why);

  RequestRecord& record_;
  const absl::Time run_start_;
  const bool keep_text_;
  SseParser sse_;
  bool is_stream_ = false;
  bool done_marker_ = false;
  uint32_t events_ = 0;  // with tokens
  absl::Time last_token_;
  std::string refusal_;  // the body of an answer that is no stream, its beginning
};

// The message of an error answer's body in any of the common shapes ({"error": {"message"}}, {"message"},
// {"detail"}), prefixed with its code; else the body's beginning. One line of printable text.
std::string ErrorMessageOf(std::string_view body);

}  // namespace tidepool
