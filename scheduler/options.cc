#include "scheduler/options.h"

namespace tidepool {

namespace {

constexpr std::array<std::string_view, kPlacementPolicies> kPlacements = {
    "tidepool",    "random",      "round-robin", "least-loaded", "power-of-two",
    "prefix-only", "cache-aware", "dynamo",      "mooncake"};
constexpr std::array<std::string_view, kAdmissionPolicies> kAdmissions = {"none", "at-stage", "early",
                                                                          "predicted"};
constexpr std::array<std::string_view, 2> kFairness = {"none", "d2lpm"};

template <typename Enum, size_t N>
std::optional<Enum> Parse(const std::array<std::string_view, N>& names, std::string_view name) {
  for (size_t i = 0; i < N; ++i) {
    if (names[i] == name) return static_cast<Enum>(i);
  }
  return std::nullopt;
}

}  // namespace

std::string_view PlacementPolicyName(PlacementPolicy policy) {
  return kPlacements[static_cast<size_t>(policy)];
}
std::optional<PlacementPolicy> ParsePlacementPolicy(std::string_view name) {
  return Parse<PlacementPolicy>(kPlacements, name);
}

std::string_view AdmissionPolicyName(AdmissionPolicy policy) {
  return kAdmissions[static_cast<size_t>(policy)];
}
std::optional<AdmissionPolicy> ParseAdmissionPolicy(std::string_view name) {
  return Parse<AdmissionPolicy>(kAdmissions, name);
}

std::string_view FairnessPolicyName(FairnessPolicy policy) { return kFairness[static_cast<size_t>(policy)]; }
std::optional<FairnessPolicy> ParseFairnessPolicy(std::string_view name) {
  return Parse<FairnessPolicy>(kFairness, name);
}

}  // namespace tidepool
