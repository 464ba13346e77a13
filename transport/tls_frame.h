#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"

namespace tidepool {

// What runs inside the TLS stream of TlsTransport, version 1. Numbers are little-endian.
//
//   stream    = *frame
//   frame     = message | bulk | chunk | keepalive
//   head      = version:u8 (1)  type:u8  header_bytes:u16  zero:u32  length:u64        ; 16 bytes
//   message   = head(type 1, header_bytes 0, length <= 256 KiB)  length * byte
//   bulk      = head(type 2, header_bytes <= 512, length <= 64 GiB)  header_bytes * byte
//   chunk     = head(type 3, header_bytes 0, 1 <= length <= what is left of the bulk)  length * byte
//   keepalive = head(type 4, header_bytes 0, length 0)
//
// A bulk's payload follows in chunks, between which messages and keep-alives may stand, so that a control
// message waits for one chunk and not for the whole bulk. One bulk is open at a time in each direction.
// Whatever else comes is an error and ends the connection.

enum class TlsFrameType : uint8_t { kMessage = 1, kBulk = 2, kChunk = 3, kKeepAlive = 4 };

constexpr size_t kTlsHeadBytes = 16;
constexpr size_t kTlsMaxBulkHeaderBytes = 512;
constexpr uint64_t kTlsMaxBulkBytes = 64ULL << 30;
// One chunk holds up a control message by 2 ms at 1 Gbit/s.
constexpr size_t kTlsChunkBytes = 256 * 1024;

// Appends a head to `out`.
void AppendTlsHead(std::string& out, TlsFrameType type, size_t header_bytes, uint64_t length);

// TlsFrameReader: Core. Tells where the stream's next bytes go and what they meant, so that bulk data is
// decrypted into its destination. Holds at most one message or bulk header. Not thread-safe.
class TlsFrameReader {
 public:
  enum class Event {
    kNone,      // more bytes are wanted
    kMessage,   // message() holds it
    kBulk,      // bulk_header() and bulk_length(): SetSink comes next, unless the length is 0
    kBulkDone,  // the last byte of the bulk's payload is there
  };

  // `scratch` takes what is dropped: at least one byte, borrowed, its content is nobody's.
  explicit TlsFrameReader(std::span<std::byte> scratch) : scratch_(scratch) {}

  // Where the next bytes belong, as many as are wanted there; never empty. Valid until Advance.
  std::span<std::byte> Next();
  // `n` bytes (1 to Next().size()) were put there. InvalidArgument: the peer broke the grammar.
  absl::StatusOr<Event> Advance(size_t n);

  // After kBulk: `dst` has bulk_length() bytes, or none to drop the payload.
  void SetSink(std::span<std::byte> dst) { dst_ = dst; }

  std::string_view message() const { return body_; }
  std::string_view bulk_header() const { return body_; }
  uint64_t bulk_length() const { return bulk_length_; }
  // Between a kBulk of more than 0 bytes and its kBulkDone.
  bool bulk_open() const { return bulk_left_ > 0; }

 private:
  enum class State { kHead, kMessage, kBulkHeader, kChunk };
  absl::StatusOr<Event> TakeHead();
  Event OpenBulk();

  std::span<std::byte> scratch_;
  State state_ = State::kHead;
  std::byte head_[kTlsHeadBytes];
  size_t head_filled_ = 0;
  std::string body_;       // of a message, or a bulk's header
  size_t body_bytes_ = 0;  // how long it will be
  size_t body_filled_ = 0;
  uint64_t bulk_length_ = 0;
  uint64_t bulk_left_ = 0;
  uint64_t chunk_left_ = 0;
  std::span<std::byte> dst_;
};

}  // namespace tidepool
