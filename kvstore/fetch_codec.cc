#include "kvstore/fetch_codec.h"

#include <cstring>
#include <span>
#include <type_traits>

#include "base/digest.h"
#include "base/status.h"

namespace tidepool {
namespace {

constexpr std::string_view kMagic = "TPKV";
constexpr size_t kFetchItemBytes = 32 + 4 + 8;
constexpr size_t kCommitItemBytes = 1 + 8;

enum class FrameType : uint8_t {
  kHello = 1,
  kHelloAck,
  kRefuse,
  kFetch,
  kData,
  kCommit,
  kCommitAck,
  kAbort,
  kRelease,
  kCredit,
  kProgress,
  kBatch,
};

uint64_t Sum(std::string_view bytes) { return PayloadChecksum(std::as_bytes(std::span(bytes))); }

class Writer {
 public:
  template <typename T>
  void Int(T v) {
    static_assert(std::is_unsigned_v<T>);
    for (size_t i = 0; i < sizeof(T); ++i) out_.push_back(static_cast<char>(v >> (8 * i)));
  }
  void Raw(std::string_view bytes) { out_.append(bytes); }
  void Str(std::string_view s, size_t limit) {
    TP_CHECK(s.size() <= limit);
    Int(static_cast<uint16_t>(s.size()));
    Raw(s);
  }
  void Key(const BlockKey& key) {
    out_.append(reinterpret_cast<const char*>(key.bytes.data()), key.bytes.size());
  }
  void Id(const FetchId& id) {
    Str(id.request, kMaxIdBytes);
    Int(id.attempt);
    Int(id.part);
    Int(id.try_number);
  }
  void Range(const DataRange& r) {
    Int(r.index);
    Int(r.slot.slot);
    Int(r.slot.generation);
    Int(r.layer_begin);
    Int(r.layer_end);
    Int(r.codec);
    Int(r.length);
    Int(r.checksum);
  }
  const std::string& bytes() const { return out_; }
  std::string Finish() {
    Int(Sum(out_));
    return std::move(out_);
  }

 private:
  std::string out_;
};

// Reads past the end set the error flag and yield zeros, so that a decoder checks once, at its end (and
// before each allocation).
class Reader {
 public:
  explicit Reader(std::string_view bytes) : bytes_(bytes) {}

  template <typename T>
  T Int() {
    T v = 0;
    if (bytes_.size() < sizeof(T)) {
      Fail();
      return 0;
    }
    for (size_t i = 0; i < sizeof(T); ++i)
      v |= static_cast<T>(static_cast<T>(static_cast<uint8_t>(bytes_[i])) << (8 * i));
    bytes_.remove_prefix(sizeof(T));
    return v;
  }
  std::string Str(size_t limit) {
    const size_t n = Int<uint16_t>();
    if (n > limit || n > bytes_.size()) {
      Fail();
      return {};
    }
    std::string out(bytes_.substr(0, n));
    bytes_.remove_prefix(n);
    return out;
  }
  BlockKey Key() {
    BlockKey key;
    if (bytes_.size() < key.bytes.size()) {
      Fail();
      return key;
    }
    std::memcpy(key.bytes.data(), bytes_.data(), key.bytes.size());
    bytes_.remove_prefix(key.bytes.size());
    return key;
  }
  FetchId Id() {
    FetchId id;
    id.request = Str(kMaxIdBytes);
    id.attempt = Int<uint32_t>();
    id.part = Int<uint32_t>();
    id.try_number = Int<uint32_t>();
    return id;
  }
  DataRange Range() {
    DataRange r;
    r.index = Int<uint32_t>();
    r.slot.slot = Int<uint32_t>();
    r.slot.generation = Int<uint64_t>();
    r.layer_begin = Int<uint32_t>();
    r.layer_end = Int<uint32_t>();
    r.codec = Int<uint8_t>();
    r.length = Int<uint64_t>();
    r.checksum = Int<uint64_t>();
    return r;
  }
  // A count of items of `item_bytes` each, all of which must be there; 0 after a failure.
  size_t Count(size_t item_bytes) {
    const size_t n = Int<uint32_t>();
    if (n > kMaxFetchKeys || n * item_bytes > bytes_.size()) {
      Fail();
      return 0;
    }
    return n;
  }
  bool Done() const { return ok_ && bytes_.empty(); }

 private:
  void Fail() {
    ok_ = false;
    bytes_ = {};
  }
  std::string_view bytes_;
  bool ok_ = true;
};

void Put(Writer& w, const HelloFrame& f) {
  w.Str(f.worker, kMaxIdBytes);
  w.Str(f.fingerprint, kMaxIdBytes);
  w.Str(f.layout, kMaxIdBytes);
}
void Put(Writer& w, const HelloAckFrame& f) { w.Str(f.worker, kMaxIdBytes); }
void Put(Writer& w, const RefuseFrame& f) {
  w.Id(f.id);
  w.Int(static_cast<uint8_t>(f.reason));
  w.Str(std::string_view(f.text).substr(0, kMaxTextBytes), kMaxTextBytes);
}
void Put(Writer& w, const FetchFrame& f) {
  TP_CHECK(f.items.size() <= kMaxFetchKeys);
  w.Id(f.id);
  w.Int(f.time_left_ms);
  w.Int(f.window);
  w.Int(static_cast<uint32_t>(f.items.size()));
  for (const FetchItem& item : f.items) {
    w.Key(item.key);
    w.Int(item.slot.slot);
    w.Int(item.slot.generation);
  }
}
void Put(Writer& w, const DataFrame& f) {
  w.Id(f.id);
  w.Range(f.range);
}
void Put(Writer& w, const CommitFrame& f) {
  TP_CHECK(f.items.size() <= kMaxFetchKeys);
  w.Id(f.id);
  w.Int(f.blocks);
  w.Int(f.bytes);
  w.Int(f.digest);
  w.Int(static_cast<uint32_t>(f.items.size()));
  for (const CommitItem& item : f.items) {
    w.Int(static_cast<uint8_t>(item.present));
    w.Int(item.sum);
  }
}
void Put(Writer& w, const CommitAckFrame& f) { w.Id(f.id); }
void Put(Writer& w, const AbortFrame& f) { w.Id(f.id); }
void Put(Writer& w, const ReleaseFrame& f) { w.Str(f.request, kMaxIdBytes); }
void Put(Writer& w, const CreditFrame& f) {
  w.Id(f.id);
  w.Int(f.received);
  w.Int(f.window);
  w.Int(static_cast<uint8_t>(f.poll));
}
void Put(Writer& w, const ProgressFrame& f) {
  w.Id(f.id);
  w.Int(f.sent);
}
void Put(Writer& w, const BatchFrame& f) {
  w.Id(f.id);
  w.Int(f.count);
  w.Int(f.length);
  w.Int(f.checksum);
}

HelloFrame GetHello(Reader& r) {
  HelloFrame f;
  f.worker = r.Str(kMaxIdBytes);
  f.fingerprint = r.Str(kMaxIdBytes);
  f.layout = r.Str(kMaxIdBytes);
  return f;
}
RefuseFrame GetRefuse(Reader& r) {
  RefuseFrame f;
  f.id = r.Id();
  f.reason = static_cast<RefuseReason>(r.Int<uint8_t>());
  f.text = r.Str(kMaxTextBytes);
  return f;
}
FetchFrame GetFetch(Reader& r) {
  FetchFrame f;
  f.id = r.Id();
  f.time_left_ms = r.Int<uint32_t>();
  f.window = r.Int<uint64_t>();
  f.items.resize(r.Count(kFetchItemBytes));
  for (FetchItem& item : f.items) {
    item.key = r.Key();
    item.slot.slot = r.Int<uint32_t>();
    item.slot.generation = r.Int<uint64_t>();
  }
  return f;
}
DataFrame GetData(Reader& r) {
  DataFrame f;
  f.id = r.Id();
  f.range = r.Range();
  return f;
}
CommitFrame GetCommit(Reader& r) {
  CommitFrame f;
  f.id = r.Id();
  f.blocks = r.Int<uint32_t>();
  f.bytes = r.Int<uint64_t>();
  f.digest = r.Int<uint64_t>();
  f.items.resize(r.Count(kCommitItemBytes));
  for (CommitItem& item : f.items) {
    item.present = r.Int<uint8_t>() != 0;
    item.sum = r.Int<uint64_t>();
  }
  return f;
}
CreditFrame GetCredit(Reader& r) {
  CreditFrame f;
  f.id = r.Id();
  f.received = r.Int<uint64_t>();
  f.window = r.Int<uint64_t>();
  f.poll = r.Int<uint8_t>() != 0;
  return f;
}
ProgressFrame GetProgress(Reader& r) {
  ProgressFrame f;
  f.id = r.Id();
  f.sent = r.Int<uint64_t>();
  return f;
}
BatchFrame GetBatch(Reader& r) {
  BatchFrame f;
  f.id = r.Id();
  f.count = r.Int<uint32_t>();
  f.length = r.Int<uint64_t>();
  f.checksum = r.Int<uint64_t>();
  return f;
}

}  // namespace

std::string EncodeFetchFrame(const FetchWireFrame& frame) {
  Writer w;
  w.Raw(kMagic);
  w.Int(frame.version);
  w.Int(static_cast<uint8_t>(frame.body.index() + 1));
  w.Str(frame.sender_boot, kMaxBootIdBytes);
  w.Str(frame.receiver_boot, kMaxBootIdBytes);
  std::visit([&](const auto& body) { Put(w, body); }, frame.body);
  return w.Finish();
}

absl::StatusOr<FetchWireFrame> DecodeFetchFrame(std::string_view bytes) {
  constexpr size_t kSumBytes = 8;
  if (bytes.size() < kMagic.size() + 2 + kSumBytes || !bytes.starts_with(kMagic)) {
    return absl::DataLossError("not a handoff frame");
  }
  const std::string_view content = bytes.substr(0, bytes.size() - kSumBytes);
  Reader sum(bytes.substr(content.size()));
  if (sum.Int<uint64_t>() != Sum(content)) return absl::DataLossError("handoff frame is damaged");

  Reader r(content.substr(kMagic.size()));
  FetchWireFrame frame;
  frame.version = r.Int<uint8_t>();
  const auto type = static_cast<FrameType>(r.Int<uint8_t>());
  if (frame.version != kFetchProtocolVersion && type != FrameType::kHello && type != FrameType::kRefuse) {
    return absl::FailedPreconditionError("handoff frame of version " + std::to_string(frame.version) +
                                         ", this process speaks " + std::to_string(kFetchProtocolVersion));
  }
  frame.sender_boot = r.Str(kMaxBootIdBytes);
  frame.receiver_boot = r.Str(kMaxBootIdBytes);
  switch (type) {
    case FrameType::kHello:
      frame.body = GetHello(r);
      break;
    case FrameType::kHelloAck:
      frame.body = HelloAckFrame{r.Str(kMaxIdBytes)};
      break;
    case FrameType::kRefuse:
      frame.body = GetRefuse(r);
      break;
    case FrameType::kFetch:
      frame.body = GetFetch(r);
      break;
    case FrameType::kData:
      frame.body = GetData(r);
      break;
    case FrameType::kCommit:
      frame.body = GetCommit(r);
      break;
    case FrameType::kCommitAck:
      frame.body = CommitAckFrame{r.Id()};
      break;
    case FrameType::kAbort:
      frame.body = AbortFrame{r.Id()};
      break;
    case FrameType::kRelease:
      frame.body = ReleaseFrame{r.Str(kMaxIdBytes)};
      break;
    case FrameType::kCredit:
      frame.body = GetCredit(r);
      break;
    case FrameType::kProgress:
      frame.body = GetProgress(r);
      break;
    case FrameType::kBatch:
      frame.body = GetBatch(r);
      break;
    default:
      return absl::DataLossError("handoff frame of unknown type " + std::to_string(static_cast<int>(type)));
  }
  if (!r.Done()) return absl::DataLossError("handoff frame is cut short or too long");
  return frame;
}

uint64_t EncodeDirectory(std::span<const DataRange> ranges, std::span<std::byte> out) {
  TP_CHECK(out.size() == ranges.size() * kRangeBytes);
  Writer w;
  for (const DataRange& r : ranges) w.Range(r);
  if (!out.empty()) std::memcpy(out.data(), w.bytes().data(), out.size());
  return Sum(w.bytes());
}

absl::StatusOr<std::vector<DataRange>> DecodeDirectory(const BatchFrame& batch,
                                                       std::span<const std::byte> bytes) {
  if (batch.count > bytes.size() / kRangeBytes) return absl::DataLossError("batch is shorter than it says");
  const std::string_view front(reinterpret_cast<const char*>(bytes.data()), batch.count * kRangeBytes);
  if (Sum(front) != batch.checksum) return absl::DataLossError("a batch's directory is damaged");
  Reader r(front);
  std::vector<DataRange> out(batch.count);
  uint64_t left = bytes.size() - front.size();
  for (DataRange& range : out) {
    range = r.Range();
    if (range.length > left) return absl::DataLossError("batch is shorter than its ranges");
    left -= range.length;
  }
  if (left != 0) return absl::DataLossError("batch is longer than its ranges");
  return out;
}

uint64_t BlockSum(std::span<const RangeSum> ranges) {
  std::string bytes;
  bytes.reserve(ranges.size() * 16);
  auto put = [&](uint64_t v, int n) {
    for (int b = 0; b < n; ++b) bytes.push_back(static_cast<char>(v >> (8 * b)));
  };
  for (const RangeSum& r : ranges) {
    put(r.layer_begin, 4);
    put(r.layer_end, 4);
    put(r.checksum, 8);
  }
  return Sum(bytes);
}

uint64_t ManifestDigest(const std::vector<FetchItem>& asked, const std::vector<CommitItem>& items) {
  TP_CHECK(asked.size() == items.size());
  std::string bytes;
  bytes.reserve(items.size() * 40);
  for (size_t i = 0; i < items.size(); ++i) {
    if (!items[i].present) continue;
    bytes.append(reinterpret_cast<const char*>(asked[i].key.bytes.data()), asked[i].key.bytes.size());
    for (int b = 0; b < 8; ++b) bytes.push_back(static_cast<char>(items[i].sum >> (8 * b)));
  }
  return Sum(bytes);
}

std::string HelloLayout(const BlockLayout& layout, const BlockCodec* codec) {
  std::string out = layout.ToString();
  if (codec != nullptr && codec->id() != CodecId::kNone) out += " kv.codec " + std::string(codec->name());
  return out;
}

}  // namespace tidepool
