#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "server/cli/commands.h"
#include "server/cli/ctl_client.h"

namespace tidepool {

// Adds `lookup`, `where`, `pin`, ... below `ctl kv`. `options` is shared with the caller's commands and lives
// as long as `run`.
void AddCtlKvCommands(CLI::App& kv, const std::shared_ptr<CtlOptions>& options, Command& run);

// Which blocks a command means, as its flags say.
struct CtlSelectorFlags {
  std::vector<std::string> keys;  // 64 hex digits each
  std::string keys_file;          // one key a line; - is stdin
  std::vector<int32_t> tokens;
  std::string salt;  // hex
  std::string tenant;
  std::string session;  // decimal, or 16 hex digits after 0x
  bool all = false;
  std::string model;  // fingerprint
};

// InvalidArgument: none or several ways to name blocks, or a malformed one; it says which flag.
absl::StatusOr<v1::KvSelector> MakeSelector(const CtlSelectorFlags& flags);

// How a long operation goes on: one line on stderr where that is a terminal, rewritten.
void PrintProgress(const char* what, uint64_t done, uint64_t skipped, uint64_t total, uint64_t bytes);
void EndProgress();

}  // namespace tidepool
