#include "scheduler/fair_queue.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <list>
#include <queue>
#include <vector>

#include "base/rng.h"

namespace tidepool {
namespace {

using testing::HasSubstr;

const absl::Time kStart = absl::UnixEpoch() + absl::Hours(1);

FairQueue::Item Item(uint64_t id, std::string tenant, uint32_t prompt = 100, uint32_t cached = 0) {
  return {.id = id, .tenant = std::move(tenant), .prompt_tokens = prompt, .cached_tokens = cached};
}

std::vector<uint64_t> PopAll(FairQueue& queue, absl::Time now) {
  std::vector<uint64_t> out;
  while (const auto id = queue.Pop(now)) out.push_back(*id);
  return out;
}

TEST(FairQueue, WhoWasPreemptedGoesFirstInItsLevelWhateverItsTenantWasGiven) {
  for (size_t order = 0; order < kQueueOrders; ++order) {
    FairQueue queue({.order = static_cast<FairQueue::Order>(order), .quantum = 50});
    ASSERT_TRUE(queue.Push(Item(1, "a", 1000), kStart).ok());
    queue.Begin(1, kStart);
    auto better = Item(2, "b");
    better.priority = -1;
    ASSERT_TRUE(queue.Push(Item(3, "b", 100, 90), kStart).ok());
    ASSERT_TRUE(queue.Push(better, kStart).ok());
    for (const uint64_t id : {4u, 5u}) {
      auto preempted = Item(id, "a", 0);
      preempted.preempted = true;
      ASSERT_TRUE(queue.Push(preempted, kStart).ok());
    }
    EXPECT_THAT(PopAll(queue, kStart), testing::ElementsAre(2, 4, 5, 3)) << order;
  }
}

TEST(FairQueue, ClassesThenPrioritiesThenArrivalAreStrict) {
  FairQueue queue({.order = FairQueue::Order::kFcfs});
  const auto push = [&](uint64_t id, SloClass slo_class, int32_t priority) {
    auto item = Item(id, "t");
    item.slo_class = slo_class;
    item.priority = priority;
    ASSERT_TRUE(queue.Push(item, kStart).ok());
  };
  push(1, SloClass::kBatch, -5);
  push(2, SloClass::kStandard, 3);
  push(3, SloClass::kStandard, -1);
  push(4, SloClass::kInteractive, 9);
  push(5, SloClass::kStandard, -1);
  EXPECT_THAT(PopAll(queue, kStart), testing::ElementsAre(4, 3, 5, 2, 1));
}

TEST(FairQueue, WaitingRaisesAClassAtATimeAndPriorityWithIt) {
  FairQueue queue({.order = FairQueue::Order::kFcfs, .aging = absl::Seconds(30)});
  auto old = Item(1, "t");
  old.slo_class = SloClass::kBatch;
  ASSERT_TRUE(queue.Push(old, kStart).ok());
  auto standard = Item(2, "t");
  standard.priority = 5;
  ASSERT_TRUE(queue.Push(standard, kStart + absl::Seconds(20)).ok());
  auto urgent = Item(3, "t");
  urgent.priority = -5;
  ASSERT_TRUE(queue.Push(urgent, kStart + absl::Seconds(20)).ok());
  auto interactive = Item(4, "t");
  interactive.slo_class = SloClass::kInteractive;
  ASSERT_TRUE(queue.Push(interactive, kStart + absl::Seconds(20)).ok());
  EXPECT_THAT(PopAll(queue, kStart + absl::Seconds(31)), testing::ElementsAre(4, 1, 3, 2));
}

TEST(FairQueue, LongQueueOfOneTenantDoesNotPassOthersByWaiting) {
  FairQueue queue({.order = FairQueue::Order::kVtc, .aging = absl::Seconds(30)});
  for (uint64_t id = 1; id <= 3; ++id) {
    auto item = Item(id, "long");
    item.slo_class = SloClass::kInteractive;
    ASSERT_TRUE(queue.Push(item, kStart).ok());
  }
  ASSERT_EQ(queue.Pop(kStart), 1u);
  auto item = Item(4, "short");
  item.slo_class = SloClass::kInteractive;
  ASSERT_TRUE(queue.Push(item, kStart + absl::Minutes(2)).ok());
  EXPECT_THAT(PopAll(queue, kStart + absl::Minutes(2)), testing::ElementsAre(4, 2, 3));
}

TEST(FairQueue, BatchClassRisesToItsTopOnlyWhereToldSo) {
  FairQueue queue({.order = FairQueue::Order::kFcfs, .aging = absl::Seconds(30), .batch_rises = false});
  const auto push = [&](uint64_t id, SloClass slo_class, int32_t priority, absl::Time now) {
    auto item = Item(id, "t");
    item.slo_class = slo_class;
    item.priority = priority;
    ASSERT_TRUE(queue.Push(item, now).ok());
  };
  push(1, SloClass::kBatch, 5, kStart);
  push(2, SloClass::kBatch, -5, kStart + absl::Hours(1));
  push(3, SloClass::kStandard, 9, kStart + absl::Hours(1));
  EXPECT_THAT(PopAll(queue, kStart + absl::Hours(1)), testing::ElementsAre(3, 1, 2));
}

TEST(FairQueue, PeekTakesNothingAndNamesWhatPopBegins) {
  for (size_t order = 0; order < kQueueOrders; ++order) {
    FairQueue queue({.order = static_cast<FairQueue::Order>(order), .quantum = 100});
    EXPECT_EQ(queue.Peek(kStart), nullptr);
    for (uint64_t id = 1; id <= 20; ++id)
      ASSERT_TRUE(queue.Push(Item(id, id % 3 == 0 ? "a" : "b", 300, 16 * (id % 4)), kStart).ok());
    for (int i = 0; i < 20; ++i) {
      ASSERT_NE(queue.Peek(kStart), nullptr);
      const uint64_t next = queue.Peek(kStart)->id;
      EXPECT_EQ(queue.Pop(kStart), next);
    }
    EXPECT_EQ(queue.waiting(), 0u);
  }
}

TEST(FairQueue, OrdersAreKnownByTheirNames) {
  for (size_t i = 0; i < kQueueOrders; ++i) {
    const auto order = static_cast<FairQueue::Order>(i);
    EXPECT_EQ(ParseQueueOrder(QueueOrderName(order)), order);
  }
  EXPECT_EQ(ParseQueueOrder("lifo"), std::nullopt);
}

TEST(FairQueue, FullQueueAndFullShareRefuseWithTheLimit) {
  FairQueue queue({.max_waiting = 3, .max_waiting_per_tenant = 2});
  EXPECT_TRUE(queue.Push(Item(1, "a"), kStart).ok());
  EXPECT_TRUE(queue.Push(Item(2, "a"), kStart).ok());
  const absl::Status share = queue.Push(Item(3, "a"), kStart);
  EXPECT_EQ(share.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(share.message()), HasSubstr("tenant's part"));
  EXPECT_TRUE(queue.Push(Item(4, "b"), kStart).ok());
  const absl::Status full = queue.Push(Item(5, "c"), kStart);
  EXPECT_EQ(full.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(full.message()), HasSubstr("3 requests"));
}

TEST(FairQueue, TenantAtItsRunningCapWaitsForItsOwn) {
  FairQueue queue({.max_running_per_tenant = 1});
  ASSERT_TRUE(queue.Push(Item(1, "a"), kStart).ok());
  ASSERT_TRUE(queue.Push(Item(2, "a"), kStart).ok());
  ASSERT_TRUE(queue.Push(Item(3, "b"), kStart).ok());
  EXPECT_THAT(PopAll(queue, kStart), testing::UnorderedElementsAre(1, 3));
  queue.Remove(1, kStart);
  EXPECT_EQ(queue.Pop(kStart), 2u);
}

TEST(FairQueue, OnlyUncachedTokensAndEachOutputTokenOnceAreCharged) {
  FairQueue queue({});
  ASSERT_TRUE(queue.Push(Item(1, "a", 1000, 800), kStart).ok());
  ASSERT_EQ(queue.Pop(kStart), 1u);
  EXPECT_EQ(queue.service("a"), 200);
  queue.OnOutput(1, 10);
  queue.OnOutput(1, 4);  // drawn again after a preemption
  queue.OnOutput(1, 12);
  EXPECT_EQ(queue.service("a"), 212);
}

TEST(FairQueue, CancelledWorkIsGivenBack) {
  FairQueue queue({});
  ASSERT_TRUE(queue.Push(Item(1, "a", 1000), kStart).ok());
  ASSERT_TRUE(queue.Push(Item(2, "a", 1000), kStart).ok());
  queue.Remove(2, kStart);
  EXPECT_EQ(queue.service("a"), 0) << "a waiting one costs nothing";
  ASSERT_EQ(queue.Pop(kStart), 1u);
  queue.Remove(1, kStart, 600);
  EXPECT_EQ(queue.service("a"), 400);
  EXPECT_EQ(queue.waiting() + queue.running(), 0u);
}

TEST(FairQueue, IdleTenantsAreForgottenAfterAnHour) {
  FairQueue queue({});
  ASSERT_TRUE(queue.Push(Item(1, "gone"), kStart).ok());
  queue.Remove(1, kStart);
  ASSERT_TRUE(queue.Push(Item(2, "here"), kStart).ok());
  ASSERT_TRUE(queue.Push(Item(3, "new"), kStart + absl::Minutes(50)).ok());
  EXPECT_EQ(queue.tenants(), 3u);
  ASSERT_TRUE(queue.Push(Item(4, "new"), kStart + absl::Minutes(62)).ok());
  EXPECT_EQ(queue.tenants(), 2u) << "who waits is never forgotten";
}

TEST(FairQueue, WeightsShareTheServiceOut) {
  FairQueue queue({.quantum = 200});
  queue.SetWeight("gold", 3, kStart);
  uint64_t id = 0;
  for (int i = 0; i < 400; ++i) {
    ASSERT_TRUE(queue.Push(Item(++id, "gold"), kStart).ok());
    ASSERT_TRUE(queue.Push(Item(++id, "tin"), kStart).ok());
  }
  for (int i = 0; i < 400; ++i) ASSERT_TRUE(queue.Pop(kStart).has_value());
  EXPECT_NEAR(queue.service("gold") / queue.service("tin"), 3, 0.3);
}

// ---- fairness, as measured by a little engine

// One engine that computes one request after the other and keeps the prefixes used last: a token a tick, of
// an uncached prompt or of an answer.
class Engine {
 public:
  struct Doc {
    std::string tenant;
    int number;
    bool operator==(const Doc&) const = default;
  };
  static constexpr uint32_t kPrefix = 8000, kOwn = 200, kOutput = 100;

  Engine(FairQueue::Options options, size_t prefixes) : queue_(options), prefixes_(prefixes) {}

  void Arrive(const Doc& doc) {
    const uint64_t id = next_id_++;
    docs_[id] = {doc, now_};
    ASSERT_TRUE(queue_.Push(Item(id, doc.tenant, kPrefix + kOwn, Cached(doc)), Now()).ok());
    waiting_.push_back(id);
  }
  // Serves one request to its end. False: nothing waits.
  bool Serve() {
    for (const uint64_t id : waiting_) queue_.SetCached(id, Cached(docs_.at(id).doc));
    const auto id = queue_.Pop(Now());
    if (!id) return false;
    std::erase(waiting_, *id);
    const Request request = docs_.at(*id);
    docs_.erase(*id);
    const uint32_t cached = Cached(request.doc);
    prompt_tokens_ += kPrefix + kOwn;
    cached_tokens_ += cached;
    now_ += kPrefix + kOwn - cached;
    ttft_[request.doc.tenant].push_back(static_cast<double>(now_ - request.arrived));
    Use(request.doc);
    for (uint32_t t = 1; t <= kOutput; ++t) queue_.OnOutput(*id, t);
    now_ += kOutput;
    queue_.Remove(*id, Now());
    return true;
  }

  void Keep(const Doc& doc) { Use(doc); }
  uint64_t now() const { return now_; }
  void WaitUntil(uint64_t now) { now_ = std::max(now_, now); }
  double service(const std::string& tenant) const { return queue_.service(tenant); }
  double hit_rate() const {
    return static_cast<double>(cached_tokens_) / static_cast<double>(prompt_tokens_);
  }
  double Ttft(const std::string& tenant, double quantile) {
    auto& v = ttft_.at(tenant);
    std::sort(v.begin(), v.end());
    return v[static_cast<size_t>(quantile * static_cast<double>(v.size() - 1))];
  }

 private:
  struct Request {
    Doc doc;
    uint64_t arrived;
  };
  absl::Time Now() const { return kStart + absl::Milliseconds(now_ / 10); }
  uint32_t Cached(const Doc& doc) const {
    return std::find(cache_.begin(), cache_.end(), doc) == cache_.end() ? 0 : kPrefix;
  }
  void Use(const Doc& doc) {
    cache_.remove(doc);
    cache_.push_front(doc);
    if (cache_.size() > prefixes_) cache_.pop_back();
  }

  FairQueue queue_;
  const size_t prefixes_;
  std::list<Doc> cache_;
  std::map<uint64_t, Request> docs_;
  std::vector<uint64_t> waiting_;
  std::map<std::string, std::vector<double>> ttft_;
  uint64_t next_id_ = 1, now_ = 0, prompt_tokens_ = 0, cached_tokens_ = 0;
};

const std::vector<std::string> kTenants = {"a", "b", "c"};

struct Backlogged {
  double gap_first = 0, gap_second = 0;  // the largest difference of service in each half
  double hit_rate = 0;
};

// Three tenants with a prefix each that have always eight requests waiting; the cache holds one prefix.
Backlogged RunBacklogged(FairQueue::Order order, double quantum, int requests = 3000) {
  Engine engine({.order = order, .quantum = quantum, .aging = absl::ZeroDuration()}, 1);
  std::map<std::string, int> served;
  Backlogged out;
  const auto arrive = [&](const std::string& tenant) { engine.Arrive({tenant, 0}); };
  for (int i = 0; i < 8; ++i) {
    for (const auto& t : kTenants) arrive(t);
  }
  std::map<std::string, double> before;
  for (int i = 0; i < requests; ++i) {
    EXPECT_TRUE(engine.Serve());
    double least = 1e18, most = 0;
    for (const auto& t : kTenants) {
      if (engine.service(t) != before[t]) arrive(t);
      before[t] = engine.service(t);
      least = std::min(least, engine.service(t));
      most = std::max(most, engine.service(t));
    }
    double& gap = i < requests / 2 ? out.gap_first : out.gap_second;
    gap = std::max(gap, most - least);
  }
  out.hit_rate = engine.hit_rate();
  return out;
}

TEST(FairQueueSim, ServiceOfBackloggedTenantsStaysWithinAQuantumAndARequestForEver) {
  constexpr double kRequest = Engine::kPrefix + Engine::kOwn + Engine::kOutput;
  for (const double quantum : {10'000.0, 30'000.0}) {
    const Backlogged dlpm = RunBacklogged(FairQueue::Order::kDlpm, quantum);
    EXPECT_LE(dlpm.gap_first, quantum + 2 * kRequest) << quantum;
    EXPECT_LE(dlpm.gap_second, quantum + 2 * kRequest) << quantum;
    EXPECT_LE(dlpm.gap_second, 1.5 * dlpm.gap_first) << "flat in time, quantum " << quantum;
  }
}

TEST(FairQueueSim, LongestPrefixAloneIsUnfairWithoutBound) {
  const Backlogged lpm = RunBacklogged(FairQueue::Order::kLongestPrefix, 1);
  EXPECT_GT(lpm.gap_second, 1.8 * lpm.gap_first) << "it grows with time";
  EXPECT_GT(lpm.gap_second, 500'000);
}

TEST(FairQueueSim, LargeQuantumKeepsNineTenthsOfTheHitsOfLongestPrefix) {
  const double lpm = RunBacklogged(FairQueue::Order::kLongestPrefix, 1).hit_rate;
  const double large = RunBacklogged(FairQueue::Order::kDlpm, 60'000).hit_rate;
  const double small = RunBacklogged(FairQueue::Order::kDlpm, 1'000).hit_rate;
  const double vtc = RunBacklogged(FairQueue::Order::kVtc, 1).hit_rate;
  EXPECT_GE(large, 0.9 * lpm);
  EXPECT_LT(small, large) << "a small quantum is fairer and forgets more";
  EXPECT_LT(vtc, 0.8 * large);
}

// Poisson arrivals, 70% of what the engine can do, 30% of it tenant a's; then `noisy` times as many of its.
// All prefixes are cached.
double OthersP99(FairQueue::Order order, double noisy) {
  constexpr double kRequest = Engine::kOwn + Engine::kOutput;
  Engine engine({.order = order, .quantum = 10 * kRequest, .aging = absl::ZeroDuration()}, 64);
  for (const auto& t : kTenants) engine.Keep({t, 0});
  Rng rng(11);
  using Arrival = std::pair<double, size_t>;
  std::priority_queue<Arrival, std::vector<Arrival>, std::greater<>> next;
  const auto gap = [&](size_t t) {
    const double rate = (t == 0 ? 0.3 * noisy : 0.2) / kRequest;
    return -std::log(1 - rng.Uniform()) / rate;
  };
  for (size_t t = 0; t < kTenants.size(); ++t) next.push({gap(t), t});
  size_t waiting = 0;
  while (engine.now() < 3'000'000) {
    while (next.top().first <= static_cast<double>(engine.now())) {
      const auto [at, t] = next.top();
      next.pop();
      next.push({at + gap(t), t});
      // A gateway limits what one tenant may have waiting; here by dropping.
      if (t == 0 && waiting > 100) continue;
      engine.Arrive({kTenants[t], 0});
      ++waiting;
    }
    if (engine.Serve()) {
      --waiting;
    } else {
      engine.WaitUntil(static_cast<uint64_t>(next.top().first) + 1);
    }
  }
  return std::max(engine.Ttft("b", 0.99), engine.Ttft("c", 0.99));
}

TEST(FairQueueSim, TenantAtTenTimesItsRateMovesTheOthersByATenthAtMost) {
  const double alone = OthersP99(FairQueue::Order::kDlpm, 1);
  EXPECT_LE(OthersP99(FairQueue::Order::kDlpm, 10), 1.1 * alone);
  EXPECT_GT(OthersP99(FairQueue::Order::kFcfs, 10), 5 * OthersP99(FairQueue::Order::kFcfs, 1));
}

}  // namespace
}  // namespace tidepool
