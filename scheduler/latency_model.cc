#include "scheduler/latency_model.h"

#include <algorithm>
#include <array>

namespace tidepool {

namespace {

// Features are scaled so that coefficients are seconds of a typical piece of work.
constexpr double kTokens = 512;
constexpr double kPairs = 512.0 * 4096;
constexpr double kBatch = 16;
constexpr double kContext = 8192;
constexpr double kMiB = 1 << 20;

// Until a worker has measured: a mid-sized model on one accelerator (about 5k tokens/s of prefill, 20 ms
// steps) over a 1 GB/s link. Only ratios matter for placement, and the first samples replace them.
constexpr std::array<double, 3> kPrefillPrior = {2e-3, 0.1, 0.02};
constexpr std::array<double, 3> kDecodePrior = {0.015, 2e-3, 2e-3};
constexpr std::array<double, 2> kFetchPrior = {1e-3, 1e-3};
// An SSD of 500 MB/s: what a slow one reads. Remotely the link comes on top.
constexpr std::array<double, 2> kDiskPrior = {1e-3, 2e-3};
constexpr std::array<double, 2> kPeerDiskPrior = {2e-3, 3e-3};

std::array<double, 3> PrefillFeatures(uint64_t new_tokens, uint64_t cached_tokens) {
  const auto n = static_cast<double>(new_tokens);
  return {1, n / kTokens, n * (static_cast<double>(cached_tokens) + n / 2) / kPairs};
}
std::array<double, 3> DecodeFeatures(uint64_t batch, uint64_t context_tokens) {
  return {1, static_cast<double>(batch) / kBatch, static_cast<double>(context_tokens) / kContext};
}
std::array<double, 2> FetchFeatures(uint64_t bytes) { return {1, static_cast<double>(bytes) / kMiB}; }

}  // namespace

LatencyModel::LatencyModel()
    : prefill_(kPrefillPrior),
      decode_(kDecodePrior),
      fetch_{LeastSquares<2>(kFetchPrior), LeastSquares<2>(kPeerDiskPrior), LeastSquares<2>(kDiskPrior)} {}

void LatencyModel::Observe(const PrefillSample& s) {
  if (s.new_tokens > 0) prefill_.Observe(PrefillFeatures(s.new_tokens, s.cached_tokens), s.seconds);
}
void LatencyModel::Observe(const DecodeSample& s) {
  if (s.batch > 0) decode_.Observe(DecodeFeatures(s.batch, s.context_tokens), s.seconds);
}
void LatencyModel::Observe(const FetchSample& s) {
  if (s.bytes > 0) fetch_[static_cast<size_t>(s.from)].Observe(FetchFeatures(s.bytes), s.seconds);
}

double LatencyModel::PrefillSeconds(uint64_t new_tokens, uint64_t cached_tokens) const {
  return new_tokens == 0 ? 0 : prefill_.Predict(PrefillFeatures(new_tokens, cached_tokens));
}

double LatencyModel::QueueSeconds(uint64_t tokens, uint64_t jobs) const {
  if (tokens == 0) return 0;
  // Equal shares: the best guess, and the least attention work that so many tokens can have.
  const uint64_t each = tokens / std::max<uint64_t>(jobs, 1);
  return static_cast<double>(std::max<uint64_t>(jobs, 1)) * PrefillSeconds(std::max<uint64_t>(each, 1), 0);
}

double LatencyModel::DecodeStepSeconds(uint64_t batch, uint64_t context_tokens) const {
  return batch == 0 ? 0 : decode_.Predict(DecodeFeatures(batch, context_tokens));
}

double LatencyModel::FetchSeconds(uint64_t bytes, FetchFrom from) const {
  return bytes == 0 ? 0 : fetch_[static_cast<size_t>(from)].Predict(FetchFeatures(bytes));
}

}  // namespace tidepool
