#pragma once

// The contract of Transport, run on every implementation: what FetchNode leans on.

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "base/clock.h"
#include "base/digest.h"
#include "transport/transport.h"

namespace tidepool {

// Records what happens; gives bulk data memory of its own unless told to drop it.
struct RecordingHandler : TransportHandler {
  struct Received {
    EndpointId from;
    std::string header;
    std::vector<std::byte> bytes;
    int done = 0;
    absl::Status status;
    std::unique_ptr<PayloadDigest> digest;
  };
  void OnMessage(EndpointId from, std::string_view message) override {
    messages.emplace_back(from, message);
    if (on_message) on_message(from, message);
  }
  BulkSink OnBulk(EndpointId from, std::string_view header, size_t length) override {
    if (drop) {
      ++dropped;
      return {};
    }
    Received& r = bulks.emplace_back();
    r.from = from;
    r.header = header;
    r.bytes.resize(length);
    if (digests) r.digest = std::make_unique<PayloadDigest>(length);
    return BulkSink{r.bytes,
                    [&r](absl::Status s) {
                      ++r.done;
                      r.status = std::move(s);
                    },
                    r.digest.get()};
  }
  void OnEndpointDown(EndpointId endpoint, absl::Status why) override { down[endpoint] = std::move(why); }

  bool drop = false;
  bool digests = false;  // bulk data is digested as it lands
  int dropped = 0;
  std::vector<std::pair<EndpointId, std::string>> messages;
  std::deque<Received> bulks;
  std::map<EndpointId, absl::Status> down;
  std::function<void(EndpointId, std::string_view)> on_message;
};

using TransportFactory = std::function<std::unique_ptr<Transport>()>;

class TransportContract : public testing::TestWithParam<TransportFactory> {
 protected:
  void SetUp() override {
    a_ = GetParam()();
    b_ = GetParam()();
    a_->SetHandler(&in_a_);
    b_->SetHandler(&in_b_);
  }
  // Drives both until `until` holds, for at most ten seconds.
  bool Drive(const std::function<bool()>& until) {
    const absl::Time limit = Clock::Real().Now() + absl::Seconds(10);
    while (!until()) {
      if (Clock::Real().Now() > limit) return false;
      if (a_) a_->Progress();
      if (b_) b_->Progress();
    }
    return true;
  }
  EndpointId ConnectAToB() {
    auto id = a_->Connect(b_->Address());
    EXPECT_TRUE(id.ok()) << id.status();
    return *id;
  }
  // A connection over which a message has passed; the endpoint as B sees it goes to `at_b`.
  EndpointId Connected(EndpointId* at_b) {
    const EndpointId id = ConnectAToB();
    EXPECT_TRUE(a_->Send(id, "hello").ok());
    const size_t before = in_b_.messages.size();
    EXPECT_TRUE(Drive([&] { return in_b_.messages.size() > before; }));
    *at_b = in_b_.messages.back().first;
    return id;
  }
  static std::vector<std::byte> Pattern(size_t n, uint8_t seed) {
    std::vector<std::byte> out(n);
    for (size_t i = 0; i < n; ++i) out[i] = static_cast<std::byte>(i * 7 + i / 251 + seed);
    return out;
  }

  RecordingHandler in_a_, in_b_;
  std::unique_ptr<Transport> a_, b_;
};

TEST_P(TransportContract, MessagesArriveAndAreAnsweredOnTheSameConnection) {
  in_b_.on_message = [&](EndpointId from, std::string_view m) {
    EXPECT_TRUE(b_->Send(from, std::string("re: ") + std::string(m)).ok());
  };
  const EndpointId id = ConnectAToB();
  ASSERT_TRUE(a_->Send(id, "ping").ok());
  ASSERT_TRUE(Drive([&] { return !in_a_.messages.empty(); }));
  EXPECT_EQ(in_a_.messages[0].first, id);
  EXPECT_EQ(in_a_.messages[0].second, "re: ping");
}

TEST_P(TransportContract, MessagesUpToTheLimitPassAndLongerOnesAreRefused) {
  EndpointId at_b;
  const EndpointId id = Connected(&at_b);
  std::string big(Transport::kMaxMessageBytes, 'x');
  big[100000] = 'y';
  ASSERT_TRUE(a_->Send(id, big).ok());
  ASSERT_TRUE(Drive([&] { return in_b_.messages.size() == 2; }));
  EXPECT_TRUE(in_b_.messages[1].second == big);
  EXPECT_TRUE(absl::IsInvalidArgument(a_->Send(id, big + "x")));
}

TEST_P(TransportContract, TwoConnectionsBetweenTheSamePeersAreTwoEndpoints) {
  EndpointId first_at_b, second_at_b;
  const EndpointId first = Connected(&first_at_b);
  const EndpointId second = Connected(&second_at_b);
  EXPECT_NE(first, second);
  EXPECT_NE(first_at_b, second_at_b);
  bool quiesced = false;
  a_->Close(first, [&] { quiesced = true; });
  ASSERT_TRUE(Drive([&] { return quiesced && in_b_.down.contains(first_at_b); }));
  EXPECT_FALSE(in_b_.down.contains(second_at_b));
  ASSERT_TRUE(a_->Send(second, "still here").ok());
  EXPECT_TRUE(Drive([&] { return in_b_.messages.back().second == "still here"; }));
}

TEST_P(TransportContract, BothMayConnectToEachOtherAtOnce) {
  const EndpointId ab = ConnectAToB();
  auto ba = b_->Connect(a_->Address());
  ASSERT_TRUE(ba.ok());
  ASSERT_TRUE(a_->Send(ab, "from a").ok());
  ASSERT_TRUE(b_->Send(*ba, "from b").ok());
  ASSERT_TRUE(Drive([&] { return in_a_.messages.size() == 1 && in_b_.messages.size() == 1; }));
  EXPECT_NE(in_a_.messages[0].first, ab);
  EXPECT_NE(in_b_.messages[0].first, *ba);
}

TEST_P(TransportContract, BulkOfEverySizeLandsInTheReceiversMemory) {
  EndpointId at_b;
  Connected(&at_b);
  for (size_t size :
       {size_t{0}, size_t{1}, size_t{100}, size_t{8192}, size_t{20000}, size_t{131072}, size_t{3} << 20}) {
    SCOPED_TRACE(size);
    const auto payload = Pattern(size, static_cast<uint8_t>(size));
    const size_t before = in_a_.bulks.size();
    absl::Status sent = absl::UnknownError("pending");
    int sent_times = 0;
    ASSERT_TRUE(b_->SendBulk(at_b, "header " + std::to_string(size), payload, [&](absl::Status s) {
                    sent = std::move(s);
                    ++sent_times;
                  }).ok());
    ASSERT_TRUE(
        Drive([&] { return sent_times > 0 && in_a_.bulks.size() > before && in_a_.bulks.back().done > 0; }));
    EXPECT_TRUE(sent.ok()) << sent;
    EXPECT_EQ(sent_times, 1);
    EXPECT_EQ(in_a_.bulks.back().header, "header " + std::to_string(size));
    EXPECT_TRUE(in_a_.bulks.back().status.ok());
    EXPECT_TRUE(in_a_.bulks.back().bytes == payload);
  }
}

TEST_P(TransportContract, ADigestTakesWhatLandsFromTheFirstByteOn) {
  in_a_.digests = true;
  EndpointId at_b;
  Connected(&at_b);
  for (size_t size : {size_t{0}, size_t{1}, size_t{1000}, size_t{40000}, size_t{300000}, size_t{512} << 10,
                      (size_t{900} << 10) + 7, size_t{3} << 20}) {
    SCOPED_TRACE(size);
    const auto payload = Pattern(size, static_cast<uint8_t>(size));
    const size_t before = in_a_.bulks.size();
    ASSERT_TRUE(b_->SendBulk(at_b, "h", payload, [](absl::Status) {}).ok());
    ASSERT_TRUE(Drive([&] { return in_a_.bulks.size() > before && in_a_.bulks.back().done > 0; }));
    RecordingHandler::Received& r = in_a_.bulks.back();
    EXPECT_TRUE(r.bytes == payload);
    r.digest->Update(std::span<const std::byte>(r.bytes).subspan(r.digest->size()));
    EXPECT_EQ(r.digest->Finish(), PayloadChecksum(payload));
  }
}

TEST_P(TransportContract, ManyBulksInFlightAllCompleteOnce) {
  EndpointId at_b;
  Connected(&at_b);
  constexpr int kCount = 64;
  std::vector<std::vector<std::byte>> payloads;
  int sent = 0;
  for (int i = 0; i < kCount; ++i) payloads.push_back(Pattern(40000 + i, static_cast<uint8_t>(i)));
  for (int i = 0; i < kCount; ++i) {
    ASSERT_TRUE(
        b_->SendBulk(at_b, std::to_string(i), payloads[i], [&](absl::Status s) { sent += s.ok(); }).ok());
  }
  auto landed = [&] {
    int n = 0;
    for (const auto& r : in_a_.bulks) n += r.done;
    return n;
  };
  ASSERT_TRUE(Drive([&] { return sent == kCount && landed() == kCount; }));
  for (const auto& r : in_a_.bulks) EXPECT_TRUE(r.bytes == payloads[std::stoi(r.header)]);
}

TEST_P(TransportContract, ADroppedBulkStillCompletesAtItsSender) {
  EndpointId at_b;
  Connected(&at_b);
  in_a_.drop = true;
  for (size_t size : {size_t{0}, size_t{100}, size_t{1} << 20}) {
    const auto payload = Pattern(size, 1);
    const int before = in_a_.dropped;
    int sent = 0;
    ASSERT_TRUE(b_->SendBulk(at_b, "h", payload, [&](absl::Status) { ++sent; }).ok());
    ASSERT_TRUE(Drive([&] { return sent == 1 && in_a_.dropped == before + 1; })) << size;
  }
  // What the receiver still does about them is done by the time a message behind them is there.
  const size_t before = in_a_.messages.size();
  ASSERT_TRUE(b_->Send(at_b, "behind").ok());
  EXPECT_TRUE(Drive([&] { return in_a_.messages.size() > before; }));
  EXPECT_EQ(in_a_.dropped, 3);
}

TEST_P(TransportContract, CloseCompletesEveryTransferBeforeItsOwnCallback) {
  EndpointId at_b;
  const EndpointId id = Connected(&at_b);
  std::vector<std::vector<std::byte>> payloads;
  int sent = 0;
  for (int i = 0; i < 8; ++i) {
    payloads.push_back(Pattern(size_t{4} << 20, static_cast<uint8_t>(i)));
    ASSERT_TRUE(b_->SendBulk(at_b, "h", payloads.back(), [&](absl::Status) { ++sent; }).ok());
  }
  ASSERT_TRUE(Drive([&] { return !in_a_.bulks.empty(); }));
  bool quiesced = false;
  size_t unfinished = 99;
  a_->Close(id, [&] {
    quiesced = true;
    unfinished = 0;
    for (const auto& r : in_a_.bulks) unfinished += r.done == 0;
  });
  ASSERT_TRUE(Drive([&] { return quiesced; }));
  EXPECT_EQ(unfinished, 0u);
  // Nothing lands after it.
  for (auto& r : in_a_.bulks) std::fill(r.bytes.begin(), r.bytes.end(), std::byte{0xee});
  const size_t announced = in_a_.bulks.size();
  ASSERT_TRUE(Drive([&] { return in_b_.down.contains(at_b); }));
  bool b_quiesced = false;
  b_->Close(at_b, [&] { b_quiesced = true; });
  ASSERT_TRUE(Drive([&] { return b_quiesced; }));
  EXPECT_EQ(sent, 8);
  EXPECT_EQ(in_a_.bulks.size(), announced);
  for (const auto& r : in_a_.bulks) {
    EXPECT_EQ(r.done, 1);
    for (std::byte b : r.bytes) ASSERT_EQ(b, std::byte{0xee});
  }
}

// A stopped peer (SIGSTOP, a hung host) is not noticed by the network; the receiver has to get its memory
// back all the same, and what the peer does once it goes on must not reach it.
TEST_P(TransportContract, CloseQuiescesThoughThePeerIsStopped) {
  EndpointId at_b;
  const EndpointId id = Connected(&at_b);
  std::vector<std::vector<std::byte>> payloads;
  for (int i = 0; i < 8; ++i) {
    payloads.push_back(Pattern(size_t{4} << 20, static_cast<uint8_t>(i)));
    ASSERT_TRUE(b_->SendBulk(at_b, "h", payloads.back(), [](absl::Status) {}).ok());
  }
  ASSERT_TRUE(Drive([&] { return !in_a_.bulks.empty(); }));
  auto stopped = std::move(b_);
  bool quiesced = false;
  a_->Close(id, [&] { quiesced = true; });
  ASSERT_TRUE(Drive([&] { return quiesced; }));
  for (auto& r : in_a_.bulks) {
    EXPECT_EQ(r.done, 1);
    std::fill(r.bytes.begin(), r.bytes.end(), std::byte{0xee});
  }
  b_ = std::move(stopped);
  ASSERT_TRUE(Drive([&] { return in_b_.down.contains(at_b); }));
  for (const auto& r : in_a_.bulks) {
    for (std::byte b : r.bytes) ASSERT_EQ(b, std::byte{0xee});
  }
}

TEST_P(TransportContract, ClosingTwiceOrAnUnknownEndpointStillQuiesces) {
  EndpointId at_b;
  const EndpointId id = Connected(&at_b);
  int quiesced = 0;
  a_->Close(id, [&] { ++quiesced; });
  a_->Close(id, [&] { ++quiesced; });
  a_->Close(987654, [&] { ++quiesced; });
  EXPECT_EQ(quiesced, 0) << "only from Progress";
  EXPECT_TRUE(Drive([&] { return quiesced == 3; }));
  EXPECT_TRUE(absl::IsUnavailable(a_->Send(id, "x")));
}

TEST_P(TransportContract, ThePeersDeathIsReportedAndSendsFailAfterwards) {
  EndpointId at_b;
  const EndpointId id = Connected(&at_b);
  b_.reset();
  ASSERT_TRUE(Drive([&] { return in_a_.down.contains(id); }));
  EXPECT_TRUE(absl::IsUnavailable(a_->Send(id, "x")));
  bool quiesced = false;
  a_->Close(id, [&] { quiesced = true; });
  EXPECT_TRUE(Drive([&] { return quiesced; }));
}

TEST_P(TransportContract, ConnectingToNobodyEndsInEndpointDown) {
  const std::string address = b_->Address();
  b_.reset();
  auto id = a_->Connect(address);
  if (!id.ok()) {
    EXPECT_TRUE(absl::IsUnavailable(id.status()));
    return;
  }
  (void)a_->Send(*id, "anyone?");
  EXPECT_TRUE(Drive([&] { return in_a_.down.contains(*id); }));
}

TEST_P(TransportContract, MalformedAddressesAreInvalidArguments) {
  for (const char* address : {"", "x", "inproc:", "inproc:x", "ucx:", "ucx:1.2.3.4", "ucx:1.2.3.4:0",
                              "ucx:1.2.3.4:99999", "ucx:localhost:80", "ucx::80", "ucx:1.2.3.4:8 "}) {
    EXPECT_TRUE(absl::IsInvalidArgument(a_->Connect(address).status())) << address;
  }
}

TEST_P(TransportContract, WaitReturnsForWakeAndForTraffic) {
  EndpointId at_b;
  const EndpointId id = Connected(&at_b);
  while (a_->Progress() + b_->Progress() > 0) {
  }
  // A wake-up that came first is not lost.
  b_->Wake();
  absl::Time start = Clock::Real().Now();
  b_->Wait(20000);
  EXPECT_LT(Clock::Real().Now() - start, absl::Seconds(10));
  std::thread waker([&] { b_->Wake(); });
  start = Clock::Real().Now();
  b_->Wait(20000);
  EXPECT_LT(Clock::Real().Now() - start, absl::Seconds(10));
  waker.join();

  ASSERT_TRUE(a_->Send(id, "traffic").ok());
  std::thread sender([&] {
    for (int i = 0; i < 1000; ++i) a_->Progress();
  });
  start = Clock::Real().Now();
  while (in_b_.messages.size() < 2 && Clock::Real().Now() - start < absl::Seconds(10)) {
    b_->Wait(20000);
    b_->Progress();
  }
  EXPECT_EQ(in_b_.messages.size(), 2u);
  EXPECT_LT(Clock::Real().Now() - start, absl::Seconds(10));
  sender.join();
}

}  // namespace tidepool
