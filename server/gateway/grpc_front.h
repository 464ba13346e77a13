#pragma once

#include <grpcpp/grpcpp.h>

#include "server/gateway/request_runner.h"
#include "tidepool/v1/inference.grpc.pb.h"

namespace tidepool {

// GrpcFront: the gRPC half of the front door, tidepool.v1.Inference, over the same runner. Thread-safe.
class GrpcFront final : public v1::Inference::CallbackService {
 public:
  struct Dependencies {  // borrowed
    const Config* config = nullptr;
    const Authenticator* auth = nullptr;
    RequestRunner* runner = nullptr;
    GatewayProbe* probe = nullptr;
  };
  explicit GrpcFront(Dependencies deps) : deps_(deps) {}

  grpc::ServerWriteReactor<v1::GenerateResponse>* Generate(grpc::CallbackServerContext* context,
                                                           const v1::GenerateRequest* request) override;
  grpc::ServerUnaryReactor* ListModels(grpc::CallbackServerContext* context,
                                       const v1::ListModelsRequest* request,
                                       v1::ListModelsResponse* response) override;

 private:
  absl::StatusOr<std::string> Tenant(const grpc::CallbackServerContext& context) const;

  const Dependencies deps_;
};

// The message as the runner takes it, with the checks that its comments promise.
std::variant<InferenceRequest, ApiError> FromProto(const v1::GenerateRequest& message);

}  // namespace tidepool
