#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace tidepool {

// CRC-32C (Castagnoli, reflected, RFC 3720 appendix B.4) of `bytes`, going on from `crc` (0 to begin): what
// Crc32c(b, Crc32c(a)) gives is the checksum of a and b in a row. With SSE4.2 three independent streams keep
// the instruction's pipeline full; without it a table does, at a twentieth of the speed.
uint32_t Crc32c(std::span<const std::byte> bytes, uint32_t crc = 0);

// Copies src to dst (dst.size() >= src.size(); no overlap) and returns Crc32c(src, crc): one pass over memory
// for both.
uint32_t Crc32cCopy(std::span<std::byte> dst, std::span<const std::byte> src, uint32_t crc = 0);

// Whether this processor computes it in hardware.
bool Crc32cInHardware();

// The table's version, whatever the processor.
uint32_t Crc32cPortable(std::span<const std::byte> bytes, uint32_t crc = 0);

}  // namespace tidepool
