#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <utility>

namespace tidepool {

// LeastSquares<N>: fits y = sum_i beta_i * x_i, beta >= 0, online, by exponentially decayed normal equations
// with a ridge towards a prior. Errors count relatively (a sample weighs 1/(y * prediction)), so that a 2 ms
// sample says as much as a 2 s one. All that is known stays bounded: N*(N+1) numbers.
// Source: weighted recursive least squares with forgetting, e.g. Ljung, System Identification, 11.2.
template <size_t N>
class LeastSquares {
 public:
  using Vector = std::array<double, N>;

  // `prior`: positive. How fast it gives way: about after `kPriorSamples` samples in its direction.
  explicit LeastSquares(const Vector& prior) : prior_(prior), beta_(prior) {}

  double Predict(const Vector& x) const { return Dot(beta_, x); }

  // Ignores what cannot be a duration. Once warm, a sample is taken as at most kClamp times off the
  // prediction: one stall does not bend the fit, a lasting change still gets through in a few samples.
  void Observe(const Vector& x, double y) {
    if (!std::isfinite(y) || y <= 0) return;
    const double predicted = Predict(x);
    if (!(predicted > 0) || !std::isfinite(predicted)) return;
    const double relative = std::abs(predicted - y) / y;
    error_ = samples_ == 0 ? relative : error_ + kErrorGain * (std::min(relative, kErrorMax) - error_);
    if (samples_ >= kWarm) y = std::min(std::max(y, predicted / kClamp), predicted * kClamp);
    ++samples_;

    log_ratios_ = log_ratios_ * kDecay + std::log(y / Dot(prior_, x));
    log_weight_ = log_weight_ * kDecay + 1;
    const double w = 1 / (y * predicted);
    for (size_t i = 0; i < N; ++i) {
      for (size_t j = 0; j < N; ++j) a_[i][j] = a_[i][j] * kDecay + w * x[i] * x[j];
      b_[i] = b_[i] * kDecay + w * x[i] * y;
    }
    Solve();
  }

  const Vector& beta() const { return beta_; }
  size_t samples() const { return samples_; }
  // Decayed mean of |prediction - y| / y, each judged before it was learnt from; 0 before the first.
  double error() const { return error_; }

 private:
  static constexpr double kDecay = 0.98;  // the last 50 samples or so count
  static constexpr double kPriorSamples = 0.1;
  static constexpr size_t kWarm = 8;
  static constexpr double kClamp = 4;
  static constexpr double kErrorGain = 0.05;
  static constexpr double kErrorMax = 10;

  static double Dot(const Vector& a, const Vector& b) {
    double sum = 0;
    for (size_t i = 0; i < N; ++i) sum += a[i] * b[i];
    return sum;
  }

  // A negative coefficient is noise (no cost falls as work grows): it is pinned to 0 and the rest solved
  // again, at most N times.
  void Solve() {
    std::array<bool, N> pinned{};
    for (size_t round = 0; round <= N; ++round) {
      const Vector beta = SolveFree(pinned);
      size_t worst = N;
      for (size_t i = 0; i < N; ++i) {
        if (!std::isfinite(beta[i])) return;  // keep the last good fit
        if (beta[i] < 0 && (worst == N || beta[i] / prior_[i] < beta[worst] / prior_[worst])) worst = i;
      }
      if (worst == N) {
        beta_ = beta;
        return;
      }
      pinned[worst] = true;
    }
  }

  // Gaussian elimination with partial pivoting; pinned coefficients are 0.
  Vector SolveFree(const std::array<bool, N>& pinned) const {
    const double scale = std::exp(log_ratios_ / log_weight_);
    std::array<std::array<double, N + 1>, N> m{};
    for (size_t i = 0; i < N; ++i) {
      if (pinned[i]) {
        m[i][i] = 1;
        continue;
      }
      const double prior = prior_[i] * scale;
      const double ridge = kPriorSamples / (prior * prior);
      for (size_t j = 0; j < N; ++j) m[i][j] = pinned[j] ? 0 : a_[i][j];
      m[i][i] += ridge;
      m[i][N] = b_[i] + ridge * prior;
    }
    for (size_t c = 0; c < N; ++c) {
      size_t pivot = c;
      for (size_t r = c + 1; r < N; ++r)
        if (std::abs(m[r][c]) > std::abs(m[pivot][c])) pivot = r;
      std::swap(m[c], m[pivot]);
      for (size_t r = c + 1; r < N; ++r) {
        const double f = m[r][c] / m[c][c];
        for (size_t k = c; k <= N; ++k) m[r][k] -= f * m[c][k];
      }
    }
    Vector out{};
    for (size_t i = N; i-- > 0;) {
      double v = m[i][N];
      for (size_t k = i + 1; k < N; ++k) v -= m[i][k] * out[k];
      out[i] = v / m[i][i];
    }
    return out;
  }

  Vector prior_;
  Vector beta_;
  std::array<std::array<double, N>, N> a_{};
  Vector b_{};
  double log_ratios_ = 0;
  double log_weight_ = 0;
  size_t samples_ = 0;
  double error_ = 0;
};

}  // namespace tidepool
