#include "server/worker/role_change.h"

#include <gtest/gtest.h>

#include "absl/time/time.h"

namespace tidepool {
namespace {

using State = RoleChange::State;
using Active = RoleChange::Active;

const absl::Time kNow = absl::UnixEpoch() + absl::Hours(1);

State Ordered(RoleChange& role, v1::Role wanted) {
  const auto state = role.Order(wanted);
  EXPECT_TRUE(state.ok()) << state.status();
  return state.value_or(State());
}

TEST(RoleChangeTest, WaitsUntilTheSchedulerKnowsAndTheLastAnswerHasEnded) {
  RoleChange role(v1::ROLE_DECODE);
  EXPECT_EQ(Ordered(role, v1::ROLE_PREFILL), (State{v1::ROLE_DECODE, v1::ROLE_PREFILL}));
  EXPECT_FALSE(role.Advance(std::nullopt, Active{}, kNow));
  EXPECT_FALSE(role.Advance(role.Get(), Active{.generate = 1}, kNow));
  // What it will do anyhow keeps nothing.
  EXPECT_TRUE(role.Advance(role.Get(), Active{.prefill = 3}, kNow));
  EXPECT_EQ(role.Get(), State{v1::ROLE_PREFILL});
  EXPECT_FALSE(role.Advance(role.Get(), Active{}, kNow));
}

TEST(RoleChangeTest, WhatTheSchedulerHeardBeforeTheOrderIsNotEnough) {
  RoleChange role(v1::ROLE_DECODE);
  const State before = role.Get();
  Ordered(role, v1::ROLE_PREFILL);
  EXPECT_FALSE(role.Advance(before, Active{}, kNow));
  EXPECT_TRUE(role.Advance(role.Get(), Active{}, kNow));
}

TEST(RoleChangeTest, AWorkerThatGainsAKindChangesAtOnce) {
  RoleChange role(v1::ROLE_PREFILL);
  EXPECT_EQ(Ordered(role, v1::ROLE_BOTH), State{v1::ROLE_BOTH});
  EXPECT_TRUE(role.TakesGenerate(kNow));
  // And one that gives one up waits for that kind only.
  Ordered(role, v1::ROLE_DECODE);
  EXPECT_FALSE(role.Advance(role.Get(), Active{.prefill = 1}, kNow));
  EXPECT_TRUE(role.Advance(role.Get(), Active{.generate = 9}, kNow));
  EXPECT_EQ(role.Get(), State{v1::ROLE_DECODE});
}

TEST(RoleChangeTest, ItsRoleOfNowTakesAnOrderBack) {
  RoleChange role(v1::ROLE_DECODE);
  Ordered(role, v1::ROLE_PREFILL);
  EXPECT_EQ(Ordered(role, v1::ROLE_DECODE), State{v1::ROLE_DECODE});
  EXPECT_FALSE(role.Advance(role.Get(), Active{}, kNow));
  EXPECT_EQ(role.Get(), State{v1::ROLE_DECODE});
}

TEST(RoleChangeTest, ALaterOrderReplacesAnEarlierOne) {
  RoleChange role(v1::ROLE_BOTH);
  Ordered(role, v1::ROLE_PREFILL);
  EXPECT_EQ(Ordered(role, v1::ROLE_DECODE), (State{v1::ROLE_BOTH, v1::ROLE_DECODE}));
  EXPECT_TRUE(role.Advance(role.Get(), Active{.generate = 2}, kNow));
  EXPECT_EQ(role.Get(), State{v1::ROLE_DECODE});
}

TEST(RoleChangeTest, TakesBothKindsWhileItChangesAndLateOnesAfterwards) {
  RoleChange role(v1::ROLE_DECODE);
  EXPECT_FALSE(role.TakesPrefill(kNow));
  Ordered(role, v1::ROLE_PREFILL);
  EXPECT_TRUE(role.TakesGenerate(kNow));
  ASSERT_TRUE(role.Advance(role.Get(), Active{}, kNow));
  EXPECT_TRUE(role.TakesPrefill(kNow));
  EXPECT_TRUE(role.TakesGenerate(kNow + RoleChange::kLateCalls));
  EXPECT_FALSE(role.TakesGenerate(kNow + RoleChange::kLateCalls + absl::Seconds(1)));
}

TEST(RoleChangeTest, OnlyRolesOfWorkersAreTaken) {
  RoleChange role(v1::ROLE_DECODE);
  for (const int wrong : {0, int{v1::ROLE_STORE}, 77}) {
    EXPECT_TRUE(absl::IsInvalidArgument(role.Order(static_cast<v1::Role>(wrong)).status())) << wrong;
  }
  EXPECT_EQ(role.Get(), State{v1::ROLE_DECODE});
}

}  // namespace
}  // namespace tidepool
