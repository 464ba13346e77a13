#include "server/scheduler/convert.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>

#include "base/status.h"
#include "server/rpc/kv_convert.h"

namespace tidepool {

namespace {

absl::StatusOr<ModelIdentity> FromProto(const v1::ModelIdentity& in) {
  if (in.kv_dtype() < 1 || in.kv_dtype() > 3)
    return absl::InvalidArgumentError("model.kv_dtype: " + std::to_string(in.kv_dtype()) +
                                      " is no element type; 1 to 3 are");
  return ModelIdentity{.name = in.name(),
                       .fingerprint = in.fingerprint(),
                       .layout = {.layers = in.layers(),
                                  .kv_heads = in.kv_heads(),
                                  .head_dim = in.head_dim(),
                                  .block_tokens = in.block_tokens(),
                                  .dtype = static_cast<DType>(in.kv_dtype())},
                       .max_model_len = in.max_model_len(),
                       .vocab_size = in.vocab_size(),
                       .hidden_size = in.hidden_size(),
                       .kv_codec = in.kv_codec()};
}

WorkerAddress FromProto(const v1::WorkerAddress& in) {
  return {.worker_id = in.worker_id(),
          .boot_id = in.boot_id(),
          .grpc = in.grpc(),
          .transport = in.transport(),
          .pid = in.pid(),
          .host = in.host(),
          .arena = in.arena()};
}

// What a client may name is kept for every request and tenant: bounded.
constexpr size_t kNameBytesMax = 256;

absl::Status CheckName(const std::string& name, std::string_view field) {
  if (name.size() <= kNameBytesMax) return absl::OkStatus();
  return absl::InvalidArgumentError(std::string(field) + ": has " + std::to_string(name.size()) +
                                    " bytes; at most " + std::to_string(kNameBytesMax));
}

absl::StatusOr<SloClass> FromProto(v1::RequestClass in) {
  switch (in) {
    case v1::REQUEST_CLASS_ONLINE:
      return SloClass::kStandard;
    case v1::REQUEST_CLASS_BATCH:
      return SloClass::kBatch;
    case v1::REQUEST_CLASS_INTERACTIVE:
      return SloClass::kInteractive;
    default:
      return absl::InvalidArgumentError("request_class: must be online, batch or interactive");
  }
}

// Not negative, not NaN.
double Measured(double seconds) { return std::isfinite(seconds) && seconds > 0 ? seconds : 0; }

absl::StatusOr<absl::Duration> ToSlo(double seconds, std::string_view field) {
  if (!std::isfinite(seconds) || seconds < 0)
    return absl::InvalidArgumentError(std::string(field) +
                                      ": must be a finite number of seconds, at least 0");
  return absl::Seconds(seconds);
}

std::optional<Role> ToRole(v1::Role role) {
  switch (role) {
    case v1::ROLE_PREFILL:
      return Role::kPrefill;
    case v1::ROLE_DECODE:
      return Role::kDecode;
    case v1::ROLE_BOTH:
      return Role::kBoth;
    case v1::ROLE_STORE:
      return Role::kStore;
    default:
      return std::nullopt;
  }
}

}  // namespace

absl::StatusOr<WorkerReport> FromProto(const v1::WorkerReport& in) {
  WorkerReport out;
  out.address = FromProto(in.address());
  const std::optional<Role> role = ToRole(in.role());
  if (!role) return absl::InvalidArgumentError("role: must be prefill, decode, both or store");
  out.role = *role;
  out.next_role = ToRole(in.next_role());
  TP_ASSIGN_OR_RETURN(out.model, FromProto(in.model()));
  out.draining = in.draining();
  out.seq = in.seq();
  out.snapshot = in.snapshot();
  out.events.reserve(static_cast<size_t>(in.events_size()));
  for (const auto& e : in.events()) {
    TP_ASSIGN_OR_RETURN(const BlockKey key, ToBlockKey(e.key(), "events.key"));
    TP_ASSIGN_OR_RETURN(const Tier tier, FromProto(e.tier(), "events.tier"));
    out.events.push_back({key, e.removed(), tier});
  }
  out.load = {.running = in.running(),
              .waiting = in.waiting(),
              .queued_prefill_tokens = in.queued_prefill_tokens(),
              .running_context_tokens = in.running_context_tokens(),
              .slots_total = in.slots_total(),
              .slots_free = in.slots_free(),
              .preempts = in.preempts()};
  for (const auto& s : in.prefills())
    out.prefills.push_back({s.new_tokens(), s.cached_tokens(), s.seconds()});
  for (const auto& s : in.decodes()) out.decodes.push_back({s.batch(), s.context_tokens(), s.seconds()});
  for (const auto& s : in.fetches()) {
    TP_ASSIGN_OR_RETURN(const Tier tier, FromProto(s.tier(), "fetches.tier"));
    const FetchFrom from = tier != Tier::kDisk  ? FetchFrom::kPeerHost
                           : s.source().empty() ? FetchFrom::kOwnDisk
                                                : FetchFrom::kPeerDisk;
    out.fetches.push_back({s.bytes(), s.seconds(), from});
  }
  for (const auto& t : in.tiers()) {
    TP_ASSIGN_OR_RETURN(const Tier tier, FromProto(t.tier(), "tiers.tier"));
    out.tiers.push_back({tier, t.blocks(), t.bytes_used(), t.bytes_total(), t.healthy()});
  }
  out.prefilled.assign(in.prefilled().begin(), in.prefilled().end());
  out.ended.assign(in.ended().begin(), in.ended().end());
  return out;
}

absl::StatusOr<PlaceRequest> FromProto(const v1::PlaceRequest& in) {
  PlaceRequest out;
  out.request_id = in.request_id();
  out.keys.reserve(static_cast<size_t>(in.keys_size()));
  for (const auto& bytes : in.keys()) {
    TP_ASSIGN_OR_RETURN(const BlockKey key, ToBlockKey(bytes, "keys"));
    out.keys.push_back(key);
  }
  out.prompt_tokens = in.prompt_tokens();
  out.max_tokens = in.max_tokens();
  TP_RETURN_IF_ERROR(CheckName(in.tenant(), "tenant"));
  TP_RETURN_IF_ERROR(CheckName(in.route(), "route"));
  out.tenant = in.tenant();
  out.route = in.route();
  out.priority = in.priority();
  TP_ASSIGN_OR_RETURN(out.slo_class, FromProto(in.request_class()));
  TP_ASSIGN_OR_RETURN(out.slo_ttft, ToSlo(in.slo_ttft_seconds(), "slo_ttft_seconds"));
  TP_ASSIGN_OR_RETURN(out.slo_itl, ToSlo(in.slo_itl_seconds(), "slo_itl_seconds"));
  out.exclude_workers.assign(in.exclude_workers().begin(), in.exclude_workers().end());
  return out;
}

absl::StatusOr<FinishInfo> FromProto(const v1::FinishRequest& in) {
  if (in.request_id().empty()) return absl::InvalidArgumentError("finish: request_id is empty");
  const v1::RequestPath& path = in.path();
  FinishInfo out{.output_tokens = in.output_tokens(),
                 .ttft_seconds = Measured(in.ttft_seconds()),
                 .itl_seconds = Measured(in.itl_seconds()),
                 .cached_remote_tokens = path.cached_remote_tokens(),
                 .cached_disk_tokens = path.cached_disk_tokens(),
                 .fetched_bytes = path.fetched_bytes(),
                 .completed = in.completed(),
                 .cut = in.cut()};
  const uint64_t elsewhere = uint64_t{out.cached_remote_tokens} + out.cached_disk_tokens;
  out.cached_host_tokens =
      static_cast<uint32_t>(path.cached_tokens() - std::min<uint64_t>(elsewhere, path.cached_tokens()));
  return out;
}

void ToProto(const WorkerAddress& in, v1::WorkerAddress* out) {
  out->set_worker_id(in.worker_id);
  out->set_boot_id(in.boot_id);
  out->set_grpc(in.grpc);
  out->set_transport(in.transport);
  out->set_pid(in.pid);
  out->set_host(in.host);
  out->set_arena(in.arena);
}

void ToProto(const ModelIdentity& in, v1::ModelIdentity* out) {
  out->set_name(in.name);
  out->set_fingerprint(in.fingerprint);
  out->set_layers(in.layout.layers);
  out->set_kv_heads(in.layout.kv_heads);
  out->set_head_dim(in.layout.head_dim);
  out->set_block_tokens(in.layout.block_tokens);
  out->set_kv_dtype(static_cast<uint32_t>(in.layout.dtype));
  out->set_max_model_len(in.max_model_len);
  out->set_vocab_size(in.vocab_size);
  out->set_hidden_size(in.hidden_size);
  out->set_kv_codec(in.kv_codec);
}

void ToProto(const Placement& in, v1::PlaceReply* out) {
  ToProto(in.decode, out->mutable_decode());
  if (in.prefill) ToProto(*in.prefill, out->mutable_prefill());
  for (const PrefixHolder& h : in.holders) {
    v1::PrefixHolder* holder = out->add_holders();
    ToProto(h.worker, holder->mutable_worker());
    holder->set_begin(h.begin);
    holder->set_end(h.end);
    holder->set_tier(ToProto(h.tier));
    holder->set_seconds(h.seconds);
  }
  out->set_expected_cached_tokens(in.expected_cached_tokens);
  out->set_predicted_ttft_seconds(in.ttft_seconds);
  out->set_predicted_itl_seconds(in.itl_seconds);
  out->set_reason(in.reason);
}

void ToProto(const Rejection& in, v1::PlaceRejection* out) {
  out->set_reason(in.reason);
  out->set_predicted_ttft_seconds(in.ttft_seconds);
  out->set_predicted_itl_seconds(in.itl_seconds);
  out->set_retry_after_seconds(in.retry_after_seconds);
}

void ToProto(const Candidate& in, v1::Candidate* out) {
  out->set_worker_id(in.worker_id);
  out->set_kind(std::string(in.kind));
  out->set_cached_tokens(in.cached_tokens);
  out->set_fetched_tokens(in.fetched_tokens);
  out->set_queue_seconds(in.queue_seconds);
  out->set_fetch_seconds(in.fetch_seconds);
  out->set_compute_seconds(in.compute_seconds);
  out->set_total_seconds(in.total_seconds);
  out->set_itl_seconds(in.itl_seconds);
  out->set_chosen(in.chosen);
  out->set_note(in.note);
}

void ToProto(const WorkerView& in, v1::WorkerView* out) {
  ToProto(in.address, out->mutable_address());
  out->set_role(static_cast<v1::Role>(in.role));
  if (in.next_role) out->set_next_role(static_cast<v1::Role>(*in.next_role));
  out->set_state(std::string(WorkerStateName(in.state)));
  out->set_running(in.load.running);
  out->set_waiting(in.load.waiting);
  out->set_queued_prefill_tokens(in.load.queued_prefill_tokens);
  out->set_slots_total(in.load.slots_total);
  out->set_slots_free(in.load.slots_free);
  for (const TierLoad& t : in.tiers) {
    v1::TierLoad* tier = out->add_tiers();
    tier->set_tier(ToProto(t.tier));
    tier->set_blocks(t.blocks);
    tier->set_bytes_used(t.bytes_used);
    tier->set_bytes_total(t.bytes_total);
    tier->set_healthy(t.healthy);
  }
  out->set_indexed_blocks(in.indexed_blocks);
  out->set_seconds_since_report(absl::ToDoubleSeconds(in.since_report));
}

void ToProto(const RequestRecord& in, absl::Time now, v1::Decision* out) {
  out->set_request_id(in.request_id);
  out->set_tenant(in.tenant);
  out->set_request_class(std::string(SloClassName(in.slo_class)));
  out->set_seconds_ago(absl::ToDoubleSeconds(now - in.placed_at));
  out->set_outcome(std::string(in.outcome));
  out->set_rejection(std::string(in.rejection_kind));
  out->set_prefill_worker(in.prefill_worker);
  out->set_decode_worker(in.decode_worker);
  out->set_holder(in.holder);
  out->set_prompt_tokens(in.prompt_tokens);
  out->set_expected_cached_tokens(in.expected_cached_tokens);
  out->set_expected_output_tokens(in.expected_output_tokens);
  out->set_predicted_ttft_seconds(in.predicted_ttft_seconds);
  out->set_predicted_itl_seconds(in.predicted_itl_seconds);
  out->set_ttft_seconds(in.actual.ttft_seconds);
  out->set_itl_seconds(in.actual.itl_seconds);
  out->set_output_tokens(in.actual.output_tokens);
  out->set_cached_host_tokens(in.actual.cached_host_tokens);
  out->set_cached_remote_tokens(in.actual.cached_remote_tokens);
  out->set_cached_disk_tokens(in.actual.cached_disk_tokens);
  out->set_fetched_bytes(in.actual.fetched_bytes);
}

}  // namespace tidepool
