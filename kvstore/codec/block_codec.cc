#include "kvstore/codec/block_codec.h"

#include <array>
#include <cstring>
#include <optional>

#include "base/digest.h"
#include "base/status.h"
#include "kernels/kv_codec.h"
#include "kvstore/codec/cachegen.h"

namespace tidepool {
namespace {

constexpr char kMagic[4] = {'T', 'P', 'K', 'C'};
constexpr uint8_t kVersion = 1;

struct Header {
  char magic[4];
  uint8_t version;
  uint8_t codec;
  uint8_t dtype;
  uint8_t zero;
  uint32_t layers, kv_heads, head_dim, block_tokens, body_bytes;
};
static_assert(sizeof(Header) == kCodecHeaderBytes);

Header HeaderOf(CodecId id, const BlockLayout& l, size_t body_bytes) {
  Header h{};
  std::memcpy(h.magic, kMagic, sizeof kMagic);
  h.version = kVersion;
  h.codec = static_cast<uint8_t>(id);
  h.dtype = static_cast<uint8_t>(l.dtype);
  h.layers = l.layers;
  h.kv_heads = l.kv_heads;
  h.head_dim = l.head_dim;
  h.block_tokens = l.block_tokens;
  h.body_bytes = static_cast<uint32_t>(body_bytes);
  return h;
}

BlockLayout LayoutOf(const Header& h) {
  return {h.layers, h.kv_heads, h.head_dim, h.block_tokens, static_cast<DType>(h.dtype)};
}

bool KnownDType(uint8_t dtype) { return dtype >= 1 && dtype <= 3; }

std::optional<KvQuant> QuantOf(CodecId id) {
  switch (id) {
    case CodecId::kFp8:
      return KvQuant::kFp8;
    case CodecId::kInt8:
      return KvQuant::kInt8;
    case CodecId::kInt4:
      return KvQuant::kInt4;
    default:
      return std::nullopt;
  }
}

int LevelOf(CodecId id) { return static_cast<int>(id) - static_cast<int>(CodecId::kCacheGen1) + 1; }
bool IsCacheGen(CodecId id) { return id >= CodecId::kCacheGen1 && id <= CodecId::kCacheGen3; }

template <typename Visit>
void EachPlane(const BlockLayout& l, Visit visit) {
  KvPlane plane{.dtype = l.dtype, .tokens = l.block_tokens, .dim = l.head_dim};
  for (uint32_t layer = 0; layer < l.layers; ++layer) {
    for (const bool v : {false, true}) {
      plane.v = v;
      for (uint32_t head = 0; head < l.kv_heads; ++head) visit(plane, l.Offset(layer, v, head, 0));
    }
  }
}

size_t QuantBytes(KvQuant quant, const BlockLayout& l) {
  const auto of = [&](bool v) { return KvQuantBytes(quant, {l.dtype, l.block_tokens, l.head_dim, v}); };
  return size_t{l.layers} * l.kv_heads * (of(false) + of(true));
}

absl::Status NotFinite() {
  return absl::InvalidArgumentError(
      "the block holds numbers that are not finite; it cannot go through a KV codec");
}

class Codec final : public BlockCodec {
 public:
  // Encodes as `id`; decodes ids in [lowest, id].
  constexpr Codec(std::string_view name, CodecId id, CodecId lowest)
      : name_(name), id_(id), lowest_(lowest) {}

  std::string_view name() const override { return name_; }
  CodecId id() const override { return id_; }
  bool Decodes(CodecId id) const override { return id >= lowest_ && id <= id_; }

  size_t MaxEncodedBytes(const BlockLayout& layout) const override {
    if (const auto quant = QuantOf(id_)) return kCodecOverheadBytes + QuantBytes(*quant, layout);
    return kCodecOverheadBytes + (IsCacheGen(id_) ? CacheGenMaxBytes(layout) : layout.block_bytes());
  }

  absl::StatusOr<size_t> Encode(const BlockLayout& layout, std::span<const std::byte> block,
                                std::span<std::byte> out) const override {
    if (block.size() != layout.block_bytes() || out.size() < MaxEncodedBytes(layout) ||
        !KnownDType(static_cast<uint8_t>(layout.dtype)) || out.size() > UINT32_MAX) {
      return absl::InvalidArgumentError(
          "KV codec " + std::string(name_) + ": a block of " + std::to_string(block.size()) + " bytes into " +
          std::to_string(out.size()) + "; blocks of layout " + layout.ToString() + " have " +
          std::to_string(layout.block_bytes()) + " and need " + std::to_string(MaxEncodedBytes(layout)));
    }
    const std::span<std::byte> body = out.subspan(kCodecHeaderBytes);
    TP_ASSIGN_OR_RETURN(const size_t body_bytes, EncodeBody(layout, block, body));
    const Header header = HeaderOf(id_, layout, body_bytes);
    std::memcpy(out.data(), &header, sizeof header);
    const size_t bytes = kCodecHeaderBytes + body_bytes;
    const uint64_t sum = PayloadChecksum(out.first(bytes));
    std::memcpy(out.data() + bytes, &sum, sizeof sum);
    return bytes + sizeof sum;
  }

  absl::Status Decode(const BlockLayout& layout, std::span<const std::byte> payload,
                      std::span<std::byte> block) const override {
    if (block.size() != layout.block_bytes())
      return absl::InvalidArgumentError("KV codec " + std::string(name_) + ": decoding into " +
                                        std::to_string(block.size()) + " bytes, a block of layout " +
                                        layout.ToString() + " has " + std::to_string(layout.block_bytes()));
    Header header;
    TP_RETURN_IF_ERROR(Check(payload, header));
    const auto id = static_cast<CodecId>(header.codec);
    if (!Decodes(id) || LayoutOf(header) != layout) {
      return absl::FailedPreconditionError(
          "coded block: it is of codec " + std::string(CodecById(id).name()) + " and layout " +
          LayoutOf(header).ToString() + ", wanted is " + std::string(name_) + " and " + layout.ToString());
    }
    return DecodeBody(id, layout, payload.subspan(kCodecHeaderBytes, header.body_bytes), block);
  }

 private:
  absl::StatusOr<size_t> EncodeBody(const BlockLayout& layout, std::span<const std::byte> block,
                                    std::span<std::byte> body) const {
    if (const auto quant = QuantOf(id_)) {
      std::byte* out = body.data();
      bool finite = true;
      EachPlane(layout, [&](const KvPlane& plane, size_t at) {
        finite &= KvQuantize(*quant, plane, block.data() + at, out);
        out += KvQuantBytes(*quant, plane);
      });
      if (!finite) return NotFinite();
      return static_cast<size_t>(out - body.data());
    }
    if (!IsCacheGen(id_)) {
      std::memcpy(body.data(), block.data(), block.size());
      return block.size();
    }
    thread_local std::vector<std::byte> coded;  // of the coding threads, which live long
    coded.clear();
    if (!CacheGenEncode(layout, LevelOf(id_), block, coded)) return NotFinite();
    std::memcpy(body.data(), coded.data(), coded.size());
    return coded.size();
  }

  // A payload that is whole, of this version.
  static absl::Status Check(std::span<const std::byte> payload, Header& header) {
    if (payload.size() < kCodecOverheadBytes)
      return absl::DataLossError("coded block: " + std::to_string(payload.size()) + " bytes are no payload");
    std::memcpy(&header, payload.data(), sizeof header);
    if (std::memcmp(header.magic, kMagic, sizeof kMagic) != 0 || header.version != kVersion)
      return absl::DataLossError("coded block: no payload of version " + std::to_string(kVersion));
    uint64_t sum;
    std::memcpy(&sum, payload.data() + payload.size() - sizeof sum, sizeof sum);
    if (header.body_bytes != payload.size() - kCodecOverheadBytes ||
        sum != PayloadChecksum(payload.first(payload.size() - sizeof sum)))
      return absl::DataLossError("coded block: length or checksum differ");
    if (header.codec > static_cast<uint8_t>(CodecId::kCacheGen3) || !KnownDType(header.dtype) ||
        header.zero != 0)
      return absl::DataLossError("coded block: codec " + std::to_string(header.codec) + " or dtype " +
                                 std::to_string(header.dtype) + " does not exist");
    return absl::OkStatus();
  }

  static absl::Status DecodeBody(CodecId id, const BlockLayout& layout, std::span<const std::byte> body,
                                 std::span<std::byte> block) {
    if (IsCacheGen(id)) return CacheGenDecode(layout, body, block);
    const auto quant = QuantOf(id);
    const size_t want = quant ? QuantBytes(*quant, layout) : layout.block_bytes();
    if (body.size() != want)
      return absl::DataLossError("coded block: a body of " + std::to_string(body.size()) + " bytes, not " +
                                 std::to_string(want));
    if (!quant) {
      std::memcpy(block.data(), body.data(), want);
      return absl::OkStatus();
    }
    const std::byte* in = body.data();
    EachPlane(layout, [&](const KvPlane& plane, size_t at) {
      KvDequantize(*quant, plane, in, block.data() + at);
      in += KvQuantBytes(*quant, plane);
    });
    return absl::OkStatus();
  }

  const std::string_view name_;
  const CodecId id_, lowest_;
};

const Codec kNone("none", CodecId::kNone, CodecId::kNone);
const Codec kFp8("fp8", CodecId::kFp8, CodecId::kFp8);
const Codec kInt8("int8", CodecId::kInt8, CodecId::kInt8);
const Codec kInt4("int4", CodecId::kInt4, CodecId::kInt4);
const Codec kCacheGen1("cachegen-1", CodecId::kCacheGen1, CodecId::kCacheGen1);
const Codec kCacheGen2("cachegen-2", CodecId::kCacheGen2, CodecId::kCacheGen2);
const Codec kCacheGen3("cachegen-3", CodecId::kCacheGen3, CodecId::kCacheGen3);
const Codec kCacheGen("cachegen", CodecId::kCacheGen3, CodecId::kCacheGen1);

const std::array<const BlockCodec*, 7> kByQuality = {&kNone, &kInt8,      &kFp8,      &kCacheGen3,
                                                     &kInt4, &kCacheGen2, &kCacheGen1};

}  // namespace

std::span<const BlockCodec* const> AllBlockCodecs() { return kByQuality; }

const BlockCodec* FindBlockCodec(std::string_view name) {
  if (name.empty()) return &kNone;
  if (name == kCacheGen.name()) return &kCacheGen;
  for (const BlockCodec* codec : kByQuality) {
    if (codec->name() == name) return codec;
  }
  return nullptr;
}

absl::StatusOr<const BlockCodec*> GetBlockCodec(std::string_view name) {
  if (const BlockCodec* codec = FindBlockCodec(name)) return codec;
  return absl::InvalidArgumentError(
      "KV codec '" + std::string(name) +
      "' does not exist; there are none, int8, fp8, int4, cachegen, cachegen-3, cachegen-2, cachegen-1");
}

const BlockCodec& CodecById(CodecId id) {
  for (const BlockCodec* codec : kByQuality) {
    if (codec->id() == id) return *codec;
  }
  return kNone;
}

const BlockCodec* CodecOfPayload(std::span<const std::byte> payload) {
  Header header;
  if (payload.size() < kCodecOverheadBytes) return nullptr;
  std::memcpy(&header, payload.data(), sizeof header);
  if (std::memcmp(header.magic, kMagic, sizeof kMagic) != 0 ||
      header.codec > static_cast<uint8_t>(CodecId::kCacheGen3))
    return nullptr;
  return &CodecById(static_cast<CodecId>(header.codec));
}

}  // namespace tidepool
