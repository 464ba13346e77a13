#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "base/status.h"
#include "config/config.h"

namespace tidepool {

using FieldPtr =
    std::variant<std::string*, uint32_t*, uint64_t*, bool*, absl::Duration*, std::vector<std::string>*,
                 std::vector<ApiKeyConfig>*, std::map<std::string, uint64_t>*>;

enum class FieldKind {
  kText,
  kChoice,       // one of `choices`
  kAddress,      // HOST:PORT
  kCount,        // whole number in [min, max]
  kBytes,        // 256MiB; in [min, max] bytes
  kDuration,     // 30s, 500ms, 2m; in [min, max] milliseconds
  kBool,         // true, false
  kList,         // in YAML a list of words; as text WORD,WORD
  kApiKeys,      // in YAML a list of {key_sha256, tenant}; as text SHA256:TENANT,SHA256:TENANT
  kTenantBytes,  // in YAML {TENANT: 256MiB}; as text TENANT:256MiB,TENANT:1GiB; each in [min, max] bytes
};

// Field: one configurable value. YAML key, environment variable, flag, help, limits and formatting all
// come from this one entry, so they cannot drift apart.
struct Field {
  std::string_view path;  // "gateway.http_listen"; what stands before the last dot is the section
  FieldPtr (*in)(Config&);
  FieldKind kind;
  std::string_view help;
  uint64_t min = 0;
  uint64_t max = 0;
  std::string_view unit;     // of a kCount, plural: "tokens"
  std::string_view choices;  // of a kChoice: "a|b|c"
  bool common = false;       // shown by --help, not only by --help-all
  bool secret = false;       // never printed, never passed on a command line

  std::string env() const;   // TIDEPOOL_GATEWAY_HTTP_LISTEN
  std::string flag() const;  // --gateway-http-listen
};

// Every field, grouped by section. Static storage.
std::span<const Field> Fields();

// Null where there is none.
const Field* FindField(std::string_view path);

// Fields that had another name: the old path and the present one. The old is refused everywhere, with the
// new.
struct RenamedField {
  std::string_view old_path;
  std::string_view path;
};
std::span<const RenamedField> RenamedFields();
// The present path of an old one, or "".
std::string_view PresentPath(std::string_view old_path);

// The known path nearest to `path` by edit distance, or "" where nothing is near enough to be meant.
std::string NearestOf(std::string_view name, std::span<const std::string> known);

// Parses `text` into its place in `config`. Errors: InvalidArgument with the value, the limit and the fix
// (the caller adds field and place). `config` is unchanged on error.
absl::Status SetField(const Field& field, std::string_view text, Config& config);

// The value as SetField reads it back. Secrets too: see DisplayField.
std::string FormatField(const Field& field, const Config& config);

// For people and logs: a secret becomes "(set)" or "(empty)".
std::string DisplayField(const Field& field, const Config& config);

}  // namespace tidepool
