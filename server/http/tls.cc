#include "server/http/tls.h"

#include <openssl/ssl.h>

#include <string>

namespace tidepool {
namespace {

namespace ssl = boost::asio::ssl;
using boost::system::error_code;

// The only protocol that is spoken inside. A client that offers others alone is refused, as RFC 7301 has it.
int SelectAlpn(SSL*, const unsigned char** out, unsigned char* out_bytes, const unsigned char* in,
               unsigned in_bytes, void*) {
  static constexpr unsigned char kHttp11[] = {8, 'h', 't', 't', 'p', '/', '1', '.', '1'};
  unsigned char* selected = nullptr;
  if (SSL_select_next_proto(&selected, out_bytes, kHttp11, sizeof kHttp11, in, in_bytes) !=
      OPENSSL_NPN_NEGOTIATED) {
    return SSL_TLSEXT_ERR_ALERT_FATAL;
  }
  *out = selected;
  return SSL_TLSEXT_ERR_OK;
}

}  // namespace

absl::StatusOr<std::shared_ptr<ssl::context>> LoadTls(const HttpTlsFiles& files) {
  auto context = std::make_shared<ssl::context>(ssl::context::tls_server);
  error_code ec;
  const auto failed = [&](const std::string& file, const std::string& what) {
    return absl::InvalidArgumentError(file + ": " + what + ": " + ec.message());
  };
  SSL_CTX* raw = context->native_handle();
  SSL_CTX_set_min_proto_version(raw, TLS1_2_VERSION);
  SSL_CTX_set_options(raw, SSL_OP_NO_COMPRESSION | SSL_OP_NO_RENEGOTIATION | SSL_OP_NO_TICKET |
                               SSL_OP_CIPHER_SERVER_PREFERENCE);
  SSL_CTX_set_session_cache_mode(raw, SSL_SESS_CACHE_OFF);
  // An idle connection keeps no 16 KiB record buffers.
  SSL_CTX_set_mode(raw, SSL_MODE_RELEASE_BUFFERS);
  SSL_CTX_set_alpn_select_cb(raw, SelectAlpn, nullptr);
  // Without one, OpenSSL asks at the terminal for an encrypted key's.
  context->set_password_callback([](size_t, ssl::context::password_purpose) { return std::string(); }, ec);
  if (ec) return failed(files.key, "no password callback");
  if (context->use_certificate_chain_file(files.cert, ec); ec)
    return failed(files.cert, "no PEM certificate");
  if (context->use_private_key_file(files.key, ssl::context::pem, ec); ec) {
    return failed(files.key, "no PEM private key, or not the certificate's, or encrypted");
  }
  if (SSL_CTX_check_private_key(raw) != 1) {
    return absl::InvalidArgumentError(files.key + ": is not the key of " + files.cert);
  }
  if (!files.client_ca.empty()) {
    if (context->load_verify_file(files.client_ca, ec); ec)
      return failed(files.client_ca, "no PEM certificates");
    context->set_verify_mode(ssl::verify_peer | ssl::verify_fail_if_no_peer_cert, ec);
    if (ec) return failed(files.client_ca, "clients cannot be verified");
  }
  return context;
}

}  // namespace tidepool
