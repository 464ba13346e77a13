#pragma once

// Codec of the handoff's frames. Version 2, little-endian.
//
//   frame    := magic "TPKV" | version u8 | type u8 | sender_boot str | receiver_boot str | body | sum u64
//   str      := length u16 | bytes          (ids at most 128 bytes, boot ids 64, texts 1024)
//   id       := request str | attempt u32 | part u32 | try u32
//   range    := index u32 | slot u32 | generation u64 | layers u32 [begin | u32 end) | codec u8
//               | length u64 | checksum u64
//   HELLO 1       := worker str | fingerprint str | layout str
//   HELLO_ACK 2   := worker str
//   REFUSE 3      := id | reason u8 | text str              (empty request: HELLO itself is refused)
//   FETCH 4       := id | time_left_ms u32 | window u64 | count u32
//                    | count * (key 32 bytes | slot u32 | generation u64)
//   DATA 5        := id | range                       (header of a bulk transfer of range.length bytes)
//   COMMIT 6      := id | blocks u32 | bytes u64 | digest u64 | count u32
//                    | count * (present u8 | sum u64)
//   COMMIT_ACK 7  := id
//   ABORT 8       := id
//   RELEASE 9     := request str
//   CREDIT 10     := id | received u64 | window u64 | poll u8
//   PROGRESS 11   := id | sent u64
//   BATCH 12      := id | count u32 | length u64 | checksum u64     (header of a bulk transfer of `length`
//                    bytes: count * range, whose XXH3-64 is `checksum`, then the ranges' bytes in order)
//
// `sum` of a frame is XXH3-64 over everything before it: a damaged frame is a lost frame. A range's
// `checksum` is XXH3-64 over its bytes as they travel; `codec` says what they are: 0, as they lie in the
// slot; else a CodecId, and the bytes are a payload (codec/block_codec.h) of the whole block, in a DATA of
// its own. A block may travel as several ranges of its layers, which make it up without gap or overlap; its
// `sum` in COMMIT is BlockSum of them. (request, attempt, part) names a fetch; `try` counts the client's own
// restarts of it, on which everything of an earlier try is void.
//
// Credits: the receiver says how many bytes (of bulk transfers: `length`) may be on their way to it over
// this connection (`window`) and how many of a fetch's have arrived (`received`, cumulative in its try). The
// sender counts what it sent of its living fetches and was not told to have arrived against the latest
// window. A CREDIT with `poll` asks how far the sender is: PROGRESS, or COMMIT once that was sent.
//
// HELLO and REFUSE keep their grammar in all versions, so that two versions can tell each other that they
// differ. Version 1 knew whole blocks only, and no credits.

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "absl/status/statusor.h"
#include "kvstore/codec/block_codec.h"
#include "kvstore/types.h"

namespace tidepool {

inline constexpr uint8_t kFetchProtocolVersion = 3;  // 3: eager bulk data of 1 MiB segments over TCP
// Keys in one FETCH: keeps FETCH and COMMIT below Transport::kMaxMessageBytes.
inline constexpr size_t kMaxFetchKeys = 4096;
// One BATCH's bulk transfer: what a receiver has to hold in a buffer of its own before it can place it.
inline constexpr uint64_t kMaxBatchBytes = 1 << 20;
// Of ranges whose bytes travel as they lie in the slot.
inline constexpr uint8_t kRawCodec = 0;
inline constexpr size_t kMaxIdBytes = 128;
inline constexpr size_t kMaxBootIdBytes = 64;
inline constexpr size_t kMaxTextBytes = 1024;

struct FetchId {
  std::string request;
  uint32_t attempt = 0;
  uint32_t part = 0;
  uint32_t try_number = 0;
  bool operator==(const FetchId&) const = default;
};

struct HelloFrame {
  std::string worker;
  std::string fingerprint;
  std::string layout;
  bool operator==(const HelloFrame&) const = default;
};

struct HelloAckFrame {
  std::string worker;
  bool operator==(const HelloAckFrame&) const = default;
};

// Why a peer says no. Values are stable.
enum class RefuseReason : uint8_t {
  kStaleBoot = 1,  // one of the two boot ids is of a process that is no more
  kMismatch = 2,   // protocol, fingerprint or layout differ
  kBusy = 3,       // a limit is reached: try elsewhere or later
  kNoHello = 4,    // this endpoint never said HELLO
  kExpired = 5,    // the server's own lease on the work ran out
  kFailed = 6,     // the server could not send
};

struct RefuseFrame {
  FetchId id;
  RefuseReason reason = RefuseReason::kFailed;
  std::string text;
  bool operator==(const RefuseFrame&) const = default;
};

struct FetchItem {
  BlockKey key;
  SlotRef slot;
  bool operator==(const FetchItem&) const = default;
};

struct FetchFrame {
  FetchId id;
  uint32_t time_left_ms = 0;
  uint64_t window = 0;
  std::vector<FetchItem> items;
  bool operator==(const FetchFrame&) const = default;
};

// Layers [layer_begin, layer_end) of one block.
struct DataRange {
  uint32_t index = 0;  // into FetchFrame::items
  SlotRef slot;
  uint32_t layer_begin = 0;
  uint32_t layer_end = 0;
  uint8_t codec = kRawCodec;
  uint64_t length = 0;
  uint64_t checksum = 0;
  bool operator==(const DataRange&) const = default;
};

struct DataFrame {
  FetchId id;
  DataRange range;
  bool operator==(const DataFrame&) const = default;
};

struct BatchFrame {
  FetchId id;
  uint32_t count = 0;
  uint64_t length = 0;
  uint64_t checksum = 0;
  bool operator==(const BatchFrame&) const = default;
};

struct CommitItem {
  bool present = false;
  uint64_t sum = 0;  // BlockSum
  bool operator==(const CommitItem&) const = default;
};

struct CommitFrame {
  FetchId id;
  uint32_t blocks = 0;  // present ones
  uint64_t bytes = 0;   // of those
  uint64_t digest = 0;  // ManifestDigest
  std::vector<CommitItem> items;
  bool operator==(const CommitFrame&) const = default;
};

struct CommitAckFrame {
  FetchId id;
  bool operator==(const CommitAckFrame&) const = default;
};

struct AbortFrame {
  FetchId id;
  bool operator==(const AbortFrame&) const = default;
};

struct ReleaseFrame {
  std::string request;
  bool operator==(const ReleaseFrame&) const = default;
};

struct CreditFrame {
  FetchId id;
  uint64_t received = 0;
  uint64_t window = 0;
  bool poll = false;
  bool operator==(const CreditFrame&) const = default;
};

struct ProgressFrame {
  FetchId id;
  uint64_t sent = 0;
  bool operator==(const ProgressFrame&) const = default;
};

struct FetchWireFrame {
  uint8_t version = kFetchProtocolVersion;
  std::string sender_boot;
  std::string receiver_boot;
  std::variant<HelloFrame, HelloAckFrame, RefuseFrame, FetchFrame, DataFrame, CommitFrame, CommitAckFrame,
               AbortFrame, ReleaseFrame, CreditFrame, ProgressFrame, BatchFrame>
      body;
  bool operator==(const FetchWireFrame&) const = default;
};

// Strings beyond their limits, and counts beyond kMaxFetchKeys, are programmer mistakes: FetchNode checks
// them where they enter.
std::string EncodeFetchFrame(const FetchWireFrame& frame);

// DataLoss: cut short, damaged, trailing bytes, a count that the bytes do not hold, an unknown type.
// FailedPrecondition: another version, of a type whose grammar may differ.
absl::StatusOr<FetchWireFrame> DecodeFetchFrame(std::string_view bytes);

// HelloFrame::layout of a process: its block layout, and what blocks may go through on their way (config
// kv.codec) where that is anything. Both must be equal.
std::string HelloLayout(const BlockLayout& layout, const BlockCodec* codec);

// A BATCH's directory: the front of its bulk transfer.
inline constexpr size_t kRangeBytes = 4 + 4 + 8 + 4 + 4 + 1 + 8 + 8;
// Writes ranges.size() * kRangeBytes bytes to `out`; returns their checksum for the header.
uint64_t EncodeDirectory(std::span<const DataRange> ranges, std::span<std::byte> out);
// DataLoss: the checksum differs, or the ranges' lengths and the directory do not add up to bytes.size().
absl::StatusOr<std::vector<DataRange>> DecodeDirectory(const BatchFrame& batch,
                                                       std::span<const std::byte> bytes);

// One range of a block as both ends saw it.
struct RangeSum {
  uint32_t layer_begin = 0;
  uint32_t layer_end = 0;
  uint64_t checksum = 0;
};
// XXH3-64 over (layer_begin u32 | layer_end u32 | checksum u64) of a block's ranges, in the order of layers.
uint64_t BlockSum(std::span<const RangeSum> ranges);

// XXH3-64 over (key | sum) of every present item, in order: ties the manifest to what was asked for.
uint64_t ManifestDigest(const std::vector<FetchItem>& asked, const std::vector<CommitItem>& items);

}  // namespace tidepool
