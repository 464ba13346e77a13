#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "scheduler/core.h"
#include "tests/scheduler/cluster_builder.h"

namespace tidepool {
namespace {

class RecordsTest : public testing::Test {
 protected:
  void Start(const SchedulerOptions& options = {}) {
    core_.emplace(options);
    core_->Report(TestReport("p1", Role::kPrefill), kStart);
    core_->Report(TestReport("d1", Role::kDecode), kStart);
  }
  std::optional<SchedulerCore> core_;
};

TEST_F(RecordsTest, PlacedRequestIsRememberedWithWhatWasPredictedAndThenMeasured) {
  Start();
  auto r = TestRequest("r", 640);
  r.tenant = "acme";
  r.slo_class = SloClass::kInteractive;
  const auto placed = core_->Place(r, kStart);
  auto record = core_->FindRequest("r");
  ASSERT_TRUE(record.has_value());
  EXPECT_EQ(record->outcome, "open");
  EXPECT_EQ(record->tenant, "acme");
  EXPECT_EQ(record->slo_class, SloClass::kInteractive);
  EXPECT_EQ(record->prefill_worker, "p1");
  EXPECT_EQ(record->decode_worker, "d1");
  EXPECT_EQ(record->predicted_ttft_seconds, placed.placement->ttft_seconds);
  EXPECT_EQ(record->expected_output_tokens, 64u);
  core_->Finish("r", kStart + absl::Seconds(2),
                {.output_tokens = 17, .ttft_seconds = 0.3, .cached_remote_tokens = 64, .fetched_bytes = 99});
  record = core_->FindRequest("r");
  EXPECT_EQ(record->outcome, "done");
  EXPECT_EQ(record->actual.output_tokens, 17u);
  EXPECT_EQ(record->actual.ttft_seconds, 0.3);
  EXPECT_EQ(record->actual.cached_remote_tokens, 64u);
  EXPECT_EQ(record->actual.fetched_bytes, 99u);
}

TEST_F(RecordsTest, RejectionsAndLossesSayWhatBecameOfTheRequest) {
  SchedulerOptions options;
  options.slo_ttft = absl::Milliseconds(200);
  Start(options);
  core_->Place(TestRequest("too-long", 6400), kStart);
  EXPECT_EQ(core_->FindRequest("too-long")->outcome, "rejected");
  EXPECT_EQ(core_->FindRequest("too-long")->rejection_kind, "ttft");
  EXPECT_GT(core_->FindRequest("too-long")->predicted_ttft_seconds, 0.2);
  core_->Place(TestRequest("lost", 64), kStart);
  core_->Place(TestRequest("failed", 64), kStart);
  core_->Finish("failed", kStart, {.completed = false});
  core_->Tick(kStart + absl::Seconds(10));
  EXPECT_EQ(core_->FindRequest("lost")->outcome, "lost");
  EXPECT_EQ(core_->FindRequest("failed")->outcome, "failed");
}

TEST_F(RecordsTest, WhatIsPlacedAgainWithoutAnEndTakesItsOwnPlace) {
  SchedulerOptions options;
  options.max_inflight = 1;
  Start(options);
  core_->Report(TestReport("d2", Role::kDecode), kStart);
  auto r = TestRequest("r", 64);
  ASSERT_TRUE(core_->Place(r, kStart).placement.has_value());
  r.exclude_workers = {core_->FindRequest("r")->decode_worker};
  ASSERT_TRUE(core_->Place(r, kStart).placement.has_value());
  EXPECT_EQ(core_->inflight(), 1u);
  const auto records = core_->RecentRequests(10);
  ASSERT_EQ(records.size(), 2u);
  EXPECT_EQ(records[0].outcome, "open");
  EXPECT_EQ(records[1].outcome, "failed");
  EXPECT_NE(records[0].decode_worker, records[1].decode_worker);
}

TEST_F(RecordsTest, OnlyTheLastAreKept) {
  SchedulerOptions options;
  options.max_records = 3;
  Start(options);
  for (int i = 0; i < 5; ++i) core_->Place(TestRequest("r" + std::to_string(i), 64), kStart);
  const auto recent = core_->RecentRequests(10);
  ASSERT_EQ(recent.size(), 3u);
  EXPECT_EQ(recent[0].request_id, "r4");
  EXPECT_EQ(recent[2].request_id, "r2");
  EXPECT_FALSE(core_->FindRequest("r1").has_value());
  // The end of one that is forgotten touches nobody else's record.
  EXPECT_TRUE(core_->Finish("r1", kStart, {.output_tokens = 5}));
  EXPECT_EQ(core_->FindRequest("r4")->outcome, "open");
}

TEST_F(RecordsTest, LearntLengthsReplaceTheGuess) {
  Start();
  const auto ask = [&](std::string id) {
    auto r = TestRequest(std::move(id), 64);
    r.tenant = "acme";
    r.route = "classify";
    r.max_tokens = 1000;
    return r;
  };
  core_->Place(ask("first"), kStart);
  EXPECT_EQ(core_->FindRequest("first")->expected_output_tokens, 256u);
  for (int i = 0; i < 40; ++i) {
    core_->Place(ask("r" + std::to_string(i)), kStart);
    core_->Finish("r" + std::to_string(i), kStart, {.output_tokens = 5});
  }
  core_->Place(ask("later"), kStart);
  EXPECT_EQ(core_->FindRequest("later")->expected_output_tokens, 5u);
  for (int i = 0; i < 40; ++i) {
    core_->Place(ask("c" + std::to_string(i)), kStart);
    core_->Finish("c" + std::to_string(i), kStart, {.output_tokens = 2, .cut = true});
  }
  core_->Place(ask("after-cuts"), kStart);
  EXPECT_EQ(core_->FindRequest("after-cuts")->expected_output_tokens, 5u) << "limits say nothing of lengths";
  auto capped = ask("capped");
  capped.max_tokens = 2;
  core_->Place(capped, kStart);
  EXPECT_EQ(core_->FindRequest("capped")->expected_output_tokens, 2u);
}

}  // namespace
}  // namespace tidepool
