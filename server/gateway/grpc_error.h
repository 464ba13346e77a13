#pragma once

#include <grpcpp/grpcpp.h>

#include "server/gateway/errors.h"

namespace tidepool {

// Codec: errors of the catalogue as gRPC has them (inference.proto, at its top).

// The code by the canonical table, but UNIMPLEMENTED for what we know and do not serve; the message; and a
// google.rpc.Status with ErrorInfo, BadRequest (where a field is to blame) and RetryInfo (where a retry may
// help).
grpc::Status ToGrpcStatus(const ApiError& error);

// The trailers of an error. Call before the call is finished.
void AddErrorTrailers(const ApiError& error, grpc::ServerContextBase& context);

}  // namespace tidepool
