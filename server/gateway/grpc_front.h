#pragma once

#include <grpcpp/grpcpp.h>

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>

#include "server/gateway/access_log.h"
#include "server/gateway/grpc_request.h"
#include "server/gateway/request_runner.h"
#include "tidepool/v1/inference.grpc.pb.h"

namespace tidepool {

// GrpcFront: the gRPC half of the front door, tidepool.v1.Inference, over the same runner. Thread-safe.
class GrpcFront final : public v1::Inference::CallbackService {
 public:
  struct Dependencies {  // borrowed, except where shared
    const Config* config = nullptr;
    std::shared_ptr<const TextModel> text;
    const Authenticator* auth = nullptr;
    RequestRunner* runner = nullptr;
    GatewayProbe* probe = nullptr;
    WorkPool* pool = nullptr;
    TenantLimits* limits = nullptr;
    AccessLog* access_log = nullptr;  // null: no lines
  };
  explicit GrpcFront(Dependencies deps) : deps_(std::move(deps)) {}

  grpc::ServerWriteReactor<v1::GenerateResponse>* Generate(grpc::CallbackServerContext* context,
                                                           const v1::GenerateRequest* request) override;
  grpc::ServerUnaryReactor* Embed(grpc::CallbackServerContext* context, const v1::EmbedRequest* request,
                                  v1::EmbedResponse* response) override;
  grpc::ServerUnaryReactor* ListModels(grpc::CallbackServerContext* context,
                                       const v1::ListModelsRequest* request,
                                       v1::ListModelsResponse* response) override;
  grpc::ServerUnaryReactor* Tokenize(grpc::CallbackServerContext* context, const v1::TokenizeRequest* request,
                                     v1::TokenizeResponse* response) override;
  grpc::ServerUnaryReactor* Detokenize(grpc::CallbackServerContext* context,
                                       const v1::DetokenizeRequest* request,
                                       v1::DetokenizeResponse* response) override;

 private:
  // One call as every method begins it: its id, tenant and trace, with the id in the initial metadata.
  struct Call {
    grpc::CallbackServerContext* context = nullptr;
    std::string id, tenant;
    std::shared_ptr<AccessRecord> record;
    std::optional<ApiError> error;  // the key is not known
  };
  Call Begin(grpc::CallbackServerContext& context, std::string_view method, std::string request_id,
             size_t bytes);
  // What Finish of a call that the runner never saw is given; counts it.
  grpc::Status Refuse(const Call& call, const ApiError& error) const;
  // A unary call whose work is done in the pool, as one request of the tenant's: `work` fills the response.
  grpc::ServerUnaryReactor* InPool(Call call, std::function<std::optional<ApiError>()> work);

  const Dependencies deps_;
};

}  // namespace tidepool
