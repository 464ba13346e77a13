#pragma once

#include <openssl/ssl.h>

#include <memory>
#include <string>

#include "absl/status/statusor.h"

namespace tidepool {

struct SslFree {
  void operator()(SSL* ssl) const { SSL_free(ssl); }
  void operator()(SSL_CTX* context) const { SSL_CTX_free(context); }
};
using SslHandle = std::unique_ptr<SSL, SslFree>;
using SslContextHandle = std::unique_ptr<SSL_CTX, SslFree>;

// What OpenSSL has to say about this thread's last failure, on one line; its queue is empty afterwards.
std::string OpenSslReason();

// TLS 1.3 only, for either end of a connection: own certificate, and peers must have one that chains to the
// CA. No tickets and no cache: nothing is kept for a peer that left. Errors: InvalidArgument with the option
// (transport.tls_cert, ...), the file and the reason; a key that is not the certificate's is one.
absl::StatusOr<SslContextHandle> LoadPeerTls(const std::string& cert_file, const std::string& key_file,
                                             const std::string& ca_file);

// Days until the certificate ends (negative: it has), after the checks of LoadPeerTls.
absl::StatusOr<int> CertificateDaysLeft(const std::string& cert_file, const std::string& key_file,
                                        const std::string& ca_file);

// One connection over `fd` (borrowed), which must be non-blocking. Writes never raise SIGPIPE.
absl::StatusOr<SslHandle> NewPeerSsl(SSL_CTX* context, int fd);

}  // namespace tidepool
