#pragma once

#include <cstdio>
#include <cstdlib>
#include <string>
#include <string_view>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

// Propagates a non-OK absl::Status (or the status of a StatusOr) to the caller.
#define TP_RETURN_IF_ERROR(expr)                                              \
  do {                                                                        \
    if (::absl::Status tp_status = (expr); !tp_status.ok()) return tp_status; \
  } while (0)

#define TP_CONCAT_INNER(a, b) a##b
#define TP_CONCAT(a, b) TP_CONCAT_INNER(a, b)

// TP_ASSIGN_OR_RETURN(auto x, Make()): declares or assigns x, or returns the error. Not inside an
// unbraced `if`: it expands to several statements.
#define TP_ASSIGN_OR_RETURN(lhs, expr) TP_ASSIGN_OR_RETURN_IMPL(TP_CONCAT(tp_or_, __LINE__), lhs, expr)
#define TP_ASSIGN_OR_RETURN_IMPL(tmp, lhs, expr) \
  auto tmp = (expr);                             \
  if (!tmp.ok()) return tmp.status();            \
  lhs = std::move(tmp).value()

// TP_CHECK: for programmer mistakes only (a negative refcount), in production too; never for input,
// peers or disk.
#define TP_CHECK(cond)                                                              \
  do {                                                                              \
    if (!(cond)) [[unlikely]] {                                                     \
      std::fprintf(stderr, "%s:%d: check failed: %s\n", __FILE__, __LINE__, #cond); \
      std::abort();                                                                 \
    }                                                                               \
  } while (0)

namespace tidepool {

// The same code with `context` put before the message: callers add where, the detector said what.
inline absl::Status Annotate(const absl::Status& status, std::string_view context) {
  if (status.ok()) return status;
  return absl::Status(status.code(), std::string(context) + ": " + std::string(status.message()));
}

}  // namespace tidepool
