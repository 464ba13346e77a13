// The handoff under simulation: several nodes in one thread and one clock that only the test moves, over a
// network that loses, delays, duplicates, reorders and damages, with cut links, crashes and restarts. What
// runs is what ships, but for FetchNode's thread. A failure prints its seed; TIDEPOOL_SIM_SEED replays one,
// TIDEPOOL_SIM_SEEDS sets how many.

#include <gtest/gtest.h>

#include <cstdlib>
#include <list>
#include <map>
#include <memory>
#include <set>

#include "base/log.h"
#include "kvstore/fetch_driver.h"
#include "tests/kvstore/fetch_test_util.h"
#include "transport/inproc_transport.h"

namespace tidepool {
namespace {

constexpr BlockLayout kLayout = {.layers = 4, .kv_heads = 1, .head_dim = 8, .block_tokens = 4};
constexpr uint32_t kSlots = 64;
constexpr int kNodes = 3;
constexpr uint64_t kKeysPerNode = 24;
constexpr uint64_t kDiskSeed = 500000;  // + 1000 * node: blocks that only the node's lower tier has
constexpr uint64_t kDiskKeysPerNode = 40;
constexpr uint64_t kGrowingSeed = 1000000;  // blocks offered while they grow, each once

struct Outcomes {
  std::map<absl::StatusCode, int> codes;
  uint64_t filled = 0;
  uint64_t filled_grown = 0;
  uint64_t filled_from_disk = 0;
  uint64_t absent_grown = 0;
  uint64_t quarantined = 0;
  uint64_t crashes = 0;
};

// SimTier: a lower tier that answers late, wrongly or not at all, on the simulation's clock.
class SimTier final : public BlockTier {
 public:
  SimTier(const Clock* clock, uint64_t seed) : clock_(clock), rng_(seed) {}
  ~SimTier() override {
    while (!reads_.empty()) Answer(reads_.begin()->first, absl::CancelledError("the tier goes"));
  }

  void Put(uint64_t seed) { blocks_[TestKey(seed)] = seed; }
  absl::Time next() const {
    absl::Time at = absl::InfiniteFuture();
    for (const auto& [id, read] : reads_) at = std::min(at, read.due);
    return at;
  }
  // Answers what is due.
  int Poll() {
    int events = 0;
    for (auto it = reads_.begin(); it != reads_.end();) {
      const auto [id, due] = std::pair(it->first, it->second.due);
      ++it;
      if (due > clock_->Now()) continue;
      Finish(id);
      ++events;
    }
    return events;
  }
  size_t pending() const { return reads_.size(); }
  // Something may still be written there.
  bool MayWrite(const std::byte* at) const {
    for (const auto& [id, read] : reads_) {
      if (read.dst.data() == at) return true;
    }
    return false;
  }

  Caps caps() const override { return {.name = "sim", .block_bytes = kLayout.block_bytes()}; }
  ReadId Read(const BlockKey& key, std::span<const int32_t>, std::span<std::byte> dst, absl::Duration timeout,
              ReadDone done) override {
    EXPECT_EQ(dst.size(), kLayout.block_bytes());
    const absl::Duration takes = rng_.Chance(0.05) ? absl::Seconds(100) : absl::Milliseconds(rng_.Below(30));
    const ReadId id = next_++;
    reads_[id] = {key, dst, clock_->Now() + std::min(takes, timeout), takes > timeout, std::move(done)};
    if (rng_.Chance(0.05)) Finish(id);  // before the call returns
    return id;
  }
  bool CancelRead(ReadId id) override {
    if (!reads_.contains(id)) return false;
    Answer(id, absl::CancelledError("cancelled"));
    return true;
  }
  bool Contains(const BlockKey& key) const override { return blocks_.contains(key); }
  void Write(const BlockInfo&, std::span<const std::byte>, Done done) override {
    done(absl::ResourceExhaustedError("stores give way"));
  }
  void Erase(const BlockKey&, Done done) override { done(absl::OkStatus()); }
  void EraseIf(Predicate, CountDone done) override { done(0); }
  std::optional<TierEntry> Find(const BlockKey&) const override { return std::nullopt; }
  Page List(uint64_t, size_t) const override { return {}; }
  TierStats stats() const override { return {}; }
  TierHealth health() const override { return {}; }
  void SetObserver(TierObserver*) override {}

 private:
  struct Pending {
    BlockKey key;
    std::span<std::byte> dst;
    absl::Time due;
    bool late;
    ReadDone done;
  };
  void Answer(ReadId id, absl::StatusOr<Record> record) {
    ReadDone done = std::move(reads_.at(id).done);
    reads_.erase(id);
    done(std::move(record));
  }
  void Finish(ReadId id) {
    Pending& read = reads_.at(id);
    if (read.late) return Answer(id, absl::DeadlineExceededError("slow"));
    const double what = rng_.Uniform();
    std::memset(read.dst.data(), 0x44, read.dst.size());
    if (what < 0.05) return Answer(id, absl::NotFoundError("evicted since"));
    if (what < 0.1) return Answer(id, absl::DataLossError("damaged"));
    Record record{{.key = read.key}, read.dst.size()};
    if (what < 0.15) {
      // A record of another block, with a good checksum of its own.
      record.info.key = TestKey(1);
      Fill(read.dst, 1);
    } else if (what < 0.2) {
      record.bytes -= 1;
    } else {
      Fill(read.dst, blocks_.at(read.key));
    }
    Answer(id, std::move(record));
  }

  const Clock* clock_;
  Rng rng_;
  std::map<BlockKey, uint64_t> blocks_;
  std::map<ReadId, Pending> reads_;
  ReadId next_ = 1;
};

class Simulation {
 public:
  explicit Simulation(uint64_t seed)
      : rng_(seed), network_(&clock_, MakeFaults(seed)), flow_(MakeFlow(seed, lanes_)) {
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
    while (!growing_.empty()) Grow(growing_.begin(), 1);
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
      EXPECT_EQ(n.driver->server.loads(), 0u) << "node " << i;
      EXPECT_EQ(n.tier->pending(), 0u) << "node " << i;
      EXPECT_EQ(n.driver->offers(), 0u) << "node " << i;
      const auto stats = n.pool->stats();
      EXPECT_EQ(stats.leased, 0u) << "node " << i << " leaks leases";
      outcomes.quarantined += stats.quarantined;
    }
    for (auto& [id, f] : fetches_) {
      if (f.ended) ++outcomes.codes[f.code];
      outcomes.filled += f.filled;
      outcomes.filled_grown += f.filled_grown;
      outcomes.filled_from_disk += f.filled_from_disk;
      outcomes.absent_grown += f.absent_grown;
    }
    outcomes.crashes += crashes_;
  }

 private:
  struct Node {
    MetricRegistry metrics;
    std::unique_ptr<BlockPool> pool;
    std::unique_ptr<SimTier> tier;
    std::unique_ptr<FetchDriver> driver;
    PeerAddress peer;

    ~Node() { tier.reset(); }  // answers what it accepted while there is a pool to take the slots back
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
    uint64_t filled_grown = 0;
    uint64_t filled_from_disk = 0;
    uint64_t absent_grown = 0;
  };
  // Blocks of a request that are computed layer by layer while they are on offer.
  struct Growing {
    int node;
    uint64_t life;
    std::string request;
    std::vector<uint64_t> seeds;
    std::vector<BlockLease> slots;
    uint32_t layers = 0;
    absl::Time next;
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

  // Windows, batches and pieces around the size of a block (512 bytes) and a layer (128).
  static FetchFlow MakeFlow(uint64_t seed, size_t& lanes) {
    Rng rng(seed * 17 + 3);
    FetchFlow f;
    lanes = 1 + rng.Below(3);
    f.window_bytes = uint64_t{128} << rng.Below(8);
    f.window_target = absl::Milliseconds(1 + rng.Below(20));
    f.batch_below = uint64_t{64} << rng.Below(6);
    f.batch_bytes = rng.Chance(0.2) ? 0 : 300 + rng.Below(3000);
    f.unit_bytes = uint64_t{128} << rng.Below(4);
    f.quantum = 64 + rng.Below(1024);
    f.max_sends = 1 + rng.Below(16);
    f.max_loads = 1 + rng.Below(4);
    f.max_load_bytes = 512 * (1 + rng.Below(4));
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
    node->tier = std::make_unique<SimTier>(&clock_, rng_.Next());
    for (uint64_t k = 0; k < kDiskKeysPerNode; ++k) node->tier->Put(kDiskSeed + i * 1000 + k);
    FetchNode::Options options;
    options.disk = node->tier.get();
    options.lanes = lanes_;
    options.flow = flow_;
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
      node->pool->Publish(std::move(slots[k]), {.key = TestKey(seed)});
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
    std::erase_if(growing_, [&](const Growing& g) { return g.node == i; });
    nodes_[i]->driver->CloseMailbox();
    nodes_[i]->driver->options.transport.reset();
    nodes_[i].reset();
    Start(i);
  }

  void Act() {
    const int i = static_cast<int>(rng_.Below(kNodes));
    const int j = static_cast<int>((i + 1 + rng_.Below(kNodes - 1)) % kNodes);
    const double what = rng_.Uniform();
    if (what < 0.5) {
      StartFetch(i, j);
    } else if (what < 0.6) {
      StartGrowing(i, j);
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
      nodes_[i]->driver->Offer("r" + std::to_string(next_fetch_ + rng_.Below(3)), TestKey(seed),
                               std::move((*slot)[0]), kLayout.layers);
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

  // Offers blocks at `j` that will grow, to a fetch from `i` that comes at once.
  void StartGrowing(int i, int j) {
    auto slots = nodes_[j]->pool->Reserve(1 + rng_.Below(4));
    if (!slots.ok()) return;
    Growing g{j, lives_[j], "r" + std::to_string(next_fetch_), {}, std::move(*slots), 0, clock_.Now()};
    for (BlockLease& slot : g.slots) {
      std::memset(slot.data().data(), 0xee, slot.data().size());
      g.seeds.push_back(kGrowingSeed + next_growing_++);
      nodes_[j]->driver->Offer(g.request, TestKey(g.seeds.back()), slot.Clone(), 0);
    }
    const uint64_t request = next_fetch_;
    StartFetch(i, j, g.seeds);
    next_fetch_ = request + 1;  // also where there was no room for the fetch: a request is computed once
    growing_.push_back(std::move(g));
  }

  // The next layer is computed; or the computation fails.
  void Grow(std::list<Growing>::iterator it, double fails) {
    Growing& g = *it;
    FetchDriver& driver = *nodes_[g.node]->driver;
    if (rng_.Chance(fails)) {
      driver.RevokeOffers(g.request);
      // A caller that breaks its word costs the fetch, never a wrong block.
      if (rng_.Chance(0.2)) {
        for (BlockLease& slot : g.slots) std::memset(slot.data().data(), 0xdd, slot.data().size());
      }
      growing_.erase(it);
      return;
    }
    for (size_t k = 0; k < g.slots.size(); ++k) {
      std::vector<std::byte> whole(kLayout.block_bytes());
      Fill(whole, g.seeds[k]);
      const size_t at = g.layers * kLayout.layer_bytes();
      std::memcpy(g.slots[k].data().data() + at, whole.data() + at, kLayout.layer_bytes());
    }
    ++g.layers;
    if (rng_.Chance(0.5)) {
      driver.AdvanceOffer(g.request, {}, g.layers);
    } else {
      for (uint64_t seed : g.seeds) driver.AdvanceOffer(g.request, {{TestKey(seed)}}, g.layers);
    }
    g.next = clock_.Now() + absl::Milliseconds(rng_.Below(40));
    if (g.layers == kLayout.layers) growing_.erase(it);
  }

  void StartFetch(int i, int j, const std::vector<uint64_t>& growing = {}) {
    Node& n = *nodes_[i];
    const size_t count = std::max<size_t>(1 + rng_.Below(8), growing.size());
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
      if (which > 0.3 && which < 0.45) {
        seed = kDiskSeed + j * 1000 + rng_.Below(kDiskKeysPerNode);
      }
      if (k >= count - growing.size()) seed = growing[k - (count - growing.size())];
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
      if (r.status.ok() && !r.filled[k]) f.absent_grown += f.seeds[k] >= kGrowingSeed;
      if (r.slots[k].empty()) continue;  // in quarantine
      const auto data = r.slots[k].data();
      EXPECT_FALSE(network_.MayWrite(data.data(), data.size())) << "fetch " << id << " slot " << k;
      if (r.filled[k]) {
        ++f.filled;
        f.filled_grown += f.seeds[k] >= kGrowingSeed;
        f.filled_from_disk += f.seeds[k] >= kDiskSeed && f.seeds[k] < kGrowingSeed;
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
      for (auto& node : nodes_) events += node->tier->Poll();
      for (auto& node : nodes_) events += node->driver->Poll();
      for (auto it = growing_.begin(); it != growing_.end();) {
        const auto next = std::next(it);
        if (it->next <= clock_.Now()) Grow(it, 0.1), ++events;
        it = next;
      }
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
    for (auto& node : nodes_) next = std::min({next, node->driver->next_timer(), node->tier->next()});
    for (const Growing& g : growing_) next = std::min(next, g.next);
    for (const Held& h : held_) next = std::min(next, h.until);
    clock_.Advance(std::max(next - clock_.Now(), absl::Microseconds(10)));
  }

  Rng rng_;
  FakeClock clock_;
  InprocNetwork network_;
  size_t lanes_ = 1;
  FetchFlow flow_;
  std::array<std::unique_ptr<Node>, kNodes> nodes_;
  std::array<uint64_t, kNodes> lives_{};
  uint64_t next_life_ = 1;
  uint64_t next_fetch_ = 1;
  uint64_t next_growing_ = 1;
  uint64_t crashes_ = 0;
  std::list<Growing> growing_;
  std::map<uint64_t, FetchState> fetches_;
  std::vector<Held> held_;
  std::set<std::pair<std::string, std::string>> cuts_;
};

TEST(FetchSimTest, HandoffHoldsItsInvariantsUnderEveryFault) {
  spdlog::set_level(spdlog::level::off);
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  uint64_t first = 1, count = 100;  // ten times slower: the plain build runs them all
#else
  uint64_t first = 1, count = 300;
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
  std::printf(
      "filled %lu blocks (grown %lu, from disk %lu), grown absent %lu, quarantined %lu, crashes %lu\n",
      outcomes.filled, outcomes.filled_grown, outcomes.filled_from_disk, outcomes.absent_grown,
      outcomes.quarantined, outcomes.crashes);
  if (count < 100) return;
  // The storm reaches every outcome; otherwise it proves little.
  EXPECT_GT(outcomes.codes[absl::StatusCode::kOk], 1000);
  EXPECT_GT(outcomes.codes[absl::StatusCode::kDeadlineExceeded], 100);
  EXPECT_GT(outcomes.codes[absl::StatusCode::kUnavailable], 20);
  EXPECT_GT(outcomes.codes[absl::StatusCode::kCancelled], 20);
  EXPECT_GT(outcomes.codes[absl::StatusCode::kDataLoss], 20);
  EXPECT_GT(outcomes.filled_grown, 500u);
  EXPECT_GT(outcomes.filled_from_disk, 500u);
  EXPECT_GT(outcomes.absent_grown, 100u);
  EXPECT_GT(outcomes.quarantined, 0u);
  EXPECT_GT(outcomes.crashes, 50u);
}

}  // namespace
}  // namespace tidepool
