#include "server/gateway/batches_transport.h"

#include <algorithm>
#include <mutex>
#include <optional>

#include "absl/strings/numbers.h"
#include "base/digest.h"
#include "server/gateway/errors.h"
#include "server/gateway/http_front.h"

namespace tidepool {
namespace {

// One line's answer, taken where HTTP's would go out.
class LineAnswer final : public ResponseWriter, public BatchTransport::InFlight {
 public:
  explicit LineAnswer(BatchTransport::Callbacks callbacks) : callbacks_(std::move(callbacks)) {}
  ~LineAnswer() override {
    Send(500, {}, ErrorBody(MakeError(errors::kInternal, "the request got no answer")));
  }

  void Ahead() {
    if (callbacks_.ahead) callbacks_.ahead();
  }

  void Send(int status, HttpHeaders headers, std::string body) override {
    BatchReply reply;
    {
      std::lock_guard lock(mu_);
      if (std::exchange(answered_, true)) return;
      on_disconnect_ = nullptr;
      if (cancelled_ && status / 100 != 2) reply.status = absl::CancelledError("cancelled");
    }
    reply.http_status = status;
    reply.body = std::move(body);
    for (const auto& [name, value] : headers) {
      int64_t seconds = 0;
      if (name == "X-Request-Id") reply.request_id = value;
      if (name == "Retry-After" && absl::SimpleAtoi(value, &seconds))
        reply.retry_after = absl::Seconds(seconds);
    }
    // A line of output is one line. Ours are; this holds the next one who writes them to it.
    std::erase(reply.body, '\n');
    callbacks_.done(std::move(reply));
  }
  // Lines that ask for a stream were refused when they were read.
  void StartStream(int, HttpHeaders) override {}
  bool Write(std::string_view) override { return false; }
  void End() override {}
  void Abort() override {}

  void OnDisconnect(std::function<void(DisconnectReason)> callback) override {
    {
      std::lock_guard lock(mu_);
      if (answered_) return;
      if (!cancelled_) {
        on_disconnect_ = std::move(callback);
        return;
      }
    }
    callback(DisconnectReason::kClientGone);
  }
  void Cancel() override {
    std::function<void(DisconnectReason)> callback;
    {
      std::lock_guard lock(mu_);
      if (answered_ || std::exchange(cancelled_, true)) return;
      callback = std::exchange(on_disconnect_, nullptr);
    }
    if (callback) callback(DisconnectReason::kClientGone);
  }

 private:
  const BatchTransport::Callbacks callbacks_;
  std::mutex mu_;
  bool answered_ = false, cancelled_ = false;
  std::function<void(DisconnectReason)> on_disconnect_;
};

// What a run holds of a line: the answer itself may go before.
class WeakCall final : public BatchTransport::InFlight {
 public:
  explicit WeakCall(std::weak_ptr<LineAnswer> answer) : answer_(std::move(answer)) {}
  void Cancel() override {
    if (const auto answer = answer_.lock()) answer->Cancel();
  }

 private:
  const std::weak_ptr<LineAnswer> answer_;
};

}  // namespace

std::shared_ptr<BatchTransport::InFlight> FrontTransport::Send(BatchCall call, Callbacks callbacks) {
  auto answer = std::make_shared<LineAnswer>(std::move(callbacks));
  auto flight = std::make_shared<WeakCall>(answer);
  HttpCall http;
  http.http.method = "POST";
  http.http.path = call.url;
  http.http.body = std::move(call.body);
  http.id = RandomHexId();
  http.tenant = tenant_;
  http.writer = answer;
  http.request_class = RequestClass::kBatch;
  http.on_first_token = [weak = std::weak_ptr<LineAnswer>(answer)] {
    if (const auto live = weak.lock()) live->Ahead();
  };
  front_->Serve(std::move(http));
  return flight;
}

}  // namespace tidepool
