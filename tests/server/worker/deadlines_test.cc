#include "server/worker/deadlines.h"

#include <gtest/gtest.h>

#include <future>
#include <memory>

namespace tidepool {
namespace {

TEST(Deadlines, CallsInTheOrderOfTime) {
  Deadlines deadlines;
  const absl::Time now = Clock::Real().Now();
  std::promise<void> all_there, done;
  std::string order;
  // Nothing is called before all are there, however long that takes.
  deadlines.At(now, [&] { all_there.get_future().wait(); });
  deadlines.At(now + absl::Milliseconds(30), [&] {
    order += 'c';
    done.set_value();
  });
  deadlines.At(now + absl::Milliseconds(10), [&] { order += 'a'; });
  deadlines.At(now + absl::Milliseconds(20), [&] { order += 'b'; });
  all_there.set_value();
  ASSERT_EQ(done.get_future().wait_for(std::chrono::seconds(30)), std::future_status::ready);
  EXPECT_EQ(order, "abc");
  EXPECT_GE(Clock::Real().Now(), now + absl::Milliseconds(30));
}

TEST(Deadlines, WhatIsCancelledIsNotCalledAndIsLetGo) {
  Deadlines deadlines;
  auto held = std::make_shared<int>(1);
  const auto id = deadlines.At(Clock::Real().Now() + absl::Hours(1), [held] {});
  EXPECT_EQ(held.use_count(), 2);
  EXPECT_TRUE(deadlines.Cancel(id));
  EXPECT_EQ(held.use_count(), 1);
  EXPECT_FALSE(deadlines.Cancel(id));
}

TEST(Deadlines, ACallMayAskForTheNext) {
  Deadlines deadlines;
  std::promise<void> done;
  deadlines.At(Clock::Real().Now(), [&] { deadlines.At(Clock::Real().Now(), [&] { done.set_value(); }); });
  EXPECT_EQ(done.get_future().wait_for(std::chrono::seconds(30)), std::future_status::ready);
}

TEST(Deadlines, EndsWithoutCallingWhatIsLeft) {
  bool called = false;
  {
    Deadlines().At(Clock::Real().Now() + absl::Hours(1), [&] { called = true; });
  }
  EXPECT_FALSE(called);
}

}  // namespace
}  // namespace tidepool
