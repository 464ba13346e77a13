#include "server/worker/answer_lengths.h"

#include <algorithm>

namespace tidepool {

void AnswerLengths::Observe(const std::string& tenant, uint32_t tokens) {
  std::lock_guard lock(mu_);
  lengths_.Observe(tenant, "", std::max(1u, tokens));
}

std::optional<uint32_t> AnswerLengths::High(const std::string& tenant) const {
  PlaceRequest request;
  request.tenant = tenant;
  std::lock_guard lock(mu_);
  const LengthPrediction prediction = lengths_.Predict(request);
  if (!prediction.learnt) return std::nullopt;
  return prediction.high;
}

}  // namespace tidepool
