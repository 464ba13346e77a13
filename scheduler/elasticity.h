#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/time/time.h"
#include "scheduler/types.h"

namespace tidepool {

// What is done about a cluster of which one kind of worker is short while the other has room.
enum class ElasticityMode : uint8_t {
  kOff,     // nothing is looked at
  kAdvise,  // it is said
  kAct,     // and done
};
inline constexpr size_t kElasticityModes = 3;
std::string_view ElasticityModeName(ElasticityMode mode);
std::optional<ElasticityMode> ParseElasticityMode(std::string_view name);

struct ElasticityOptions {
  // So long a kind is short, without a break, before a worker of the other changes; loads are averaged over
  // about half of it. Bursts are shorter.
  absl::Duration dwell = absl::Seconds(10);
  // Between the end of one change and the next likewise, in dwells: what the first has brought must show.
  double again = 1;
  // And before one the other way round: what one load has asked for the next need not undo at once. Twice as
  // many each time that a load swings, up to 32 times.
  double back = 6;
  // A kind is short above `high`, and until it is below `low` again. 1 is all that workers can do within the
  // objectives; queues grow before that.
  double high = 0.9;
  double low = 0.75;
  // The other gives a worker if it would not come above `spare` without it, nor above `high` by the most that
  // was asked of it of late (what is refused before ITL suffers is not seen in advance); or if the short kind
  // is still `far` times as short as it would be then. In both cases the same load does not ask it back.
  double spare = 0.6;
  double far = 1.5;  // times
  // Where no TTFT objective is set, so much queue is one worker's worth of work more.
  double queue_seconds = 1;
  // A larger share of requests that were refused for want of one kind makes that kind short.
  double refused_share = 0.01;
  // An order that no report has confirmed for so long was lost.
  absl::Duration confirm = absl::Seconds(5);
};

// What has been decided since the core began; only differences say anything.
struct DecisionCounts {
  uint64_t placed = 0;
  uint64_t refused_prefill = 0;  // for want of prefill: ttft
  uint64_t refused_decode = 0;   // for want of decode: itl, memory
  // Of compute that prefill workers would spend on them, predicted: on what was placed, and on what was
  // refused (which comes again, until it is given up).
  double prefill_seconds = 0, refused_prefill_seconds = 0;
};

// What is asked of a cluster's workers at one moment. Made by SchedulerCore::Elasticity.
struct ElasticityLoad {
  struct Worker {
    std::string id;
    Role role = Role::kBoth;
    std::optional<Role> next_role;  // it is changing
    bool ready = false;
    uint64_t work = 0;  // tokens that it would have to finish before it could change
  };
  std::vector<Worker> workers;  // without stores and lost ones; by id
  DecisionCounts decisions;
  // Sums over the ready prefill workers.
  double prefill_queue_seconds = 0;
  // Sums over the ready decode workers: of a decode step, of one with a single short sequence, and the share
  // of the memory that is held by what decodes.
  double decode_step_seconds = 0;
  double decode_floor_seconds = 0;
  double decode_memory = 0;
  double slo_ttft_seconds = 0, slo_itl_seconds = 0;  // 0: none
};

struct ElasticityAdvice {
  // Workers that do one kind of work and are ready, or are changing to that. Those of both are not looked at.
  uint32_t prefill = 0, decode = 0;
  // The same number divided so that the higher pressure is as low as can be, by what is asked now.
  uint32_t wanted_prefill = 0, wanted_decode = 0;
  // What is asked of each kind as a share of what it can do within the objectives.
  double prefill_pressure = 0, decode_pressure = 0;
  // The worker that should change now, and to what; empty: none.
  std::string worker;
  Role role = Role::kBoth;
  std::string reason;  // one sentence
};

// ElasticityCore: how many of the workers should prefill and how many decode, and which one should change.
// Core: no thread, no socket, no clock; equal ticks give equal advice. Not thread-safe.
//
//   prefill(p) = (compute that arrives, seconds a second + queue / TTFT objective) / p
//   decode(d)  = max(memory, (step - floor) * n/d * offered/served / (ITL objective - floor))
//
// with p and d workers where there were n; floor is a step with a single sequence. What was refused counts as
// if it had been served (but at most as nine times what was); a queue of TTFT objective seconds is so much
// more work as would clear it within the objective; a kind of which requests were refused is at least full.
// One worker changes at a time, if one kind was above `high` for a dwell (until it is below `low`) and the
// other has one to spare (see `spare`): the band between keeps a load that swings from moving workers back
// and forth. The last worker of a kind never changes, one of both never, a store never. Roles that change by
// an operator's order are seen and waited for like those that were advised. Where the last decode worker is
// gone and none does both, nothing is weighed: a worker that is leaving decode, else one that prefills,
// should decode at once. NVIDIA Dynamo's planner weighs TTFT and ITL against their objectives likewise; the
// dead band is as Nexus has one.
class ElasticityCore {
 public:
  explicit ElasticityCore(const ElasticityOptions& options) : options_(options) {}
  void SetOptions(const ElasticityOptions& options) { options_ = options; }

  // To be called about once a second, `now` not going back.
  ElasticityAdvice Tick(const ElasticityLoad& load, absl::Time now);
  // The worker was told to change; `taken`: it will. Else it is left alone for some time.
  void OnOrdered(const std::string& worker, bool taken, absl::Time now);

 private:
  struct Demand {
    double arriving = 0;      // of compute, seconds a second
    double refused = 0;       // likewise, of what was refused
    double backlog = 0;       // over the TTFT objective
    double decode_extra = 0;  // seconds of a step beyond the floor, summed over workers
    double decode_floor = 0;  // seconds, of one worker
    double memory = 0;        // shares, summed over workers
    double served_share = 1;
    double refused_prefill = 0, refused_decode = 0;  // shares
  };
  // What is asked of the workers, with what was refused.
  struct Asked {
    double prefill = 0;       // workers' worth
    double decode_extra = 0;  // as Demand's
    double memory = 0;
  };
  // Moves what is remembered towards what this tick says.
  void Observe(const ElasticityLoad& load, uint32_t decode, absl::Time now);
  // With so many workers, where there are `now`.
  double PrefillPressure(const Asked& asked, uint32_t workers, uint32_t now) const;
  double DecodePressure(const Asked& asked, uint32_t workers, uint32_t now, double slo_itl) const;
  // Notes roles that have changed since the last tick; true while one is changing.
  bool NoteChanges(const ElasticityLoad& load, absl::Time now);
  // Where nothing decodes: who should.
  void Repair(const ElasticityLoad& load, absl::Time now, ElasticityAdvice& out);
  // What is waited for before a change the other way round.
  absl::Duration BackAfter() const;
  // When prefill (or decode) began to be short; none: it is not.
  static void Track(double pressure, const ElasticityOptions& options, absl::Time now,
                    std::optional<absl::Time>& since);
  // Of `kind`, the one with least to finish; null: none that may change.
  const ElasticityLoad::Worker* Choose(const ElasticityLoad& load, Role kind, absl::Time now) const;

  ElasticityOptions options_;
  std::optional<absl::Time> ticked_at_;
  DecisionCounts counts_;
  Demand demand_;
  Asked asked_;
  Asked peak_;  // of asked_, forgotten in about the time that a change back takes
  std::optional<absl::Time> prefill_short_since_, decode_short_since_;
  std::map<std::string, Role> roles_;  // that each worker has, or is changing to
  absl::Time changed_at_;              // when one was last changing
  Role changed_to_ = Role::kBoth;      // both: none has changed
  uint32_t reversals_ = 0;             // in a row
  std::string ordered_;                // and not confirmed yet
  Role advised_ = Role::kBoth;         // what the last one advised should be
  bool seen_decode_ = false;
  std::optional<absl::Time> no_decode_since_;
  absl::Time ordered_at_;
  std::map<std::string, absl::Time> left_alone_;  // until then
};

}  // namespace tidepool
