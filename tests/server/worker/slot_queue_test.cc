#include "server/worker/slot_queue.h"

#include <gtest/gtest.h>

#include <atomic>
#include <future>
#include <vector>

namespace tidepool {
namespace {

TEST(SlotQueue, GrantsAtOnceWhenNobodyWaits) {
  MetricRegistry metrics;
  SlotQueue queue(4, metrics);
  bool granted = false;
  EXPECT_TRUE(queue.Submit("a", [&] { return granted = true; }).ok());
  EXPECT_TRUE(granted) << "on the caller's thread";
  EXPECT_EQ(queue.waiting(), 0u);
}

TEST(SlotQueue, ServesInOrderOfArrival) {
  MetricRegistry metrics;
  SlotQueue queue(4, metrics);
  std::atomic<int> slots{0};
  std::vector<int> order;  // attempts run under the queue's lock
  std::promise<void> last;
  for (int i = 0; i < 3; ++i) {
    ASSERT_TRUE(queue
                    .Submit(std::to_string(i),
                            [&, i] {
                              if (slots <= 0) return false;
                              --slots;
                              order.push_back(i);
                              if (i == 2) last.set_value();
                              return true;
                            })
                    .ok());
  }
  EXPECT_EQ(queue.waiting(), 3u);
  slots = 3;
  ASSERT_EQ(last.get_future().wait_for(std::chrono::seconds(10)), std::future_status::ready);
  EXPECT_EQ(order, (std::vector<int>{0, 1, 2}));
}

TEST(SlotQueue, OnlineRequestsGoBeforeThoseOfTheBatchClass) {
  MetricRegistry metrics;
  SlotQueue queue(8, metrics);
  std::atomic<int> slots{0};
  std::string order;  // attempts run under the queue's lock
  std::promise<void> last;
  auto attempt = [&](char name) {
    return [&, name] {
      if (slots <= 0) return false;
      --slots;
      order += name;
      if (order.size() == 4) last.set_value();
      return true;
    };
  };
  ASSERT_TRUE(queue.Submit("a", attempt('a'), /*batch_class=*/true).ok());
  ASSERT_TRUE(queue.Submit("b", attempt('b'), true).ok());
  ASSERT_TRUE(queue.Submit("c", attempt('c')).ok());
  ASSERT_TRUE(queue.Submit("d", attempt('d')).ok());
  slots = 4;
  ASSERT_EQ(last.get_future().wait_for(std::chrono::seconds(10)), std::future_status::ready);
  EXPECT_EQ(order, "cdab");
}

TEST(SlotQueue, BatchClassMayTakeHalfTheWaitingPlaces) {
  MetricRegistry metrics;
  SlotQueue queue(3, metrics);
  const auto never = [] { return false; };
  ASSERT_TRUE(queue.Submit("a", never, true).ok());
  ASSERT_TRUE(queue.Submit("b", never, true).ok());
  EXPECT_EQ(queue.Submit("c", never, true).code(), absl::StatusCode::kResourceExhausted);
  for (const char* id : {"d", "e", "f"}) EXPECT_TRUE(queue.Submit(id, never).ok()) << "all places are theirs";
  EXPECT_EQ(queue.Submit("g", never).code(), absl::StatusCode::kResourceExhausted);
}

TEST(SlotQueue, RefusesBeyondItsLimitAndNamesIt) {
  MetricRegistry metrics;
  SlotQueue queue(1, metrics);
  ASSERT_TRUE(queue.Submit("a", [] { return false; }).ok());
  const absl::Status status = queue.Submit("b", [] { return false; });
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_NE(std::string(status.message()).find("engine.max_waiting"), std::string::npos);
}

TEST(SlotQueue, NeverTriesACancelledWaiter) {
  MetricRegistry metrics;
  SlotQueue queue(2, metrics);
  std::atomic<bool> cancelled{false}, tried_after{false};
  ASSERT_TRUE(queue
                  .Submit("a",
                          [&] {
                            if (cancelled) tried_after = true;
                            return false;
                          })
                  .ok());
  queue.Cancel("a");
  cancelled = true;
  // A later waiter's turn comes only after the head's would have.
  std::promise<void> turn;
  ASSERT_TRUE(queue
                  .Submit("b",
                          [&, n = 0]() mutable {
                            if (++n < 3) return false;
                            turn.set_value();
                            return true;
                          })
                  .ok());
  ASSERT_EQ(turn.get_future().wait_for(std::chrono::seconds(10)), std::future_status::ready);
  EXPECT_FALSE(tried_after);
}

}  // namespace
}  // namespace tidepool
