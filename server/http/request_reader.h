#pragma once

#include <boost/beast/core/buffers_range.hpp>
#include <boost/beast/core/flat_buffer.hpp>
#include <boost/beast/http/parser.hpp>
#include <cstring>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "server/http/http_errors.h"
#include "server/http/http_server.h"

namespace tidepool {

// Routes that take uploads, by method and path.
using HttpUploads = std::map<std::pair<std::string, std::string>, HttpUpload>;

// RequestBody: a Body as Beast's parser wants one: into memory, or into a sink.
struct RequestBody {
  struct value_type {
    std::string text;
    std::shared_ptr<HttpBodySink> sink;
    bool refused = false;  // the sink wants no more; what still comes is dropped
  };
  class reader {
   public:
    template <bool kIsRequest, typename Fields>
    reader(boost::beast::http::header<kIsRequest, Fields>&, value_type& body) : body_(body) {}
    void init(const boost::optional<uint64_t>& length, boost::system::error_code& ec) {
      if (length && body_.sink == nullptr)
        body_.text.reserve(static_cast<size_t>(*length));  // within the limit
      ec = {};
    }
    template <typename Buffers>
    size_t put(const Buffers& buffers, boost::system::error_code& ec) {
      size_t bytes = 0;
      for (const boost::asio::const_buffer buffer : boost::beast::buffers_range_ref(buffers)) {
        const std::string_view part(static_cast<const char*>(buffer.data()), buffer.size());
        bytes += part.size();
        if (body_.sink == nullptr) {
          body_.text.append(part);
        } else if (!body_.refused) {
          body_.refused = !body_.sink->Write(part);
        }
      }
      ec = {};
      return bytes;
    }
    void finish(boost::system::error_code& ec) { ec = {}; }

   private:
    value_type& body_;
  };
};

// RequestReader: the bytes of one connection in, its requests out (Core: no socket, no clock). Beast's
// parser, with our limits and what it leaves to its users: smuggling, Host, targets in absolute form. Holds
// at most the body's limit, and what one read brought. After an error it holds nothing and takes nothing.
class RequestReader {
 public:
  // `uploads` and `body_wanted` are borrowed; null: none, and every body is.
  explicit RequestReader(const HttpLimits& limits, const HttpUploads* uploads = nullptr,
                         const HttpBodyWanted* body_wanted = nullptr)
      : limits_(limits), uploads_(uploads), body_wanted_(body_wanted) {}

  // Room for `bytes` more; after reading into it, Commit what came. Next and Take may run in between: a read
  // is pending while an answer goes out, so the room is apart from the bytes that they move.
  boost::asio::mutable_buffer Prepare(size_t bytes) {
    incoming_.resize(bytes);
    return {incoming_.data(), bytes};
  }
  void Commit(size_t bytes) {
    std::memcpy(buffer_.prepare(bytes).data(), incoming_.data(), bytes);
    buffer_.commit(bytes);
  }
  size_t unread() const { return buffer_.size(); }
  void DropUnread() { buffer_.consume(buffer_.size()); }
  // Nothing of a request has come since the last one.
  bool idle() const { return buffer_.size() == 0 && !parser_; }

  enum class Step {
    kMore,     // commit more bytes and ask again
    kHead,     // the head is there and fine; once a request, before kRequest
    kRequest,  // Take it
    kError,    // error(); the connection is of no more use
  };
  Step Next();

  // After kHead: the client waits for a 100 before it sends the body.
  bool wants_continue() const { return wants_continue_; }
  // After kHead: the body goes to a sink.
  bool uploading() const { return parser_ && parser_->get().body().sink != nullptr; }

  struct Taken {
    HttpRequest request;    // peer, param and observer are the caller's to fill
    bool bad_path = false;  // the path holds a malformed escape; request.path is empty
    bool keep_alive = false;
    bool http11 = true;
  };
  // After kRequest; the next one may begin.
  Taken Take();

  struct Error {
    HttpErrorKind kind;
    std::string message;
  };
  const Error& error() const { return error_; }

 private:
  using Parser = boost::beast::http::request_parser<RequestBody>;

  Step Fail(const HttpErrorKind& kind, std::string message);
  bool CheckHead();  // false: failed
  bool CheckFraming();
  bool CheckBody();
  void ReadHead();  // into head_ and bad_path_
  // The body is over, or nobody wants it.
  bool BodyDone() const { return parser_->is_done() || cut_ || parser_->get().body().refused; }

  const HttpLimits limits_;
  const HttpUploads* const uploads_;
  const HttpBodyWanted* const body_wanted_;
  std::vector<char> incoming_;
  boost::beast::flat_buffer buffer_;
  std::optional<Parser> parser_;
  bool head_done_ = false, wants_continue_ = false, failed_ = false;
  // Taken before the body comes: trailers, which the parser puts among the headers, are none.
  HttpRequest head_;
  bool bad_path_ = false;
  bool cut_ = false;       // the body is not taken
  uint64_t body_max_ = 0;  // of this request
  Error error_{http_errors::kBadHttp, ""};
};

}  // namespace tidepool
