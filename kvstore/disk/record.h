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

// RecordHeader: what a record on disk says of itself. `space` is RecordSpace: model, layout and codec.
struct RecordHeader {
  RecordStamp stamp;
  uint64_t extent = 0;  // its place in the file
  Sha256Digest space{};
  std::string layout;  // BlockLayout::ToString(), for people with a hex editor
  BlockInfo info;
  uint64_t payload_bytes = 0;
  uint32_t payload_crc = 0;  // Crc32c

  bool operator==(const RecordHeader&) const = default;
};

inline constexpr size_t kRecordTenantBytesMax = 256;
inline constexpr size_t kRecordLayoutBytesMax = 128;
// The disk's unit: direct I/O moves multiples of it, at multiples of it.
inline constexpr size_t kDiskPageBytes = 4096;

// SHA-256 over fingerprint, layout and codec, each length-prefixed.
Sha256Digest RecordSpace(std::string_view fingerprint, const BlockLayout& layout, std::string_view codec);

// Bytes from a record's start to its payload, where blocks have at most `tokens_max` tokens; a multiple
// of 64.
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
