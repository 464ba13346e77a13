#include "kvstore/disk/record.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "base/status.h"
#include "kvstore/disk/crc32c.h"

// A record: header, zeros to the header area's end, payload, zeros to the page's end. Numbers little-endian.
//
//    0  8  "TPKVREC2": kind and version
//    8  4  CRC-32C of bytes [12, used)
//   12  4  used: bytes of the header
//   16  8  stamp: run            24  8  stamp: serial
//   32  8  place
//   40 32  space
//   72 32  key                  104 32  parent, zeros if there is none
//  136  8  session
//  144  4  turn                 148  4  position
//  152  4  compute seconds, IEEE binary32
//  156  4  1: there is a parent
//  160  8  payload bytes        168  4  CRC-32C of the payload
//  172  2  layout bytes         174  2  tenant bytes
//  176  4  number of tokens
//  180  8  stored bytes        188  4  CRC-32C of what is stored
//  192  4  encoding: 0 the payload itself, 1 plane_codec.h
//  196     layout, tenant, tokens (4 each)
//
// Version 1 ends its fixed part at 180: what is stored is the payload.

namespace tidepool {
namespace {

constexpr char kMagic[] = "TPKVREC";  // and the version, a digit
constexpr size_t kCheckedFrom = 12;
constexpr size_t kFixedBytes1 = 180, kFixedBytes2 = 196;
// What both versions' fixed parts and layouts fit into: payloads begin at the same place.
constexpr size_t kLayoutBytesMax1 = 128;
static_assert(kFixedBytes1 + kLayoutBytesMax1 == kFixedBytes2 + kRecordLayoutBytesMax);

size_t FixedBytes(uint32_t version) { return version == 1 ? kFixedBytes1 : kFixedBytes2; }
size_t LayoutBytesMax(uint32_t version) { return version == 1 ? kLayoutBytesMax1 : kRecordLayoutBytesMax; }

size_t AlignUp(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }

class Writer {
 public:
  explicit Writer(std::span<std::byte> out) : out_(out) {}
  template <typename T>
  void Number(T v) {
    static_assert(std::endian::native == std::endian::little);
    Bytes(&v, sizeof v);
  }
  void Bytes(const void* p, size_t n) {
    if (n > 0) std::memcpy(out_.data() + at_, p, n);
    at_ += n;
  }

 private:
  std::span<std::byte> out_;
  size_t at_ = 0;
};

class Reader {
 public:
  explicit Reader(std::span<const std::byte> in) : in_(in) {}
  template <typename T>
  T Number() {
    T v;
    Bytes(&v, sizeof v);
    return v;
  }
  void Bytes(void* p, size_t n) {
    if (n > 0) std::memcpy(p, in_.data() + at_, n);
    at_ += n;
  }

 private:
  std::span<const std::byte> in_;
  size_t at_ = 0;
};

}  // namespace

Sha256Digest RecordSpace(std::string_view fingerprint, const BlockLayout& layout, std::string_view codec) {
  return Sha256().UpdateField(fingerprint).UpdateField(layout.ToString()).UpdateField(codec).Finish();
}

size_t RecordHeaderBytes(size_t tokens_max) {
  return AlignUp(kFixedBytes2 + kRecordLayoutBytesMax + kRecordTenantBytesMax + tokens_max * sizeof(int32_t),
                 64);
}

size_t RecordBytes(size_t header_bytes, size_t payload_bytes) {
  return AlignUp(header_bytes + payload_bytes, kDiskPageBytes);
}

absl::Status EncodeRecordHeader(const RecordHeader& h, std::span<std::byte> out) {
  const BlockInfo& info = h.info;
  if (info.tenant.size() > kRecordTenantBytesMax)
    return absl::InvalidArgumentError("tenant of " + std::to_string(info.tenant.size()) +
                                      " bytes; a record holds " + std::to_string(kRecordTenantBytesMax));
  if (h.version < kRecordVersionMin || h.version > kRecordVersion)
    return absl::InvalidArgumentError("record version " + std::to_string(h.version));
  if (h.layout.size() > LayoutBytesMax(h.version))
    return absl::InvalidArgumentError("layout of " + std::to_string(h.layout.size()) +
                                      " bytes; a record holds " + std::to_string(LayoutBytesMax(h.version)));
  const size_t fixed = FixedBytes(h.version);
  const size_t texts = h.layout.size() + info.tenant.size();
  const size_t room = out.size() < fixed + texts ? 0 : out.size() - fixed - texts;
  if (out.size() < fixed + texts || info.tokens.size() > room / sizeof(int32_t))
    return absl::InvalidArgumentError(std::to_string(info.tokens.size()) +
                                      " tokens do not fit into a record's header of " +
                                      std::to_string(out.size()) + " bytes");
  const size_t used = fixed + texts + info.tokens.size() * sizeof(int32_t);
  Writer w(out);
  w.Bytes(kMagic, 7);
  w.Number(static_cast<char>('0' + h.version));
  w.Number(uint32_t{0});
  w.Number(static_cast<uint32_t>(used));
  w.Number(h.stamp.run);
  w.Number(h.stamp.serial);
  w.Number(h.place);
  w.Bytes(h.space.data(), h.space.size());
  w.Bytes(info.key.bytes.data(), 32);
  w.Bytes(info.parent.value_or(BlockKey{}).bytes.data(), 32);
  w.Number(info.session);
  w.Number(info.turn);
  w.Number(info.position);
  w.Number(info.compute_seconds);
  w.Number(static_cast<uint32_t>(info.parent.has_value()));
  w.Number(h.payload_bytes);
  w.Number(h.payload_crc);
  w.Number(static_cast<uint16_t>(h.layout.size()));
  w.Number(static_cast<uint16_t>(info.tenant.size()));
  w.Number(static_cast<uint32_t>(info.tokens.size()));
  if (h.version > 1) {
    const bool plain = h.encoding == RecordEncoding::kPlain;
    w.Number(plain ? h.payload_bytes : h.stored_bytes);
    w.Number(plain ? h.payload_crc : h.stored_crc);
    w.Number(static_cast<uint32_t>(h.encoding));
  }
  w.Bytes(h.layout.data(), h.layout.size());
  w.Bytes(info.tenant.data(), info.tenant.size());
  w.Bytes(info.tokens.data(), info.tokens.size() * sizeof(int32_t));
  std::fill(out.begin() + static_cast<std::ptrdiff_t>(used), out.end(), std::byte{0});
  const uint32_t crc = Crc32c(out.subspan(kCheckedFrom, used - kCheckedFrom));
  std::memcpy(out.data() + 8, &crc, sizeof crc);
  return absl::OkStatus();
}

absl::StatusOr<RecordHeader> DecodeRecordHeader(std::span<const std::byte> in) {
  if (in.size() < kFixedBytes2) return absl::DataLossError("shorter than a record's header");
  RecordHeader h;
  h.version = static_cast<uint32_t>(in[7]) - '0';
  if (std::memcmp(in.data(), kMagic, 7) != 0 || h.version < kRecordVersionMin || h.version > kRecordVersion)
    return absl::DataLossError("no record");
  const size_t fixed = FixedBytes(h.version);
  Reader r(in);
  char magic[8];
  r.Bytes(magic, sizeof magic);
  const auto crc = r.Number<uint32_t>();
  const size_t used = r.Number<uint32_t>();
  if (used < fixed || used > in.size()) return absl::DataLossError("header of impossible length");
  if (Crc32c(in.subspan(kCheckedFrom, used - kCheckedFrom)) != crc)
    return absl::DataLossError("header's checksum differs");
  // From here on the bytes are what some encoder wrote; the checks hold against one that is not ours.
  h.stamp.run = r.Number<uint64_t>();
  h.stamp.serial = r.Number<uint64_t>();
  h.place = r.Number<uint64_t>();
  r.Bytes(h.space.data(), h.space.size());
  r.Bytes(h.info.key.bytes.data(), 32);
  BlockKey parent;
  r.Bytes(parent.bytes.data(), 32);
  h.info.session = r.Number<uint64_t>();
  h.info.turn = r.Number<uint32_t>();
  h.info.position = r.Number<uint32_t>();
  h.info.compute_seconds = r.Number<float>();
  const auto flags = r.Number<uint32_t>();
  h.payload_bytes = r.Number<uint64_t>();
  h.payload_crc = r.Number<uint32_t>();
  const size_t layout = r.Number<uint16_t>();
  const size_t tenant = r.Number<uint16_t>();
  const size_t tokens = r.Number<uint32_t>();
  h.stored_bytes = h.payload_bytes;
  h.stored_crc = h.payload_crc;
  if (h.version > 1) {
    h.stored_bytes = r.Number<uint64_t>();
    h.stored_crc = r.Number<uint32_t>();
    const auto encoding = r.Number<uint32_t>();
    if (encoding > static_cast<uint32_t>(RecordEncoding::kPlanes))
      return absl::DataLossError("unknown encoding");
    h.encoding = static_cast<RecordEncoding>(encoding);
  }
  if (h.encoding == RecordEncoding::kPlain &&
      (h.stored_bytes != h.payload_bytes || h.stored_crc != h.payload_crc)) {
    return absl::DataLossError("header disagrees with itself");
  }
  if (layout > LayoutBytesMax(h.version) || tenant > kRecordTenantBytesMax ||
      tokens > (in.size() - fixed) / sizeof(int32_t) ||
      used != fixed + layout + tenant + tokens * sizeof(int32_t)) {
    return absl::DataLossError("header's lengths disagree");
  }
  if (flags > 1 || (flags == 0 && parent != BlockKey{})) return absl::DataLossError("unknown flags");
  if (!std::isfinite(h.info.compute_seconds)) return absl::DataLossError("compute time is no number");
  if (flags == 1) h.info.parent = parent;
  h.layout.resize(layout);
  r.Bytes(h.layout.data(), layout);
  h.info.tenant.resize(tenant);
  r.Bytes(h.info.tenant.data(), tenant);
  h.info.tokens.resize(tokens);
  r.Bytes(h.info.tokens.data(), tokens * sizeof(int32_t));
  for (const std::byte b : in.subspan(used)) {
    if (b != std::byte{0}) return absl::DataLossError("bytes after the header");
  }
  return h;
}

}  // namespace tidepool
