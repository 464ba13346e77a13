#include "server/gateway/tenant_limits.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <set>

#include "absl/strings/str_cat.h"
#include "base/rng.h"

namespace tidepool {
namespace {

constexpr double kRetrySecondsMax = 60;
constexpr absl::Duration kDrainWindow = absl::Seconds(10);

uint32_t Seconds(absl::Duration wait) {
  return static_cast<uint32_t>(std::clamp(std::ceil(absl::ToDoubleSeconds(wait)), 1.0, kRetrySecondsMax));
}

// Spread by 20 %, so that those who were refused together do not come back together.
uint32_t Spread(double seconds) {
  static std::atomic<uint64_t> counter{0};
  const double factor = 0.8 + 0.4 * Rng(counter.fetch_add(1)).Uniform();
  return static_cast<uint32_t>(std::clamp(std::ceil(seconds * factor), 1.0, kRetrySecondsMax));
}

// "1s", "6m0s", "120ms": as OpenAI writes it.
std::string Reset(absl::Duration wait) {
  const absl::Duration rounded = absl::Ceil(std::max(wait, absl::ZeroDuration()), absl::Milliseconds(1));
  if (rounded == absl::ZeroDuration()) return "0s";
  std::string text = absl::FormatDuration(rounded);  // leaves zeros out
  if (text.back() == 'h') text += "0m";
  return text.back() == 'm' ? text + "0s" : text;
}

}  // namespace

void TenantLimits::Bucket::Fill(absl::Time now) {
  const double minutes = absl::ToDoubleMinutes(now - at);
  level = std::min<double>(per_minute, level + minutes * per_minute);
  at = now;
}

absl::Duration TenantLimits::Bucket::Wait(double need) const {
  if (per_minute == 0 || level >= need) return absl::ZeroDuration();
  return absl::Minutes((need - level) / per_minute);
}

TenantLimits::TenantLimits(const GatewayConfig& config, const TenantTable& table, const Clock& clock,
                           MetricRegistry& metrics)
    : inflight_max_(config.max_inflight),
      clock_(clock),
      waiting_(metrics.AddGauge("tidepool_requests_waiting", "Admitted requests without a first token",
                                {{"role", "gateway"}, {"reason", "first_token"}})),
      waiting_tokens_(metrics.AddGauge("tidepool_gateway_waiting_prompt_tokens",
                                       "Prompt tokens of admitted requests without a first token")),
      drained_at_(clock.Now()) {
  SetBounds(config);
  Replace(table);
}

void TenantLimits::SetBounds(const GatewayConfig& config) {
  std::lock_guard lock(mu_);
  queued_max_ = config.max_queued_requests == 0 ? inflight_max_ : config.max_queued_requests;
  queued_tokens_max_ = config.max_queued_tokens;
}

void TenantLimits::Replace(const TenantTable& table) {
  std::lock_guard lock(mu_);
  table_ = table;
  std::set<std::string> names;
  for (const ApiKeyConfig& key : table.keys) names.insert(key.tenant);
  several_ = names.size() > 1;
  if (names.empty()) names.insert("default");  // nobody has a key: all are this one
  for (auto& [name, tenant] : tenants_) SetLimits(*tenant, table_.Settings(name).limits);
  // Those that hold nothing, and will begin anew if they come back.
  absl::erase_if(tenants_, [&](const auto& entry) {
    return entry.second->inflight == 0 && !names.contains(entry.first);
  });
}

void TenantLimits::SetLimits(Tenant& tenant, const TenantLimitsConfig& limits) const {
  const absl::Time now = clock_.Now();
  const auto set = [now](Bucket& bucket, uint32_t per_minute) {
    if (bucket.per_minute == per_minute) return;
    const bool fresh = bucket.per_minute == 0;
    if (!fresh) bucket.Fill(now);
    bucket.per_minute = per_minute;
    bucket.level = fresh ? per_minute : std::min<double>(bucket.level, per_minute);
    bucket.at = now;
  };
  tenant.limits = limits;
  set(tenant.requests, limits.requests_per_minute);
  set(tenant.tokens, limits.tokens_per_minute);
}

TenantLimits::Tenant& TenantLimits::Get(const std::string& name) {
  auto& tenant = tenants_[name];
  if (tenant == nullptr) {
    tenant = std::make_unique<Tenant>();
    SetLimits(*tenant, table_.Settings(name).limits);
  }
  return *tenant;
}

bool TenantLimits::Shared(uint64_t own, uint64_t total, uint64_t want, uint64_t max) const {
  // What is larger than the bound itself is taken where nothing is in its way.
  if (total == 0) return true;
  if (total + want > max) return false;
  return !several_ || own == 0 || own + want <= max - total;
}

uint32_t TenantLimits::DrainSeconds() const {
  const double decay = std::exp(-absl::FDivDuration(clock_.Now() - drained_at_, kDrainWindow));
  const double per_second = drained_ * decay / absl::ToDoubleSeconds(kDrainWindow);
  return Spread(static_cast<double>(queued_) / std::max(per_second, 1e-3));
}

ApiError TenantLimits::QueueFull(std::string message) const {
  return MakeRetryable(errors::kQueueFull, std::move(message), DrainSeconds());
}

std::variant<TenantLimits::Ticket, ApiError> TenantLimits::Admit(const std::string& name) {
  std::lock_guard lock(mu_);
  Tenant& tenant = Get(name);
  const TenantLimitsConfig& limits = tenant.limits;
  const absl::Time now = clock_.Now();
  tenant.requests.Fill(now);
  tenant.tokens.Fill(now);
  if (limits.requests_per_minute > 0 && tenant.requests.level < 1) {
    return MakeRetryable(errors::kRateLimited,
                         absl::StrCat("the limit of ", limits.requests_per_minute,
                                      " requests a minute is used up; wait or spread requests"),
                         Seconds(tenant.requests.Wait(1)));
  }
  if (limits.tokens_per_minute > 0 && tenant.tokens.level < 1) {
    return MakeRetryable(errors::kRateLimited,
                         absl::StrCat("the limit of ", limits.tokens_per_minute,
                                      " tokens a minute is used up; wait, or ask for less"),
                         Seconds(tenant.tokens.Wait(1)));
  }
  if (limits.max_inflight > 0 && tenant.inflight >= limits.max_inflight) {
    return MakeRetryable(errors::kTooManyRequests,
                         absl::StrCat("more than ", limits.max_inflight,
                                      " requests of this tenant are in flight; wait for one to end"),
                         Spread(1));
  }
  if (!Shared(tenant.inflight, inflight_, 1, inflight_max_)) {
    return MakeRetryable(
        errors::kTooManyRequests,
        inflight_ < inflight_max_
            ? "this tenant's share of the requests in flight is used up; wait for one to end"
            : absl::StrCat("more than ", inflight_max_, " requests are in flight; try again later"),
        Spread(1));
  }
  if (limits.max_queued_requests > 0 && tenant.queued + 1 > limits.max_queued_requests) {
    return QueueFull(absl::StrCat("more than ", limits.max_queued_requests,
                                  " requests of this tenant wait for their first token; try again later"));
  }
  if (!Shared(tenant.queued, queued_, 1, queued_max_)) {
    return QueueFull(absl::StrCat("too many requests wait for their first token (at most ", queued_max_,
                                  " of all tenants); try again later"));
  }
  tenant.requests.level -= limits.requests_per_minute > 0 ? 1 : 0;
  ++tenant.inflight;
  ++inflight_;
  ++tenant.queued;
  ++queued_;
  Publish();
  return Ticket(this, name, /*queued=*/true);
}

TenantLimits::Ticket TenantLimits::Join(const std::string& name) {
  std::lock_guard lock(mu_);
  ++Get(name).inflight;
  ++inflight_;
  return Ticket(this, name, /*queued=*/false);
}

std::optional<ApiError> TenantLimits::Ticket::TakePrompt(uint32_t tokens) {
  std::lock_guard lock(limits_->mu_);
  TenantLimits& all = *limits_;
  Tenant& tenant = all.Get(tenant_);
  const TenantLimitsConfig& limits = tenant.limits;
  if (limits.tokens_per_minute > 0) {
    tenant.tokens.Fill(all.clock_.Now());
    const double need = std::min(tokens, limits.tokens_per_minute);
    if (tenant.tokens.level < need) {
      return MakeRetryable(errors::kRateLimited,
                           absl::StrCat("the prompt's ", tokens, " tokens exceed what is left of ",
                                        limits.tokens_per_minute, " tokens a minute; wait, or shorten it"),
                           Seconds(tenant.tokens.Wait(need)));
    }
  }
  if (limits.max_queued_tokens > 0 && tenant.queued_tokens > 0 &&
      tenant.queued_tokens + tokens > limits.max_queued_tokens) {
    return all.QueueFull(
        absl::StrCat("more than ", limits.max_queued_tokens,
                     " prompt tokens of this tenant wait for a first token; try again later"));
  }
  if (!all.Shared(tenant.queued_tokens, all.queued_tokens_, tokens, all.queued_tokens_max_)) {
    return all.QueueFull(absl::StrCat("too many prompt tokens wait for a first token (at most ",
                                      all.queued_tokens_max_, " of all tenants); try again later"));
  }
  if (limits.tokens_per_minute > 0) tenant.tokens.level -= tokens;
  prompt_tokens_ = tokens;
  tenant.queued_tokens += tokens;
  all.queued_tokens_ += tokens;
  all.Publish();
  return std::nullopt;
}

void TenantLimits::Leave(Tenant& tenant, uint32_t prompt_tokens) {
  --tenant.queued;
  --queued_;
  tenant.queued_tokens -= prompt_tokens;
  queued_tokens_ -= prompt_tokens;
  const absl::Time now = clock_.Now();
  drained_ = drained_ * std::exp(-absl::FDivDuration(now - drained_at_, kDrainWindow)) + 1;
  drained_at_ = now;
  Publish();
}

void TenantLimits::Ticket::FirstToken() {
  if (!queued_) return;
  queued_ = false;
  std::lock_guard lock(limits_->mu_);
  limits_->Leave(limits_->Get(tenant_), prompt_tokens_);
}

void TenantLimits::Ticket::Release() {
  if (limits_ == nullptr) return;
  FirstToken();
  std::lock_guard lock(limits_->mu_);
  limits_->Get(tenant_).inflight -= 1;
  limits_->inflight_ -= 1;
  limits_ = nullptr;
}

void TenantLimits::Ticket::Steal(Ticket& other) {
  tenant_ = std::move(other.tenant_);
  prompt_tokens_ = other.prompt_tokens_;
  queued_ = other.queued_;
}

TenantLimits::Ticket& TenantLimits::Ticket::operator=(Ticket&& other) noexcept {
  if (this == &other) return *this;
  Release();
  limits_ = std::exchange(other.limits_, nullptr);
  Steal(other);
  return *this;
}

void TenantLimits::Spend(const std::string& name, uint32_t tokens) {
  if (tokens == 0) return;
  std::lock_guard lock(mu_);
  Tenant& tenant = Get(name);
  if (tenant.limits.tokens_per_minute == 0) return;
  tenant.tokens.Fill(clock_.Now());
  tenant.tokens.level -= tokens;
}

void TenantLimits::Publish() {
  waiting_.Set(static_cast<double>(queued_));
  waiting_tokens_.Set(static_cast<double>(queued_tokens_));
}

std::vector<std::pair<std::string, std::string>> TenantLimits::RateHeaders(const std::string& name) const {
  std::vector<std::pair<std::string, std::string>> headers;
  std::lock_guard lock(mu_);
  const auto it = tenants_.find(name);
  if (it == tenants_.end()) return headers;
  const auto add = [&](const std::string& what, Bucket bucket) {
    if (bucket.per_minute == 0) return;
    bucket.Fill(clock_.Now());
    headers.emplace_back("x-ratelimit-limit-" + what, absl::StrCat(bucket.per_minute));
    headers.emplace_back("x-ratelimit-remaining-" + what,
                         absl::StrCat(static_cast<int64_t>(std::max(0.0, std::floor(bucket.level)))));
    headers.emplace_back("x-ratelimit-reset-" + what, Reset(bucket.Wait(bucket.per_minute)));
  };
  add("requests", it->second->requests);
  add("tokens", it->second->tokens);
  return headers;
}

}  // namespace tidepool
