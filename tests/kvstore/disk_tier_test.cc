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
  void Compress(const BlockKey& key, CompressDone done) override { tier_->Compress(key, std::move(done)); }
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
      e.place = n * (RecordBytes(RecordHeaderBytes(32), o.layout.block_bytes()) / kDiskPageBytes);
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

class CompressTest : public DiskTierTest {
 protected:
  static BlockLayout Layout() { return NumbersLayout(); }
  DiskTierOptions Options(size_t records = 8) {
    DiskTierOptions o = SmallOptions(dir_.path(), metrics_, records);
    o.layout = Layout();
    o.bytes = BytesFor(o.layout, records);
    return o;
  }
  static std::vector<std::byte> KvBytes(uint64_t n) { return NumbersOf(n, Layout().block_bytes()); }
  static absl::Status StoreKv(BlockTier& tier, uint64_t n) { return Store(tier, n, KvBytes(n)); }
  static absl::Status LoadKv(BlockTier& tier, uint64_t n) { return Load(tier, n, KvBytes(n)); }
  // The files of a tier as version 1 left them: block n at place n + 1, with what `change` makes of its
  // header.
  void PlantVersionOne(
      const DiskTierOptions& o, uint64_t records,
      const std::function<void(RecordHeader&)>& change = [](RecordHeader&) {}) {
    MustOpen(o).reset();  // makes the files
    const size_t header_bytes = RecordHeaderBytes(o.layout.block_tokens);
    const size_t record = RecordBytes(header_bytes, o.layout.block_bytes());
    std::vector<RocksIndex::Change> entries;
    {
      std::fstream file(dir_.path() + "/worker/blocks", std::ios::in | std::ios::out | std::ios::binary);
      for (uint64_t n = 0; n < records; ++n) {
        const auto bytes = KvBytes(n);
        RecordHeader h;
        h.version = 1;
        h.stamp = {5, n};
        h.place = n + 1;  // counted in records
        h.space = RecordSpace(o.fingerprint, o.layout, o.codec);
        h.layout = o.layout.ToString();
        h.info = InfoOf(n);
        h.payload_bytes = bytes.size();
        h.payload_crc = Crc32c(bytes);
        change(h);
        std::vector<std::byte> area(header_bytes);
        ASSERT_TRUE(EncodeRecordHeader(h, area).ok());
        file.seekp(static_cast<std::streamoff>(kDiskPageBytes + (n + 1) * record));
        file.write(reinterpret_cast<const char*>(area.data()), static_cast<std::streamsize>(area.size()));
        file.write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
        IndexEntry e;
        e.version = 1;
        e.key = KeyOf(n);
        e.place = h.place;
        e.stamp = h.stamp;
        std::memcpy(&e.space, h.space.data(), 8);
        e.tenant = h.info.tenant;
        e.session = h.info.session;
        e.payload_bytes = bytes.size();
        entries.push_back({e.key, e});
      }
    }
    {
      auto index = RocksIndex::Open(dir_.path() + "/worker/index");
      ASSERT_TRUE(index.ok());
      ASSERT_TRUE((*index)->Apply(entries, {}, true).ok());
    }
  }
};

TEST_F(CompressTest, StoresTakeFewerBytesAndComeBackToTheBitAlsoAfterARestart) {
  DiskTierOptions o = Options(8);
  o.compress = true;
  {
    auto tier = MustOpen(o);
    for (uint64_t n = 0; n < 10; ++n) ASSERT_TRUE(StoreKv(*tier, n).ok());
    EXPECT_EQ(tier->stats().blocks, 10u);  // eight would have fitted
    EXPECT_LE(tier->stats().bytes, 10u * 7 * 4096);
    for (uint64_t n = 0; n < 10; ++n) EXPECT_TRUE(LoadKv(*tier, n).ok()) << n;
    EXPECT_EQ(tier->Find(KeyOf(1))->bytes, Layout().block_bytes());
    EXPECT_GT(tier->stats().read.bytes_per_second, 0);
    EXPECT_GT(tier->stats().read.latency_seconds, 0);
  }
  o.compress = false;
  auto tier = MustOpen(o);
  EXPECT_EQ(tier->stats().blocks, 10u);
  for (uint64_t n = 0; n < 10; ++n) EXPECT_TRUE(LoadKv(*tier, n).ok()) << n;
  ASSERT_TRUE(StoreKv(*tier, 20).ok());  // a full one among short ones
  EXPECT_TRUE(LoadKv(*tier, 20).ok());
}

TEST_F(CompressTest, BlocksThatAreThereAreShortenedWhereTheyLie) {
  {
    auto tier = MustOpen(Options(8));
    for (uint64_t n = 0; n < 8; ++n) ASSERT_TRUE(StoreKv(*tier, n).ok());
    const uint64_t before = tier->stats().bytes;
    uint64_t saved = 0, blocks = 0;
    for (uint64_t n = 0; n < 8; ++n) {
      const auto done = Compress(*tier, n);
      if (absl::IsNotFound(done.status())) continue;  // a full tier gives one up to have where to write to
      ASSERT_TRUE(done.ok()) << done.status();
      EXPECT_LT(done->after, done->before);
      saved += done->before - done->after;
      ++blocks;
    }
    EXPECT_GE(blocks, 7u);
    EXPECT_EQ(tier->stats().blocks, blocks);
    EXPECT_LE(tier->stats().bytes, before - saved);
    const auto again = Compress(*tier, 7);
    ASSERT_TRUE(again.ok());
    EXPECT_EQ(again->after, again->before);
    for (uint64_t n = 100; n < 102; ++n) ASSERT_TRUE(StoreKv(*tier, n).ok());
    for (uint64_t n = 0; n < 8; ++n) EXPECT_FALSE(WrongBytes(LoadKv(*tier, n)));
    EXPECT_TRUE(LoadKv(*tier, 7).ok());
  }
  auto tier = MustOpen(Options(8));
  size_t found = 0;
  for (uint64_t n = 0; n < 8; ++n) {
    const absl::Status status = LoadKv(*tier, n);
    EXPECT_FALSE(WrongBytes(status));
    found += status.ok();
  }
  EXPECT_GE(found, 7u);
}

TEST_F(CompressTest, ABlockThatWouldHardlyShrinkStaysAsItIs) {
  DiskTierOptions o = Options();
  o.compress = true;
  auto tier = MustOpen(o);
  ASSERT_TRUE(Store(*tier, 1).ok());  // noise
  EXPECT_EQ(tier->stats().bytes, 9u * 4096);
  const auto done = Compress(*tier, 1);
  ASSERT_TRUE(done.ok()) << done.status();
  EXPECT_EQ(done->before, done->after);
  EXPECT_TRUE(Load(*tier, 1).ok());
  EXPECT_EQ(Compress(*tier, 2).status().code(), absl::StatusCode::kNotFound);
}

TEST_F(CompressTest, EveryDamagedByteOfAnEncodedRecordIsAMiss) {
  DiskTierOptions o = Options(2 * 4);
  o.compress = true;
  auto tier = MustOpen(o);
  Rng rng(11);
  for (int round = 0; round < 80; ++round) {
    ASSERT_TRUE(StoreKv(*tier, 3).ok());
    ASSERT_TRUE(tier->WaitIdle(absl::Seconds(10)));
    const uint64_t record = tier->stats().bytes;
    // The only one, at the front: behind its header's checksummed part lies nothing but the payload.
    FlipBit(tier->directory() + "/blocks", kDiskPageBytes + rng.Below(record - kDiskPageBytes),
            static_cast<int>(rng.Below(8)));
    const absl::Status status = LoadKv(*tier, 3);
    EXPECT_FALSE(WrongBytes(status));
    EXPECT_TRUE(status.ok() || absl::IsDataLoss(status)) << status;
    ASSERT_TRUE(Forget(*tier, 3).ok());
  }
}

TEST_F(CompressTest, ManyCallersAtOnceSeeOnlyTheirOwnBytes) {
  DiskTierOptions o = Options(12);
  o.max_writes = 512;
  std::atomic<int> wrong = 0, hits = 0, shorter = 0;
  for (const bool compress : {false, true}) {
    o.compress = compress;
    auto tier = MustOpen(o);
    std::vector<std::thread> threads;
    for (uint64_t t = 0; t < 4; ++t) {
      threads.emplace_back([&, t] {
        Rng rng(t);
        for (int i = 0; i < 250; ++i) {
          const uint64_t n = rng.Below(24);
          switch (rng.Below(8)) {
            case 0:
              (void)Forget(*tier, n);
              break;
            case 1:
            case 2:
              (void)StoreKv(*tier, n);
              break;
            case 3: {
              const auto done = Compress(*tier, n);
              shorter += done.ok() && done->after < done->before;
              break;
            }
            default: {
              const absl::Status status = LoadKv(*tier, n);
              wrong += WrongBytes(status);
              hits += status.ok();
            }
          }
        }
      });
    }
    for (std::thread& t : threads) t.join();
    EXPECT_TRUE(tier->WaitIdle(absl::Seconds(10)));
    EXPECT_LE(tier->stats().bytes, tier->caps().capacity_bytes);
  }
  EXPECT_EQ(wrong, 0);
  EXPECT_GT(hits, 0);
  EXPECT_GT(shorter, 0);
}

TEST_F(CompressTest, WhatEndsWhileItIsEncodedIsAnsweredOnce) {
  DiskTierOptions o = Options(64);
  o.compress = true;
  for (int round = 0; round < 20; ++round) {
    auto tier = MustOpen(o);
    const auto bytes = KvBytes(1);
    std::atomic<int> answers = 0;
    for (uint64_t n = 0; n < 16; ++n) {
      tier->Write(InfoOf(n), bytes, [&](absl::Status) { ++answers; });
      tier->Compress(KeyOf(n), [&](absl::StatusOr<BlockTier::Compressed>) { ++answers; });
    }
    tier.reset();
    EXPECT_EQ(answers, 32);
  }
}

// Blocks that a version before sizes and encodings left on the disk.
TEST_F(CompressTest, RecordsOfVersionOneAreReadAndCanBeCompressed) {
  const DiskTierOptions o = Options(4);
  PlantVersionOne(o, 3);
  {
    auto tier = MustOpen(o);
    EXPECT_EQ(tier->stats().blocks, 3u);
    for (uint64_t n = 0; n < 3; ++n) EXPECT_TRUE(LoadKv(*tier, n).ok()) << n;
    const auto done = Compress(*tier, 1);
    ASSERT_TRUE(done.ok()) << done.status();
    EXPECT_LT(done->after, done->before);
  }
  auto tier = MustOpen(o);
  EXPECT_EQ(tier->stats().blocks, 3u);
  for (uint64_t n = 0; n < 3; ++n) EXPECT_TRUE(LoadKv(*tier, n).ok()) << n;
}

TEST_F(CompressTest, ARecordOfMoreTokensThanABlockHasIsDamaged) {
  const DiskTierOptions o = Options(4);
  // They fit into its header, and would not into the one that is written now.
  PlantVersionOne(o, 2, [&](RecordHeader& h) {
    h.layout.clear();
    h.info.tenant.clear();
    h.info.tokens.assign((RecordHeaderBytes(o.layout.block_tokens) - 180) / 4, 7);
  });
  auto tier = MustOpen(o);
  EXPECT_EQ(tier->stats().blocks, 2u);
  EXPECT_EQ(Compress(*tier, 0).status().code(), absl::StatusCode::kDataLoss);
  EXPECT_EQ(LoadKv(*tier, 1).code(), absl::StatusCode::kDataLoss);
  EXPECT_EQ(tier->stats().blocks, 0u);
  EXPECT_TRUE(StoreKv(*tier, 0).ok());
  EXPECT_TRUE(LoadKv(*tier, 0).ok());
}

TEST_F(CompressTest, ABlockThatIsStoredAnewWhileItWaitsToBeCompressedIsLeftAlone) {
  DiskTierOptions o = Options(8);
  {
    auto tier = MustOpen(o);  // as they are
    for (uint64_t n = 0; n < 3; ++n) ASSERT_TRUE(StoreKv(*tier, n).ok());
  }
  o.compress = true;
  o.read_bytes_per_second = 9 * 4096 / 2;
  o.read_timeout = absl::Seconds(20);
  auto tier = MustOpen(o);
  // Two loads go at once, the next waits two seconds; and until it has begun nothing is compressed.
  for (uint64_t n = 1; n < 3; ++n) ASSERT_TRUE(LoadKv(*tier, n).ok());
  std::vector<std::byte> dst(Layout().block_bytes());
  std::promise<absl::Status> load;
  tier->Read(KeyOf(1), {}, dst, absl::Seconds(20), [&](const auto& r) { load.set_value(r.status()); });
  std::promise<absl::StatusOr<BlockTier::Compressed>> answer;
  tier->Compress(KeyOf(0), [&](auto done) { answer.set_value(std::move(done)); });
  ASSERT_TRUE(Forget(*tier, 0).ok());
  ASSERT_TRUE(StoreKv(*tier, 0).ok());
  const auto done = answer.get_future().get();
  ASSERT_TRUE(done.ok()) << done.status();
  EXPECT_EQ(done->before, done->after);
  EXPECT_LE(done->after, 7u * 4096);
  EXPECT_TRUE(load.get_future().get().ok());
  EXPECT_TRUE(LoadKv(*tier, 0).ok());
}

TEST_F(CompressTest, LoadsThatWaitForTheirRateDoNotHoldUpStores) {
  DiskTierOptions o = Options(8);
  o.read_bytes_per_second = 4096;  // a record in nine seconds
  o.write_share = 0;
  o.read_quiet = absl::Milliseconds(200);
  o.read_timeout = absl::Seconds(10);
  auto tier = MustOpen(o);
  for (uint64_t n = 0; n < 3; ++n) ASSERT_TRUE(StoreKv(*tier, n).ok());
  for (uint64_t n = 0; n < 2; ++n) ASSERT_TRUE(LoadKv(*tier, n).ok());
  std::vector<std::byte> dst(Layout().block_bytes());
  std::promise<void> answered;
  tier->Read(KeyOf(2), {}, dst, absl::Seconds(4), [&](const auto&) { answered.set_value(); });
  EXPECT_TRUE(StoreKv(*tier, 3).ok());
  EXPECT_EQ(tier->stats().reads_waiting, 1u);
  answered.get_future().wait();
}

TEST_F(CompressTest, TheNextVictimIsWhatAnEncodedStoreWouldTake) {
  DiskTierOptions o = Options(8);
  o.compress = true;
  auto tier = MustOpen(o);
  size_t without = 0;
  for (uint64_t n = 0; n < 20; ++n) {
    const size_t before = tier->stats().blocks;
    const auto victim = tier->NextVictim(Layout().block_bytes());
    ASSERT_TRUE(StoreKv(*tier, n).ok());
    EXPECT_EQ(tier->stats().blocks, before + (victim.has_value() ? 0 : 1)) << n;
    EXPECT_FALSE(victim.has_value() && tier->Contains(*victim)) << n;
    without += !victim.has_value();
  }
  EXPECT_GE(without, 10u);  // eight full ones would have fitted
}

TEST_F(CompressTest, LoadsKeepToTheirRate) {
  DiskTierOptions o = Options(8);
  o.read_bytes_per_second = 10 * 9 * 4096;  // ten records
  auto tier = MustOpen(o);
  for (uint64_t n = 0; n < 7; ++n) ASSERT_TRUE(StoreKv(*tier, n).ok());
  const auto start = std::chrono::steady_clock::now();
  for (uint64_t n = 0; n < 7; ++n) EXPECT_TRUE(LoadKv(*tier, n).ok());
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
  EXPECT_GE(took.count(), 0.4);  // two and a half at once, and then one in a tenth of a second
  EXPECT_EQ(tier->health().state, TierState::kOn);  // a limit is no slow disk
}

}  // namespace
}  // namespace tidepool
