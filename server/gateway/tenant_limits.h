#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "base/clock.h"
#include "base/probe.h"
#include "config/tenants.h"
#include "server/gateway/errors.h"

namespace tidepool {

// TenantLimits: what each tenant may use at once and a minute, and what may wait in all (Core behind a mutex:
// decisions only, time from a Clock). Thread-safe. Outlives its tickets.
//
//   requests_per_minute, tokens_per_minute: token buckets that hold one minute's worth and fill evenly. A
//   request
//     takes 1 and its prompt's tokens when it is admitted, and what it generated when it has ended; a bucket
//     may go below zero, and admits nothing until it has filled up again: so the rate holds without knowing
//     an answer's length, and a prompt larger than the minute is taken when the minute is unused.
//   max_inflight: sequences between admission and end.
//   max_queued_requests, max_queued_tokens: requests admitted without a first token, and their prompt tokens;
//   a
//     bound for each tenant and one for all. A prompt above the bound is taken when nothing waits.
//
// Where several tenants are known, a bound for all is shared by dynamic thresholds (Choudhury and Hahne,
// IEEE/ACM ToN 6(2), 1998, alpha = 1): a tenant may hold as much as is left free. One alone gets half, two a
// third each: a tenant at ten times its load fills its own share and leaves room for the next one to come.
class TenantLimits {
 public:
  // `config`: max_inflight, max_queued_requests, max_queued_tokens. `clock`, `metrics`: borrowed.
  TenantLimits(const GatewayConfig& config, const TenantTable& table, const Clock& clock,
               MetricRegistry& metrics);

  // From now on these limits hold; what is admitted stays admitted, and what buckets hold is kept.
  void Replace(const TenantTable& table);
  // The bounds for all from now on: `config`'s max_queued_requests and max_queued_tokens.
  void SetBounds(const GatewayConfig& config);

  // One admitted request (Handle). Every method is callable from any thread, and ordered by the caller; its
  // destruction ends the request.
  class Ticket {
   public:
    Ticket(Ticket&& other) noexcept : limits_(std::exchange(other.limits_, nullptr)) { Steal(other); }
    Ticket& operator=(Ticket&& other) noexcept;
    ~Ticket() { Release(); }

    // The prompt is tokenised: it queues, or an error says why not (429). At most once.
    std::optional<ApiError> TakePrompt(uint32_t tokens);
    // The request has left the queue. Later calls do nothing.
    void FirstToken();

   private:
    friend class TenantLimits;
    Ticket(TenantLimits* limits, std::string tenant, bool queued)
        : limits_(limits), tenant_(std::move(tenant)), queued_(queued) {}
    void Steal(Ticket& other);
    void Release();

    TenantLimits* limits_;
    std::string tenant_;
    uint32_t prompt_tokens_ = 0;
    bool queued_ = false;
  };

  // A place for a request of one sequence, which queues from now on; or an error that says why not (429).
  std::variant<Ticket, ApiError> Admit(const std::string& tenant);
  // A further choice of a request that was admitted: it counts, is never refused, and does not queue.
  Ticket Join(const std::string& tenant);
  // The tenant's answer had so many tokens.
  void Spend(const std::string& tenant, uint32_t tokens);

  // OpenAI's x-ratelimit-{limit,remaining,reset}-{requests,tokens}, of the limits that the tenant has.
  std::vector<std::pair<std::string, std::string>> RateHeaders(const std::string& tenant) const;

 private:
  struct Bucket {
    double level = 0;  // tokens now; may be negative
    absl::Time at;     // of `level`
    uint32_t per_minute = 0;

    void Fill(absl::Time now);
    // Until `level` is at least `need`.
    absl::Duration Wait(double need) const;
  };
  struct Tenant {
    TenantLimitsConfig limits;
    Bucket requests, tokens;
    uint32_t inflight = 0, queued = 0;
    uint64_t queued_tokens = 0;
  };

  // The following hold mu_.
  Tenant& Get(const std::string& tenant);
  void SetLimits(Tenant& tenant, const TenantLimitsConfig& limits) const;
  void Leave(Tenant& tenant, uint32_t prompt_tokens);
  void Publish();
  // May a tenant that holds `own` have `want` more of `max`, of which all hold `total`?
  bool Shared(uint64_t own, uint64_t total, uint64_t want, uint64_t max) const;
  ApiError QueueFull(std::string message) const;
  uint32_t DrainSeconds() const;

  const uint32_t inflight_max_;
  const Clock& clock_;
  Gauge& waiting_;
  Gauge& waiting_tokens_;

  mutable std::mutex mu_;
  uint32_t queued_max_, queued_tokens_max_;
  TenantTable table_;
  bool several_ = false;  // tenants are known
  absl::flat_hash_map<std::string, std::unique_ptr<Tenant>> tenants_;
  uint64_t inflight_ = 0, queued_ = 0, queued_tokens_ = 0;
  // Requests that left the queue, as a rate: decays with kDrainWindow.
  double drained_ = 0;
  absl::Time drained_at_;
};

}  // namespace tidepool
