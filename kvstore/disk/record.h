#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/block_layout.h"
#include "base/digest.h"
#include "kvstore/types.h"

namespace tidepool {

// RecordStamp: which write of which run of the process made a record. An index entry holds the stamp of its
// record, so that one that outlived its record (a crash between the two) never meets another's bytes.
struct RecordStamp {
  uint64_t run = 0;     // drawn at random when the tier was opened
  uint64_t serial = 0;  // of the write in that run

  bool operator==(const RecordStamp&) const = default;
};

// How a payload lies in its record. It changes no byte of what is read, so it is no part of any key.
enum class RecordEncoding : uint8_t {
  kPlain = 0,   // as it is
  kPlanes = 1,  // kvstore/disk/plane_codec.h
};

// Of records that are written now, and the oldest that is read.
inline constexpr uint32_t kRecordVersion = 2, kRecordVersionMin = 1;

// RecordHeader: what a record on disk says of itself. `space` is RecordSpace: model, layout and codec.
struct RecordHeader {
  uint32_t version = kRecordVersion;
  RecordStamp stamp;
  // Its place in the file, counted from behind the first page: in pages; in version 1, where all records had
  // one size, in records.
  uint64_t place = 0;
  Sha256Digest space{};
  std::string layout;  // BlockLayout::ToString(), for people with a hex editor
  BlockInfo info;
  uint64_t payload_bytes = 0;
  uint32_t payload_crc = 0;  // Crc32c
  // What follows the header area; with kPlain (all there is in version 1) the payload, whatever these say.
  RecordEncoding encoding = RecordEncoding::kPlain;
  uint64_t stored_bytes = 0;
  uint32_t stored_crc = 0;

  bool operator==(const RecordHeader&) const = default;
};

inline constexpr size_t kRecordTenantBytesMax = 256;
inline constexpr size_t kRecordLayoutBytesMax = 112;
// The disk's unit: direct I/O moves multiples of it, at multiples of it.
inline constexpr size_t kDiskPageBytes = 4096;

// SHA-256 over fingerprint, layout and codec, each length-prefixed.
Sha256Digest RecordSpace(std::string_view fingerprint, const BlockLayout& layout, std::string_view codec);

// Bytes from a record's start to its payload in either version, where blocks have at most `tokens_max`
// tokens; a multiple of 64.
size_t RecordHeaderBytes(size_t tokens_max);
// Of a whole record; a multiple of kDiskPageBytes.
size_t RecordBytes(size_t header_bytes, size_t payload_bytes);

// Fills `out` (the whole header area of the record) with the header, the rest zero. InvalidArgument: it does
// not fit, or a field is beyond its limit.
absl::Status EncodeRecordHeader(const RecordHeader& header, std::span<std::byte> out);

// Reads the header area of a record. DataLoss names what is wrong with it. Never reads beyond `in`; what is
// accepted encodes to the same bytes.
absl::StatusOr<RecordHeader> DecodeRecordHeader(std::span<const std::byte> in);

}  // namespace tidepool
