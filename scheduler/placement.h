#pragma once

#include <optional>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "scheduler/cluster_view.h"
#include "scheduler/fair_share.h"
#include "scheduler/options.h"
#include "scheduler/placement_policy.h"
#include "scheduler/predict_len.h"
#include "scheduler/types.h"

namespace tidepool {

// Prefilling the prompt on one worker. Seconds are predictions.
struct PrefillOption {
  WorkerIndex worker = 0;
  uint32_t near_blocks = 0;           // of the prompt, usable, in the worker's host tier
  uint32_t held_blocks = 0;           // those, and [near_blocks, held_blocks) from its own disk
  uint32_t cached_blocks = 0;         // held or fetched
  std::optional<WorkerIndex> holder;  // of [held_blocks, cached_blocks)
  uint32_t holder_near_blocks = 0;    // of which the holder has [held_blocks, this) in its host tier
  double queue_seconds = 0;
  double fetch_seconds = 0;      // from the own disk and from the holder
  double peer_host_seconds = 0;  // of which: from the holder's host tier
  double peer_disk_seconds = 0;  // and from its disk
  double compute_seconds = 0;
  uint32_t blocks_needed = 0;
  bool room = false;  // for blocks_needed, now; without it the worker would refuse
  uint64_t load = 0;  // requests there: breaks ties

  double service_seconds() const { return fetch_seconds + compute_seconds; }
  double total_seconds() const { return queue_seconds + service_seconds(); }
};

struct DecodeOption {
  WorkerIndex worker = 0;
  double itl_seconds = 0;  // with this request in the batch, when its prefill will have ended
  // What admission holds against the objective: that and what is kept free for others (kPredicted), or the
  // step if it were in the batch now (kEarly).
  double judged_itl_seconds = 0;
  double handoff_seconds = 0;  // what of the KV transfer the prefill does not hide; 0 where local
  uint32_t blocks_needed = 0;  // for the prompt and the expected answer
  bool room = false;           // for blocks_needed, now
  bool full = false;           // not even for the prompt: the worker would refuse
  bool gap = true;             // a batch request takes nothing from the others there
  uint64_t load = 0;
};

// One whole way of serving the request.
struct Plan {
  PrefillOption prefill;
  DecodeOption decode;
  bool full = false;               // a worker of it would refuse for lack of blocks
  int violations = 0;              // of: room for the answer, TTFT, ITL, a batch request's gap
  bool credit = true;              // its tenant has some on the prefilling worker
  double judged_ttft_seconds = 0;  // as DecodeOption's
  double cost_seconds = 0;         // predicted time to the end of the answer

  bool local() const { return prefill.worker == decode.worker; }
  double ttft_seconds() const { return prefill.total_seconds() + decode.handoff_seconds; }
};

struct Evaluation {
  // OK: `best` is set, whether it meets the SLO or not. Unavailable: no worker. InvalidArgument: no worker
  // is large enough.
  absl::Status status;
  std::optional<Plan> best;
  // What was compared. For Explain.
  std::vector<PrefillOption> prefills;
  std::vector<Plan> locals;
  std::vector<DecodeOption> decodes;
};

// What requests have been like lately, whether they were let in or not: decayed means, without those of the
// batch class. Zero: none was seen yet.
struct TypicalRequest {
  double prompt_tokens = 0;
  double compute_seconds = 0;  // of its prefill, with what was cached
};

// What a decision needs to know beside the cluster and the request.
struct PlacementInput {
  LengthPrediction length;  // of the answer
  TypicalRequest typical;
  const FairShare::Deficits* deficits = nullptr;  // of its tenant; null: it has credit everywhere
  bool all_workers = false;                       // look at every one, however many there are
};

// Predicts and compares ways of serving `request` (Mooncake's Algorithm 1, arXiv:2407.00079, with the fetch
// rule as meant: fetch iff it beats recomputing):
//
//   TTFT(p) = queue(p) + min over {load what the own disk holds, fetch what another holds in its host tier or
//             on its disk, recompute it} + compute(p, rest)
//   p = argmin TTFT;  d = argmin (handoff(p, d) + answer * ITL(d))
//   local(d) = the same on d alone, where d may: role both, or at most local_prefill_tokens uncached, or
//   no prefill worker left
//
// and takes what breaks the fewest limits, then where the tenant has credit, then what ends first, then the
// lower load, then the lower id. ITL(d) is for the batch at the time when the prefill will have ended: less
// the requests that will be done by then, and with those whose prefill will have ended (looking at the load
// now makes clusters oscillate). On a worker that also prefills, decode steps come further apart by the share
// of its time that prefills take; that is left out of the comparison (or prefills would be spread over all),
// and admission takes it for the mean of all where it is less.
//
// What AdmissionPolicy::kPredicted judges is a little worse than what is predicted, in two ways, so that what
// it lets in does as much good as it can:
//   - Who comes later and is prefilled sooner is not booked yet. They come at the rate at which those did who
//     prefill now (Little's law). Without them the far future looks empty: requests that need long to prefill
//     would be let in where those that hit the cache are refused.
//   - Who asks for more than a typical request (of decode steps by its context, of a prefill worker by its
//     compute) has to leave room for some typical ones beside it, the more the fuller the worker is: trunk
//     reservation, as telephone networks keep lines free for calls that need one from those that need many.
//     On an idle worker nothing is reserved: whatever fits is served.
//
// Up to evaluate_all_workers every worker is compared: O(workers + bookings + blocks). Beyond that those that
// can be the best: holders of the longest prefixes with the shortest queues, the workers with the shortest
// queues and the quickest steps whatever they hold, and those with most room; more of them where the best of
// these breaks a limit. About 30 of a thousand; a property test bounds what that costs.
//
// With another SchedulerOptions::placement, what placement_policy.h chooses, with the same predictions.
Evaluation Evaluate(const ClusterView& view, const SchedulerOptions& options, const PlaceRequest& request,
                    const PlacementInput& input, PolicyState& policy, absl::Time now);

// Seconds of a decode step of worker `w` now with one more request of `tokens` in its batch. `except`: of the
// bookings, this one is not counted.
double DecodeStepNow(const ClusterView& view, const SchedulerOptions& options, const Worker& w,
                     uint64_t tokens, const Booking* except = nullptr);

// The SLO in force for the request; InfiniteDuration where there is none.
absl::Duration EffectiveTtftSlo(const SchedulerOptions& options, const PlaceRequest& request);
absl::Duration EffectiveItlSlo(const SchedulerOptions& options, const PlaceRequest& request);

}  // namespace tidepool
