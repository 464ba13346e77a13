#include "server/worker/slot_queue.h"

#include <gtest/gtest.h>

#include <atomic>
#include <future>
#include <vector>

namespace tidepool {
namespace {

constexpr SlotGrant kNo{.granted = false, .slots = 1};

class SlotQueueTest : public testing::Test {
 protected:
  void Start(size_t max_waiting) {
    queue_ = std::make_unique<SlotQueue>(SlotCore::Options{.max_waiting = max_waiting}, metrics_);
  }
  absl::Status Submit(const std::string& id, std::function<SlotGrant()> attempt, bool batch_class = false) {
    return queue_->Submit(
        {.id = id, .tenant = "t", .batch_class = batch_class, .attempt = std::move(attempt)});
  }

  MetricRegistry metrics_;
  std::unique_ptr<SlotQueue> queue_;
};

TEST_F(SlotQueueTest, GrantsAtOnceWhenNobodyWaits) {
  Start(4);
  bool granted = false;
  EXPECT_TRUE(Submit("a", [&] {
                granted = true;
                return SlotGrant{.granted = true};
              }).ok());
  EXPECT_TRUE(granted) << "on the caller's thread";
  EXPECT_EQ(queue_->waiting(), 0u);
}

// Attempts of several in turn, until all have been granted; their names in that order.
class Turns {
 public:
  explicit Turns(size_t all) : all_(all) {}
  std::function<SlotGrant()> Of(char name) {
    return [this, name] {
      if (slots_ <= 0) return kNo;
      --slots_;
      order_ += name;
      if (order_.size() == all_) last_.set_value();
      return SlotGrant{.granted = true, .slots = 1};
    };
  }
  std::string Grant(int slots) {
    slots_ = slots;
    EXPECT_EQ(last_.get_future().wait_for(std::chrono::seconds(60)), std::future_status::ready);
    return order_;
  }

 private:
  const size_t all_;
  std::atomic<int> slots_{0};
  std::string order_;  // attempts run under the queue's lock
  std::promise<void> last_;
};

TEST_F(SlotQueueTest, ServesEqualsInOrderOfArrival) {
  Turns turns(3);
  Start(4);
  for (const char name : {'a', 'b', 'c'}) ASSERT_TRUE(Submit(std::string(1, name), turns.Of(name)).ok());
  EXPECT_EQ(queue_->waiting(), 3u);
  EXPECT_EQ(turns.Grant(3), "abc");
  queue_.reset();
}

TEST_F(SlotQueueTest, OnlineRequestsGoBeforeThoseOfTheBatchClass) {
  Turns turns(4);
  Start(8);
  ASSERT_TRUE(Submit("a", turns.Of('a'), /*batch_class=*/true).ok());
  ASSERT_TRUE(Submit("b", turns.Of('b'), true).ok());
  ASSERT_TRUE(Submit("c", turns.Of('c')).ok());
  ASSERT_TRUE(Submit("d", turns.Of('d')).ok());
  EXPECT_EQ(turns.Grant(4), "cdab");
  queue_.reset();
}

TEST_F(SlotQueueTest, BatchClassMayTakeHalfTheWaitingPlaces) {
  Start(3);
  const auto never = [] { return kNo; };
  ASSERT_TRUE(Submit("a", never, true).ok());
  ASSERT_TRUE(Submit("b", never, true).ok());
  EXPECT_EQ(Submit("c", never, true).code(), absl::StatusCode::kResourceExhausted);
  for (const char* id : {"d", "e", "f"}) EXPECT_TRUE(Submit(id, never).ok()) << "all places are theirs";
  EXPECT_EQ(Submit("g", never).code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(queue_->waiting(), 5u);
}

TEST_F(SlotQueueTest, RefusesBeyondItsLimitAndNamesIt) {
  Start(1);
  ASSERT_TRUE(Submit("a", [] { return kNo; }).ok());
  const absl::Status status = Submit("b", [] { return kNo; });
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_NE(std::string(status.message()).find("engine.max_waiting is 1"), std::string::npos);
}

TEST_F(SlotQueueTest, NeverTriesACancelledWaiter) {
  Start(2);
  std::atomic<bool> cancelled{false}, tried_after{false};
  ASSERT_TRUE(Submit("a", [&] {
                if (cancelled) tried_after = true;
                return kNo;
              }).ok());
  queue_->Cancel("a");
  cancelled = true;
  // A later waiter's turn comes only after the head's would have.
  std::promise<void> turn;
  ASSERT_TRUE(Submit("b", [&, n = 0]() mutable {
                if (++n < 3) return kNo;
                turn.set_value();
                return SlotGrant{.granted = true, .slots = 1};
              }).ok());
  ASSERT_EQ(turn.get_future().wait_for(std::chrono::seconds(60)), std::future_status::ready);
  EXPECT_FALSE(tried_after);
  queue_.reset();
}

// A batch request gives its slots up to an online one, saves what it has first, and gets them back.
TEST_F(SlotQueueTest, AsksWhoGivesWayAndTriesItAgainLater) {
  Start(4);
  std::atomic<bool> free{true}, saved{false};
  std::promise<void> online, back;
  SlotQueue::Request batch{.id = "batch", .tenant = "t", .batch_class = true};
  batch.attempt = [&, grants = 0]() mutable {
    if (!free.exchange(false)) return kNo;
    if (++grants == 2) {
      EXPECT_TRUE(saved);
      back.set_value();
    }
    return SlotGrant{.granted = true, .slots = 3};
  };
  batch.preempt = [&] {
    free = true;
    queue_->Preempted("batch");  // as an engine's thread does, later
    return true;
  };
  batch.swap_out = [&] {
    saved = true;
    return 1.0;
  };
  ASSERT_TRUE(queue_->Submit(std::move(batch)).ok());
  ASSERT_TRUE(Submit("online", [&] {
                if (!free.exchange(false)) return SlotGrant{.granted = false, .slots = 3};
                EXPECT_TRUE(saved);
                online.set_value();
                return SlotGrant{.granted = true, .slots = 3};
              }).ok());
  ASSERT_EQ(online.get_future().wait_for(std::chrono::seconds(60)), std::future_status::ready);
  free = true;
  queue_->Released("online");
  ASSERT_EQ(back.get_future().wait_for(std::chrono::seconds(60)), std::future_status::ready);
  queue_.reset();
}

TEST_F(SlotQueueTest, WhoIsRefusedMakesNobodyGiveWay) {
  Start(1);
  std::atomic<bool> asked{false};
  const auto no = [] { return kNo; };
  SlotQueue::Request low{.id = "low", .tenant = "t", .priority = 5};
  low.attempt = [] { return SlotGrant{.granted = true, .slots = 1}; };
  low.preempt = [&] { return !asked.exchange(true); };
  ASSERT_TRUE(queue_->Submit(std::move(low)).ok());
  ASSERT_TRUE(queue_->Submit({.id = "equal", .tenant = "t", .priority = 5, .attempt = no}).ok());
  EXPECT_EQ(queue_->Submit({.id = "high", .tenant = "t", .attempt = no}).code(),
            absl::StatusCode::kResourceExhausted);
  EXPECT_FALSE(asked);
  queue_->Cancel("equal");
  ASSERT_TRUE(queue_->Submit({.id = "high", .tenant = "t", .attempt = no}).ok());
  EXPECT_TRUE(asked);
  queue_.reset();
}

TEST_F(SlotQueueTest, OneThatCannotGiveWayYetIsAskedWhenItCan) {
  Start(4);
  std::atomic<bool> ready{false}, too_early{false};
  std::promise<void> asked;
  SlotQueue::Request batch{.id = "batch", .tenant = "t", .batch_class = true};
  batch.attempt = [] { return SlotGrant{.granted = true, .slots = 1}; };
  batch.may_preempt = [&] { return ready.load(); };
  batch.preempt = [&, once = false]() mutable {
    if (!ready) too_early = true;
    if (!std::exchange(once, true)) asked.set_value();
    return true;
  };
  ASSERT_TRUE(queue_->Submit(std::move(batch)).ok());
  ASSERT_TRUE(Submit("online", [] { return kNo; }).ok());
  ready = true;
  EXPECT_EQ(asked.get_future().wait_for(std::chrono::seconds(60)), std::future_status::ready);
  EXPECT_FALSE(too_early);
  queue_.reset();
}

TEST_F(SlotQueueTest, WhoWasPreemptedWaitsHoweverManyDo) {
  Start(1);
  std::atomic<bool> once{true};
  ASSERT_TRUE(
      Submit("a", [&] { return once.exchange(false) ? SlotGrant{.granted = true, .slots = 1} : kNo; }).ok());
  ASSERT_TRUE(Submit("b", [] { return kNo; }).ok());
  queue_->Preempted("a");
  const absl::Time limit = absl::Now() + absl::Seconds(60);
  while (queue_->waiting() < 2 && absl::Now() < limit) std::this_thread::yield();
  EXPECT_EQ(queue_->waiting(), 2u);
  queue_.reset();
}

}  // namespace
}  // namespace tidepool
