#pragma once

#include <array>
#include <cstdint>

#include "scheduler/least_squares.h"
#include "scheduler/types.h"

namespace tidepool {

// LatencyModel: how long things take on one worker, fitted online to what it measured. Seconds.
//
//   prefill(new, cached)   = a + b*new + c*new*(cached + new/2)    linear layers; attention over what
//   precedes decode step(batch, ctx) = a + b*batch + c*ctx                  weights; linear layers; KV read
//   fetch(bytes, from)     = latency + bytes/bandwidth            one fit for each kind of source
//
// The prefill form is Mooncake's T ~ l(a*n^2*d + b*n*d^2) (arXiv:2407.00079) with a cached prefix. All
// predictions are positive and rise with their arguments. Not thread-safe.
class LatencyModel {
 public:
  LatencyModel();

  void Observe(const PrefillSample& s);
  void Observe(const DecodeSample& s);
  void Observe(const FetchSample& s);

  double PrefillSeconds(uint64_t new_tokens, uint64_t cached_tokens) const;
  // Of `tokens` queued prompt tokens in `jobs` requests whose prefixes are not known any more.
  double QueueSeconds(uint64_t tokens, uint64_t jobs) const;
  double DecodeStepSeconds(uint64_t batch, uint64_t context_tokens) const;
  double FetchSeconds(uint64_t bytes, FetchFrom from = FetchFrom::kPeerHost) const;
  // 0: FetchSeconds is a guess.
  size_t fetch_samples(FetchFrom from) const { return fetch_[static_cast<size_t>(from)].samples(); }

  // Decayed mean relative error of predictions made before each sample; 0 before the first.
  double prefill_error() const { return prefill_.error(); }
  double decode_error() const { return decode_.error(); }
  double fetch_error() const { return fetch_[0].error(); }

 private:
  LeastSquares<3> prefill_;
  LeastSquares<3> decode_;
  std::array<LeastSquares<2>, kFetchSources> fetch_;  // by FetchFrom
};

}  // namespace tidepool
