#include "scheduler/core.h"

#include <algorithm>
#include <cstdio>
#include <tuple>
#include <utility>

#include "base/status.h"
#include "scheduler/admission.h"

namespace tidepool {

namespace {

std::string Seconds(double s) {
  char buf[32];
  if (s < 1) {
    std::snprintf(buf, sizeof buf, "%.1f ms", s * 1e3);
  } else {
    std::snprintf(buf, sizeof buf, "%.2f s", s);
  }
  return buf;
}

}  // namespace

SchedulerCore::SchedulerCore(const SchedulerOptions& options, const ReplicationOptions& replication)
    : options_(options), view_(options_), replication_(replication) {}

ReportResult SchedulerCore::Report(WorkerReport report, absl::Time now) {
  return view_.Report(std::move(report), now);
}

bool SchedulerCore::Finish(const std::string& request_id, absl::Time now) {
  return view_.Finish(request_id, now);
}

std::vector<std::string> SchedulerCore::Tick(absl::Time now) { return view_.Tick(now); }

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

PlaceResult SchedulerCore::Decide(const PlaceRequest& request, absl::Time now, Evaluation& evaluation) const {
  PlaceResult out;
  out.status = CheckRequest(request);
  if (!out.status.ok()) return out;
  out.rejection = JudgeInflight(view_, options_, request);
  if (!out.rejection) {
    evaluation = Evaluate(view_, options_, request, now);
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

PlaceResult SchedulerCore::Place(const PlaceRequest& request, absl::Time now) {
  Evaluation evaluation;
  PlaceResult out = Decide(request, now, evaluation);
  if (!out.placement) return out;
  const Plan& plan = *evaluation.best;
  view_.Book({.request_id = request.request_id,
              .prefill = plan.prefill.worker,
              .decode = plan.decode.worker,
              .holder = plan.prefill.holder,
              .placed_at = now,
              .prefill_ends_at = now + absl::Seconds(plan.ttft_seconds()),
              .prefill_seconds = plan.prefill.service_seconds(),
              .prompt_tokens = request.prompt_tokens,
              .output_tokens = std::clamp(request.max_tokens, 1u, options_.expected_output_tokens),
              .prefill_blocks = plan.prefill.blocks_needed,
              .decode_blocks = plan.decode.blocks_needed});
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
  PlaceResult out = Decide(request, now, evaluation);
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
  out.reason = plan.local() ? "prefill and decode on " + decode.worker_id : "prefill on " + prefill.worker_id;
  out.reason += " (queue " + Seconds(p.queue_seconds) + ", " + std::to_string(out.expected_cached_tokens) +
                " tokens cached";
  if (p.holder) {
    const WorkerAddress& holder = view_.worker(*p.holder)->address;
    const uint32_t near = std::min(p.holder_near_blocks, p.cached_blocks);
    if (near > p.held_blocks)
      out.holders.push_back({holder, p.held_blocks, near, Tier::kHost, p.peer_host_seconds});
    if (p.cached_blocks > near)
      out.holders.push_back({holder, near, p.cached_blocks, Tier::kDisk, p.peer_disk_seconds});
    out.reason += ", " + std::to_string((p.cached_blocks - p.held_blocks) * block_tokens) +
                  " of them fetched from " + (near > p.held_blocks ? "" : "the disk of ") + holder.worker_id;
  }
  if (p.held_blocks > p.near_blocks)
    out.reason +=
        ", " + std::to_string((p.held_blocks - p.near_blocks) * block_tokens) + " of them from its own disk";
  out.reason += ", compute " + Seconds(p.compute_seconds) + ")";
  if (!plan.local()) {
    out.prefill = prefill;
    out.reason += ", decode on " + decode.worker_id;
  }
  out.reason += " (" + Seconds(out.itl_seconds) + " a token)";
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
