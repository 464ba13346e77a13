#include "server/gateway/grpc_error.h"

#include "absl/strings/ascii.h"
#include "tidepool/v1/error_details.pb.h"

namespace tidepool {
namespace {

template <typename Message>
void AddDetail(const char* type, const Message& message, v1::RpcStatus& status) {
  auto& any = *status.add_details();
  any.set_type_url(std::string("type.googleapis.com/google.rpc.") + type);
  any.set_value(message.SerializeAsString());
}

// Metadata is printable ASCII.
std::string Printable(std::string text) {
  for (char& c : text) {
    if (!absl::ascii_isprint(static_cast<unsigned char>(c))) c = '_';
  }
  return text;
}

}  // namespace

grpc::Status ToGrpcStatus(const ApiError& error) {
  const auto code = error.code == errors::kUnsupported.code ? grpc::StatusCode::UNIMPLEMENTED
                                                            : static_cast<grpc::StatusCode>(GrpcCode(error));
  v1::RpcStatus status;
  status.set_code(code);
  status.set_message(error.message);
  v1::RpcErrorInfo info;
  info.set_reason(absl::AsciiStrToUpper(std::string(error.code)));
  info.set_domain("tidepool");
  AddDetail("ErrorInfo", info, status);
  if (!error.param.empty()) {
    v1::RpcBadRequest bad;
    auto& violation = *bad.add_field_violations();
    violation.set_field(error.param);
    violation.set_description(error.message);
    AddDetail("BadRequest", bad, status);
  }
  if (error.retry_after_seconds > 0) {
    v1::RpcRetryInfo retry;
    retry.mutable_retry_delay()->set_seconds(error.retry_after_seconds);
    AddDetail("RetryInfo", retry, status);
  }
  return {code, error.message, status.SerializeAsString()};
}

void AddErrorTrailers(const ApiError& error, grpc::ServerContextBase& context) {
  context.AddTrailingMetadata("tidepool-error-code", std::string(error.code));
  if (!error.param.empty()) context.AddTrailingMetadata("tidepool-error-param", Printable(error.param));
  if (error.retry_after_seconds > 0) {
    // gRPC's own word for Retry-After.
    context.AddTrailingMetadata("grpc-retry-pushback-ms", std::to_string(error.retry_after_seconds * 1000));
  }
}

}  // namespace tidepool
