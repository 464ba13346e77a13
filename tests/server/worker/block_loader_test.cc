#include "server/worker/block_loader.h"

#include <gtest/gtest.h>

#include <condition_variable>
#include <cstring>
#include <deque>
#include <mutex>

#include "kvstore/keys.h"
#include "tests/kvstore/fake_block_tier.h"

namespace tidepool {
namespace {

constexpr uint32_t kBlockTokens = 4;
const BlockLayout kLayout{
    .layers = 2, .kv_heads = 1, .head_dim = 8, .block_tokens = kBlockTokens, .dtype = DType::kF32};

// One millisecond a token.
double Prefill(uint64_t new_tokens, uint64_t) { return 1e-3 * static_cast<double>(new_tokens); }

class BlockLoaderTest : public ::testing::Test {
 protected:
  void SetUp() override { MakePool(64); }

  void MakePool(uint32_t slots) {
    auto pool = BlockPool::Create({.layout = kLayout, .slots = slots, .metrics = &metrics_});
    ASSERT_TRUE(pool.ok()) << pool.status();
    pool_ = *std::move(pool);
    env_.pool = pool_.get();
    env_.disk = &disk_;
    env_.speeds = &speeds_;
    env_.deadlines = &deadlines_;
    env_.probe = &probe_;
    env_.prefill = Prefill;
    env_.clock = &clock_;
    env_.fetch = [this](FetchSpec spec, std::function<void(FetchResult)> done) {
      std::lock_guard lock(mu_);
      fetches_.push_back({std::move(spec), std::move(done)});
    };
    env_.abort = [this](const std::string& request, uint32_t attempt) {
      std::lock_guard lock(mu_);
      EXPECT_EQ(request, "r#1");
      EXPECT_EQ(attempt, 1u);
      ++aborts_;
    };
  }

  // Blocks [begin, begin + n) of one prompt.
  BlockLoader::Spec MakeSpec(uint32_t n, uint32_t begin = 0) {
    BlockLoader::Spec spec{
        .request_id = "r#1", .attempt = 1, .blocks = {}, .prompt_tokens = 0, .holders = {}};
    std::vector<int32_t> tokens((begin + n) * kBlockTokens);
    for (size_t i = 0; i < tokens.size(); ++i) tokens[i] = static_cast<int32_t>(i);
    const BlockKey root = RootKey("model", kLayout, "tenant", "");
    const std::vector<BlockKey> keys = BlockKeys(root, tokens, kBlockTokens);
    for (uint32_t i = begin; i < begin + n; ++i) {
      spec.blocks.push_back(
          {.key = keys[i],
           .parent = i == 0 ? root : keys[i - 1],
           .tokens = {tokens.begin() + i * kBlockTokens, tokens.begin() + (i + 1) * kBlockTokens},
           .tenant = "tenant",
           .session = 7,
           .position = i});
    }
    spec.prompt_tokens = tokens.size() + 3;
    return spec;
  }
  static std::vector<std::byte> Contents(const BlockInfo& info) {
    return std::vector<std::byte>(kLayout.block_bytes(), static_cast<std::byte>(info.position + 1));
  }
  void StoreOnDisk(const BlockLoader::Spec& spec, uint32_t first, uint32_t n) {
    for (uint32_t i = first; i < first + n; ++i) {
      disk_.Write(spec.blocks[i], Contents(spec.blocks[i]),
                  [](const absl::Status& s) { EXPECT_TRUE(s.ok()) << s; });
    }
  }
  static void AddHolder(BlockLoader::Spec& spec, uint32_t begin, uint32_t end, Tier tier = Tier::kHost) {
    spec.holders.push_back({.peer = {.worker_id = "peer", .boot_id = "b", .transport = "t", .arena = ""},
                            .begin = begin,
                            .end = end,
                            .tier = tier});
  }
  std::vector<BlockLease> Slots(size_t n) { return *pool_->Reserve(n); }

  // Starts a load of `spec`; its result arrives in result_.
  std::shared_ptr<BlockLoader> Start(const BlockLoader::Spec& spec) {
    std::vector<BlockLease> slots = Slots(spec.blocks.size());
    auto loader = BlockLoader::Make(env_, spec, slots);
    if (loader) {
      loader->Start([this](BlockLoader::Result result) {
        std::lock_guard lock(mu_);
        EXPECT_FALSE(result_.has_value()) << "the result comes once";
        result_ = std::move(result);
        changed_.notify_all();
      });
    }
    return loader;
  }
  bool WaitResult() {
    std::unique_lock lock(mu_);
    return changed_.wait_for(lock, std::chrono::seconds(30), [&] { return result_.has_value(); });
  }
  // What a peer does: fills all, or answers with an error.
  void AnswerFetch(absl::Status status = absl::OkStatus(), size_t missing_from = 1000) {
    Fetch fetch;
    {
      std::lock_guard lock(mu_);
      ASSERT_FALSE(fetches_.empty());
      fetch = std::move(fetches_.front());
      fetches_.pop_front();
    }
    FetchResult result;
    result.status = status;
    for (size_t i = 0; i < fetch.spec.slots.size(); ++i) {
      const bool filled = status.ok() && i < missing_from;
      result.filled.push_back(filled);
      if (filled) {
        const BlockInfo* info = nullptr;
        const BlockLoader::Spec all = MakeSpec(40);
        for (const BlockInfo& b : all.blocks) info = b.key == fetch.spec.keys[i] ? &b : info;
        ASSERT_NE(info, nullptr);
        const auto bytes = Contents(*info);
        std::memcpy(fetch.spec.slots[i].data().data(), bytes.data(), bytes.size());
        result.bytes += bytes.size();
      }
    }
    result.slots = std::move(fetch.spec.slots);
    fetch.done(std::move(result));
  }
  size_t fetches() {
    std::lock_guard lock(mu_);
    return fetches_.size();
  }
  void ExpectLoaded(const BlockLoader::Spec& spec, uint32_t n) {
    ASSERT_TRUE(result_.has_value());
    EXPECT_EQ(result_->loaded, n);
    ASSERT_EQ(result_->leases.size(), spec.blocks.size());
    for (uint32_t i = 0; i < spec.blocks.size(); ++i) {
      ASSERT_FALSE(result_->leases[i].empty()) << i;
      if (i >= n) continue;
      const auto data = result_->leases[i].data();
      EXPECT_TRUE(std::equal(data.begin(), data.end(), Contents(spec.blocks[i]).begin())) << "block " << i;
      EXPECT_EQ(pool_->Info(spec.blocks[i].key), spec.blocks[i]) << "published with what is known of it";
    }
    for (uint32_t i = n; i < spec.blocks.size(); ++i) {
      EXPECT_FALSE(pool_->Info(spec.blocks[i].key).has_value()) << "block " << i << " is the request's own";
    }
  }
  void ExpectNoLeases() {
    result_.reset();
    EXPECT_EQ(pool_->stats().leased, 0u);
  }

  struct Fetch {
    FetchSpec spec;
    std::function<void(FetchResult)> done;
  };
  MetricRegistry metrics_;
  FakeClock clock_;
  FakeBlockTier disk_{kLayout.block_bytes(), 100};
  std::unique_ptr<BlockPool> pool_;
  SourceSpeeds speeds_;
  LoaderProbe probe_{metrics_};
  Deadlines deadlines_{&clock_};
  BlockLoader::Environment env_;
  std::mutex mu_;
  std::condition_variable changed_;
  std::deque<Fetch> fetches_;
  int aborts_ = 0;
  std::optional<BlockLoader::Result> result_;
};

TEST_F(BlockLoaderTest, LoadsFromTheDiskAndPublishes) {
  const auto spec = MakeSpec(30);
  StoreOnDisk(spec, 0, 30);
  ASSERT_NE(Start(spec), nullptr);
  ExpectLoaded(spec, 30);
  EXPECT_EQ(result_->from, std::vector<LoadedFrom>(30, LoadedFrom::kDisk));
  EXPECT_EQ(result_->fetched, 0u);
  EXPECT_EQ(probe_.blocks[static_cast<size_t>(LoadedFrom::kDisk)]->value(), 30u);
  ExpectNoLeases();
}

TEST_F(BlockLoaderTest, NothingIsBegunWhereNothingIsToBeHad) {
  std::vector<BlockLease> slots = Slots(3);
  EXPECT_EQ(BlockLoader::Make(env_, MakeSpec(3), slots), nullptr);
  EXPECT_EQ(slots.size(), 3u);
  for (const BlockLease& slot : slots) EXPECT_FALSE(slot.empty()) << "the caller keeps them";
}

TEST_F(BlockLoaderTest, AMissLeavesTheRestToBeComputed) {
  auto spec = MakeSpec(20);
  StoreOnDisk(spec, 0, 20);
  disk_.Corrupt(spec.blocks[5].key);
  ASSERT_NE(Start(spec), nullptr);
  ExpectLoaded(spec, 5);
  EXPECT_EQ(probe_.stopped_missing.value(), 1u);
  ExpectNoLeases();
}

TEST_F(BlockLoaderTest, ABlockOfOtherTokensIsAMiss) {
  auto spec = MakeSpec(10);
  auto other = spec;
  other.blocks[4].tokens[0] ^= 1;
  StoreOnDisk(other, 0, 10);
  ASSERT_NE(Start(spec), nullptr);
  ExpectLoaded(spec, 4);
}

TEST_F(BlockLoaderTest, LoadsFromAPeerPartByPart) {
  auto spec = MakeSpec(10, 4);
  AddHolder(spec, 0, 14);
  ASSERT_NE(Start(spec), nullptr);
  while (!result_) AnswerFetch();
  ExpectLoaded(spec, 10);
  EXPECT_EQ(result_->fetched, 10u);
  EXPECT_EQ(result_->bytes, 10 * kLayout.block_bytes());
  EXPECT_EQ(result_->from, std::vector<LoadedFrom>(10, LoadedFrom::kPeer));
  ExpectNoLeases();
}

TEST_F(BlockLoaderTest, APeerThatHasLessThanWasSaid) {
  auto spec = MakeSpec(10);
  AddHolder(spec, 0, 10, Tier::kDisk);
  env_.options.load_all = true;  // one part
  ASSERT_NE(Start(spec), nullptr);
  AnswerFetch(absl::OkStatus(), 6);
  ExpectLoaded(spec, 6);
  EXPECT_EQ(result_->from, std::vector<LoadedFrom>(6, LoadedFrom::kPeerDisk));
}

TEST_F(BlockLoaderTest, APeerThatFailsCostsTimeOnly) {
  auto spec = MakeSpec(10);
  AddHolder(spec, 0, 10);
  ASSERT_NE(Start(spec), nullptr);
  while (!result_) AnswerFetch(absl::UnavailableError("gone"));
  ExpectLoaded(spec, 0);
  while (fetches() > 0) AnswerFetch(absl::UnavailableError("gone"));
  ExpectNoLeases();
}

TEST_F(BlockLoaderTest, DiskAndPeerTogether) {
  auto spec = MakeSpec(20);
  StoreOnDisk(spec, 0, 12);
  AddHolder(spec, 12, 20);
  ASSERT_NE(Start(spec), nullptr);
  while (!result_) AnswerFetch();
  ExpectLoaded(spec, 20);
  EXPECT_EQ(result_->fetched, 8u);
}

// The limit of 20 blocks of 4 tokens and 3 more: 83 ms, 5 % of that, and 2 ms.
TEST_F(BlockLoaderTest, ASlowDiskIsNotWaitedFor) {
  const auto spec = MakeSpec(20);
  StoreOnDisk(spec, 0, 20);
  disk_.Hold();
  ASSERT_NE(Start(spec), nullptr);
  clock_.Advance(absl::Milliseconds(5));
  EXPECT_FALSE(result_.has_value());
  clock_.Advance(absl::Milliseconds(2));
  ASSERT_TRUE(WaitResult());
  ExpectLoaded(spec, 0);
  EXPECT_EQ(probe_.stopped_slow.value(), 1u);
  ExpectNoLeases();
}

TEST_F(BlockLoaderTest, ASlowPeerIsNotWaitedForAndItsSlotsStayOutUntilItAnswers) {
  auto spec = MakeSpec(20);
  AddHolder(spec, 0, 20);
  ASSERT_NE(Start(spec), nullptr);
  const size_t asked = fetches();
  ASSERT_GT(asked, 0u);
  clock_.Advance(absl::Milliseconds(7));
  ASSERT_TRUE(WaitResult());
  ExpectLoaded(spec, 0);
  EXPECT_EQ(aborts_, 1);
  const auto leased = pool_->stats().leased;
  EXPECT_GT(leased, 20u) << "the request's and those that the peer may still write to";
  // What arrives all the same is kept, for the next request.
  for (size_t i = 0; i < asked; ++i) AnswerFetch();
  EXPECT_EQ(pool_->stats().leased, 20u);
  EXPECT_GT(probe_.late_blocks.value(), 0u);
  EXPECT_TRUE(pool_->Info(spec.blocks[0].key).has_value());
  ExpectNoLeases();
}

TEST_F(BlockLoaderTest, WithoutRoomForOtherSlotsItWaitsForItsOwn) {
  MakePool(20);
  auto spec = MakeSpec(20);
  AddHolder(spec, 0, 20);
  ASSERT_NE(Start(spec), nullptr);
  clock_.Advance(absl::Milliseconds(7));
  for (int i = 0; i < 300 && aborts_ == 0; ++i) std::this_thread::sleep_for(std::chrono::milliseconds(10));
  {
    std::lock_guard lock(mu_);
    EXPECT_EQ(aborts_, 1);
    EXPECT_FALSE(result_.has_value());
  }
  while (!result_) AnswerFetch(absl::CancelledError("aborted"));
  ExpectLoaded(spec, 0);
  ExpectNoLeases();
}

TEST_F(BlockLoaderTest, PeersAreToldWhenWhatTheyBringIsOfNoUseAnyMore) {
  MakePool(20);
  auto spec = MakeSpec(20);
  StoreOnDisk(spec, 0, 1);
  disk_.Corrupt(spec.blocks[0].key);
  AddHolder(spec, 1, 20);
  disk_.Hold();
  ASSERT_NE(Start(spec), nullptr);
  ASSERT_GT(fetches(), 0u);
  EXPECT_EQ(aborts_, 0);
  disk_.Release();
  EXPECT_EQ(aborts_, 1) << "without room, the load waits for their slots";
  EXPECT_FALSE(result_.has_value());
  while (!result_) AnswerFetch(absl::CancelledError("aborted"));
  ExpectLoaded(spec, 0);
  EXPECT_EQ(probe_.stopped_missing.value(), 1u);
  ExpectNoLeases();
}

TEST_F(BlockLoaderTest, WhatWasGivenUpBeforeItWasAskedForIsNotFetched) {
  auto spec = MakeSpec(20);
  StoreOnDisk(spec, 0, 1);
  disk_.Corrupt(spec.blocks[0].key);
  AddHolder(spec, 1, 20);
  ASSERT_NE(Start(spec), nullptr);  // the disk says at once that it has not got it
  EXPECT_EQ(fetches(), 0u);
  ExpectLoaded(spec, 0);
  ExpectNoLeases();
}

TEST_F(BlockLoaderTest, AFetchThatBeginsAfterTheCancelIsAborted) {
  auto spec = MakeSpec(20);
  AddHolder(spec, 0, 20);
  std::shared_ptr<BlockLoader> loader;
  int aborts_before = 0;
  env_.fetch = [&](FetchSpec fetch, std::function<void(FetchResult)> done) {
    loader->Cancel();
    std::lock_guard lock(mu_);
    aborts_before = aborts_;
    fetches_.push_back({std::move(fetch), std::move(done)});
  };
  std::vector<BlockLease> slots = Slots(20);
  loader = BlockLoader::Make(env_, spec, slots);
  ASSERT_NE(loader, nullptr);
  loader->Start([](BlockLoader::Result) { FAIL() << "it was cancelled"; });
  ASSERT_GT(fetches(), 0u);
  EXPECT_GT(aborts_, aborts_before);
  while (fetches() > 0) AnswerFetch(absl::CancelledError("aborted"));
  EXPECT_EQ(pool_->stats().leased, 0u);
}

TEST_F(BlockLoaderTest, CancelledLoadGivesEverythingBackOnceItIsQuiescent) {
  auto spec = MakeSpec(20);
  StoreOnDisk(spec, 0, 10);
  AddHolder(spec, 10, 20);
  disk_.Hold();
  auto loader = Start(spec);
  ASSERT_NE(loader, nullptr);
  loader->Cancel();
  while (fetches() > 0) AnswerFetch(absl::CancelledError("aborted"));
  disk_.Release();
  EXPECT_EQ(pool_->stats().leased, 0u);
  EXPECT_FALSE(result_.has_value());
  std::weak_ptr<BlockLoader> weak = loader;
  loader.reset();
  EXPECT_TRUE(weak.expired()) << "nothing holds it any more";
}

TEST_F(BlockLoaderTest, CancelBeforeStartStartsNothing) {
  const auto spec = MakeSpec(5);
  StoreOnDisk(spec, 0, 5);
  std::vector<BlockLease> slots = Slots(5);
  auto loader = BlockLoader::Make(env_, spec, slots);
  loader->Cancel();
  loader->Start([](BlockLoader::Result) { FAIL() << "it was cancelled"; });
  EXPECT_EQ(pool_->stats().leased, 0u);
}

TEST_F(BlockLoaderTest, ASourceThatWasSlowIsNotAskedAgainForAWhile) {
  auto spec = MakeSpec(20);
  AddHolder(spec, 0, 20);
  for (int i = 0; i < 12; ++i) {
    const auto ticket = speeds_.Begin({"peer", Tier::kHost}, kLayout.block_bytes(), clock_.Now());
    speeds_.End(ticket, kLayout.block_bytes(), clock_.Now() + absl::Seconds(1));
  }
  std::vector<BlockLease> slots = Slots(20);
  EXPECT_EQ(BlockLoader::Make(env_, spec, slots), nullptr);
  EXPECT_EQ(probe_.declined.value(), 1u);
  clock_.Advance(absl::Minutes(10));
  EXPECT_NE(BlockLoader::Make(env_, spec, slots), nullptr);
}

}  // namespace
}  // namespace tidepool
