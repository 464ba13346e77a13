#include "server/http/request_reader.h"

#include <boost/beast/http/error.hpp>
#include <utility>

#include "absl/strings/ascii.h"
#include "server/http/router.h"

namespace tidepool {
namespace {

namespace http = boost::beast::http;
using boost::system::error_code;

std::string_view View(boost::beast::string_view s) { return {s.data(), s.size()}; }

// Of "http://host:port/path" the authority, and the rest in `target`; empty where it has another form.
std::string_view TakeAuthority(std::string_view& target) {
  for (const std::string_view scheme : {"http://", "https://"}) {
    if (target.size() < scheme.size() ||
        !boost::beast::iequals({target.data(), scheme.size()}, {scheme.data(), scheme.size()}))
      continue;
    std::string_view rest = target.substr(scheme.size());
    const size_t end = std::min(rest.find_first_of("/?"), rest.size());
    target = rest.substr(end);
    return rest.substr(0, end);
  }
  return {};
}

}  // namespace

RequestReader::Step RequestReader::Fail(const HttpErrorKind& kind, std::string message) {
  failed_ = true;
  error_ = {kind, std::move(message)};
  parser_.reset();
  DropUnread();
  return Step::kError;
}

RequestReader::Step RequestReader::Next() {
  if (failed_) return Step::kError;
  for (;;) {
    if (head_done_ && BodyDone()) return Step::kRequest;
    if (buffer_.size() == 0) return Step::kMore;
    if (!parser_) {
      // Beast waits for a line end that a TLS handshake never sends.
      const char first = *static_cast<const char*>(buffer_.data().data());
      if (!absl::ascii_isalnum(static_cast<unsigned char>(first)) && first != '\r' && first != '\n') {
        return Fail(http_errors::kBadHttp, "this is no HTTP/1.1 request; the port speaks plain HTTP");
      }
      parser_.emplace();
      parser_->header_limit(static_cast<uint32_t>(limits_.header_bytes_max));
      parser_->body_limit(boost::none);  // which it is, depends on the head
      cut_ = false;
      parser_->eager(false);  // stop after the headers: they are judged before the body is read
    }
    error_code ec;
    const size_t used = parser_->put(buffer_.data(), ec);
    buffer_.consume(used);
    if (ec == http::error::need_more) {
      // Only headers and chunk headers pile up here.
      if (buffer_.size() > limits_.header_bytes_max) {
        if (head_done_) return Fail(http_errors::kBadHttp, "a chunk header is too long");
        return Fail(http_errors::kHeaderTooLarge,
                    "the request's headers exceed " + std::to_string(limits_.header_bytes_max) + " bytes");
      }
      if (used == 0) return Step::kMore;
      ec = {};
    }
    if (ec == http::error::header_limit) {
      return Fail(http_errors::kHeaderTooLarge,
                  "the request's headers exceed " + std::to_string(limits_.header_bytes_max) + " bytes");
    }
    if (ec == http::error::body_limit) {
      return Fail(http_errors::kTooLarge,
                  "the request's body exceeds " + std::to_string(body_max_) + " bytes; shorten the input");
    }
    if (ec) return Fail(http_errors::kBadHttp, "malformed HTTP request: " + ec.message());
    if (!head_done_ && parser_->is_header_done()) {
      if (!CheckHead()) return Step::kError;
      head_done_ = true;
      return Step::kHead;
    }
  }
}

bool RequestReader::CheckHead() {
  const auto& head = parser_->get();
  const auto fail = [this](const HttpErrorKind& kind, std::string message) {
    Fail(kind, std::move(message));
    return false;
  };
  if (head.version() != 10 && head.version() != 11) {
    return fail(http_errors::kBadVersion, "only HTTP/1.0 and HTTP/1.1 are spoken here");
  }
  if (head.target().size() > limits_.header_field_bytes_max) {
    return fail(http_errors::kUriTooLong,
                "the request target exceeds " + std::to_string(limits_.header_field_bytes_max) + " bytes");
  }
  size_t count = 0;
  for (const auto& field : head) {
    ++count;
    if (field.name_string().size() + field.value().size() > limits_.header_field_bytes_max) {
      return fail(http_errors::kHeaderTooLarge,
                  "a header exceeds " + std::to_string(limits_.header_field_bytes_max) + " bytes");
    }
  }
  if (count > limits_.header_count_max) {
    return fail(http_errors::kHeaderTooLarge,
                "more than " + std::to_string(limits_.header_count_max) + " headers");
  }
  if (!CheckFraming() || !CheckBody()) return false;
  wants_continue_ = false;
  if (auto it = head.find(http::field::expect); it != head.end()) {
    if (!boost::beast::iequals(it->value(), "100-continue")) {
      return fail(http_errors::kExpectation, "the only expectation met is 100-continue");
    }
    wants_continue_ = head.version() == 11 && !BodyDone();
  }
  return true;
}

// Two lengths, or a length and an encoding, are how requests are smuggled past proxies.
bool RequestReader::CheckFraming() {
  const auto& head = parser_->get();
  const auto fail = [this](std::string message) {
    Fail(http_errors::kBadHttp, std::move(message));
    return false;
  };
  if (head.count(http::field::content_length) > 1 ||
      (head.count(http::field::content_length) > 0 && head.count(http::field::transfer_encoding) > 0)) {
    return fail("Content-Length may be given once, and not with Transfer-Encoding");
  }
  if (const size_t encodings = head.count(http::field::transfer_encoding); encodings > 0) {
    if (encodings > 1 || !parser_->chunked() || head.version() == 10 ||
        !boost::beast::iequals(head[http::field::transfer_encoding], "chunked")) {
      return fail("the only Transfer-Encoding taken is chunked, in HTTP/1.1");
    }
  }
  const size_t hosts = head.count(http::field::host);
  if (hosts > 1 || (hosts == 0 && head.version() == 11)) {
    return fail("a request carries exactly one Host header");
  }
  return true;
}

// How large the body may be, and where it goes.
bool RequestReader::CheckBody() {
  const auto& head = parser_->get();
  body_max_ = limits_.body_bytes_max;
  const HttpUpload* upload = nullptr;
  if (uploads_ != nullptr && !uploads_->empty()) {
    std::string_view target = View(head.target());
    TakeAuthority(target);
    const auto it = uploads_->find(
        {std::string(View(head.method_string())), std::string(target.substr(0, target.find('?')))});
    if (it != uploads_->end()) upload = &it->second;
  }
  if (upload != nullptr) body_max_ = upload->body_bytes_max;
  if (const auto length = parser_->content_length(); length && *length > body_max_) {
    Fail(http_errors::kTooLarge,
         "the request's body exceeds " + std::to_string(body_max_) + " bytes; shorten the input");
    return false;
  }
  parser_->body_limit(body_max_);  // of what comes in chunks
  ReadHead();
  if (parser_->is_done()) return true;
  if (body_wanted_ != nullptr && *body_wanted_ && !(*body_wanted_)(head_)) {
    cut_ = true;
  } else if (upload != nullptr) {
    auto sink = upload->open(head_);
    cut_ = sink == nullptr;
    parser_->get().body().sink = std::move(sink);
  }
  return true;
}

RequestReader::Taken RequestReader::Take() {
  Taken taken;
  const bool cut = !parser_->is_done();
  auto message = parser_->release();
  parser_.reset();
  head_done_ = false;
  taken.request = std::exchange(head_, {});
  taken.bad_path = bad_path_;
  taken.request.body = std::move(message.body().text);
  taken.request.sink = std::move(message.body().sink);
  taken.keep_alive = message.keep_alive() && !cut;
  taken.http11 = message.version() == 11;
  return taken;
}

void RequestReader::ReadHead() {
  const auto& message = parser_->get();
  HttpRequest request;
  bad_path_ = false;
  request.method = std::string(View(message.method_string()));
  std::string_view target = View(message.target());
  const std::string_view authority = TakeAuthority(target);
  const size_t query = target.find('?');
  if (query != std::string_view::npos) request.query = std::string(target.substr(query + 1));
  std::string_view raw_path = target.substr(0, query);
  if (raw_path.empty()) raw_path = "/";
  if (auto path = PercentDecode(raw_path)) {
    request.path = *std::move(path);
  } else {
    bad_path_ = true;
  }
  for (const auto& field : message) {
    // RFC 9112 3.2.2: the target's authority takes Host's place.
    const bool host = field.name() == http::field::host && !authority.empty();
    request.headers.emplace_back(absl::AsciiStrToLower(std::string(View(field.name_string()))),
                                 std::string(host ? authority : View(field.value())));
  }
  head_ = std::move(request);
}

}  // namespace tidepool
