#pragma once

#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "config/config.h"
#include "server/cli/doctor.h"
#include "tidepool/v1/cluster.pb.h"

// The parts of `tidepool doctor`, one file each. Every check says in its detail what was found and, where
// that is not fine, what to do.
namespace tidepool {

inline Finding Ok(std::string check, std::string detail) {
  return {std::move(check), Finding::kOk, std::move(detail)};
}
inline Finding Warn(std::string check, std::string detail) {
  return {std::move(check), Finding::kWarn, std::move(detail)};
}
inline Finding Fail(std::string check, std::string detail) {
  return {std::move(check), Finding::kFail, std::move(detail)};
}

// doctor_machine.cc: memlock and huge pages for the host tier, and the clocks.
std::vector<Finding> DiagnoseMemory(const Config& config);
std::vector<Finding> DiagnoseClock();
// Whether there is room at kv.disk.path for what the tier wants.
Finding DiagnoseDisk(const KvConfig& kv);
// What direct I/O does there, in a file that is made and removed again; at most 4 s. A path is set.
Finding MeasureDisk(const KvConfig& kv);

// doctor_transport.cc: what UCX sees, certificates; and measured bandwidth between two processes.
std::vector<Finding> DiagnoseTransport(const TransportConfig& transport);
Finding MeasureTransport(const TransportConfig& transport);

// doctor_arena.cc: blocks from one process to another through shared memory, in two processes with pools and
// nodes of their own, as two workers have.
Finding MeasureArena(const TransportConfig& transport);

// doctor_cluster.cc: does this configuration's model go with what others have?
struct ModelSeen {
  std::string who;  // "worker prefill-1", "this configuration"
  v1::ModelIdentity model;
  std::string version;  // of the program; empty: not known
};
// This configuration's, read from the checkpoint's headers and samples of its weights (a second or so).
// Errors: those of loading a model.
absl::StatusOr<ModelSeen> LocalModel(const Config& config);
// Each of `others` against `local`.
std::vector<Finding> CompareModels(const ModelSeen& local, const std::vector<ModelSeen>& others);
// The records that earlier runs left at kv.disk.path against `local`.
std::vector<Finding> CompareDisk(const KvConfig& kv, const ModelSeen& local);

}  // namespace tidepool
