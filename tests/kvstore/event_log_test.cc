#include "kvstore/event_log.h"

#include <gtest/gtest.h>

#include <thread>

#include "tests/kvstore/event_reader.h"

namespace tidepool {
namespace {

PoolEvent Stored(uint8_t n) {
  PoolEvent event;
  event.key.bytes[0] = n;
  return event;
}

TEST(EventLogTest, NumbersAreConsecutiveAndReplayable) {
  EventLog log(100);
  EXPECT_EQ(log.next(), 1u);
  EXPECT_EQ(log.oldest(), 1u);
  const std::vector<PoolEvent> two = {Stored(1), Stored(2)};
  log.Append(two);
  log.Append(Stored(3));
  for (uint64_t from = 1; from <= 4; ++from) {
    const auto page = log.Read(from, 100);
    EXPECT_FALSE(page.lost);
    EXPECT_EQ(page.next, 4u);
    ASSERT_EQ(page.events.size(), 4 - from);
    for (size_t i = 0; i < page.events.size(); ++i) {
      EXPECT_EQ(page.events[i].seq, from + i);
      EXPECT_EQ(page.events[i].key.bytes[0], from + i);
    }
  }
  EXPECT_EQ(log.Read(0, 1).events.at(0).seq, 1u) << "0 is the oldest kept";
  EXPECT_EQ(log.Read(2, 1).next, 3u);
  EXPECT_EQ(log.Read(9, 5).next, 9u) << "a number to come is no loss";
}

TEST(EventLogTest, KeepsTheNewestAndTellsReadersWhoAreTooLate) {
  Counter lost;
  EventLog log(4, &lost);
  for (uint8_t n = 1; n <= 11; ++n) log.Append(Stored(n));
  EXPECT_EQ(log.oldest(), 8u);
  const auto late = log.Read(3, 100);
  EXPECT_TRUE(late.lost);
  EXPECT_TRUE(late.events.empty());
  EXPECT_EQ(late.next, 12u);
  EXPECT_EQ(lost.value(), 5u);
  const auto kept = log.Read(8, 100);
  ASSERT_EQ(kept.events.size(), 4u);
  for (size_t i = 0; i < 4; ++i) EXPECT_EQ(kept.events[i].key.bytes[0], 8 + i);
}

TEST(EventLogTest, WaitEndsWithTheEventWithCloseAndWithTheTimeout) {
  EventLog log(4);
  EXPECT_FALSE(log.WaitFor(1, absl::Milliseconds(1)));
  std::thread writer([&] { log.Append(Stored(1)); });
  EXPECT_TRUE(log.WaitFor(1, absl::Minutes(1)));
  writer.join();
  std::thread closer([&] { log.Close(); });
  EXPECT_FALSE(log.WaitFor(2, absl::Minutes(1)));
  closer.join();
  EXPECT_FALSE(log.WaitFor(1, absl::Minutes(1))) << "closed for good";
}

TEST(EventLogTest, ConcurrentReadersSeeEveryEventOnce) {
  EventLog log(1 << 12);
  constexpr int kEvents = 4000;
  std::vector<std::thread> threads;
  for (int r = 0; r < 3; ++r) {
    threads.emplace_back([&] {
      uint64_t next = 1;
      while (next <= kEvents) {
        ASSERT_TRUE(log.WaitFor(next, absl::Minutes(1)));
        const auto page = log.Read(next, 7);
        ASSERT_FALSE(page.lost);
        for (const PoolEvent& e : page.events) ASSERT_EQ(e.seq, next++);
      }
    });
  }
  for (int i = 0; i < kEvents; ++i) log.Append(Stored(1));
  for (auto& t : threads) t.join();
}

}  // namespace
}  // namespace tidepool
