#pragma once

#include <boost/asio/ssl/context.hpp>
#include <memory>

#include "absl/status/statusor.h"
#include "server/http/http_server.h"

namespace tidepool {

// A server's TLS: 1.2 and 1.3, ALPN http/1.1, no session tickets or cache (nothing is kept for a client that
// left); clients' certificates where there is a CA for them. Errors: InvalidArgument, with the file and
// OpenSSL's reason; a key that does not belong to the certificate is one.
absl::StatusOr<std::shared_ptr<boost::asio::ssl::context>> LoadTls(const HttpTlsFiles& files);

}  // namespace tidepool
