#include "server/cluster/scheduler_locator.h"

#include <string_view>

#include "absl/strings/numbers.h"

namespace tidepool {

void AddSchedulerTerm(grpc::ClientContext& context, uint64_t term) {
  if (term != 0) context.AddMetadata(kSchedulerTermHeader, std::to_string(term));
}

uint64_t SchedulerTermOf(const grpc::ServerContextBase& context) {
  const auto& metadata = context.client_metadata();
  const auto it = metadata.find(kSchedulerTermHeader);
  uint64_t term = 0;
  if (it == metadata.end() ||
      !absl::SimpleAtoi(absl::string_view(it->second.data(), it->second.size()), &term))
    return 0;
  return term;
}

}  // namespace tidepool
