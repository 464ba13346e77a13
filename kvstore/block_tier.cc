#include "kvstore/block_tier.h"

#include <utility>

namespace tidepool {

std::string_view TierStateName(TierState state) {
  switch (state) {
    case TierState::kOpening:
      return "opening";
    case TierState::kOn:
      return "on";
    case TierState::kOff:
      return "off";
  }
  return "unknown";
}

void BlockTier::Compress(const BlockKey&, CompressDone done) {
  done(absl::FailedPreconditionError(caps().name + " tier: it has no shorter form of a block"));
}

std::optional<BlockKey> BlockTier::NextVictim(size_t) const { return std::nullopt; }

BlockTier::Predicate EveryBlock() {
  return [](const TierEntry&) { return true; };
}
BlockTier::Predicate BlocksOfTenant(std::string tenant) {
  return [tenant = std::move(tenant)](const TierEntry& e) { return e.tenant == tenant; };
}
BlockTier::Predicate BlocksOfSession(uint64_t session) {
  return [session](const TierEntry& e) { return e.session == session; };
}

}  // namespace tidepool
