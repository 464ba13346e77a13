#include "server/model/rope_scaling.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "absl/strings/str_format.h"

namespace tidepool {
namespace {

// The formulas are those of transformers' modeling_rope_utils.py, one function each, down to which steps
// round to float32.

// 1 / theta^(2i / dim)
std::vector<float> Plain(double theta, uint32_t dim) {
  std::vector<float> out(dim / 2);
  for (uint32_t i = 0; i < dim / 2; ++i) {
    const float exponent = static_cast<float>(2 * i) / static_cast<float>(dim);
    out[i] = 1.0f / static_cast<float>(std::pow(static_cast<float>(theta), exponent));
  }
  return out;
}

std::vector<float> Linear(const RopeSpec& r) {
  std::vector<float> out = Plain(r.theta, r.rotary_dim);
  for (float& f : out) f /= static_cast<float>(r.factor);
  return out;
}

// NTK-aware: a larger base instead of slower positions.
std::vector<float> Dynamic(const RopeSpec& r, uint32_t max_model_len) {
  const double length = std::max(max_model_len, r.original_max_positions);
  const double dim = r.rotary_dim;
  if (dim <= 2) return Plain(r.theta, r.rotary_dim);  // one frequency, 1 at any base
  const double stretch = r.factor * length / r.original_max_positions - (r.factor - 1);
  return Plain(r.theta * std::pow(stretch, dim / (dim - 2)), r.rotary_dim);
}

// arXiv:2309.00071: high frequencies stay, low ones are interpolated, with a ramp between them.
std::vector<float> Yarn(const RopeSpec& r) {
  const double dim = r.rotary_dim;
  const auto correction = [&](double rotations) {
    return dim * std::log(r.original_max_positions / (rotations * 2 * std::numbers::pi)) /
           (2 * std::log(r.theta));
  };
  double low = correction(r.beta_fast), high = correction(r.beta_slow);
  if (r.truncate) {
    low = std::floor(low);
    high = std::ceil(high);
  }
  low = std::max(low, 0.0);
  high = std::min(high, dim - 1);
  if (low == high) high += 0.001;
  std::vector<float> out(r.rotary_dim / 2);
  for (uint32_t i = 0; i < r.rotary_dim / 2; ++i) {
    const float exponent = static_cast<float>(2 * i) / static_cast<float>(r.rotary_dim);
    const float position = static_cast<float>(std::pow(static_cast<float>(r.theta), exponent));
    const float extrapolated = 1.0f / position;
    const float interpolated = 1.0f / (static_cast<float>(r.factor) * position);
    const float ramp = std::clamp(
        (static_cast<float>(i) - static_cast<float>(low)) / static_cast<float>(high - low), 0.0f, 1.0f);
    const float keep = 1.0f - ramp;
    out[i] = interpolated * (1.0f - keep) + extrapolated * keep;
  }
  return out;
}

// arXiv:2402.13753: a factor of its own for every frequency.
std::vector<float> Longrope(const RopeSpec& r, uint32_t max_model_len) {
  const std::vector<double>& factors =
      max_model_len > r.original_max_positions ? r.long_factor : r.short_factor;
  std::vector<float> out(r.rotary_dim / 2);
  for (uint32_t i = 0; i < r.rotary_dim / 2; ++i) {
    const float exponent = static_cast<float>(2 * i) / static_cast<float>(r.rotary_dim);
    const float position = static_cast<float>(std::pow(static_cast<float>(r.theta), exponent));
    out[i] = 1.0f / (static_cast<float>(factors[i]) * position);
  }
  return out;
}

// Long waves are stretched by the factor, short ones stay, with a ramp between them (Llama 3.1).
std::vector<float> Llama3(const RopeSpec& r) {
  const float low_wavelength = static_cast<float>(r.original_max_positions / r.low_freq_factor);
  const float high_wavelength = static_cast<float>(r.original_max_positions / r.high_freq_factor);
  const float factor = static_cast<float>(r.factor);
  std::vector<float> out = Plain(r.theta, r.rotary_dim);
  for (float& f : out) {
    const float wavelength = static_cast<float>(2 * std::numbers::pi) / f;
    if (wavelength > low_wavelength) {
      f /= factor;
    } else if (!(wavelength < high_wavelength)) {
      const float smooth = (static_cast<float>(r.original_max_positions) / wavelength -
                            static_cast<float>(r.low_freq_factor)) /
                           static_cast<float>(r.high_freq_factor - r.low_freq_factor);
      f = (1.0f - smooth) * f / factor + smooth * f;
    }
  }
  return out;
}

}  // namespace

std::string_view RopeTypeName(RopeType type) {
  switch (type) {
    case RopeType::kDefault:
      return "default";
    case RopeType::kLinear:
      return "linear";
    case RopeType::kDynamic:
      return "dynamic";
    case RopeType::kYarn:
      return "yarn";
    case RopeType::kLongrope:
      return "longrope";
    case RopeType::kLlama3:
      return "llama3";
  }
  return "default";
}

std::vector<float> RopeFrequencies(const RopeSpec& rope, uint32_t max_model_len) {
  switch (rope.type) {
    case RopeType::kDefault:
      break;
    case RopeType::kLinear:
      return Linear(rope);
    case RopeType::kDynamic:
      return Dynamic(rope, max_model_len);
    case RopeType::kYarn:
      return Yarn(rope);
    case RopeType::kLongrope:
      return Longrope(rope, max_model_len);
    case RopeType::kLlama3:
      return Llama3(rope);
  }
  return Plain(rope.theta, rope.rotary_dim);
}

std::string RopeSummary(const RopeSpec& rope) {
  std::string out = absl::StrFormat("%s, theta %g", std::string(RopeTypeName(rope.type)), rope.theta);
  if (rope.type != RopeType::kDefault && rope.type != RopeType::kLongrope) {
    absl::StrAppendFormat(&out, ", factor %g", rope.factor);
  }
  if (rope.type == RopeType::kYarn || rope.type == RopeType::kLongrope || rope.type == RopeType::kLlama3) {
    absl::StrAppendFormat(&out, ", trained on %d", rope.original_max_positions);
  }
  return out;
}

}  // namespace tidepool
