#include "server/scheduler/elastic_driver.h"

#include <algorithm>
#include <utility>

#include "base/log.h"
#include "server/cluster/scheduler_locator.h"
#include "tidepool/v1/cluster.grpc.pb.h"

namespace tidepool {
namespace {

constexpr absl::Duration kIntervalMax = absl::Seconds(1);
constexpr absl::Duration kIntervalMin = absl::Milliseconds(20);
// Of a worker's answer, which it gives at once.
constexpr absl::Duration kOrderTimeout = absl::Seconds(2);

Counter& Changes(MetricRegistry& m, const char* result) {
  return m.AddCounter("tidepool_scheduler_role_changes_total",
                      "Orders to workers to change between prefill and decode, by what they answered.",
                      {{"result", result}});
}

}  // namespace

ElasticDriver::ElasticDriver(ElasticityMode mode, absl::Duration dwell, std::string cluster_token, Look look,
                             MetricRegistry& metrics, const Clock& clock)
    : token_(std::move(cluster_token)),
      look_(std::move(look)),
      metrics_(metrics),
      clock_(clock),
      changed_(Changes(metrics, "taken")),
      refused_(Changes(metrics, "refused")),
      mode_(mode) {
  options_.dwell = dwell;
  last_.set_mode(std::string(ElasticityModeName(mode)));
  Export({});
}

ElasticDriver::~ElasticDriver() { Stop(); }

void ElasticDriver::Start() {
  thread_ = std::thread([this] { Run(); });
}

void ElasticDriver::Stop() {
  {
    std::lock_guard lock(mu_);
    stop_ = true;
    if (call_ != nullptr) call_->TryCancel();
  }
  wake_.notify_all();
  if (thread_.joinable()) thread_.join();
}

void ElasticDriver::Apply(ElasticityMode mode, absl::Duration dwell) {
  std::lock_guard lock(mu_);
  mode_ = mode;
  options_.dwell = dwell;
  if (core_) core_->SetOptions(options_);
  if (mode == ElasticityMode::kOff) Clear();
  last_.set_mode(std::string(ElasticityModeName(mode)));
}

void ElasticDriver::Clear() {
  core_.reset();
  last_.Clear();
  said_.clear();
  Export({});
}

v1::Elasticity ElasticDriver::Get() const {
  std::lock_guard lock(mu_);
  return last_;
}

// Several looks in a dwell, so that what they find is an average.
absl::Duration ElasticDriver::Interval() const {
  return std::clamp(options_.dwell / 10, kIntervalMin, kIntervalMax);
}

void ElasticDriver::Run() {
  std::unique_lock lock(mu_);
  while (!stop_) {
    if (mode_ != ElasticityMode::kOff) Once(lock);
    wake_.wait_for(lock, absl::ToChronoNanoseconds(Interval()), [&] { return stop_; });
  }
}

void ElasticDriver::Once(std::unique_lock<std::mutex>& lock) {
  lock.unlock();
  const std::optional<View> view = look_();
  lock.lock();
  if (stop_) return;
  if (!view || mode_ == ElasticityMode::kOff) return Clear();
  // Who leads a new term begins anew, and so waits for a dwell at least.
  if (!core_ || view->term != term_) {
    core_.emplace(options_);
    last_.Clear();
    term_ = view->term;
  }
  const ElasticityAdvice advice = core_->Tick(view->load, clock_.Now());
  Export(advice);
  if (advice.worker != said_ && !advice.worker.empty()) spdlog::info("{}", advice.reason);
  said_ = advice.worker;
  if (mode_ != ElasticityMode::kAct || advice.worker.empty()) return;
  const absl::Status taken = Order(advice.worker, advice.role, *view, lock);
  if (stop_) return;
  (taken.ok() ? changed_ : refused_).Add();
  if (core_) {  // else it was turned off meanwhile
    core_->OnOrdered(advice.worker, taken.ok(), clock_.Now());
    taken.ok() ? last_.set_flips(last_.flips() + 1) : last_.set_refused(last_.refused() + 1);
  }
  if (!taken.ok()) {
    spdlog::warn("worker {} did not change its role: {}", advice.worker, std::string(taken.message()));
  }
}

absl::Status ElasticDriver::Order(const std::string& worker, Role role, const View& view,
                                  std::unique_lock<std::mutex>& lock) {
  v1::SetRoleRequest request;
  request.set_role(static_cast<v1::Role>(role));
  v1::SetRoleReply reply;
  grpc::ClientContext call;
  AddClusterToken(call, token_);
  AddSchedulerTerm(call, view.term);
  SetTimeout(call, kOrderTimeout);
  call_ = &call;
  lock.unlock();
  const std::string address = view.grpc(worker);
  const absl::Status status =
      address.empty()
          ? absl::UnavailableError("it is gone")
          : FromGrpc(v1::Worker::NewStub(channels_.Get(address))->SetRole(&call, request, &reply));
  lock.lock();
  call_ = nullptr;
  return status;
}

void ElasticDriver::Export(const ElasticityAdvice& advice) {
  const auto gauge = [&](const char* name, const char* help, const char* role) -> Gauge& {
    return metrics_.AddGauge(name, help, {{"role", role}});
  };
  for (const bool prefill : {true, false}) {
    const char* role = prefill ? "prefill" : "decode";
    gauge("tidepool_scheduler_pressure_ratio",
          "What is asked of this kind of worker, as a share of what it can do within the objectives.", role)
        .Set(prefill ? advice.prefill_pressure : advice.decode_pressure);
    gauge("tidepool_scheduler_wanted_workers",
          "How many of the workers of one kind should be of this kind, by what is asked of them.", role)
        .Set(prefill ? advice.wanted_prefill : advice.wanted_decode);
  }
  last_.set_mode(std::string(ElasticityModeName(mode_)));
  last_.set_prefill(advice.prefill);
  last_.set_decode(advice.decode);
  last_.set_wanted_prefill(advice.wanted_prefill);
  last_.set_wanted_decode(advice.wanted_decode);
  last_.set_prefill_pressure(advice.prefill_pressure);
  last_.set_decode_pressure(advice.decode_pressure);
  last_.set_worker(advice.worker);
  last_.set_role(advice.worker.empty() ? v1::ROLE_UNSPECIFIED : static_cast<v1::Role>(advice.role));
  last_.set_reason(advice.reason);
}

}  // namespace tidepool
