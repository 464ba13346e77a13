#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>

#include "absl/time/time.h"
#include "scheduler/types.h"

namespace tidepool {

// How the workers of a request are chosen. All but kTidepool are baselines to compare with;
// placement_policy.h says what each does and where it comes from.
enum class PlacementPolicy : uint8_t {
  kTidepool,     // predicted TTFT, ITL and memory: placement.h
  kRandom,       // uniformly, seeded
  kRoundRobin,   // one after the other
  kLeastLoaded,  // fewest requests
  kPowerOfTwo,   // of two drawn at random, the one with fewer requests
  kPrefixOnly,   // longest cached prefix, whatever its queue
  kCacheAware,   // SGLang's: balanced by prefix, unbalanced by queue
  kDynamo,       // NVIDIA Dynamo's cost in blocks
  kMooncake,     // Mooncake's Algorithm 1 with its threshold
};
inline constexpr size_t kPlacementPolicies = 9;
std::string_view PlacementPolicyName(PlacementPolicy policy);
std::optional<PlacementPolicy> ParsePlacementPolicy(std::string_view name);

// Which requests are refused for what the objectives (SLOs) say. What no worker has memory for, and what is
// beyond max_inflight, is refused by all of them. Source: Mooncake, arXiv:2407.00079, section 7.
enum class AdmissionPolicy : uint8_t {
  kNone,       // none
  kAtStage,    // the prefill pool is judged at arrival, the decode pool by AdmitDecode when the prefill has
               // ended: a refusal there throws the prefill away
  kEarly,      // both at arrival, by the load that is now
  kPredicted,  // both at arrival, by the load predicted for when the prefill will have ended
};
inline constexpr size_t kAdmissionPolicies = 4;
std::string_view AdmissionPolicyName(AdmissionPolicy policy);
std::optional<AdmissionPolicy> ParseAdmissionPolicy(std::string_view name);

// Fairness between tenants, in placement. See fair_share.h.
enum class FairnessPolicy : uint8_t { kNone, kD2lpm };
std::string_view FairnessPolicyName(FairnessPolicy policy);
std::optional<FairnessPolicy> ParseFairnessPolicy(std::string_view name);

// Objectives of one class of requests. Zero: slo_ttft, slo_itl of SchedulerOptions; for kBatch none.
struct ClassOptions {
  absl::Duration slo_ttft;
  absl::Duration slo_itl;
};

// What the scheduler's core may be told. The first block comes from the configuration (SchedulerConfig).
struct SchedulerOptions {
  absl::Duration slo_ttft;                        // zero: none
  absl::Duration slo_itl;                         // zero: none
  std::array<ClassOptions, kSloClasses> classes;  // by SloClass
  PlacementPolicy placement = PlacementPolicy::kTidepool;
  AdmissionPolicy admission = AdmissionPolicy::kPredicted;
  FairnessPolicy fairness = FairnessPolicy::kNone;
  uint32_t local_prefill_tokens = 32;
  absl::Duration worker_timeout = absl::Seconds(3);
  uint32_t max_inflight = 4096;

  // Of the policies that draw: equal seeds and calls give equal decisions.
  uint64_t seed = 1;
  // kMooncake fetches what the best holder has only if that is this many times as long as what is there: its
  // kvcache_balancing_threshold. 2 was best in a replay of the conversation trace.
  double mooncake_threshold = 2;
  // false: no prefix is fetched from another worker, whatever it would save: a cache of each worker for
  // itself, to compare with.
  bool peer_fetch = true;
  // A batch request goes into a gap: decode steps with it take at most this share of the ITL objective of
  // standard requests, and what is queued before it this share of their TTFT objective. So much is left for
  // those who wait for their answers.
  double batch_slo_share = 0.7;
  // And this share of a decode worker's memory stays free.
  double batch_free_share = 0.1;
  // kD2lpm: tokens that a tenant may be ahead on one worker. More than the largest request takes.
  double fair_quantum_tokens = 32768;

  // A booking whose request was neither finished nor lost with its worker: longer than any request may
  // take by default (gateway.request_timeout), so that it only catches a gateway that died.
  absl::Duration booking_expiry = absl::Minutes(15);
  // The same of one that its decode worker is through with: as long as a gateway may take to say Finish.
  absl::Duration ended_expiry = absl::Seconds(5);
  // How long a lost worker stays visible to operators.
  absl::Duration forget_lost_after = absl::Minutes(5);
  // A booking is part of the worker's own report once the report is at least this much younger: the way of
  // a request from the gateway over the decode worker to the prefill worker's queue.
  absl::Duration settle = absl::Milliseconds(50);
  uint32_t max_workers = 4096;
  // (block, worker) pairs in the prefix index; prefix_index.h says what each takes.
  size_t max_index_entries = 16u << 20;
  // How long an answer is taken to be until enough answers of its tenant and route ended (predict_len.h);
  // max_tokens, which clients leave high, says little.
  uint32_t expected_output_tokens = 256;
  // Tokens that a prefill may take of one engine step (engine.max_step_tokens): a prefill beside decodes
  // needs that many steps.
  uint32_t chunk_tokens = 256;
  // Up to so many workers every one of them is looked at for every request; beyond, only those that can be
  // the best (see placement.h).
  uint32_t evaluate_all_workers = 64;
  // Requests that RecentRequests remembers, at least 1; about 400 bytes each.
  size_t max_records = 4096;
};

}  // namespace tidepool
