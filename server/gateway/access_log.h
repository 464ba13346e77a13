#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "base/trace.h"
#include "server/http/http_server.h"

namespace spdlog {
class logger;
}

namespace tidepool {

// AccessLog: where the lines go (Handle). Thread-safe. A line that cannot be written is dropped and counted.
class AccessLog {
 public:
  // "stderr" (silent above log level info), "off", or the path of a file, which is appended to.
  // Errors: InvalidArgument: the file cannot be opened.
  static absl::StatusOr<std::unique_ptr<AccessLog>> Open(const std::string& where);
  ~AccessLog();

  // False: nothing would be written.
  bool enabled() const;
  void Write(const std::string& line);
  // Opens the file again, after somebody moved it away. On an error the old one stays.
  absl::Status Reopen();

 private:
  explicit AccessLog(std::string path) : path_(std::move(path)) {}
  absl::StatusOr<std::shared_ptr<spdlog::logger>> OpenFile() const;

  const std::string path_;  // empty: no file
  mutable std::mutex mu_;
  std::shared_ptr<spdlog::logger> logger_;  // guarded by mu_; null: off
};

// What a request's work took, as far as it came. Plain data.
struct AccessWork {
  std::string id;  // of the request, made here
  std::string model;
  uint32_t prompt_tokens = 0;
  uint32_t cached_tokens = 0;
  uint32_t completion_tokens = 0;
  uint32_t attempts = 0;
  std::string finish_reason;  // of one choice; or
  std::string_view error;     // an error's code; static storage
  std::string prefill_worker, decode_worker;
  // Seconds; below 0: the request did not come so far.
  double ttft = -1, admit = -1, queue = -1, prefill = -1, transfer = -1, decode = -1;
};

// AccessRecord: one request on its way, from whichever front: collects what is logged of it, and writes one
// line of JSON when nobody holds it any more: the answer is out, or its client gone, and its work is done.
// Over HTTP it is the request's observer, and gives the answer's head traceparent, Retry-After-Ms, and what
// else every answer carries. Never prompts, answers, keys or queries. Thread-safe.
class AccessRecord final : public HttpObserver {
 public:
  struct Options {
    AccessLog* log = nullptr;  // borrowed; null: no line
    std::string protocol;      // http, grpc
    std::string peer;
    std::string method;
    std::string path;         // without query
    std::string traceparent;  // as it came
    uint64_t bytes_in = 0;
    // Headers that every answer of this server gets; and those of the tenant, once known.
    std::function<void(HttpHeaders&)> add_headers;
    std::function<void(const std::string& tenant, HttpHeaders&)> add_tenant_headers;
  };
  explicit AccessRecord(Options options);
  ~AccessRecord() override;

  // The one behind a request that came over HTTP; null where it has none.
  static std::shared_ptr<AccessRecord> Of(const HttpRequest& request);

  // The trace that the client is part of, or one that begins here; parent_id is ours. Never invalid.
  const TraceContext& trace() const { return trace_; }

  void SetTenant(const std::string& tenant);
  void SetRequestId(std::string_view id);
  // The end of one of the request's sequences. Tokens add up; the stage times are the first one's.
  void AddWork(const AccessWork& work);
  // How the call ended, where no HTTP head says it: the HTTP status that stands for it, and an error's code
  // (static storage).
  void SetStatus(int status, std::string_view error = {});

  void OnHead(int status, HttpHeaders& headers) override;
  void OnBody(size_t bytes) override;

  // The line, without a line end. Exposed for tests.
  std::string Line() const;

 private:
  const Options options_;
  TraceContext trace_;
  const absl::Time started_;  // of the monotonic clock

  mutable std::mutex mu_;
  std::string tenant_, request_id_;
  int status_ = 499;  // until a head went out: the client left before
  std::string_view error_;
  uint64_t bytes_out_ = 0;
  bool worked_ = false;
  AccessWork work_;
};

}  // namespace tidepool
