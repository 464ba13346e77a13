#include "server/bench/random.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_split.h"
#include "base/status.h"

namespace tidepool {
namespace {

// Uniform in (0, 1]: its logarithm is finite.
double Positive(Rng& rng) { return 1.0 - rng.Uniform(); }

bool ParseNumber(std::string_view text, double& out) {
  return absl::SimpleAtod(absl::string_view(text.data(), text.size()), &out) && std::isfinite(out);
}

// "A-B" or "A".
bool ParseRange(std::string_view text, double& low, double& high) {
  const size_t dash = text.find('-');
  if (dash == text.npos) return ParseNumber(text, low) && (high = low, true);
  return ParseNumber(text.substr(0, dash), low) && ParseNumber(text.substr(dash + 1), high);
}

bool IsCount(double x, double min) { return x >= min && x <= LengthSpec::kTokensMax && x == std::floor(x); }

}  // namespace

// Box and Muller, 1958; the second of the pair is not kept, so that a draw depends on nothing before it but
// the generator's state.
double DrawNormal(Rng& rng) {
  const double radius = std::sqrt(-2 * std::log(Positive(rng)));
  return radius * std::cos(2 * std::numbers::pi * rng.Uniform());
}

double DrawExponential(Rng& rng) { return -std::log(Positive(rng)); }

// Marsaglia and Tsang, "A simple method for generating gamma variables", 2000.
double DrawGamma(Rng& rng, double shape) {
  if (shape < 1) return DrawGamma(rng, shape + 1) * std::pow(Positive(rng), 1 / shape);
  const double d = shape - 1.0 / 3;
  const double c = 1 / std::sqrt(9 * d);
  while (true) {
    const double x = DrawNormal(rng);
    const double v = std::pow(1 + c * x, 3);
    if (v <= 0) continue;
    if (std::log(Positive(rng)) < x * x / 2 + d - d * v + d * std::log(v)) return d * v;
  }
}

LengthSpec LengthSpec::Fixed(uint32_t tokens) {
  LengthSpec spec;
  spec.a_ = spec.b_ = tokens;
  spec.min_ = std::min(tokens, 1u);
  spec.text_ = std::to_string(tokens);
  return spec;
}

absl::StatusOr<LengthSpec> LengthSpec::Parse(std::string_view text) {
  const auto bad = [&](std::string_view why) {
    return absl::InvalidArgumentError("'" + std::string(text) + "' " + std::string(why) +
                                      "; write 128, 64-256, normal:128,32, lognormal:128,0.8 or "
                                      "exponential:128, with @MIN-MAX after it to clamp");
  };
  LengthSpec spec;
  spec.text_ = std::string(text);
  std::string_view body = text;
  if (const size_t at = body.find('@'); at != body.npos) {
    double low = 0, high = 0;
    if (!ParseRange(body.substr(at + 1), low, high) || !IsCount(low, 1) || !IsCount(high, low)) {
      return bad("has a bad MIN-MAX");
    }
    spec.min_ = static_cast<uint32_t>(low);
    spec.max_ = static_cast<uint32_t>(high);
    body = body.substr(0, at);
  }
  const size_t colon = body.find(':');
  if (colon == body.npos) {
    if (!ParseRange(body, spec.a_, spec.b_) || !IsCount(spec.a_, 1) || !IsCount(spec.b_, spec.a_)) {
      return bad("is not a length");
    }
    return spec;
  }
  const std::string_view name = body.substr(0, colon);
  std::vector<double> numbers;
  const std::string_view list = body.substr(colon + 1);
  for (const auto part : absl::StrSplit(absl::string_view(list.data(), list.size()), ',')) {
    double number = 0;
    if (!ParseNumber({part.data(), part.size()}, number)) return bad("has something else than numbers");
    numbers.push_back(number);
  }
  size_t wanted = 2;
  if (name == "normal") {
    spec.kind_ = Kind::kNormal;
  } else if (name == "lognormal") {
    spec.kind_ = Kind::kLogNormal;
  } else if (name == "exponential") {
    spec.kind_ = Kind::kExponential;
    wanted = 1;
  } else {
    return bad("names no distribution");
  }
  if (numbers.size() != wanted) return bad("has the wrong number of parameters");
  spec.a_ = numbers[0];
  spec.b_ = wanted == 2 ? numbers[1] : 0;
  if (spec.a_ <= 0 || spec.a_ > kTokensMax || spec.b_ < 0 || spec.b_ > kTokensMax) {
    return bad("has a parameter out of range");
  }
  return spec;
}

uint32_t LengthSpec::Draw(Rng& rng) const {
  double x = 0;
  switch (kind_) {
    case Kind::kUniform:
      x = a_ + static_cast<double>(rng.Below(static_cast<uint64_t>(b_ - a_) + 1));
      break;
    case Kind::kNormal:
      x = std::round(a_ + b_ * DrawNormal(rng));
      break;
    case Kind::kLogNormal:
      x = std::round(a_ * std::exp(b_ * DrawNormal(rng)));
      break;
    case Kind::kExponential:
      x = std::round(a_ * DrawExponential(rng));
      break;
  }
  return static_cast<uint32_t>(std::clamp<double>(x, min_, max_));
}

}  // namespace tidepool
