#pragma once

#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>

#include "server/http/http_errors.h"
#include "server/http/http_server.h"

namespace tidepool {

// "HTTP/1.1 200 OK\r\n..." up to and with the empty line. Control characters in header values become '_', so
// that an echoed value cannot start a header of its own.
std::string ResponseHead(int status, const HttpHeaders& headers, bool keep_alive, bool http11);
std::string_view ReasonPhrase(int status);
// OpenAI's error body, for the errors that the server itself finds.
std::string HttpErrorBody(const HttpErrorKind& kind, std::string_view message);

// Exchange: one answer on its way from any thread to the connection's strand. Thread-safe. Memory is bounded:
// Write refuses beyond `buffer_bytes_max`; Send takes one body that exists anyway.
class Exchange {
 public:
  struct Context {
    bool keep_alive = true;
    bool http11 = true;
    bool head = false;  // answer to HEAD: no body
    size_t buffer_bytes_max = 0;
    std::shared_ptr<HttpObserver> observer;  // may be null
    // Asks the connection to call Take soon; callable from any thread, also after the connection is gone.
    std::function<void()> wake;
    // Asks the connection to cut itself.
    std::function<void(DisconnectReason)> cut;
  };
  explicit Exchange(Context context) : context_(std::move(context)) {}

  // The writer's side; see ResponseWriter.
  void Send(int status, HttpHeaders headers, std::string body);
  void StartStream(int status, HttpHeaders headers);
  bool Write(std::string_view bytes);
  void End();
  void Abort();
  void OnDisconnect(std::function<void(DisconnectReason)> callback);
  void OnWritable(std::function<void()> ready);
  // The writer was destroyed: whatever is missing becomes an error.
  void Abandon();

  // The connection's side.
  // Swaps `bytes`, empty, with what is to be written (two buffers serve a whole stream). True: nothing
  // follows.
  bool Take(std::string& bytes);
  void Wrote(size_t bytes);
  // Runs the callback, if the answer was not complete.
  void Disconnect(DisconnectReason reason);
  bool keep_alive() const { return context_.keep_alive && !close_; }

 private:
  void Wake(std::unique_lock<std::mutex>& lock);

  const Context context_;
  std::mutex mu_;
  std::string out_;
  size_t unwritten_ = 0;  // out_, and what the connection took and has not written
  bool answered_ = false, streaming_ = false, ended_ = false, gone_ = false, woken_ = false;
  bool observed_ = false;  // the observer was told of the head
  bool close_ = false;     // HTTP/1.0 stream: the end of the connection is the end of the body
  DisconnectReason reason_ = DisconnectReason::kClientGone;
  std::function<void(DisconnectReason)> on_disconnect_;
  std::function<void()> on_writable_;
};

// The handle given to handlers.
class ExchangeWriter final : public ResponseWriter {
 public:
  explicit ExchangeWriter(std::shared_ptr<Exchange> exchange) : exchange_(std::move(exchange)) {}
  ~ExchangeWriter() override { exchange_->Abandon(); }

  void Send(int status, HttpHeaders headers, std::string body) override {
    exchange_->Send(status, std::move(headers), std::move(body));
  }
  void StartStream(int status, HttpHeaders headers) override {
    exchange_->StartStream(status, std::move(headers));
  }
  bool Write(std::string_view bytes) override { return exchange_->Write(bytes); }
  void End() override { exchange_->End(); }
  void Abort() override { exchange_->Abort(); }
  void OnWritable(std::function<void()> ready) override { exchange_->OnWritable(std::move(ready)); }
  void OnDisconnect(std::function<void(DisconnectReason)> callback) override {
    exchange_->OnDisconnect(std::move(callback));
  }

 private:
  std::shared_ptr<Exchange> exchange_;
};

}  // namespace tidepool
