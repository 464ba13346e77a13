#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>

#include "absl/status/status.h"

namespace tidepool {

// PlaneCodec: the numbers of a block in fewer bytes, without loss. Codec. Each number's bits are turned left
// by one, so that its exponent fills its highest byte and the sign goes to the noise at the other end; then
// the highest bytes of all numbers lie together, then the next, and each such plane that entropy coding makes
// shorter is a zstd frame. Exponents of neighbours are alike (about 3 of 8 bits are news); the bits of
// mantissas hardly ever are.
//
//   encoding := version u8 (1) | width u8 (1, 2 or 4) | 0 u16 | length u32 * width | plane * width | rest
//
// Numbers little-endian. Planes from the highest byte to the lowest, of n = bytes / width bytes each; the top
// bit of a length is set where the plane is a zstd frame of that many bytes, else it is the plane itself.
// `rest`: bytes % width bytes as they are. There is no checksum: the record has two.
//
// Holds memory for a block and zstd's tables; not thread-safe: one a thread.
class PlaneCodec {
 public:
  // `width`: bytes of a number: 2 for bf16 and fp16, 4 for fp32, 1 where the bytes are no numbers.
  explicit PlaneCodec(size_t width);
  ~PlaneCodec();

  // The encoding of `in`, to the front of `out`; nullopt where it would not fit into it (give no more room
  // than makes it worth while).
  std::optional<size_t> Encode(std::span<const std::byte> in, std::span<std::byte> out);

  // The bytes again: `out` is as long as they were. Whatever `in` holds, nothing is read or written beyond
  // the two. DataLoss: not an encoding of so many bytes; `out` is undefined then.
  absl::Status Decode(std::span<const std::byte> in, std::span<std::byte> out);

 private:
  struct State;
  const size_t width_;
  const std::unique_ptr<State> state_;
};

}  // namespace tidepool
