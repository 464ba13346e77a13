#include "server/gateway/probe.h"

#include "base/status.h"
#include "server/gateway/errors.h"

namespace tidepool {
namespace {

constexpr char kStage[] = "tidepool_request_stage_seconds";
constexpr char kStageHelp[] = "Time of a request in each stage";

Histogram& Stage(MetricRegistry& registry, const char* stage) {
  return registry.AddHistogram(kStage, kStageHelp, LatencyBuckets(), {{"stage", stage}});
}

}  // namespace

GatewayProbe::GatewayProbe(MetricRegistry& registry, const SloConfig& slo)
    : ttft(registry.AddHistogram("tidepool_time_to_first_token_seconds",
                                 "Arrival of the request to its first token", TtftBuckets())),
      itl(registry.AddHistogram("tidepool_inter_token_latency_seconds", "Time between tokens of one request",
                                ItlBuckets())),
      tpot(registry.AddHistogram("tidepool_request_time_per_output_token_seconds",
                                 "Mean time per token of a request, without the first", ItlBuckets())),
      duration(registry.AddHistogram("tidepool_request_duration_seconds", "Arrival of the request to its end",
                                     LatencyBuckets())),
      stage_admit(Stage(registry, "admit")),
      stage_queue(Stage(registry, "queue")),
      stage_prefill(Stage(registry, "prefill")),
      stage_transfer(Stage(registry, "transfer")),
      stage_decode(Stage(registry, "decode")),
      prompt_computed(registry.AddCounter("tidepool_prompt_tokens_total",
                                          "Prompt tokens of finished requests", {{"source", "computed"}})),
      prompt_cached(registry.AddCounter("tidepool_prompt_tokens_total", "Prompt tokens of finished requests",
                                        {{"source", "cached"}})),
      generated(registry.AddCounter("tidepool_generation_tokens_total", "Tokens delivered to clients")),
      retries(registry.AddCounter("tidepool_gateway_retries_total", "Attempts after a worker failed")),
      resumed(registry.AddCounter("tidepool_gateway_resumed_total",
                                  "Answers that went on at another worker behind what was delivered")),
      placed_again(registry.AddCounter("tidepool_gateway_placed_again_total",
                                       "Placements asked for again, for want of a scheduler or a worker")),
      session_pins(registry.AddCounter("tidepool_gateway_session_pins_total",
                                       "Pins of conversations that may wait for a tool", {{"result", "ok"}})),
      session_pins_failed(registry.AddCounter("tidepool_gateway_session_pins_total",
                                              "Pins of conversations that may wait for a tool",
                                              {{"result", "failed"}})),
      choices_cancelled(registry.AddCounter("tidepool_gateway_choices_cancelled_total",
                                            "Choices that ended because another of their request failed")),
      running(registry.AddGauge("tidepool_requests_running", "Requests in flight", {{"role", "gateway"}})),
      grammar_compile(registry.AddHistogram("tidepool_gateway_grammar_compile_seconds",
                                            "Compiling one request's structured output", LatencyBuckets())),
      grammar_hits(registry.AddCounter("tidepool_gateway_grammar_cache_hits_total",
                                       "Structured outputs whose grammar was there")),
      grammar_misses(registry.AddCounter("tidepool_gateway_grammar_cache_misses_total",
                                         "Structured outputs whose grammar had to be compiled")),
      grammar_refused(registry.AddCounter("tidepool_gateway_grammars_refused_total",
                                          "Structured outputs that could not be compiled, or not in time")),
      grammar_bytes(registry.AddGauge("tidepool_gateway_grammar_cache_bytes", "Grammars that are kept")) {
  SetSlo(slo);
  auto request = [&](int code, std::string_view reason) {
    requests_[Key(code, reason)] =
        &registry.AddCounter("tidepool_requests_total", "Requests by HTTP status and finish or error reason",
                             {{"code", std::to_string(code)}, {"reason", std::string(reason)}});
  };
  request(200, "stop");
  request(200, "length");
  request(200, "pooled");
  for (const ErrorKind& kind : ErrorCatalogue()) request(kind.status, kind.code);
  // Failed after the headers were out: the client saw 200 and then an error event.
  for (const ErrorKind& kind : {errors::kInternal, errors::kUnavailable, errors::kTimeout, errors::kDraining,
                                errors::kInvalidRequest}) {
    request(200, kind.code);
  }
  for (const ErrorKind& kind :
       {errors::kOverloaded, errors::kTooManyRequests, errors::kQueueFull, errors::kRateLimited,
        errors::kNotReady, errors::kDraining, errors::kUnavailable}) {
    rejected_[std::string(kind.code)] =
        &registry.AddCounter("tidepool_requests_rejected_total", "Requests refused before any work",
                             {{"reason", std::string(kind.code)}});
  }
  for (const char* stage : {"queued", "streaming"}) {
    disconnects_[stage] =
        &registry.AddCounter("tidepool_client_disconnects_total",
                             "Clients that left, or were dropped as too slow", {{"stage", stage}});
  }
  auto slo_counter = [&](const char* which, const char* good) {
    return &registry.AddCounter("tidepool_slo_requests_total", "Requests that met the SLO or did not",
                                {{"slo", which}, {"good", good}});
  };
  ttft_good_ = slo_counter("ttft", "true");
  ttft_bad_ = slo_counter("ttft", "false");
  itl_good_ = slo_counter("itl", "true");
  itl_bad_ = slo_counter("itl", "false");
}

std::string GatewayProbe::Key(int code, std::string_view reason) {
  return std::to_string(code) + " " + std::string(reason);
}

void GatewayProbe::Request(int code, std::string_view reason) {
  auto it = requests_.find(Key(code, reason));
  if (it == requests_.end()) it = requests_.find(Key(errors::kInternal.status, errors::kInternal.code));
  it->second->Add();
}

void GatewayProbe::Rejected(std::string_view reason) {
  if (const auto it = rejected_.find(reason); it != rejected_.end()) it->second->Add();
}

void GatewayProbe::SetSlo(const SloConfig& slo) {
  slo_ttft_ns_ = absl::ToInt64Nanoseconds(slo.ttft);
  slo_itl_ns_ = absl::ToInt64Nanoseconds(slo.itl);
}

void GatewayProbe::Disconnect(std::string_view stage) {
  if (const auto it = disconnects_.find(stage); it != disconnects_.end()) it->second->Add();
}

void GatewayProbe::SloTtft(absl::Duration v) {
  const absl::Duration slo = this->slo().ttft;
  if (slo > absl::ZeroDuration()) (v <= slo ? ttft_good_ : ttft_bad_)->Add();
}

void GatewayProbe::SloItl(absl::Duration v) {
  const absl::Duration slo = this->slo().itl;
  if (slo > absl::ZeroDuration()) (v <= slo ? itl_good_ : itl_bad_)->Add();
}

}  // namespace tidepool
