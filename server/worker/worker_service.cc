#include "server/worker/worker_service.h"

#include "base/log.h"
#include "base/status.h"
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

WorkerService::WorkerService(WorkerContext& context, RoleChange& roles, SchedulerLocator& scheduler,
                             v1::DescribeReply description)
    : context_(context), roles_(roles), scheduler_(scheduler), description_(std::move(description)) {}

absl::Status WorkerService::Admit(const grpc::CallbackServerContext& rpc, bool role_fits,
                                  const char* what) const {
  if (absl::Status token = CheckClusterToken(rpc, context_.config.cluster.token); !token.ok()) return token;
  if (draining_) return absl::UnavailableError(context_.self.worker_id() + " is draining");
  if (!role_fits) {
    return absl::FailedPreconditionError(context_.self.worker_id() + " has role " +
                                         RoleText(roles_.Get().role) + " and does not " + what);
  }
  return absl::OkStatus();
}

template <typename Call, typename Event, typename Request>
grpc::ServerWriteReactor<Event>* WorkerService::StartCall(grpc::CallbackServerContext* rpc,
                                                          const Request* request,
                                                          void (*merge)(Event&, Event&&), uint32_t& active,
                                                          absl::Status admitted) {
  auto port = std::make_shared<StreamPort<Event>>();
  std::shared_ptr<Call> call;
  if (admitted.ok()) {
    {
      std::lock_guard lock(mu_);
      ++active;
    }
    call = std::make_shared<Call>(context_, *request, TraceOf(*rpc), port, [this, &active] {
      std::lock_guard lock(mu_);
      --active;
      if (active_.generate + active_.prefill == 0) idle_.notify_all();
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
  return StartCall<GenerateCall>(rpc, request, MergeGenerate, active_.generate,
                                 Admit(*rpc, roles_.TakesGenerate(context_.clock->Now()), "decode"));
}

grpc::ServerWriteReactor<v1::PrefillEvent>* WorkerService::Prefill(grpc::CallbackServerContext* rpc,
                                                                   const v1::PrefillRequest* request) {
  return StartCall<PrefillCall>(
      rpc, request, MergePrefill, active_.prefill,
      Admit(*rpc, roles_.TakesPrefill(context_.clock->Now()), "prefill for others"));
}

grpc::ServerUnaryReactor* WorkerService::Describe(grpc::CallbackServerContext* rpc,
                                                  const v1::DescribeRequest*, v1::DescribeReply* reply) {
  auto* reactor = rpc->DefaultReactor();
  const absl::Status token = CheckClusterToken(*rpc, context_.config.cluster.token);
  if (token.ok()) {
    *reply = description_;
    const RoleChange::State role = roles_.Get();
    reply->set_role(role.role);
    reply->set_next_role(role.next);
    *reply->mutable_address() = context_.self;
    FillCounts(*context_.pool, *context_.fetch, *reply);
    const EngineStats engine = context_.engine->stats();
    reply->set_running(engine.running);
    reply->set_waiting(engine.waiting + static_cast<uint32_t>(context_.slots->waiting()));
  }
  reactor->Finish(ToGrpc(token));
  return reactor;
}

grpc::ServerUnaryReactor* WorkerService::Drain(grpc::CallbackServerContext* rpc,
                                               const v1::DrainRequest* request, v1::DrainReply*) {
  auto* reactor = rpc->DefaultReactor();
  const absl::Status token = CheckClusterToken(*rpc, context_.config.cluster.token);
  if (token.ok()) {
    BeginDrain();
    if (request->end_process()) end_process_ = true;
  }
  reactor->Finish(ToGrpc(token));
  return reactor;
}

grpc::ServerUnaryReactor* WorkerService::SetRole(grpc::CallbackServerContext* rpc,
                                                 const v1::SetRoleRequest* request, v1::SetRoleReply* reply) {
  auto* reactor = rpc->DefaultReactor();
  const absl::Status status = [&]() -> absl::Status {
    TP_RETURN_IF_ERROR(CheckClusterToken(*rpc, context_.config.cluster.token));
    // A scheduler's orders say which term it leads; an operator's have none.
    if (const uint64_t term = SchedulerTermOf(*rpc); term != 0 && !scheduler_.Obey(term)) {
      return absl::FailedPreconditionError("the scheduler of term " + std::to_string(term) +
                                           " does not lead any more; another one gives orders now");
    }
    if (draining_)
      return absl::FailedPreconditionError(context_.self.worker_id() + " drains; it will not change");
    TP_ASSIGN_OR_RETURN(const RoleChange::State state, roles_.Order(request->role()));
    reply->set_role(state.role);
    reply->set_next_role(state.next);
    context_.reporter->Nudge();
    return absl::OkStatus();
  }();
  reactor->Finish(ToGrpc(status));
  return reactor;
}

void WorkerService::BeginDrain() {
  if (draining_.exchange(true)) return;
  spdlog::info("draining: {} requests in flight", active());
  context_.reporter->SetDraining();
}

RoleChange::Active WorkerService::active_by_kind() const {
  std::lock_guard lock(mu_);
  return active_;
}

uint32_t WorkerService::active() const {
  const RoleChange::Active active = active_by_kind();
  return active.generate + active.prefill;
}

bool WorkerService::WaitIdle(absl::Duration timeout) const {
  std::unique_lock lock(mu_);
  return idle_.wait_for(lock, absl::ToChronoNanoseconds(timeout),
                        [&] { return active_.generate + active_.prefill == 0; });
}

}  // namespace tidepool
