#include "transport/rate_limit.h"

#include <algorithm>
#include <deque>
#include <string>
#include <thread>
#include <utility>

#include "absl/container/flat_hash_set.h"
#include "base/status.h"

namespace tidepool {
namespace {

constexpr size_t kMaxControlBytes = 4 << 20;
constexpr size_t kMaxQueuedBulks = 4096;
// What an idle link may catch up on: a driver that wakes up late by a scheduler's tick loses nothing.
constexpr absl::Duration kBurst = absl::Milliseconds(1);
// Below poll's resolution; short enough that what arrives meanwhile hardly waits.
constexpr absl::Duration kNap = absl::Microseconds(50);

class RateLimitedTransport final : public Transport, private TransportHandler {
 public:
  RateLimitedTransport(std::unique_ptr<Transport> inner, uint64_t bytes_per_second, const Clock* clock,
                       MetricRegistry* metrics)
      : inner_(std::move(inner)),
        rate_(static_cast<double>(bytes_per_second)),
        clock_(clock),
        own_(metrics == nullptr ? std::make_unique<MetricRegistry>() : nullptr),
        delayed_((metrics == nullptr ? own_.get() : metrics)
                     ->AddCounter("tidepool_transport_rate_limited_bytes_total",
                                  "Bytes that waited for transport.max_bytes_per_second.")),
        waiting_((metrics == nullptr ? own_.get() : metrics)
                     ->AddGauge("tidepool_transport_rate_limit_queue_bytes",
                                "Bytes that wait for transport.max_bytes_per_second.")) {
    inner_->SetHandler(this);
  }

  void SetHandler(TransportHandler* handler) override { handler_ = handler; }
  std::string Address() const override { return inner_->Address(); }
  std::string_view Name() const override { return inner_->Name(); }
  absl::StatusOr<EndpointId> Connect(std::string_view address) override {
    auto id = inner_->Connect(address);
    if (id.ok()) live_.insert(*id);
    return id;
  }
  absl::Status Send(EndpointId to, std::string_view message) override;
  absl::Status SendBulk(EndpointId to, std::string_view header, std::span<const std::byte> payload,
                        std::function<void(absl::Status)> done) override;
  void Close(EndpointId endpoint, std::function<void()> quiesced) override;
  void ShareMemory(int fd, std::span<const std::byte> memory) override { inner_->ShareMemory(fd, memory); }
  int Progress() override;
  void Wait(int timeout_ms) override;
  void Wake() override { inner_->Wake(); }

 private:
  struct Item {
    EndpointId to;
    std::string text;  // a message, or a bulk's header
    bool bulk = false;
    std::span<const std::byte> payload;
    std::function<void(absl::Status)> done;
    size_t bytes() const { return text.size() + payload.size(); }
  };

  void OnMessage(EndpointId from, std::string_view message) override {
    live_.insert(from);
    handler_->OnMessage(from, message);
  }
  BulkSink OnBulk(EndpointId from, std::string_view header, size_t length) override {
    live_.insert(from);
    return handler_->OnBulk(from, header, length);
  }
  void OnEndpointDown(EndpointId endpoint, absl::Status why) override {
    live_.erase(endpoint);
    Discard(endpoint, why);
    handler_->OnEndpointDown(endpoint, std::move(why));
  }

  // Takes what waits for `endpoint` out; its `done`s run in the next Progress.
  void Discard(EndpointId endpoint, const absl::Status& why);
  void Enqueue(std::deque<Item>& queue, Item item);
  void Start(absl::Time now);
  bool Release(absl::Time now);

  std::unique_ptr<Transport> inner_;
  const double rate_;
  const Clock* clock_;
  std::unique_ptr<MetricRegistry> own_;
  Counter& delayed_;
  Gauge& waiting_;
  TransportHandler* handler_ = nullptr;
  std::deque<Item> control_, bulk_;
  size_t control_bytes_ = 0;
  absl::flat_hash_set<EndpointId> live_;  // neither down nor closed: what sending to them may wait for
  // What is on the link now (its endpoint may have closed meanwhile: then nothing), and until when.
  bool busy_ = false;
  Item current_;
  absl::Time busy_until_;
  std::deque<std::function<void()>> events_;
};

void RateLimitedTransport::Enqueue(std::deque<Item>& queue, Item item) {
  delayed_.Add(item.bytes());
  waiting_.Add(static_cast<double>(item.bytes()));
  queue.push_back(std::move(item));
  if (!busy_) Start(clock_->Now());
}

absl::Status RateLimitedTransport::Send(EndpointId to, std::string_view message) {
  // inner says what is wrong.
  if (message.size() > kMaxMessageBytes || !live_.contains(to)) return inner_->Send(to, message);
  if (control_bytes_ + message.size() > kMaxControlBytes) {
    return absl::ResourceExhaustedError("4 MiB of control messages wait for transport.max_bytes_per_second");
  }
  control_bytes_ += message.size();
  Enqueue(control_, Item{.to = to, .text = std::string(message)});
  return absl::OkStatus();
}

absl::Status RateLimitedTransport::SendBulk(EndpointId to, std::string_view header,
                                            std::span<const std::byte> payload,
                                            std::function<void(absl::Status)> done) {
  if (header.size() > 512) return absl::InvalidArgumentError("bulk header exceeds 512 bytes");
  if (!live_.contains(to)) return inner_->SendBulk(to, header, payload, std::move(done));
  if (bulk_.size() >= kMaxQueuedBulks) {
    return absl::ResourceExhaustedError("4096 bulk transfers wait for transport.max_bytes_per_second");
  }
  Enqueue(bulk_, Item{to, std::string(header), true, payload, std::move(done)});
  return absl::OkStatus();
}

void RateLimitedTransport::Start(absl::Time now) {
  std::deque<Item>& queue = control_.empty() ? bulk_ : control_;
  busy_ = !queue.empty();
  if (!busy_) return;
  current_ = std::move(queue.front());
  queue.pop_front();
  if (!current_.bulk) control_bytes_ -= current_.text.size();
  const absl::Time from = std::max(busy_until_, now - kBurst);
  busy_until_ = from + absl::Seconds(static_cast<double>(current_.bytes()) / rate_);
}

bool RateLimitedTransport::Release(absl::Time now) {
  if (!busy_ || now < busy_until_) return false;
  Item item = std::move(current_);
  waiting_.Add(-static_cast<double>(item.bytes()));
  Start(now);
  if (item.to == 0) return true;  // its endpoint closed while it was on the link
  if (!item.bulk) {
    // Should the endpoint be down meanwhile, its OnEndpointDown says so; a lost message is the layer above's.
    (void)inner_->Send(item.to, item.text);
    return true;
  }
  auto done = item.done;
  if (absl::Status s = inner_->SendBulk(item.to, item.text, item.payload, std::move(item.done)); !s.ok()) {
    events_.push_back([done = std::move(done), s = std::move(s)] { done(s); });
  }
  return true;
}

void RateLimitedTransport::Discard(EndpointId endpoint, const absl::Status& why) {
  const auto drop = [&](Item& item) {
    if (item.bulk) events_.push_back([done = std::move(item.done), why] { done(why); });
  };
  for (std::deque<Item>* queue : {&control_, &bulk_}) {
    std::deque<Item> kept;
    for (Item& item : *queue) {
      if (item.to != endpoint) {
        kept.push_back(std::move(item));
        continue;
      }
      waiting_.Add(-static_cast<double>(item.bytes()));
      if (!item.bulk) control_bytes_ -= item.text.size();
      drop(item);
    }
    *queue = std::move(kept);
  }
  if (busy_ && current_.to == endpoint) {
    drop(current_);
    waiting_.Add(-static_cast<double>(current_.bytes()));
    current_ = Item{};
  }
}

void RateLimitedTransport::Close(EndpointId endpoint, std::function<void()> quiesced) {
  live_.erase(endpoint);
  Discard(endpoint, absl::CancelledError("the endpoint was closed"));
  // Behind the events above.
  inner_->Close(endpoint, [this, quiesced = std::move(quiesced)] { events_.push_back(std::move(quiesced)); });
}

int RateLimitedTransport::Progress() {
  int handled = 0;
  const absl::Time now = clock_->Now();
  // Bounded, as inner's rounds are.
  while (handled < 64 && Release(now)) ++handled;
  for (size_t n = events_.size(); n > 0; --n) {
    auto event = std::move(events_.front());
    events_.pop_front();
    event();
    ++handled;
  }
  return handled + inner_->Progress();
}

void RateLimitedTransport::Wait(int timeout_ms) {
  if (!events_.empty()) return;
  if (!busy_) return inner_->Wait(timeout_ms);
  const absl::Duration left = busy_until_ - clock_->Now();
  if (left <= absl::ZeroDuration()) return;
  const int64_t whole_ms = absl::ToInt64Milliseconds(left);
  if (whole_ms > 0) return inner_->Wait(static_cast<int>(std::min<int64_t>(timeout_ms, whole_ms)));
  std::this_thread::sleep_for(absl::ToChronoNanoseconds(std::min(left, kNap)));
}

}  // namespace

std::unique_ptr<Transport> LimitRate(std::unique_ptr<Transport> inner, uint64_t bytes_per_second,
                                     const Clock* clock, MetricRegistry* metrics) {
  if (bytes_per_second == 0) return inner;
  return std::make_unique<RateLimitedTransport>(std::move(inner), bytes_per_second, clock, metrics);
}

}  // namespace tidepool
