#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <list>
#include <string>

#include "absl/container/flat_hash_map.h"
#include "scheduler/types.h"

namespace tidepool {

// How many tokens an answer will have. Not clamped by max_tokens.
struct LengthPrediction {
  uint32_t mean = 0;    // what time is planned with
  uint32_t median = 0;  // half of the answers are at most this long
  uint32_t high = 0;    // 9 of 10 are: what memory is planned with
  bool learnt = false;  // from answers; else it is a guess for all
};

// LengthPredictor: `predict_len`. Not thread-safe.
class LengthPredictor {
 public:
  virtual ~LengthPredictor() = default;
  virtual LengthPrediction Predict(const PlaceRequest& request) const = 0;
  // A request of this tenant and route ended by itself after so many tokens (>= 1).
  virtual void Observe(const std::string& tenant, const std::string& route, uint32_t output_tokens) = 0;
};

// LengthQuantiles: quantiles of the answers that ended, for each (tenant, route); of all answers where there
// are fewer than kEnough of these; the prior for everything where there are fewer of those, too. Old answers
// count less (all are halved every kWindow). Bounded: `max_routes` pairs of about 0.4 KB, the longest unused
// one gives way. Source of the idea: S^3 and ALISE plan by predicted length (ALGORITHMS: quantiles first).
class LengthQuantiles : public LengthPredictor {
 public:
  static constexpr uint32_t kEnough = 20;
  static constexpr uint32_t kWindow = 1000;

  explicit LengthQuantiles(uint32_t prior, size_t max_routes = 4096)
      : prior_(prior), max_routes_(max_routes) {}

  LengthPrediction Predict(const PlaceRequest& request) const override;
  void Observe(const std::string& tenant, const std::string& route, uint32_t output_tokens) override;

  size_t routes() const { return routes_.size(); }

 private:
  // Four buckets an octave up to 2^20 tokens: quantiles are at most 19% off.
  static constexpr size_t kBuckets = 77;
  struct Histogram {
    std::array<float, kBuckets> counts{};
    float total = 0;
    double sum = 0;
    LengthPrediction prediction;  // of these counts

    void Add(uint32_t tokens);
    uint32_t Quantile(double q) const;
  };
  struct Route {
    Histogram lengths;
    std::list<std::string>::iterator used;
  };

  const uint32_t prior_;
  const size_t max_routes_;
  Histogram all_;
  absl::flat_hash_map<std::string, Route> routes_;  // by tenant, NUL, route
  std::list<std::string> by_use_;                   // their keys, the latest first
};

}  // namespace tidepool
