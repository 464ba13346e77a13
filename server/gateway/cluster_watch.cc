#include "server/gateway/cluster_watch.h"

#include "base/log.h"

namespace tidepool {
namespace {

// While nothing is known yet: a start is watched by people.
constexpr absl::Duration kStartInterval = absl::Milliseconds(50);
constexpr absl::Duration kPollTimeout = absl::Seconds(1);

}  // namespace

ClusterWatch::ClusterWatch(ChannelCache& channels, const SchedulerLocator& scheduler, std::string token,
                           absl::Duration interval, absl::Duration bridged, const Clock& clock)
    : channels_(channels),
      scheduler_(scheduler),
      token_(std::move(token)),
      interval_(interval),
      bridged_(bridged),
      clock_(clock) {
  auto first = std::make_shared<ClusterSnapshot>();
  first->error = "not asked yet";
  snapshot_ = std::move(first);
}

ClusterWatch::~ClusterWatch() { Stop(); }

void ClusterWatch::Start(std::function<void()> on_poll) {
  on_poll_ = std::move(on_poll);
  thread_ = std::thread([this] { Run(); });
}

void ClusterWatch::Stop() {
  {
    std::lock_guard lock(mu_);
    stop_ = true;
  }
  wake_.notify_all();
  if (thread_.joinable()) thread_.join();
}

std::shared_ptr<const ClusterSnapshot> ClusterWatch::Get() const {
  std::lock_guard lock(mu_);
  return snapshot_;
}

ReadyReport ClusterWatch::Report() const {
  std::shared_ptr<const ClusterSnapshot> s;
  bool bridged = false;
  {
    std::lock_guard lock(mu_);
    s = snapshot_;
    bridged = clock_.Now() < complete_at_ + bridged_;
  }
  ReadyReport report;
  if (bridged) {
    report.checks = {{"scheduler", ""}, {"model", ""}, {"decode", ""}, {"prefill", ""}};
    return report;
  }
  report.checks = {
      {"scheduler", s->error.empty() ? "" : "the scheduler does not answer: " + s->error},
      {"model", s->model ? "" : "no worker has registered a model yet"},
      {"decode", s->decoding > 0 ? "" : "no worker that decodes is ready"},
      {"prefill", s->prefilling > 0 ? "" : "no worker that prefills is ready"},
  };
  return report;
}

void ClusterWatch::Run() {
  std::unique_lock lock(mu_);
  while (!stop_) {
    lock.unlock();
    Poll();
    on_poll_();
    lock.lock();
    const bool known = snapshot_->complete();
    const absl::Duration wait = known ? interval_ : std::min(interval_, kStartInterval);
    wake_.wait_for(lock, absl::ToChronoNanoseconds(wait), [&] { return stop_; });
  }
}

void ClusterWatch::Poll() {
  grpc::ClientContext context;
  SetTimeout(context, kPollTimeout);
  AddClusterToken(context, token_);
  v1::ClusterReply reply;
  const SchedulerLocator::Place scheduler = scheduler_.Get();
  AddSchedulerTerm(context, scheduler.term);
  const grpc::Status status =
      scheduler.address.empty()
          ? grpc::Status(grpc::StatusCode::UNAVAILABLE, "none is known to lead")
          : v1::Scheduler::NewStub(channels_.Get(scheduler.address))->Cluster(&context, {}, &reply);
  auto next = std::make_shared<ClusterSnapshot>();
  const auto last = Get();
  if (!status.ok()) {
    next->model = last->model;
    next->error = status.error_message().empty() ? "no answer" : status.error_message();
    // gRPC's message names addresses: it is logged, and clients get our own words.
    if (last->error.empty()) spdlog::warn("the scheduler does not answer: {}", next->error);
    next->error = status.error_code() == grpc::StatusCode::UNAUTHENTICATED ? "it refused the cluster token"
                                                                           : "it cannot be reached";
  } else {
    // A scheduler that has just begun knows of no model for a moment.
    next->model = reply.model().fingerprint().empty() ? last->model : reply.model();
    for (const v1::WorkerView& worker : reply.workers()) {
      if (worker.state() != "ready") continue;
      if (worker.role() == v1::ROLE_DECODE || worker.role() == v1::ROLE_BOTH) {
        ++next->decoding;
        const uint64_t tokens = uint64_t{worker.slots_total()} * reply.model().block_tokens();
        if (next->decode_pool_tokens == 0 || tokens < next->decode_pool_tokens)
          next->decode_pool_tokens = tokens;
      }
      next->prefilling += worker.role() == v1::ROLE_PREFILL || worker.role() == v1::ROLE_BOTH;
    }
    if (next->decoding == 0) next->decode_pool_tokens = last->decode_pool_tokens;
    if (next->model && (!last->model || last->model->fingerprint() != next->model->fingerprint())) {
      spdlog::info("serving model {} (fingerprint {}), context {} tokens", next->model->name(),
                   next->model->fingerprint().substr(0, 12), next->model->max_model_len());
    }
    if (!last->error.empty()) spdlog::info("the scheduler answers");
  }
  std::lock_guard lock(mu_);
  snapshot_ = std::move(next);
  if (snapshot_->complete()) complete_at_ = clock_.Now();
}

}  // namespace tidepool
