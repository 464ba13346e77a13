#include "server/http/exchange.h"

#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"

namespace tidepool {

std::string_view ReasonPhrase(int status) {
  switch (status) {
    case 200:
      return "OK";
    case 201:
      return "Created";
    case 204:
      return "No Content";
    case 400:
      return "Bad Request";
    case 401:
      return "Unauthorized";
    case 403:
      return "Forbidden";
    case 404:
      return "Not Found";
    case 405:
      return "Method Not Allowed";
    case 408:
      return "Request Timeout";
    case 409:
      return "Conflict";
    case 413:
      return "Content Too Large";
    case 414:
      return "URI Too Long";
    case 417:
      return "Expectation Failed";
    case 429:
      return "Too Many Requests";
    case 431:
      return "Request Header Fields Too Large";
    case 500:
      return "Internal Server Error";
    case 501:
      return "Not Implemented";
    case 503:
      return "Service Unavailable";
    case 504:
      return "Gateway Timeout";
    case 505:
      return "HTTP Version Not Supported";
  }
  return "Unknown";
}

std::string ResponseHead(int status, const HttpHeaders& headers, bool keep_alive, bool http11) {
  std::string out = absl::StrFormat("HTTP/1.1 %d %s\r\n", status, std::string(ReasonPhrase(status)));
  auto add = [&out](std::string_view name, std::string_view value) {
    out.append(name).append(": ");
    for (char c : value) out += (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) ? '_' : c;
    out += "\r\n";
  };
  add("Date", absl::FormatTime("%a, %d %b %Y %H:%M:%S GMT", absl::Now(), absl::UTCTimeZone()));
  if (!keep_alive) {
    add("Connection", "close");
  } else if (!http11) {
    add("Connection", "keep-alive");
  }
  for (const auto& [name, value] : headers) add(name, value);
  out += "\r\n";
  return out;
}

std::string HttpErrorBody(const HttpErrorKind& kind, std::string_view message) {
  nlohmann::ordered_json error;
  error["message"] = message;
  error["type"] = kind.status >= 500   ? "server_error"
                  : kind.status == 403 ? "permission_error"
                  : kind.status == 404 ? "not_found_error"
                                       : "invalid_request_error";
  error["param"] = nullptr;
  error["code"] = kind.code;
  return nlohmann::ordered_json{{"error", error}}.dump(-1, ' ', false,
                                                       nlohmann::ordered_json::error_handler_t::replace);
}

// Called with the lock held; releases it, so that the connection is never called under it.
void Exchange::Wake(std::unique_lock<std::mutex>& lock) {
  const bool wake = !woken_;
  woken_ = true;
  lock.unlock();
  if (wake) context_.wake();
}

void Exchange::Send(int status, HttpHeaders headers, std::string body) {
  if (context_.observer) {
    // Before the lock: an observer may look anywhere.
    {
      std::lock_guard lock(mu_);
      if (observed_ || answered_ || gone_) return;
      observed_ = true;
    }
    context_.observer->OnHead(status, headers);
    if (!context_.head) context_.observer->OnBody(body.size());
  }
  // RFC 9110 8.6: none with a 204.
  if (status != 204) headers.emplace_back("Content-Length", std::to_string(body.size()));
  std::string bytes = ResponseHead(status, headers, context_.keep_alive, context_.http11);
  if (!context_.head) bytes += body;
  std::function<void(DisconnectReason)> dropped;  // may own what must not die under the lock
  std::unique_lock lock(mu_);
  if (answered_ || gone_) return;
  answered_ = ended_ = true;
  unwritten_ += bytes.size();
  out_ = std::move(bytes);
  dropped = std::move(on_disconnect_);
  on_disconnect_ = nullptr;
  Wake(lock);
}

void Exchange::StartStream(int status, HttpHeaders headers) {
  if (context_.observer) {
    {
      std::lock_guard lock(mu_);
      if (observed_ || answered_ || gone_) return;
      observed_ = true;
    }
    context_.observer->OnHead(status, headers);
  }
  std::unique_lock lock(mu_);
  if (answered_ || gone_) return;
  answered_ = streaming_ = true;
  close_ = !context_.http11;
  if (!close_) headers.emplace_back("Transfer-Encoding", "chunked");
  out_ = ResponseHead(status, headers, context_.keep_alive && !close_, context_.http11);
  unwritten_ += out_.size();
  Wake(lock);
}

bool Exchange::Write(std::string_view bytes) {
  std::unique_lock lock(mu_);
  if (gone_ || !streaming_ || ended_) return false;
  if (bytes.empty() || context_.head) return true;
  if (unwritten_ + bytes.size() > context_.buffer_bytes_max) {
    lock.unlock();
    context_.cut(DisconnectReason::kSlowClient);
    return false;
  }
  const size_t before = out_.size();
  if (close_) {
    out_ += bytes;
  } else {
    absl::StrAppend(&out_, absl::Hex(bytes.size()), "\r\n");
    out_.append(bytes).append("\r\n");
  }
  unwritten_ += out_.size() - before;
  Wake(lock);
  if (context_.observer) context_.observer->OnBody(bytes.size());
  return true;
}

void Exchange::End() {
  std::function<void(DisconnectReason)> dropped;
  std::unique_lock lock(mu_);
  if (gone_ || !streaming_ || ended_) return;
  ended_ = true;
  if (!close_ && !context_.head) {
    out_ += "0\r\n\r\n";
    unwritten_ += 5;
  }
  dropped = std::move(on_disconnect_);
  on_disconnect_ = nullptr;
  Wake(lock);
}

void Exchange::Abort() {
  {
    std::lock_guard lock(mu_);
    if (gone_ || ended_) return;
  }
  context_.cut(DisconnectReason::kShutdown);
}

void Exchange::OnDisconnect(std::function<void(DisconnectReason)> callback) {
  std::unique_lock lock(mu_);
  if (ended_) return;
  if (!gone_) {
    on_disconnect_ = std::move(callback);
    return;
  }
  const DisconnectReason reason = reason_;
  lock.unlock();
  callback(reason);
}

void Exchange::Abandon() {
  bool unanswered, cut;
  {
    std::lock_guard lock(mu_);
    unanswered = !answered_ && !gone_;
    cut = answered_ && !ended_ && !gone_;
  }
  if (unanswered) {
    Send(500, {{"Content-Type", "application/json"}},
         HttpErrorBody(http_errors::kInternal, "the request was dropped without an answer"));
  } else if (cut) {
    context_.cut(DisconnectReason::kShutdown);
  }
}

bool Exchange::Take(std::string& bytes) {
  std::lock_guard lock(mu_);
  woken_ = false;
  bytes.swap(out_);
  return ended_;
}

void Exchange::Wrote(size_t bytes) {
  std::function<void()> ready;
  {
    std::lock_guard lock(mu_);
    unwritten_ -= std::min(unwritten_, bytes);
    if (unwritten_ > context_.buffer_bytes_max / 2) return;
    ready.swap(on_writable_);
  }
  if (ready) ready();
}

void Exchange::OnWritable(std::function<void()> ready) {
  {
    std::lock_guard lock(mu_);
    if (gone_ || ended_) return;
    if (unwritten_ > context_.buffer_bytes_max / 2) {
      on_writable_.swap(ready);
      return;  // an earlier one dies outside the lock
    }
  }
  ready();
}

void Exchange::Disconnect(DisconnectReason reason) {
  std::function<void(DisconnectReason)> callback;
  std::function<void()> writable;  // dies outside the lock
  {
    std::lock_guard lock(mu_);
    if (gone_) return;
    writable.swap(on_writable_);
    gone_ = true;
    reason_ = reason;
    out_.clear();
    if (ended_) return;
    callback = std::move(on_disconnect_);
    on_disconnect_ = nullptr;
  }
  if (callback) callback(reason);
}

}  // namespace tidepool
