#include "server/bench/answer_reader.h"

#include <simdjson.h>

#include <algorithm>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"

namespace tidepool {
namespace {

namespace dom = simdjson::dom;

constexpr size_t kRefusalBytesMax = 4096;
constexpr size_t kMessageBytesMax = 300;

// One parser a thread: it keeps its buffers.
dom::parser& Parser() {
  thread_local dom::parser parser;
  return parser;
}

std::string_view StringAt(const dom::object& object, std::string_view key) {
  std::string_view text;
  return object[key].get(text) == simdjson::SUCCESS ? text : std::string_view();
}

uint32_t CountAt(const dom::object& object, std::string_view key) {
  uint64_t number = 0;
  if (object[key].get(number) != simdjson::SUCCESS) return 0;
  return static_cast<uint32_t>(std::min<uint64_t>(number, UINT32_MAX));
}

double NumberAt(const dom::object& object, std::string_view key) {
  double number = 0;
  return object[key].get(number) == simdjson::SUCCESS ? number : 0;
}

std::string OneLine(std::string_view text) {
  std::string out(text.substr(0, kMessageBytesMax));
  for (char& c : out) {
    if (absl::ascii_iscntrl(static_cast<unsigned char>(c))) c = ' ';
  }
  return out;
}

std::string MessageOf(const dom::element& error) {
  std::string_view text;
  if (error.get(text) == simdjson::SUCCESS) return OneLine(text);
  dom::object object;
  if (error.get(object) != simdjson::SUCCESS) return "";
  const std::string_view code = StringAt(object, "code");
  const std::string_view message = StringAt(object, "message");
  return OneLine(
      absl::StrCat(std::string(code), code.empty() || message.empty() ? "" : ": ", std::string(message)));
}

// Text that is a token's, in whichever field the server puts it: chat's content, what a model thinks (vLLM
// and llama.cpp name it differently), a tool call's pieces.
bool HasDelta(const dom::object& delta, std::string_view& text) {
  for (const char* key : {"content", "reasoning_content", "reasoning"}) {
    text = StringAt(delta, key);
    if (!text.empty()) return true;
  }
  dom::array calls;
  return delta["tool_calls"].get(calls) == simdjson::SUCCESS && calls.size() > 0;
}

RequestRecord::Path PathOf(const dom::object& trace) {
  RequestRecord::Path path;
  path.prefill_worker = StringAt(trace, "prefill_worker");
  path.decode_worker = StringAt(trace, "decode_worker");
  path.queue_seconds = NumberAt(trace, "queue_ms") / 1e3;
  path.prefill_seconds = NumberAt(trace, "prefill_ms") / 1e3;
  path.transfer_seconds = NumberAt(trace, "transfer_ms") / 1e3;
  uint64_t bytes = 0;
  if (trace["fetched_bytes"].get(bytes) == simdjson::SUCCESS) path.fetched_bytes = bytes;
  return path;
}

}  // namespace

std::string ErrorMessageOf(std::string_view body) {
  dom::object object;
  if (Parser().parse(body.data(), body.size()).get(object) == simdjson::SUCCESS) {
    for (const char* key : {"error", "message", "detail"}) {
      dom::element element;
      if (object[key].get(element) != simdjson::SUCCESS) continue;
      if (std::string message = MessageOf(element); !message.empty()) return message;
    }
  }
  return OneLine(body);
}

void AnswerReader::Head(int status, const HttpHeaders& headers) {
  record_.http_status = status;
  for (const auto& [name, value] : headers) {
    if (name == "content-type") is_stream_ = status == 200 && absl::StartsWith(value, "text/event-stream");
  }
}

void AnswerReader::Bytes(std::string_view bytes, absl::Time at) {
  if (!is_stream_) {
    refusal_.append(bytes.substr(0, kRefusalBytesMax - std::min(kRefusalBytesMax, refusal_.size())));
    return;
  }
  const absl::Status status =
      sse_.Feed(bytes, [&](std::string_view, std::string_view data) { Event(data, at); });
  if (!status.ok()) Fail({status.message().data(), status.message().size()});
}

void AnswerReader::Fail(std::string_view why) {
  if (record_.error.empty()) record_.error = why.empty() ? "unknown error" : std::string(why);
}

void AnswerReader::Token(absl::Time at) {
  if (!record_.got_token) {
    record_.got_token = true;
    record_.first = at - run_start_;
  } else {
    record_.gaps_seconds.push_back(absl::ToDoubleSeconds(at - last_token_));
  }
  last_token_ = at;
  record_.last = at - run_start_;
  ++events_;
}

void AnswerReader::Event(std::string_view data, absl::Time at) {
  if (data == "[DONE]") {
    done_marker_ = true;
    return;
  }
  dom::object object;
  if (const auto error = Parser().parse(data.data(), data.size()).get(object)) {
    return Fail(absl::StrCat("an event is not a JSON object: ", simdjson::error_message(error)));
  }
  if (dom::element error; object["error"].get(error) == simdjson::SUCCESS && !error.is_null()) {
    return Fail(MessageOf(error));
  }
  dom::array choices;
  if (object["choices"].get(choices) == simdjson::SUCCESS) {
    for (const auto element : choices) {
      dom::object choice, delta;
      if (element.get(choice) != simdjson::SUCCESS) continue;
      std::string_view text = StringAt(choice, "text");
      const bool token =
          !text.empty() || (choice["delta"].get(delta) == simdjson::SUCCESS && HasDelta(delta, text));
      if (token) Token(at);
      if (token && keep_text_) record_.text += text;
      if (const std::string_view reason = StringAt(choice, "finish_reason"); !reason.empty()) {
        record_.finish_reason = reason;
      }
    }
  }
  if (dom::object usage; object["usage"].get(usage) == simdjson::SUCCESS) {
    record_.usage_from_server = true;
    record_.input_tokens = CountAt(usage, "prompt_tokens");
    record_.output_tokens = CountAt(usage, "completion_tokens");
    if (dom::object details; usage["prompt_tokens_details"].get(details) == simdjson::SUCCESS) {
      uint64_t cached = 0;
      if (details["cached_tokens"].get(cached) == simdjson::SUCCESS) {
        record_.cached_tokens = static_cast<uint32_t>(std::min<uint64_t>(cached, UINT32_MAX));
      }
    }
  }
  if (dom::object trace; object["tidepool_trace"].get(trace) == simdjson::SUCCESS) {
    record_.path = PathOf(trace);
  }
}

void AnswerReader::End(const absl::Status& transport, absl::Time at) {
  record_.end = at - run_start_;
  if (!record_.usage_from_server) record_.output_tokens = events_;
  if (!transport.ok()) {
    Fail(absl::StrCat(std::string(absl::StatusCodeToString(transport.code())), ": ",
                      std::string(transport.message())));
  } else if (record_.http_status != 200) {
    Fail(absl::StrCat("HTTP ", record_.http_status, ": ", ErrorMessageOf(refusal_)));
  } else if (!is_stream_) {
    Fail("the answer is not text/event-stream");
  } else if (!done_marker_) {
    Fail("the stream ended without [DONE]");
  }
  if (!record_.got_token) {
    // An answer without text, its end of sequence first: its end is what the client got.
    record_.first = record_.last = record_.end;
    record_.got_token = record_.ok();
  }
}

}  // namespace tidepool
