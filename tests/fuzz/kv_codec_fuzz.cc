// Payloads of KV codecs: decoding stays within the block whatever the bytes are, only a payload that is whole
// decodes, and what decodes encodes again. The input is [shape byte | payload]; a payload's checksum is made
// right half of the time, or nothing behind it would ever be reached.
#include <cmath>
#include <cstring>
#include <vector>

#include "base/digest.h"
#include "kernels/kv_codec.h"
#include "kvstore/codec/block_codec.h"
#include "kvstore/codec/cachegen.h"
#include "tests/fuzz/fuzz_target.h"

namespace tidepool {
namespace {

constexpr BlockLayout kLayouts[] = {{1, 1, 16, 32, DType::kBF16}, {2, 2, 8, 16, DType::kF32},
                                    {2, 1, 5, 33, DType::kF16},   {1, 1, 1, 1, DType::kBF16},
                                    {3, 2, 20, 7, DType::kBF16},  {1, 1, 64, 64, DType::kBF16}};
constexpr const char* kNames[] = {"none",       "int8",       "fp8",        "int4",
                                  "cachegen-1", "cachegen-2", "cachegen-3", "cachegen"};

void Repair(std::vector<std::byte>& payload, const BlockCodec& codec, const BlockLayout& l) {
  if (payload.size() < kCodecOverheadBytes) return;
  const uint32_t words[] = {l.layers, l.kv_heads, l.head_dim, l.block_tokens,
                            static_cast<uint32_t>(payload.size() - kCodecOverheadBytes)};
  const uint8_t head[] = {
      'T', 'P', 'K', 'C', 1, static_cast<uint8_t>(codec.id()), static_cast<uint8_t>(l.dtype), 0};
  std::memcpy(payload.data(), head, sizeof head);
  std::memcpy(payload.data() + sizeof head, words, sizeof words);
  const uint64_t sum = PayloadChecksum(std::span(payload).first(payload.size() - 8));
  std::memcpy(payload.data() + payload.size() - 8, &sum, sizeof sum);
}

}  // namespace

TIDEPOOL_FUZZ_TARGET(kv_codec) {
  fuzz::ByteReader in(input);
  const uint8_t shape = in.Byte();
  const BlockLayout& layout = kLayouts[shape % std::size(kLayouts)];
  const BlockCodec& codec = *FindBlockCodec(kNames[(shape >> 3) % std::size(kNames)]);
  const std::string_view rest = in.Text(input.size());
  const auto* bytes_of_rest = reinterpret_cast<const std::byte*>(rest.data());
  std::vector<std::byte> payload(bytes_of_rest, bytes_of_rest + rest.size());
  if ((shape & 0x40) != 0) Repair(payload, codec, layout);
  payload.shrink_to_fit();

  // One byte before and after the block tells of a write outside, should the sanitizer be off.
  std::vector<std::byte> block(layout.block_bytes() + 2, std::byte{0x5a});
  const std::span<std::byte> inside = std::span(block).subspan(1, layout.block_bytes());
  const absl::Status status = codec.Decode(layout, payload, inside);
  TP_CHECK(block.front() == std::byte{0x5a} && block.back() == std::byte{0x5a});
  if (!status.ok()) {
    TP_CHECK(absl::IsDataLoss(status) || absl::IsFailedPrecondition(status));
    TP_CHECK(!status.message().empty() && status.message().find('\n') == status.message().npos);
    return;
  }
  TP_CHECK(CodecOfPayload(payload) != nullptr);
  // Good enough to decode: it encodes again, unless a hostile payload made numbers that no codec takes.
  bool finite = true;
  for (size_t i = 0; i < inside.size() / DTypeBytes(layout.dtype); ++i) {
    finite &= std::fabs(KvElement(layout.dtype, inside.data(), i)) < kKvHuge;
  }
  std::vector<std::byte> again(codec.MaxEncodedBytes(layout));
  const absl::StatusOr<size_t> bytes = codec.Encode(layout, inside, again);
  TP_CHECK(bytes.ok() == (finite || codec.name() == "none"));
  if (!bytes.ok()) return;
  TP_CHECK(*bytes <= again.size());
  std::vector<std::byte> back(layout.block_bytes());
  TP_CHECK(codec.Decode(layout, std::span(again).first(*bytes), back).ok());
  if (codec.name() == "none") TP_CHECK(std::equal(back.begin(), back.end(), inside.begin()));
}

}  // namespace tidepool
