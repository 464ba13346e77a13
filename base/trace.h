#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace tidepool {

// The header, and the key of gRPC metadata, that carries a TraceContext.
inline constexpr char kTraceparentHeader[] = "traceparent";

// TraceContext: the place of a request in somebody's distributed trace. Plain; the default one (all zero)
// stands for "no trace". Source: W3C Trace Context, https://www.w3.org/TR/trace-context/ section 3.2.
struct TraceContext {
  std::array<uint8_t, 16> trace_id{};  // of the whole trace
  std::array<uint8_t, 8> parent_id{};  // of whoever calls
  bool sampled = false;                // the caller records it

  bool valid() const;
  // 32 lower-case hex digits, for log lines; empty where not valid().
  std::string TraceIdHex() const;
  bool operator==(const TraceContext&) const = default;
};

// A traceparent: `version "-" trace-id "-" parent-id "-" flags` in lower-case hex. Later versions are read
// for what version 00 has of them. nullopt: malformed (which includes all-zero ids and version ff); W3C has
// the header ignored then, no error.
std::optional<TraceContext> ParseTraceparent(std::string_view text);

// `trace` as a version 00 traceparent, 55 characters; empty where it is not valid().
std::string FormatTraceparent(const TraceContext& trace);

// " trace HEX" to follow a request's id in log lines; empty where `trace` is not valid().
std::string TraceNote(const TraceContext& trace);

// A call that is made on behalf of `trace`: the same trace under a fresh random parent id. Not valid() where
// `trace` is not.
TraceContext ChildOf(const TraceContext& trace);

}  // namespace tidepool
