#include "scheduler/core.h"

#include <algorithm>
#include <charconv>
#include <tuple>
#include <utility>

#include "base/status.h"
#include "scheduler/admission.h"

namespace tidepool {

namespace {

// What a typical request is like follows so many of the last ones.
constexpr uint64_t kTypicalOf = 256;

// Every decision says why: without the cost of a printf.
void AppendFixed(std::string& to, double v, int digits) {
  char buf[64];
  const auto end = std::to_chars(buf, buf + sizeof buf, v, std::chars_format::fixed, digits);
  to.append(buf, end.ec == std::errc() ? end.ptr : buf);
}
void AppendNumber(std::string& to, uint64_t v) {
  char buf[24];
  to.append(buf, std::to_chars(buf, buf + sizeof buf, v).ptr);
}
void AppendSeconds(std::string& to, double s) {
  AppendFixed(to, s < 1 ? s * 1e3 : s, s < 1 ? 1 : 2);
  to += s < 1 ? " ms" : " s";
}

}  // namespace

SchedulerCore::SchedulerCore(const SchedulerOptions& options, const ReplicationOptions& replication,
                             std::unique_ptr<LengthPredictor> lengths)
    : options_(options),
      view_(options_),
      replication_(replication),
      lengths_(lengths ? std::move(lengths)
                       : std::make_unique<LengthQuantiles>(options.expected_output_tokens)),
      policy_(options.seed),
      fair_(options.fair_quantum_tokens) {}

void SchedulerCore::SetOptions(const SchedulerOptions& options, const ReplicationOptions& replication) {
  options_ = options;
  view_.SetOptions(options);
  replication_.SetOptions(replication);
}

ReportResult SchedulerCore::Report(WorkerReport report, absl::Time now) {
  const std::string id = report.address.worker_id;
  ReportResult result = view_.Report(std::move(report), now);
  // Its place in the tables may have been another's.
  if (result.registered) fair_.Forget(view_.IndexOf(id));
  RecordEnded();
  return result;
}

bool SchedulerCore::AdmitDecode(const std::string& request_id, absl::Time now) {
  const Booking* b = view_.FindBooking(request_id);
  if (options_.admission != AdmissionPolicy::kAtStage || b == nullptr) return true;
  const double itl = DecodeStepNow(view_, options_, *view_.worker(b->decode), b->prompt_tokens, b);
  if (itl <= absl::ToDoubleSeconds(b->slo_itl)) return true;
  if (RequestRecord* record = Open(*b); record != nullptr) {
    record->outcome = "rejected_decode";
    record->rejection_kind = "itl";
  }
  if (b->slo_class != SloClass::kBatch) {  // see Count
    const Worker& w = *view_.worker(b->decode);
    counts_.refused_decode += uint64_t{w.load.running} + w.load.waiting > 0 || w.decoding.size() > 1 ? 1 : 0;
    --counts_.placed;
  }
  view_.Finish(request_id, now);
  return false;
}

bool SchedulerCore::Finish(const std::string& request_id, absl::Time now, const FinishInfo& info) {
  const std::optional<Booking> b = view_.Finish(request_id, now);
  if (!b) return false;
  if (info.completed && !info.cut && info.output_tokens > 0)
    lengths_->Observe(b->tenant, b->route, info.output_tokens);
  if (options_.fairness == FairnessPolicy::kD2lpm) {
    // A prefill that never came to its end is given back: as far as is known, nobody computed it.
    if (!info.completed && !b->decode_began_at && info.output_tokens == 0)
      fair_.Charge(b->tenant, b->prefill, -static_cast<double>(b->uncached_tokens), now);
    fair_.Charge(b->tenant, b->decode, info.output_tokens, now);
  }
  if (RequestRecord* record = Open(*b); record != nullptr) {
    record->outcome = info.completed ? "done" : "failed";
    record->actual = info;
  }
  return true;
}

std::vector<std::string> SchedulerCore::Tick(absl::Time now) {
  std::vector<std::string> lost = view_.Tick(now);
  for (const std::string& id : lost) fair_.Forget(view_.IndexOf(id));
  RecordEnded();
  return lost;
}

RequestRecord& SchedulerCore::NewRecord() {
  if (records_.size() < std::max<size_t>(options_.max_records, 1)) {
    ++recorded_;
    return records_.emplace_back();
  }
  return records_[recorded_++ % records_.size()] = RequestRecord();
}

RequestRecord* SchedulerCore::Open(const Booking& b) {
  // Only the last max_records exist, and one of them may be another request's by now.
  if (records_.empty() || b.record + records_.size() < recorded_) return nullptr;
  return &records_[b.record % records_.size()];
}

void SchedulerCore::RecordEnded() {
  for (const Booking& b : view_.TakeEnded()) {
    if (RequestRecord* record = Open(b); record != nullptr) record->outcome = "lost";
  }
}

std::vector<RequestRecord> SchedulerCore::RecentRequests(size_t max) const {
  std::vector<RequestRecord> out;
  for (uint64_t i = 0; i < std::min(max, records_.size()); ++i)
    out.push_back(records_[(recorded_ - 1 - i) % records_.size()]);
  return out;
}

std::optional<RequestRecord> SchedulerCore::FindRequest(std::string_view request_id) const {
  for (uint64_t i = 0; i < records_.size(); ++i) {
    const RequestRecord& record = records_[(recorded_ - 1 - i) % records_.size()];
    if (record.request_id == request_id) return record;
  }
  return std::nullopt;
}

absl::Status SchedulerCore::CheckRequest(const PlaceRequest& r) const {
  if (r.request_id.empty()) return absl::InvalidArgumentError("place: request_id is empty");
  if (r.prompt_tokens == 0) return absl::InvalidArgumentError("place: prompt_tokens must be at least 1");
  if (!view_.model()) return absl::OkStatus();
  const ModelIdentity& m = *view_.model();
  if (r.prompt_tokens > m.max_model_len)
    return absl::InvalidArgumentError("place: prompt_tokens is " + std::to_string(r.prompt_tokens) +
                                      ", the model takes at most " + std::to_string(m.max_model_len));
  const uint32_t sealed = r.prompt_tokens / m.layout.block_tokens;
  if (r.keys.size() > sealed)
    return absl::InvalidArgumentError("place: " + std::to_string(r.keys.size()) + " keys for a prompt of " +
                                      std::to_string(sealed) + " sealed blocks");
  return absl::OkStatus();
}

PlacementInput SchedulerCore::InputFor(const PlaceRequest& request) const {
  PlacementInput input{.length = lengths_->Predict(request), .typical = typical_};
  if (options_.fairness == FairnessPolicy::kD2lpm) input.deficits = fair_.Of(request.tenant);
  return input;
}

PlaceResult SchedulerCore::Decide(const PlaceRequest& request, const PlacementInput& input,
                                  PolicyState& policy, absl::Time now, Evaluation& evaluation) const {
  PlaceResult out;
  out.status = CheckRequest(request);
  if (!out.status.ok()) return out;
  out.rejection = JudgeInflight(view_, options_, request);
  if (!out.rejection) {
    evaluation = Evaluate(view_, options_, request, input, policy, now);
    out.status = evaluation.status;
    if (!out.status.ok()) return out;
    out.rejection = JudgePlan(view_, options_, request, *evaluation.best, now);
  }
  if (out.rejection) {
    out.status = absl::ResourceExhaustedError(out.rejection->reason);
  } else {
    out.placement = Describe(*evaluation.best);
  }
  return out;
}

void SchedulerCore::Count(const PlaceResult& result, const Evaluation& evaluation,
                          const PlaceRequest& request) {
  if (!evaluation.best || !view_.model()) return;
  // Batch work takes what is left: it asks for no more workers.
  if (request.slo_class == SloClass::kBatch) return;
  const std::string_view kind = result.rejection ? result.rejection->kind : "";
  const PrefillOption& prefill = evaluation.best->prefill;
  const Worker& decode = *view_.worker(evaluation.best->decode.worker);
  // What an idle worker would refuse, too, more of them would refuse as well.
  if (kind == "ttft" && prefill.queue_seconds <= 0) return;
  if (kind == "itl" && decode.requests() == 0 && decode.decoding.empty()) return;
  counts_.placed += kind.empty() ? 1 : 0;
  counts_.refused_prefill += kind == "ttft" ? 1 : 0;
  counts_.refused_decode += kind == "itl" || kind == "memory" ? 1 : 0;
  const uint32_t cached = prefill.cached_blocks * view_.model()->layout.block_tokens;
  // The others are prefilled where they decode, however many prefill workers there are.
  if (view_.worker(prefill.worker)->role != Role::kBoth &&
      request.prompt_tokens - std::min(request.prompt_tokens, cached) > options_.local_prefill_tokens)
    (kind.empty() ? counts_.prefill_seconds : counts_.refused_prefill_seconds) += prefill.compute_seconds;
}

ElasticityLoad SchedulerCore::Elasticity(absl::Time now) const {
  ElasticityLoad out;
  out.decisions = counts_;
  // Those that most requests have: of the standard class.
  const auto seconds = [](absl::Duration slo) {
    return slo == absl::InfiniteDuration() ? 0 : absl::ToDoubleSeconds(slo);
  };
  out.slo_ttft_seconds = seconds(EffectiveTtftSlo(options_, PlaceRequest{}));
  out.slo_itl_seconds = seconds(EffectiveItlSlo(options_, PlaceRequest{}));
  for (WorkerIndex i = 0; i < view_.size(); ++i) {
    const Worker* w = view_.worker(i);
    if (w == nullptr || w->state == WorkerState::kLost || w->role == Role::kStore) continue;
    const WorkerLoad& load = w->load;
    out.workers.push_back({.id = w->address.worker_id,
                           .role = w->role,
                           .next_role = w->next_role,
                           .ready = w->ready(),
                           .work = w->role == Role::kPrefill
                                       ? load.queued_prefill_tokens + w->demand.prefill_tokens
                                       : load.running_context_tokens + w->decoding_tokens});
    if (!w->ready()) continue;
    if (w->role == Role::kPrefill) out.prefill_queue_seconds += view_.QueueSeconds(*w, now);
    if (w->role != Role::kDecode) continue;
    out.decode_step_seconds +=
        w->latency.DecodeStepSeconds(std::max(load.running, 1u), load.running_context_tokens);
    out.decode_floor_seconds += w->latency.DecodeStepSeconds(1, 0);
    // What waits for its prefill holds memory, too, but for as long as the prefill worker takes: more decode
    // workers would change nothing. What waits for memory is as much more as it would take.
    const uint64_t here = std::max<uint64_t>(w->decoding.size(), uint64_t{load.running} + load.waiting);
    const double reserved = static_cast<double>(std::max<uint64_t>(here - load.waiting, 1));
    const double used =
        load.slots_total > 0 ? 1 - static_cast<double>(w->free_blocks()) / load.slots_total : 0;
    const double decoding = std::min(1.0, load.running / reserved);
    out.decode_memory += used * decoding * (1 + load.waiting / reserved);
  }
  std::sort(out.workers.begin(), out.workers.end(), [](const auto& a, const auto& b) { return a.id < b.id; });
  return out;
}

PlaceResult SchedulerCore::Place(const PlaceRequest& request, absl::Time now) {
  Evaluation evaluation;
  const PlacementInput input = InputFor(request);
  PlaceResult out = Decide(request, input, policy_, now, evaluation);
  if (!out.placement && !out.rejection) return out;
  Count(out, evaluation, request);
  if (evaluation.best && request.slo_class != SloClass::kBatch) {
    typical_of_ = std::min(typical_of_ + 1, kTypicalOf);
    const double gain = 1 / static_cast<double>(typical_of_);
    typical_.prompt_tokens += gain * (request.prompt_tokens - typical_.prompt_tokens);
    typical_.compute_seconds += gain * (evaluation.best->prefill.compute_seconds - typical_.compute_seconds);
  }
  const uint64_t number = recorded_;
  RequestRecord& record = NewRecord();
  record.request_id = request.request_id;
  record.tenant = request.tenant;
  record.slo_class = request.slo_class;
  record.placed_at = now;
  record.prompt_tokens = request.prompt_tokens;
  if (out.rejection) {
    record.predicted_ttft_seconds = out.rejection->ttft_seconds;
    record.predicted_itl_seconds = out.rejection->itl_seconds;
    record.outcome = "rejected";
    record.rejection_kind = out.rejection->kind;
    return out;
  }
  // A started answer that goes on elsewhere: what is booked now takes the first booking's place.
  if (const Booking* old = view_.FindBooking(request.request_id); old != nullptr) {
    if (RequestRecord* was = Open(*old); was != nullptr) was->outcome = "failed";
  }
  const Plan& plan = *evaluation.best;
  const auto tokens = [&](uint32_t predicted) {
    return std::clamp(request.max_tokens, 1u, std::max(predicted, 1u));
  };
  const uint32_t cached = plan.prefill.cached_blocks * view_.model()->layout.block_tokens;
  record.decode_worker = view_.worker(plan.decode.worker)->address.worker_id;
  record.prefill_worker = view_.worker(plan.prefill.worker)->address.worker_id;
  if (plan.prefill.holder) record.holder = view_.worker(*plan.prefill.holder)->address.worker_id;
  record.expected_cached_tokens = cached;
  record.expected_output_tokens = tokens(input.length.mean);
  record.predicted_ttft_seconds = plan.ttft_seconds();
  record.predicted_itl_seconds = plan.decode.itl_seconds;
  record.outcome = "open";
  view_.Book({.request_id = request.request_id,
              .tenant = request.tenant,
              .route = request.route,
              .slo_class = request.slo_class,
              .priority = request.priority,
              .slo_itl = EffectiveItlSlo(options_, request),
              .prefill = plan.prefill.worker,
              .decode = plan.decode.worker,
              .holder = plan.prefill.holder,
              .placed_at = now,
              .prefill_ends_at = now + absl::Seconds(plan.ttft_seconds()),
              .prefill_seconds = plan.prefill.compute_seconds,
              .prompt_tokens = request.prompt_tokens,
              .uncached_tokens = request.prompt_tokens - cached,
              .output_tokens = tokens(input.length.mean),
              .output_tokens_high = tokens(input.length.high),
              .length_learnt = input.length.learnt,
              .prefill_blocks = plan.prefill.blocks_needed,
              .decode_blocks = plan.decode.blocks_needed,
              .record = number});
  if (options_.fairness == FairnessPolicy::kD2lpm) {
    if (!plan.credit) fair_.Refill(request.tenant);
    fair_.Charge(request.tenant, plan.prefill.worker, request.prompt_tokens - cached, now);
  }
  replication_.OnPlaced(request.keys, now);
  return out;
}

std::vector<std::vector<BlockHolder>> SchedulerCore::Where(std::span<const BlockKey> keys) const {
  std::vector<std::vector<BlockHolder>> out;
  out.reserve(keys.size());
  for (const BlockKey& key : keys) {
    auto& holders = out.emplace_back();
    for (const PrefixIndex::Holder& h : view_.prefixes().Holders(key)) {
      holders.push_back({view_.worker(h.worker)->address.worker_id, {}});
      for (const Tier tier : {Tier::kDevice, Tier::kHost, Tier::kDisk}) {
        if (h.in(tier)) holders.back().tiers.push_back(tier);
      }
    }
  }
  return out;
}

std::vector<WorkerPrefix> SchedulerCore::Prefixes(std::span<const BlockKey> keys) const {
  std::vector<HeldPrefix> held;
  view_.prefixes().Match(keys, view_.size(), held);
  std::vector<WorkerPrefix> out;
  for (WorkerIndex i = 0; i < held.size(); ++i) {
    if (held[i].blocks > 0)
      out.push_back({view_.worker(i)->address.worker_id, held[i].blocks, held[i].near_blocks});
  }
  std::sort(out.begin(), out.end(), [](const WorkerPrefix& a, const WorkerPrefix& b) {
    return std::tuple(b.blocks, b.near_blocks, a.worker_id) <
           std::tuple(a.blocks, a.near_blocks, b.worker_id);
  });
  return out;
}

PlaceResult SchedulerCore::Explain(const PlaceRequest& request, absl::Time now) const {
  Evaluation evaluation;
  PolicyState policy = policy_;  // a question draws from the same numbers and uses none up
  PlaceResult out = Decide(request, InputFor(request), policy, now, evaluation);
  out.candidates = Candidates(evaluation, request, now);
  return out;
}

Placement SchedulerCore::Describe(const Plan& plan) const {
  const uint32_t block_tokens = view_.model()->layout.block_tokens;
  const WorkerAddress& decode = view_.worker(plan.decode.worker)->address;
  const WorkerAddress& prefill = view_.worker(plan.prefill.worker)->address;
  const PrefillOption& p = plan.prefill;
  Placement out;
  out.decode = decode;
  out.expected_cached_tokens = p.cached_blocks * block_tokens;
  out.ttft_seconds = plan.ttft_seconds();
  out.itl_seconds = plan.decode.itl_seconds;
  std::string& why = out.reason;
  why.reserve(192);
  why += plan.local() ? "prefill and decode on " : "prefill on ";
  why += prefill.worker_id;
  why += " (queue ";
  AppendSeconds(why, p.queue_seconds);
  why += ", ";
  AppendNumber(why, out.expected_cached_tokens);
  why += " tokens cached";
  if (p.holder) {
    const WorkerAddress& holder = view_.worker(*p.holder)->address;
    const uint32_t near = std::min(p.holder_near_blocks, p.cached_blocks);
    if (near > p.held_blocks)
      out.holders.push_back({holder, p.held_blocks, near, Tier::kHost, p.peer_host_seconds});
    if (p.cached_blocks > near)
      out.holders.push_back({holder, near, p.cached_blocks, Tier::kDisk, p.peer_disk_seconds});
    why += ", ";
    AppendNumber(why, (p.cached_blocks - p.held_blocks) * block_tokens);
    why += " of them fetched from ";
    if (near <= p.held_blocks) why += "the disk of ";
    why += holder.worker_id;
  }
  if (p.held_blocks > p.near_blocks) {
    why += ", ";
    AppendNumber(why, (p.held_blocks - p.near_blocks) * block_tokens);
    why += " of them from its own disk";
  }
  why += ", compute ";
  AppendSeconds(why, p.compute_seconds);
  why += ")";
  if (!plan.local()) {
    out.prefill = prefill;
    why += ", decode on ";
    why += decode.worker_id;
  }
  why += " (";
  AppendSeconds(why, out.itl_seconds);
  why += " a token)";
  return out;
}

std::vector<Candidate> SchedulerCore::Candidates(const Evaluation& e, const PlaceRequest& request,
                                                 absl::Time now) const {
  std::vector<Candidate> out;
  if (!view_.model()) return out;
  const uint32_t block_tokens = view_.model()->layout.block_tokens;
  const auto note = [](std::string& to, std::string_view what) {
    if (!to.empty()) to += "; ";
    to += what;
  };
  const auto prefill = [&](const PrefillOption& p, std::string_view kind, double handoff) {
    Candidate c{.worker_id = view_.worker(p.worker)->address.worker_id, .kind = kind};
    c.cached_tokens = p.held_blocks * block_tokens;
    c.fetched_tokens = (p.cached_blocks - p.held_blocks) * block_tokens;
    c.queue_seconds = p.queue_seconds;
    c.fetch_seconds = p.fetch_seconds;
    c.compute_seconds = p.compute_seconds;
    c.total_seconds = p.total_seconds() + handoff;
    if (p.holder) note(c.note, "fetches from " + view_.worker(*p.holder)->address.worker_id);
    if (p.held_blocks > p.near_blocks)
      note(c.note, "loads " + std::to_string((p.held_blocks - p.near_blocks) * block_tokens) +
                       " tokens from its disk");
    if (!p.room) note(c.note, "lacks free blocks: " + std::to_string(p.blocks_needed) + " needed");
    return c;
  };
  const bool local = e.best && e.best->local();
  for (const PrefillOption& p : e.prefills) {
    out.push_back(prefill(p, "prefill", 0));
    out.back().chosen = e.best && !local && e.best->prefill.worker == p.worker;
  }
  for (const Plan& plan : e.locals) {
    out.push_back(prefill(plan.prefill, "local", 0));
    out.back().itl_seconds = plan.decode.itl_seconds;
    out.back().chosen = local && e.best->decode.worker == plan.decode.worker;
    if (!plan.decode.room && plan.prefill.room)
      note(out.back().note, "lacks free blocks: " + std::to_string(plan.decode.blocks_needed) + " needed");
  }
  for (const DecodeOption& d : e.decodes) {
    Candidate c{.worker_id = view_.worker(d.worker)->address.worker_id, .kind = "decode"};
    c.fetch_seconds = d.handoff_seconds;
    c.itl_seconds = d.itl_seconds;
    c.chosen = e.best && !local && e.best->decode.worker == d.worker;
    if (!d.room) note(c.note, "lacks free blocks: " + std::to_string(d.blocks_needed) + " needed");
    out.push_back(std::move(c));
  }
  // Why the others were not considered.
  for (const WorkerView& w : view_.Workers(now)) {
    const auto& ex = request.exclude_workers;
    const bool excluded = std::find(ex.begin(), ex.end(), w.address.worker_id) != ex.end();
    if (w.role == Role::kStore || (w.state == WorkerState::kReady && !excluded)) continue;
    out.push_back({.worker_id = w.address.worker_id,
                   .kind = w.role == Role::kPrefill ? "prefill" : "decode",
                   .note = excluded ? "failed this request already" : std::string(WorkerStateName(w.state))});
  }
  return out;
}

}  // namespace tidepool
