#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"
#include "kvstore/disk/record.h"
#include "kvstore/types.h"

namespace tidepool {

// What the index says of one record: where it is and what a listing shows. Tokens are in the record only.
struct IndexEntry {
  uint32_t version = kRecordVersion;  // of the record
  BlockKey key;
  uint64_t place = 0;  // RecordHeader::place
  RecordStamp stamp;
  uint64_t space = 0;  // the first eight bytes of RecordHeader::space, little-endian
  std::optional<BlockKey> parent;
  std::string tenant;
  uint64_t session = 0;
  uint32_t turn = 0;
  uint32_t position = 0;
  float compute_seconds = 0;
  uint64_t payload_bytes = 0;
  RecordEncoding encoding = RecordEncoding::kPlain;
  uint64_t stored_bytes = 0;  // with kPlain payload_bytes, whatever this says
  uint32_t stored_at = 0;     // wall clock, seconds since 1970: orders records of earlier runs by age

  bool operator==(const IndexEntry&) const = default;
};

// The value of an entry in the index, and back. DataLoss: not one.
std::string EncodeIndexValue(const IndexEntry& entry);
absl::StatusOr<IndexEntry> DecodeIndexValue(const BlockKey& key, std::string_view value);

}  // namespace tidepool
