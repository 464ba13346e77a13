#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <string>
#include <string_view>

#include "base/probe.h"
#include "config/config.h"

namespace tidepool {

// GatewayProbe: the gateway's metrics. Every label set exists, at 0, from the start: an alert on a series
// that appears with the first error is an alert that misses it.
class GatewayProbe {
 public:
  GatewayProbe(MetricRegistry& registry, const SloConfig& slo);

  // The objectives from now on.
  void SetSlo(const SloConfig& slo);
  SloConfig slo() const {
    return {.ttft = absl::Nanoseconds(slo_ttft_ns_.load()), .itl = absl::Nanoseconds(slo_itl_ns_.load())};
  }

  // The end of a request: `code` is the HTTP status, `reason` a finish reason or an error's code.
  void Request(int code, std::string_view reason);
  void Rejected(std::string_view reason);
  void Disconnect(std::string_view stage);  // queued, streaming
  // No-ops for an SLO that is not configured.
  void SloTtft(absl::Duration ttft);
  void SloItl(absl::Duration itl_mean);

  Histogram& ttft;
  Histogram& itl;
  Histogram& tpot;
  Histogram& duration;
  Histogram& stage_admit;
  Histogram& stage_queue;
  Histogram& stage_prefill;
  Histogram& stage_transfer;
  Histogram& stage_decode;
  Counter& prompt_computed;
  Counter& prompt_cached;
  Counter& generated;
  Counter& retries;
  Counter& resumed;              // of them
  Counter& placed_again;         // for want of a scheduler or a worker
  Counter& session_pins;         // of conversations that wait for a tool, on each worker
  Counter& session_pins_failed;  // harmless: their blocks may be evicted sooner
  Counter& choices_cancelled;
  Gauge& running;
  Histogram& grammar_compile;
  Counter& grammar_hits;
  Counter& grammar_misses;
  Counter& grammar_refused;
  Gauge& grammar_bytes;

 private:
  static std::string Key(int code, std::string_view reason);

  std::atomic<int64_t> slo_ttft_ns_{0}, slo_itl_ns_{0};
  std::map<std::string, Counter*> requests_;  // filled in the constructor, then only read
  std::map<std::string, Counter*, std::less<>> rejected_;
  std::map<std::string, Counter*, std::less<>> disconnects_;
  Counter *ttft_good_, *ttft_bad_, *itl_good_, *itl_bad_;
};

}  // namespace tidepool
