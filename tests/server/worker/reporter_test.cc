#include "server/worker/reporter.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "absl/time/clock.h"
#include "kvstore/keys.h"

namespace tidepool {
namespace {

const BlockLayout kLayout{.layers = 1, .kv_heads = 1, .head_dim = 4, .block_tokens = 1, .dtype = DType::kF32};

// A scheduler that takes every report and remembers what is where.
class FakeScheduler final : public v1::Scheduler::Service {
 public:
  grpc::Status Report(grpc::ServerContext*, const v1::WorkerReport* report, v1::ReportReply*) override {
    std::lock_guard lock(mu_);
    std::vector<std::string>& ended = refuses_ ? refused_ended_ : ended_;
    ended.insert(ended.end(), report->ended().begin(), report->ended().end());
    if (!refuses_)
      prefilled_.insert(prefilled_.end(), report->prefilled().begin(), report->prefilled().end());
    changed_.notify_all();
    if (refuses_) return {grpc::StatusCode::UNAVAILABLE, "as the test says"};
    if (report->snapshot()) {
      keys_.clear();
      ++snapshots_;
    }
    for (const v1::BlockEvent& e : report->events()) {
      if (e.removed()) {
        keys_.erase(e.key());
      } else {
        keys_.insert(e.key());
      }
    }
    largest_ = std::max(largest_, report->events_size());
    draining_ = report->draining();
    changed_.notify_all();
    return grpc::Status::OK;
  }
  void Refuse(bool refuses) {
    std::lock_guard lock(mu_);
    refuses_ = refuses;
  }
  // Until `n` ends were told in reports that were accepted, or refused.
  bool WaitEnded(size_t n, bool refused) {
    std::unique_lock lock(mu_);
    return changed_.wait_for(lock, std::chrono::seconds(60),
                             [&] { return (refused ? refused_ended_ : ended_).size() >= n; });
  }
  // Without what came twice in a row: of a report whose answer was late.
  std::vector<std::string> ended() { return Once(ended_); }
  std::vector<std::string> prefilled() { return Once(prefilled_); }
  bool WaitKeys(size_t n) {
    std::unique_lock lock(mu_);
    return changed_.wait_for(lock, std::chrono::seconds(60), [&] { return keys_.size() == n; });
  }
  size_t keys() {
    std::lock_guard lock(mu_);
    return keys_.size();
  }
  int snapshots() {
    std::lock_guard lock(mu_);
    return snapshots_;
  }
  bool draining() {
    std::lock_guard lock(mu_);
    return draining_;
  }
  int largest() {
    std::lock_guard lock(mu_);
    return largest_;
  }

 private:
  std::vector<std::string> Once(const std::vector<std::string>& of) {
    std::lock_guard lock(mu_);
    std::vector<std::string> out = of;
    out.erase(std::unique(out.begin(), out.end()), out.end());
    return out;
  }

  std::mutex mu_;
  std::condition_variable changed_;
  std::set<std::string> keys_;
  std::vector<std::string> ended_, refused_ended_, prefilled_;
  bool refuses_ = false;
  int snapshots_ = 0, largest_ = 0;
  bool draining_ = false;
};

Reporter::Options ReportTo(const RpcServer& server, BlockPool& pool) {
  Reporter::Options options;
  options.scheduler = std::make_shared<FixedScheduler>("127.0.0.1:" + std::to_string(server.port));
  options.interval = absl::Milliseconds(10);
  options.pool = &pool;
  options.fill = [](v1::WorkerReport&) {};
  return options;
}

TEST(ReporterTest, APoolThatNoMessageHoldsIsToldInParts) {
  constexpr uint32_t kBlocks = 250'000;
  MetricRegistry metrics;
  auto pool =
      BlockPool::Create({.layout = kLayout, .slots = kBlocks + 10, .policy = "lru", .metrics = &metrics})
          .value();
  const BlockKey root = RootKey("m", kLayout, "t", "none");
  std::vector<BlockKey> keys;
  for (uint32_t n = 0; n < kBlocks; ++n) {
    BlockInfo info{.parent = root, .tokens = {static_cast<int32_t>(n)}};
    std::memcpy(info.key.bytes.data(), &n, sizeof n);
    keys.push_back(info.key);
    auto slot = pool->Reserve(1).value();
    pool->Publish(std::move(slot[0]), info);
  }
  FakeScheduler scheduler;
  const RpcServer server = StartRpcServer("127.0.0.1:0", &scheduler).value();
  ChannelCache channels;
  {
    Reporter reporter(ReportTo(server, *pool), channels, metrics);
    reporter.Start({});
    // While the listing is under way, too: the last word on a block is what it is now.
    pool->Erase(std::span(keys).first(1000));
    pool->Erase(std::span(keys).last(1000));
    EXPECT_TRUE(scheduler.WaitKeys(kBlocks - 2000));
    EXPECT_EQ(scheduler.snapshots(), 1);
    EXPECT_LT(scheduler.largest(), 150'000);
  }
  server.server->Shutdown();
  server.server->Wait();
}

TEST(ReporterTest, WhoLeavesHoldsNothingForOthersAnyMore) {
  MetricRegistry metrics;
  auto pool = BlockPool::Create({.layout = kLayout, .slots = 10, .metrics = &metrics}).value();
  BlockInfo info{.parent = RootKey("m", kLayout, "t", "none"), .tokens = {1}};
  info.key = ChildKey(*info.parent, info.tokens);
  auto slot = pool->Reserve(1).value();
  pool->Publish(std::move(slot[0]), info);
  FakeScheduler scheduler;
  const RpcServer server = StartRpcServer("127.0.0.1:0", &scheduler).value();
  ChannelCache channels;
  {
    Reporter reporter(ReportTo(server, *pool), channels, metrics);
    reporter.Start({});
    ASSERT_TRUE(scheduler.WaitKeys(1));
    while (!reporter.status().ok()) std::this_thread::yield();
    reporter.Leave();
    // Not by and by: when Leave has returned.
    EXPECT_EQ(scheduler.keys(), 0u);
    EXPECT_TRUE(scheduler.draining());
    EXPECT_EQ(pool->stats().published, 1u);
  }
  server.server->Shutdown();
  server.server->Wait();
}

TEST(ReporterTest, WhatAReportThatFailedSaidOfRequestsIsSaidAgainInOrder) {
  MetricRegistry metrics;
  auto pool = BlockPool::Create({.layout = kLayout, .slots = 10, .metrics = &metrics}).value();
  FakeScheduler scheduler;
  scheduler.Refuse(true);
  const RpcServer server = StartRpcServer("127.0.0.1:0", &scheduler).value();
  ChannelCache channels;
  {
    Reporter reporter(ReportTo(server, *pool), channels, metrics);
    reporter.Prefilled("a");
    reporter.Ended("a");
    reporter.Start({});
    ASSERT_TRUE(scheduler.WaitEnded(2, /*refused=*/true)) << "said again while it is refused";
    reporter.Prefilled("b");
    reporter.Ended("b");
    scheduler.Refuse(false);
    ASSERT_TRUE(scheduler.WaitEnded(2, /*refused=*/false));
    reporter.Ended("c");
    ASSERT_TRUE(scheduler.WaitEnded(3, /*refused=*/false));
    EXPECT_EQ(scheduler.ended(), (std::vector<std::string>{"a", "b", "c"}));
    EXPECT_EQ(scheduler.prefilled(), (std::vector<std::string>{"a", "b"}));
  }
  server.server->Shutdown();
  server.server->Wait();
}

// Who leads, as a test says.
class ChangingScheduler final : public SchedulerLocator {
 public:
  Place Get() const override {
    std::lock_guard lock(mu_);
    return place_;
  }
  bool Obey(uint64_t) override { return true; }
  void Set(Place place) {
    std::lock_guard lock(mu_);
    place_ = std::move(place);
  }

 private:
  mutable std::mutex mu_;
  Place place_;
};

TEST(ReporterTest, ANewLeaderIsToldEverything) {
  MetricRegistry metrics;
  auto pool = BlockPool::Create({.layout = kLayout, .slots = 10, .metrics = &metrics}).value();
  BlockInfo info{.parent = RootKey("m", kLayout, "t", "none"), .tokens = {1}};
  info.key = ChildKey(*info.parent, info.tokens);
  auto slot = pool->Reserve(1).value();
  pool->Publish(std::move(slot[0]), info);
  FakeScheduler first, second;
  const RpcServer first_server = StartRpcServer("127.0.0.1:0", &first).value();
  const RpcServer second_server = StartRpcServer("127.0.0.1:0", &second).value();
  ChannelCache channels;
  auto locator = std::make_shared<ChangingScheduler>();
  {
    std::mutex mu;
    std::vector<absl::StatusCode> said;
    Reporter::Options options;
    options.scheduler = locator;
    options.interval = absl::Milliseconds(5);
    options.pool = pool.get();
    options.fill = [](v1::WorkerReport&) {};
    options.on_status = [&](const absl::Status& status) {
      std::lock_guard lock(mu);
      said.push_back(status.code());
    };
    Reporter reporter(std::move(options), channels, metrics);
    reporter.Start({});
    EXPECT_FALSE(reporter.status().ok()) << "nobody leads yet";
    locator->Set({"127.0.0.1:" + std::to_string(first_server.port), 1});
    EXPECT_TRUE(first.WaitKeys(1));
    locator->Set({"127.0.0.1:" + std::to_string(second_server.port), 2});
    EXPECT_TRUE(second.WaitKeys(1));
    // The same one again, which knew nothing in between.
    locator->Set({"127.0.0.1:" + std::to_string(second_server.port), 3});
    const absl::Time until = absl::Now() + absl::Seconds(30);
    while (second.snapshots() < 2 && absl::Now() < until) absl::SleepFor(absl::Milliseconds(2));
    EXPECT_EQ(second.snapshots(), 2);
    EXPECT_EQ(first.snapshots(), 1);
    std::lock_guard lock(mu);
    EXPECT_EQ(said, std::vector<absl::StatusCode>{absl::StatusCode::kOk}) << "accepted all along, said once";
  }
  for (const RpcServer* server : {&first_server, &second_server}) {
    server->server->Shutdown();
    server->server->Wait();
  }
}

}  // namespace
}  // namespace tidepool
