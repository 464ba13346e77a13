#include "scheduler/predict_len.h"

#include <algorithm>
#include <bit>
#include <cmath>

namespace tidepool {

namespace {

constexpr uint32_t kTokensMax = 1u << 20;

// The lower end of an octave's quarter: 1, 2, 3, then 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, ...
size_t Bucket(uint32_t tokens) {
  if (tokens < 4) return tokens;
  const auto octave = static_cast<uint32_t>(std::bit_width(tokens)) - 1;
  return octave * 4 - 4 + ((tokens >> (octave - 2)) & 3);
}
// The largest length in a bucket.
uint32_t Top(size_t bucket) {
  const auto begin = [](size_t b) {
    return b < 4 ? static_cast<uint32_t>(b) : (4 + static_cast<uint32_t>(b) % 4) << (b / 4 - 1);
  };
  return begin(bucket + 1) - 1;
}

std::string RouteKey(const std::string& tenant, const std::string& route) {
  std::string key;
  key.reserve(tenant.size() + 1 + route.size());
  key += tenant;
  key += '\0';
  key += route;
  return key;
}

}  // namespace

void LengthQuantiles::Histogram::Add(uint32_t tokens) {
  tokens = std::clamp(tokens, 1u, kTokensMax);
  if (total >= kWindow) {
    for (float& c : counts) c /= 2;
    total /= 2;
    sum /= 2;
  }
  counts[Bucket(tokens)] += 1;
  total += 1;
  sum += tokens;
  prediction = {.mean = std::max(1u, static_cast<uint32_t>(std::lround(sum / total))),
                .median = Quantile(0.5),
                .high = Quantile(0.9),
                .learnt = true};
}

uint32_t LengthQuantiles::Histogram::Quantile(double q) const {
  double below = 0;
  for (size_t b = 0; b < kBuckets; ++b) {
    below += counts[b];
    if (counts[b] > 0 && below >= q * total) return std::max(1u, Top(b));
  }
  return kTokensMax;
}

LengthPrediction LengthQuantiles::Predict(const PlaceRequest& request) const {
  const auto it = routes_.find(RouteKey(request.tenant, request.route));
  if (it != routes_.end() && it->second.lengths.total >= kEnough) return it->second.lengths.prediction;
  if (all_.total >= kEnough) return all_.prediction;
  return {.mean = prior_, .median = prior_, .high = prior_};
}

void LengthQuantiles::Observe(const std::string& tenant, const std::string& route, uint32_t output_tokens) {
  all_.Add(output_tokens);
  std::string key = RouteKey(tenant, route);
  auto it = routes_.find(key);
  if (it == routes_.end()) {
    if (routes_.size() >= max_routes_) {
      routes_.erase(by_use_.back());
      by_use_.pop_back();
    }
    by_use_.push_front(key);
    it = routes_.emplace(std::move(key), Route{.used = by_use_.begin()}).first;
  } else {
    by_use_.splice(by_use_.begin(), by_use_, it->second.used);
  }
  it->second.lengths.Add(output_tokens);
}

}  // namespace tidepool
