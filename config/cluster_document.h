#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "config/loader.h"

namespace tidepool {

// What holds for all processes of a cluster at once stands in one YAML document in etcd: the same fields as
// in a file, as far as it makes sense that all have the same. A table in cluster_document.cc says of each
// field which it is.
enum class ClusterUse : uint8_t {
  kRefused,  // each process's own, or a secret, or something that must not change under a running cluster
  kRestart,  // may stand there; a process takes it when it starts
  kLive,     // may stand there; running processes take it at once, also from a file that is read again
};

struct ClusterRule {
  ClusterUse use = ClusterUse::kRefused;
  std::string_view reason;  // of kRefused: why, for the operator
};
ClusterRule ClusterRuleOf(std::string_view path);

// Whether processes of this role read the field at all.
bool Concerns(std::string_view path, ConfigRole role);

// Also what a person writes in a day; far below what etcd takes.
inline constexpr size_t kClusterDocumentBytesMax = 256 << 10;

// Reads a document and checks it as a whole: with every other field at its default it must be valid for each
// role. Errors: InvalidArgument listing every problem, one a line, each with its place ("name:line:column"),
// the field and the fix; a field that may not stand there with the reason. An empty document is fine.
absl::StatusOr<LoadedConfig> ParseClusterDocument(std::string_view yaml, std::string_view name);

// Fields of this role in which two configurations differ, by what the change needs.
struct ConfigChange {
  std::vector<std::string_view> live, restart;  // paths, in the order of Fields()

  bool operator==(const ConfigChange&) const = default;
};
ConfigChange CompareConfigs(const Config& from, const Config& to, ConfigRole role);

// Takes the live fields of `from`, with where they came from; all else stays.
void CopyLiveFields(const LoadedConfig& from, LoadedConfig& to);

// "scheduler.slo.ttft 5s -> 8s", for logs and people; secrets are not shown.
std::string DescribeChange(std::string_view path, const Config& from, const Config& to);

// Every live field with its value, as a YAML document that reads back as the same.
std::string FormatLiveFields(const Config& config);

}  // namespace tidepool
