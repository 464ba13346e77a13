#include "scheduler/placement.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <tuple>

#include "scheduler/core.h"
#include "tests/scheduler/cluster_builder.h"

namespace tidepool {
namespace {

using testing::HasSubstr;

class PlacementTest : public testing::Test {
 protected:
  void Add(WorkerReport r, absl::Time at = kStart) {
    const auto result = core_.Report(std::move(r), at);
    ASSERT_TRUE(result.status.ok()) << result.status;
  }
  Placement Place(const PlaceRequest& r, absl::Time at = kStart) {
    auto result = core_.Place(r, at);
    EXPECT_TRUE(result.placement.has_value()) << result.status;
    return result.placement.value_or(Placement{});
  }
  void OnePrefillOneDecode() {
    Add(TestReport("p1", Role::kPrefill));
    Add(TestReport("d1", Role::kDecode));
  }

  SchedulerOptions options_;
  SchedulerCore core_{options_};
};

TEST_F(PlacementTest, LongPromptIsPrefilledRemotely) {
  OnePrefillOneDecode();
  const auto p = Place(TestRequest("r", 640));
  ASSERT_TRUE(p.prefill.has_value());
  EXPECT_EQ(p.prefill->worker_id, "p1");
  EXPECT_EQ(p.decode.worker_id, "d1");
  EXPECT_EQ(p.expected_cached_tokens, 0u);
  EXPECT_GT(p.ttft_seconds, 0);
  EXPECT_GT(p.itl_seconds, 0);
  EXPECT_THAT(p.reason, HasSubstr("prefill on p1"));
  EXPECT_THAT(p.reason, HasSubstr("decode on d1"));
}

TEST_F(PlacementTest, ShortPromptStaysOnTheDecodeWorker) {
  OnePrefillOneDecode();
  EXPECT_FALSE(Place(TestRequest("r1", 32)).prefill.has_value());
  EXPECT_TRUE(Place(TestRequest("r2", 33)).prefill.has_value());
}

TEST_F(PlacementTest, PromptCachedOnTheDecodeWorkerStaysThere) {
  Add(TestReport("p1", Role::kPrefill));
  auto d = TestReport("d1", Role::kDecode);
  Add(Holding(d, "x", 20));
  const auto p = Place(TestRequest("r", 20 * 32 + 10));
  EXPECT_FALSE(p.prefill.has_value());
  EXPECT_EQ(p.expected_cached_tokens, 640u);
}

TEST_F(PlacementTest, LastTokenIsNeverTakenFromTheCache) {
  OnePrefillOneDecode();
  auto p1 = TestReport("p1", Role::kPrefill, 2);
  Add(Holding(p1, "x", 20));
  EXPECT_EQ(Place(TestRequest("r", 640)).expected_cached_tokens, 608u);
}

TEST_F(PlacementTest, WithoutPrefillWorkersTheDecodeWorkerPrefills) {
  Add(TestReport("d1", Role::kDecode));
  EXPECT_FALSE(Place(TestRequest("r1", 4000)).prefill.has_value());
  Add(TestReport("p1", Role::kPrefill));
  EXPECT_TRUE(Place(TestRequest("r2", 4000)).prefill.has_value());
}

TEST_F(PlacementTest, AggregatedWorkerServesBothPhases) {
  Add(TestReport("w1", Role::kBoth));
  const auto p = Place(TestRequest("r", 4000));
  EXPECT_EQ(p.decode.worker_id, "w1");
  EXPECT_FALSE(p.prefill.has_value());
}

TEST_F(PlacementTest, PrefersTheWorkerWithTheLongerPrefix) {
  OnePrefillOneDecode();
  auto p2 = TestReport("p2", Role::kPrefill);
  Add(Holding(p2, "x", 30));
  const auto p = Place(TestRequest("r", 1280));
  EXPECT_EQ(p.prefill->worker_id, "p2");
  EXPECT_EQ(p.expected_cached_tokens, 960u);
  EXPECT_TRUE(p.holders.empty());
}

TEST_F(PlacementTest, BusyHolderIsFetchedFromInsteadOfWaitedFor) {
  OnePrefillOneDecode();
  auto p2 = TestReport("p2", Role::kPrefill);
  p2.load.queued_prefill_tokens = 20'000;
  p2.load.waiting = 10;
  Add(Holding(p2, "x", 100));
  const auto p = Place(TestRequest("r", 100 * 32 + 5));
  EXPECT_EQ(p.prefill->worker_id, "p1");
  ASSERT_EQ(p.holders.size(), 1u);
  EXPECT_EQ(p.holders[0].worker.worker_id, "p2");
  EXPECT_EQ(p.holders[0].begin, 0u);
  EXPECT_EQ(p.holders[0].end, 100u);
  EXPECT_EQ(p.expected_cached_tokens, 3200u);
  EXPECT_THAT(p.reason, HasSubstr("fetched from p2"));
}

// A decode worker on the prefill worker's host reads the prompt where it lies: it holds its answer alone.
TEST_F(PlacementTest, AnEarlierAnswerIsFetchedFromWhoHoldsNothingElse) {
  OnePrefillOneDecode();
  auto p1 = TestReport("p1", Role::kPrefill, 2);
  Add(Holding(p1, "x", 60));
  auto d1 = TestReport("d1", Role::kDecode, 2);
  Add(Holding(d1, "x", 90, Tier::kHost, 60));
  const auto p = Place(TestRequest("r", 100 * 32));
  EXPECT_EQ(p.prefill->worker_id, "p1");
  ASSERT_EQ(p.holders.size(), 1u);
  EXPECT_EQ(p.holders[0].worker.worker_id, "d1");
  EXPECT_EQ(p.holders[0].begin, 60u);
  EXPECT_EQ(p.holders[0].end, 90u);
  EXPECT_EQ(p.expected_cached_tokens, 90u * 32);
}

TEST_F(PlacementTest, SlowLinkIsNotFetchedOver) {
  OnePrefillOneDecode();
  auto p1 = TestReport("p1", Role::kPrefill, 2);
  for (int i = 0; i < 50; ++i) p1.fetches.push_back({1 << 20, 10.0});
  Add(p1);
  auto d1 = TestReport("d1", Role::kDecode, 2);
  Add(Holding(d1, "x", 50));
  const auto p = Place(TestRequest("r", 100 * 32));
  EXPECT_TRUE(p.holders.empty());
  EXPECT_EQ(p.expected_cached_tokens, 0u);
}

TEST_F(PlacementTest, StoreIsFetchedFromAndNeverComputes) {
  OnePrefillOneDecode();
  auto s = TestReport("s1", Role::kStore);
  Add(Holding(s, "x", 100));
  const auto p = Place(TestRequest("r", 100 * 32 + 1));
  ASSERT_TRUE(p.prefill.has_value());
  EXPECT_EQ(p.prefill->worker_id, "p1");
  EXPECT_EQ(p.decode.worker_id, "d1");
  ASSERT_EQ(p.holders.size(), 1u);
  EXPECT_EQ(p.holders[0].worker.worker_id, "s1");
  EXPECT_EQ(p.holders[0].tier, Tier::kHost);
  EXPECT_EQ(p.holders[0].end, 100u);
  EXPECT_GT(p.holders[0].seconds, 0);
}

TEST_F(PlacementTest, StoreAloneServesNothing) {
  Add(TestReport("s1", Role::kStore));
  EXPECT_EQ(core_.Place(TestRequest("r", 64), kStart).status.code(), absl::StatusCode::kUnavailable);
}

TEST_F(PlacementTest, StoreKeepsNoWorkerOfAnotherModelOut) {
  Add(TestReport("s1", Role::kStore));
  auto d = TestReport("d1", Role::kDecode);
  d.model.fingerprint = "f2";
  Add(d);
  EXPECT_EQ(core_.model()->fingerprint, "f2");
  // And is told to change, in its turn.
  EXPECT_EQ(core_.Report(TestReport("s1", Role::kStore, 2), kStart).status.code(),
            absl::StatusCode::kFailedPrecondition);
}

TEST_F(PlacementTest, StoreNamesNoModelAndIsHeldToTheWorkersEvenWhenTheyAreGone) {
  Add(TestReport("s1", Role::kStore));
  EXPECT_FALSE(core_.model().has_value());
  auto other = TestReport("s2", Role::kStore);
  other.model.fingerprint = "f2";
  EXPECT_EQ(core_.Report(other, kStart).status.code(), absl::StatusCode::kFailedPrecondition)
      << "stores agree with each other";
  Add(TestReport("d1", Role::kDecode));
  EXPECT_EQ(core_.model()->fingerprint, TestReport("d1", Role::kDecode).model.fingerprint);
  const absl::Time later = kStart + absl::Minutes(1);
  core_.Tick(later);  // all are lost
  EXPECT_EQ(core_.Report(other, later).status.code(), absl::StatusCode::kFailedPrecondition);
  // A worker of another model begins another cluster.
  auto d = TestReport("d2", Role::kDecode);
  d.model.fingerprint = "f2";
  EXPECT_TRUE(core_.Report(d, later).status.ok());
  EXPECT_TRUE(core_.Report(other, later).status.ok());
}

TEST_F(PlacementTest, HoldersDiskIsNamedApartAndCostsMore) {
  OnePrefillOneDecode();
  auto s = TestReport("s1", Role::kStore);
  Holding(s, "x", 60);
  Add(Holding(s, "x", 100, Tier::kDisk, 60));
  const auto p = Place(TestRequest("r", 100 * 32 + 1));
  ASSERT_EQ(p.holders.size(), 2u);
  EXPECT_EQ(std::tuple(p.holders[0].begin, p.holders[0].end, p.holders[0].tier),
            std::tuple(0u, 60u, Tier::kHost));
  EXPECT_EQ(std::tuple(p.holders[1].begin, p.holders[1].end, p.holders[1].tier),
            std::tuple(60u, 100u, Tier::kDisk));
  EXPECT_GT(p.holders[1].seconds / 40, p.holders[0].seconds / 60);
}

TEST_F(PlacementTest, OwnDiskIsLoadedWhereThatBeatsTheLinkAndRecomputing) {
  auto prefill = TestReport("p1", Role::kPrefill);
  Holding(prefill, "x", 20);
  Holding(prefill, "x", 100, Tier::kDisk, 20);
  const double bytes = 1e6;
  for (int i = 0; i < 50; ++i) {
    prefill.fetches.push_back(
        {static_cast<uint64_t>(bytes * (1 + i % 3)), 1e-3 * (1 + i % 3), FetchFrom::kOwnDisk});
    prefill.fetches.push_back(
        {static_cast<uint64_t>(bytes * (1 + i % 3)), 5.0 * (1 + i % 3), FetchFrom::kPeerHost});
  }
  Add(prefill);
  Add(TestReport("d1", Role::kDecode));
  auto s = TestReport("s1", Role::kStore);
  Add(Holding(s, "x", 100));
  const auto p = Place(TestRequest("r", 100 * 32 + 1));
  EXPECT_THAT(p.holders, testing::IsEmpty());
  EXPECT_EQ(p.expected_cached_tokens, 3200u);
  EXPECT_THAT(p.reason, HasSubstr("2560 of them from its own disk"));
}

TEST_F(PlacementTest, SlowDiskIsNotLoadedFrom) {
  auto prefill = TestReport("p1", Role::kPrefill);
  Holding(prefill, "x", 20);
  Holding(prefill, "x", 100, Tier::kDisk, 20);
  for (int i = 0; i < 50; ++i)
    prefill.fetches.push_back({uint64_t{1000000} * (1 + i % 3), 30.0 * (1 + i % 3), FetchFrom::kOwnDisk});
  Add(prefill);
  Add(TestReport("d1", Role::kDecode));
  const auto p = Place(TestRequest("r", 100 * 32 + 1));
  EXPECT_EQ(p.expected_cached_tokens, 640u);
  EXPECT_THAT(p.reason, testing::Not(HasSubstr("disk")));
}

TEST_F(PlacementTest, DrainingWorkerGetsNothingNewButStillServesItsBlocks) {
  OnePrefillOneDecode();
  auto p2 = TestReport("p2", Role::kPrefill);
  p2.draining = true;
  Add(Holding(p2, "x", 100));
  const auto p = Place(TestRequest("r", 3205));
  EXPECT_EQ(p.prefill->worker_id, "p1");
  ASSERT_EQ(p.holders.size(), 1u);
  EXPECT_EQ(p.holders[0].worker.worker_id, "p2");

  auto d1 = TestReport("d1", Role::kDecode, 2);
  d1.draining = true;
  Add(d1);
  const auto refused = core_.Place(TestRequest("r2", 320), kStart);
  EXPECT_EQ(refused.status.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(refused.status.message()), HasSubstr("1 draining"));
}

TEST_F(PlacementTest, WorkersThatFailedTheRequestAreNotTriedAgain) {
  OnePrefillOneDecode();
  Add(TestReport("d2", Role::kDecode));
  auto r = TestRequest("r", 640);
  r.exclude_workers = {"d1", "p1"};
  const auto p = Place(r);
  EXPECT_EQ(p.decode.worker_id, "d2");
  EXPECT_FALSE(p.prefill.has_value()) << "no other prefill worker: prefill where it decodes";
  r.exclude_workers = {"d1", "d2"};
  EXPECT_EQ(core_.Place(r, kStart).status.code(), absl::StatusCode::kUnavailable);
}

TEST_F(PlacementTest, BurstBetweenTwoReportsIsSpread) {
  for (int i = 0; i < 4; ++i) {
    Add(TestReport("p" + std::to_string(i), Role::kPrefill));
    Add(TestReport("d" + std::to_string(i), Role::kDecode));
  }
  std::map<std::string, int> prefills, decodes;
  for (int i = 0; i < 40; ++i) {
    const auto p = Place(TestRequest("r" + std::to_string(i), 640, "c" + std::to_string(i)));
    ++prefills[p.prefill->worker_id];
    ++decodes[p.decode.worker_id];
  }
  for (const auto& [id, n] : prefills) EXPECT_EQ(n, 10) << id;
  ASSERT_EQ(decodes.size(), 4u);
  for (const auto& [id, n] : decodes) EXPECT_NEAR(n, 10, 2) << id;
}

TEST_F(PlacementTest, SharedPrefixDoesNotDrawEverythingToOneWorker) {
  // Longest-prefix routing collapses here: every request shares its first block with the holder's.
  for (int i = 0; i < 4; ++i) {
    auto p = TestReport("p" + std::to_string(i), Role::kPrefill);
    if (i == 0) Holding(p, "x", 2);
    Add(p);
  }
  Add(TestReport("d", Role::kDecode));
  std::map<std::string, int> prefills;
  for (int i = 0; i < 40; ++i) {
    auto r = TestRequest("r" + std::to_string(i), 2048);
    for (size_t k = 2; k < r.keys.size(); ++k)
      r.keys[k] = ChainKey("own" + std::to_string(i), static_cast<uint32_t>(k));
    ++prefills[Place(r).prefill->worker_id];
  }
  EXPECT_EQ(prefills.size(), 4u);
  for (const auto& [id, n] : prefills) EXPECT_LE(n, 13) << id;
}

TEST_F(PlacementTest, BookingCountsUntilTheWorkersOwnReportShowsIt) {
  OnePrefillOneDecode();
  const double idle = core_.Explain(TestRequest("q", 640), kStart).placement->ttft_seconds;
  Place(TestRequest("r", 6400));
  const double booked = core_.Explain(TestRequest("q", 640), kStart).placement->ttft_seconds;
  EXPECT_GT(booked, idle * 2);
  auto report = TestReport("p1", Role::kPrefill, 2);  // late enough to count r, and r is done
  report.prefilled = {"r"};
  Add(report, kStart + absl::Milliseconds(20));
  EXPECT_NEAR(core_.Explain(TestRequest("q", 640), kStart).placement->ttft_seconds, idle, 1e-9);
}

TEST_F(PlacementTest, FinishFreesTheBookingAtOnce) {
  OnePrefillOneDecode();
  const double idle = core_.Explain(TestRequest("q", 640), kStart).placement->ttft_seconds;
  Place(TestRequest("r", 6400));
  EXPECT_TRUE(core_.Finish("r", kStart));
  EXPECT_FALSE(core_.Finish("r", kStart));
  EXPECT_EQ(core_.Explain(TestRequest("q", 640), kStart).placement->ttft_seconds, idle);
}

TEST_F(PlacementTest, DecodeWorkerIsChosenByPredictedItl) {
  OnePrefillOneDecode();
  auto d1 = TestReport("d1", Role::kDecode, 2);
  d1.load.running = 20;
  d1.load.running_context_tokens = 40'000;
  Add(d1);
  Add(TestReport("d2", Role::kDecode));
  EXPECT_EQ(Place(TestRequest("r", 640)).decode.worker_id, "d2");
}

TEST_F(PlacementTest, DecodeWorkerWithoutRoomIsAvoided) {
  OnePrefillOneDecode();
  auto d1 = TestReport("d1", Role::kDecode, 2);
  d1.load.slots_free = 10;
  Add(d1);
  auto d2 = TestReport("d2", Role::kDecode);
  d2.load.running = 8;
  Add(d2);
  EXPECT_EQ(Place(TestRequest("r", 640)).decode.worker_id, "d2");
}

TEST_F(PlacementTest, ItlIsJudgedForWhenThePrefillWillHaveEnded) {
  // d1 looks busier now, but its request will be over by then; d2's are on their way.
  Add(TestReport("p1", Role::kPrefill));
  Add(TestReport("d1", Role::kDecode));
  auto short_one = TestRequest("ending", 640, "e");
  short_one.max_tokens = 2;
  EXPECT_EQ(Place(short_one).decode.worker_id, "d1");
  auto d1 = TestReport("d1", Role::kDecode, 2);
  d1.prefilled = {"ending"};
  Add(d1, kStart + absl::Milliseconds(10));
  d1 = TestReport("d1", Role::kDecode, 3);
  d1.load.running = 1;
  d1.load.running_context_tokens = 640;
  Add(d1, kStart + absl::Milliseconds(100));
  Add(TestReport("d2", Role::kDecode), kStart + absl::Milliseconds(100));
  const auto now = kStart + absl::Milliseconds(101);
  const auto explained = core_.Explain(TestRequest("r", 640), now);
  std::map<std::string, double> itl;
  for (const auto& c : explained.candidates)
    if (c.kind == "decode") itl[c.worker_id] = c.itl_seconds;
  EXPECT_NEAR(itl.at("d1"), itl.at("d2"), 1e-4);
}

TEST_F(PlacementTest, TiesGoToTheLowerIdWhateverTheOrderOfRegistration) {
  for (const char* id : {"p3", "p1", "p2"}) Add(TestReport(id, Role::kPrefill));
  for (const char* id : {"d2", "d3", "d1"}) Add(TestReport(id, Role::kDecode));
  const auto p = Place(TestRequest("r", 640));
  EXPECT_EQ(p.prefill->worker_id, "p1");
  EXPECT_EQ(p.decode.worker_id, "d1");
}

TEST_F(PlacementTest, NoWorkersIsUnavailable) {
  EXPECT_EQ(core_.Place(TestRequest("r", 64), kStart).status.code(), absl::StatusCode::kUnavailable);
  Add(TestReport("p1", Role::kPrefill));
  EXPECT_EQ(core_.Place(TestRequest("r", 64), kStart).status.code(), absl::StatusCode::kUnavailable);
}

TEST_F(PlacementTest, PromptThatFitsNoWorkerIsInvalidNotRetried) {
  auto d = TestReport("d1", Role::kDecode);
  d.load.slots_total = d.load.slots_free = 10;
  Add(d);
  const auto result = core_.Place(TestRequest("r", 640), kStart);
  EXPECT_EQ(result.status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(result.status.message()), HasSubstr("needs 21 KV blocks"));
  EXPECT_THAT(std::string(result.status.message()), HasSubstr("kv.host_bytes"));
}

TEST_F(PlacementTest, BadRequestsAreInvalid) {
  OnePrefillOneDecode();
  auto r = TestRequest("", 64);
  EXPECT_EQ(core_.Place(r, kStart).status.code(), absl::StatusCode::kInvalidArgument);
  r = TestRequest("r", 0);
  EXPECT_EQ(core_.Place(r, kStart).status.code(), absl::StatusCode::kInvalidArgument);
  r = TestRequest("r", 64);
  r.keys.push_back(ChainKey("x", 9));
  EXPECT_EQ(core_.Place(r, kStart).status.code(), absl::StatusCode::kInvalidArgument);
  r = TestRequest("r", 70'000);
  EXPECT_EQ(core_.Place(r, kStart).status.code(), absl::StatusCode::kInvalidArgument);
}

TEST_F(PlacementTest, ExplainShowsEveryWorkerAndBooksNothing) {
  OnePrefillOneDecode();
  auto p2 = TestReport("p2", Role::kPrefill);
  p2.draining = true;
  Add(p2);
  const auto e = core_.Explain(TestRequest("r", 640), kStart);
  EXPECT_EQ(core_.inflight(), 0u);
  std::map<std::string, Candidate> by_id;
  for (const auto& c : e.candidates) by_id[c.worker_id + " " + std::string(c.kind)] = c;
  EXPECT_TRUE(by_id.at("p1 prefill").chosen);
  EXPECT_TRUE(by_id.at("d1 decode").chosen);
  EXPECT_EQ(by_id.at("p2 prefill").note, "draining");
  EXPECT_GT(by_id.at("p1 prefill").compute_seconds, 0);
  const auto p = Place(TestRequest("r", 640));
  EXPECT_EQ(p.reason, e.placement->reason);
  EXPECT_EQ(p.ttft_seconds, e.placement->ttft_seconds);
}

}  // namespace
}  // namespace tidepool
