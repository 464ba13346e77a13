#include "kvstore/disk/index_entry.h"

#include <cmath>
#include <cstring>
#include <span>

#include "base/status.h"
#include "kvstore/disk/crc32c.h"
#include "kvstore/disk/value_bytes.h"

// Numbers little-endian.
//
//   0  1  version, 2
//   1  1  1: there is a parent
//   2  2  tenant bytes
//   4  4  stored at
//   8  8  place      16  8  run     24  8  serial     32  8  space     40  8  payload bytes
//  48  8  session    56  4  turn    60  4  position   64  4  compute seconds
//  68 32  parent, zeros if there is none
// 100  8  stored bytes
// 108  1  encoding
// 109     tenant
//      4  CRC-32C of the key and all before
//
// Version 1 has no bytes 100 to 108: its records store payloads as they are.

namespace tidepool {
namespace {

constexpr size_t kFixedBytes1 = 100, kFixedBytes2 = 109;

size_t FixedBytes(uint32_t version) { return version == 1 ? kFixedBytes1 : kFixedBytes2; }

std::span<const std::byte> Bytes(std::string_view s) { return std::as_bytes(std::span(s.data(), s.size())); }

uint32_t ValueCrc(const BlockKey& key, std::string_view value) {
  return Crc32c(Bytes(value), Crc32c(std::as_bytes(std::span(key.bytes))));
}

}  // namespace

std::string EncodeIndexValue(const IndexEntry& e) {
  std::string out;
  out.reserve(kFixedBytes2 + e.tenant.size() + 4);
  Put(out, static_cast<uint8_t>(e.version));
  Put(out, static_cast<uint8_t>(e.parent.has_value()));
  Put(out, static_cast<uint16_t>(e.tenant.size()));
  Put(out, e.stored_at);
  Put(out, e.place);
  Put(out, e.stamp.run);
  Put(out, e.stamp.serial);
  Put(out, e.space);
  Put(out, e.payload_bytes);
  Put(out, e.session);
  Put(out, e.turn);
  Put(out, e.position);
  Put(out, e.compute_seconds);
  const BlockKey parent = e.parent.value_or(BlockKey{});
  out.append(reinterpret_cast<const char*>(parent.bytes.data()), parent.bytes.size());
  if (e.version > 1) {
    Put(out, e.encoding == RecordEncoding::kPlain ? e.payload_bytes : e.stored_bytes);
    Put(out, static_cast<uint8_t>(e.encoding));
  }
  out += e.tenant;
  Put(out, ValueCrc(e.key, out));
  return out;
}

absl::StatusOr<IndexEntry> DecodeIndexValue(const BlockKey& key, std::string_view value) {
  if (value.size() < kFixedBytes1 + 4) return absl::DataLossError("index entry too short");
  std::string_view tail = value.substr(value.size() - 4);
  const std::string_view head = value.substr(0, value.size() - 4);
  if (Take<uint32_t>(tail) != ValueCrc(key, head))
    return absl::DataLossError("index entry's checksum differs");
  std::string_view in = head;
  IndexEntry e;
  e.key = key;
  e.version = Take<uint8_t>(in);
  const auto has_parent = Take<uint8_t>(in);
  const size_t tenant = Take<uint16_t>(in);
  if (e.version < kRecordVersionMin || e.version > kRecordVersion || has_parent > 1 ||
      head.size() != FixedBytes(e.version) + tenant || tenant > kRecordTenantBytesMax) {
    return absl::DataLossError("index entry of an unknown form");
  }
  e.stored_at = Take<uint32_t>(in);
  e.place = Take<uint64_t>(in);
  e.stamp.run = Take<uint64_t>(in);
  e.stamp.serial = Take<uint64_t>(in);
  e.space = Take<uint64_t>(in);
  e.payload_bytes = Take<uint64_t>(in);
  e.session = Take<uint64_t>(in);
  e.turn = Take<uint32_t>(in);
  e.position = Take<uint32_t>(in);
  e.compute_seconds = Take<float>(in);
  BlockKey parent;
  std::memcpy(parent.bytes.data(), in.data(), parent.bytes.size());
  in.remove_prefix(parent.bytes.size());
  uint8_t encoding = 0;
  e.stored_bytes = e.payload_bytes;
  if (e.version > 1) {
    e.stored_bytes = Take<uint64_t>(in);
    encoding = Take<uint8_t>(in);
  }
  e.encoding = static_cast<RecordEncoding>(encoding);
  if (encoding > static_cast<uint8_t>(RecordEncoding::kPlanes) ||
      (e.encoding == RecordEncoding::kPlain && e.stored_bytes != e.payload_bytes))
    return absl::DataLossError("index entry of an unknown form");
  if (!std::isfinite(e.compute_seconds) || (has_parent == 0 && parent != BlockKey{}))
    return absl::DataLossError("index entry of an unknown form");
  if (has_parent == 1) e.parent = parent;
  e.tenant = in;
  return e;
}

}  // namespace tidepool
