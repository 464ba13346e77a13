#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"
#include "base/rng.h"

namespace tidepool {

// Draws from an Rng, the same on every machine and compiler (those of <random> are not).
double DrawNormal(Rng& rng);       // mean 0, standard deviation 1
double DrawExponential(Rng& rng);  // mean 1
// Mean `shape`, variance `shape`; shape > 0.
double DrawGamma(Rng& rng, double shape);

// LengthSpec: a distribution of token counts.
//   128                     always that
//   64-256                  uniform, both ends included
//   normal:128,32           mean and standard deviation
//   lognormal:128,0.8       median, and the standard deviation of the logarithm
//   exponential:128         mean
// Any may be followed by "@MIN-MAX", which draws are clamped to; without it, to 1 and kTokensMax.
class LengthSpec {
 public:
  static constexpr uint32_t kTokensMax = 10'000'000;

  static absl::StatusOr<LengthSpec> Parse(std::string_view text);
  static LengthSpec Fixed(uint32_t tokens);

  uint32_t Draw(Rng& rng) const;
  const std::string& text() const { return text_; }

 private:
  enum class Kind { kUniform, kNormal, kLogNormal, kExponential };

  Kind kind_ = Kind::kUniform;
  double a_ = 0, b_ = 0;
  uint32_t min_ = 1, max_ = kTokensMax;
  std::string text_;
};

}  // namespace tidepool
