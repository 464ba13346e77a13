#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "base/clock.h"
#include "base/probe.h"
#include "kvstore/block_pool.h"
#include "kvstore/block_tier.h"
#include "kvstore/fetch_node.h"
#include "server/worker/deadlines.h"
#include "server/worker/source_speeds.h"
#include "server/worker/span_planner.h"

namespace tidepool {

// Where a block that was not computed came from. The names are label values.
enum class LoadedFrom : uint8_t { kPeer, kDisk, kPeerDisk };
inline constexpr size_t kLoadedFrom = 3;
inline constexpr std::array<std::string_view, kLoadedFrom> kLoadedFromNames = {"peer", "disk", "peer_disk"};

// LoaderProbe: the metrics of loads.
struct LoaderProbe {
  explicit LoaderProbe(MetricRegistry& metrics);

  std::array<Counter*, kLoadedFrom> blocks;  // arrived and used
  std::array<Counter*, kLoadedFrom> planned;
  Counter& stopped_slow;     // loads that were given up: computing was faster
  Counter& stopped_missing;  // or a block was not where it was expected
  Counter& declined;     // spans that could be had elsewhere, and of which computing everything was faster
  Counter& late_blocks;  // arrived after their load had been given up
  Histogram& seconds;
};

// BlockLoader: brings the blocks of one prompt that follow what the pool has, from this worker's disk tier
// and from peers, as far as that is faster than computing them; SpanLoad decides. Driver of one SpanLoad.
//
// What arrives has been verified (tokens and checksum by the tier, COMMIT by the fetch protocol) and is
// published in the pool before `done` hears of it. What is given up keeps its slot until its tier or peer
// answers: the request gets another one meanwhile. Thread-safe; `done` runs on whatever thread the last
// answer came on.
class BlockLoader : public std::enable_shared_from_this<BlockLoader> {
 public:
  // What the loads of a worker share. Outlives them.
  struct Environment {
    BlockPool* pool = nullptr;
    BlockTier* disk = nullptr;  // null: none
    std::function<void(FetchSpec, std::function<void(FetchResult)>)> fetch;
    std::function<void(const std::string& request_id, uint32_t attempt)> abort;
    SourceSpeeds* speeds = nullptr;
    Deadlines* deadlines = nullptr;
    LoaderProbe* probe = nullptr;
    PrefillCost prefill;  // thread-safe
    const Clock* clock = &Clock::Real();
    absl::Duration timeout = absl::Seconds(10);  // of one fetch or read
    SpanLoad::Options options;
    // What a load got from a source and how long that took: for the scheduler. May be null.
    std::function<void(const SourceId& source, uint64_t bytes, absl::Duration elapsed)> sample;
  };

  // Blocks [begin, end) of its chain are expected in `tier` of `peer`.
  struct Holder {
    PeerAddress peer;
    uint32_t begin = 0;
    uint32_t end = 0;
    Tier tier = Tier::kHost;
  };

  struct Spec {
    std::string request_id;
    uint32_t attempt = 0;
    std::vector<BlockInfo> blocks;  // of the span, in order: what the caller stands for
    uint64_t prompt_tokens = 0;
    std::vector<Holder> holders;
  };

  struct Result {
    // One for each block of the span: the first `loaded` are published blocks, the others the request's own
    // slots (an empty one was quarantined).
    std::vector<BlockLease> leases;
    uint32_t loaded = 0;
    std::vector<LoadedFrom> from;  // of those loaded
    uint64_t bytes = 0;            // that were transferred for them
    uint32_t fetched = 0;          // of those loaded, from peers
    std::string_view transport;    // that brought them (FetchResult::transport); empty where none did
  };

  // Null: nothing of the span is to be had, or computing all of it is faster; `slots` stay with the caller
  // then. Otherwise they are moved: one for each block, unpublished.
  static std::shared_ptr<BlockLoader> Make(const Environment& environment, Spec spec,
                                           std::vector<BlockLease>& slots);

  // Calls `done` exactly once, unless Cancel comes first (perhaps before this returns). Once.
  void Start(std::function<void(Result)> done);
  // `done` is not called any more (a call under way may go on). Slots go as they become quiescent.
  void Cancel();

 private:
  // One part on its way.
  struct Part {
    SpanLoad::Part what;
    SourceSpeeds::Ticket ticket;
    std::optional<BlockTier::ReadId> read;
    bool abandoned = false;
    bool aborted = false;   // its peer was told
    bool replaced = false;  // its blocks have other slots now
  };
  struct Source {
    SourceId id;
    std::optional<PeerAddress> peer;  // none: the disk here
    LoadedFrom kind = LoadedFrom::kDisk;
    uint64_t bytes = 0;
    absl::Time first_asked = absl::InfiniteFuture(), last_arrived;
  };
  // What is to be done without the lock.
  struct Actions {
    std::vector<std::function<void()>> calls;
    std::optional<Result> result;
    std::function<void(Result)> done;
  };

  BlockLoader(const Environment& environment, Spec spec, std::vector<Source> sources, SpanLoad load,
              std::vector<BlockLease> slots);

  static std::vector<LoadSource> FindSources(const Environment& environment, const Spec& spec,
                                             std::vector<Source>& out);
  uint32_t Begin() const { return spec_.blocks.front().position; }

  // The following hold mu_.
  void Step(Actions& actions);
  void Ask(SpanLoad::Part part, Actions& actions);
  void Abandon(const SpanLoad::Abandoned& given_up, Actions& actions);
  bool WantsPeers() const;  // a part that is still wanted is on its way from one
  // Ends fetches that were given up. A fetch is known by its request only: while a part is still wanted from
  // a peer, all go on.
  void AbortUnwanted(Actions& actions);
  void Finish(Actions& actions);
  void ArmDeadline();
  // Without mu_.
  bool Wanted(uint32_t part);  // one that was not answered yet
  void Run(Actions actions);
  void OnDeadline();
  void OnAnswer(uint32_t part, std::vector<BlockLease> slots, std::vector<bool> filled, uint64_t bytes);
  void PublishLate(const SpanLoad::Part& part, std::vector<BlockLease> slots,
                   const std::vector<bool>& filled);

  const Environment& env_;
  const Spec spec_;

  std::mutex mu_;
  std::vector<Source> sources_;
  SpanLoad load_;
  std::vector<BlockLease> slots_;  // by block of the span; empty while a part has it
  std::map<uint32_t, Part> parts_;
  std::function<void(Result)> done_;
  bool over_ = false;
  std::string_view transport_;
  bool slow_ = false;  // the guard stopped it
  absl::Time begun_;
  std::optional<Deadlines::Id> deadline_;
  absl::Time deadline_at_;  // of deadline_
};

}  // namespace tidepool
