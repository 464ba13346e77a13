#include "transport/inproc_transport.h"

#include "base/rng.h"
#include "tests/transport/transport_contract.h"

namespace tidepool {
namespace {

InprocNetwork& SharedNetwork() {
  static InprocNetwork network;
  return network;
}
InprocNetwork& SlowNetwork() {
  static InprocNetwork network(&Clock::Real(), {.seed = 3,
                                                .delay_min = absl::Microseconds(20),
                                                .delay_max = absl::Microseconds(300),
                                                .bulk_pieces = 5,
                                                .close_max = absl::Milliseconds(2)});
  return network;
}

INSTANTIATE_TEST_SUITE_P(Inproc, TransportContract,
                         testing::Values(TransportFactory([] { return SharedNetwork().NewTransport(); })));
INSTANTIATE_TEST_SUITE_P(InprocSlow, TransportContract,
                         testing::Values(TransportFactory([] { return SlowNetwork().NewTransport(); })));

// Two nodes under a clock that only the test moves.
struct SimPair {
  explicit SimPair(SimFaults faults) : network(&clock, faults) {
    a = network.NewTransport();
    b = network.NewTransport();
    a->SetHandler(&in_a);
    b->SetHandler(&in_b);
    id = *a->Connect(b->Address());
  }
  void Run(absl::Duration d) {
    for (absl::Duration t; t < d; t += absl::Milliseconds(1)) {
      while (a->Progress() + b->Progress() > 0) {
      }
      clock.Advance(absl::Milliseconds(1));
    }
  }
  FakeClock clock;
  InprocNetwork network;
  RecordingHandler in_a, in_b;
  std::unique_ptr<Transport> a, b;
  EndpointId id;
};

std::vector<std::string> Transcript(uint64_t seed) {
  SimPair sim(
      {.seed = seed, .loss = 0.2, .duplicate = 0.2, .corrupt = 0.1, .delay_max = absl::Milliseconds(20)});
  for (int i = 0; i < 50; ++i) (void)sim.a->Send(sim.id, "message " + std::to_string(i));
  sim.Run(absl::Milliseconds(100));
  std::vector<std::string> out;
  for (auto& [from, m] : sim.in_b.messages) out.push_back(m);
  return out;
}

TEST(SimTransportTest, TheSameSeedGivesTheSameFaults) {
  EXPECT_EQ(Transcript(7), Transcript(7));
  EXPECT_NE(Transcript(7), Transcript(8));
}

TEST(SimTransportTest, FaultsHappenAtTheirRates) {
  const auto got = Transcript(11);
  int odd = 0, reordered = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    odd += !got[i].starts_with("message ");
    reordered += i > 0 && got[i] < got[i - 1];
  }
  EXPECT_NE(got.size(), 50u);
  EXPECT_GT(reordered, 5);
}

TEST(SimTransportTest, PiecesKeepLandingUntilTheCloseIsThrough) {
  SimPair sim({.seed = 1,
               .delay_min = absl::Milliseconds(5),
               .delay_max = absl::Milliseconds(5),
               .bulk_pieces = 10,
               .close_max = absl::Milliseconds(40)});
  (void)sim.a->Send(sim.id, "hello");
  sim.Run(absl::Milliseconds(10));
  std::vector<std::byte> payload(1000, std::byte{1});
  (void)sim.b->SendBulk(sim.in_b.messages[0].first, "h", payload, [](absl::Status) {});
  sim.Run(absl::Milliseconds(12));
  ASSERT_EQ(sim.in_a.bulks.size(), 1u);
  auto& r = sim.in_a.bulks[0];
  EXPECT_TRUE(sim.network.MayWrite(r.bytes.data(), r.bytes.size()));
  bool quiesced = false;
  auto landed = [&] { return std::count(r.bytes.begin(), r.bytes.end(), std::byte{1}); };
  const auto at_close = landed();
  sim.a->Close(sim.id, [&] { quiesced = true; });
  sim.Run(absl::Milliseconds(45));
  ASSERT_TRUE(quiesced);
  EXPECT_EQ(r.done, 1);
  EXPECT_FALSE(sim.network.MayWrite(r.bytes.data(), r.bytes.size()));
  const auto at_quiescence = landed();
  EXPECT_GT(at_quiescence, at_close) << "a double that stops at once hides late writes";
  sim.Run(absl::Milliseconds(200));
  EXPECT_EQ(landed(), at_quiescence);
}

TEST(SimTransportTest, ACutLinkIsSilentAndDeliversLateWhenItHeals) {
  SimPair sim({});
  sim.network.Cut(sim.a->Address(), sim.b->Address(), true);
  ASSERT_TRUE(sim.a->Send(sim.id, "late").ok());
  sim.Run(absl::Seconds(5));
  EXPECT_TRUE(sim.in_b.messages.empty());
  EXPECT_TRUE(sim.in_a.down.empty());
  sim.network.Cut(sim.a->Address(), sim.b->Address(), false);
  sim.Run(absl::Milliseconds(5));
  EXPECT_EQ(sim.in_b.messages.size(), 1u);
}

TEST(SimTransportTest, ACrashRunsNoCallbackOfTheDeadAndTellsThePeers) {
  SimPair sim(
      {.seed = 1, .delay_min = absl::Milliseconds(5), .delay_max = absl::Milliseconds(5), .bulk_pieces = 10});
  (void)sim.a->Send(sim.id, "hello");
  sim.Run(absl::Milliseconds(10));
  std::vector<std::byte> payload(1000, std::byte{1});
  bool sent = false;
  (void)sim.b->SendBulk(sim.in_b.messages[0].first, "h", payload, [&](absl::Status) { sent = true; });
  sim.Run(absl::Milliseconds(15));
  sim.network.Crash(sim.b->Address());
  sim.Run(absl::Milliseconds(200));
  EXPECT_FALSE(sent);
  EXPECT_TRUE(sim.in_a.down.contains(sim.id));
  EXPECT_EQ(sim.in_a.bulks[0].done, 0) << "only a close tells that nothing more will land";
  bool quiesced = false;
  sim.a->Close(sim.id, [&] { quiesced = true; });
  sim.Run(absl::Milliseconds(5));
  EXPECT_TRUE(quiesced);
  EXPECT_EQ(sim.in_a.bulks[0].done, 1);
}

}  // namespace
}  // namespace tidepool
