#pragma once

#include "server/gateway/embeddings.h"
#include "server/gateway/openai_request.h"
#include "server/gateway/responses_conversion.h"
#include "tidepool/v1/inference.pb.h"

namespace tidepool {

// GrpcRequest: a message of tidepool.v1.Inference as the runner takes it, with the checks that its comments
// promise.
struct GrpcRequest {
  InferenceRequest request;
  FieldNames names;  // for errors that are found later
};

// Codec. A chat becomes the body of a chat completion, so that messages, tools and their limits are the same
// on both sides. Pure.
OrError<GrpcRequest> FromProto(const v1::GenerateRequest& message);
// A request whose input is to be encoded, nothing more.
OrError<GrpcRequest> FromProto(const v1::TokenizeRequest& message);
OrError<EmbeddingRequest> FromProto(const v1::EmbedRequest& message);

}  // namespace tidepool
