#include "transport/tls_frame.h"

#include <algorithm>
#include <cstring>

#include "base/status.h"
#include "transport/transport.h"

namespace tidepool {
namespace {

constexpr uint8_t kVersion = 1;
// A message's memory follows what has arrived of it, not what its head claims.
constexpr size_t kBodyStep = 16 * 1024;

uint64_t LoadLittle(const std::byte* p, int bytes) {
  uint64_t v = 0;
  for (int i = bytes - 1; i >= 0; --i) v = v << 8 | static_cast<uint64_t>(p[i]);
  return v;
}

}  // namespace

void AppendTlsHead(std::string& out, TlsFrameType type, size_t header_bytes, uint64_t length) {
  char head[kTlsHeadBytes] = {};
  head[0] = kVersion;
  head[1] = static_cast<char>(type);
  head[2] = static_cast<char>(header_bytes & 0xff);
  head[3] = static_cast<char>(header_bytes >> 8);
  for (int i = 0; i < 8; ++i) head[8 + i] = static_cast<char>(length >> (8 * i));
  out.append(head, sizeof head);
}

std::span<std::byte> TlsFrameReader::Next() {
  switch (state_) {
    case State::kHead:
      return std::span(head_).subspan(head_filled_);
    case State::kMessage:
    case State::kBulkHeader:
      if (body_.size() == body_filled_) body_.resize(std::min(body_bytes_, body_filled_ + kBodyStep));
      return std::as_writable_bytes(std::span(body_)).subspan(body_filled_);
    case State::kChunk:
      break;
  }
  if (dst_.empty()) return scratch_.first(std::min<uint64_t>(scratch_.size(), chunk_left_));
  return dst_.subspan(bulk_length_ - bulk_left_, chunk_left_);
}

absl::StatusOr<TlsFrameReader::Event> TlsFrameReader::Advance(size_t n) {
  switch (state_) {
    case State::kHead:
      head_filled_ += n;
      if (head_filled_ < kTlsHeadBytes) return Event::kNone;
      head_filled_ = 0;
      return TakeHead();
    case State::kMessage:
    case State::kBulkHeader:
      body_filled_ += n;
      if (body_filled_ < body_bytes_) return Event::kNone;
      if (state_ == State::kBulkHeader) return OpenBulk();
      state_ = State::kHead;
      return Event::kMessage;
    case State::kChunk:
      break;
  }
  chunk_left_ -= n;
  bulk_left_ -= n;
  if (chunk_left_ > 0) return Event::kNone;
  state_ = State::kHead;
  if (bulk_left_ > 0) return Event::kNone;
  dst_ = {};
  return Event::kBulkDone;
}

TlsFrameReader::Event TlsFrameReader::OpenBulk() {
  state_ = State::kHead;
  bulk_left_ = bulk_length_;
  dst_ = {};
  return Event::kBulk;
}

absl::StatusOr<TlsFrameReader::Event> TlsFrameReader::TakeHead() {
  const auto bad = [](const char* what) {
    return absl::InvalidArgumentError(std::string("the peer sent ") + what);
  };
  if (static_cast<uint8_t>(head_[0]) != kVersion) return bad("a frame of another version");
  if (LoadLittle(head_ + 4, 4) != 0) return bad("a frame with reserved bits set");
  const size_t header_bytes = LoadLittle(head_ + 2, 2);
  const uint64_t length = LoadLittle(head_ + 8, 8);
  const auto type = static_cast<TlsFrameType>(head_[1]);
  if (type != TlsFrameType::kBulk && header_bytes != 0) return bad("a header where none belongs");
  switch (type) {
    case TlsFrameType::kMessage:
    case TlsFrameType::kBulk:
      break;
    case TlsFrameType::kChunk:
      if (length == 0 || length > bulk_left_) return bad("a chunk that its bulk has no room for");
      chunk_left_ = length;
      state_ = State::kChunk;
      return Event::kNone;
    case TlsFrameType::kKeepAlive:
      if (length != 0) return bad("a keep-alive with a body");
      return Event::kNone;
    default:
      return bad("a frame of unknown type");
  }
  if (type == TlsFrameType::kBulk) {
    if (header_bytes > kTlsMaxBulkHeaderBytes) return bad("a bulk header above 512 bytes");
    if (length > kTlsMaxBulkBytes) return bad("a bulk above 64 GiB");
    if (bulk_left_ > 0) return bad("a bulk while another is open");
    bulk_length_ = length;
    body_bytes_ = header_bytes;
    state_ = State::kBulkHeader;
  } else {
    if (length > Transport::kMaxMessageBytes) return bad("a message above 256 KiB");
    body_bytes_ = length;
    state_ = State::kMessage;
  }
  body_.clear();
  body_filled_ = 0;
  if (body_bytes_ > 0) return Event::kNone;
  if (type == TlsFrameType::kBulk) return OpenBulk();
  state_ = State::kHead;
  return Event::kMessage;
}

}  // namespace tidepool
