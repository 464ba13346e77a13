#pragma once

#include <optional>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "base/rng.h"

namespace tidepool {

// How requests arrive, where a trace does not say it.
struct ArrivalSpec {
  enum class Kind { kPoisson, kConstant, kGamma };

  Kind kind = Kind::kPoisson;
  double rate = 0;  // requests a second; 0: as fast as the concurrency cap lets them (closed loop)
  // Gamma's shape, as in vLLM: gaps have the coefficient of variation 1 / sqrt(burstiness), so that 1 is
  // Poisson, less is burstier, more is more even.
  double burstiness = 1;
};

// "poisson", "constant" or "gamma".
absl::StatusOr<ArrivalSpec::Kind> ParseArrivalKind(std::string_view name);
std::string_view ArrivalName(ArrivalSpec::Kind kind);

// Arrivals: Core; the planned times of an open loop, from the run's start on. spec.rate > 0.
class Arrivals {
 public:
  Arrivals(const ArrivalSpec& spec, uint64_t seed) : spec_(spec), rng_(seed) {}

  // Never less than the one before. The first comes one gap after the start, but with constant arrivals at
  // once.
  absl::Duration Next();

 private:
  const ArrivalSpec spec_;
  Rng rng_;
  double at_seconds_ = 0;
  uint64_t count_ = 0;
};

}  // namespace tidepool
