#include "transport/tls_context.h"

#include <openssl/err.h>
#include <openssl/x509err.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "base/status.h"

namespace tidepool {
namespace {

// Several records a read: the socket is asked less often than once a record of 16 KiB.
constexpr size_t kReadBufferBytes = 64 * 1024;

// A socket BIO whose writes say MSG_NOSIGNAL: OpenSSL's own would raise SIGPIPE when the peer is gone.
int BioWrite(BIO* bio, const char* data, int size) {
  BIO_clear_retry_flags(bio);
  const auto fd = static_cast<int>(reinterpret_cast<intptr_t>(BIO_get_data(bio)));
  const ssize_t n = send(fd, data, static_cast<size_t>(size), MSG_NOSIGNAL);
  if (n < 0 && (errno == EAGAIN || errno == EINTR)) BIO_set_retry_write(bio);
  return static_cast<int>(n);
}

int BioRead(BIO* bio, char* data, int size) {
  BIO_clear_retry_flags(bio);
  const auto fd = static_cast<int>(reinterpret_cast<intptr_t>(BIO_get_data(bio)));
  const ssize_t n = recv(fd, data, static_cast<size_t>(size), 0);
  if (n < 0 && (errno == EAGAIN || errno == EINTR)) BIO_set_retry_read(bio);
  if (n == 0) BIO_set_flags(bio, BIO_FLAGS_IN_EOF);
  return static_cast<int>(n);
}

long BioControl(BIO* bio, int command, long, void*) {
  if (command == BIO_CTRL_EOF) return BIO_test_flags(bio, BIO_FLAGS_IN_EOF) != 0;
  return command == BIO_CTRL_FLUSH ? 1 : 0;
}

const BIO_METHOD* SocketMethod() {
  static BIO_METHOD* const method = [] {
    BIO_METHOD* m = BIO_meth_new(BIO_get_new_index() | BIO_TYPE_SOURCE_SINK, "tidepool socket");
    TP_CHECK(m != nullptr);
    BIO_meth_set_write(m, BioWrite);
    BIO_meth_set_read(m, BioRead);
    BIO_meth_set_ctrl(m, BioControl);
    return m;
  }();
  return method;
}

absl::Status FileProblem(const char* option, const std::string& file) {
  if (file.empty()) {
    return absl::InvalidArgumentError(std::string(option) +
                                      " is empty; mutual TLS needs tls_cert, tls_key and tls_ca");
  }
  if (access(file.c_str(), R_OK) != 0) {
    return absl::InvalidArgumentError(std::string(option) + ": " + file + ": " + std::strerror(errno));
  }
  return absl::InvalidArgumentError(std::string(option) + ": " + file + ": " + OpenSslReason());
}

}  // namespace

std::string OpenSslReason() {
  // The first error in the queue is the cause, the later ones are where it passed through.
  const unsigned long code = ERR_get_error();
  ERR_clear_error();
  if (code == 0) return "no reason given";
  const char* reason = ERR_reason_error_string(code);
  return reason != nullptr ? reason : "OpenSSL error " + std::to_string(code);
}

absl::StatusOr<SslContextHandle> LoadPeerTls(const std::string& cert_file, const std::string& key_file,
                                             const std::string& ca_file) {
  ERR_clear_error();
  SslContextHandle context(SSL_CTX_new(TLS_method()));
  if (!context) return absl::ResourceExhaustedError("TLS: " + OpenSslReason());
  SSL_CTX* c = context.get();
  SSL_CTX_set_min_proto_version(c, TLS1_3_VERSION);
  // AES-128 first: KV is bulk, and 128 bits are out of reach too.
  SSL_CTX_set_ciphersuites(c, "TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384:TLS_CHACHA20_POLY1305_SHA256");
  SSL_CTX_set_session_cache_mode(c, SSL_SESS_CACHE_OFF);
  SSL_CTX_set_num_tickets(c, 0);
  SSL_CTX_set_mode(
      c, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER | SSL_MODE_RELEASE_BUFFERS);
  SSL_CTX_set_read_ahead(c, 1);
  SSL_CTX_set_default_read_buffer_len(c, kReadBufferBytes);
  SSL_CTX_set_verify(c, SSL_VERIFY_PEER | SSL_VERIFY_FAIL_IF_NO_PEER_CERT, nullptr);
  // A chain of the CA, an intermediate or two, and the leaf: longer ones cost us signatures to check.
  SSL_CTX_set_verify_depth(c, 4);
  if (SSL_CTX_use_certificate_chain_file(c, cert_file.c_str()) != 1) {
    return FileProblem("tls_cert", cert_file);
  }
  if (SSL_CTX_use_PrivateKey_file(c, key_file.c_str(), SSL_FILETYPE_PEM) != 1) {
    if (ERR_GET_REASON(ERR_peek_error()) != X509_R_KEY_VALUES_MISMATCH) {
      return FileProblem("tls_key", key_file);
    }
    ERR_clear_error();
    return absl::InvalidArgumentError("tls_key: " + key_file + " is not the key of tls_cert " + cert_file);
  }
  if (ca_file.empty() || SSL_CTX_load_verify_locations(c, ca_file.c_str(), nullptr) != 1) {
    return FileProblem("tls_ca", ca_file);
  }
  return context;
}

absl::StatusOr<int> CertificateDaysLeft(const std::string& cert_file, const std::string& key_file,
                                        const std::string& ca_file) {
  TP_ASSIGN_OR_RETURN(const SslContextHandle context, LoadPeerTls(cert_file, key_file, ca_file));
  int days = 0, seconds = 0;
  const ASN1_TIME* end = X509_get0_notAfter(SSL_CTX_get0_certificate(context.get()));
  if (ASN1_TIME_diff(&days, &seconds, nullptr, end) != 1) {
    return absl::InvalidArgumentError("tls_cert: " + cert_file + " has a malformed end of validity");
  }
  return seconds < 0 && days == 0 ? -1 : days;
}

absl::StatusOr<SslHandle> NewPeerSsl(SSL_CTX* context, int fd) {
  SslHandle ssl(SSL_new(context));
  BIO* bio = BIO_new(SocketMethod());
  if (!ssl || bio == nullptr) {
    BIO_free(bio);
    return absl::ResourceExhaustedError("TLS: " + OpenSslReason());
  }
  BIO_set_data(bio, reinterpret_cast<void*>(static_cast<intptr_t>(fd)));
  BIO_set_init(bio, 1);
  SSL_set_bio(ssl.get(), bio, bio);  // takes both references
  return ssl;
}

}  // namespace tidepool
