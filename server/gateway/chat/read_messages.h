#pragma once

#include "absl/status/statusor.h"
#include "server/gateway/request.h"

namespace tidepool {

// Codec: the messages of OpenAI's chat requests to the form that chat templates expect: content flattened to
// a string, a call's arguments parsed into an object (as vLLM does), reasoning under both of its names.
// Errors: InvalidArgument "messages[i].field: ...". Pure.
absl::StatusOr<OrderedJson> ReadMessages(const OrderedJson& body);

}  // namespace tidepool
