#include "transport/tls_transport.h"

#include <arpa/inet.h>
#include <gmock/gmock.h>
#include <netinet/in.h>
#include <openssl/ssl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/rng.h"
#include "tests/transport/test_certificates.h"
#include "tests/transport/transport_contract.h"
#include "transport/tls_frame.h"

namespace tidepool {
namespace {

using ::testing::HasSubstr;

TestAuthority& Authority() {
  static TestAuthority& authority = *[] {
    static TestAuthority made;
    for (const char* name : {"a", "b"}) made.Issue(name);
    return &made;
  }();
  return authority;
}

TlsTransportOptions OptionsOf(const std::string& name) {
  TlsTransportOptions out;
  out.cert_file = Authority().cert_file(name);
  out.key_file = Authority().key_file(name);
  out.ca_file = Authority().ca_file();
  return out;
}

std::unique_ptr<Transport> Make(const TlsTransportOptions& options) {
  auto transport = CreateTlsTransport(options);
  EXPECT_TRUE(transport.ok()) << transport.status();
  return std::move(*transport);
}

INSTANTIATE_TEST_SUITE_P(Tls, TransportContract,
                         testing::Values(TransportFactory([] { return Make(OptionsOf("a")); })));
INSTANTIATE_TEST_SUITE_P(TlsWithNames, TransportContract, testing::Values(TransportFactory([] {
                           TlsTransportOptions options = OptionsOf("a");
                           options.name = "a";
                           options.check_name = true;
                           return Make(options);
                         })));

TEST(TlsTransportFiles, WhatIsWrongWithThemIsNamed) {
  const auto problem = [](TlsTransportOptions options) {
    auto made = CreateTlsTransport(options);
    EXPECT_TRUE(absl::IsInvalidArgument(made.status())) << made.status();
    return std::string(made.status().message());
  };
  TlsTransportOptions options = OptionsOf("a");
  options.cert_file = "";
  EXPECT_THAT(problem(options), HasSubstr("tls_cert is empty"));
  options = OptionsOf("a");
  options.key_file = "/nonexistent/key.pem";
  EXPECT_THAT(problem(options), HasSubstr("tls_key: /nonexistent/key.pem: No such file"));
  options = OptionsOf("a");
  options.key_file = Authority().key_file("b");
  EXPECT_THAT(problem(options), HasSubstr("not the key of tls_cert"));
  options = OptionsOf("a");
  options.ca_file = Authority().key_file("a");
  EXPECT_THAT(problem(options), HasSubstr("tls_ca"));
  options = OptionsOf("a");
  options.ca_file = "";
  EXPECT_THAT(problem(options), HasSubstr("tls_ca is empty"));
  options = OptionsOf("a");
  options.check_name = true;
  EXPECT_THAT(problem(options), HasSubstr("worker.id"));
  options = OptionsOf("a");
  options.net_devices = "nosuch0";
  EXPECT_THAT(problem(options), HasSubstr("nosuch0"));
}

// A server under a clock of the test, and strangers that do what they like to its port.
class TlsHostileTest : public testing::Test {
 protected:
  explicit TlsHostileTest(TlsTransportOptions options = OptionsOf("a")) {
    options.clock = &clock_;
    options.metrics = &metrics_;
    options.max_connections = 24;
    options.max_handshakes = 8;
    server_ = Make(options);
    server_->SetHandler(&in_server_);
    const std::string address = server_->Address();
    port_ = static_cast<uint16_t>(std::stoi(address.substr(address.rfind(':') + 1)));
  }
  ~TlsHostileTest() override {
    for (int fd : fds_) close(fd);
  }

  int Dial() {
    const int fd = socket(AF_INET, SOCK_STREAM, 0);
    sockaddr_in to{};
    to.sin_family = AF_INET;
    to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    to.sin_port = htons(port_);
    EXPECT_EQ(connect(fd, reinterpret_cast<sockaddr*>(&to), sizeof to), 0);
    fds_.push_back(fd);
    return fd;
  }
  bool Drive(const std::function<bool()>& until) {
    const absl::Time limit = Clock::Real().Now() + absl::Seconds(10);
    while (!until()) {
      if (Clock::Real().Now() > limit) return false;
      server_->Progress();
      if (client_) client_->Progress();
    }
    return true;
  }
  // The server has closed its side.
  static bool Ended(int fd) {
    char byte[256];
    for (;;) {
      const ssize_t n = recv(fd, byte, sizeof byte, MSG_DONTWAIT);
      if (n == 0) return true;
      if (n < 0) return errno != EAGAIN;
    }
  }
  double Refused(const std::string& reason) {
    const std::string text = metrics_.Render();
    const std::string name =
        "tidepool_transport_connections_refused_total{reason=\"" + reason + "\",transport=\"tls\"} ";
    const size_t at = text.find(name);
    return at == std::string::npos ? -1 : std::stod(text.substr(at + name.size()));
  }
  // Whatever was done to it, the server still serves who has a certificate.
  void ExpectHealthy() {
    client_ = Make(OptionsOf("b"));
    client_->SetHandler(&in_client_);
    const size_t before = in_server_.messages.size();
    auto id = client_->Connect(server_->Address());
    ASSERT_TRUE(id.ok());
    ASSERT_TRUE(client_->Send(*id, "still there?").ok());
    EXPECT_TRUE(Drive([&] { return in_server_.messages.size() > before; }));
    EXPECT_EQ(in_server_.messages.back().second, "still there?");
  }

  FakeClock clock_;
  MetricRegistry metrics_;
  RecordingHandler in_server_, in_client_;
  std::unique_ptr<Transport> server_, client_;
  uint16_t port_ = 0;
  std::vector<int> fds_;
};

TEST_F(TlsHostileTest, GarbageCostsItsConnection) {
  Rng rng(5);
  for (int i = 0; i < 200; ++i) {
    const int fd = Dial();
    std::string bytes(1 + rng.Below(400), '\0');
    for (char& c : bytes) c = static_cast<char>(rng.Below(256));
    // Half of them begin like a TLS handshake.
    if (i % 2 == 0) bytes = std::string("\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 11) + bytes;
    (void)send(fd, bytes.data(), bytes.size(), MSG_NOSIGNAL);
    shutdown(fd, SHUT_WR);
    ASSERT_TRUE(Drive([&] { return Ended(fd); })) << i;
    close(fd);
    fds_.clear();
  }
  EXPECT_GE(Refused("handshake"), 200);
  EXPECT_TRUE(in_server_.down.empty()) << "a stranger is no endpoint";
  ExpectHealthy();
}

TEST_F(TlsHostileTest, ASilentConnectionEndsWithTheHandshakesTime) {
  const int fd = Dial();
  ASSERT_TRUE(Drive([&] {
    return metrics_.Render().find("tidepool_transport_connections{transport=\"tls\"} 1") != std::string::npos;
  }));
  clock_.Advance(absl::Seconds(4));
  for (int i = 0; i < 100; ++i) server_->Progress();
  EXPECT_FALSE(Ended(fd));
  clock_.Advance(absl::Seconds(2));
  EXPECT_TRUE(Drive([&] { return Ended(fd); }));
  EXPECT_EQ(Refused("handshake_timeout"), 1);
  ExpectHealthy();
}

TEST_F(TlsHostileTest, AByteNowAndThenDoesNotBuyTime) {
  const int fd = Dial();
  const std::string begin("\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 11);
  bool ended = false;
  for (size_t i = 0; i < begin.size() && !ended; ++i) {
    (void)send(fd, &begin[i], 1, MSG_NOSIGNAL);
    clock_.Advance(absl::Seconds(1));
    for (int k = 0; k < 200; ++k) server_->Progress();
    ended = Ended(fd);
  }
  EXPECT_TRUE(ended);
  EXPECT_EQ(Refused("handshake_timeout"), 1);
}

TEST_F(TlsHostileTest, MoreStrangersThanAllowedAreTurnedAwayAtOnce) {
  std::vector<int> strangers;
  for (int i = 0; i < 20; ++i) strangers.push_back(Dial());
  EXPECT_TRUE(Drive([&] { return Refused("limit") == 12; }));
  int left = 0;
  for (int fd : strangers) left += !Ended(fd);
  EXPECT_EQ(left, 8);
}

TEST_F(TlsHostileTest, NoCertificateAndAnotherAuthoritysAreRefused) {
  TestAuthority other;
  other.Issue("a");
  TlsTransportOptions options = OptionsOf("b");
  options.cert_file = other.cert_file("a");
  options.key_file = other.key_file("a");
  client_ = Make(options);
  client_->SetHandler(&in_client_);
  auto id = client_->Connect(server_->Address());
  ASSERT_TRUE(id.ok());
  (void)client_->Send(*id, "let me in");
  ASSERT_TRUE(Drive([&] { return in_client_.down.contains(*id) && Refused("handshake") == 1; }));
  EXPECT_TRUE(in_server_.messages.empty());

  // None at all: a bare TLS client.
  const int fd = Dial();
  SSL_CTX* context = SSL_CTX_new(TLS_client_method());
  SSL* ssl = SSL_new(context);
  SSL_set_fd(ssl, fd);
  std::thread stranger([&] {
    // In TLS 1.3 the client's half ends before the server has judged it; the first read tells.
    char byte;
    if (SSL_connect(ssl) == 1) (void)SSL_read(ssl, &byte, 1);
  });
  EXPECT_TRUE(Drive([&] { return Refused("handshake") == 2; }));
  stranger.join();
  SSL_free(ssl);
  SSL_CTX_free(context);
  client_.reset();
  ExpectHealthy();
}

TEST_F(TlsHostileTest, AServerOfAnotherAuthorityIsRefusedByTheClient) {
  TestAuthority other;
  other.Issue("b");
  TlsTransportOptions options;
  options.cert_file = other.cert_file("b");
  options.key_file = other.key_file("b");
  options.ca_file = other.ca_file();
  client_ = Make(options);
  client_->SetHandler(&in_client_);
  auto id = client_->Connect(server_->Address());
  ASSERT_TRUE(id.ok());
  ASSERT_TRUE(Drive([&] { return in_client_.down.contains(*id); }));
  EXPECT_THAT(std::string(in_client_.down[*id].message()), HasSubstr("verify failed"));
}

TEST_F(TlsHostileTest, TlsOneTwoIsRefused) {
  const int fd = Dial();
  SSL_CTX* context = SSL_CTX_new(TLS_client_method());
  SSL_CTX_set_max_proto_version(context, TLS1_2_VERSION);
  SSL* ssl = SSL_new(context);
  SSL_set_fd(ssl, fd);
  std::thread stranger([&] { EXPECT_NE(SSL_connect(ssl), 1); });
  EXPECT_TRUE(Drive([&] { return Refused("handshake") == 1; }));
  stranger.join();
  SSL_free(ssl);
  SSL_CTX_free(context);
}

// Somebody with a certificate who then breaks the framing.
TEST_F(TlsHostileTest, BrokenFramesOfAPeerWithACertificateCostItsConnection) {
  const auto head = [](TlsFrameType type, uint64_t length) {
    std::string out;
    AppendTlsHead(out, type, 0, length);
    return out;
  };
  int tried = 0;
  for (const std::string& stream : {std::string(64, '\xff'), head(TlsFrameType::kMessage, UINT64_MAX),
                                    head(TlsFrameType::kBulk, UINT64_MAX), head(TlsFrameType::kChunk, 100),
                                    head(TlsFrameType::kBulk, 10) + head(TlsFrameType::kChunk, 11)}) {
    const int fd = Dial();
    SSL_CTX* context = SSL_CTX_new(TLS_client_method());
    ASSERT_EQ(SSL_CTX_use_certificate_file(context, Authority().cert_file("b").c_str(), SSL_FILETYPE_PEM), 1);
    ASSERT_EQ(SSL_CTX_use_PrivateKey_file(context, Authority().key_file("b").c_str(), SSL_FILETYPE_PEM), 1);
    SSL* ssl = SSL_new(context);
    SSL_set_fd(ssl, fd);
    std::thread peer([&] {
      ASSERT_EQ(SSL_connect(ssl), 1);
      SSL_write(ssl, stream.data(), static_cast<int>(stream.size()));
    });
    ++tried;
    EXPECT_TRUE(Drive([&] { return Refused("protocol") == tried; })) << tried;
    peer.join();
    SSL_free(ssl);
    SSL_CTX_free(context);
  }
  ExpectHealthy();
}

TEST_F(TlsHostileTest, ABulkThatNobodyWantsIsReadAwayWithoutMemory) {
  client_ = Make(OptionsOf("b"));
  client_->SetHandler(&in_client_);
  in_server_.drop = true;
  auto id = client_->Connect(server_->Address());
  ASSERT_TRUE(id.ok());
  const std::vector<std::byte> payload(64 << 20, std::byte{1});
  int sent = 0;
  ASSERT_TRUE(client_->SendBulk(*id, "huge", payload, [&](absl::Status s) { sent += s.ok(); }).ok());
  ASSERT_TRUE(client_->Send(*id, "after").ok());
  EXPECT_TRUE(Drive([&] { return sent == 1 && in_server_.dropped == 1 && !in_server_.messages.empty(); }));
}

TEST_F(TlsHostileTest, AControlMessageOvertakesABulk) {
  client_ = Make(OptionsOf("b"));
  client_->SetHandler(&in_client_);
  auto id = client_->Connect(server_->Address());
  ASSERT_TRUE(id.ok());
  const std::vector<std::byte> payload(32 << 20, std::byte{1});
  ASSERT_TRUE(client_->SendBulk(*id, "big", payload, [](absl::Status) {}).ok());
  ASSERT_TRUE(Drive([&] { return !in_server_.bulks.empty(); }));
  ASSERT_TRUE(client_->Send(*id, "abort").ok());
  ASSERT_TRUE(Drive([&] { return !in_server_.messages.empty(); }));
  EXPECT_EQ(in_server_.bulks[0].done, 0);
}

TEST_F(TlsHostileTest, ASilentPeerEndsAfterTheIdleTime) {
  client_ = Make(OptionsOf("b"));
  client_->SetHandler(&in_client_);
  auto id = client_->Connect(server_->Address());
  ASSERT_TRUE(id.ok());
  ASSERT_TRUE(client_->Send(*id, "hello").ok());
  ASSERT_TRUE(Drive([&] { return !in_server_.messages.empty(); }));
  auto stopped = std::move(client_);  // not progressed any more: as if it were hung
  clock_.Advance(absl::Seconds(31));
  ASSERT_TRUE(Drive([&] { return in_server_.down.size() == 1; }));
  EXPECT_THAT(std::string(in_server_.down.begin()->second.message()), HasSubstr("silent for 30s"));
  EXPECT_EQ(Refused("idle"), 1);
}

TEST_F(TlsHostileTest, KeepAlivesHoldAnIdleConnection) {
  TlsTransportOptions options = OptionsOf("b");
  options.clock = &clock_;
  client_ = Make(options);
  client_->SetHandler(&in_client_);
  auto id = client_->Connect(server_->Address());
  ASSERT_TRUE(id.ok());
  ASSERT_TRUE(client_->Send(*id, "hello").ok());
  ASSERT_TRUE(Drive([&] { return !in_server_.messages.empty(); }));
  for (int i = 0; i < 20; ++i) {
    clock_.Advance(absl::Seconds(6));
    for (int k = 0; k < 200; ++k) {
      server_->Progress();
      client_->Progress();
    }
  }
  EXPECT_TRUE(in_server_.down.empty());
  EXPECT_TRUE(in_client_.down.empty());
}

TEST(TlsNameTest, ACertificateOfAnotherNameIsRefused) {
  TlsTransportOptions server_options = OptionsOf("a");
  server_options.name = "b";  // says that it is b, and has a's certificate
  auto server = Make(server_options);
  RecordingHandler in_server, in_client;
  server->SetHandler(&in_server);
  TlsTransportOptions client_options = OptionsOf("b");
  client_options.name = "b";
  client_options.check_name = true;
  auto client = Make(client_options);
  client->SetHandler(&in_client);
  auto id = client->Connect(server->Address());
  ASSERT_TRUE(id.ok());
  const absl::Time limit = Clock::Real().Now() + absl::Seconds(10);
  while (in_client.down.empty() && Clock::Real().Now() < limit) {
    server->Progress();
    client->Progress();
  }
  ASSERT_TRUE(in_client.down.contains(*id));
  EXPECT_THAT(std::string(in_client.down[*id].message()), HasSubstr("hostname mismatch"));
  // An address without a name cannot be checked.
  EXPECT_TRUE(absl::IsInvalidArgument(client->Connect("tls:127.0.0.1:1").status()));
}

TEST(TlsReloadTest, NewConnectionsTakeANewCertificate) {
  TestAuthority authority;
  authority.Issue("w");
  FakeClock clock;
  TlsTransportOptions options;
  options.cert_file = authority.cert_file("w");
  options.key_file = authority.key_file("w");
  options.ca_file = authority.ca_file();
  options.clock = &clock;
  auto a = Make(options);
  auto b = Make(options);
  RecordingHandler in_a, in_b;
  a->SetHandler(&in_a);
  b->SetHandler(&in_b);
  authority.Issue("w");  // another key
  clock.Advance(absl::Seconds(3));
  auto id = a->Connect(b->Address());
  ASSERT_TRUE(id.ok());
  ASSERT_TRUE(a->Send(*id, "hello").ok());
  const absl::Time limit = Clock::Real().Now() + absl::Seconds(10);
  while (in_b.messages.empty() && Clock::Real().Now() < limit) {
    a->Progress();
    b->Progress();
  }
  EXPECT_EQ(in_b.messages.size(), 1u);
}

}  // namespace
}  // namespace tidepool
