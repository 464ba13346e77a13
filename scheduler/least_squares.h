#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <utility>

namespace tidepool {

// LeastSquares<N>: fits y = sum_i beta_i * x_i, beta >= 0, online, by exponentially decayed normal equations
// with a ridge towards an anchor. Errors count relatively (a sample weighs 1/(y * prediction)), so that a 2
// ms sample says as much as a 2 s one. All that is known stays bounded: N*(N+3) numbers.
//
// The anchor is the prior at first, as a whole as much slower or faster as the samples are, and follows the
// fit at a distance. So it gives way where samples say something, however far the truth is from the prior;
// what they do not tell apart (all of one length, say) keeps the proportions that it had; and what was learnt
// of other work outlasts samples of one kind, long after those that it was learnt from have decayed.
//
// Sources: weighted recursive least squares with forgetting, e.g. Ljung, System Identification, 11.2; a ridge
// whose centre follows is the proximal point method (Rockafellar, 1976), which ends at the unbiased fit.
template <size_t N>
class LeastSquares {
 public:
  using Vector = std::array<double, N>;

  // `prior`: positive.
  explicit LeastSquares(const Vector& prior) : prior_(prior), anchor_(prior), beta_(prior) {}

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

    const double w = 1 / (y * predicted);
    for (size_t i = 0; i < N; ++i) {
      for (size_t j = 0; j < N; ++j) a_[i][j] = a_[i][j] * kDecay + w * x[i] * x[j];
      b_[i] = b_[i] * kDecay + w * x[i] * y;
    }
    const double scale = AnchorScale();
    if (!(scale > 0) || !std::isfinite(scale)) return;
    Solve(scale);
    for (size_t i = 0; i < N; ++i) anchor_[i] += kAnchorGain * (beta_[i] / scale - anchor_[i]);
  }

  const Vector& beta() const { return beta_; }
  size_t samples() const { return samples_; }
  // Decayed mean of |prediction - y| / y, each judged before it was learnt from; 0 before the first.
  double error() const { return error_; }

 private:
  static constexpr double kDecay = 0.98;  // the last 50 samples or so count
  // What the anchor weighs, in samples, while a coefficient is all of a prediction.
  static constexpr double kAnchorSamples = 0.01;
  static constexpr double kAnchorGain = 0.02;
  static constexpr size_t kWarm = 8;
  static constexpr double kClamp = 4;
  static constexpr double kErrorGain = 0.05;
  static constexpr double kErrorMax = 10;

  static double Dot(const Vector& a, const Vector& b) {
    double sum = 0;
    for (size_t i = 0; i < N; ++i) sum += a[i] * b[i];
    return sum;
  }

  // The multiple of the anchor that fits best.
  double AnchorScale() const {
    double along = 0, square = 0;
    for (size_t i = 0; i < N; ++i) {
      along += anchor_[i] * b_[i];
      for (size_t j = 0; j < N; ++j) square += anchor_[i] * a_[i][j] * anchor_[j];
    }
    return along / square;
  }

  // A negative coefficient is noise (no cost falls as work grows): it is pinned to 0 and the rest solved
  // again, at most N times.
  void Solve(double scale) {
    std::array<bool, N> pinned{};
    for (size_t round = 0; round <= N; ++round) {
      const Vector beta = SolveFree(pinned, scale);
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
  Vector SolveFree(const std::array<bool, N>& pinned, double scale) const {
    std::array<std::array<double, N + 1>, N> m{};
    for (size_t i = 0; i < N; ++i) {
      if (pinned[i]) {
        m[i][i] = 1;
        continue;
      }
      const double anchor = anchor_[i] * scale;
      // One that is almost 0 holds nothing there: the prior is as much as a coefficient may always move.
      const double size = std::max(anchor_[i], prior_[i]) * scale;
      const double ridge = kAnchorSamples / (size * size);
      for (size_t j = 0; j < N; ++j) m[i][j] = pinned[j] ? 0 : a_[i][j];
      m[i][i] += ridge;
      m[i][N] = b_[i] + ridge * anchor;
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
  Vector anchor_;
  Vector beta_;
  std::array<std::array<double, N>, N> a_{};
  Vector b_{};
  size_t samples_ = 0;
  double error_ = 0;
};

}  // namespace tidepool
