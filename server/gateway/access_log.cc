#include "server/gateway/access_log.h"

#include <fcntl.h>
#include <spdlog/sinks/basic_file_sink.h>
#include <spdlog/sinks/stdout_sinks.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <filesystem>

#include "absl/strings/numbers.h"
#include "absl/time/clock.h"
#include "base/clock.h"
#include "base/digest.h"
#include "base/log.h"
#include "base/status.h"
#include "server/gateway/json.h"

namespace tidepool {
namespace {

constexpr size_t kPathShown = 256;

std::shared_ptr<spdlog::logger> Plain(spdlog::sink_ptr sink) {
  auto logger = std::make_shared<spdlog::logger>("access", std::move(sink));
  logger->set_pattern("%v");
  logger->flush_on(spdlog::level::info);
  return logger;
}

// A trace that begins here. Not sampled: nobody asked for it.
TraceContext NewTrace() {
  for (;;) {
    const auto trace = ParseTraceparent("00-" + RandomHexId() + "-" + RandomHexId().substr(0, 16) + "-00");
    if (trace) return *trace;  // all zero is no id
  }
}

double Milliseconds(double seconds) { return std::round(seconds * 1e6) / 1e3; }

}  // namespace

AccessLog::~AccessLog() = default;

absl::StatusOr<std::unique_ptr<AccessLog>> AccessLog::Open(const std::string& where) {
  const bool file = where != "stderr" && where != "off";
  std::unique_ptr<AccessLog> log(new AccessLog(file ? where : ""));
  if (where == "stderr" && spdlog::default_logger()->should_log(spdlog::level::info)) {
    log->logger_ = Plain(std::make_shared<spdlog::sinks::stderr_sink_mt>());
  }
  if (file) {
    TP_ASSIGN_OR_RETURN(log->logger_, log->OpenFile());
  }
  return log;
}

absl::StatusOr<std::shared_ptr<spdlog::logger>> AccessLog::OpenFile() const {
  // Made here where there is none: spdlog's own would be as the umask has it, and lines name tenants and
  // peers. What fails here fails below, with a message.
  std::error_code ignored;
  if (const auto parent = std::filesystem::path(path_).parent_path(); !parent.empty()) {
    std::filesystem::create_directories(parent, ignored);
  }
  if (const int fd = ::open(path_.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC | O_NONBLOCK, 0600);
      fd >= 0) {
    ::close(fd);
  }
  try {
    return Plain(std::make_shared<spdlog::sinks::basic_file_sink_mt>(path_));
  } catch (const spdlog::spdlog_ex& e) {
    return absl::InvalidArgumentError("gateway.access_log: " + std::string(e.what()));
  }
}

bool AccessLog::enabled() const {
  std::lock_guard lock(mu_);
  return logger_ != nullptr;
}

void AccessLog::Write(const std::string& line) {
  std::shared_ptr<spdlog::logger> logger;
  {
    std::lock_guard lock(mu_);
    logger = logger_;
  }
  if (logger) logger->info("{}", line);
}

absl::Status AccessLog::Reopen() {
  if (path_.empty()) return absl::OkStatus();
  TP_ASSIGN_OR_RETURN(auto logger, OpenFile());
  std::lock_guard lock(mu_);
  logger_ = std::move(logger);
  return absl::OkStatus();
}

AccessRecord::AccessRecord(Options options) : options_(std::move(options)), started_(Clock::Real().Now()) {
  if (const auto given = ParseTraceparent(options_.traceparent)) {
    trace_ = ChildOf(*given);
  } else {
    trace_ = NewTrace();
  }
}

AccessRecord::~AccessRecord() {
  if (options_.log != nullptr && options_.log->enabled()) options_.log->Write(Line());
}

std::shared_ptr<AccessRecord> AccessRecord::Of(const HttpRequest& request) {
  return std::dynamic_pointer_cast<AccessRecord>(request.observer);
}

void AccessRecord::SetTenant(const std::string& tenant) {
  std::lock_guard lock(mu_);
  tenant_ = tenant;
}

void AccessRecord::SetRequestId(std::string_view id) {
  std::lock_guard lock(mu_);
  request_id_ = std::string(id);
}

void AccessRecord::SetStatus(int status, std::string_view error) {
  std::lock_guard lock(mu_);
  status_ = status;
  error_ = error;
}

void AccessRecord::AddWork(const AccessWork& work) {
  std::lock_guard lock(mu_);
  if (!worked_) {
    worked_ = true;
    work_ = work;
    return;
  }
  work_.completion_tokens += work.completion_tokens;
  work_.attempts = std::max(work_.attempts, work.attempts);
  if (work_.error.empty()) work_.error = work.error;
}

void AccessRecord::OnHead(int status, HttpHeaders& headers) {
  std::string tenant;
  {
    std::lock_guard lock(mu_);
    status_ = status;
    tenant = tenant_;
    for (const auto& [name, value] : headers) {
      if (name == "X-Request-Id") request_id_ = value;
    }
  }
  // Whoever refused for now says when to come back; here for those who did not.
  const bool retryable = status == 429 || status == 503;
  if (retryable && std::ranges::none_of(headers, [](const auto& h) { return h.first == "Retry-After"; })) {
    headers.emplace_back("Retry-After", "1");
  }
  for (size_t i = 0, n = headers.size(); i < n; ++i) {
    uint32_t seconds = 0;
    // Beside Retry-After, OpenAI's clients read this one, and read it first.
    if (headers[i].first == "Retry-After" && absl::SimpleAtoi(headers[i].second, &seconds)) {
      headers.emplace_back("Retry-After-Ms", std::to_string(uint64_t{seconds} * 1000));
    }
  }
  headers.emplace_back("Traceparent", FormatTraceparent(trace_));
  if (options_.add_headers) options_.add_headers(headers);
  if (options_.add_tenant_headers && !tenant.empty()) options_.add_tenant_headers(tenant, headers);
}

void AccessRecord::OnBody(size_t bytes) {
  std::lock_guard lock(mu_);
  bytes_out_ += bytes;
}

std::string AccessRecord::Line() const {
  std::lock_guard lock(mu_);
  OrderedJson line;
  line["time"] = absl::FormatTime("%Y-%m-%dT%H:%M:%E3SZ", absl::Now(), absl::UTCTimeZone());
  line["event"] = "access";
  line["protocol"] = options_.protocol;
  line["peer"] = options_.peer;
  line["method"] = options_.method;
  line["path"] = options_.path.substr(0, kPathShown);
  line["status"] = status_;
  if (!error_.empty()) line["error"] = error_;
  line["request_id"] = request_id_;
  line["trace_id"] = trace_.TraceIdHex();
  line["tenant"] = tenant_;
  line["bytes_in"] = options_.bytes_in;
  line["bytes_out"] = bytes_out_;
  line["duration_ms"] = Milliseconds(absl::ToDoubleSeconds(Clock::Real().Now() - started_));
  if (worked_) {
    line["id"] = work_.id;
    line["model"] = work_.model;
    line["prompt_tokens"] = work_.prompt_tokens;
    line["cached_tokens"] = work_.cached_tokens;
    line["completion_tokens"] = work_.completion_tokens;
    line["attempts"] = work_.attempts;
    if (work_.error.empty()) {
      line["finish_reason"] = work_.finish_reason;
    } else if (error_.empty()) {
      line["error"] = work_.error;
    }
    if (!work_.prefill_worker.empty()) line["prefill_worker"] = work_.prefill_worker;
    if (!work_.decode_worker.empty()) line["decode_worker"] = work_.decode_worker;
    const std::pair<const char*, double> times[] = {
        {"ttft_ms", work_.ttft},       {"admit_ms", work_.admit},       {"queue_ms", work_.queue},
        {"prefill_ms", work_.prefill}, {"transfer_ms", work_.transfer}, {"decode_ms", work_.decode}};
    for (const auto& [name, seconds] : times) {
      if (seconds >= 0) line[name] = Milliseconds(seconds);
    }
  }
  return DumpJson(line);
}

}  // namespace tidepool
