#include "server/worker/prefill_call.h"

#include <algorithm>

#include "base/log.h"
#include "base/status.h"

namespace tidepool {

PrefillCall::PrefillCall(WorkerContext& context, const v1::PrefillRequest& request, const TraceContext& trace,
                         std::shared_ptr<Port> port, std::function<void()> on_end)
    : context_(context),
      request_(request),
      attempt_id_(AttemptId(request.request_id(), request.attempt())),
      log_name_(attempt_id_ + TraceNote(trace)),
      port_(std::move(port)),
      arrival_(context.clock->Now()),
      on_end_(std::move(on_end)),
      blocks_(context, RootKey(context.model->fingerprint, context.layout, request.salt()),
              {request.prompt().begin(), request.prompt().end()}) {}

absl::Status PrefillCall::Check() {
  TP_RETURN_IF_ERROR(CheckPrompt(*context_.model, blocks_.prompt(), 1));
  TP_RETURN_IF_ERROR(CheckSampling(*context_.model, request_.sampling()));
  if (request_.sampling().grammar().empty()) return absl::OkStatus();
  TP_ASSIGN_OR_RETURN(constraint_,
                      context_.constraints->Make(request_.sampling().grammar(), request_.salt()));
  request_.mutable_sampling()->clear_grammar();
  return absl::OkStatus();
}

void PrefillCall::Start() {
  spdlog::debug("{}: prefill of {} tokens", log_name_, request_.prompt_size());
  absl::Status status = Check();
  if (status.ok()) {
    status = context_.slots->Submit(
        attempt_id_, [self = shared_from_this()] { return self->TryReserve(); }, batch_class());
  }
  if (!status.ok()) {
    std::lock_guard lock(mu_);
    End(ToGrpc(status));
  }
}

bool PrefillCall::TryReserve() {
  std::unique_lock lock(mu_);
  if (phase_ != Phase::kWaiting) return true;
  if (!blocks_.TryReserve(static_cast<uint32_t>(request_.prompt_size()), /*reuse=*/true, batch_class())) {
    return false;
  }
  granted_ = context_.clock->Now();
  phase_ = Phase::kFetching;
  OfferCached();
  std::vector<PlannedFetch> planned = PlanFetches();
  if (planned.empty()) Submit();
  lock.unlock();  // a fetch that is refused ends on this thread
  for (PlannedFetch& fetch : planned) {
    context_.fetch->Fetch(std::move(fetch.spec),
                          [self = shared_from_this(), begin = fetch.begin](FetchResult result) {
                            self->OnFetched(begin, std::move(result));
                          });
  }
  return true;
}

void PrefillCall::OfferCached() {
  const uint32_t begin = request_.skip_blocks(), end = blocks_.published();
  if (begin >= end) return;
  for (uint32_t i = begin; i < end; ++i) {
    context_.fetch->Offer(attempt_id_, blocks_.keys()[i], blocks_.at(i).Clone());
  }
  v1::PrefillEvent event;
  event.mutable_offered()->set_begin(begin);
  event.mutable_offered()->set_end(end);
  port_->Write(std::move(event));
}

std::vector<PlannedFetch> PrefillCall::PlanFetches() {
  std::vector<PlannedFetch> planned;
  blocks_.ForEachHolderRange(request_.holders(), [&](const PeerAddress& peer, uint32_t begin, uint32_t end) {
    planned.push_back({begin, blocks_.StartFetch(attempt_id_, request_.attempt(), peer, begin, end)});
  });
  return planned;
}

void PrefillCall::OnFetched(uint32_t begin, FetchResult result) {
  std::lock_guard lock(mu_);
  if (phase_ == Phase::kEnded) return;  // the leases drop here: they are quiescent
  blocks_.EndFetch(begin, std::move(result));
  if (blocks_.fetches_pending() == 0) Submit();
}

void PrefillCall::Submit() {
  cached_tokens_ = blocks_.ready_tokens();
  context_.probe->peer_hit_tokens.Add(cached_tokens_ - size_t{blocks_.published()} * blocks_.block_tokens());
  phase_ = Phase::kEngine;
  SequenceGoal goal{.prefill_only = true};
  goal.constraint = std::move(constraint_);
  goal.batch_class = batch_class();
  goal.priority = EnginePriority(request_.priority());
  const absl::Status status =
      blocks_.Submit(attempt_id_, request_.sampling(), std::move(goal), shared_from_this());
  if (!status.ok()) End(ToGrpc(status));
}

void PrefillCall::OnBlockSealed(uint32_t index, const BlockKey& key, const BlockLease& lease) {
  std::lock_guard lock(mu_);
  if (phase_ == Phase::kEnded || index < request_.skip_blocks()) return;
  context_.fetch->Offer(attempt_id_, key, lease.Clone());
  v1::PrefillEvent event;
  event.mutable_offered()->set_begin(index);
  event.mutable_offered()->set_end(index + 1);
  port_->Write(std::move(event));
}

void PrefillCall::OnToken(OutputToken token) {
  std::lock_guard lock(mu_);
  first_token_ = std::move(token);
}

void PrefillCall::OnFinished(SequenceResult result) {
  std::lock_guard lock(mu_);
  context_.reporter->Prefilled(request_.request_id());
  if (phase_ == Phase::kEnded) return;
  if (result.reason != FinishReason::kPrefilled) {
    End(ToGrpc(result.status));
    return;
  }
  v1::PrefillEvent event;
  v1::PrefillEvent::Done& done = *event.mutable_done();
  if (blocks_.has_tail()) {
    context_.fetch->Offer(attempt_id_, blocks_.TailKey(), std::move(result.blocks[blocks_.keys().size()]));
    done.set_has_tail(true);
  }
  ToProto(first_token_, *done.mutable_first_token());
  done.set_cached_tokens(cached_tokens_);
  done.set_queue_seconds(absl::ToDoubleSeconds(granted_ - arrival_ + result.queue_time));
  done.set_prefill_seconds(absl::ToDoubleSeconds(result.prefill_time));
  done.set_pid(context_.self.pid());
  done.set_fetched_blocks(blocks_.fetched_blocks());
  done.set_fetched_bytes(blocks_.fetched_bytes());
  context_.probe->queue_seconds.Observe(done.queue_seconds());
  context_.probe->prefill_seconds.Observe(done.prefill_seconds());
  port_->Write(std::move(event));
  End(grpc::Status::OK);
}

void PrefillCall::Cancel() {
  // Not under mu_: SlotQueue holds its lock while it calls TryReserve.
  context_.slots->Cancel(attempt_id_);
  Phase was;
  {
    std::lock_guard lock(mu_);
    was = phase_;
    End(grpc::Status(grpc::StatusCode::CANCELLED, "the decode worker went away"));
  }
  if (was == Phase::kFetching) context_.fetch->Abort(attempt_id_, request_.attempt());
  if (was == Phase::kEngine) context_.engine->Cancel(attempt_id_);
  context_.fetch->ReleaseOffers(attempt_id_);
}

void PrefillCall::End(grpc::Status status) {
  if (phase_ == Phase::kEnded) return;
  phase_ = Phase::kEnded;
  if (status.error_code() == grpc::StatusCode::CANCELLED) {
    context_.probe->cancelled.Add();
  } else if (!status.ok()) {
    context_.probe->failed.Add();
    spdlog::warn("{}: prefill failed: {}", log_name_, status.error_message());
    context_.fetch->ReleaseOffers(attempt_id_);
  }
  blocks_.Drop();
  port_->Close(std::move(status));
  if (on_end_) std::exchange(on_end_, nullptr)();
}

}  // namespace tidepool
