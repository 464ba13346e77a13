#include "server/gateway/cluster_watch.h"

#include <gtest/gtest.h>

#include <thread>

#include "tests/server/gateway/fake_cluster.h"

namespace tidepool {
namespace {

constexpr absl::Duration kBridged = absl::Seconds(5);

// A watch of a fake scheduler, on a clock that moves only when told to.
class ClusterWatchTest : public ::testing::Test {
 protected:
  // Whoever leads: another process after a takeover.
  struct Locator final : SchedulerLocator {
    Place Get() const override {
      std::lock_guard lock(mu);
      return {.address = address, .term = 0};
    }
    bool Obey(uint64_t) override { return true; }
    void Set(std::string to) {
      std::lock_guard lock(mu);
      address = std::move(to);
    }
    mutable std::mutex mu;
    std::string address;
  };

  void Start(absl::Duration bridged) {
    scheduler_ = NewScheduler(/*workers=*/true);
    locator_.Set(scheduler_->address());
    watch_ = std::make_unique<ClusterWatch>(channels_, locator_, "", absl::Milliseconds(5), bridged, clock_);
    watch_->Start([] {});
    ASSERT_TRUE(Eventually([&] { return watch_->Report().ready(); }));
  }
  ~ClusterWatchTest() override {
    if (watch_) watch_->Stop();
  }
  std::unique_ptr<FakeScheduler> NewScheduler(bool workers) {
    auto scheduler = std::make_unique<FakeScheduler>();
    if (workers) scheduler->Register(worker_.address(), v1::ROLE_BOTH);
    return scheduler;
  }
  // Until the watch has seen that nobody answers.
  void LoseScheduler() {
    locator_.Set("");
    scheduler_.reset();
    ASSERT_TRUE(Eventually([&] { return !watch_->Get()->error.empty(); }));
  }
  bool Ready() { return watch_->Report().ready(); }
  std::string Why() { return watch_->Report().ToJson(); }
  template <typename F>
  static bool Eventually(F holds) {
    const absl::Time deadline = absl::Now() + kTestWait;
    while (!holds() && absl::Now() < deadline) absl::SleepFor(absl::Milliseconds(1));
    return holds();
  }

  FakeClock clock_;
  FakeWorker worker_{"a"};
  ChannelCache channels_;
  Locator locator_;
  std::unique_ptr<FakeScheduler> scheduler_;
  std::unique_ptr<ClusterWatch> watch_;
};

TEST_F(ClusterWatchTest, StaysReadyWhileATakeoverIsWaitedFor) {
  Start(kBridged);
  LoseScheduler();
  EXPECT_TRUE(Ready());
  // The new one knows of no worker yet.
  scheduler_ = NewScheduler(/*workers=*/false);
  locator_.Set(scheduler_->address());
  ASSERT_TRUE(Eventually([&] { return watch_->Get()->error.empty(); }));
  EXPECT_EQ(watch_->Get()->decoding, 0);
  EXPECT_TRUE(Ready());
  EXPECT_TRUE(watch_->Get()->model.has_value()) << "kept, so that requests are read meanwhile";
  // Its workers report: all this begins anew.
  scheduler_->Register(worker_.address(), v1::ROLE_BOTH);
  ASSERT_TRUE(Eventually([&] { return watch_->Get()->complete(); }));
  clock_.Advance(kBridged * 10);
  EXPECT_TRUE(Eventually([&] { return Ready(); }));
}

TEST_F(ClusterWatchTest, IsNotReadyWhenItTakesLongerAndSaysWhy) {
  Start(kBridged);
  LoseScheduler();
  clock_.Advance(kBridged - absl::Milliseconds(1));
  EXPECT_TRUE(Ready());
  clock_.Advance(absl::Milliseconds(1));
  EXPECT_FALSE(Ready());
  EXPECT_NE(Why().find("the scheduler does not answer"), std::string::npos) << Why();
  scheduler_ = NewScheduler(/*workers=*/false);
  locator_.Set(scheduler_->address());
  ASSERT_TRUE(Eventually([&] { return watch_->Get()->error.empty(); }));
  EXPECT_FALSE(Ready()) << "it is bridged once, from the last time that all was there";
  EXPECT_NE(Why().find("no worker that decodes"), std::string::npos) << Why();
}

TEST_F(ClusterWatchTest, BridgesNothingWhereNobodyTakesOver) {
  Start(absl::ZeroDuration());
  LoseScheduler();
  EXPECT_FALSE(Ready());
}

}  // namespace
}  // namespace tidepool
