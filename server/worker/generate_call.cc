#include "server/worker/generate_call.h"

#include <algorithm>

#include "base/log.h"
#include "base/status.h"
#include "kvstore/fetch_codec.h"
#include "server/worker/prefill_client.h"

namespace tidepool {
namespace {

// Room that an answer gets at least beyond what it has: it may be longer than most.
constexpr uint32_t kReserveMin = 64;

}  // namespace

GenerateCall::GenerateCall(WorkerContext& context, const v1::WorkerGenerateRequest& request,
                           const TraceContext& trace, std::shared_ptr<Port> port,
                           std::function<void()> on_end)
    : context_(context),
      request_(request),
      attempt_id_(AttemptId(request.request_id(), request.attempt())),
      trace_(trace),
      log_name_(attempt_id_ + TraceNote(trace)),
      port_(std::move(port)),
      arrival_(context.clock->Now()),
      on_end_(std::move(on_end)),
      blocks_(std::make_unique<RequestBlocks>(
          context,
          RootKey(context.model->fingerprint, context.layout, request.salt(), context.config.kv.codec),
          std::vector<int32_t>(request.prompt().begin(), request.prompt().end()),
          BlockOwner{request.tenant(), request.session(), request.turn()})) {
  path_.set_decode_worker(context_.self.worker_id());
  path_.set_decode_pid(context_.self.pid());
  path_.set_prompt_tokens(static_cast<uint32_t>(request_.prompt_size()));
}

absl::Status GenerateCall::Check() {
  TP_RETURN_IF_ERROR(CheckEmitted(blocks_->prompt(), request_.emitted_tokens(), request_.max_tokens()));
  TP_RETURN_IF_ERROR(
      CheckPrompt(*context_.model, blocks_->prompt(), request_.max_tokens() - request_.emitted_tokens()));
  if (request_.emitted_tokens() > 0 && (pooled() || request_.has_prompt_logprobs())) {
    return absl::InvalidArgumentError("emitted_tokens goes with neither pooling nor prompt_logprobs");
  }
  if (pooled() != (request_.max_tokens() == 0)) {
    return absl::InvalidArgumentError(pooled() ? "max_tokens must be 0 with pooling: there is no answer"
                                               : "max_tokens must be at least 1");
  }
  if (request_.pooling() > v1::POOLING_MEAN || request_.pooling() < 0) {
    return absl::InvalidArgumentError("pooling is " + std::to_string(request_.pooling()) +
                                      ", which this worker does not know");
  }
  if (pooled() && (request_.has_prompt_logprobs() || !request_.sampling().grammar().empty())) {
    return absl::InvalidArgumentError("pooling goes with neither prompt_logprobs nor a grammar");
  }
  if (!pooled()) TP_RETURN_IF_ERROR(CheckSampling(*context_.model, request_.sampling()));
  if (request_.prompt_logprobs() > kTopLogprobsMax) {
    return absl::InvalidArgumentError("prompt_logprobs is " + std::to_string(request_.prompt_logprobs()) +
                                      "; it may be at most " + std::to_string(kTopLogprobsMax));
  }
  const uint32_t blocks = (tokens_max() + blocks_->block_tokens() - 1) / blocks_->block_tokens();
  if (blocks > context_.pool->stats().slots) {
    return absl::InvalidArgumentError(
        "the request needs " + std::to_string(blocks) + " KV blocks, the worker has " +
        std::to_string(context_.pool->stats().slots) + "; lower max_tokens or raise kv.host_bytes");
  }
  if (!request_.sampling().grammar().empty()) {
    TP_ASSIGN_OR_RETURN(constraint_,
                        context_.constraints->Make(request_.sampling().grammar(), request_.salt()));
    TP_RETURN_IF_ERROR(AcceptEmitted(blocks_->prompt(), request_.emitted_tokens(), *constraint_));
  }
  return absl::OkStatus();
}

void GenerateCall::Start() {
  spdlog::debug("{}: {} prompt tokens, at most {} more", log_name_, request_.prompt_size(),
                request_.max_tokens());
  absl::Status status = Check();
  if (status.ok()) {
    SlotQueue::Request slots{.id = attempt_id_,
                             .tenant = request_.tenant(),
                             .batch_class = batch_class(),
                             .priority = request_.priority(),
                             .prompt_tokens = static_cast<uint32_t>(request_.prompt_size()),
                             .attempt = [self = shared_from_this()] { return self->TryReserve(); }};
    if (preemptible()) {
      slots.preempt = [self = shared_from_this()] { return self->Preempt(); };
      slots.may_preempt = [self = shared_from_this()] { return self->MayPreempt(); };
      slots.swap_out = [self = shared_from_this()] { return self->SwapOut(); };
    }
    slots.outputs = [self = shared_from_this()] { return self->outputs_.load(std::memory_order_relaxed); };
    status = context_.slots->Submit(std::move(slots));
  }
  std::lock_guard lock(mu_);
  if (!status.ok()) return End(ToGrpc(status));
  place_.entered = true;
  // Cancelled before it got in.
  if (phase_ == Phase::kEnded && place_.Leave()) context_.slots->Released(attempt_id_);
}

uint32_t GenerateCall::tokens_to_reserve() const {
  // Who had to give way twice gets all that it may need: it is not stopped by its own growth again.
  if (!preemptible() || context_.config.engine.preemption == "off" || preemptions_ > 1) return tokens_max();
  const std::optional<uint32_t> high = context_.lengths->High(request_.tenant());
  if (!high) return tokens_max();
  const uint32_t outputs = request_.emitted_tokens() + outputs_.load(std::memory_order_relaxed);
  const uint32_t more = std::max(*high - std::min(*high, outputs), kReserveMin);
  return std::min(tokens_max(), static_cast<uint32_t>(blocks_->prompt().size()) + more);
}

SlotGrant GenerateCall::TryReserve() {
  std::unique_lock lock(mu_);
  if (phase_ != Phase::kWaiting) return {.granted = true};
  place_.entered = true;
  // What is to be known of every token of the prompt is nowhere but here, and computed: nothing is reused.
  const bool whole = request_.has_prompt_logprobs() || request_.pooling() == v1::POOLING_MEAN;
  if (!blocks_->TryReserve(tokens_to_reserve(), !whole, batch_class())) {
    return {.slots = blocks_->missing()};
  }
  const SlotGrant grant{.granted = true, .slots = blocks_->held()};
  phase_ = Phase::kFetching;
  if (preempted_) {
    // Of what is left it has leases now.
    preempted_->DropKept();
    auto holders = request_.holders();
    if (remote_) {
      // Whoever computed the prompt may have it still: what was read there is not here.
      v1::PrefixHolder& holder = *holders.Add();
      *holder.mutable_worker() = request_.prefill();
      holder.set_end(static_cast<uint32_t>(request_.prompt_size()) / blocks_->block_tokens());
      holder.set_tier(v1::KV_TIER_HOST);
    }
    loader_ = blocks_->MakeLoader(attempt_id_, request_.attempt(), holders);
  } else {
    BeginFetching(whole);
  }
  MaybeSubmit();
  const std::shared_ptr<BlockLoader> loader = loader_;
  lock.unlock();  // what can be had at once comes on this thread
  if (loader) {
    loader->Start(
        [self = shared_from_this()](BlockLoader::Result result) { self->OnLoaded(std::move(result)); });
  }
  return grant;
}

void GenerateCall::BeginFetching(bool whole) {
  granted_ = context_.clock->Now();
  path_.set_cached_tokens(blocks_->published() * blocks_->block_tokens());
  const bool here = request_.prefill().worker_id().empty() ||
                    request_.prefill().worker_id() == context_.self.worker_id() ||
                    blocks_->published() == blocks_->reusable() || pooled() ||
                    // Nothing is to be drawn: nothing to prefill for.
                    (constraint_ && constraint_->MustEnd()) ||
                    (!pooled() && request_.emitted_tokens() == request_.max_tokens());
  if (!whole && here) loader_ = blocks_->MakeLoader(attempt_id_, request_.attempt(), request_.holders());
  if (!whole && !here) StartRemotePrefill();
  request_.mutable_sampling()->clear_grammar();
}

bool GenerateCall::MayPreempt() {
  std::lock_guard lock(mu_);
  return phase_ == Phase::kEngine;
}

bool GenerateCall::Preempt() { return context_.engine->Preempt(attempt_id_); }

void GenerateCall::OnPreempted(std::unique_ptr<PreemptedSequence> sequence) {
  {
    std::lock_guard lock(mu_);
    if (phase_ == Phase::kEnded) return;  // all that was kept goes
    phase_ = Phase::kWaiting;
    ++preemptions_;
    preempted_ = std::move(sequence);
  }
  context_.slots->Preempted(attempt_id_);
}

double GenerateCall::SwapOut() {
  std::lock_guard lock(mu_);
  if (!preempted_) return 0;
  const absl::Time begin = context_.clock->Now();
  preempted_->SaveTail();
  const absl::Duration took = context_.clock->Now() - begin;
  // What it goes on behind: the next slots are for that, and looked for by those names.
  const std::vector<int32_t>& tokens = preempted_->tokens();
  blocks_ = std::make_unique<RequestBlocks>(
      context_, blocks_->root(), tokens, BlockOwner{request_.tenant(), request_.session(), request_.turn()},
      /*resumed=*/true);
  const double token_seconds = context_.prefill_seconds ? context_.prefill_seconds(1, tokens.size()) : 0;
  return token_seconds > 0 ? absl::ToDoubleSeconds(took) / token_seconds : 0;
}

void GenerateCall::StartRemotePrefill() {
  v1::PrefillRequest request;
  request.set_request_id(request_.request_id());
  request.set_attempt(request_.attempt());
  request.set_tenant(request_.tenant());
  request.set_salt(request_.salt());
  *request.mutable_prompt() = request_.prompt();
  *request.mutable_sampling() = request_.sampling();
  *request.mutable_holders() = request_.holders();
  request.set_skip_blocks(blocks_->published());
  request.set_request_class(request_.request_class());
  request.set_priority(request_.priority());
  request.set_session(request_.session());
  request.set_turn(request_.turn());
  request.set_emitted_tokens(request_.emitted_tokens());
  remote_ = true;
  prefill_running_ = true;
  next_offer_ = blocks_->published();
  path_.set_prefill_worker(request_.prefill().worker_id());
  path_.set_prefill_pid(request_.prefill().pid());
  prefill_context_ = PrefillClient::Start(
      *context_.channels, request_.prefill().grpc(), context_.config.cluster.token, trace_,
      context_.config.worker.prefill_timeout, std::move(request),
      [self = shared_from_this()](const v1::PrefillEvent& event) { self->OnPrefillEvent(event); },
      [self = shared_from_this()](const absl::Status& status) { self->OnPrefillEnd(status); });
}

void GenerateCall::OnPrefillEvent(const v1::PrefillEvent& event) {
  std::unique_lock lock(mu_);
  if (phase_ != Phase::kFetching) return;
  const auto sealed = static_cast<uint32_t>(blocks_->keys().size());
  if (event.has_offered()) {
    // A peer's numbers: what is not the next run of this prompt's blocks is not fetched, hence computed here.
    const bool growing = event.offered().growing() && event.offered().end() == sealed;
    const uint32_t end = std::min(event.offered().end(), sealed) + (growing && blocks_->has_tail() ? 1 : 0);
    if (event.offered().begin() <= next_offer_ && end > next_offer_) {
      const uint32_t begin = std::exchange(next_offer_, end);
      PlanFetch(begin, end, growing);
    }
  }
  if (event.has_done()) {
    done_ = event.done();
    prefill_done_ = context_.clock->Now();
    path_.set_prefill_pid(event.done().pid());
    if (event.done().has_tail() && blocks_->has_tail() && next_offer_ == sealed) {
      PlanFetch(sealed, sealed + 1, /*growing=*/false);
    }
  }
  StartPlannedFetches(lock);
}

void GenerateCall::OnPrefillEnd(const absl::Status& status) {
  std::lock_guard lock(mu_);
  prefill_running_ = false;
  prefill_context_.reset();
  if (phase_ != Phase::kFetching) {
    // Cancelled meanwhile: what was offered after the first RELEASE would be held until its lease ends.
    ReleasePeer();
    return;
  }
  if (!status.ok() || !done_) {
    done_.reset();
    context_.probe->fallback_prefill.Add();
    spdlog::warn("{}: prefill on {} failed ({}); computing it here", log_name_,
                 request_.prefill().worker_id(), std::string(status.message()));
  }
  MaybeSubmit();
}

void GenerateCall::PlanFetch(uint32_t begin, uint32_t end, bool growing) {
  for (; begin < end; begin += std::min<uint32_t>(end - begin, kMaxFetchKeys)) {
    planned_.push_back(blocks_->StartFetch(attempt_id_, request_.attempt(), ToPeerAddress(request_.prefill()),
                                           begin, std::min<uint32_t>(end, begin + kMaxFetchKeys), growing));
  }
}

void GenerateCall::StartPlannedFetches(std::unique_lock<std::mutex>& lock) {
  std::vector<PlannedFetch> planned = std::exchange(planned_, {});
  lock.unlock();  // a fetch that is refused ends on this thread
  for (PlannedFetch& fetch : planned) {
    FetchSpec spec = std::move(fetch.spec);
    context_.fetch->Fetch(
        std::move(spec),
        [self = shared_from_this(), fetch = std::make_shared<PlannedFetch>(std::move(fetch))](
            FetchResult result) { self->OnFetched(*fetch, std::move(result)); });
  }
  if (planned.empty()) return;
  // Cancelled since the lock was let go: an abort that came before the fetches did not end them.
  lock.lock();
  const bool ended = phase_ == Phase::kEnded;
  lock.unlock();
  if (ended) context_.fetch->Abort(attempt_id_, request_.attempt());
}

void GenerateCall::OnFetched(const PlannedFetch& fetch, FetchResult result) {
  std::lock_guard lock(mu_);
  if (phase_ == Phase::kEnded) return;  // the leases drop here: they are quiescent
  const absl::Status status = result.status;
  if (!blocks_->EndFetch(fetch, std::move(result))) {
    spdlog::warn("{}: blocks from {} on were not fetched ({}); computing them here", log_name_, fetch.begin,
                 status.ok() ? "evicted meanwhile" : std::string(status.message()));
  }
  MaybeSubmit();
}

void GenerateCall::OnLoaded(BlockLoader::Result result) {
  std::shared_ptr<BlockLoader> over;  // goes without the lock
  std::lock_guard lock(mu_);
  if (phase_ == Phase::kEnded) return;
  over = std::move(loader_);
  blocks_->EndLoad(std::move(result));
  MaybeSubmit();
}

void GenerateCall::MaybeSubmit() {
  if (phase_ != Phase::kFetching || prefill_running_ || loader_ || blocks_->fetches_pending() > 0) return;
  Submit();
}

void GenerateCall::Resume() {
  first_computed_ = blocks_->ready_tokens() / blocks_->block_tokens();
  phase_ = Phase::kEngine;
  const uint32_t keep_until = preempted_->outputs() + SlotCore::Progress(preemptions_);
  const absl::Status status = blocks_->Resume(preempted_, keep_until);
  if (status.ok()) return;
  if (!preempted_) return End(ToGrpc(status));
  // A load has spoilt one of its slots, and there is no other now.
  phase_ = Phase::kWaiting;
  context_.slots->Preempted(attempt_id_);
}

void GenerateCall::Submit() {
  if (preempted_) return Resume();
  const absl::Time now = context_.clock->Now();
  ReleasePeer();
  SequenceGoal goal{.max_tokens = request_.max_tokens(), .emitted_tokens = request_.emitted_tokens()};
  if (request_.has_prompt_logprobs()) goal.prompt_logprobs = static_cast<int32_t>(request_.prompt_logprobs());
  if (pooled()) {
    goal.pooling = request_.pooling() == v1::POOLING_MEAN ? SequencePooling::kMean : SequencePooling::kLast;
  }
  goal.normalize = request_.normalize();
  goal.constraint = std::move(constraint_);
  goal.batch_class = batch_class();
  goal.priority = EnginePriority(request_.priority());
  goal.preemptible = preemptible();
  if (done_ && blocks_->complete()) {
    goal.first_token = FromProto(done_->first_token());
    first_computed_ = static_cast<uint32_t>(blocks_->keys().size());
    path_.set_cached_tokens(done_->cached_tokens());
    path_.set_cached_remote_tokens(done_->cached_remote_tokens());
    path_.set_cached_disk_tokens(done_->cached_disk_tokens());
    path_.set_queue_seconds(done_->queue_seconds());
    path_.set_prefill_seconds(done_->prefill_seconds());
    path_.set_transfer_seconds(absl::ToDoubleSeconds(now - prefill_done_));
    context_.probe->transfer_seconds.Observe(path_.transfer_seconds());
  } else {
    first_computed_ = blocks_->ready_tokens() / blocks_->block_tokens();
  }
  if (!remote_) {
    path_.set_cached_tokens(blocks_->ready_tokens());
    path_.set_cached_remote_tokens(blocks_->loaded(LoadedFrom::kPeer) * blocks_->block_tokens());
    path_.set_cached_disk_tokens(
        (blocks_->loaded(LoadedFrom::kDisk) + blocks_->loaded(LoadedFrom::kPeerDisk)) *
        blocks_->block_tokens());
    path_.set_prefill_worker(context_.self.worker_id());
    path_.set_prefill_pid(context_.self.pid());
  }
  path_.set_fetched_blocks(blocks_->fetched_blocks());
  path_.set_fetched_bytes(blocks_->fetched_bytes());
  if (blocks_->fetched_blocks() > 0) {
    const std::string_view how = blocks_->transport();
    path_.set_transport(std::string(how.empty() ? context_.fetch->transport_name() : how));
  }
  phase_ = Phase::kEngine;
  const absl::Status status =
      blocks_->Submit(attempt_id_, request_.sampling(), std::move(goal), shared_from_this());
  if (!status.ok()) End(ToGrpc(status));
}

void GenerateCall::OnBlockSealed(uint32_t index, const BlockKey& key, const BlockLease& lease) {
  // Submit has set it, and its mutex has passed through the engine's since. What a prefill worker computed is
  // its own to store.
  if (context_.store != nullptr && index >= first_computed_) context_.store->Offer(key, lease);
}

void GenerateCall::OnPromptLogprobs(std::vector<PromptLogprob> scores) {
  v1::WorkerGenerateEvent event;
  for (const PromptLogprob& score : scores) ToProto(score, *event.add_prompt_logprobs());
  std::lock_guard lock(mu_);
  if (phase_ != Phase::kEnded) port_->Write(std::move(event));
}

void GenerateCall::OnToken(OutputToken token) {
  v1::WorkerGenerateEvent event;
  ToProto(token, *event.add_tokens());
  outputs_.store(token.index + 1 - request_.emitted_tokens(), std::memory_order_relaxed);
  std::lock_guard lock(mu_);
  if (phase_ == Phase::kEnded) return;
  if (token.index == request_.emitted_tokens()) {
    first_token_ = context_.clock->Now();
    *event.mutable_path() = path_;
    context_.reporter->Prefilled(request_.request_id());
  }
  port_->Write(std::move(event));
}

void GenerateCall::OnFinished(SequenceResult result) {
  std::lock_guard lock(mu_);
  if (phase_ == Phase::kEnded) return;
  context_.reporter->Nudge();
  if (result.reason != FinishReason::kStop && result.reason != FinishReason::kLength &&
      result.reason != FinishReason::kPooled) {
    End(ToGrpc(result.status));
    return;
  }
  if (first_token_ == absl::Time()) context_.reporter->Prefilled(request_.request_id());  // there was none
  // One that was cut counts, too, or tenants with long answers would be taken for ones with short answers.
  if (result.reason == FinishReason::kStop || result.reason == FinishReason::kLength)
    context_.lengths->Observe(request_.tenant(), result.output_tokens);
  if (!done_) {
    path_.set_queue_seconds(absl::ToDoubleSeconds(granted_ - arrival_ + result.queue_time));
    path_.set_prefill_seconds(absl::ToDoubleSeconds(result.prefill_time));
    context_.probe->queue_seconds.Observe(path_.queue_seconds());
    context_.probe->prefill_seconds.Observe(path_.prefill_seconds());
  }
  if (first_token_ != absl::Time()) {
    context_.probe->decode_seconds.Observe(absl::ToDoubleSeconds(context_.clock->Now() - first_token_));
  }
  v1::WorkerGenerateEvent event;
  event.set_finish_reason(std::string(FinishReasonName(result.reason)));
  event.set_stop_token(result.stop_token);
  event.mutable_embedding()->Add(result.pooled.begin(), result.pooled.end());
  *event.mutable_path() = path_;
  port_->Write(std::move(event));
  End(grpc::Status::OK);
}

void GenerateCall::Cancel() {
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
    if (was == Phase::kEnded) return;
    loader = std::move(loader_);
    if (prefill_context_) prefill_context_->TryCancel();
    ReleasePeer();
    End(grpc::Status(grpc::StatusCode::CANCELLED, "the caller went away"));
  }
  if (loader) loader->Cancel();
  if (was == Phase::kFetching && !loader) context_.fetch->Abort(attempt_id_, request_.attempt());
  if (was == Phase::kEngine) context_.engine->Cancel(attempt_id_);
}

void GenerateCall::End(grpc::Status status) {
  if (phase_ == Phase::kEnded) return;
  phase_ = Phase::kEnded;
  if (status.error_code() == grpc::StatusCode::CANCELLED) {
    context_.probe->cancelled.Add();
  } else if (!status.ok()) {
    context_.probe->failed.Add();
    spdlog::warn("{}: failed: {}", log_name_, status.error_message());
  }
  blocks_->Drop();
  preempted_.reset();
  if (place_.Leave()) context_.slots->Released(attempt_id_);
  context_.reporter->Ended(request_.request_id());
  port_->Close(std::move(status));
  if (on_end_) std::exchange(on_end_, nullptr)();
}

void GenerateCall::ReleasePeer() {
  if (remote_) context_.fetch->SendRelease(ToPeerAddress(request_.prefill()), attempt_id_);
}

}  // namespace tidepool
