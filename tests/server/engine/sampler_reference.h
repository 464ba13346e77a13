#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <numeric>
#include <set>
#include <span>
#include <vector>

#include "server/engine/sampler.h"

namespace tidepool {

// The sampler's contract (server/engine/sampler.h), read line by line: plain, slow, in double. Gives the
// probability of each id, zeros included.
inline std::vector<double> ReferenceDistribution(std::vector<double> l, const SamplingParams& p,
                                                 const std::vector<int32_t>& prompt = {},
                                                 const std::vector<int32_t>& outputs = {},
                                                 const std::vector<int32_t>& banned = {}) {
  constexpr double kInf = std::numeric_limits<double>::infinity();
  const size_t n = l.size();
  if (!p.allowed_token_ids.empty()) {
    const std::set<int32_t> allowed(p.allowed_token_ids.begin(), p.allowed_token_ids.end());
    for (size_t i = 0; i < n; ++i) {
      if (!allowed.contains(static_cast<int32_t>(i))) l[i] = -kInf;
    }
  }
  for (const auto& word : p.bad_words) {
    const std::vector<int32_t> before(word.begin(), word.end() - 1);
    if (outputs.size() < before.size()) continue;
    if (std::vector<int32_t>(outputs.end() - static_cast<std::ptrdiff_t>(before.size()), outputs.end()) ==
        before) {
      l[word.back()] = -kInf;
    }
  }
  for (int32_t id : banned) l[id] = -kInf;
  for (const LogitBias& b : p.logit_bias) l[b.id] += b.bias;
  std::map<int32_t, int> count;
  for (int32_t id : prompt) count[id] += 0;
  for (int32_t id : outputs) ++count[id];
  for (const auto& [id, times] : count) {
    l[id] = l[id] > 0 ? l[id] / p.repetition_penalty : l[id] * p.repetition_penalty;
    l[id] -= double{p.frequency_penalty} * times;
    if (times > 0) l[id] -= p.presence_penalty;
  }

  std::vector<size_t> order(n);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return l[a] > l[b]; });
  std::vector<double> q(n, 0.0);
  if (p.temperature < 1e-5f) {
    q[order[0]] = 1;
    return q;
  }
  const double max = l[order[0]];
  std::vector<double> w(n);
  for (size_t i = 0; i < n; ++i) w[i] = std::exp((l[i] - max) / p.temperature);
  for (double& x : w) {
    if (x < p.min_p) x = 0;
  }
  if (p.top_k > 0) {
    for (size_t r = static_cast<size_t>(p.top_k); r < n; ++r) w[order[r]] = 0;
  }
  auto sum = [&] { return std::accumulate(w.begin(), w.end(), 0.0); };
  if (p.top_p < 1) {
    const double target = p.top_p * sum();
    double kept = 0;
    for (size_t i : order) {
      if (kept >= target) {
        w[i] = 0;
      } else {
        kept += w[i];
      }
    }
  }
  if (p.typical_p < 1) {
    const double total = sum();
    double entropy = 0;
    for (double x : w) entropy -= x > 0 ? x / total * std::log(x / total) : 0;
    std::vector<size_t> by_distance;
    for (size_t i = 0; i < n; ++i) {
      if (w[i] > 0) by_distance.push_back(i);
    }
    auto distance = [&](size_t i) { return std::abs(-std::log(w[i] / total) - entropy); };
    std::vector<double> distances(n);
    for (size_t i : by_distance) distances[i] = distance(i);
    std::stable_sort(by_distance.begin(), by_distance.end(),
                     [&](size_t a, size_t b) { return distances[a] < distances[b]; });
    double kept = 0;
    for (size_t i : by_distance) {
      if (kept >= p.typical_p * total) {
        w[i] = 0;
      } else {
        kept += w[i];
      }
    }
  }
  const double total = sum();
  for (size_t i = 0; i < n; ++i) q[i] = w[i] / total;
  return q;
}

}  // namespace tidepool
