// Frames of the handoff, and the directory in front of a batch: what a broken or hostile peer may send. What
// is accepted is within its limits and comes back from the encoder as it was. The input's first byte: 'f' a
// frame as it is, 'F' a frame whose sum is set right here, 'd' and 'D' the same of a batch's bulk transfer
// (its count of ranges in the second byte).
#include <span>
#include <string>

#include "base/digest.h"
#include "kvstore/fetch_codec.h"
#include "tests/fuzz/fuzz_target.h"

namespace tidepool {
namespace {

std::span<const std::byte> Bytes(std::string_view text) { return std::as_bytes(std::span(text)); }

void CheckId(const FetchId& id) { TP_CHECK(id.request.size() <= kMaxIdBytes); }

void CheckFrame(std::string_view bytes) {
  const auto frame = DecodeFetchFrame(bytes);
  if (!frame.ok()) return;
  TP_CHECK(frame->sender_boot.size() <= kMaxBootIdBytes && frame->receiver_boot.size() <= kMaxBootIdBytes);
  std::visit(
      [&](const auto& body) {
        if constexpr (requires { body.id; }) CheckId(body.id);
        if constexpr (requires { body.items; }) TP_CHECK(body.items.size() <= kMaxFetchKeys);
        if constexpr (requires { body.text; }) TP_CHECK(body.text.size() <= kMaxTextBytes);
      },
      frame->body);
  const bool greeting =
      std::holds_alternative<HelloFrame>(frame->body) || std::holds_alternative<RefuseFrame>(frame->body);
  TP_CHECK(frame->version == kFetchProtocolVersion || greeting);
  const auto again = DecodeFetchFrame(EncodeFetchFrame(*frame));
  TP_CHECK(again.ok() && *again == *frame);
}

void CheckDirectory(std::string_view bytes, uint32_t count, bool repaired) {
  BatchFrame batch{{}, count, bytes.size(), 0};
  const size_t directory = std::min<size_t>(bytes.size(), count * kRangeBytes);
  if (repaired) batch.checksum = PayloadChecksum(Bytes(bytes.substr(0, directory)));
  const auto ranges = DecodeDirectory(batch, Bytes(bytes));
  if (!ranges.ok()) return;
  TP_CHECK(ranges->size() == count);
  uint64_t total = count * kRangeBytes;
  for (const DataRange& range : *ranges) {
    TP_CHECK(range.length <= bytes.size() - total);
    total += range.length;
  }
  TP_CHECK(total == bytes.size());
  std::vector<std::byte> back(count * kRangeBytes);
  TP_CHECK(EncodeDirectory(*ranges, back) == batch.checksum);
}

}  // namespace

TIDEPOOL_FUZZ_TARGET(fetch_frame) {
  if (input.size() < 2) return;
  const char kind = input[0];
  if (kind == 'd' || kind == 'D') {
    return CheckDirectory(input.substr(2), static_cast<uint8_t>(input[1]), kind == 'D');
  }
  std::string bytes(input.substr(1));
  if (kind == 'F') {
    const uint64_t sum = PayloadChecksum(Bytes(bytes));
    for (int b = 0; b < 8; ++b) bytes.push_back(static_cast<char>(sum >> (8 * b)));
  }
  CheckFrame(bytes);
}

}  // namespace tidepool
