#pragma once

#include "absl/status/statusor.h"
#include "scheduler/types.h"
#include "tidepool/v1/cluster.pb.h"

// Codec: protobuf messages of tidepool/v1/cluster.proto ↔ the scheduler's plain structs. What comes in is
// checked here for shape (sizes, ranges, enumerators; InvalidArgument names the field); what it means is the
// core's affair.
namespace tidepool {

absl::StatusOr<WorkerReport> FromProto(const v1::WorkerReport& in);
absl::StatusOr<PlaceRequest> FromProto(const v1::PlaceRequest& in);
absl::StatusOr<FinishInfo> FromProto(const v1::FinishRequest& in);

void ToProto(const WorkerAddress& in, v1::WorkerAddress* out);
void ToProto(const ModelIdentity& in, v1::ModelIdentity* out);
void ToProto(const Placement& in, v1::PlaceReply* out);
void ToProto(const Rejection& in, v1::PlaceRejection* out);
void ToProto(const Candidate& in, v1::Candidate* out);
void ToProto(const WorkerView& in, v1::WorkerView* out);
void ToProto(const RequestRecord& in, absl::Time now, v1::Decision* out);

}  // namespace tidepool
