#include "server/worker/worker_context.h"

#include <limits>

#include "base/status.h"
#include "server/engine/sequence.h"

namespace tidepool {
namespace {

constexpr size_t kMaxFetchSamples = 256;

Histogram& Stage(MetricRegistry& metrics, const char* stage) {
  return metrics.AddHistogram("tidepool_request_stage_seconds", "Time of a request in each stage.",
                              LatencyBuckets(), {{"stage", stage}});
}

Counter& QueryTokens(MetricRegistry& metrics, const char* tier) {
  return metrics.AddCounter("tidepool_prefix_cache_query_tokens_total", "Prompt tokens looked up.",
                            {{"tier", tier}});
}

Counter& HitTokens(MetricRegistry& metrics, std::string_view tier) {
  return metrics.AddCounter("tidepool_prefix_cache_hit_tokens_total",
                            "Prompt tokens whose KV was reused instead of computed.",
                            {{"tier", std::string(tier)}});
}

Counter& Fallback(MetricRegistry& metrics, const char* what) {
  return metrics.AddCounter("tidepool_worker_fallbacks_total",
                            "Failures after which a worker computed the KV by itself.", {{"what", what}});
}

Counter& Ended(MetricRegistry& metrics, const char* how) {
  return metrics.AddCounter("tidepool_worker_requests_aborted_total",
                            "Requests that ended on a worker without a finish reason.", {{"how", how}});
}

}  // namespace

WorkerProbe::WorkerProbe(MetricRegistry& metrics)
    : host_query_tokens(QueryTokens(metrics, "host")),
      disk_query_tokens(QueryTokens(metrics, "disk")),
      peer_query_tokens(QueryTokens(metrics, "peer")),
      host_hit_tokens(HitTokens(metrics, "host")),
      queue_seconds(Stage(metrics, "queue")),
      prefill_seconds(Stage(metrics, "prefill")),
      transfer_seconds(Stage(metrics, "transfer")),
      decode_seconds(Stage(metrics, "decode")),
      fallback_prefill(Fallback(metrics, "prefill")),
      fallback_fetch(Fallback(metrics, "fetch")),
      cancelled(Ended(metrics, "cancelled")),
      failed(Ended(metrics, "failed")) {
  for (size_t i = 0; i < kLoadedFrom; ++i) loaded_hit_tokens[i] = &HitTokens(metrics, kLoadedFromNames[i]);
}

void WorkerContext::AddFetchSample(const SourceId& source, uint64_t bytes, absl::Duration elapsed) {
  v1::FetchSample sample;
  sample.set_source(source.worker);
  sample.set_tier(source.tier == Tier::kDisk ? v1::KV_TIER_DISK : v1::KV_TIER_HOST);
  sample.set_bytes(bytes);
  sample.set_seconds(absl::ToDoubleSeconds(elapsed));
  std::lock_guard lock(mu_);
  if (fetch_samples_.size() >= kMaxFetchSamples) fetch_samples_.erase(fetch_samples_.begin());
  fetch_samples_.push_back(std::move(sample));
}

std::vector<v1::FetchSample> WorkerContext::TakeFetchSamples() {
  std::lock_guard lock(mu_);
  return std::exchange(fetch_samples_, {});
}

std::string AttemptId(const std::string& request_id, uint32_t attempt) {
  return request_id + "#" + std::to_string(attempt);
}

int32_t EnginePriority(int32_t priority) {
  return priority == std::numeric_limits<int32_t>::min() ? std::numeric_limits<int32_t>::max() : -priority;
}

PeerAddress ToPeerAddress(const v1::WorkerAddress& address) {
  return {address.worker_id(), address.boot_id(), address.transport(), address.arena()};
}

OutputToken FromProto(const v1::OutputToken& token) {
  OutputToken out{.id = token.id(), .index = token.index(), .logprob = token.logprob()};
  for (const auto& t : token.top()) out.top.push_back({t.id(), t.logprob()});
  return out;
}

// What both kinds of message hold of a token's likeliest rivals.
template <typename Message>
static void AddTop(const TopLogprobs& tokens, Message& out) {
  for (const TokenLogprob& t : tokens) {
    auto* top = out.add_top();
    top->set_id(t.id);
    top->set_logprob(t.logprob);
  }
}

void ToProto(const OutputToken& token, v1::OutputToken& out) {
  out.set_id(token.id);
  out.set_index(token.index);
  out.set_logprob(token.logprob);
  AddTop(token.top, out);
}

void ToProto(const PromptLogprob& score, v1::PromptLogprob& out) {
  out.set_logprob(score.logprob);
  out.set_rank(score.rank);
  AddTop(score.top, out);
}

void FromProto(const v1::Sampling& from, SequenceSpec& spec) {
  SamplingParams& to = spec.sampling;
  to.temperature = from.temperature();
  to.top_k = from.top_k();
  to.top_p = from.top_p();
  to.min_p = from.min_p();
  to.seed = from.seed();
  // These two came later: a message without them means what it meant before.
  to.typical_p = from.typical_p() == 0 ? 1 : from.typical_p();
  to.repetition_penalty = from.repetition_penalty() == 0 ? 1 : from.repetition_penalty();
  to.presence_penalty = from.presence_penalty();
  to.frequency_penalty = from.frequency_penalty();
  for (const v1::LogitBias& b : from.logit_bias()) to.logit_bias.push_back({b.id(), b.bias()});
  to.allowed_token_ids = {from.allowed_token_ids().begin(), from.allowed_token_ids().end()};
  for (const v1::TokenSequence& word : from.bad_words()) {
    to.bad_words.emplace_back(word.ids().begin(), word.ids().end());
  }
  spec.min_tokens = from.min_tokens();
  spec.stop_token_ids = {from.stop_token_ids().begin(), from.stop_token_ids().end()};
  spec.top_logprobs = from.has_top_logprobs() ? from.top_logprobs() : -1;
}

absl::Status CheckSampling(const Model& model, const v1::Sampling& sampling) {
  SequenceSpec spec;
  FromProto(sampling, spec);
  return ValidateDrawing(spec, model.spec.vocab);
}

absl::Status CheckEmitted(std::span<const int32_t> prompt, uint32_t emitted, uint32_t max_tokens) {
  if (emitted == 0 || (emitted < prompt.size() && emitted <= max_tokens)) return absl::OkStatus();
  return absl::InvalidArgumentError("emitted_tokens is " + std::to_string(emitted) +
                                    "; it must be less than the " + std::to_string(prompt.size()) +
                                    " tokens of prompt, and at most max_tokens, " +
                                    std::to_string(max_tokens));
}

absl::Status AcceptEmitted(std::span<const int32_t> prompt, uint32_t emitted, TokenConstraint& constraint) {
  for (const int32_t token : prompt.last(emitted)) {
    TP_RETURN_IF_ERROR(Annotate(constraint.Accept(token), "emitted_tokens do not follow sampling.grammar"));
  }
  return absl::OkStatus();
}

absl::Status CheckPrompt(const Model& model, std::span<const int32_t> prompt, uint32_t max_tokens) {
  if (prompt.empty()) return absl::InvalidArgumentError("prompt is empty; send at least one token");
  if (prompt.size() + max_tokens > model.max_model_len) {
    return absl::InvalidArgumentError("prompt has " + std::to_string(prompt.size()) +
                                      " tokens and max_tokens is " + std::to_string(max_tokens) +
                                      ": together they exceed the context of " +
                                      std::to_string(model.max_model_len) + " tokens");
  }
  for (size_t i = 0; i < prompt.size(); ++i) {
    if (prompt[i] < 0 || static_cast<uint32_t>(prompt[i]) >= model.spec.vocab) {
      return absl::InvalidArgumentError("prompt[" + std::to_string(i) + "] is token " +
                                        std::to_string(prompt[i]) + ", outside the vocabulary of " +
                                        std::to_string(model.spec.vocab));
    }
  }
  return absl::OkStatus();
}

}  // namespace tidepool
