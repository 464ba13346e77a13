#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "base/rng.h"
#include "scheduler/types.h"
#include "server/engine/batch_core.h"
#include "tools/simulate/profile.h"
#include "tools/simulate/weighted_histogram.h"
#include "tools/simulate/workload.h"

namespace tidepool {

// SimEngine: the engine of one simulated worker. BatchCore, the one that ships, says what each step computes;
// the profile says how long it takes. Steps in which nothing but the same decodes would run are taken
// together, up to the next that ends one: their times are summed in closed form, and a newcomer cuts the
// group at the end of the step at hand. Core: time is passed in.
class SimEngine {
 public:
  struct Prefilled {
    uint64_t id = 0;
    PrefillSample sample;
  };
  // What a step, or group of steps, brought.
  struct Outcome {
    std::vector<Prefilled> prefilled;  // each waits for Decode or Remove
    std::vector<uint64_t> finished;    // drew their last token; removed already
  };

  static constexpr SimTime kIdle = INT64_MAX;

  // `gaps` takes the time before every token but first ones; it outlives the engine. The profile, too.
  SimEngine(const WorkerProfile& profile, uint64_t seed, WeightedHistogram* gaps,
            FairQueue::Order order = FairQueue::Order::kVtc);

  // Whose a sequence is, and what goes before what.
  struct Owner {
    std::string_view tenant;  // copied
    int32_t priority = 0;
    bool batch_class = false;
  };
  // A prompt of which `cached` tokens are there and `fresh` >= 1 are to be computed.
  void AddPrefill(uint64_t id, uint32_t cached, uint32_t fresh, const Owner& owner, SimTime now);
  // A prompt that is complete, whose last token was given at `last_token`, now: `tokens` >= 1 are to come.
  void AddDecode(uint64_t id, uint32_t context, uint32_t tokens, const Owner& owner, SimTime last_token);
  // One that Outcome said to be prefilled goes on here: its first token was drawn now.
  void Decode(uint64_t id, uint32_t tokens, SimTime now);
  // Unknown ids are ignored.
  void Remove(uint64_t id);

  // Begins the next step if none runs; cuts a group short if something waits that could run. To be called
  // after every Add, Decode, Remove and End. What begins to be computed is appended to `begun`.
  void Kick(SimTime now, std::vector<uint64_t>& begun);
  // When the present step or group ends; kIdle: none runs. Changes with Kick and End.
  SimTime end() const { return end_; }
  void End(Outcome& out);

  // Tokens that a decoding sequence still has to draw.
  uint32_t TokensLeft(uint64_t id, SimTime now) const;

  uint32_t running() const { return core_.running(); }
  uint32_t waiting() const { return core_.waiting(); }
  uint64_t queued_prefill_tokens() const { return core_.queued_prefill_tokens(); }
  uint64_t context_tokens(SimTime now) const;
  uint32_t decoding() const { return active_; }
  // Of one step of what decodes now; 0 where nothing does.
  double StepSeconds(SimTime now) const;
  // The decode step that runs now, as the engine reports it; batch 0: none.
  DecodeSample Sample(SimTime now) const;
  // The last step of the group that has just ended; batch 0: it was no group.
  const DecodeSample& last_decode() const { return last_decode_; }
  size_t sequences() const { return sequences_.size(); }

 private:
  struct Sequence {
    uint32_t cached = 0, fresh = 0, computed = 0;
    double compute_seconds = 0;
    bool batch_class = false;
    bool begun = false;      // some of the prompt is computed, or being so
    bool prefilling = true;  // and not all of it
    bool active = false;     // draws a token in each step
    uint32_t left = 0;       // tokens to come, while not active
    uint64_t context = 0;    // KV tokens, while not active
    // While active: left == finish_at - steps_, context == steps_ + context_base.
    uint64_t finish_at = 0;
    int64_t context_base = 0;
    uint64_t told_at = 0;    // core_ knows of its tokens up to the step with this number
    SimTime last_token = 0;  // while not active
  };

  bool NeedsStep() const;
  void BeginStep(SimTime now, std::vector<uint64_t>& begun);
  void BeginGroup(SimTime now);
  void CutGroup(SimTime now);
  void EndStep(Outcome& out);
  void EndGroup(Outcome& out);
  // Steps of the group that are over at `now`.
  uint64_t GroupStepsBy(SimTime now) const;
  double GroupSeconds(uint64_t steps) const;
  void Activate(uint64_t id, Sequence& s);
  void Deactivate(uint64_t id, Sequence& s);
  // Tells core_ of the tokens that were drawn in groups, up to the step with number `steps`.
  void TellOutputs(uint64_t id, Sequence& s, uint64_t steps);
  // Of all tokens that were drawn by `now`. Nothing where there is one tenant only, as nothing depends on it.
  void TellAll(SimTime now);
  void NoteTenant(std::string_view tenant, SimTime now);
  // Those that decode but are not in the plan have lost their places.
  void SuspendMissing();
  double Jitter();

  const WorkerProfile& profile_;
  BatchCore core_;
  Rng rng_;
  WeightedHistogram* const gaps_;
  absl::flat_hash_map<uint64_t, Sequence> sequences_;
  std::vector<std::pair<uint64_t, uint64_t>> finishing_;  // (finish_at, id), a heap; entries may be stale
  uint64_t steps_ = 0;
  uint32_t active_ = 0;
  uint64_t context_ = 0;  // of the active ones, at steps_
  uint32_t prefilling_ = 0, batch_ = 0;
  std::string tenant_;  // the first that came
  bool several_tenants_ = false;

  SimTime began_ = 0, end_ = kIdle;
  bool group_ = false;
  uint64_t group_steps_ = 0;
  uint32_t group_active_ = 0;
  double group_first_ = 0, group_growth_ = 0;  // of the first step, and by which each next is longer
  double step_seconds_ = 0;
  DecodeSample last_decode_;
  std::vector<PlanItem> plan_;
};

}  // namespace tidepool
