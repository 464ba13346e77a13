#include "server/bench/arrivals.h"

#include "server/bench/random.h"

namespace tidepool {

absl::StatusOr<ArrivalSpec::Kind> ParseArrivalKind(std::string_view name) {
  for (const auto kind :
       {ArrivalSpec::Kind::kPoisson, ArrivalSpec::Kind::kConstant, ArrivalSpec::Kind::kGamma}) {
    if (name == ArrivalName(kind)) return kind;
  }
  return absl::InvalidArgumentError("'" + std::string(name) + "' is not poisson, constant or gamma");
}

std::string_view ArrivalName(ArrivalSpec::Kind kind) {
  switch (kind) {
    case ArrivalSpec::Kind::kPoisson:
      return "poisson";
    case ArrivalSpec::Kind::kConstant:
      return "constant";
    case ArrivalSpec::Kind::kGamma:
      return "gamma";
  }
  return "";
}

absl::Duration Arrivals::Next() {
  switch (spec_.kind) {
    case ArrivalSpec::Kind::kConstant:
      // Counted, not summed: no drift.
      return absl::Seconds(static_cast<double>(count_++) / spec_.rate);
    case ArrivalSpec::Kind::kPoisson:
      at_seconds_ += DrawExponential(rng_) / spec_.rate;
      break;
    case ArrivalSpec::Kind::kGamma:
      at_seconds_ += DrawGamma(rng_, spec_.burstiness) / spec_.burstiness / spec_.rate;
      break;
  }
  return absl::Seconds(at_seconds_);
}

}  // namespace tidepool
