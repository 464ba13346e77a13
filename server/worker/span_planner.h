#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "absl/time/time.h"

namespace tidepool {

// Blocks [begin, end) of a prompt.
struct BlockRange {
  uint32_t begin = 0;
  uint32_t end = 0;
  bool operator==(const BlockRange&) const = default;
};

// Seconds of computing `new_tokens` after `cached_tokens` that are there. Rises with both.
using PrefillCost = std::function<double(uint64_t new_tokens, uint64_t cached_tokens)>;

// What a load is about: blocks [begin, end) of a prompt are not here and might be loaded; what is not loaded
// is computed, and so is all that follows.
struct LoadSpan {
  uint32_t begin = 0;
  uint32_t end = 0;
  uint32_t block_tokens = 1;
  uint64_t prompt_tokens = 0;  // >= end * block_tokens
};

// Where blocks can be loaded from, and how fast that was lately (source_speeds.h). The n-th block asked of it
// is expected after latency + queued + n * seconds_per_block.
struct LoadSource {
  double latency_seconds = 0;
  double queued_seconds = 0;  // what it has been asked for already
  double seconds_per_block = 0;
  std::vector<BlockRange> has;    // rising, disjoint
  uint32_t max_part_blocks = 64;  // it is asked for at most that many at a time
  uint32_t max_parts = 2;         // and for that many parts at once
};

struct SpanPlan {
  std::vector<uint32_t> sources;   // sources[i]: where block begin + i comes from; empty: compute all
  double load_seconds = 0;         // until the last of them is there
  double compute_seconds = 0;      // of the rest
  double compute_all_seconds = 0;  // had nothing been loaded
};

// PlanSpan: how much of a span to load, and from where. A prefix only is of use, so with load(m) the time
// until blocks [begin, m) are there and compute(m) that of the prompt from m on:
//
//   m = argmin over [begin, end] of load(m) + compute(m)
//
// Of several that are equally good it is the largest: what is loaded leaves the processor to others. Each
// block comes from the source that would have it first, given what was asked of it before (list scheduling,
// Graham 1969); sources work side by side. `load_all`: as much as there is, whatever it costs. A Core: no
// clock.
SpanPlan PlanSpan(const LoadSpan& span, const std::vector<LoadSource>& sources, const PrefillCost& prefill,
                  bool load_all = false);

// SpanLoad: one span on its way: what to ask for next, and when to stop waiting. Core: time is passed in.
//
// The guard: with t the time since the load began and rest(t) that of computing what has not arrived (in
// order) by then, stopping now takes t + rest(t). As long as that stays within `limit` = compute(all) + loss,
// with loss = margin * compute(all) + slack, the request is never later than the limit, whatever the sources
// do; the load ends when it is reached. A source that is faster than the processor pushes that moment ahead
// of itself with every block; so that one which then stalls does not use up all that was gained, no part is
// waited for longer than `loss` beyond the time at which it was expected either. And so that a slow source is
// noticed while stopping is still cheap, parts are no larger than what is expected to arrive in half of the
// time that is left until the limit, begin with single blocks and double as they arrive (what was believed of
// a source may be old, or a guess: its arrivals correct it for the rest of the load), and are asked for in
// the order of blocks.
class SpanLoad {
 public:
  struct Options {
    double margin = 0.05;
    absl::Duration slack = absl::Milliseconds(2);
    bool load_all = false;  // PlanSpan's; and there is no guard
  };
  struct Part {
    uint32_t id = 0;
    uint32_t source = 0;
    std::vector<uint32_t> blocks;  // rising
  };
  enum class Stop : uint8_t {
    kNot,
    kComputeIsFaster,  // the guard's limit was reached
    kMissing,          // a block was not where it was expected: what follows is of no use
  };

  SpanLoad(const Options& options, const LoadSpan& span, std::vector<LoadSource> sources, PrefillCost prefill,
           absl::Time now);

  // A block that was missing where it was expected comes from another source, where there is one; `sources`
  // says which.
  const SpanPlan& plan() const { return plan_; }

  // What is to be asked for now; each part is reported by Arrived once, unless Stopped() told of it.
  std::vector<Part> Next(absl::Time now);
  // `filled[i]`: the part's i-th block is here and valid.
  void Arrived(uint32_t part, const std::vector<bool>& filled, absl::Time now);

  // Nothing is under way and nothing more to be asked for.
  bool done() const { return pending_.empty() && next_ >= end_; }
  // Check is due then; InfiniteFuture where there is no guard.
  absl::Time deadline() const;
  // Gives up what is not worth waiting for: all that is under way, where the limit is reached; parts behind a
  // missing block. Returns those parts: they are over for the load, whatever comes of them.
  struct Abandoned {
    Stop why = Stop::kNot;
    std::vector<Part> parts;
  };
  Abandoned Check(absl::Time now);

  // Blocks [span.begin, arrived()) are here.
  uint32_t arrived() const { return arrived_; }

 private:
  struct Pending {
    Part part;
    double asked = 0, expected = 0;  // seconds since the load began
  };
  // What this load has seen of a source.
  struct Progress {
    double seconds_per_block = 0;
    uint32_t next_part = 1;  // blocks of its next part, at most
    double last_arrival = 0;
    bool failed = false;  // a part brought nothing: it is not asked again
  };

  // Another source for a block that is not to be had where it was expected; false: none.
  bool Move(uint32_t block);
  void SkipAsked();
  double Compute(uint32_t from) const;
  double limit() const { return plan_.compute_all_seconds + loss_; }
  double Since(absl::Time now) const { return absl::ToDoubleSeconds(now - started_); }
  uint32_t SourceOf(uint32_t block) const { return plan_.sources[block - span_.begin]; }

  const Options options_;
  const LoadSpan span_;
  const std::vector<LoadSource> sources_;
  const PrefillCost prefill_;
  const absl::Time started_;
  SpanPlan plan_;
  double loss_ = 0;
  uint32_t end_;   // blocks up to here are still wanted
  uint32_t next_;  // none before it is left to be asked for
  uint32_t arrived_;
  // By block - span.begin:
  std::vector<bool> here_, asked_, moved_;  // moved_: to another source than first planned
  std::vector<Progress> progress_;          // by source
  std::vector<Pending> pending_;            // in the order in which they were asked for
  uint32_t next_part_ = 0;
};

}  // namespace tidepool
