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
      blocks_(context,
              RootKey(context.model->fingerprint, context.layout, request.salt(), context.config.kv.codec),
              {request.prompt().begin(), request.prompt().end()},
              {request.tenant(), request.session(), request.turn()}) {}

absl::Status PrefillCall::Check() {
  TP_RETURN_IF_ERROR(CheckPrompt(*context_.model, blocks_.prompt(), 1));
  TP_RETURN_IF_ERROR(CheckEmitted(blocks_.prompt(), request_.emitted_tokens(), UINT32_MAX));
  TP_RETURN_IF_ERROR(CheckSampling(*context_.model, request_.sampling()));
  if (request_.sampling().grammar().empty()) return absl::OkStatus();
  TP_ASSIGN_OR_RETURN(constraint_,
                      context_.constraints->Make(request_.sampling().grammar(), request_.salt()));
  TP_RETURN_IF_ERROR(AcceptEmitted(blocks_.prompt(), request_.emitted_tokens(), *constraint_));
  request_.mutable_sampling()->clear_grammar();
  return absl::OkStatus();
}

void PrefillCall::Start() {
  spdlog::debug("{}: prefill of {} tokens", log_name_, request_.prompt_size());
  absl::Status status = Check();
  if (status.ok()) {
    // It is short, and others wait for it elsewhere: it keeps its slots.
    status = context_.slots->Submit({.id = attempt_id_,
                                     .tenant = request_.tenant(),
                                     .batch_class = batch_class(),
                                     .priority = request_.priority(),
                                     .prompt_tokens = static_cast<uint32_t>(request_.prompt_size()),
                                     .attempt = [self = shared_from_this()] { return self->TryReserve(); }});
  }
  std::lock_guard lock(mu_);
  if (!status.ok()) return End(ToGrpc(status));
  place_.entered = true;
  // Cancelled before it got in.
  if (phase_ == Phase::kEnded && place_.Leave()) context_.slots->Released(attempt_id_);
}

SlotGrant PrefillCall::TryReserve() {
  std::unique_lock lock(mu_);
  if (phase_ != Phase::kWaiting) return {.granted = true};
  place_.entered = true;
  if (!blocks_.TryReserve(static_cast<uint32_t>(request_.prompt_size()), /*reuse=*/true, batch_class())) {
    return {.slots = blocks_.missing()};
  }
  const SlotGrant grant{.granted = true, .slots = blocks_.held()};
  granted_ = context_.clock->Now();
  phase_ = Phase::kFetching;
  OfferPublished(0, blocks_.published());
  const std::shared_ptr<BlockLoader> loader = loader_ =
      blocks_.MakeLoader(attempt_id_, request_.attempt(), request_.holders());
  if (!loader) Submit();
  lock.unlock();  // what can be had at once comes on this thread
  if (loader) {
    loader->Start(
        [self = shared_from_this()](BlockLoader::Result result) { self->OnLoaded(std::move(result)); });
  }
  return grant;
}

void PrefillCall::OfferPublished(uint32_t begin, uint32_t end) {
  begin = std::max(begin, request_.skip_blocks());
  if (begin >= end) return;
  for (uint32_t i = begin; i < end; ++i) {
    context_.fetch->Offer(attempt_id_, blocks_.keys()[i], blocks_.at(i).Clone(LeaseKind::kTransfer));
  }
  v1::PrefillEvent event;
  event.mutable_offered()->set_begin(begin);
  event.mutable_offered()->set_end(end);
  port_->Write(std::move(event));
}

void PrefillCall::OnLoaded(BlockLoader::Result result) {
  std::shared_ptr<BlockLoader> over;  // goes without the lock
  std::lock_guard lock(mu_);
  if (phase_ == Phase::kEnded) return;
  over = std::move(loader_);
  const uint32_t before = blocks_.published();
  blocks_.EndLoad(std::move(result));
  OfferPublished(before, blocks_.published());
  Submit();
}

void PrefillCall::Submit() {
  cached_tokens_ = blocks_.ready_tokens();
  phase_ = Phase::kEngine;
  SequenceGoal goal{.emitted_tokens = request_.emitted_tokens(),
                    .prefill_only = true,
                    .stream_layers = context_.config.transport.layer_streaming};
  goal.constraint = std::move(constraint_);
  goal.batch_class = batch_class();
  goal.priority = EnginePriority(request_.priority());
  const absl::Status status =
      blocks_.Submit(attempt_id_, request_.sampling(), std::move(goal), shared_from_this());
  if (!status.ok()) End(ToGrpc(status));
}

void PrefillCall::OnBlockSealed(uint32_t index, const BlockKey& key, const BlockLease& lease) {
  // Whoever computes a block stores it: it is on one disk, and others find it there.
  if (context_.store != nullptr) context_.store->Offer(key, lease);
  std::lock_guard lock(mu_);
  if (phase_ == Phase::kEnded || index < request_.skip_blocks() || (growing_ && index >= *growing_)) return;
  context_.fetch->Offer(attempt_id_, key, lease.Clone(LeaseKind::kTransfer));
  v1::PrefillEvent event;
  event.mutable_offered()->set_begin(index);
  event.mutable_offered()->set_end(index + 1);
  port_->Write(std::move(event));
}

void PrefillCall::OnLastChunk(uint32_t first, std::span<const BlockLease> blocks) {
  std::lock_guard lock(mu_);
  if (phase_ == Phase::kEnded) return;
  const auto sealed = static_cast<uint32_t>(blocks_.keys().size());
  const uint32_t begin = std::max(first, request_.skip_blocks());
  for (uint32_t i = begin; i < first + blocks.size(); ++i) {
    context_.fetch->Offer(attempt_id_, i < sealed ? blocks_.keys()[i] : blocks_.TailKey(),
                          blocks[i - first].Clone(LeaseKind::kTransfer), /*layers_ready=*/0);
  }
  growing_ = begin;
  v1::PrefillEvent event;
  event.mutable_offered()->set_begin(begin);
  event.mutable_offered()->set_end(sealed);
  event.mutable_offered()->set_growing(true);
  port_->Write(std::move(event));
}

void PrefillCall::OnLayersComputed(uint32_t layers) {
  std::lock_guard lock(mu_);
  if (phase_ == Phase::kEnded || !growing_) return;
  if (layers > 0) return context_.fetch->AdvanceOffer(attempt_id_, layers);
  context_.fetch->RevokeOffers(attempt_id_);
  growing_.reset();
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
  done.set_has_tail(blocks_.has_tail());
  if (blocks_.has_tail() && !growing_) {
    context_.fetch->Offer(attempt_id_, blocks_.TailKey(), std::move(result.blocks[blocks_.keys().size()]));
  }
  ToProto(first_token_, *done.mutable_first_token());
  done.set_cached_tokens(cached_tokens_);
  done.set_queue_seconds(absl::ToDoubleSeconds(granted_ - arrival_ + result.queue_time));
  done.set_prefill_seconds(absl::ToDoubleSeconds(result.prefill_time));
  done.set_pid(context_.self.pid());
  done.set_fetched_blocks(blocks_.fetched_blocks());
  done.set_fetched_bytes(blocks_.fetched_bytes());
  done.set_cached_remote_tokens(blocks_.loaded(LoadedFrom::kPeer) * blocks_.block_tokens());
  done.set_cached_disk_tokens((blocks_.loaded(LoadedFrom::kDisk) + blocks_.loaded(LoadedFrom::kPeerDisk)) *
                              blocks_.block_tokens());
  context_.probe->queue_seconds.Observe(done.queue_seconds());
  context_.probe->prefill_seconds.Observe(done.prefill_seconds());
  port_->Write(std::move(event));
  End(grpc::Status::OK);
}

void PrefillCall::Cancel() {
  bool leaves;
  {
    std::lock_guard lock(mu_);
    leaves = place_.Leave();
  }
  // Not under mu_: SlotQueue holds its lock while it calls TryReserve.
  if (leaves) context_.slots->Cancel(attempt_id_);
  Phase was;
  std::shared_ptr<BlockLoader> loader;
  {
    std::lock_guard lock(mu_);
    was = phase_;
    loader = std::move(loader_);
    End(grpc::Status(grpc::StatusCode::CANCELLED, "the decode worker went away"));
  }
  if (loader) loader->Cancel();
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
  if (place_.Leave()) context_.slots->Released(attempt_id_);
  port_->Close(std::move(status));
  if (on_end_) std::exchange(on_end_, nullptr)();
}

}  // namespace tidepool
