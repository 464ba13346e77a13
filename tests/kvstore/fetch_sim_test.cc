// The handoff under simulation: several nodes in one thread and one clock that only the test moves, over a
// network that loses, delays, duplicates, reorders and damages, with cut links, crashes and restarts. What
// runs is what ships, but for FetchNode's thread. A failure prints its seed; TIDEPOOL_SIM_SEED replays one,
// TIDEPOOL_SIM_SEEDS sets how many.

#include <gtest/gtest.h>

#include <cstdlib>
#include <map>
#include <memory>
#include <set>

#include "base/log.h"
#include "kvstore/fetch_driver.h"
#include "tests/kvstore/fetch_test_util.h"
#include "transport/inproc_transport.h"

namespace tidepool {
namespace {

constexpr BlockLayout kLayout = {.layers = 2, .kv_heads = 1, .head_dim = 8, .block_tokens = 4};
constexpr uint32_t kSlots = 64;
constexpr int kNodes = 3;
constexpr uint64_t kKeysPerNode = 24;

struct Outcomes {
  std::map<absl::StatusCode, int> codes;
  uint64_t filled = 0;
  uint64_t quarantined = 0;
  uint64_t crashes = 0;
};

class Simulation {
 public:
  explicit Simulation(uint64_t seed) : rng_(seed), network_(&clock_, MakeFaults(seed)) {
    for (int i = 0; i < kNodes; ++i) Start(i);
  }

  void Run(Outcomes& outcomes) {
    const absl::Time storm_ends = clock_.Now() + absl::Seconds(4);
    absl::Time next_op = clock_.Now();
    while (clock_.Now() < storm_ends) {
      if (clock_.Now() >= next_op) {
        Act();
        next_op = clock_.Now() + absl::Milliseconds(rng_.Below(25));
      }
      Settle();
      Advance(next_op);
    }
    // Liveness: heal everything, and all must come to an end by itself.
    network_.SetFaults({});
    for (auto& [a, b] : cuts_) network_.Cut(a, b, false);
    const absl::Time limit = clock_.Now() + absl::Seconds(40);
    while (clock_.Now() < limit) {
      Settle();
      Advance(limit);
    }
    held_.clear();
    for (auto& [id, f] : fetches_) {
      EXPECT_TRUE(f.ended || f.void_) << "fetch " << id << " never ended";
    }
    for (int i = 0; i < kNodes; ++i) {
      Node& n = *nodes_[i];
      EXPECT_EQ(n.driver->client.active(), 0u) << "node " << i;
      EXPECT_EQ(n.driver->server.active(), 0u) << "node " << i;
      EXPECT_EQ(n.driver->server.offers(), 0u) << "node " << i;
      const auto stats = n.pool->stats();
      EXPECT_EQ(stats.leased, 0u) << "node " << i << " leaks leases";
      outcomes.quarantined += stats.quarantined;
    }
    for (auto& [id, f] : fetches_) {
      if (f.ended) ++outcomes.codes[f.code];
      outcomes.filled += f.filled;
    }
    outcomes.crashes += crashes_;
  }

 private:
  struct Node {
    MetricRegistry metrics;
    std::unique_ptr<BlockPool> pool;
    std::unique_ptr<FetchDriver> driver;
    PeerAddress peer;
  };
  struct FetchState {
    int node = 0;
    uint64_t life = 0;
    absl::Time deadline;
    std::vector<uint64_t> seeds;
    bool ended = false;
    bool void_ = false;  // its node died
    absl::StatusCode code = absl::StatusCode::kOk;
    uint64_t filled = 0;
  };
  // Slots that came back, painted over and kept for a while: a late write would show.
  struct Held {
    int node;
    uint64_t life;
    absl::Time until;
    std::vector<BlockLease> slots;
  };

  static SimFaults MakeFaults(uint64_t seed) {
    Rng rng(seed * 31 + 7);
    SimFaults f;
    f.seed = seed;
    auto sometimes = [&](double most) { return rng.Chance(0.5) ? rng.Uniform() * most : 0; };
    f.loss = sometimes(0.15);
    f.duplicate = sometimes(0.3);
    f.corrupt = sometimes(0.1);
    f.delay_min = absl::Microseconds(rng.Below(2000));
    f.delay_max = f.delay_min + absl::Milliseconds(rng.Below(40));
    f.bulk_pieces = 1 + static_cast<int>(rng.Below(5));
    // Now and then longer than the grace: those endpoints end in quarantine.
    f.close_max = rng.Chance(0.1) ? absl::Seconds(3) : absl::Milliseconds(rng.Below(200));
    return f;
  }

  FetchTimings Timings() {
    FetchTimings t;
    t.close_grace = absl::Seconds(1);
    return t;
  }

  void Start(int i) {
    auto node = std::make_unique<Node>();
    BlockPool::Options pool;
    pool.layout = kLayout;
    pool.slots = kSlots;
    pool.metrics = &node->metrics;
    node->pool = std::move(*BlockPool::Create(pool));
    FetchNode::Options options;
    options.worker_id = "w" + std::to_string(i);
    options.boot_id = options.worker_id + "-boot-" + std::to_string(next_life_);
    options.fingerprint = "model";
    options.pool = node->pool.get();
    options.transport = network_.NewTransport();
    options.clock = &clock_;
    options.metrics = &node->metrics;
    options.offer_lease = absl::Seconds(3);
    options.timings = Timings();
    node->driver = std::make_unique<FetchDriver>(std::move(options));
    node->peer = {node->driver->options.worker_id, node->driver->options.boot_id, node->driver->address};
    auto slots = *node->pool->Reserve(kKeysPerNode);
    for (uint64_t k = 0; k < kKeysPerNode; ++k) {
      const uint64_t seed = i * 1000 + k;
      Fill(slots[k].data(), seed);
      node->pool->Publish(std::move(slots[k]), TestKey(seed));
    }
    lives_[i] = next_life_++;
    nodes_[i] = std::move(node);
  }

  void Crash(int i) {
    ++crashes_;
    network_.Crash(nodes_[i]->driver->address);
    for (auto& [id, f] : fetches_) {
      if (f.node == i && f.life == lives_[i] && !f.ended) f.void_ = true;
    }
    std::erase_if(held_, [&](const Held& h) { return h.node == i; });
    nodes_[i]->driver->options.transport.reset();
    nodes_[i].reset();
    Start(i);
  }

  void Act() {
    const int i = static_cast<int>(rng_.Below(kNodes));
    const int j = static_cast<int>((i + 1 + rng_.Below(kNodes - 1)) % kNodes);
    const double what = rng_.Uniform();
    if (what < 0.6) {
      StartFetch(i, j);
    } else if (what < 0.7) {
      if (next_fetch_ > 1) {
        nodes_[i]->driver->Submit(ClientCancel{"r" + std::to_string(1 + rng_.Below(next_fetch_ - 1)), 0});
      }
    } else if (what < 0.85) {
      // An unindexed tail, offered to some request to come.
      auto slot = nodes_[i]->pool->Reserve(1);
      if (!slot.ok()) return;
      const uint64_t seed = 100000 + rng_.Below(4);
      Fill((*slot)[0].data(), seed);
      nodes_[i]->driver->Submit(ServerOffer{"r" + std::to_string(next_fetch_ + rng_.Below(3)), TestKey(seed),
                                            std::move((*slot)[0])});
    } else if (what < 0.9) {
      nodes_[i]->driver->Submit(
          ClientRelease{nodes_[j]->peer, "r" + std::to_string(rng_.Below(next_fetch_))});
    } else if (what < 0.96) {
      const std::string a = nodes_[i]->driver->address, b = nodes_[j]->driver->address;
      if (cuts_.erase({a, b}) > 0) {
        network_.Cut(a, b, false);
      } else {
        cuts_.insert({a, b});
        network_.Cut(a, b, true);
      }
    } else if (what < 0.97) {
      Crash(i);
    }
  }

  void StartFetch(int i, int j) {
    Node& n = *nodes_[i];
    const size_t count = 1 + rng_.Below(8);
    auto slots = n.pool->Reserve(count);
    if (!slots.ok()) return;
    const uint64_t id = next_fetch_++;
    FetchState& f = fetches_[id];
    f.node = i;
    f.life = lives_[i];
    FetchSpec spec;
    spec.request_id = "r" + std::to_string(id);
    // Now and then an address of a life that is over.
    spec.peer = nodes_[j]->peer;
    if (rng_.Chance(0.03)) spec.peer.boot_id = "w" + std::to_string(j) + "-boot-old";
    for (size_t k = 0; k < count; ++k) {
      const double which = rng_.Uniform();
      uint64_t seed = j * 1000 + (id * 5 + k) % kKeysPerNode;
      if (which < 0.15) seed = 777000 + k;              // nobody has it
      if (which > 0.85) seed = 100000 + rng_.Below(4);  // perhaps on offer
      f.seeds.push_back(seed);
      spec.keys.push_back(TestKey(seed));
    }
    for (BlockLease& slot : *slots) std::memset(slot.data().data(), 0x33, slot.data().size());
    spec.slots = std::move(*slots);
    spec.deadline = f.deadline = clock_.Now() + absl::Milliseconds(20 + rng_.Below(1500));
    n.driver->Submit(
        FetchSubmission{std::move(spec), [this, id](FetchResult r) { Ended(id, std::move(r)); }});
  }

  void Ended(uint64_t id, FetchResult r) {
    FetchState& f = fetches_.at(id);
    EXPECT_FALSE(f.void_) << "a dead node's fetch " << id << " ended";
    EXPECT_FALSE(f.ended) << "fetch " << id << " ended twice";
    f.ended = true;
    f.code = r.status.code();
    const FetchTimings t = Timings();
    EXPECT_LE(clock_.Now(), f.deadline + t.drain + t.close_grace + absl::Milliseconds(5)) << "fetch " << id;
    ASSERT_EQ(r.slots.size(), f.seeds.size());
    ASSERT_EQ(r.filled.size(), f.seeds.size());
    for (size_t k = 0; k < r.slots.size(); ++k) {
      if (!r.status.ok()) {
        EXPECT_FALSE(r.filled[k]);
      }
      if (r.slots[k].empty()) continue;  // in quarantine
      const auto data = r.slots[k].data();
      EXPECT_FALSE(network_.MayWrite(data.data(), data.size())) << "fetch " << id << " slot " << k;
      if (r.filled[k]) {
        ++f.filled;
        EXPECT_TRUE(Holds(data, f.seeds[k])) << "fetch " << id << " slot " << k;
      }
      std::memset(data.data(), 0x77, data.size());
    }
    held_.push_back({f.node, f.life, clock_.Now() + absl::Milliseconds(rng_.Below(300)), std::move(r.slots)});
  }

  // Everything that happens at this instant.
  void Settle() {
    for (int quiet = 0; quiet < 2;) {
      int events = 0;
      for (auto& node : nodes_) events += node->driver->Poll();
      quiet = events == 0 ? quiet + 1 : 0;
    }
    std::erase_if(held_, [&](Held& h) {
      if (h.until > clock_.Now()) return false;
      for (BlockLease& slot : h.slots) {
        if (slot.empty()) continue;
        for (std::byte b : slot.data()) {
          if (b == std::byte{0x77}) continue;
          ADD_FAILURE() << "a slot that was given back was written to";
          return true;
        }
      }
      return true;
    });
  }

  void Advance(absl::Time at_most) {
    absl::Time next = std::min(at_most, network_.NextEvent());
    for (auto& node : nodes_) next = std::min(next, node->driver->next_timer());
    for (const Held& h : held_) next = std::min(next, h.until);
    clock_.Advance(std::max(next - clock_.Now(), absl::Microseconds(10)));
  }

  Rng rng_;
  FakeClock clock_;
  InprocNetwork network_;
  std::array<std::unique_ptr<Node>, kNodes> nodes_;
  std::array<uint64_t, kNodes> lives_{};
  uint64_t next_life_ = 1;
  uint64_t next_fetch_ = 1;
  uint64_t crashes_ = 0;
  std::map<uint64_t, FetchState> fetches_;
  std::vector<Held> held_;
  std::set<std::pair<std::string, std::string>> cuts_;
};

TEST(FetchSimTest, HandoffHoldsItsInvariantsUnderEveryFault) {
  spdlog::set_level(spdlog::level::off);
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  uint64_t first = 1, count = 100;  // ten times slower: the plain build runs them all
#else
  uint64_t first = 1, count = 600;
#endif
  if (const char* s = std::getenv("TIDEPOOL_SIM_SEEDS")) count = std::strtoull(s, nullptr, 10);
  if (const char* s = std::getenv("TIDEPOOL_SIM_SEED")) {
    first = std::strtoull(s, nullptr, 10);
    count = 1;
  }
  Outcomes outcomes;
  for (uint64_t seed = first; seed < first + count; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    Simulation(seed).Run(outcomes);
    if (HasFailure()) break;
  }
  for (auto& [code, n] : outcomes.codes) {
    RecordProperty(absl::StatusCodeToString(code), n);
    std::printf("%s %d\n", absl::StatusCodeToString(code).c_str(), n);
  }
  std::printf("filled %lu blocks, quarantined %lu, crashes %lu\n", outcomes.filled, outcomes.quarantined,
              outcomes.crashes);
  if (count < 100) return;
  // The storm reaches every outcome; otherwise it proves little.
  EXPECT_GT(outcomes.codes[absl::StatusCode::kOk], 1000);
  EXPECT_GT(outcomes.codes[absl::StatusCode::kDeadlineExceeded], 100);
  EXPECT_GT(outcomes.codes[absl::StatusCode::kUnavailable], 20);
  EXPECT_GT(outcomes.codes[absl::StatusCode::kCancelled], 20);
  EXPECT_GT(outcomes.codes[absl::StatusCode::kDataLoss], 20);
  EXPECT_GT(outcomes.quarantined, 0u);
  EXPECT_GT(outcomes.crashes, 50u);
}

}  // namespace
}  // namespace tidepool
