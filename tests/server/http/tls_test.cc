#include <arpa/inet.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <openssl/err.h>
#include <openssl/evp.h>
#include <openssl/pem.h>
#include <openssl/ssl.h>
#include <openssl/x509v3.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#include <condition_variable>
#include <filesystem>
#include <mutex>

#include "base/digest.h"
#include "base/status.h"
#include "server/http/http_server.h"
#include "tests/server/http/raw_client.h"

namespace tidepool {
namespace {

using ::testing::HasSubstr;

struct KeyFree {
  void operator()(EVP_PKEY* p) const { EVP_PKEY_free(p); }
};
struct CertFree {
  void operator()(X509* p) const { X509_free(p); }
};
using Key = std::unique_ptr<EVP_PKEY, KeyFree>;
using Cert = std::unique_ptr<X509, CertFree>;

Key NewKey() { return Key(EVP_EC_gen("P-256")); }

// A certificate of `subject` for `key`, signed by `signer` (itself, where both are equal).
Cert NewCert(const char* subject, EVP_PKEY* key, const char* issuer, EVP_PKEY* signer, long serial) {
  Cert cert(X509_new());
  X509_set_version(cert.get(), 2);
  ASN1_INTEGER_set(X509_get_serialNumber(cert.get()), serial);
  X509_gmtime_adj(X509_getm_notBefore(cert.get()), -3600);
  X509_gmtime_adj(X509_getm_notAfter(cert.get()), 3600);
  const auto name = [](X509_NAME* into, const char* text) {
    X509_NAME_add_entry_by_txt(into, "CN", MBSTRING_ASC, reinterpret_cast<const unsigned char*>(text), -1, -1,
                               0);
  };
  name(X509_get_subject_name(cert.get()), subject);
  name(X509_get_issuer_name(cert.get()), issuer);
  X509_set_pubkey(cert.get(), key);
  if (key == signer) {
    X509_EXTENSION* ca = X509V3_EXT_conf_nid(nullptr, nullptr, NID_basic_constraints, "critical,CA:TRUE");
    X509_add_ext(cert.get(), ca, -1);
    X509_EXTENSION_free(ca);
  }
  TP_CHECK(X509_sign(cert.get(), signer, EVP_sha256()) > 0);
  return cert;
}

// A TLS client with one request at a time.
class TlsClient {
 public:
  struct Options {
    Key* key = nullptr;
    Cert* cert = nullptr;
    std::string alpn;
    int max_version = 0;
  };
  TlsClient(int port, const Options& options) : context_(SSL_CTX_new(TLS_client_method())) {
    if (options.cert != nullptr) {
      SSL_CTX_use_certificate(context_, options.cert->get());
      SSL_CTX_use_PrivateKey(context_, options.key->get());
    }
    if (options.max_version != 0) SSL_CTX_set_max_proto_version(context_, options.max_version);
    fd_ = ::socket(AF_INET, SOCK_STREAM, 0);
    const timeval patience{20, 0};
    ::setsockopt(fd_, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(static_cast<uint16_t>(port));
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    TP_CHECK(::connect(fd_, reinterpret_cast<sockaddr*>(&address), sizeof address) == 0);
    ssl_ = SSL_new(context_);
    if (!options.alpn.empty()) {
      const std::string wire = static_cast<char>(options.alpn.size()) + options.alpn;
      SSL_set_alpn_protos(ssl_, reinterpret_cast<const unsigned char*>(wire.data()),
                          static_cast<unsigned>(wire.size()));
    }
    SSL_set_fd(ssl_, fd_);
    connected_ = SSL_connect(ssl_) == 1;
  }
  ~TlsClient() {
    SSL_free(ssl_);
    SSL_CTX_free(context_);
    ::close(fd_);
    ERR_clear_error();
  }
  bool connected() const { return connected_; }
  // "" where the connection is of no use.
  std::string Ask(const std::string& request) {
    if (SSL_write(ssl_, request.data(), static_cast<int>(request.size())) <= 0) return "";
    std::string out;
    char buffer[4096];
    for (;;) {
      const int n = SSL_read(ssl_, buffer, sizeof buffer);
      if (n <= 0) return out;
      out.append(buffer, static_cast<size_t>(n));
      const size_t head = out.find("\r\n\r\n");
      const size_t at = out.find("Content-Length: ");
      if (head == std::string::npos || at == std::string::npos) continue;
      if (out.size() >= head + 4 + std::strtoul(out.c_str() + at + 16, nullptr, 10)) return out;
    }
  }
  // True: the server said goodbye in TLS, not only in TCP.
  bool EndsCleanly() {
    char byte;
    return SSL_read(ssl_, &byte, 1) <= 0 && SSL_get_shutdown(ssl_) == SSL_RECEIVED_SHUTDOWN;
  }
  int version() const { return SSL_version(ssl_); }
  std::string alpn() const {
    const unsigned char* data = nullptr;
    unsigned size = 0;
    SSL_get0_alpn_selected(ssl_, &data, &size);
    return {reinterpret_cast<const char*>(data), size};
  }
  std::string server_name() const {
    X509* cert = SSL_get1_peer_certificate(ssl_);
    char text[256] = "";
    if (cert != nullptr)
      X509_NAME_get_text_by_NID(X509_get_subject_name(cert), NID_commonName, text, sizeof text);
    X509_free(cert);
    return text;
  }

 private:
  SSL_CTX* context_;
  SSL* ssl_ = nullptr;
  int fd_ = -1;
  bool connected_ = false;
};

class TlsTest : public ::testing::Test {
 protected:
  TlsTest() : dir_(std::filesystem::temp_directory_path() / ("tidepool-tls-" + RandomHexId())) {
    std::filesystem::create_directory(dir_);
    options_.tls.cert = dir_ / "cert.pem";
    options_.tls.key = dir_ / "key.pem";
    options_.limits.header_timeout = absl::Seconds(30);  // a handshake is slow on a busy machine
    Write("server-1");
  }
  ~TlsTest() override {
    server_.reset();
    std::filesystem::remove_all(dir_);
  }
  void Write(const char* name) {
    const Key key = NewKey();
    WriteKey(options_.tls.key, key.get());
    WriteCert(options_.tls.cert, NewCert(name, key.get(), "ca", ca_key_.get(), 2).get());
  }
  static void WriteCert(const std::string& path, X509* cert) {
    FILE* file = std::fopen(path.c_str(), "w");
    TP_CHECK(file != nullptr && PEM_write_X509(file, cert) == 1);
    std::fclose(file);
  }
  static void WriteKey(const std::string& path, EVP_PKEY* key) {
    FILE* file = std::fopen(path.c_str(), "w");
    TP_CHECK(file != nullptr && PEM_write_PrivateKey(file, key, nullptr, nullptr, 0, nullptr, nullptr) == 1);
    std::fclose(file);
  }
  void Start() {
    server_ = std::make_unique<HttpServer>(options_);
    server_->Handle("POST", "/echo",
                    [](HttpRequest r, std::shared_ptr<ResponseWriter> w) { w->Send(200, {}, r.body); });
    const absl::Status status = server_->Start();
    ASSERT_TRUE(status.ok()) << status;
  }
  TlsClient Connect(TlsClient::Options options = {}) { return TlsClient(server_->port(), options); }

  const std::filesystem::path dir_;
  const Key ca_key_ = NewKey();
  const Cert ca_ = NewCert("ca", ca_key_.get(), "ca", ca_key_.get(), 1);
  HttpServer::Options options_;
  std::unique_ptr<HttpServer> server_;
};

TEST_F(TlsTest, SpeaksHttpInsideTlsAndSaysGoodbye) {
  Start();
  TlsClient client = Connect({.alpn = "http/1.1"});
  ASSERT_TRUE(client.connected());
  EXPECT_GE(client.version(), TLS1_2_VERSION);
  EXPECT_EQ(client.alpn(), "http/1.1");
  const std::string body(1 << 20, 'b');
  EXPECT_EQ(BodyOf(client.Ask(Post("/echo", body))), body) << "over many records, both ways";
  EXPECT_EQ(BodyOf(client.Ask(Post("/echo", "again"))), "again") << "the connection is kept";
  EXPECT_THAT(client.Ask(Post("/echo", "last", "Connection: close\r\n")), HasSubstr("last"));
  EXPECT_TRUE(client.EndsCleanly());
}

TEST_F(TlsTest, RefusesOldVersionsAndOtherProtocols) {
  Start();
  EXPECT_FALSE(Connect({.max_version = TLS1_1_VERSION}).connected());
  EXPECT_TRUE(Connect({.max_version = TLS1_2_VERSION}).connected());
  EXPECT_FALSE(Connect({.alpn = "h2"}).connected());
}

TEST_F(TlsTest, AskedInPlainHttpItSaysSo) {
  Start();
  RawClient client(server_->port());
  client.Send(Get("/echo"));
  EXPECT_THAT(client.ReadToEnd(), HasSubstr("this port speaks TLS"));
  EXPECT_TRUE(client.closed_by_server());
}

TEST_F(TlsTest, AHandshakeThatDoesNotComeIsCut) {
  options_.limits.header_timeout = absl::Milliseconds(500);
  Start();
  RawClient silent(server_->port());
  EXPECT_EQ(silent.ReadToEnd(), "");
  EXPECT_TRUE(silent.closed_by_server());
  EXPECT_EQ(server_->stats().tls_failures, 1u);
}

TEST_F(TlsTest, NewCertificatesHoldForNewConnections) {
  Start();
  TlsClient old = Connect();
  EXPECT_EQ(old.server_name(), "server-1");
  Write("server-2");
  EXPECT_TRUE(server_->ReloadTls().ok());
  EXPECT_EQ(Connect().server_name(), "server-2");
  EXPECT_EQ(BodyOf(old.Ask(Post("/echo", "still"))), "still");
}

TEST_F(TlsTest, ABrokenCertificateLeavesTheOldOne) {
  Start();
  WriteKey(options_.tls.key, NewKey().get());
  const absl::Status status = server_->ReloadTls();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("key.pem"));
  EXPECT_EQ(Connect().server_name(), "server-1");
}

TEST_F(TlsTest, WithAClientCaOnlyItsCertificatesComeIn) {
  options_.tls.client_ca = dir_ / "ca.pem";
  WriteCert(options_.tls.client_ca, ca_.get());
  Start();
  Key key = NewKey();
  Cert good = NewCert("client", key.get(), "ca", ca_key_.get(), 3);
  const Key other_ca = NewKey();
  Cert bad = NewCert("client", key.get(), "ca", other_ca.get(), 3);
  EXPECT_EQ(BodyOf(Connect({.key = &key, .cert = &good}).Ask(Post("/echo", "in"))), "in");
  // In TLS 1.3 a client learns of its refusal with the first read.
  EXPECT_EQ(Connect({.key = &key, .cert = &bad}).Ask(Post("/echo", "in")), "");
  EXPECT_EQ(Connect().Ask(Post("/echo", "in")), "");
}

TEST_F(TlsTest, ShutdownDoesNotWaitForHandshakes) {
  Start();
  RawClient silent(server_->port());
  TlsClient idle = Connect();
  EXPECT_EQ(BodyOf(idle.Ask(Post("/echo", "x"))), "x");
  server_->Shutdown(absl::Milliseconds(100));
  EXPECT_FALSE(RawClient(server_->port()).connected());
}

TEST_F(TlsTest, FilesThatAreMissingStopTheStart) {
  std::filesystem::remove(options_.tls.cert);
  HttpServer server(options_);
  EXPECT_EQ(server.Start().code(), absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace tidepool
