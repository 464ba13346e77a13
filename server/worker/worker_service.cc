#include "server/worker/worker_service.h"

#include "base/log.h"
#include "server/worker/generate_call.h"
#include "server/worker/kv_node.h"
#include "server/worker/prefill_call.h"

namespace tidepool {
namespace {

void MergeGenerate(v1::WorkerGenerateEvent& pending, v1::WorkerGenerateEvent&& next) {
  for (auto& token : *next.mutable_tokens()) pending.add_tokens()->Swap(&token);
  for (auto& score : *next.mutable_prompt_logprobs()) pending.add_prompt_logprobs()->Swap(&score);
  if (next.has_path()) pending.mutable_path()->Swap(next.mutable_path());
  if (!next.finish_reason().empty()) {
    pending.set_finish_reason(next.finish_reason());
    pending.set_stop_token(next.stop_token());
    pending.mutable_embedding()->Swap(next.mutable_embedding());
  }
}

// Offers come in block order, so two of them are one range.
void MergePrefill(v1::PrefillEvent& pending, v1::PrefillEvent&& next) {
  if (next.has_offered()) {
    if (!pending.has_offered()) pending.mutable_offered()->set_begin(next.offered().begin());
    pending.mutable_offered()->set_end(next.offered().end());
    pending.mutable_offered()->set_growing(pending.offered().growing() || next.offered().growing());
  }
  if (next.has_done()) pending.mutable_done()->Swap(next.mutable_done());
}

}  // namespace

WorkerService::WorkerService(WorkerContext& context, v1::DescribeReply description)
    : context_(context), description_(std::move(description)) {}

absl::Status WorkerService::Admit(const grpc::CallbackServerContext& rpc, bool role_fits,
                                  const char* what) const {
  if (absl::Status token = CheckClusterToken(rpc, context_.config.cluster.token); !token.ok()) return token;
  if (draining_) return absl::UnavailableError(context_.self.worker_id() + " is draining");
  if (!role_fits) {
    return absl::FailedPreconditionError(context_.self.worker_id() + " has role " +
                                         context_.config.worker.role + " and does not " + what);
  }
  return absl::OkStatus();
}

template <typename Call, typename Event, typename Request>
grpc::ServerWriteReactor<Event>* WorkerService::StartCall(grpc::CallbackServerContext* rpc,
                                                          const Request* request,
                                                          void (*merge)(Event&, Event&&),
                                                          absl::Status admitted) {
  auto port = std::make_shared<StreamPort<Event>>();
  std::shared_ptr<Call> call;
  if (admitted.ok()) {
    {
      std::lock_guard lock(mu_);
      ++active_;
    }
    call = std::make_shared<Call>(context_, *request, TraceOf(*rpc), port, [this] {
      std::lock_guard lock(mu_);
      if (--active_ == 0) idle_.notify_all();
    });
  }
  auto* writer = new StreamWriter<Event>(
      merge,
      [call] {
        if (call) call->Cancel();
      },
      [port] { port->Detach(); });
  port->Attach(writer);
  if (call) {
    call->Start();
  } else {
    port->Close(ToGrpc(admitted));
  }
  return writer;
}

grpc::ServerWriteReactor<v1::WorkerGenerateEvent>* WorkerService::Generate(
    grpc::CallbackServerContext* rpc, const v1::WorkerGenerateRequest* request) {
  return StartCall<GenerateCall>(rpc, request, MergeGenerate,
                                 Admit(*rpc, description_.role() != v1::ROLE_PREFILL, "decode"));
}

grpc::ServerWriteReactor<v1::PrefillEvent>* WorkerService::Prefill(grpc::CallbackServerContext* rpc,
                                                                   const v1::PrefillRequest* request) {
  return StartCall<PrefillCall>(rpc, request, MergePrefill,
                                Admit(*rpc, description_.role() != v1::ROLE_DECODE, "prefill for others"));
}

grpc::ServerUnaryReactor* WorkerService::Describe(grpc::CallbackServerContext* rpc,
                                                  const v1::DescribeRequest*, v1::DescribeReply* reply) {
  auto* reactor = rpc->DefaultReactor();
  const absl::Status token = CheckClusterToken(*rpc, context_.config.cluster.token);
  if (token.ok()) {
    *reply = description_;
    *reply->mutable_address() = context_.self;
    FillCounts(*context_.pool, *context_.fetch, *reply);
    const EngineStats engine = context_.engine->stats();
    reply->set_running(engine.running);
    reply->set_waiting(engine.waiting + static_cast<uint32_t>(context_.slots->waiting()));
  }
  reactor->Finish(ToGrpc(token));
  return reactor;
}

grpc::ServerUnaryReactor* WorkerService::Drain(grpc::CallbackServerContext* rpc, const v1::DrainRequest*,
                                               v1::DrainReply*) {
  auto* reactor = rpc->DefaultReactor();
  const absl::Status token = CheckClusterToken(*rpc, context_.config.cluster.token);
  if (token.ok()) BeginDrain();
  reactor->Finish(ToGrpc(token));
  return reactor;
}

void WorkerService::BeginDrain() {
  if (draining_.exchange(true)) return;
  spdlog::info("draining: {} requests in flight", active());
  context_.reporter->SetDraining();
}

uint32_t WorkerService::active() const {
  std::lock_guard lock(mu_);
  return active_;
}

bool WorkerService::WaitIdle(absl::Duration timeout) const {
  std::unique_lock lock(mu_);
  return idle_.wait_for(lock, absl::ToChronoNanoseconds(timeout), [&] { return active_ == 0; });
}

}  // namespace tidepool
