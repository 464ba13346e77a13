#include "scheduler/cluster_view.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/scheduler/cluster_builder.h"

namespace tidepool {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

class ClusterViewTest : public testing::Test {
 protected:
  ReportResult Report(WorkerReport r, absl::Duration at = absl::ZeroDuration()) {
    return view_.Report(std::move(r), kStart + at);
  }
  uint64_t Blocks(const std::string& id) {
    for (const auto& w : view_.Workers(kStart))
      if (w.address.worker_id == id) return w.indexed_blocks;
    return 0;
  }
  WorkerState State(const std::string& id) {
    for (const auto& w : view_.Workers(kStart))
      if (w.address.worker_id == id) return w.state;
    ADD_FAILURE() << "no worker " << id;
    return WorkerState::kLost;
  }

  SchedulerOptions options_;
  ClusterView view_{options_};
};

TEST_F(ClusterViewTest, FirstReportRegistersAndNamesTheModel) {
  EXPECT_FALSE(view_.model().has_value());
  auto result = Report(TestReport("w1", Role::kBoth));
  EXPECT_TRUE(result.status.ok());
  EXPECT_TRUE(result.registered);
  EXPECT_FALSE(result.resync);
  ASSERT_TRUE(view_.model().has_value());
  EXPECT_EQ(view_.model()->fingerprint, "f1");
}

TEST_F(ClusterViewTest, RefusalNamesEveryDifference) {
  ASSERT_TRUE(Report(TestReport("w1", Role::kPrefill)).status.ok());
  auto other = TestReport("w2", Role::kDecode);
  other.model.fingerprint = "f2";
  other.model.layout.block_tokens = 64;
  other.model.kv_codec = "fp8";
  other.model.max_model_len = 99;
  const auto result = Report(other);
  EXPECT_EQ(result.status.code(), absl::StatusCode::kFailedPrecondition);
  const std::string message(result.status.message());
  EXPECT_THAT(message, HasSubstr("worker w2 cannot join"));
  EXPECT_THAT(message, HasSubstr("model fingerprint is 'f2 (demo)', the cluster's is 'f1 (demo)'"));
  EXPECT_THAT(message, HasSubstr("kv.block_tokens is '64', the cluster's is '32'"));
  EXPECT_THAT(message, HasSubstr("kv.codec is 'fp8', the cluster's is 'none'"));
  EXPECT_THAT(message, HasSubstr("model.max_model_len is '99', the cluster's is '65536'"));
  EXPECT_EQ(view_.Workers(kStart).size(), 1u);
}

TEST_F(ClusterViewTest, EachDifferenceAloneIsRefused) {
  ASSERT_TRUE(Report(TestReport("w1", Role::kPrefill)).status.ok());
  const std::vector<std::pair<std::string, std::function<void(ModelIdentity&)>>> changes = {
      {"fingerprint", [](ModelIdentity& m) { m.fingerprint = "?"; }},
      {"layout", [](ModelIdentity& m) { m.layout.dtype = DType::kF32; }},
      {"layout", [](ModelIdentity& m) { m.layout.layers = 5; }},
      {"block_tokens", [](ModelIdentity& m) { m.layout.block_tokens = 16; }},
      {"kv.codec", [](ModelIdentity& m) { m.kv_codec = "int8"; }},
      {"max_model_len", [](ModelIdentity& m) { m.max_model_len = 1; }},
      {"vocabulary", [](ModelIdentity& m) { m.vocab_size = 1; }}};
  for (const auto& [name, change] : changes) {
    auto r = TestReport("w2", Role::kDecode);
    change(r.model);
    const auto result = Report(r);
    EXPECT_EQ(result.status.code(), absl::StatusCode::kFailedPrecondition) << name;
    EXPECT_THAT(std::string(result.status.message()), HasSubstr(name));
  }
}

TEST_F(ClusterViewTest, ClusterWithoutLiveWorkersTakesAnotherModel) {
  ASSERT_TRUE(Report(TestReport("w1", Role::kBoth)).status.ok());
  view_.Tick(kStart + absl::Seconds(4));
  auto r = TestReport("w2", Role::kBoth);
  r.model.fingerprint = "f2";
  EXPECT_TRUE(Report(r, absl::Seconds(5)).status.ok());
  EXPECT_EQ(view_.model()->fingerprint, "f2");
}

TEST_F(ClusterViewTest, MalformedReportsAreInvalid) {
  const std::vector<std::pair<std::string, std::function<void(WorkerReport&)>>> changes = {
      {"worker_id", [](WorkerReport& r) { r.address.worker_id.clear(); }},
      {"worker_id", [](WorkerReport& r) { r.address.worker_id.assign(257, 'x'); }},
      {"boot_id", [](WorkerReport& r) { r.address.boot_id.clear(); }},
      {"grpc", [](WorkerReport& r) { r.address.grpc.clear(); }},
      {"role", [](WorkerReport& r) { r.role = static_cast<Role>(9); }},
      {"seq", [](WorkerReport& r) { r.seq = 0; }},
      {"model", [](WorkerReport& r) { r.model.layout.head_dim = 0; }},
      {"max_model_len", [](WorkerReport& r) { r.model.max_model_len = 0; }}};
  for (const auto& [name, change] : changes) {
    auto r = TestReport("w1", Role::kBoth);
    change(r);
    const auto result = Report(r);
    EXPECT_EQ(result.status.code(), absl::StatusCode::kInvalidArgument) << name;
    EXPECT_THAT(std::string(result.status.message()), HasSubstr(name));
  }
  EXPECT_THAT(view_.Workers(kStart), IsEmpty());
}

TEST_F(ClusterViewTest, EventsChangeTheIndexAndSnapshotsReplaceIt) {
  auto r = TestReport("w1", Role::kBoth);
  Report(Holding(r, "a", 4));
  EXPECT_EQ(Blocks("w1"), 4u);
  r = TestReport("w1", Role::kBoth, 2);
  r.events = {{ChainKey("a", 3), true}, {ChainKey("b", 0), false}, {ChainKey("b", 1), false}};
  EXPECT_FALSE(Report(r).resync);
  EXPECT_EQ(Blocks("w1"), 5u);
  r = TestReport("w1", Role::kBoth, 3);
  r.snapshot = true;
  Report(Holding(r, "c", 1));
  EXPECT_EQ(Blocks("w1"), 1u);
}

TEST_F(ClusterViewTest, GapInReportsAsksForSnapshotUntilOneComes) {
  Report(TestReport("w1", Role::kBoth));
  EXPECT_FALSE(Report(TestReport("w1", Role::kBoth, 2)).resync);
  EXPECT_TRUE(Report(TestReport("w1", Role::kBoth, 4)).resync);
  EXPECT_TRUE(Report(TestReport("w1", Role::kBoth, 5)).resync);
  auto r = TestReport("w1", Role::kBoth, 6);
  r.snapshot = true;
  EXPECT_FALSE(Report(r).resync);
  EXPECT_FALSE(Report(TestReport("w1", Role::kBoth, 7)).resync);
}

TEST_F(ClusterViewTest, RestartedSchedulerAsksRunningWorkersForSnapshots) {
  const auto result = Report(TestReport("w1", Role::kBoth, 500));
  EXPECT_TRUE(result.status.ok());
  EXPECT_TRUE(result.registered);
  EXPECT_TRUE(result.resync);
}

TEST_F(ClusterViewTest, RepeatedReportChangesNothing) {
  auto r = TestReport("w1", Role::kBoth);
  Report(r);
  r.load.running = 77;
  EXPECT_TRUE(Report(r).status.ok());
  EXPECT_EQ(view_.Workers(kStart)[0].load.running, 0u);
}

TEST_F(ClusterViewTest, RestartReplacesEverythingOfTheOldProcess) {
  auto r = TestReport("w1", Role::kBoth);
  Report(Holding(r, "a", 4));
  view_.Book({.request_id = "r1", .placed_at = kStart});
  r = TestReport("w1", Role::kBoth);
  r.address.boot_id = "boot-2";
  r.address.grpc = "w1:2";
  const auto result = Report(r);
  EXPECT_TRUE(result.registered);
  EXPECT_EQ(Blocks("w1"), 0u);
  EXPECT_EQ(view_.inflight(), 0u);
  EXPECT_EQ(view_.Workers(kStart)[0].address.grpc, "w1:2");
}

TEST_F(ClusterViewTest, ReplacedProcessCannotComeBack) {
  Report(TestReport("w1", Role::kBoth));
  auto second = TestReport("w1", Role::kBoth);
  second.address.boot_id = "boot-2";
  Report(second);
  const auto result = Report(TestReport("w1", Role::kBoth, 2));
  EXPECT_EQ(result.status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(result.status.message()), HasSubstr("own worker.id"));
  EXPECT_EQ(view_.Workers(kStart)[0].address.boot_id, "boot-2");
}

TEST_F(ClusterViewTest, SilentWorkerIsLostThenForgottenAndMayReturn) {
  auto r = TestReport("w1", Role::kBoth);
  Report(Holding(r, "a", 4));
  EXPECT_THAT(view_.Tick(kStart + absl::Seconds(3)), IsEmpty());
  EXPECT_THAT(view_.Tick(kStart + absl::Seconds(3.1)), ElementsAre("w1"));
  EXPECT_THAT(view_.Tick(kStart + absl::Seconds(3.2)), IsEmpty()) << "told once";
  EXPECT_EQ(State("w1"), WorkerState::kLost);
  EXPECT_EQ(Blocks("w1"), 0u);

  const auto back = Report(TestReport("w1", Role::kBoth, 40), absl::Seconds(5));
  EXPECT_TRUE(back.registered);
  EXPECT_TRUE(back.resync) << "what it holds was dropped";
  EXPECT_EQ(State("w1"), WorkerState::kReady);

  view_.Tick(kStart + absl::Seconds(9));
  view_.Tick(kStart + absl::Minutes(10));
  EXPECT_THAT(view_.Workers(kStart), IsEmpty());
}

TEST_F(ClusterViewTest, LossEndsTheBookingsOfTheWorkerAndNoOthers) {
  Report(TestReport("p1", Role::kPrefill));
  Report(TestReport("d1", Role::kDecode));
  Report(TestReport("d2", Role::kDecode));
  view_.Book({.request_id = "on-d1", .prefill = 0, .decode = 1, .placed_at = kStart});
  view_.Book({.request_id = "on-d2", .prefill = 0, .decode = 2, .holder = 1, .placed_at = kStart});
  for (const char* id : {"p1", "d2"})
    Report(TestReport(id, id[0] == 'p' ? Role::kPrefill : Role::kDecode, 2), absl::Seconds(3));
  EXPECT_THAT(view_.Tick(kStart + absl::Seconds(4)), ElementsAre("d1"));
  EXPECT_FALSE(view_.FindBooking("on-d1") != nullptr);
  EXPECT_TRUE(view_.FindBooking("on-d2") != nullptr);
  EXPECT_FALSE(view_.FindBooking("on-d2")->holder.has_value());
}

TEST_F(ClusterViewTest, DecodingRequestOutlivesItsPrefillWorker) {
  Report(TestReport("p1", Role::kPrefill));
  Report(TestReport("d1", Role::kDecode));
  view_.Book({.request_id = "r", .prefill = 0, .decode = 1, .placed_at = kStart});
  auto r = TestReport("d1", Role::kDecode, 2);
  r.prefilled = {"r", "never heard of"};
  Report(r, absl::Seconds(3));
  EXPECT_THAT(view_.Tick(kStart + absl::Seconds(4)), ElementsAre("p1"));
  EXPECT_TRUE(view_.FindBooking("r") != nullptr);
}

TEST_F(ClusterViewTest, BookingsExpireFinishOnceAndAreReplacedByRetries) {
  Report(TestReport("w1", Role::kBoth));
  view_.Book({.request_id = "r", .placed_at = kStart});
  view_.Book({.request_id = "r", .placed_at = kStart + absl::Seconds(1)});
  EXPECT_EQ(view_.inflight(), 1u);
  EXPECT_TRUE(view_.Finish("r", kStart));
  EXPECT_FALSE(view_.Finish("r", kStart));
  view_.Book({.request_id = "forgotten", .placed_at = kStart});
  Report(TestReport("w1", Role::kBoth, 2), options_.booking_expiry);  // the worker lives on
  view_.Tick(kStart + options_.booking_expiry);
  EXPECT_EQ(view_.inflight(), 1u);
  view_.Tick(kStart + options_.booking_expiry + absl::Seconds(1));
  EXPECT_EQ(view_.inflight(), 0u);
}

TEST_F(ClusterViewTest, BookingsOfADeadGatewayGoOnceTheirWorkerIsThroughWithThem) {
  Report(TestReport("w1", Role::kBoth));
  Report(TestReport("w2", Role::kBoth));
  const WorkerIndex w1 = view_.IndexOf("w1"), w2 = view_.IndexOf("w2");
  view_.Book({.request_id = "orphan", .prefill = w1, .decode = w1, .placed_at = kStart});
  view_.Book({.request_id = "runs", .prefill = w1, .decode = w1, .placed_at = kStart});
  view_.Book({.request_id = "tried again", .prefill = w1, .decode = w1, .placed_at = kStart});
  auto r = TestReport("w1", Role::kBoth, 2);
  r.ended = {"orphan", "tried again", "never heard of"};
  Report(r, absl::Seconds(1));
  // Placed elsewhere since then; and who decodes it no more does not speak for it.
  view_.Book(
      {.request_id = "tried again", .prefill = w2, .decode = w2, .placed_at = kStart + absl::Seconds(2)});
  r = TestReport("w1", Role::kBoth, 3);
  r.ended = {"tried again"};
  const absl::Duration later = absl::Seconds(1) + options_.ended_expiry;
  Report(r, later);
  Report(TestReport("w2", Role::kBoth, 2), later);
  view_.Tick(kStart + later);
  EXPECT_TRUE(view_.FindBooking("orphan") != nullptr) << "its gateway may be about to say how it went";
  view_.Tick(kStart + later + absl::Milliseconds(1));
  EXPECT_TRUE(view_.FindBooking("orphan") == nullptr);
  view_.Tick(kStart + later + options_.ended_expiry / 2);
  EXPECT_TRUE(view_.FindBooking("runs") != nullptr);
  EXPECT_TRUE(view_.FindBooking("tried again") != nullptr);
  const auto ended = view_.TakeEnded();
  ASSERT_EQ(ended.size(), 1u);
  EXPECT_EQ(ended[0].request_id, "orphan");
}

TEST_F(ClusterViewTest, QueuedTokensCostWhatTheirOwnPromptsWerePredictedToTake) {
  Report(TestReport("w1", Role::kPrefill));
  Report(TestReport("w2", Role::kDecode));
  const WorkerIndex w1 = view_.IndexOf("w1"), w2 = view_.IndexOf("w2");
  // A long prompt: 10 s for 1000 tokens.
  view_.Book({.request_id = "long",
              .prefill = w1,
              .decode = w2,
              .placed_at = kStart,
              .prefill_seconds = 10,
              .uncached_tokens = 1000});
  EXPECT_NEAR(view_.QueueSeconds(*view_.worker(w1), kStart), 10, 1e-6);
  auto r = TestReport("w1", Role::kPrefill, 2);
  r.load.waiting = 1;
  r.load.queued_prefill_tokens = 500;
  Report(r, absl::Seconds(1));
  EXPECT_NEAR(view_.QueueSeconds(*view_.worker(w1), kStart + absl::Seconds(1)), 5, 1e-6);
  EXPECT_NEAR(view_.QueueSeconds(*view_.worker(w1), kStart + absl::Seconds(3)), 3, 1e-6)
      << "it is worked off";
  // It has ended: the tokens are those of somebody whom nobody booked.
  auto d = TestReport("w2", Role::kDecode, 2);
  d.prefilled = {"long"};
  Report(d, absl::Seconds(1));
  EXPECT_LT(view_.QueueSeconds(*view_.worker(w1), kStart + absl::Seconds(1)), 1);
}

TEST_F(ClusterViewTest, StepsComeFurtherApartWherePrefillsTakeTheTime) {
  auto r = TestReport("w1", Role::kBoth);
  r.prefills = {{512, 0, 0.1}, {1024, 0, 0.2}};
  Report(r);
  const WorkerIndex w1 = view_.IndexOf("w1");
  const double idle = view_.DecodeOrder(w1);
  EXPECT_EQ(view_.worker(w1)->prefill_share, 0) << "it measured its speed when it started";
  r = TestReport("w1", Role::kBoth, 2);
  for (int i = 0; i < 50; ++i) r.prefills.push_back({512, 0, 0.1});
  Report(r, absl::Seconds(5));
  EXPECT_GT(view_.DecodeOrder(w1), 5 * idle);
  EXPECT_LT(view_.worker(w1)->prefill_share, 1);
  Report(TestReport("w1", Role::kBoth, 3), absl::Minutes(5));
  EXPECT_NEAR(view_.DecodeOrder(w1), idle, 1e-6);
}

TEST_F(ClusterViewTest, NumberOfWorkersIsBounded) {
  SchedulerOptions small;
  small.max_workers = 2;
  ClusterView view(small);
  EXPECT_TRUE(view.Report(TestReport("w1", Role::kBoth), kStart).status.ok());
  EXPECT_TRUE(view.Report(TestReport("w2", Role::kBoth), kStart).status.ok());
  EXPECT_EQ(view.Report(TestReport("w3", Role::kBoth), kStart).status.code(),
            absl::StatusCode::kResourceExhausted);
}

TEST_F(ClusterViewTest, SlotOfForgottenWorkerIsGivenToTheNextWithoutItsBlocks) {
  auto r = TestReport("w1", Role::kBoth);
  Report(Holding(r, "a", 4));
  view_.Tick(kStart + absl::Seconds(4));
  view_.Tick(kStart + absl::Minutes(10));
  Report(TestReport("w2", Role::kBoth), absl::Minutes(10));
  EXPECT_EQ(view_.size(), 1u);
  EXPECT_EQ(Blocks("w2"), 0u);
}

}  // namespace
}  // namespace tidepool
