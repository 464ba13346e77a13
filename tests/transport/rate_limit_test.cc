#include "transport/rate_limit.h"

#include "tests/transport/transport_contract.h"
#include "transport/inproc_transport.h"

namespace tidepool {
namespace {

InprocNetwork& SharedNetwork() {
  static InprocNetwork network;
  return network;
}

// The contract holds behind the limit; 1 GB/s keeps its tests short.
INSTANTIATE_TEST_SUITE_P(RateLimited, TransportContract, testing::Values(TransportFactory([] {
                           return LimitRate(SharedNetwork().NewTransport(), 1'000'000'000);
                         })));

TEST(RateLimitTest, NoLimitIsTheTransportItself) {
  auto transport = SharedNetwork().NewTransport();
  Transport* raw = transport.get();
  EXPECT_EQ(LimitRate(std::move(transport), 0).get(), raw);
}

struct LimitedPair {
  explicit LimitedPair(uint64_t rate) : network(&clock) {
    a = LimitRate(network.NewTransport(), rate, &clock, &metrics);
    b = network.NewTransport();
    a->SetHandler(&in_a);
    b->SetHandler(&in_b);
    id = *a->Connect(b->Address());
  }
  // Until nothing moves at the present time.
  void Settle() {
    while (a->Progress() + b->Progress() > 0) {
    }
  }
  void Run(absl::Duration d) {
    for (absl::Duration t; t < d; t += absl::Milliseconds(1)) {
      Settle();
      clock.Advance(absl::Milliseconds(1));
    }
    Settle();
  }
  FakeClock clock;
  MetricRegistry metrics;
  InprocNetwork network;
  RecordingHandler in_a, in_b;
  std::unique_ptr<Transport> a, b;
  EndpointId id;
};

TEST(RateLimitTest, BulkArrivesAtTheSpeedOfTheLink) {
  LimitedPair pair(125'000'000);                                  // 1 Gbit/s
  const std::vector<std::byte> payload(1'250'000, std::byte{7});  // 10 ms each
  int sent = 0;
  for (int i = 0; i < 10; ++i) {
    ASSERT_TRUE(pair.a->SendBulk(pair.id, "h", payload, [&](absl::Status s) { sent += s.ok(); }).ok());
  }
  pair.Run(absl::Milliseconds(48));
  EXPECT_GE(pair.in_b.bulks.size(), 4u);
  EXPECT_LE(pair.in_b.bulks.size(), 5u);
  pair.Run(absl::Milliseconds(50));
  EXPECT_LE(pair.in_b.bulks.size(), 10u);
  pair.Run(absl::Milliseconds(4));
  EXPECT_EQ(pair.in_b.bulks.size(), 10u);
  EXPECT_EQ(sent, 10);
}

TEST(RateLimitTest, AnIdleLinkSavesUpOnlyAMillisecond) {
  LimitedPair pair(1'000'000);
  pair.Run(absl::Seconds(5));
  const std::vector<std::byte> payload(100'000, std::byte{7});  // 100 ms
  ASSERT_TRUE(pair.a->SendBulk(pair.id, "", payload, [](absl::Status) {}).ok());
  pair.Run(absl::Milliseconds(95));
  EXPECT_TRUE(pair.in_b.bulks.empty());
  pair.Run(absl::Milliseconds(6));
  EXPECT_EQ(pair.in_b.bulks.size(), 1u);
}

TEST(RateLimitTest, AControlMessageWaitsForTheBulkOnTheLinkOnly) {
  LimitedPair pair(1'000'000);
  const std::vector<std::byte> payload(100'000, std::byte{7});
  for (int i = 0; i < 3; ++i) {
    ASSERT_TRUE(pair.a->SendBulk(pair.id, "", payload, [](absl::Status) {}).ok());
  }
  ASSERT_TRUE(pair.a->Send(pair.id, "urgent").ok());
  pair.Run(absl::Milliseconds(102));
  EXPECT_EQ(pair.in_b.bulks.size(), 1u);
  EXPECT_EQ(pair.in_b.messages.size(), 1u);
}

TEST(RateLimitTest, ControlMessagesCountToo) {
  LimitedPair pair(1'000'000);
  for (int i = 0; i < 100; ++i) ASSERT_TRUE(pair.a->Send(pair.id, std::string(10'000, 'x')).ok());
  pair.Run(absl::Milliseconds(500));
  EXPECT_GE(pair.in_b.messages.size(), 48u);
  EXPECT_LE(pair.in_b.messages.size(), 51u);
}

TEST(RateLimitTest, TooManyWaitingMessagesAreRefused) {
  LimitedPair pair(1000);
  absl::Status s;
  int taken = 0;
  while (s.ok() && taken < 1000) {
    s = pair.a->Send(pair.id, std::string(100'000, 'x'));
    taken += s.ok();
  }
  EXPECT_TRUE(absl::IsResourceExhausted(s));
  EXPECT_LE(taken, 43);
}

TEST(RateLimitTest, CloseEndsWhatWaitsForTheLink) {
  LimitedPair pair(1000);
  const std::vector<std::byte> payload(100'000, std::byte{7});
  int ended = 0;
  for (int i = 0; i < 3; ++i) {
    ASSERT_TRUE(
        pair.a->SendBulk(pair.id, "", payload, [&](absl::Status s) { ended += absl::IsCancelled(s); }).ok());
  }
  int ended_before = -1;
  pair.a->Close(pair.id, [&] { ended_before = ended; });
  pair.Settle();
  EXPECT_EQ(ended_before, 3);
  pair.Run(absl::Milliseconds(1000));
  EXPECT_TRUE(pair.in_b.bulks.empty());
}

}  // namespace
}  // namespace tidepool
