#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/block_layout.h"

namespace tidepool {

// A payload describes itself. Version 1, little-endian:
//
//   payload := magic "TPKC" | version u8 | codec u8 | dtype u8 | 0 u8 | layers u32 | kv_heads u32
//              | head_dim u32 | block_tokens u32 | body_bytes u32 | body | sum u64
//
// `sum` is XXH3-64 over everything before it: it finds damage, not forgery. What a body holds:
// kernels/kv_codec.h (fp8, int8, int4: the planes of the block in its order), cachegen.h (cachegen-*), the
// block itself (none).
inline constexpr size_t kCodecHeaderBytes = 28;
inline constexpr size_t kCodecOverheadBytes = kCodecHeaderBytes + 8;

// Values are stable: they are in payloads.
enum class CodecId : uint8_t {
  kNone = 0,
  kFp8 = 1,
  kInt8 = 2,
  kInt4 = 3,
  kCacheGen1 = 4,
  kCacheGen2 = 5,
  kCacheGen3 = 6
};

// BlockCodec: a sealed KV block in fewer bytes, approximately (Codec). Immutable, thread-safe, lives for
// ever. Blocks that may have gone through a codec are other blocks than exact ones: the name given here
// enters their keys (RootKey), and only sealed blocks are encoded, never the tail that is still being
// written.
//
// A payload is self-contained, bounded, and safe to decode whatever it holds: damage is an error, never a
// read or write out of bounds.
class BlockCodec {
 public:
  virtual ~BlockCodec() = default;

  // "none", "fp8", "int8", "int4", "cachegen-1" (fewest bytes) to "cachegen-3", "cachegen" (any of those
  // three; it encodes as cachegen-3 where nobody chooses a level).
  virtual std::string_view name() const = 0;
  // What Encode writes.
  virtual CodecId id() const = 0;
  // What Decode takes.
  virtual bool Decodes(CodecId id) const = 0;
  // The most that Encode may write for a block of this layout.
  virtual size_t MaxEncodedBytes(const BlockLayout& layout) const = 0;

  // Writes the payload to the front of `out` and returns its size. The same block gives the same bytes on
  // every CPU of one build. InvalidArgument: a block or an `out` of another size than the layout asks for, a
  // dtype that no block has, a number in the block that is not finite (such a block stays as it is).
  virtual absl::StatusOr<size_t> Encode(const BlockLayout& layout, std::span<const std::byte> block,
                                        std::span<std::byte> out) const = 0;

  // `block` (layout.block_bytes()) from a payload of this codec. DataLoss: cut short, damaged, of another
  // version. FailedPrecondition: whole, but of another codec or layout; it says which. The contents of
  // `block` are undefined on an error.
  virtual absl::Status Decode(const BlockLayout& layout, std::span<const std::byte> payload,
                              std::span<std::byte> block) const = 0;
};

// nullptr: no such codec. Names as config's kv.codec has them; "" is "none".
const BlockCodec* FindBlockCodec(std::string_view name);
// InvalidArgument names what there is.
absl::StatusOr<const BlockCodec*> GetBlockCodec(std::string_view name);
// What a payload is encoded with, by its header alone (nothing else is checked). nullptr: not a payload.
const BlockCodec* CodecOfPayload(std::span<const std::byte> payload);
const BlockCodec& CodecById(CodecId id);
// In the order of their quality, as measured (README.md): none, int8, fp8, cachegen-3, cachegen-2, int4,
// cachegen-1.
std::span<const BlockCodec* const> AllBlockCodecs();

}  // namespace tidepool
