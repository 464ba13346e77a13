#include "server/batch/http_transport.h"

#include <algorithm>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "base/status.h"
#include "server/gateway/json.h"

namespace tidepool {
namespace {

constexpr uint64_t kReplyBytesMax = uint64_t{256} << 20;
constexpr size_t kQuotedBytesMax = 200;
constexpr std::string_view kVersionPath = "/v1";

std::string_view HeaderOf(const HttpHeaders& headers, std::string_view name) {
  const auto it = std::ranges::find(headers, name, &HttpHeaders::value_type::first);
  return it == headers.end() ? std::string_view() : std::string_view(it->second);
}

// `retry-after-ms` (OpenAI), Retry-After in seconds or as a date (RFC 9110, 10.2.3); zero: neither.
absl::Duration RetryAfterOf(const HttpHeaders& headers) {
  double number = 0;
  const std::string ms(HeaderOf(headers, "retry-after-ms")), text(HeaderOf(headers, "retry-after"));
  const auto within = [](absl::Duration d) { return std::clamp(d, absl::ZeroDuration(), absl::Hours(1)); };
  if (absl::SimpleAtod(ms, &number)) return within(absl::Milliseconds(number));
  if (absl::SimpleAtod(text, &number)) return within(absl::Seconds(number));
  absl::Time at;
  std::string error;
  if (absl::ParseTime("%a, %d %b %Y %H:%M:%S GMT", text, &at, &error)) return within(at - absl::Now());
  return absl::ZeroDuration();
}

// Collects one answer.
class Collector final : public HttpReplyHandler {
 public:
  explicit Collector(BatchTransport::Callbacks callbacks) : callbacks_(std::move(callbacks)) {}

  void OnHead(int status, HttpHeaders headers, absl::Time) override {
    reply_.http_status = status;
    reply_.request_id = std::string(HeaderOf(headers, "x-request-id"));
    reply_.retry_after = RetryAfterOf(headers);
  }
  void OnBody(std::string_view bytes, absl::Time) override { reply_.body.append(bytes); }
  void OnDone(absl::Status status, absl::Time) override {
    reply_.status = std::move(status);
    if (reply_.status.ok()) Normalise();
    callbacks_.done(std::move(reply_));
  }

 private:
  // The body becomes one line. What is no JSON is an answer only where it says that something failed.
  void Normalise() {
    const auto json = ParseJson(reply_.body);
    if (json.ok()) {
      reply_.body = DumpJson(*json);
    } else if (reply_.http_status / 100 != 2) {
      reply_.body = DumpJson(OrderedJson(reply_.body.substr(0, kQuotedBytesMax)));
    } else {
      reply_.status =
          absl::DataLossError(absl::StrCat("the answer is no JSON: ", std::string(json.status().message())));
    }
  }

  const BatchTransport::Callbacks callbacks_;
  BatchReply reply_;
};

class Call final : public BatchTransport::InFlight {
 public:
  explicit Call(std::weak_ptr<HttpClient::InFlight> call) : call_(std::move(call)) {}
  void Cancel() override {
    if (const auto call = call_.lock()) call->Cancel();
  }

 private:
  const std::weak_ptr<HttpClient::InFlight> call_;
};

HttpClient::Options ClientOptions(const HttpBatchTransport::Options& options) {
  HttpClient::Options client;
  client.reply_bytes_max = kReplyBytesMax;
  client.ca_file = options.ca_file;
  return client;
}

}  // namespace

absl::StatusOr<std::unique_ptr<HttpBatchTransport>> HttpBatchTransport::Create(Options options) {
  TP_ASSIGN_OR_RETURN(HttpUrl url, ParseHttpUrl(options.endpoint));
  if (url.path.ends_with(kVersionPath)) url.path.resize(url.path.size() - kVersionPath.size());
  return std::unique_ptr<HttpBatchTransport>(new HttpBatchTransport(std::move(options), std::move(url)));
}

HttpBatchTransport::HttpBatchTransport(Options options, HttpUrl url)
    : options_(std::move(options)), url_(std::move(url)), client_(ClientOptions(options_)) {}

HttpHeaders HttpBatchTransport::Headers() const {
  HttpHeaders headers{{"Content-Type", "application/json"}, {"Accept", "application/json"}};
  if (!options_.api_key.empty()) headers.emplace_back("Authorization", "Bearer " + options_.api_key);
  return headers;
}

absl::Status HttpBatchTransport::Check(absl::Duration timeout) {
  OutboundCall call;
  call.url = url_;
  call.target = url_.path + "/v1/models";
  call.headers = Headers();
  call.timeout = timeout;
  const auto reply = client_.Fetch(std::move(call));
  if (!reply.ok()) return Annotate(reply.status(), options_.endpoint);
  if (reply->status == 401 || reply->status == 403) {
    return absl::PermissionDeniedError(absl::StrCat(options_.endpoint, ": refuses the API key (HTTP ",
                                                    reply->status, "); see --api-key-env"));
  }
  return absl::OkStatus();
}

std::shared_ptr<BatchTransport::InFlight> HttpBatchTransport::Send(BatchCall call, Callbacks callbacks) {
  OutboundCall out;
  out.url = url_;
  out.method = "POST";
  out.target = url_.path + call.url;
  out.headers = Headers();
  out.body = std::move(call.body);
  out.timeout = options_.timeout;
  return std::make_shared<Call>(
      client_.Send(std::move(out), std::make_shared<Collector>(std::move(callbacks))));
}

}  // namespace tidepool
