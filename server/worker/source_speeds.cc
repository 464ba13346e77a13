#include "server/worker/source_speeds.h"

#include <algorithm>
#include <array>
#include <cmath>

namespace tidepool {
namespace {

constexpr size_t kSourcesMax = 256;
constexpr absl::Duration kHalfLife = absl::Seconds(30);
constexpr uint32_t kFreeAttempts = 4;  // parts: two loads of two
constexpr double kMiB = 1 << 20;

// What a 10 Gbit/s network and an ordinary SSD do: latency, and seconds for a MiB.
constexpr std::array<double, 2> kNetwork = {3e-4, 1e-3};
constexpr std::array<double, 2> kDisk = {3e-4, 1e-3};
constexpr std::array<double, 2> kRemoteDisk = {6e-4, 2e-3};

std::array<double, 2> Features(uint64_t bytes) { return {1, static_cast<double>(bytes) / kMiB}; }

const std::array<double, 2>& FirstGuess(const SourceId& source) {
  if (source.tier != Tier::kDisk) return kNetwork;
  return source.worker.empty() ? kDisk : kRemoteDisk;
}

}  // namespace

SourceSpeeds::Speed SourceSpeeds::Of(const SourceId& source, absl::Time now) const {
  const std::array<double, 2>& guess = FirstGuess(source);
  std::array<double, 2> fit = guess;
  uint64_t queued = 0;
  {
    std::lock_guard lock(mu_);
    if (const auto it = sources_.find(source); it != sources_.end()) {
      queued = it->second.queued;
      if (it->second.fit.samples() > 0) {
        fit = it->second.fit.beta();
        const double kept = std::exp2(
            -absl::FDivDuration(std::max(now - it->second.measured, absl::ZeroDuration()), kHalfLife));
        for (size_t i = 0; i < 2; ++i)
          fit[i] = fit[i] > guess[i] ? guess[i] + (fit[i] - guess[i]) * kept : fit[i];
      }
    }
  }
  return {.latency_seconds = fit[0],
          .queued_seconds = fit[1] * static_cast<double>(queued) / kMiB,
          .seconds_per_byte = fit[1] / kMiB};
}

SourceSpeeds::Source& SourceSpeeds::Get(const SourceId& id, absl::Time now) {
  auto it = sources_.find(id);
  if (it == sources_.end()) {
    if (sources_.size() >= kSourcesMax) {
      sources_.erase(std::min_element(sources_.begin(), sources_.end(), [](const auto& a, const auto& b) {
        return a.second.asked < b.second.asked;
      }));
    }
    it = sources_.emplace(id, Source{.fit = LeastSquares<2>(FirstGuess(id)), .asked = now, .measured = now})
             .first;
  }
  return it->second;
}

SourceSpeeds::Ticket SourceSpeeds::Begin(const SourceId& source, uint64_t bytes, absl::Time now) {
  std::lock_guard lock(mu_);
  Source& s = Get(source, now);
  s.asked = now;
  s.queued += bytes;
  return {.source = source, .bytes = bytes, .queued = s.queued, .begun = now};
}

void SourceSpeeds::Forget(const Ticket& ticket) {
  const auto it = sources_.find(ticket.source);
  if (it != sources_.end()) it->second.queued -= std::min(it->second.queued, ticket.bytes);
}

void SourceSpeeds::End(const Ticket& ticket, uint64_t bytes, absl::Time now) {
  std::lock_guard lock(mu_);
  Forget(ticket);
  if (bytes == 0) return;
  Source& s = Get(ticket.source, now);
  // What did not arrive was not waited for either.
  const uint64_t work = ticket.queued - ticket.bytes + bytes;
  s.fit.Observe(Features(work), absl::ToDoubleSeconds(now - ticket.begun));
  s.given_up = 0;
  s.measured = now;
}

void SourceSpeeds::GiveUp(const Ticket& ticket, absl::Time now) {
  std::lock_guard lock(mu_);
  Forget(ticket);
  Source& s = Get(ticket.source, now);
  if (++s.given_up <= kFreeAttempts && s.fit.samples() == 0) return;
  const double took = absl::ToDoubleSeconds(now - ticket.begun);
  if (took <= s.fit.Predict(Features(ticket.queued))) return;
  s.fit.Observe(Features(ticket.queued), took);
  s.measured = now;
}

}  // namespace tidepool
