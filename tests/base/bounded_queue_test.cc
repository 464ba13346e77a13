#include "base/bounded_queue.h"

#include <gtest/gtest.h>

#include <memory>
#include <thread>
#include <vector>

namespace tidepool {
namespace {

TEST(BoundedQueue, RefusesBeyondCapacityAndLeavesTheItem) {
  BoundedQueue<std::unique_ptr<int>> q(1);
  auto a = std::make_unique<int>(1), b = std::make_unique<int>(2);
  EXPECT_TRUE(q.TryPush(a));
  EXPECT_FALSE(q.TryPush(b));
  ASSERT_NE(b, nullptr) << "a refused item stays with the caller";
  EXPECT_EQ(*q.TryPop().value(), 1);
  EXPECT_TRUE(q.TryPush(b));
}

TEST(BoundedQueue, ClosedQueueDrainsAndThenIsEmpty) {
  BoundedQueue<int> q(4);
  q.TryPush(7);
  q.Close();
  EXPECT_FALSE(q.TryPush(8));
  EXPECT_EQ(q.Pop(absl::InfiniteDuration()), 7);
  EXPECT_EQ(q.Pop(absl::InfiniteDuration()), std::nullopt);
}

TEST(BoundedQueue, HandsEveryItemToExactlyOneConsumer) {
  constexpr int kItems = 2000;
  BoundedQueue<int> q(8);
  std::vector<int> seen(kItems, 0);
  std::mutex mu;
  std::vector<std::thread> threads;
  for (int c = 0; c < 2; ++c) {
    threads.emplace_back([&] {
      while (auto v = q.Pop(absl::Seconds(10))) {
        std::lock_guard lock(mu);
        ++seen[static_cast<size_t>(*v)];
      }
    });
  }
  for (int i = 0; i < kItems; ++i) {
    while (!q.TryPush(i)) std::this_thread::yield();
  }
  q.Close();
  for (auto& t : threads) t.join();
  EXPECT_EQ(seen, std::vector<int>(kItems, 1));
}

}  // namespace
}  // namespace tidepool
