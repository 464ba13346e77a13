#include "kvstore/disk/disk_tier.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <fstream>
#include <thread>

#include "kvstore/disk/crc32c.h"
#include "kvstore/disk/rocks_index.h"
#include "tests/kvstore/block_tier_contract.h"
#include "tests/kvstore/disk_test_util.h"

namespace tidepool {
namespace {

// A tier with its directory and metrics, for the suite that all tiers run.
class OwnedDiskTier final : public BlockTier {
 public:
  explicit OwnedDiskTier(size_t records) : tier_(MustOpen(SmallOptions(dir_.path(), metrics_, records))) {}
  Caps caps() const override { return tier_->caps(); }
  ReadId Read(const BlockKey& key, std::span<const int32_t> tokens, std::span<std::byte> dst,
              absl::Duration timeout, ReadDone done) override {
    return tier_->Read(key, tokens, dst, timeout, std::move(done));
  }
  bool CancelRead(ReadId id) override { return tier_->CancelRead(id); }
  void Write(const BlockInfo& info, std::span<const std::byte> payload, Done done) override {
    tier_->Write(info, payload, std::move(done));
  }
  void Erase(const BlockKey& key, Done done) override { tier_->Erase(key, std::move(done)); }
  void EraseIf(Predicate matches, CountDone done) override {
    tier_->EraseIf(std::move(matches), std::move(done));
  }
  bool Contains(const BlockKey& key) const override { return tier_->Contains(key); }
  std::optional<TierEntry> Find(const BlockKey& key) const override { return tier_->Find(key); }
  Page List(uint64_t cursor, size_t max) const override { return tier_->List(cursor, max); }
  TierStats stats() const override { return tier_->stats(); }
  TierHealth health() const override { return tier_->health(); }
  void SetObserver(TierObserver* observer) override { tier_->SetObserver(observer); }

  std::string blocks_file() const { return tier_->directory() + "/blocks"; }

 private:
  TempDir dir_;
  MetricRegistry metrics_;
  std::unique_ptr<DiskTier> tier_;
};

INSTANTIATE_TEST_SUITE_P(
    Disk, BlockTierContract,
    testing::Values(BlockTierCase{
        .make = [](size_t max_blocks) { return std::make_unique<OwnedDiskTier>(max_blocks); },
        .corrupt =
            [](BlockTier& t, const BlockKey& key) {
              DamagePayload(static_cast<OwnedDiskTier&>(t).blocks_file(), SmallLayout(), key);
            }}));

class DiskTierTest : public testing::Test {
 protected:
  DiskTierOptions Options(size_t records = 8) { return SmallOptions(dir_.path(), metrics_, records); }
  uint64_t Ops(const char* op, const char* result) {
    return CounterOf(metrics_, "tidepool_pool_ops_total", {{"tier", "disk"}, {"op", op}, {"result", result}});
  }
  uint64_t Dropped(const char* reason) {
    return CounterOf(metrics_, "tidepool_pool_stores_dropped_total", {{"tier", "disk"}, {"reason", reason}});
  }

  TempDir dir_;
  MetricRegistry metrics_;
};

TEST_F(DiskTierTest, BlocksSurviveARestart) {
  {
    auto tier = MustOpen(Options());
    for (uint64_t n = 0; n < 5; ++n) ASSERT_TRUE(Store(*tier, n).ok());
    ASSERT_TRUE(Forget(*tier, 3).ok());
  }
  auto tier = MustOpen(Options());
  EXPECT_EQ(tier->stats().blocks, 4u);
  for (uint64_t n = 0; n < 5; ++n) {
    EXPECT_EQ(tier->Contains(KeyOf(n)), n != 3);
    EXPECT_EQ(Load(*tier, n).code(), n == 3 ? absl::StatusCode::kNotFound : absl::StatusCode::kOk) << n;
  }
  EXPECT_EQ(tier->Find(KeyOf(4))->tenant, "even");
}

TEST_F(DiskTierTest, ErasureByTenantSurvivesARestart) {
  {
    auto tier = MustOpen(Options());
    for (uint64_t n = 0; n < 6; ++n) ASSERT_TRUE(Store(*tier, n).ok());
    const auto erased = AwaitAnswer<absl::StatusOr<uint64_t>>(
        [&](BlockTier::CountDone d) { tier->EraseIf(BlocksOfTenant("odd"), std::move(d)); });
    EXPECT_EQ(*erased, 3u);
  }
  auto tier = MustOpen(Options());
  for (uint64_t n = 0; n < 6; ++n) EXPECT_EQ(tier->Contains(KeyOf(n)), n % 2 == 0);
}

TEST_F(DiskTierTest, RecordsOfAnotherModelAreMissesAndStayUntilTheirRoomIsWanted) {
  {
    auto tier = MustOpen(Options());
    for (uint64_t n = 0; n < 6; ++n) ASSERT_TRUE(Store(*tier, n).ok());
  }
  {
    DiskTierOptions other = Options();
    other.fingerprint = "another model";
    auto tier = MustOpen(other);
    EXPECT_EQ(tier->stats().blocks, 0u);
    EXPECT_EQ(Load(*tier, 0).code(), absl::StatusCode::kNotFound);
    EXPECT_TRUE(tier->List(0, 10).entries.empty());
    for (uint64_t n = 100; n < 104; ++n) ASSERT_TRUE(Store(*tier, n).ok());  // two free, two taken
  }
  auto tier = MustOpen(Options());
  EXPECT_EQ(tier->stats().blocks, 4u);
  size_t kept = 0;
  for (uint64_t n = 0; n < 6; ++n) kept += Load(*tier, n).ok();
  EXPECT_EQ(kept, 4u);
}

TEST_F(DiskTierTest, ClearingATenantReachesRecordsOfAnotherModelToo) {
  {
    auto tier = MustOpen(Options());
    for (uint64_t n = 0; n < 4; ++n) ASSERT_TRUE(Store(*tier, n).ok());
  }
  {
    DiskTierOptions other = Options();
    other.codec = "int8";
    auto tier = MustOpen(other);
    const auto erased = AwaitAnswer<absl::StatusOr<uint64_t>>(
        [&](BlockTier::CountDone d) { tier->EraseIf(BlocksOfTenant("odd"), std::move(d)); });
    EXPECT_EQ(*erased, 0u);  // none that could be read
  }
  auto tier = MustOpen(Options());
  for (uint64_t n = 0; n < 4; ++n) EXPECT_EQ(tier->Contains(KeyOf(n)), n % 2 == 0);
}

TEST_F(DiskTierTest, AnotherRecordSizeStartsAnew) {
  {
    auto tier = MustOpen(Options());
    ASSERT_TRUE(Store(*tier, 1).ok());
  }
  DiskTierOptions larger = Options();
  larger.layout.layers = 64;
  larger.bytes = BytesFor(larger.layout, 8);
  auto tier = MustOpen(larger);
  EXPECT_EQ(tier->stats().blocks, 0u);
  ASSERT_TRUE(Store(*tier, 2).ok());
  EXPECT_TRUE(Load(*tier, 2).ok());
}

TEST_F(DiskTierTest, SmallerBudgetKeepsWhatFits) {
  {
    auto tier = MustOpen(Options(8));
    for (uint64_t n = 0; n < 8; ++n) ASSERT_TRUE(Store(*tier, n).ok());
  }
  auto tier = MustOpen(Options(5));
  EXPECT_EQ(tier->stats().blocks, 5u);
  for (uint64_t n = 0; n < 8; ++n) EXPECT_EQ(Load(*tier, n).ok(), tier->Contains(KeyOf(n)));
  EXPECT_EQ(std::filesystem::file_size(tier->directory() + "/blocks"), BytesFor(SmallLayout(), 5));
}

TEST_F(DiskTierTest, TwoWorkersOfOneNameGetDirectoriesOfTheirOwn) {
  auto first = MustOpen(Options());
  auto second = MustOpen(Options());
  EXPECT_EQ(first->directory(), dir_.path() + "/worker");
  EXPECT_EQ(second->directory(), dir_.path() + "/worker-1");
  ASSERT_TRUE(Store(*first, 1).ok());
  EXPECT_FALSE(second->Contains(KeyOf(1)));
  first.reset();
  auto again = MustOpen(Options());
  EXPECT_EQ(again->directory(), dir_.path() + "/worker");
  EXPECT_TRUE(Load(*again, 1).ok());
}

TEST_F(DiskTierTest, WaitsForTheProcessBeforeItToBeGone) {
  auto before = MustOpen(Options());
  ASSERT_TRUE(Store(*before, 1).ok());
  DiskTierOptions patient = Options();
  patient.lock_wait = absl::Seconds(20);
  auto tier = MustCreate(patient);
  EXPECT_EQ(tier->health().state, TierState::kOpening);
  EXPECT_EQ(Load(*tier, 1).code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(Store(*tier, 2).code(), absl::StatusCode::kUnavailable);
  before.reset();
  EXPECT_EQ(tier->WaitOpened(absl::Seconds(20)).state, TierState::kOn);
  EXPECT_EQ(tier->directory(), dir_.path() + "/worker");
  EXPECT_TRUE(Load(*tier, 1).ok());
}

TEST_F(DiskTierTest, OffWithAReasonWhileOthersHoldEveryDirectory) {
  DiskTierOptions one = Options();
  one.max_tiers = 1;
  auto holder = MustOpen(one);
  auto tier = MustCreate(one);
  const TierHealth health = tier->WaitOpened(absl::Seconds(20));
  EXPECT_EQ(health.state, TierState::kOff);
  EXPECT_THAT(health.reason, testing::HasSubstr("held by another process"));
  EXPECT_EQ(Load(*tier, 1).code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(Store(*tier, 1).code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(Forget(*tier, 1).code(), absl::StatusCode::kUnavailable);
  EXPECT_GE(CounterOf(metrics_, "tidepool_pool_faults_total", {{"tier", "disk"}, {"reason", "open"}}), 1u);
  holder.reset();
  EXPECT_TRUE(AwaitState(*tier, TierState::kOn));
  EXPECT_TRUE(Store(*tier, 1).ok());
}

TEST_F(DiskTierTest, OffWhileTheDatabaseIsHeldByAnotherProcess) {
  { auto tier = MustOpen(Options()); }
  // What a person with a database tool would do.
  auto held = RocksIndex::Open(dir_.path() + "/worker/index");
  ASSERT_TRUE(held.ok());
  auto tier = MustCreate(Options());
  const TierHealth health = tier->WaitOpened(absl::Seconds(20));
  EXPECT_EQ(health.state, TierState::kOff);
  EXPECT_THAT(health.reason, testing::HasSubstr("LOCK"));
  held->reset();
  EXPECT_TRUE(AwaitState(*tier, TierState::kOn));
}

TEST_F(DiskTierTest, OffForAnotherFormatVersionUntilItIsRemoved) {
  { auto tier = MustOpen(Options()); }
  const std::string line = "tidepool disk tier format 7 record 4096";
  const uint32_t crc = Crc32c(std::as_bytes(std::span(line.data(), line.size())));
  char text[128];
  snprintf(text, sizeof text, "%s\n%08x\n", line.c_str(), crc);
  std::ofstream(dir_.path() + "/worker/FORMAT") << text;
  auto tier = MustCreate(Options());
  const TierHealth health = tier->WaitOpened(absl::Seconds(20));
  EXPECT_EQ(health.state, TierState::kOff);
  EXPECT_THAT(health.reason, testing::HasSubstr("format 7"));
  EXPECT_THAT(health.reason, testing::HasSubstr("remove the directory"));
  // In one step: the tier looks at it meanwhile.
  std::filesystem::rename(dir_.path() + "/worker", dir_.path() + "/removed");
  EXPECT_TRUE(AwaitState(*tier, TierState::kOn));
}

TEST_F(DiskTierTest, OffWhereThePathIsNoDirectory) {
  DiskTierOptions o = Options();
  o.path = dir_.path() + "/file";
  std::ofstream(o.path) << "x";
  auto tier = MustCreate(o);
  const TierHealth health = tier->WaitOpened(absl::Seconds(20));
  EXPECT_EQ(health.state, TierState::kOff);
  EXPECT_THAT(health.reason, testing::HasSubstr("/file/worker"));
}

TEST_F(DiskTierTest, ImpossibleOptionsAreNamed) {
  const auto refused = [&](const std::function<void(DiskTierOptions&)>& change) {
    DiskTierOptions o = Options();
    change(o);
    const auto tier = DiskTier::Create(o);
    EXPECT_EQ(tier.status().code(), absl::StatusCode::kInvalidArgument);
    return std::string(tier.status().message());
  };
  EXPECT_THAT(refused([](auto& o) { o.path = "relative"; }), testing::HasSubstr("kv.disk.path"));
  EXPECT_THAT(refused([](auto& o) { o.bytes = 4096 * 4; }), testing::HasSubstr("kv.disk.bytes"));
  EXPECT_THAT(refused([](auto& o) { o.name = "../up"; }), testing::HasSubstr("../up"));
  EXPECT_THAT(refused([](auto& o) { o.eviction = "none such"; }), testing::HasSubstr("none such"));
}

TEST_F(DiskTierTest, OnlyTheOwnerMayReadTheFiles) {
  auto tier = MustOpen(Options());
  struct stat st {};
  ASSERT_EQ(stat(tier->directory().c_str(), &st), 0);
  EXPECT_EQ(st.st_mode & 0777, 0700u);
  ASSERT_EQ(stat((tier->directory() + "/blocks").c_str(), &st), 0);
  EXPECT_EQ(st.st_mode & 0777, 0600u);
}

TEST_F(DiskTierTest, EvictsTheTailOfAChainBeforeItsHead) {
  auto tier = MustOpen(Options(4));
  // 0 <- 1 <- 2 <- 3, the head written (and so used) first.
  const auto store = [&](uint64_t n, std::optional<uint64_t> parent) {
    BlockInfo info = InfoOf(n);
    if (parent) info.parent = KeyOf(*parent);
    const auto bytes = BytesOf(n);
    return AwaitAnswer<absl::Status>([&](BlockTier::Done d) { tier->Write(info, bytes, std::move(d)); });
  };
  ASSERT_TRUE(store(0, std::nullopt).ok());
  for (uint64_t n = 1; n < 4; ++n) ASSERT_TRUE(store(n, n - 1).ok());
  ASSERT_TRUE(store(10, std::nullopt).ok());
  EXPECT_TRUE(tier->Contains(KeyOf(0)));
  EXPECT_FALSE(tier->Contains(KeyOf(3)));
  ASSERT_TRUE(store(11, std::nullopt).ok());
  EXPECT_TRUE(tier->Contains(KeyOf(0)));
  EXPECT_FALSE(tier->Contains(KeyOf(2)));
}

TEST_F(DiskTierTest, LeastRecentlyReadGoesFirstAlsoAfterARestart) {
  {
    auto tier = MustOpen(Options(4));
    for (uint64_t n = 0; n < 4; ++n) ASSERT_TRUE(Store(*tier, n).ok());
    ASSERT_TRUE(Load(*tier, 0).ok());
    ASSERT_TRUE(Store(*tier, 4).ok());
    EXPECT_TRUE(tier->Contains(KeyOf(0)));
    EXPECT_FALSE(tier->Contains(KeyOf(1)));
  }
  auto tier = MustOpen(Options(4));
  EXPECT_EQ(tier->stats().blocks, 4u);
  ASSERT_TRUE(Store(*tier, 5).ok());
  EXPECT_EQ(tier->stats().blocks, 4u);
  EXPECT_TRUE(tier->Contains(KeyOf(4)));
}

TEST_F(DiskTierTest, ASecondStoreOfAKeyUnderWayIsAnsweredWithTheFirst) {
  auto tier = MustOpen(Options());
  const BlockInfo info = InfoOf(1);
  const auto bytes = BytesOf(1);
  std::promise<absl::Status> a, b;
  tier->Write(info, bytes, [&](absl::Status s) { a.set_value(s); });
  tier->Write(info, bytes, [&](absl::Status s) { b.set_value(s); });
  EXPECT_TRUE(a.get_future().get().ok());
  EXPECT_TRUE(b.get_future().get().ok());
  EXPECT_EQ(tier->stats().blocks, 1u);
}

TEST_F(DiskTierTest, StoresBeyondTheDailyBudgetAreDroppedAlsoAfterARestart) {
  DiskTierOptions o = Options();
  o.write_bytes_per_day = 3 * 4096;
  {
    auto tier = MustOpen(o);
    for (uint64_t n = 0; n < 3; ++n) EXPECT_TRUE(Store(*tier, n).ok());
    EXPECT_EQ(Store(*tier, 3).code(), absl::StatusCode::kResourceExhausted);
    EXPECT_TRUE(tier->WaitIdle(absl::Seconds(10)));
  }
  auto tier = MustOpen(o);
  EXPECT_EQ(Store(*tier, 4).code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(Dropped("endurance"), 2u);
  EXPECT_TRUE(Load(*tier, 1).ok());
}

TEST_F(DiskTierTest, StoresBeyondTheRateWaitAndAreDroppedInTheEnd) {
  DiskTierOptions o = Options(64);
  o.write_bytes_per_second = 4096;  // one a second
  o.write_wait = absl::Milliseconds(100);
  o.max_writes = 4;
  auto tier = MustOpen(o);
  std::vector<std::vector<std::byte>> bytes;
  for (uint64_t n = 0; n < 8; ++n) bytes.push_back(BytesOf(n));
  std::atomic<int> stored = 0, dropped = 0;
  for (uint64_t n = 0; n < 8; ++n) {
    tier->Write(InfoOf(n), bytes[n], [&](absl::Status s) { ++(s.ok() ? stored : dropped); });
  }
  EXPECT_TRUE(tier->WaitIdle(absl::Seconds(10)));
  tier.reset();
  EXPECT_GE(stored, 1);
  EXPECT_LE(stored, 2);
  EXPECT_EQ(stored + dropped, 8);
  EXPECT_GE(Dropped("wait"), 1u);
  EXPECT_EQ(Dropped("wait") + Dropped("queue"), static_cast<uint64_t>(dropped.load()));
}

TEST_F(DiskTierTest, ManyCallersAtOnceSeeOnlyTheirOwnBytes) {
  DiskTierOptions o = Options(16);
  o.max_writes = 512;
  auto tier = MustOpen(o);
  std::atomic<int> wrong = 0, hits = 0;
  std::vector<std::thread> threads;
  for (uint64_t t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      Rng rng(t);
      for (int i = 0; i < 400; ++i) {
        const uint64_t n = rng.Below(40);
        switch (rng.Below(6)) {
          case 0:
            (void)Forget(*tier, n);
            break;
          case 1:
          case 2:
            (void)Store(*tier, n);
            break;
          default: {
            const absl::Status status = Load(*tier, n);
            wrong += WrongBytes(status);
            hits += status.ok();
          }
        }
      }
    });
  }
  for (std::thread& t : threads) t.join();
  EXPECT_EQ(wrong, 0);
  EXPECT_GT(hits, 0);
  EXPECT_LE(tier->stats().blocks, 16u);
}

TEST_F(DiskTierTest, OpensALargeIndexWithoutReadingPayloads) {
  // 100 GB of 2 MiB blocks in a sparse file: only the index has contents.
  DiskTierOptions o = Options();
  o.layout = {.layers = 16, .kv_heads = 16, .head_dim = 64, .block_tokens = 32, .dtype = DType::kBF16};
  o.bytes = uint64_t{100} << 30;
  o.preallocate = false;
  ASSERT_EQ(o.layout.block_bytes(), size_t{2} << 20);
  uint64_t extents = 0;
  {
    auto tier = MustOpen(o);
    extents = tier->caps().capacity_bytes / RecordBytes(RecordHeaderBytes(32), o.layout.block_bytes());
  }
  {
    auto index = RocksIndex::Open(dir_.path() + "/worker/index");
    ASSERT_TRUE(index.ok());
    const Sha256Digest space = RecordSpace(o.fingerprint, o.layout, o.codec);
    std::vector<RocksIndex::Change> batch;
    for (uint64_t n = 0; n < extents; ++n) {
      IndexEntry e;
      e.key = KeyOf(n);
      e.extent = n;
      e.stamp = {1, n};
      std::memcpy(&e.space, space.data(), 8);
      if (n % 32 != 0) e.parent = KeyOf(n - 1);
      e.tenant = "tenant";
      e.payload_bytes = o.layout.block_bytes();
      batch.push_back({e.key, e});
    }
    ASSERT_TRUE((*index)->Apply(batch, {}, true).ok());
  }
  const auto start = std::chrono::steady_clock::now();
  auto tier = MustOpen(o);
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
  RecordProperty("seconds", std::to_string(took.count()));
  EXPECT_EQ(tier->stats().blocks, extents);
  EXPECT_LT(took.count(), 10.0);
  // Every entry is checked against its record when it is read: here there is none.
  std::vector<std::byte> dst(o.layout.block_bytes());
  const auto record = AwaitAnswer<absl::StatusOr<BlockTier::Record>>(
      [&](BlockTier::ReadDone d) { tier->Read(KeyOf(7), {}, dst, absl::Seconds(10), std::move(d)); });
  EXPECT_EQ(record.status().code(), absl::StatusCode::kDataLoss);
  EXPECT_FALSE(tier->Contains(KeyOf(7)));
}

TEST_F(DiskTierTest, StatsAndMetricsFollowWhatHappens) {
  auto tier = MustOpen(Options());
  for (uint64_t n = 0; n < 3; ++n) ASSERT_TRUE(Store(*tier, n).ok());
  ASSERT_TRUE(Load(*tier, 1).ok());
  EXPECT_FALSE(Load(*tier, 9).ok());
  const TierStats stats = tier->stats();
  EXPECT_EQ(stats.blocks, 3u);
  EXPECT_EQ(stats.bytes, 3u * 4096);
  EXPECT_GT(stats.read.latency_seconds, 0);
  EXPECT_GT(stats.write.bytes_per_second, 0);
  EXPECT_EQ(Ops("read", "hit"), 1u);
  EXPECT_EQ(Ops("read", "miss"), 1u);
  EXPECT_EQ(Ops("write", "ok"), 3u);
  EXPECT_THAT(metrics_.Render(),
              testing::HasSubstr("tidepool_pool_tier_state{state=\"on\",tier=\"disk\"} 1"));
}

}  // namespace
}  // namespace tidepool
