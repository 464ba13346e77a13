// The disk tier's formats: decoding stays within its bytes whatever they are, and what decodes encodes to the
// same bytes. The input is [kind | bytes]: r the header area of a record, i the key and the value of an entry
// of the index; with R and I the target makes the checksum right, or little behind it would ever be reached.
// [1, 2 or 4 | length, two bytes | bytes]: an encoded payload of numbers of that width, and how many bytes it
// is to give.
#include <algorithm>
#include <cstring>
#include <vector>

#include "kvstore/disk/crc32c.h"
#include "kvstore/disk/index_entry.h"
#include "kvstore/disk/plane_codec.h"
#include "kvstore/disk/record.h"
#include "tests/fuzz/fuzz_target.h"

namespace tidepool {
namespace {

void CheckRefusal(const absl::Status& status) {
  TP_CHECK(absl::IsDataLoss(status));
  TP_CHECK(!status.message().empty() && status.message().find('\n') == status.message().npos);
}

void OneRecord(std::string_view text, bool repair) {
  // A buffer of its own size, so that a read beyond it is seen.
  std::vector<std::byte> area(text.size());
  if (!text.empty()) std::memcpy(area.data(), text.data(), text.size());
  if (repair && area.size() >= 16) {
    uint32_t used = 0;
    std::memcpy(&used, area.data() + 12, sizeof used);
    if (used >= 12 && used <= area.size()) {
      const uint32_t crc = Crc32c(std::span(area).subspan(12, used - 12));
      std::memcpy(area.data() + 8, &crc, sizeof crc);
    }
  }
  const auto header = DecodeRecordHeader(area);
  if (!header.ok()) return CheckRefusal(header.status());
  std::vector<std::byte> again(area.size(), std::byte{0x5a});
  TP_CHECK(EncodeRecordHeader(*header, again).ok());
  TP_CHECK(again == area);
}

void OneEntry(std::string_view text, bool repair) {
  BlockKey key;
  const size_t n = std::min(text.size(), key.bytes.size());
  std::copy_n(text.data(), n, reinterpret_cast<char*>(key.bytes.data()));
  std::string value(text.substr(n));
  if (repair && value.size() >= 4) {
    const auto bytes = std::as_bytes(std::span(value));
    const uint32_t crc = Crc32c(bytes.first(bytes.size() - 4), Crc32c(std::as_bytes(std::span(key.bytes))));
    std::memcpy(value.data() + value.size() - 4, &crc, sizeof crc);
  }
  value.shrink_to_fit();
  const auto entry = DecodeIndexValue(key, value);
  if (!entry.ok()) return CheckRefusal(entry.status());
  TP_CHECK(entry->tenant.size() <= kRecordTenantBytesMax);
  TP_CHECK(EncodeIndexValue(*entry) == value);
}

void OnePayload(std::string_view text, size_t width) {
  if (text.size() < 2) return;
  uint16_t bytes;
  std::memcpy(&bytes, text.data(), sizeof bytes);
  text.remove_prefix(2);
  std::vector<std::byte> in(text.size());
  if (!text.empty()) std::memcpy(in.data(), text.data(), text.size());
  std::vector<std::byte> out(bytes);
  PlaneCodec codec(width);
  const absl::Status decoded = codec.Decode(in, out);
  if (!decoded.ok()) return CheckRefusal(decoded);
  // What came out goes in again, and comes out the same.
  std::vector<std::byte> coded(out.size() + 64), back(out.size());
  const auto length = codec.Encode(out, coded);
  TP_CHECK(length.has_value());
  TP_CHECK(codec.Decode(std::span(coded).first(*length), back).ok());
  TP_CHECK(back == out);
}

}  // namespace

TIDEPOOL_FUZZ_TARGET(disk_record) {
  if (input.empty()) return;
  const std::string_view rest = input.substr(1);
  switch (input[0]) {
    case 'R':
    case 'r':
      return OneRecord(rest, input[0] == 'R');
    case 'I':
    case 'i':
      return OneEntry(rest, input[0] == 'I');
    case '1':
    case '2':
    case '4':
      return OnePayload(rest, static_cast<size_t>(input[0] - '0'));
    default:
      return;
  }
}

}  // namespace tidepool
