#include "base/trace.h"

#include <algorithm>

#include "base/digest.h"

namespace tidepool {
namespace {

constexpr size_t kLength = 55;  // of version 00

// Lower case only: W3C has upper case refused.
int Nibble(char c) { return c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1; }

template <size_t N>
bool ReadHex(std::string_view digits, std::array<uint8_t, N>& out) {
  for (size_t i = 0; i < N; ++i) {
    const int high = Nibble(digits[2 * i]), low = Nibble(digits[2 * i + 1]);
    if (high < 0 || low < 0) return false;
    out[i] = static_cast<uint8_t>(high << 4 | low);
  }
  return true;
}

template <size_t N>
bool Zero(const std::array<uint8_t, N>& bytes) {
  return std::all_of(bytes.begin(), bytes.end(), [](uint8_t b) { return b == 0; });
}

}  // namespace

bool TraceContext::valid() const { return !Zero(trace_id) && !Zero(parent_id); }

std::string TraceContext::TraceIdHex() const { return valid() ? HexEncode(trace_id) : std::string(); }

std::optional<TraceContext> ParseTraceparent(std::string_view text) {
  if (text.size() < kLength || text[2] != '-' || text[35] != '-' || text[52] != '-') return std::nullopt;
  std::array<uint8_t, 1> version, flags;
  TraceContext out;
  if (!ReadHex(text.substr(0, 2), version) || !ReadHex(text.substr(3, 32), out.trace_id) ||
      !ReadHex(text.substr(36, 16), out.parent_id) || !ReadHex(text.substr(53, 2), flags)) {
    return std::nullopt;
  }
  if (version[0] == 0xff || !out.valid()) return std::nullopt;
  if (text.size() > kLength && (version[0] == 0 || text[kLength] != '-')) return std::nullopt;
  out.sampled = (flags[0] & 1) != 0;
  return out;
}

std::string FormatTraceparent(const TraceContext& trace) {
  if (!trace.valid()) return {};
  return "00-" + HexEncode(trace.trace_id) + "-" + HexEncode(trace.parent_id) +
         (trace.sampled ? "-01" : "-00");
}

std::string TraceNote(const TraceContext& trace) {
  return trace.valid() ? " trace " + trace.TraceIdHex() : std::string();
}

TraceContext ChildOf(const TraceContext& trace) {
  TraceContext out = trace;
  if (!trace.valid()) return out;
  // The generator's ids are longer than needed; one of 2^64 would be all zero.
  do {
    ReadHex(std::string_view(RandomHexId()).substr(0, 16), out.parent_id);
  } while (Zero(out.parent_id));
  return out;
}

}  // namespace tidepool
